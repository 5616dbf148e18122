"""A session server that serves its metrics, in its own process."""

from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from yarl import URL

from aiohttp_smg_routing.testing import free_port
from harness.processes import Restartable, answering, command, local_url, restartable
from harness.proxies import pinned_server

from .crosstalk import Handler


def metrics_of(registry: CollectorRegistry = REGISTRY) -> Handler:
    """Return a handler that serves the metrics in a registry."""

    async def handler(request: web.Request) -> web.Response:
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return web.Response(body=generate_latest(registry), headers=headers)

    return handler


def main(gateway: str, port: int) -> None:
    """Run the server until it is killed."""
    app = pinned_server(URL(gateway), metrics="prometheus")
    app.router.add_get("/metrics", metrics_of())
    web.run_app(app, host="127.0.0.1", port=port, print=lambda _: None)


@asynccontextmanager
async def metered_server(gateway: URL) -> AsyncIterator[Restartable[Process]]:
    """Run the server with ``gateway`` until the block ends; it can be killed and restarted."""
    url = local_url(free_port())
    argv = command(main, gateway=str(gateway), port=url.port)
    async with restartable(url, lambda: answering(url / "metrics", *argv)) as server:
        yield server
