"""aiojobs with ``in_session()``: a queued job has the session that spawned it."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from inspect import iscoroutinefunction

import aiojobs.aiohttp
import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import ROUTING, current_session_id, in_session
from aiohttp_smg_routing.testing import Recorder
from harness.proxies import pinned_server

from ..crosstalk import assert_no_crosstalk, call, server_with

SPAWN = aiojobs.Scheduler.spawn

Job = Callable[[web.Request], Coroutine[object, object, None]]
Spawn = Callable[[web.Request, Coroutine[object, object, None]], Awaitable[object]]


async def by_the_apps_scheduler(
    request: web.Request, job: Coroutine[object, object, None]
) -> object:
    return await aiojobs.aiohttp.spawn(request, in_session(job))


def server_with_jobs(
    gateway: Recorder, job: Job, spawn: Spawn = by_the_apps_scheduler, **config: object
) -> web.Application:
    """Return a server whose handlers leave calls to jobs, of which one runs at a time."""

    async def handler(request: web.Request) -> web.Response:
        await spawn(request, job(request))
        return web.Response(status=202)

    app = server_with(handler, gateway, **config)
    aiojobs.aiohttp.setup(app, limit=1)
    return app


async def test_a_job_that_waited_carries_the_session_that_spawned_it_and_is_not_late(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    all_are_queued = asyncio.Event()

    async def job(request: web.Request) -> None:
        await all_are_queued.wait()
        await call(request, gateway)

    app = server_with_jobs(gateway, job, on_missing="raise", on_late="raise")
    client = await aiohttp_client(app)
    scheduler = app[aiojobs.aiohttp.AIOJOBS_SCHEDULER]
    for number in range(10):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 202
    assert scheduler.pending_count == 9
    all_are_queued.set()
    await scheduler.wait_and_close()
    assert_no_crosstalk(gateway, 10)
    assert app[ROUTING].pins.summary().late == 0


async def test_without_in_session_it_carries_a_neighbours_session_and_that_is_said(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    """aiojobs starts a queued job in the context of the job that has just ended."""
    all_are_queued = asyncio.Event()

    async def job(request: web.Request) -> None:
        await all_are_queued.wait()
        await call(request, gateway)

    async def spawn(request: web.Request, job: Coroutine[object, object, None]) -> object:
        return await aiojobs.aiohttp.spawn(request, job)

    app = server_with_jobs(gateway, job, spawn)
    client = await aiohttp_client(app)
    for number in range(10):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 202
    all_are_queued.set()
    await app[aiojobs.aiohttp.AIOJOBS_SCHEDULER].wait_and_close()
    assert [sent.keys for sent in gateway.calls] == [[b"s-0"]] * 10
    assert app[ROUTING].pins.summary().late == 10
    assert "make it with in_session(...)" in caplog.text


async def test_a_scheduler_that_a_module_keeps_is_no_other(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    are_queued = asyncio.Event()

    async def job(request: web.Request) -> None:
        await are_queued.wait()
        await call(request, gateway)

    async with aiojobs.Scheduler(limit=1) as scheduler:

        async def spawn(request: web.Request, job: Coroutine[object, object, None]) -> object:
            return await scheduler.spawn(in_session(job))

        client = await aiohttp_client(server_with_jobs(gateway, job, spawn, on_late="raise"))
        for number in range(3):
            async with client.post(f"/s-{number}") as response:
                assert response.status == 202
        are_queued.set()
        await scheduler.wait_and_close()
    assert_no_crosstalk(gateway, 3)


async def test_nothing_of_aiojobs_is_changed_while_an_app_runs(gateway: Recorder) -> None:
    runner = web.AppRunner(pinned_server(gateway.url, instrument=True))
    await runner.setup()
    assert aiojobs.Scheduler.spawn is SPAWN
    assert iscoroutinefunction(aiojobs.Scheduler.spawn)
    await runner.cleanup()


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
        assert response.status == 202
    scheduler = app[aiojobs.aiohttp.AIOJOBS_SCHEDULER]
    await scheduler.spawn(in_session(look()))
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
            assert response.status == 202
    await app[aiojobs.aiohttp.AIOJOBS_SCHEDULER].close()
    assert started == ["/s-1"]
