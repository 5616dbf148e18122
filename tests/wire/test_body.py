"""The id in the JSON body: the handler reads the body as without the plugin."""

import asyncio
import gzip
import io
import json
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import RoutingConfig, current_session_id, setup
from aiohttp_smg_routing.source import Source

JSON = {"Content-Type": "application/json"}
LIMIT = 2**20


def echo_server(
    *sources: Source, read: Callable[[web.Request], Awaitable[object]]
) -> web.Application:
    """Return a server that answers with the session it saw, and with what ``read`` gave."""

    async def handler(request: web.Request) -> web.Response:
        try:
            found: object = await read(request)
        except web.HTTPException as error:
            found = error.status
        except (ValueError, RecursionError) as error:
            found = type(error).__name__
        return web.json_response([current_session_id(), repr(found)])

    app = web.Application(client_max_size=LIMIT)
    app.router.add_route("*", "/", handler)
    if sources:
        setup(app, RoutingConfig("http://gateway", session_id=sources))
    return app


async def body_of(request: web.Request) -> bytes:
    return await request.read()


async def echoed(
    aiohttp_client: AiohttpClient,
    data: Any,
    *sources: Source,
    read: Callable[[web.Request], Awaitable[object]] = body_of,
    **arguments: Any,
) -> list[str | None]:
    client = await aiohttp_client(echo_server(*sources, read=read))
    arguments = {"headers": JSON, **arguments}
    async with client.post("/", data=data, **arguments) as response:
        assert response.status == 200, await response.text()
        echo: list[str | None] = await response.json()
        return echo


@pytest.mark.parametrize(
    ("path", "body", "session_id"),
    [
        ("session_id", {"session_id": "s-1"}, "s-1"),
        ("user", {"user": "s-1", "messages": [{"user": "x"}]}, "s-1"),
        ("prompt_cache_key", {"prompt_cache_key": "é"}, "é"),
        ("metadata.session_id", {"metadata": {"session_id": "s-1"}}, "s-1"),
        ("a.b.c", {"a": {"b": {"c": "s-1"}}}, "s-1"),
        ("metadata.session_id", {"metadata": "s-1"}, None),
        ("metadata.session_id", {"metadata": [{"session_id": "s-1"}]}, None),
        ("metadata.session_id", {"metadata.session_id": "s-1"}, None),
        ("session_id", {"session_id": ""}, None),
        ("session_id", {"session_id": " "}, None),
        ("session_id", {"session_id": 17}, None),
        ("session_id", {"session_id": 1.5}, None),
        ("session_id", {"session_id": True}, None),
        ("session_id", {"session_id": None}, None),
        ("session_id", {"session_id": {"id": "s-1"}}, None),
        ("session_id", {"session_id": ["s-1"]}, None),
        ("session_id", {}, None),
        ("session_id", [{"session_id": "s-1"}], None),
        ("session_id", "session_id", None),
        ("session_id", 17, None),
        ("session_id", None, None),
    ],
)
async def test_json_source_reads_a_text_in_the_body(
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    path: str,
    body: object,
    session_id: str | None,
) -> None:
    data = json.dumps(body).encode()
    assert await echoed(aiohttp_client, data, f"json:{path}") == [session_id, repr(data)]
    assert caplog.records == []  # what a client sends wrong is no fault of the server


