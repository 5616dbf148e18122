"""nginx in front of the gateways, with the configuration of docs/scaling.md."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from yarl import URL

from aiohttp_smg_routing.testing import free_port
from harness.processes import answering, local_url

from ..programs import program
from .front import Front, instead, on_the_page

HASH = "    hash $http_x_smg_routing_key consistent;\n"

# This stands in for Debian's /etc/nginx/nginx.conf, with all paths in the folder. nginx runs as one
# process, so that killing it leaves nothing behind.
MAIN = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {}
http {
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include smg.conf;
}
"""


@asynccontextmanager
async def nginx(folder: Path, *gateways: URL, hashing: bool = True) -> AsyncIterator[Front]:
    first, second = gateways
    url, log = local_url(free_port()), folder / "smg.log"
    conf = instead(
        on_the_page("nginx"),
        ("listen 8080", f"listen {url.authority}"),
        ("10.0.0.1:30000", first.authority),
        ("10.0.0.2:30000", second.authority),
        ("/var/log/nginx/smg.log", log),
        (HASH, HASH if hashing else ""),
    )
    (folder / "nginx.conf").write_text(MAIN)
    (folder / "smg.conf").write_text(conf)
    argv = (program("nginx", "nginx"), "-p", f"{folder}/", "-c", "nginx.conf", "-e", "stderr")
    async with answering(url, *argv):
        yield Front(url, log, in_turn=True)
