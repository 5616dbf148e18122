"""aiohttp-session with cookie storage: the browser's session is the plugin's session."""

import asyncio

import aiohttp_session
import pytest
from aiohttp import ClientSession, CookieJar, web
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from cryptography.fernet import Fernet
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import setup
from aiohttp_smg_routing.testing import Recorder
from harness.agents import chat

from .serving import SESSIONS, TURNS


@pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")  # aiohttp-session's own keys
async def test_each_browser_keeps_its_key(
    recording_gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    async def log_in(request: web.Request) -> web.Response:
        session = await aiohttp_session.new_session(request)
        session["sid"] = request.query["as"]
        return web.Response()

    async def turn(request: web.Request) -> web.Response:
        async with (
            ClientSession() as session,
            session.post(recording_gateway.chat, json=await request.json()) as answer,
        ):
            return web.Response(body=await answer.read())

    async def logged_in(request: web.Request) -> str | None:
        return (await aiohttp_session.get_session(request)).get("sid")

    app = web.Application()
    app.router.add_post("/log-in", log_in)
    app.router.add_post("/turn", turn)
    aiohttp_session.setup(app, EncryptedCookieStorage(Fernet(Fernet.generate_key())))
    setup(
        app,
        {
            "gateway": str(recording_gateway.url),
            "instrument": True,
            "session_id": logged_in,
        },
    )
    url = (await aiohttp_client(app)).make_url("/")

    async def browser(session_id: str) -> None:
        jar = CookieJar(unsafe=True)  # accepts cookies from an IP address
        async with ClientSession(url, cookie_jar=jar, raise_for_status=True) as session:
            await session.post("/turn", json=chat("nobody"))
            await session.post("/log-in", params={"as": session_id})
            for _ in range(TURNS):
                await session.post("/turn", json=chat(session_id))

    await asyncio.gather(*map(browser, SESSIONS))
    for session_id in SESSIONS:
        recording_gateway.assert_pinned(session_id, turns=TURNS)
    for call in recording_gateway.calls:
        user = call.json()["user"]
        assert call.keys == ([] if user == "nobody" else [user.encode()])
