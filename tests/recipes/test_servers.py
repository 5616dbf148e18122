"""The plugin in servers that are built and started in different ways."""

import os
import signal
import sys
from typing import Any

import pytest
from aiohttp import ClientSession, TCPConnector, web
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import setup
from aiohttp_smg_routing.testing import Recorder
from harness.agents import CHAT_PATH, chat
from harness.processes import ROOT

from .serving import assert_all_pinned, by_body, play, serving
from .unedited import make_app

RECIPES = ROOT / "docs" / "recipes.md"


def gunicorn_as_in_the_recipe() -> list[str]:
    [line] = [line for line in RECIPES.read_text().splitlines() if line.startswith("gunicorn ")]
    return line.split()


@pytest.mark.skipif(sys.platform == "win32", reason="gunicorn is for POSIX")
@pytest.mark.parametrize("worker_class", ["GunicornWebWorker", "GunicornUVLoopWebWorker"])
async def test_gunicorn_with_several_processes(
    recording_gateway: Recorder, worker_class: str
) -> None:
    def argv(port: int) -> list[str]:
        words = " ".join(["-m", *gunicorn_as_in_the_recipe()])
        for ours, there in (
            ("server:make_app", "tests.recipes.pinned:gunicorn_app"),
            ("GunicornWebWorker", worker_class),
            ("127.0.0.1:8080", f"127.0.0.1:{port}"),
        ):
            assert ours in words
            words = words.replace(ours, there)
        return [*words.split(), "--env", f"GATEWAY={recording_gateway.url}", "--no-control-socket"]

    async def pid_of_a_turn(url: URL, session_id: str) -> int:
        async with (
            ClientSession(url, connector=TCPConnector(force_close=True)) as agent,
            agent.post(CHAT_PATH, json=chat(session_id)) as response,
        ):
            assert response.status == 200
            return int(response.headers["X-Pid"])

    async with serving(argv) as url:
        one = await pid_of_a_turn(url, "s-1")
        os.kill(one, signal.SIGSTOP)  # so the other process takes the next turn
        try:
            assert await pid_of_a_turn(url, "s-1") != one
        finally:
            os.kill(one, signal.SIGCONT)
        recording_gateway.assert_pinned("s-1", turns=2)
        recording_gateway.calls.clear()
        await play(url, by_body)
    assert_all_pinned(recording_gateway)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_run_app(recording_gateway: Recorder, loop: str) -> None:
    gateway = str(recording_gateway.url)
    program = ["-m", "tests.recipes.pinned", gateway, loop]
    async with serving(lambda port: [*program, str(port)]) as url:
        await play(url, by_body)
    assert_all_pinned(recording_gateway)


async def test_app_runner(recording_gateway: Recorder) -> None:
    app = make_app(recording_gateway.url)
    setup(app, config(recording_gateway, session_id="json:user"))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    url = URL(f"http://{host}:{port}")
    await play(url, by_body)
    await runner.cleanup()
    assert_all_pinned(recording_gateway)


def config(gateway: Recorder, **values: Any) -> dict[str, Any]:
    return {"gateway": str(gateway.url), "instrument": True, **values}


def view(gateway: Recorder) -> type[web.View]:
    """Return a class-based view that proxies a turn."""

    class Turns(web.View):
        async def post(self) -> web.Response:
            async with (
                ClientSession() as session,
                session.post(gateway.chat, json=await self.request.json()) as answer,
            ):
                return web.Response(body=await answer.read(), status=answer.status)

    return Turns


async def test_class_based_views(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = web.Application()
    app.router.add_view("/sessions/{session_id}/turns", view(recording_gateway))
    setup(app, config(recording_gateway))
    client = await aiohttp_client(app)
    await play(client.make_url("/"), turn_of("/sessions/{}/turns"))
    assert_all_pinned(recording_gateway)


@pytest.mark.parametrize("where", ["root", "sub-app"])
async def test_sub_apps(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient, where: str
) -> None:
    app, sub_app = web.Application(), web.Application()
    sub_app.router.add_view("/{session_id}/turns", view(recording_gateway))
    setup(app if where == "root" else sub_app, config(recording_gateway))
    app.add_subapp("/sessions", sub_app)
    client = await aiohttp_client(app)
    await play(client.make_url("/"), turn_of("/sessions/{}/turns"))
    assert_all_pinned(recording_gateway)


def turn_of(path: str) -> Any:
    return lambda session_id: {"path": path.format(session_id), "json": chat(session_id)}