BROKEN = {
    "not JSON": b'{"session_id": "s-1"',
    "not UTF-8": b'{"session_id": "\xff"}',
    "nested too deep": b"[" * 100_000,
    "an integer too long": b'{"session_id": ' + b"1" * 10_000 + b"}",
    "over the limit": json.dumps({"session_id": "s-1", "messages": "x" * LIMIT}).encode(),
    "empty": b"",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("read", [web.Request.read, web.Request.json])
async def test_a_bad_body_is_the_handlers_to_answer(
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    body: bytes,
    chunked: bool,
    read: Any,
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    plain, plugged = [
        await echoed(aiohttp_client, chunks() if chunked else io.BytesIO(body), *sources, read=read)
        for sources in ((), ("json:session_id",))
    ]
    assert plain == plugged
    assert plugged[0] is None
    assert caplog.records == []


async def by_lines(request: web.Request) -> object:
    return [line async for line in request.content]


async def in_chunks(request: web.Request) -> object:
    return b"".join([chunk async for chunk, _ in request.content.iter_chunks()])


async def if_it_can(request: web.Request) -> object:
    return request.can_read_body and await request.json()


async def of_a_clone(request: web.Request) -> object:
    return await request.clone(method="PUT").read()


async def again(request: web.Request) -> object:
    return await request.read(), await request.text(), request.can_read_body


async def never(request: web.Request) -> object:
    return request.body_exists


WAYS = [by_lines, in_chunks, if_it_can, of_a_clone, again, never]


@pytest.mark.parametrize("read", WAYS)
@pytest.mark.parametrize("form", ["whole", "chunked", "compressed"])
async def test_the_handler_reads_the_body_in_whatever_way_as_without_the_plugin(
    aiohttp_client: AiohttpClient, read: Any, form: str
) -> None:
    body = json.dumps({"messages": ["x" * 300_000], "user": "s-1"}, indent=1).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 70_000):
            yield body[start : start + 70_000]

    data: dict[str, Callable[[], object]]
    data = {"whole": lambda: body, "chunked": chunks, "compressed": lambda: gzip.compress(body)}
    headers = {**JSON, **({"Content-Encoding": "gzip"} if form == "compressed" else {})}
    (_, plain), (session_id, plugged) = [
        await echoed(aiohttp_client, data[form](), *sources, read=read, headers=headers)
        for sources in ((), ("json:session_id", "json:user"))
    ]
    assert plugged == plain
    assert session_id == "s-1"


async def test_the_body_is_read_and_parsed_once_for_all_sources_and_apps(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    loads = json.loads

    def counting(text: str) -> object:
        parsed.append(text)
        return loads(text)

    app = web.Application()
    app.add_subapp("/sub", echo_server("json:no", "json:a.b", "json:user", read=body_of))
    setup(app, {"gateway": "http://gateway", "session_id": ["json:neither", "json:user"]})
    client = await aiohttp_client(app)
    monkeypatch.setattr("aiohttp_smg_routing.body.json.loads", counting)
    async with client.post("/sub/", data=b'{"user": "s-1"}', headers=JSON) as response:
        text = await response.text()
    assert parsed == ['{"user": "s-1"}']
    assert "s-1" in text


async def test_a_body_of_as_many_bytes_as_the_app_takes_has_its_session(
    aiohttp_client: AiohttpClient,
) -> None:
    head, tail = b'{"user": "s-1", "pad": "', b'"}'
    body = head + b"x" * (LIMIT - len(head) - len(tail)) + tail
    for extra, session_id in ((b"", "s-1"), (b" ", None)):
        echo = await echoed(aiohttp_client, io.BytesIO(body + extra), "json:user", read=never)
        assert echo[0] == session_id


async def test_where_the_app_has_no_limit_the_plugin_has_one(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiohttp_smg_routing.body._MOST_BYTES", 1000)

    async def handler(request: web.Request) -> web.Response:
        size = len(await request.read())
        return web.json_response([current_session_id(), size])

    app = web.Application(client_max_size=0)
    app.router.add_post("/", handler)
    setup(app, {"gateway": "http://gateway", "session_id": "json:user"})
    client = await aiohttp_client(app)
    for pad, session_id in ((100, "s-1"), (200_000, None)):
        body = json.dumps({"user": "s-1", "pad": "x" * pad}).encode()
        async with client.post("/", data=body, headers=JSON) as response:
            assert await response.json() == [session_id, len(body)]


async def test_the_servers_own_warnings_are_shown_as_often_as_without_the_plugin(
    aiohttp_client: AiohttpClient, recwarn: pytest.WarningsRecorder
) -> None:
    async def read(request: web.Request) -> object:
        warnings.warn("seen once", UserWarning, stacklevel=1)
        return None

    client = await aiohttp_client(echo_server("json:user", read=read))
    warnings.simplefilter("default", UserWarning)
    for _ in range(3):
        async with client.post("/", data=b'{"user": "s-1"}', headers=JSON) as response:
            assert (await response.json())[0] == "s-1"
    assert [str(warning.message) for warning in recwarn] == ["seen once"]


@pytest.mark.parametrize(
    ("content_type", "session_id"),
    [
        ("application/stream+json", None),
        ("application/json", "s-1"),
        ("Application/JSON; charset=utf-8", "s-1"),
        ("application/vnd.api+json", "s-1"),
        ("application/json; charset=none", None),
        ("text/plain", None),
        ("application/x-www-form-urlencoded", None),
        ("application/octet-stream", None),
    ],
)
async def test_json_source_reads_json_content_types_only(
    aiohttp_client: AiohttpClient, content_type: str, session_id: str | None
) -> None:
    headers = {"Content-Type": content_type}
    echo = await echoed(aiohttp_client, b'{"user": "s-1"}', "json:user", headers=headers)
    assert echo[0] == session_id


async def test_json_source_reads_what_an_earlier_middleware_has_read(
    aiohttp_client: AiohttpClient,
) -> None:
    @web.middleware
    async def reading(request: web.Request, handler: Any) -> web.StreamResponse:
        await request.read()
        response: web.StreamResponse = await handler(request)
        return response

    app = echo_server("json:user", read=body_of)
    app.middlewares.insert(0, reading)
    client = await aiohttp_client(app)
    async with client.post("/", data=b'{"user": "s-1"}', headers=JSON) as response:
        assert await response.json() == ["s-1", repr(b'{"user": "s-1"}')]


async def test_a_body_that_breaks_off_or_cannot_be_decoded_fails_as_without_the_plugin(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def read(request: web.Request) -> object:
        try:
            return await request.read()
        except Exception as error:
            return type(error)

    headers = {**JSON, "Content-Encoding": "deflate"}
    plain, plugged = [
        await echoed(aiohttp_client, b"no zlib stream", *sources, read=read, headers=headers)
        for sources in ((), ("json:user",))
    ]
    assert plugged == plain
    assert "session id source" not in caplog.text


async def test_a_body_that_is_slow_leaves_other_requests_alone_and_one_that_never_comes_ends_well(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = await aiohttp_client(echo_server("json:user", read=body_of))
    _, writer = await asyncio.open_connection(client.host, client.port)
    head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    writer.write(head + b'Content-Length: 100\r\n\r\n{"user": ')
    await writer.drain()
    async with client.post("/", data=b'{"user": "s-1"}', headers=JSON) as response:
        assert (await response.json())[0] == "s-1"
    writer.close()
    await writer.wait_closed()
    async with client.post("/", data=b'{"user": "s-2"}', headers=JSON) as response:
        assert (await response.json())[0] == "s-2"
    assert "session id source" not in caplog.text


async def test_json_bodies_of_one_connection_stay_apart(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(echo_server("json:user", read=never))
    for number in range(5):  # the handler reads none of them
        body = json.dumps({"user": f"s-{number}", "pad": "x" * 200_000}).encode()
        async with client.post("/", data=body, headers=JSON) as response:
            assert (await response.json())[0] == f"s-{number}"
