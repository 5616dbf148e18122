"""A job that waits in aiojobs' queue: the session that spawned it, not its neighbour's."""

import asyncio
from collections.abc import Callable, Coroutine

import aiojobs.aiohttp
import pytest
from aiohttp import ClientSession, web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import attach, current_session_id, setup
from aiohttp_smg_routing.testing import Recorder

from ..conftest import session_server
from .test_middleware import assert_no_crosstalk, call

PLAIN = aiojobs.Scheduler.spawn


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


@pytest.mark.parametrize("kept", [True, False])
async def test_a_job_that_waited_carries_the_session_that_spawned_it(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    kept: bool,
) -> None:
    all_are_queued = asyncio.Event()

    async def job(request: web.Request) -> None:
        await all_are_queued.wait()
        await call(request, gateway)

    app = server_with_jobs(gateway, job)
    client = await aiohttp_client(app)
    scheduler = app[aiojobs.aiohttp.AIOJOBS_SCHEDULER]
    if not kept:  # what aiojobs does by itself
        monkeypatch.setattr(aiojobs.Scheduler, "spawn", PLAIN)
    for number in range(10):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 200
    assert scheduler.pending_count == 9
    all_are_queued.set()
    await scheduler.wait_and_close()
    if kept:
        assert_no_crosstalk(gateway, 10)
    else:
        assert [sent.keys for sent in gateway.calls] == [[b"s-0"]] * 10


@pytest.mark.parametrize("where", ["root", "sub-app", "module"])
@pytest.mark.parametrize("plugin", ["root", "sub-app"])
async def test_it_does_not_matter_where_the_scheduler_and_the_plugin_are(
    gateway: Recorder, aiohttp_client: AiohttpClient, where: str, plugin: str
) -> None:
    are_queued = asyncio.Event()
    apps = {"root": web.Application(), "sub-app": web.Application()}

    async def job(session: ClientSession, session_id: str) -> None:
        await are_queued.wait()
        async with session.post(gateway.chat, data=session_id.encode()):
            pass

    async with ClientSession() as session, aiojobs.Scheduler(limit=1) as scheduler:

        async def handler(request: web.Request) -> web.Response:
            session_id = request.match_info["session_id"]
            spawned = job(session, session_id)
            if where == "module":
                await scheduler.spawn(spawned)
            else:
                await aiojobs.aiohttp.spawn(request, spawned)
            return web.Response()

        if where != "module":
            aiojobs.aiohttp.setup(apps[where], limit=1)
        apps["sub-app"].router.add_post("/{session_id}", handler)
        setup(apps[plugin], {"gateway": str(gateway.url)})
        attach(session, {"gateway": str(gateway.url)})
        apps["root"].add_subapp("/sub", apps["sub-app"])
        client = await aiohttp_client(apps["root"])
        for number in range(3):
            async with client.post(f"/sub/s-{number}") as response:
                assert response.status == 200
        are_queued.set()
        if where != "module":
            scheduler = apps[where][aiojobs.aiohttp.AIOJOBS_SCHEDULER]
        await scheduler.wait_and_close()
    assert_no_crosstalk(gateway, 3)


async def test_aiojobs_is_as_it_was_when_the_last_app_has_ended(gateway: Recorder) -> None:
    runners = [web.AppRunner(session_server(gateway.url)) for _ in range(2)]
    for runner in runners:
        await runner.setup()
        assert aiojobs.Scheduler.spawn is not PLAIN
    for runner in runners:
        assert aiojobs.Scheduler.spawn is not PLAIN
        await runner.cleanup()
    assert aiojobs.Scheduler.spawn is PLAIN


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
