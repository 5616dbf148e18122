"""No crosstalk: each call has the key of the session whose inbound request caused it."""

import asyncio
import copy
import gc
import pickle
import sys
import weakref
from collections.abc import AsyncIterator, Callable
from functools import partial
from io import BytesIO
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import BytesPayload, ClientSession, Payload, TCPConnector, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.test_utils import make_mocked_request
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import Routing, RoutingConfig, current_session_id, routing_session, setup
from aiohttp_smg_routing.testing import Recorder
from harness.proxies import CLIENT, pinned_server

from ..crosstalk import (
    Handler,
    anew,
    assert_no_crosstalk,
    call,
    in_handler,
    in_streamed_body,
    in_streamed_response,
    server_with,
    three_turns,
)
from ..waiting import until

if TYPE_CHECKING:
    from pytest_aiohttp.plugin import AiohttpServer  # since 1.1, which needs aiohttp 3.11


async def in_gather(request: web.Request, wire: Recorder) -> web.StreamResponse:
    await asyncio.gather(*(call(request, wire) for _ in range(3)))
    return web.Response()


async def in_task_group(request: web.Request, wire: Recorder) -> web.StreamResponse:
    async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined,unused-ignore]
        group.create_task(call(request, wire))
    return web.Response()


async def in_thread(request: web.Request, wire: Recorder) -> web.StreamResponse:
    async def own_loop() -> None:
        hook = Routing({"gateway": str(wire.url)}).trace_config()
        async with (
            ClientSession(trace_configs=[hook]) as session,
            session.post(wire.chat, data=request.match_info["session_id"].encode()),
        ):
            pass

    await asyncio.to_thread(asyncio.run, own_loop())
    return web.Response()


async def in_block_that_is_open_before_the_body(
    request: web.Request, wire: Recorder
) -> web.StreamResponse:
    """The handler reads the first chunk, so that it could still answer with an error."""

    async def chunks() -> AsyncIterator[bytes]:
        with routing_session("judge"):
            for _ in range(3):
                async with request.config_dict[CLIENT].post(wire.chat, data=b"judge"):
                    yield b"chunk"

    async def body() -> AsyncIterator[bytes]:
        yield first
        async for chunk in begun:
            yield chunk

    begun = chunks()
    first = await begun.__anext__()
    return web.Response(body=body())


async def in_shield(request: web.Request, wire: Recorder) -> web.StreamResponse:
    await asyncio.shield(asyncio.create_task(call(request, wire)))
    return web.Response()


HANDLERS: dict[str, tuple[Any, int]] = {
    "handler": (in_handler, 1),
    "gather": (in_gather, 3),
    "to_thread": (in_thread, 1),
    "streamed body": (in_streamed_body, 2),
    "open block": (in_block_that_is_open_before_the_body, 3),
    "streamed response": (in_streamed_response, 2),
    "shield": (in_shield, 1),
}
if sys.version_info >= (3, 11):
    HANDLERS["TaskGroup"] = (in_task_group, 1)


@pytest.mark.parametrize(("handler", "calls"), HANDLERS.values(), ids=HANDLERS)
async def test_call_carries_the_session_of_its_request(
    gateway: Recorder, aiohttp_client: AiohttpClient, handler: Any, calls: int
) -> None:
    app = pinned_server(gateway.url)
    app.router.add_post("/{session_id}", partial(handler, wire=gateway))
    client = await aiohttp_client(app)

    await asyncio.gather(*(three_turns(client, f"s-{number}") for number in range(20)))
    assert_no_crosstalk(gateway, calls * 60)


