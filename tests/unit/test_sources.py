import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from aiohttp_smg_routing import Routing, RoutingConfig, current_session_id
from aiohttp_smg_routing.keys import SessionId
from aiohttp_smg_routing.sources import Source
from fuzz.laws import CHAT_URL, ROUTING_HEADERS, Shared, sent


async def async_source(request: web.Request) -> SessionId | None:
    return 17


if hasattr(web, "RequestKey"):
    SID = web.RequestKey("sid", str)
    OTHER = web.RequestKey("other_sid", str)


def session_id_finder(sources: Any) -> Callable[[web.Request], Awaitable[str | None]]:
    """Return a function that returns the session id which a request's handler sees."""
    middleware: Any = Routing(RoutingConfig("http://gateway", session_id=sources)).middleware

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
    request._state["sid"] = "s-1"  # avoids aiohttp's warning about string keys
    assert await finder(request) == "s-1"


@pytest.mark.skipif(not hasattr(web, "RequestKey"), reason="aiohttp 3.14 brought RequestKey")
@pytest.mark.parametrize("name", ["sid", "tests.unit.test_sources.sid"])
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
    middleware: Any = Routing(config).middleware
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(current_session_id())
        return web.Response()

    for target in ("/?one=s-1", "/?one=default", "/?one=Default"):
        await middleware(make_mocked_request("POST", target), handler)
    assert seen == ["s-1", None, "Default"]


class Unhashable:
    """A callable with its own ``__eq__``, such as a dataclass."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, found: Any) -> None:
        self.found = found

    def __call__(self, request: web.Request) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Later:
    async def __call__(self, request: web.Request) -> str:
        return "s-1"


class Text(str):
    def __str__(self) -> str:
        return "another text"


def named(name: str, request: web.Request) -> str | None:
    return request.query.get(name)


def in_future(request: web.Request) -> "asyncio.Future[str]":
    future = asyncio.get_running_loop().create_future()
    future.set_result("s-1")
    return future


@pytest.mark.parametrize(
    "source",
    [
        *(Unhashable("s-1"), Later(), partial(named, "sid"), Later().__call__, in_future),
        lambda request: async_text(request),
        lambda request: Text("s-1"),
        lambda request: request.query,
    ],
)
async def test_whatever_can_be_called_can_be_a_source(source: Any) -> None:
    sources = (source, "query:sid")
    for _ in range(2):
        assert await find(sources, "/?sid=s-1") == "s-1"


async def async_text(request: web.Request) -> str:
    return "s-1"


@pytest.mark.parametrize("source", [Unhashable(KeyError("boom")), Unhashable(b"bytes")])
async def test_a_source_that_has_no_hash_may_fail(
    source: Any, caplog: pytest.LogCaptureFixture
) -> None:
    finder = session_id_finder((source, "query:sid"))
    for _ in range(2):
        assert await finder(make_mocked_request("POST", "/?sid=s-1")) == "s-1"
    assert len(caplog.records) == 1


async def test_each_source_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    finder = session_id_finder((_raise, _raise_async, Unhashable(b""), "query:sid"))
    for _ in range(3):
        assert await finder(make_mocked_request("POST", "/?sid=s-1")) == "s-1"
    assert len(caplog.records) == 3


async def test_of_two_headers_of_one_name_the_first_counts() -> None:
    headers = CIMultiDict([("X-Sid", "s-1"), ("x-sid", "s-2")])
    assert await find("header:X-SID", headers=headers) == "s-1"


PIN_BY = "{header:X-Group-Id}/{cookie:variant}"


async def keys_of(pin_by: str, *requests: web.Request) -> list[str]:
    """Return the keys of the calls that the handlers make."""
    routing = Routing(RoutingConfig(CHAT_URL.origin(), session_id="query:sid", pin_by=pin_by))
    middleware: Any = routing.middleware
    keys = []

    async def handler(request: web.Request) -> web.Response:
        arrived = sent(routing, "POST", CHAT_URL.with_path("/v1/chat/completions"))
        keys.append(arrived[ROUTING_HEADERS[0]])
        return web.Response()

    for request in requests:
        await middleware(request, handler)
    return keys


def request_of(session_id: str, **headers: str) -> web.Request:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return make_mocked_request("POST", f"/?sid={session_id}", headers=named)


async def test_pin_by_reads_its_parts_from_the_request() -> None:
    keys = await keys_of(
        PIN_BY,
        request_of("s-1", X_Group_Id="g", Cookie="variant=a"),
        request_of("s-2", X_Group_Id="g", Cookie="variant=a"),
        request_of("s-1", X_Group_Id="g", Cookie="variant=b"),
        request_of("s-1", X_Group_Id="g"),
        request_of("s-2", X_Group_Id=" ", Cookie="variant=a"),
    )
    shared, other = (
        Shared(PIN_BY, "any", {"header:X-Group-Id": "g", "cookie:variant": variant}).key({})
        for variant in "ab"
    )
    assert keys == [shared, shared, other, "s-1", "s-2"]


async def test_a_part_that_is_no_id_finds_nothing_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests = [request_of("s-1") for _ in range(2)]
    for request in requests:
        request._state["group"] = b"bytes"  # avoids aiohttp's warning about string keys
    assert await keys_of("{request:group}", *requests) == ["s-1", "s-1"]
    [record] = caplog.records
    assert "'request:group' failed" in record.getMessage()


async def test_a_part_that_is_never_found_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    found = [request_of("s-1", X_Group_Id="g") for _ in range(50)]
    await keys_of("{header:X-Group-Id}", *found)
    assert caplog.records == []
    await keys_of("{header:X-Group-Id}/{header:X-Gruop}", *found)
    [record] = caplog.records
    assert "{header:X-Gruop}" in record.getMessage()
