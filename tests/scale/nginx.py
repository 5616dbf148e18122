"""nginx before the gateways, with the configuration of docs/scaling.md."""

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing.testing import child_process, free_port

from ..programs import program

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
HASH = "    hash $http_x_smg_routing_key consistent;\n"

# What Debian has in /etc/nginx/nginx.conf, with every path in the folder. One process: nothing is
# left of it when that is killed.
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


@dataclass(frozen=True)
class Nginx:
    url: URL
    log: Path

    async def gateways(self, turns: int) -> Mapping[str, Sequence[URL]]:
        """Return which gateways answered each session's turns, in order, of so many turns."""
        served = defaultdict(list)
        for line in await asyncio.wait_for(self._logged(turns), 30):
            key, gateway, status = line.split()
            assert status == "200", line
            served[key].append(URL(f"http://{gateway}"))
        return served

    async def _logged(self, turns: int) -> Sequence[str]:
        while True:  # nginx writes a line when the answer has gone out
            lines = self.log.read_text().splitlines()
            lines = [line for line in lines if not line.startswith("- ")]
            if len(lines) >= turns:
                return lines
            await asyncio.sleep(0.01)


def on_the_page(language: str) -> str:
    """Return the one block of that language."""
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


def instead(text: str, *pairs: tuple[str, object]) -> str:
    """Return ``text`` with other words in it, each of which must be there once."""
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, str(new))
    return text


@asynccontextmanager
async def nginx(folder: Path, *gateways: URL, hashing: bool = True) -> AsyncIterator[Nginx]:
    """Run nginx before two gateways; without ``hashing`` they take turns."""
    first, second = gateways
    url = URL(f"http://127.0.0.1:{free_port()}")
    conf = instead(
        on_the_page("nginx"),
        ("listen 8080", f"listen {url.authority}"),
        ("10.0.0.1:30000", first.authority),
        ("10.0.0.2:30000", second.authority),
        ("/var/log/nginx/smg.log", "smg.log"),
        (HASH, HASH if hashing else ""),
    )
    (folder / "nginx.conf").write_text(MAIN)
    (folder / "smg.conf").write_text(conf)
    argv = (program("nginx", "nginx"), "-p", f"{folder}/", "-c", "nginx.conf", "-e", "stderr")
    async with ClientSession() as client:

        async def ready() -> bool:
            async with client.get(url / "health"):
                return True

        async with child_process(*argv, ready=ready):
            yield Nginx(url, folder / "smg.log")
