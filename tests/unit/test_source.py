import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from importlib.machinery import BuiltinImporter
from typing import Any
from uuid import UUID

import pytest
from aiohttp import ClientSession, CookieJar, web
from aiohttp.test_utils import make_mocked_request
from aiohttp_session import SimpleCookieStorage, get_session
from aiohttp_session import setup as setup_aiohttp_session
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    ConfigError,
    RoutingConfig,
    current_session_id,
    routing_middleware,
    setup,
)
from aiohttp_smg_routing.key import SessionId
from aiohttp_smg_routing.source import Source


def sync_source(request: web.Request) -> SessionId | None:
    return request.query.get("imported")


async def async_source(request: web.Request) -> SessionId | None:
    return 17


if hasattr(web, "RequestKey"):
    SID = web.RequestKey("sid", str)
    OTHER = web.RequestKey("other_sid", str)


def session_id_finder(sources: Any) -> Callable[[web.Request], Awaitable[str | None]]:
    """Return a function that gives the session id that a request's handler sees."""
    config = RoutingConfig("http://gateway", session_id=sources)
    middleware: Any = routing_middleware(config)

    async def find(request: web.Request) -> str | None:
        seen = []

        async def handler(request: web.Request) -> web.Response:
            seen.append(current_session_id())
            return web.Response()

        await middleware(request, handler)
        return seen[0]

    return find


async def find(source: Any, target: str = "/", **arguments: Any) -> str | None:
    return await session_id_finder(source)(make_mocked_request("POST", target, **arguments))


@pytest.mark.parametrize(
    ("source", "target", "arguments", "session_id"),
    [
        ("match_info:sid", "/", {"match_info": {"sid": "s-1"}}, "s-1"),
        ("match_info:sid", "/", {"match_info": {}}, None),
        ("header:x-session-id", "/", {"headers": {"X-Session-Id": "s-1"}}, "s-1"),
        ("header:x-session-id", "/", {"headers": {"X-Session-Id": "  "}}, None),
        ("header:x-session-id", "/", {}, None),
        ("header:Authorization", "/", {"headers": {"Authorization": "Bearer sk-1"}}, "sk-1"),
        ("header:authorization", "/", {"headers": {"Authorization": "bearer  sk-1"}}, "sk-1"),
        ("header:Authorization", "/", {"headers": {"Authorization": "Bearer"}}, None),
        ("header:Authorization", "/", {"headers": {"Authorization": "Basic dTpw"}}, None),
        ("header:Authorization", "/", {"headers": {"Authorization": "sk-1"}}, None),
        ("header:Authorization", "/", {}, None),
        ("query:sid", "/?sid=a%20b", {}, "a b"),
        ("query:sid", "/?sid=", {}, None),
        ("query:sid", "/?sid", {}, None),
        ("query:sid", "/", {}, None),
        ("cookie:sid", "/", {"headers": {"Cookie": "a=b; sid=s-1"}}, "s-1"),
        ("cookie:sid", "/", {"headers": {"Cookie": "a=b"}}, None),
        ("call:tests.unit.test_source:sync_source", "/?imported=s-1", {}, "s-1"),
        ("call:tests.unit.test_source:async_source", "/", {}, "17"),
        (lambda request: UUID(int=1), "/", {}, str(UUID(int=1))),
        (lambda request: 0, "/", {}, "0"),
        (lambda request: None, "/", {}, None),
        (async_source, "/", {}, "17"),
    ],
)
async def test_a_source_gives_the_id_or_none(
    source: Source, target: str, arguments: dict[str, Any], session_id: str | None
) -> None:
    assert await find(source, target, **arguments) == session_id


async def test_request_source_reads_what_was_stored_on_the_request() -> None:
    finder = session_id_finder(("request:sid",))
    request = make_mocked_request("POST", "/")
    assert await finder(request) is None
    request._state["sid"] = "s-1"  # without the warning that aiohttp has for string keys
    assert await finder(request) == "s-1"


@pytest.mark.skipif(not hasattr(web, "RequestKey"), reason="aiohttp 3.14 brought RequestKey")
@pytest.mark.parametrize("name", ["sid", "tests.unit.test_source.sid"])
async def test_request_source_finds_a_request_key_by_its_name(name: str) -> None:
    request = make_mocked_request("POST", "/")
    request[OTHER] = "s-2"
    request[SID] = "s-1"
    assert await session_id_finder((f"request:{name}",))(request) == "s-1"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot tell the two apart")
