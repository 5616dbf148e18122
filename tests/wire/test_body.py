"""Session ids in the JSON body: the handler reads the body as it would without the plugin."""

import asyncio
import gc
import gzip
import io
import json
import socket
import time
import tracemalloc
import warnings
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    ROUTING,
    Routing,
    RoutingConfig,
    current_session_id,
    peek_json,
    routing_key,
    setup,
)
from aiohttp_smg_routing.testing import Recorder
from fuzz.laws import Shared
from harness.proxies import CLIENT, client_session, pinned_server

JSON = {"Content-Type": "application/json"}
LIMIT = 2**20  # client_max_size, in bytes
FOR_EVER = 3600.0  # seconds; a test that waits for this hangs

Source = str | Callable[[web.Request], object]
Read = Callable[[web.Request], Awaitable[object]]
Client: TypeAlias = "TestClient[web.Request, web.Application]"


def echo_server(*sources: Source, read: Read, **options: Any) -> web.Application:
    """Return a server that answers with the current session and the result of ``read``."""

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
        setup(app, RoutingConfig("http://gateway", session_id=sources, **options))
    return app


async def body_of(request: web.Request) -> bytes:
    return await request.read()


async def echoed(
    aiohttp_client: AiohttpClient,
    data: Any,
    *sources: Source,
    read: Read = body_of,
    options: Any = (),
    **arguments: Any,
) -> list[str | None]:
    client = await aiohttp_client(echo_server(*sources, read=read, **dict(options)))
    arguments = {"headers": JSON, **arguments}
    async with client.post("/", data=data, **arguments) as response:
        assert response.status == 200, await response.text()
        echo: list[str | None] = await response.json()
        return echo


def body_with(session_id: str, size: int) -> bytes:
    """Return a JSON body of so many bytes that ends with the id."""
    document = json.dumps({"messages": [""], "user": session_id}).encode()
    return document.replace(b'""', b'"%s"' % (b"x" * (size - len(document))))