@pytest.mark.thorough
async def test_thousands_of_sessions_at_once_stay_apart(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    sessions = 3000
    waiting = 0
    everybody_is_here = asyncio.Event()
    arriving = asyncio.Semaphore(100)  # fewer than a server's backlog

    async def handler(request: web.Request) -> web.Response:
        nonlocal waiting
        waiting += 1
        arriving.release()
        if waiting == sessions:
            everybody_is_here.set()
        await everybody_is_here.wait()
        await call(request, gateway)
        return web.Response(text=current_session_id())

    app = server_with(handler, gateway)
    client = await aiohttp_client(app, connector=TCPConnector(limit=0))

    async def turn(session: int) -> None:
        await arriving.acquire()
        async with client.post(f"/s-{session}") as response:
            assert await response.text() == f"s-{session}"

    await asyncio.gather(*map(turn, range(sessions)))
    assert_no_crosstalk(gateway, sessions)
    assert len({call.body for call in gateway.calls}) == sessions


async def test_pipelined_requests_of_one_connection_stay_apart(
    gateway: Recorder, aiohttp_server: "AiohttpServer"
) -> None:
    app = pinned_server(gateway.url)
    app.router.add_post("/{session_id}", partial(in_handler, wire=gateway))

    async def without_session(request: web.Request) -> web.Response:
        async with request.config_dict[CLIENT].post(gateway.chat, data=b"none"):
            return web.Response()

    app.router.add_post("/", without_session)
    server = await aiohttp_server(app)
    reader, writer = await asyncio.open_connection(server.host, server.port)
    paths = [f"/s-{number % 7}" if number % 3 else "/" for number in range(60)]
    for path in paths:
        writer.write(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n".encode())
    for _ in paths:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()
    for path, sent in zip(paths, gateway.calls, strict=True):
        assert sent.keys == ([path[1:].encode()] if path != "/" else [])


async def test_a_hostile_client_can_neither_choose_nor_break_its_pin(
    gateway: Recorder, aiohttp_server: "AiohttpServer"
) -> None:
    server = await aiohttp_server(pinned_server(gateway.url))
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(
        b"POST /sessions/s-1/v1/chat/completions HTTP/1.1\r\n"
        b"Host: h\r\n"
        b"X-SMG-Routing-Key:\r\n"
        b"x-smg-routing-key: s-2\r\n"
        b"X-SMG-ROUTING-KEY: s-3\r\n"
        b"x-smg-routing-key: s-4\r\n"
        b"x-smg-target-worker: 99\r\n"
        b"X-SMG-Target-Worker: 0\r\n"
        b"Content-Length: 2\r\n\r\n{}"
    )
    await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert gateway.last.keys == [b"s-1"]
    assert gateway.last.values("X-SMG-Target-Worker") == []
    assert gateway.last.body == b"{}"


@pytest.mark.parametrize(
    ("path", "session_id"),
    [("a%0d%0aX-Evil:%201", "a\r\nX-Evil: 1"), ("%00", "\0"), ("%C3%A9", "é"), ("a%2Fb", "a/b")],
)
async def test_a_hostile_session_id_gives_one_clean_key(
    gateway: Recorder, aiohttp_server: "AiohttpServer", path: str, session_id: str
) -> None:
    server = await aiohttp_server(pinned_server(gateway.url))
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(
        f"POST /sessions/{path}/v1/chat/completions HTTP/1.1\r\n"
        "Host: h\r\nContent-Length: 0\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    key = RoutingConfig(gateway.url).routing_key(session_id)
    assert gateway.last.keys == [key.encode()]
    assert gateway.last.values("X-Evil") == []


async def test_a_request_without_a_session_goes_on_without_a_key(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(pinned_server(gateway.url))
    async with client.post("/v1/chat/completions", data=b"{}") as response:
        assert response.status == 200
    assert gateway.last.keys == []


async def test_a_source_that_raises_never_fails_the_request(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    def source(request: web.Request) -> str:
        raise ZeroDivisionError("in the source")

    client = await aiohttp_client(pinned_server(gateway.url, session_id=source))
    for _ in range(3):
        async with client.post("/sessions/s-1/v1/chat/completions") as response:
            assert response.status == 200
    assert [sent.keys for sent in gateway.calls] == [[], [], []]
    assert caplog.text.count("ZeroDivisionError: in the source") == 1


async def test_a_server_started_within_a_session_does_not_give_it_to_its_requests(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    with routing_session("of-whoever-started-the-server"):
        client = await aiohttp_client(pinned_server(gateway.url))
        async with client.post("/v1/chat/completions") as response:
            assert response.status == 200
    assert gateway.last.keys == []


async def test_a_block_within_a_request_outranks_its_session(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    async def handler(request: web.Request) -> web.Response:
        for session_id in ("judge", None):
            with routing_session(session_id):
                async with request.app[CLIENT].post(gateway.chat):
                    pass
        await call(request, gateway)
        return web.Response()

    app = server_with(handler, gateway)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 200
    assert [sent.keys for sent in gateway.calls] == [[b"judge"], [], [b"s-1"]]


async def test_a_block_within_a_request_goes_to_a_gateway_that_is_not_the_apps_too(
    gateway: Recorder, elsewhere: Recorder, aiohttp_client: AiohttpClient
) -> None:
    hook = Routing(RoutingConfig(elsewhere.url, prefix="judge/")).trace_config()

    async def handler(request: web.Request) -> web.Response:
        with routing_session("s-9"):
            async with ClientSession(trace_configs=[hook]) as session, session.post(elsewhere.chat):
                return web.Response()

    app = server_with(handler, gateway)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 200
    assert elsewhere.last.keys == [b"judge/s-9"]


def calling(*wires: Recorder) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        for wire in wires:
            async with request.config_dict[CLIENT].post(wire.chat):
                pass
        return web.Response(text=str(current_session_id()))

    return handler


NESTED = {
    "root only": (True, False, [b"of-root"], [b"of-root"]),
    "sub-app only": (False, True, [], [b"of-sub"]),
    "both": (True, True, [b"of-root"], [b"of-sub"]),
}


@pytest.mark.parametrize(("root", "sub", "keys", "sub_keys"), NESTED.values(), ids=NESTED)
async def test_nested_apps(
    gateway: Recorder,
    outgoing: ClientSession,
    aiohttp_client: AiohttpClient,
    root: bool,
    sub: bool,
    keys: list[bytes],
    sub_keys: list[bytes],
) -> None:
    app, sub_app = web.Application(), web.Application()
    app[CLIENT] = outgoing
    app.router.add_post("/{session_id}", calling(gateway))
    sub_app.router.add_post("/{session_id}", calling(gateway))
    for wanted, nested, source in ((root, app, "query:root"), (sub, sub_app, "query:sub")):
        if wanted:
            config = RoutingConfig(gateway.url, session_id=source)
            setup(nested, config).attach(outgoing)
    app.add_subapp("/sub", sub_app)
    client = await aiohttp_client(app)
    for path in ("/x", "/sub/x"):
        async with client.post(path, params={"root": "of-root", "sub": "of-sub"}) as response:
            assert response.status == 200
    assert [sent.keys for sent in gateway.calls] == [keys, sub_keys]


async def test_nested_apps_with_a_gateway_each_stay_apart(
    gateway: Recorder, elsewhere: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    app, sub_app = web.Application(), web.Application()
    app[CLIENT] = outgoing
    sub_app.router.add_post("/", calling(gateway, elsewhere))
    for nested, wire, source in ((app, gateway, "query:root"), (sub_app, elsewhere, "query:sub")):
        config = RoutingConfig(wire.url, session_id=source)
        setup(nested, config).attach(outgoing)
    app.add_subapp("/sub", sub_app)
    client = await aiohttp_client(app)
    async with client.post("/sub/", params={"root": "r", "sub": "s"}) as response:
        assert await response.text() == "s"
    assert (gateway.last.keys, elsewhere.last.keys) == ([b"r"], [b"s"])
    async with client.post("/sub/", params={"root": "r"}) as response:
        assert await response.text() == "r"
    assert (gateway.last.keys, elsewhere.last.keys) == ([b"r"], [])


async def test_apps_that_share_a_client_session_stay_apart(
    gateway: Recorder, elsewhere: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    """An id goes only to the gateways of its app, in that app's form of key and header."""
    configs = [
        RoutingConfig(gateway.url, session_id="query:one", key="digest", secret="k"),
        RoutingConfig([gateway.url, elsewhere.url], session_id="query:two", header="X-Pin"),
    ]
    clients = []
    for config in configs:
        app = web.Application()
        app[CLIENT] = outgoing
        app.router.add_post("/", calling(gateway, elsewhere))
        setup(app, config).attach(outgoing)
        clients.append(await aiohttp_client(app))
    for client in clients:
        async with client.post("/", params={"one": "bearer-token", "two": "s-2"}) as response:
            assert response.status == 200
    one, two = gateway.calls
    assert one.keys == [configs[0].routing_key("bearer-token").encode()]
    assert one.values("X-Pin") == []
    assert (two.keys, two.values("X-Pin")) == ([], [b"s-2"])
    one, two = elsewhere.calls
    assert (one.keys, one.values("X-Pin")) == ([], [])
    assert (two.keys, two.values("X-Pin")) == ([], [b"s-2"])


async def test_middleware_alone_with_a_session_of_its_own_hook(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    app = web.Application(middlewares=[routing.middleware])
    app.router.add_post("/{session_id}", calling(gateway))
    async with ClientSession(trace_configs=[routing.trace_config()]) as app[CLIENT]:
        client = await aiohttp_client(app)
        async with client.post("/s-1") as response:
            assert await response.text() == "s-1"
    assert gateway.last.keys == [b"s-1"]


async def test_middleware_that_is_not_enabled_does_nothing(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    routing = Routing({"gateway": str(gateway.url), "enabled": False})
    app = web.Application(middlewares=[routing.middleware])

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=str(current_session_id()))

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert await response.text() == "None"


async def test_one_request_that_is_handled_as_several_at_once_keeps_their_sessions_apart(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    """An outer middleware may start several handlers before any of them runs."""

    @web.middleware
    async def fan_out(request: web.Request, handler: Handler) -> web.StreamResponse:
        clones = [request.clone(headers={"X-Session-Id": f"s-{number}"}) for number in range(3)]
        answers = await asyncio.gather(*map(handler, clones))
        return answers[0]

    async def handler(request: web.Request) -> web.Response:
        session_id = request.headers["X-Session-Id"]
        async with request.app[CLIENT].post(gateway.chat, data=session_id.encode()):
            return web.Response()

    app = pinned_server(gateway.url, session_id="header:X-Session-Id")
    app.middlewares.insert(0, fan_out)
    app.router.add_post("/fan", handler)
    client = await aiohttp_client(app)
    async with client.post("/fan") as response:
        assert response.status == 200
    assert_no_crosstalk(gateway, 3)


@web.middleware
async def again(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run the handler a second time without a session, as a middleware above the plugin may."""
    await handler(request.clone(headers={"X-Session-Id": "first"}))
    return await handler(request.clone(headers={}))


async def test_a_second_try_of_a_request_has_nothing_of_the_first_ones_session(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    async def handler(request: web.Request) -> web.Response:
        async with request.app[CLIENT].post(gateway.chat):
            return web.Response(text=str(current_session_id()))

    app = pinned_server(gateway.url, session_id="header:X-Session-Id")
    app.middlewares.insert(0, again)
    app.router.add_post("/again", handler)
    client = await aiohttp_client(app)
    async with client.post("/again") as response:
        assert await response.text() == "None"
    assert [call.keys for call in gateway.calls] == [[b"first"], []]


async def test_a_second_try_of_a_request_has_nothing_of_an_inner_apps_session_of_the_first(
    gateway: Recorder, elsewhere: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    @web.middleware
    async def judging(request: web.Request, handler: Handler) -> web.StreamResponse:
        await calling(elsewhere)(request)
        return await handler(request)

    app, sub_app = web.Application(middlewares=[again]), web.Application()
    app[CLIENT] = outgoing
    sub_app.router.add_post("/", calling(elsewhere))
    setup(app, RoutingConfig(gateway.url, session_id="query:root")).attach(outgoing)
    setup(sub_app, RoutingConfig(elsewhere.url, session_id="header:X-Session-Id")).attach(outgoing)
    app.middlewares.append(judging)
    app.add_subapp("/sub", sub_app)
    client = await aiohttp_client(app)
    async with client.post("/sub/?root=r") as response:
        assert await response.text() == "r"
    assert [sent.keys for sent in elsewhere.calls] == [[], [b"first"], [], []]


async def in_task(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Handle a request in a task, outside of which aiohttp sends the answer."""

    async def handle() -> web.StreamResponse:
        return await handler(request)

    return await asyncio.create_task(handle())


class Calling(Payload):
    """A body that several answers may share."""

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("it is streamed")

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self._value()


async def test_a_body_that_several_answers_have_is_sent_in_the_session_of_each(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    """A middleware above the plugin holds back the first answer until the others are sent."""
    has_come, may_go = asyncio.Event(), asyncio.Event()

    @web.middleware
    async def holding(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/aside":
            return web.Response(body=body)
        response = await in_task(request, handler)
        if request.path == "/s-0":
            has_come.set()
            await may_go.wait()
        return response

    async def turn() -> None:
        async with app[CLIENT].post(gateway.chat):
            pass

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body)

    async def post(path: str) -> None:
        async with client.post(path) as response:
            await response.read()

    app, body = pinned_server(gateway.url), Calling(turn)
    app.middlewares.insert(0, holding)
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    held = asyncio.create_task(post("/s-0"))
    await has_come.wait()
    for number in (1, 2):
        await post(f"/s-{number}")
    await post("/aside")  # the plugin does not see it
    may_go.set()
    await held
    assert [sent.keys for sent in gateway.calls] == [[b"s-1"], [b"s-2"], [], [b"s-0"]]
    assert "write" not in vars(body)  # it is left as it was


async def test_a_body_of_an_inner_app_below_a_task_is_sent_in_the_inner_apps_session(
    gateway: Recorder, elsewhere: Recorder, aiohttp_client: AiohttpClient
) -> None:
    @web.middleware
    async def below(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await in_task(request, handler)

    app = web.Application()
    setup(app, RoutingConfig(elsewhere.url, session_id="query:outer"))
    app.middlewares.append(below)
    app.add_subapp("/sub", server_with(partial(in_streamed_body, wire=gateway), gateway))
    client = await aiohttp_client(app)
    async with client.post("/sub/s-1?outer=o-1") as response:
        assert await response.text() == "chunkchunk"
    assert_no_crosstalk(gateway, 2)


COPIES: dict[str, Callable[[web.StreamResponse], web.StreamResponse]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda response: pickle.loads(pickle.dumps(response)),  # noqa: S301
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
async def test_a_middleware_may_send_copies_of_an_answer(
    gateway: Recorder, aiohttp_client: AiohttpClient, copied: Any
) -> None:
    """A cache does that."""
    cache: list[web.StreamResponse] = []

    @web.middleware
    async def caching(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not cache:
            cache.append(await handler(request))
        return copied(cache[0])  # type: ignore[no-any-return]

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body="answer")

    app = server_with(handler, gateway)
    app.middlewares.insert(0, caching)
    client = await aiohttp_client(app)
    for _ in range(2):
        async with client.post("/s-1") as response:
            assert await response.text() == "answer"


async def test_a_copy_of_a_streamed_answer_is_sent_in_the_session_of_its_request(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    @web.middleware
    async def copying(request: web.Request, handler: Handler) -> web.StreamResponse:
        return copy.copy(await in_task(request, handler))

    app = server_with(partial(in_streamed_body, wire=gateway), gateway)
    app.middlewares.insert(0, copying)
    client = await aiohttp_client(app)
    for session_id in ("s-1", "s-2"):
        async with client.post(f"/{session_id}") as response:
            assert await response.text() == "chunkchunk"
    assert_no_crosstalk(gateway, 4)


async def test_a_body_that_is_not_sent_is_freed_at_once(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    """It may hold a file open."""
    bodies: list[weakref.ref[BytesIO]] = []

    async def handler(request: web.Request) -> web.Response:
        body = BytesIO(b"answer")
        bodies.append(weakref.ref(body))
        return web.Response(body=body)

    app = server_with(handler, gateway)
    app.router.add_get("/{session_id}", handler)
    client = await aiohttp_client(app)
    gc.collect()
    gc.disable()
    try:
        async with client.head("/s-1") as response:
            assert response.status == 200
        await until(lambda: bodies[0]() is None)
    finally:
        gc.enable()


async def test_a_middleware_may_write_a_body_in_its_own_way(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    written: list[object] = []

    class Body(BytesPayload):
        async def write(self, writer: AbstractStreamWriter, *, end: bool = True) -> None:
            written.append(end)

    @web.middleware
    async def writes(request: web.Request, handler: Handler) -> web.StreamResponse:
        response: Any = await handler(request)
        await response.body.write(Writer(), end=False)
        return web.Response()

    async def handler(request: web.Request) -> web.Response:
        body: Any = Body(b"")
        if request.query:
            body.write = partial(body.write, end=None)  # the handler's own
        return web.Response(body=body)

    app = server_with(handler, gateway)
    app.middlewares.insert(0, writes)
    client = await aiohttp_client(app)
    for path in ("/s-1", "/s-1?own"):
        async with client.post(path) as response:
            assert response.status == 200
    assert written == [False, False]


class Writer(AbstractStreamWriter):
    """A minimal writer, as in a user's tests; it writes nothing."""

    transport = None
    write = write_eof = drain = write_headers = enable_compression = enable_chunking = None  # type: ignore[assignment]


@pytest.mark.parametrize("writer", [None, object(), SimpleNamespace(), Writer()], ids=type)
async def test_whatever_writes_the_answer_in_a_test_the_turn_and_what_it_starts_have_the_session(
    gateway: Recorder, writer: Any
) -> None:
    routing = Routing(RoutingConfig(gateway.url, session_id="header:X-Session-Id"))
    has_ended = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def turn() -> None:
        hook = routing.trace_config()
        async with (
            ClientSession(trace_configs=[hook]) as session,
            session.post(gateway.chat, data=b"s-1"),
        ):
            pass

    async def later() -> None:
        await has_ended.wait()
        await turn()

    async def handler(request: web.Request) -> web.Response:
        tasks.append(asyncio.create_task(later()))
        await turn()
        return web.Response()

    request = make_mocked_request("POST", "/", headers={"X-Session-Id": "s-1"}, writer=writer)
    response = await asyncio.ensure_future(routing.middleware(request, handler))
    assert response.status == 200
    has_ended.set()
    await asyncio.gather(*tasks)
    assert_no_crosstalk(gateway, 2)


@pytest.mark.parametrize(("inner", "outer"), [("warn", "pass"), ("pass", "warn")])
async def test_a_request_without_a_session_goes_by_its_apps_on_missing(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    inner: Any,
    outer: Any,
) -> None:
    app = web.Application()
    hook = Routing(RoutingConfig(gateway.url, on_missing=outer)).trace_config()
    app.router.add_post("/", anew(gateway.chat, trace_configs=[hook]))
    setup(app, RoutingConfig(gateway.url, on_missing=inner))
    client = await aiohttp_client(app)
    async with client.post("/") as response:
        assert response.status == 200
    assert ("has no session" in caplog.text) is (inner == "warn")


async def test_an_inner_app_that_finds_no_session_leaves_the_outer_apps(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    config = RoutingConfig(gateway.url, session_id="header:X-Inner")
    hook = Routing(config).trace_config()

    app, sub = web.Application(), web.Application()
    sub.router.add_post("/{session_id}", anew(gateway.chat, trace_configs=[hook]))
    setup(sub, config)
    setup(app, RoutingConfig(gateway.url))
    app.add_subapp("/sub", sub)
    client = await aiohttp_client(app)
    async with client.post("/sub/s-1"):
        pass
    assert gateway.last.keys == [b"s-1"]
