"""Several gateways, and gateways of which the caller gives the command line."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing.testing import (
    Recorder,
    SmgGateway,
    child_process,
    free_ports,
    smg_gateway,
)
from harness.processes import local_url, together


@asynccontextmanager
async def gateways(
    *workers: Sequence[Recorder | URL], policy: str, args: Sequence[str] = ()
) -> AsyncIterator[list[SmgGateway]]:
    """Run the real gateway for each list of workers."""
    urls = map(_urls, workers)
    async with together(smg_gateway(its, policy=policy, args=args) for its in urls) as started:
        yield started


def _urls(workers: Sequence[Recorder | URL]) -> list[URL]:
    return [worker.url if isinstance(worker, Recorder) else worker for worker in workers]


@asynccontextmanager
async def gateway_program(
    *argv: str, workers: Sequence[Recorder | URL], port: int | None = None
) -> AsyncIterator[SmgGateway]:
    """Run SMG, or a gateway with the same options, until the block ends.

    ``argv`` names the ``workers``. Enter the block once the gateway finds them all healthy.
    """
    recorders = tuple(worker for worker in workers if isinstance(worker, Recorder))
    urls = sorted(_urls(workers))
    url, metrics = map(local_url, free_ports(2))
    url = url.with_port(port or url.port)
    async with ClientSession() as session:

        async def ready() -> bool:
            async with session.get(url / "workers") as response:
                known = (await response.json())["workers"]
            return sorted(URL(each["url"]) for each in known if each["is_healthy"]) == urls

        async with child_process(
            *argv,
            *("--host", "127.0.0.1", "--port", str(url.port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics.port)),
            ready=ready,
        ) as process:
            yield SmgGateway(url, metrics / "metrics", process, recorders)


def worker_urls(workers: Sequence[Recorder]) -> tuple[str, ...]:
    """Return the option that names the workers."""
    return ("--worker-urls", *(str(worker.url) for worker in workers))