async def in_pieces(body: bytes, size: int = 70_000) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize(
    ("path", "body", "session_id"),
    [
        ("session_id", {"session_id": "s-1"}, "s-1"),
        ("user", {"user": "s-1", "messages": [{"user": "x"}]}, "s-1"),
        ("prompt_cache_key", {"prompt_cache_key": "é"}, "é"),
        ("metadata.session_id", {"metadata": {"session_id": "s-1"}}, "s-1"),
        ("a.b.c", {"a": {"b": {"c": "s-1"}}}, "s-1"),
        ("user", {"user": "x" * 100_000}, "x" * 100_000),
        ("session_id", {"session_id": 17}, "17"),
        ("session_id", {"session_id": 0}, "0"),
        ("session_id", {"session_id": -5}, "-5"),
        ("session_id", {"session_id": 10**40}, str(10**40)),
        ("a.b", {"a": {"b": 17}}, "17"),
        ("metadata.session_id", {"metadata": "s-1"}, None),
        ("metadata.session_id", {"metadata": [{"session_id": "s-1"}]}, None),
        ("metadata.session_id", {"metadata.session_id": "s-1"}, None),
        ("metadata.0", {"metadata": ["s-1"]}, None),
        ("session_id", {"session_id": ""}, None),
        ("session_id", {"session_id": " "}, None),
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
async def test_json_source_reads_a_text_or_an_integer_in_the_body(
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    path: str,
    body: object,
    session_id: str | None,
) -> None:
    data = json.dumps(body).encode()
    assert await echoed(aiohttp_client, data, f"json:{path}") == [session_id, repr(data)]
    assert caplog.records == []  # a client's mistake is not the server's


BROKEN = {
    "not JSON": b'{"user": "s-1"',
    "JSON and more": b'{"user": "s-1"} {"user": "s-2"}',
    "not UTF-8": b'{"user": "s-1", "pad": "\xff"}',
    "nested too deep": b"[" * 100_000,
    "objects nested too deep": b'{"user":' * 100_000,
    "nested too deep beside an id": b'{"user": "s-1", "pad": %s}' % (b"[" * 100_000),
    "an integer too long": b'{"user": ' + b"1" * 10_000 + b"}",
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
    plain, plugged = [
        await echoed(
            aiohttp_client, in_pieces(body) if chunked else io.BytesIO(body), *sources, read=read
        )
        for sources in ((), ("json:user",))
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


async def over_the_stream(request: web.Request) -> object:
    return await request.content.read(), await request.read()


async def by_itself(request: web.Request) -> object:
    return await peek_json(request), await request.read(), await peek_json(request)


WAYS = [by_lines, in_chunks, if_it_can, of_a_clone, again, never, over_the_stream, by_itself]
FORMS: dict[str, Callable[[bytes], Any]] = {
    "whole": io.BytesIO,
    "chunked": in_pieces,
    "gzip": lambda body: io.BytesIO(gzip.compress(body)),
    "deflate, chunked": lambda body: in_pieces(zlib.compress(body)),
}


def headers_of(form: str) -> dict[str, str]:
    encoding = form.partition(",")[0]
    return {**JSON, **({"Content-Encoding": encoding} if encoding in ("gzip", "deflate") else {})}


async def first_message(request: web.Request) -> str:
    """Find the session in a list, which ``json:`` can't reach."""
    document = await peek_json(request)
    return str(document["messages"][0]["name"])


@pytest.mark.parametrize("read", WAYS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sources", [("json:session_id", "json:user"), (first_message,)])
async def test_the_handler_reads_the_body_in_whatever_way_as_without_the_plugin(
    aiohttp_client: AiohttpClient, read: Any, form: str, sources: Any
) -> None:
    messages = [{"name": "s-1", "content": "x" * 300_000}]
    body = json.dumps({"messages": messages, "user": "s-1"}, indent=1).encode()
    (_, plain), (session_id, plugged) = [
        await echoed(
            aiohttp_client, FORMS[form](body), *sources, read=read, headers=headers_of(form)
        )
        for sources in ((), sources)
    ]
    assert plugged == plain
    assert session_id == "s-1"


async def peeked(request: web.Request) -> object:
    return await peek_json(request)


@pytest.mark.parametrize(
    "document", [{"a": [1, {"b": None}]}, [{"user": "s-1"}, 2], "text", 17, 1.5, True, None, {}, []]
)
async def test_peek_json_gives_all_of_the_body_whatever_it_is(
    aiohttp_client: AiohttpClient, document: object
) -> None:
    data = json.dumps(document).encode()
    for sources in ((), ("header:X",), ("json:user",), (first_message,)):
        echo = await echoed(aiohttp_client, data, *sources, read=peeked)
        assert echo[1] == repr(document)


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
async def test_peek_json_gives_none_of_a_bad_body(
    aiohttp_client: AiohttpClient, body: bytes
) -> None:
    echo = await echoed(aiohttp_client, io.BytesIO(body), "json:user", read=by_itself)
    assert echo == [None, repr((None, body, None))]


async def test_peek_json_leaves_the_handler_what_a_source_that_reads_would_take(
    aiohttp_client: AiohttpClient,
) -> None:
    async def find(request: web.Request) -> str:
        documents = [await peek_json(request) for _ in range(3)]
        assert documents[0] == documents[1] == documents[2]
        documents[0].clear()  # the source has its own copy
        return str((await peek_json(request))["user"])

    echo = await echoed(aiohttp_client, b'{"user": "s-1"}', find, read=in_chunks)
    assert echo == ["s-1", repr(b'{"user": "s-1"}')]


async def test_the_body_is_parsed_once_for_all_sources_of_an_app(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    loads = json.loads

    def counting(text: Any) -> object:
        parsed.append(text)
        return loads(text)

    app = web.Application()
    inner = echo_server(
        *("json:no", "json:a.b", "json:user"), read=body_of, pin_by="{json:model}{json:user}"
    )
    app.add_subapp("/sub", inner)
    setup(app, {"gateway": "http://gateway", "session_id": ["json:no", "json:user"]})
    client = await aiohttp_client(app)
    monkeypatch.setattr(json, "loads", counting)
    async with client.post("/sub/", data=b'{"user": "s-1"}', headers=JSON) as response:
        text = await response.text()
    assert 1 <= len(parsed) <= 2  # at most once for each app
    assert "s-1" in text


@pytest.mark.parametrize("form", FORMS)
async def test_a_body_over_client_max_size_has_its_session_and_is_the_handlers_to_refuse(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    body = body_with("s-1", 3 * LIMIT)
    for read, found in ((body_of, 413), (in_chunks, body)):
        (_, plain), (session_id, plugged) = [
            await echoed(
                aiohttp_client, FORMS[form](body), *sources, read=read, headers=headers_of(form)
            )
            for sources in ((), ("json:user",))
        ]
        assert session_id == "s-1"
        assert plugged == plain == repr(found)
    assert caplog.records == []


@pytest.mark.parametrize("client_max_size", [0, 100, LIMIT, 2**30])
async def test_a_turn_that_grows_keeps_its_pin(
    aiohttp_client: AiohttpClient, gateway: Recorder, client_max_size: int
) -> None:
    """A proxy that streams is not bound by ``client_max_size``, nor is the plugin."""

    async def stream(request: web.Request) -> web.Response:
        session = request.config_dict[CLIENT]
        async with session.post(gateway.chat, data=request.content) as response:
            return web.Response(body=await response.read(), status=response.status)

    app = web.Application(client_max_size=client_max_size)
    app.router.add_post("/", stream)
    app.cleanup_ctx.append(client_session)
    options = {"session_id": "json:user", "client_session": "client", "on_missing": "raise"}
    setup(app, {"gateway": str(gateway.url), **options})
    client = await aiohttp_client(app)
    for size in (1000, 2**20, 2**20 + 1, 4 * 2**20):
        body = body_with("s-1", size)
        async with client.post("/", data=io.BytesIO(body), headers=JSON) as response:
            assert response.status == 200, await response.text()
        assert gateway.last.body == body
    gateway.assert_pinned("s-1", turns=4)


# No reading by lines: aiohttp raises for a line of over 128 KiB that comes in one piece.
@pytest.mark.parametrize("limit", [1000, 200_000])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("read", [in_chunks, if_it_can, of_a_clone])
async def test_a_body_of_json_max_size_has_its_session_and_one_byte_more_is_said_once(
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    limit: int,
    form: str,
    read: Any,
) -> None:
    client = await aiohttp_client(echo_server("json:user", read=read, json_max_size=limit))
    plain = await aiohttp_client(echo_server(read=read))
    for size, session_id in ((limit, "s-1"), (limit + 1, None), (limit + 1, None), (limit, "s-1")):
        body, echoes = body_with("s-1", size), []
        for it in (client, plain):
            async with it.post("/", data=FORMS[form](body), headers=headers_of(form)) as response:
                echoes.append(await response.json())
        assert echoes[0] == [session_id, echoes[1][1]]
    [record] = caplog.records
    assert str(limit) in record.getMessage()
    assert "json_max_size" in record.getMessage()


async def test_json_max_size_holds_for_peek_json_too(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    for source in ("json:user", first_message):
        caplog.clear()
        client = await aiohttp_client(echo_server(source, read=by_itself, json_max_size=100))
        for _ in range(2):
            body = body_with("s-1", 101)
            async with client.post("/", data=body, headers=JSON) as response:
                assert (await response.json())[1] == repr((None, body, None))
        assert "json_max_size" in caplog.text
        over = [record for record in caplog.records if "json_max_size" in record.getMessage()]
        assert len(over) == 1


async def test_an_inner_app_reads_up_to_its_own_json_max_size(
    aiohttp_client: AiohttpClient,
) -> None:
    app = web.Application()
    app.add_subapp("/sub", echo_server("json:user", read=body_of))
    setup(app, {"gateway": "http://gateway", "session_id": "json:user", "json_max_size": 100})
    client = await aiohttp_client(app)
    async with client.post("/sub/", data=body_with("s-1", 101), headers=JSON) as response:
        assert (await response.json())[0] == "s-1"


async def test_peek_json_has_a_limit_where_nothing_is_set_up_and_says_it_once(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def has_messages(request: web.Request) -> object:
        document = await peek_json(request)
        async for _ in request.content.iter_any():
            pass
        return "messages" in (document or {})

    client = await aiohttp_client(echo_server(read=has_messages))
    for size, found in ((16 * 2**20, True), (16 * 2**20 + 1, False), (16 * 2**20 + 1, False)):
        body = io.BytesIO(body_with("s-1", size))
        async with client.post("/", data=body, headers=JSON) as response:
            assert await response.json() == [None, repr(found)]
    assert len(caplog.records) == 1


async def test_a_body_that_an_earlier_middleware_has_read_has_the_same_limit(
    aiohttp_client: AiohttpClient,
) -> None:
    app = echo_server("json:user", read=body_of, json_max_size=1000)
    app.middlewares.insert(0, reading)
    client = await aiohttp_client(app)
    for size, session_id in ((1000, "s-1"), (1001, None)):
        async with client.post("/", data=body_with("s-1", size), headers=JSON) as response:
            assert (await response.json())[0] == session_id


@pytest.mark.parametrize("form", FORMS)
async def test_pin_by_reads_its_parts_from_the_body_and_the_proxy_sends_it_on(
    aiohttp_client: AiohttpClient, gateway: Recorder, form: str
) -> None:
    """A session that calls several models has a key for each, and is one session in the ledger."""
    seen = set()

    @web.middleware
    async def look(request: web.Request, handler: Any) -> web.StreamResponse:
        seen.add(current_session_id())
        response: web.StreamResponse = await handler(request)
        return response

    pin_by = "{session_id}/{json:model}"
    app = pinned_server(
        gateway.url, session_id=["json:metadata.session", "header:X-Sid"], pin_by=pin_by
    )
    app.middlewares.append(look)
    client = await aiohttp_client(app)
    alone = routing_key("s 1")
    keys: dict[str | int | None, str] = {None: alone}  # without a model
    for model in ("one", "two", 3):
        keys[model] = Shared(pin_by, "s 1", {"json:model": str(model)}).key({})
    for called in (*keys, "one"):
        body = json.dumps({"metadata": {"session": "s 1"}, "model": called}).encode()
        path = "/v1/chat/completions"
        async with client.post(path, data=FORMS[form](body), headers=headers_of(form)) as response:
            assert response.status == 200
        assert gateway.last.body == body
        assert gateway.last.keys == [keys[called].encode()]
    pins = app[ROUTING].pins
    assert {pin.key for pin in pins.of("s 1")} == {*keys.values()}
    assert {pin.session for pin in pins.sessions()} == {alone}
    assert seen == {"s 1"}
    app[ROUTING].end("s 1")
    assert pins.sessions() == []


@web.middleware
async def reading(request: web.Request, handler: Any) -> web.StreamResponse:
    await request.read()
    response: web.StreamResponse = await handler(request)
    return response


@web.middleware
async def consuming(request: web.Request, handler: Any) -> web.StreamResponse:
    await request.content.read()
    response: web.StreamResponse = await handler(request)
    return response


@web.middleware
async def nibbling(request: web.Request, handler: Any) -> web.StreamResponse:
    await request.content.read(5)
    response: web.StreamResponse = await handler(request)
    return response


@web.middleware
async def putting_a_clone_in_its_place(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await handler(request.clone(headers={**JSON, "X-A": "b"}))
    return response


@web.middleware
async def in_time(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await asyncio.wait_for(handler(request), FOR_EVER)
    return response


@pytest.mark.parametrize(
    ("middleware", "session_id"),
    [
        (reading, "s-1"),
        (putting_a_clone_in_its_place, "s-1"),
        (in_time, "s-1"),
        (consuming, None),  # it has used up the body
        (nibbling, None),
    ],
)
@pytest.mark.parametrize("read", WAYS)
async def test_what_an_earlier_middleware_did_to_the_body_stays_so(
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    middleware: Any,
    session_id: str | None,
    read: Any,
) -> None:
    async def outcome(*sources: Source) -> Any:
        app = echo_server(*sources, read=read)
        app.middlewares.insert(0, middleware)
        client = await aiohttp_client(app)
        body = body_with("s-1", 100_000)
        async with client.post("/", data=in_pieces(body, 9000), headers=JSON) as response:
            return response.status, await response.text()

    plain, plugged = await outcome(), await outcome("json:user")
    assert plugged[0] == plain[0]
    if plain[0] == 200:
        assert json.loads(plugged[1]) == [session_id, json.loads(plain[1])[1]]
    assert "session id source" not in caplog.text


async def stored(request: web.Request) -> object:
    return list(request)


async def test_the_requests_storage_stays_as_it_is(aiohttp_client: AiohttpClient) -> None:
    """A handler may sort its keys, or answer with it as JSON."""
    options = {"pin_by": "{session_id}{json:model}"}
    for source in ("json:user", first_message):
        echo = await echoed(aiohttp_client, b"{}", source, read=stored, options=options)
        assert echo[1] == "[]"


async def test_the_middleware_alone_reads_the_body_too(aiohttp_client: AiohttpClient) -> None:
    app = echo_server(read=body_of)
    routing = Routing({"gateway": "http://gateway", "session_id": "json:user"})
    app.middlewares.append(routing.middleware)
    client = await aiohttp_client(app)
    async with client.post("/", data=b'{"user": 17}', headers=JSON) as response:
        assert await response.json() == ["17", repr(b'{"user": 17}')]


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
        ("application/json; charset=UTF8", "s-1"),
        ('application/json; charset="us-ascii"', "s-1"),
        ("application/vnd.api+json", "s-1"),
        ("application/json; charset=none", None),
        ("application/json; charset=hex", None),
        ("application/json; charset=idna", None),
        ("text/plain", None),
        ("application/x-www-form-urlencoded", None),
        ("application/octet-stream", None),
    ],
)
async def test_json_source_reads_json_content_types_only(
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    content_type: str,
    session_id: str | None,
) -> None:
    headers = {"Content-Type": content_type}
    echo = await echoed(aiohttp_client, b'{"user": "s-1"}', "json:user", headers=headers)
    assert echo[0] == session_id
    assert caplog.records == []


@pytest.mark.parametrize("parameter", ["x*", "charset*", "charset*=x", "+json*"])
async def test_a_content_type_that_aiohttp_fails_to_parse_fails_nothing_here(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture, parameter: str
) -> None:
    """Some versions parse some of these."""
    data, headers = b'{"user": "s-1"}', {"Content-Type": f"application/json; {parameter}"}
    for sources in ((), ("json:user",)):
        echo = await echoed(aiohttp_client, data, *sources, read=by_itself, headers=headers)
        assert echo[1] in [repr((it, data, it)) for it in (None, {"user": "s-1"})]
    assert caplog.records == []


@pytest.mark.parametrize(
    ("encoding", "charset"),
    [
        *(("utf-8-sig", charset) for charset in ("", "utf-8", "UTF8", "utf_8", "utf-8-sig")),
        *(("utf-16", charset) for charset in ("", "utf-16", "UTF16")),
        *(("utf-16-le", charset) for charset in ("", "utf-16le", "utf-16-le")),
        *(("utf-16-be", charset) for charset in ("", "utf-16be")),
        *(("utf-32", charset) for charset in ("", "utf-32")),
        *(("utf-32-le", charset) for charset in ("", "utf-32le")),
        *(("utf-32-be", charset) for charset in ("", "utf-32be")),
        *(("iso-8859-1", charset) for charset in ("iso-8859-1", "latin-1", "LATIN1")),
        ("windows-1252", "windows-1252"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
async def test_a_body_in_another_encoding_has_its_session(
    aiohttp_client: AiohttpClient, encoding: str, charset: str, mark: str
) -> None:
    """A byte order mark may come first in each encoding that allows one."""
    if mark and (not encoding.endswith(("-le", "-be"))):
        mark = ""  # the codec writes its own, or allows none
    data = f'{mark}{{"user": "s-é"}}'.encode(encoding)
    headers = {"Content-Type": f"application/json{charset and f'; charset={charset}'}"}
    echo = await echoed(aiohttp_client, data, "json:user", headers=headers)
    assert echo == ["s-é", repr(data)]


@pytest.mark.parametrize(
    "charset", ["punycode", "idna", "PunyCode", "utf-7", "rot13", "raw_unicode_escape"]
)
async def test_a_client_can_not_name_a_charset_that_takes_for_ever_to_decode(
    aiohttp_client: AiohttpClient, charset: str
) -> None:
    """The time to decode Punycode grows with the square of the length: hours for 16 MiB."""
    body = b'{"user": "s-1", "pad": "' + b"a" * 2**20 + b'"}-' + b"9a" * 2**20
    headers = {"Content-Type": f"application/json; charset={charset}"}
    echo = await echoed(aiohttp_client, io.BytesIO(body), "json:user", headers=headers, read=never)
    assert echo[0] is None


async def test_a_body_that_cannot_be_decoded_fails_as_without_the_plugin(
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


HEAD = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"


class Wire:
    """A raw connection to a server, which sends what no client would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(self) -> Any:
        """Return the document in the next answer, which has a ``Content-Length``."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
        return json.loads(await self.reader.readexactly(int(length)))


@asynccontextmanager
async def wire_to(client: Client) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection(client.host, client.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


async def client_of(aiohttp_client: AiohttpClient, app: web.Application) -> Client:
    """Return a client of a server that doesn't cancel a request when its client disconnects.

    That is the default of aiohttp's servers, but not of its test server.
    """
    server = TestServer(app)
    server.runner = web.AppRunner(app)
    await server.runner.setup()
    site = web.TCPSite(server.runner, "127.0.0.1", 0)
    await site.start()
    server.host, server.port = server.runner.addresses[0][:2]
    client: Any = await aiohttp_client(server)
    return client  # type: ignore[no-any-return]


def no_byte_for(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("aiohttp_smg_routing.sources.SECONDS_WITHOUT_A_BYTE", seconds)


async def size_so_far(request: web.Request) -> object:
    return request.content.total_bytes


@pytest.mark.parametrize("framing", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
async def test_reading_a_body_stops_at_its_limit(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch, framing: bytes
) -> None:
    """The client sends one byte over the limit and stops: to wait for more would hang."""
    no_byte_for(monkeypatch, FOR_EVER)
    client = await aiohttp_client(echo_server("json:user", read=size_so_far, json_max_size=1000))
    async with wire_to(client) as wire:
        body = body_with("s-1", 1001)
        chunk = body if framing.startswith(b"Content") else b"3e9\r\n%s\r\n" % body
        await wire.send(HEAD, framing, b"\r\n\r\n", chunk)
        session_id, size = await wire.answer()
        assert session_id is None
        assert int(size) <= 1001


async def test_a_body_that_is_whole_at_the_limit_but_goes_on_has_no_session(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_byte_for(monkeypatch, FOR_EVER)
    is_asked = asyncio.Event()

    async def nobody(request: web.Request) -> None:
        is_asked.set()  # the body is read next

    app = echo_server(nobody, "json:user", read=body_of, json_max_size=1000)
    async with wire_to(await aiohttp_client(app)) as wire:
        body = body_with("s-1", 1000)
        await wire.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n%s\r\n" % body)
        await is_asked.wait()
        await wire.send(b"1\r\n \r\n0\r\n\r\n")
        assert await wire.answer() == [None, repr(body + b" ")]


async def test_a_body_that_says_how_much_too_long_it_is_is_not_read(
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    no_byte_for(monkeypatch, FOR_EVER)
    client = await aiohttp_client(echo_server("json:user", read=size_so_far, json_max_size=1000))
    async with wire_to(client) as wire:
        await wire.send(HEAD, b"Content-Length: 1001\r\n\r\n")
        assert await wire.answer() == [None, "0"]
    assert "json_max_size" in caplog.text


async def test_of_an_endless_body_no_more_is_taken_in_than_the_limit(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_byte_for(monkeypatch, FOR_EVER)
    client = await aiohttp_client(echo_server("json:user", read=size_so_far, json_max_size=2**20))
    async with wire_to(client) as wire:
        await wire.send(HEAD, b"Transfer-Encoding: chunked\r\n\r\n")

        async def send() -> None:
            while True:
                await wire.send(b"10000\r\n%s\r\n" % (b"x" * 2**16))

        sending = asyncio.create_task(send())
        session_id, size = await wire.answer()
        sending.cancel()
        assert session_id is None
        assert 2**20 < int(size) < 2 * 2**20
        with pytest.raises((asyncio.CancelledError, ConnectionError)):
            await sending


@pytest.mark.parametrize("sent", [b"", b'{"user": ', b'{"user": "s-1"}'])
async def test_a_body_that_stops_coming_gives_no_id_and_is_said_once(
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sent: bytes,
) -> None:
    """The part that has come may be valid JSON, but it is not the client's document."""
    no_byte_for(monkeypatch, 0.01)
    arrived = asyncio.Queue[str | None]()

    async def read(request: web.Request) -> object:
        arrived.put_nowait(current_session_id())
        return await request.read()

    client = await aiohttp_client(echo_server("json:user", read=read))
    for _ in range(2):
        async with wire_to(client) as wire:
            await wire.send(HEAD, b"Content-Length: 100\r\n\r\n", sent)
            assert await arrived.get() is None
            await wire.send(b" " * (100 - len(sent)))  # the handler gets the rest
            assert await wire.answer() == [None, repr(sent.ljust(100))]
    [record] = caplog.records
    assert "did not send its body for 0.01 seconds" in record.getMessage()


async def test_a_body_that_has_come_while_the_loop_was_busy_has_its_session(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_byte_for(monkeypatch, 0.01)
    is_asked = asyncio.Event()

    async def nobody(request: web.Request) -> None:
        is_asked.set()  # the body is read next

    client = await aiohttp_client(echo_server(nobody, "json:user", read=body_of))
    body = b'{"user": "s-1"}'
    with socket.create_connection((client.host, client.port or 0)) as connection:
        connection.sendall(HEAD + b"Connection: close\r\nContent-Length: 15\r\n\r\n")
        await is_asked.wait()
        connection.sendall(body)
        time.sleep(0.1)  # noqa: ASYNC251 - keeps the loop busy
        answered = await asyncio.to_thread(connection.makefile("rb").read)
    assert json.loads(answered.partition(b"\r\n\r\n")[2]) == ["s-1", repr(body)]
    assert caplog.records == []


@pytest.mark.parametrize("framing", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
async def test_a_body_that_breaks_off_gives_no_id(
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    framing: bytes,
) -> None:
    no_byte_for(monkeypatch, FOR_EVER)
    seen = asyncio.Queue[tuple[str | None, bool]]()

    async def read(request: web.Request) -> object:
        try:
            await request.read()
        except Exception:
            seen.put_nowait((current_session_id(), True))
        else:
            seen.put_nowait((current_session_id(), False))
        return None

    client = await client_of(aiohttp_client, echo_server("json:user", read=read))
    async with wire_to(client) as wire:
        chunk = b'{"user": "s-1"}'
        if framing.startswith(b"Transfer"):
            chunk = b"f\r\n%s\r\n" % chunk
        await wire.send(HEAD, framing, b"\r\n\r\n", chunk)
        wire.writer.write_eof()
        assert await seen.get() == (None, True)
    assert caplog.records == []  # a client's mistake is not the server's


async def test_a_body_that_comes_byte_by_byte_has_its_session(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_byte_for(monkeypatch, FOR_EVER)
    client = await aiohttp_client(echo_server("json:user", read=body_of))
    body = b'{"user": "s-1"}'
    async with wire_to(client) as wire:
        await wire.send(HEAD, b"Transfer-Encoding: chunked\r\n\r\n")
        for byte in body:
            await wire.send(b"1\r\n%c\r\n" % byte)
        await wire.send(b"0\r\n\r\n")
        assert await wire.answer() == ["s-1", repr(body)]


async def test_a_body_that_is_slow_leaves_other_requests_alone_and_one_that_never_comes_ends_well(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = await aiohttp_client(echo_server("json:user", read=body_of))
    async with wire_to(client) as wire:
        await wire.send(HEAD, b'Content-Length: 100\r\n\r\n{"user": ')
        async with client.post("/", data=b'{"user": "s-1"}', headers=JSON) as response:
            assert (await response.json())[0] == "s-1"
    async with client.post("/", data=b'{"user": "s-2"}', headers=JSON) as response:
        assert (await response.json())[0] == "s-2"
    assert "session id source" not in caplog.text


async def test_a_request_that_is_cancelled_while_its_body_comes_is_cancelled_and_keeps_the_body(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_byte_for(monkeypatch, FOR_EVER)
    is_asked = asyncio.Event()

    async def nobody(request: web.Request) -> None:
        is_asked.set()  # the body is read next

    @web.middleware
    async def impatient(request: web.Request, handler: Any) -> web.StreamResponse:
        turn = asyncio.create_task(handler(request))
        await is_asked.wait()
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        return web.json_response(repr(request.content.read_nowait()))

    app = echo_server(nobody, "json:user", read=never)
    app.middlewares.insert(0, impatient)
    async with wire_to(await aiohttp_client(app)) as wire:
        await wire.send(HEAD, b'Content-Length: 100\r\n\r\n{"user": ')
        assert await wire.answer() == repr(b'{"user": ')


async def test_json_bodies_of_one_connection_stay_apart(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(echo_server("json:user", read=never))
    for number in range(5):  # the handler reads no body
        body = json.dumps({"user": f"s-{number}", "pad": "x" * 200_000}).encode()
        async with client.post("/", data=body, headers=JSON) as response:
            assert (await response.json())[0] == f"s-{number}"


@pytest.mark.parametrize("read", [never, body_of, in_chunks])
async def test_pipelined_bodies_stay_apart(aiohttp_client: AiohttpClient, read: Any) -> None:
    client = await aiohttp_client(echo_server("json:user", read=read))
    bodies = [body_with(f"s-{number}", 3000 + number) for number in range(5)]
    async with wire_to(client) as wire:
        await wire.send(
            b"".join(b"%sContent-Length: %d\r\n\r\n%s" % (HEAD, len(it), it) for it in bodies)
        )
        for number, body in enumerate(bodies):
            session_id, found = await wire.answer()
            assert session_id == f"s-{number}"
            assert read is never or found == repr(body)


EXPECT = b"Expect: 100-continue\r\n"


async def its_own(request: web.Request) -> None:
    """Leave it to the handler whether to ask for the body."""


def expecting_server(expect_handler: Any, **options: Any) -> web.Application:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response([current_session_id(), request.content.total_bytes])

    app = web.Application()
    app.router.add_post("/", handler, expect_handler=expect_handler)
    setup(app, {"gateway": "http://gateway", "session_id": ["json:user", "header:X-Sid"]})
    return app


def nested(app: web.Application) -> web.Application:
    outer = web.Application()
    setup(outer, {"gateway": "http://gateway", "session_id": "json:user"})
    outer.add_subapp("/sub", app)
    return outer


@pytest.mark.parametrize("path", [b"/", b"/sub/"])
async def test_a_route_with_an_expect_handler_of_its_own_is_not_read(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch, path: bytes
) -> None:
    """The client sends its body only when the handler asks: to wait for it would hang."""
    no_byte_for(monkeypatch, FOR_EVER)
    app = expecting_server(its_own)
    client = await aiohttp_client(nested(app) if path == b"/sub/" else app)
    head = HEAD.replace(b" / ", b" %s " % path)
    async with wire_to(client) as wire:
        await wire.send(head, EXPECT, b"X-Sid: s-2\r\nContent-Length: 15\r\n\r\n")
        assert await wire.answer() == ["s-2", 0]
    async with wire_to(client) as wire:  # without Expect the client sends its body at once
        await wire.send(head, b'Content-Length: 15\r\n\r\n{"user": "s-1"}')
        assert (await wire.answer())[0] == "s-1"


async def test_a_client_that_waits_is_asked_for_its_body(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(expecting_server(None))
    async with wire_to(client) as wire:
        await wire.send(HEAD, EXPECT, b"Content-Length: 15\r\n\r\n")
        assert (await wire.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await wire.send(b'{"user": "s-1"}')
        assert (await wire.answer())[0] == "s-1"


CONVERSATION = "x" * (4 * 2**20)


@pytest.mark.parametrize(
    "document",
    [
        {"user": "s-1", "messages": [{"content": CONVERSATION}]},
        {"user": "s-1", "prompt": CONVERSATION},
        {"user": "s-1", "input": {"messages": [{"content": CONVERSATION}]}},
        {"user": "s-1", "input": {"text": {"de": CONVERSATION}}},
    ],
    ids=["messages", "prompt", "nested messages", "nested text"],
)
async def test_nothing_of_the_conversation_is_kept_on_the_request(
    aiohttp_client: AiohttpClient, document: object
) -> None:
    held = []

    async def measured(request: web.Request) -> object:
        """Read and discard the body, and note the memory that is still held."""
        async for _ in request.content.iter_chunked(2**16):
            pass
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        return None

    app = echo_server("json:no", "json:user", read=measured, pin_by="{session_id}{json:model}")
    client = await aiohttp_client(app)
    small, large = b'{"user": "s-1"}', json.dumps(document).encode()
    tracemalloc.start()
    try:
        for body in (small, small, large):
            async with wire_to(client) as wire:
                await wire.send(HEAD, b"Content-Length: %d\r\n\r\n" % len(body))
                async for piece in in_pieces(body):
                    await wire.send(piece)
                assert (await wire.answer())[0] == "s-1"
    finally:
        tracemalloc.stop()
    assert held[2] - held[1] < len(CONVERSATION) // 4
