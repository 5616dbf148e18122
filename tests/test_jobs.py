"""A job that waits in aiojobs' queue: the session that spawned it, not its neighbour's."""

import asyncio
from collections.abc import Callable, Coroutine

import aiojobs.aiohttp
import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import current_session_id
from aiohttp_smg_routing.testing import Recorder

from .conftest import session_server
from .test_middleware import assert_no_crosstalk, call


def server_with_jobs(
    gateway: Recorder, job: Callable[[web.Request], Coroutine[object, object, None]]
) -> web.Application:
    """Return a server whose handlers leave the call to a job, and that runs one job at a time."""

    async def handler(request: web.Request) -> web.Response:
        await aiojobs.aiohttp.spawn(request, job(request))
        return web.Response()

    app = session_server(gateway.url)
    aiojobs.aiohttp.setup(app, limit=1)
    app.router.add_post("/{session_id}", handler)
    return app


@pytest.mark.parametrize("enabled", [True, False])
async def test_a_job_that_waited_carries_the_session_that_spawned_it(
    gateway: Recorder, aiohttp_client: AiohttpClient, enabled: bool
) -> None:
    all_are_queued = asyncio.Event()

    async def job(request: web.Request) -> None:
        await all_are_queued.wait()
        await call(request, gateway)

    app = server_with_jobs(gateway, job)
    client = await aiohttp_client(app)
    scheduler = app[aiojobs.aiohttp.AIOJOBS_SCHEDULER]
    if not enabled:  # what aiojobs does by itself
        del scheduler.spawn
    for number in range(10):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 200
    assert scheduler.pending_count == 9
    all_are_queued.set()
    await scheduler.wait_and_close()
    if enabled:
        assert_no_crosstalk(gateway, 10)
    else:
        assert [sent.keys for sent in gateway.calls] == [[b"s-0"]] * 10


async def test_a_job_that_is_spawned_outside_a_request_has_no_neighbours_session(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    seen: list[str | None] = []
    is_queued = asyncio.Event()

    async def job(request: web.Request) -> None:
        await is_queued.wait()

    async def look() -> None:
        seen.append(current_session_id())

    app = server_with_jobs(gateway, job)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 200
    scheduler = app[aiojobs.aiohttp.AIOJOBS_SCHEDULER]
    await scheduler.spawn(look())
    is_queued.set()
    await scheduler.wait_and_close()
    assert seen == [None]


async def test_a_job_that_is_closed_before_it_starts_leaves_no_warning(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    started = []

    async def job(request: web.Request) -> None:
        started.append(request.path)
        await asyncio.Event().wait()

    app = server_with_jobs(gateway, job)
    client = await aiohttp_client(app)
    for path in ("/s-1", "/s-2"):
        async with client.post(path) as response:
            assert response.status == 200
    await app[aiojobs.aiohttp.AIOJOBS_SCHEDULER].close()
    assert started == ["/s-1"]