async def test_a_source_that_awaits_what_is_cancelled_counts_as_no_session() -> None:
    async def source(request: web.Request) -> str:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        return await future  # type: ignore[no-any-return]

    assert await find((source, "query:sid"), "/?sid=s-1") == "s-1"


async def test_a_request_that_is_cancelled_while_its_source_waits_is_cancelled() -> None:
    waiting = asyncio.Event()

    async def source(request: web.Request) -> str:
        waiting.set()
        await asyncio.Event().wait()
        raise AssertionError("it never ends")

    finding = asyncio.create_task(find(source))
    await waiting.wait()
    finding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finding


async def test_sources_are_tried_in_order() -> None:
    sources = ("query:one", "header:Two", "query:three")
    headers = {"Two": "2"}
    assert await find(sources, "/?one=1&three=3", headers=headers) == "1"
    assert await find(sources, "/?one=&three=3", headers=headers) == "2"
    assert await find(sources, "/?three=3") == "3"
    assert await find(sources) is None


async def _raise_async(request: web.Request) -> str:
    raise web.HTTPUnauthorized


def _raise(request: web.Request) -> str:
    raise KeyError("boom")


@pytest.mark.parametrize("broken", [_raise, _raise_async, lambda r: b"bytes", lambda r: True])
async def test_a_source_that_fails_is_no_session_and_logged_once_with_its_traceback(
    broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    finder = session_id_finder((lambda request: None, broken, "query:sid"))
    assert await finder(make_mocked_request("POST", "/?sid=s-1")) == "s-1"
    assert await finder(make_mocked_request("POST", "/")) is None
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert "session id source" in record.getMessage()


async def test_the_next_source_is_asked_where_an_awaited_one_has_none() -> None:
    async def nobody(request: web.Request) -> None:
        return None

    for sources, session_id in (
        ((nobody, "query:sid"), "s-1"),
        ((nobody, async_source), "17"),
        ((nobody, nobody), None),
    ):
        assert await find(sources, "/?sid=s-1") == session_id


async def test_an_ignored_id_counts_as_none_and_the_next_source_is_asked() -> None:
    config = RoutingConfig(
        "http://gateway", session_id=("query:one", async_source), ignore_ids=["default", "17"]
    )
    middleware: Any = routing_middleware(config)
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(current_session_id())
        return web.Response()

    for target in ("/?one=s-1", "/?one=default", "/?one=Default"):
        await middleware(make_mocked_request("POST", target), handler)
    assert seen == ["s-1", None, "Default"]


@pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")  # its own keys
async def test_aiohttp_session_source_reads_the_session_of_the_cookie(
    aiohttp_client: AiohttpClient,
) -> None:
    async def log_in(request: web.Request) -> web.Response:
        (await get_session(request))["sid"] = request.query["as"]
        return web.Response()

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=str(current_session_id()))

    app = web.Application()
    setup_aiohttp_session(app, SimpleCookieStorage())
    app.router.add_post("/log-in", log_in)
    app.router.add_post("/", handler)
    setup(app, {"gateway": "http://gateway", "session_id": "aiohttp_session:sid"})
    client = await aiohttp_client(app)
    for session_id in ("s-1", "s-2"):
        jar = CookieJar(unsafe=True)  # it takes the cookies of an IP address too
        async with ClientSession(client.make_url("/"), cookie_jar=jar) as agent:
            async with agent.post("/") as response:
                assert await response.text() == "None"
            async with agent.post("/log-in", params={"as": session_id}):
                pass
            async with agent.post("/") as response:
                assert await response.text() == session_id
                assert "Set-Cookie" not in response.headers


def test_a_source_whose_package_is_missing_says_at_setup_which_extra_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])  # which finds no package
    monkeypatch.delitem(sys.modules, "aiohttp_session")
    app = web.Application()
    with pytest.raises(ConfigError) as caught:
        setup(app, {"gateway": "http://gateway", "session_id": "aiohttp_session:sid"})
    assert str(caught.value) == (
        "session_id: 'aiohttp_session:sid' needs aiohttp_session: "
        "pip install 'aiohttp_smg_routing[aiohttp-session]'"
    )
