"""Late calls: code that outlives its request makes them, and no other code does."""

import asyncio
import queue
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextvars import copy_context
from functools import partial
from typing import Any

import pytest
from aiohttp import ClientSession, MultipartWriter, Payload, WSMsgType, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.test_utils import TestServer
from prometheus_client import CollectorRegistry
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    ROUTING,
    MissingSessionError,
    PinSummary,
    Routing,
    RoutingConfig,
    in_session,
    routing_session,
    setup,
)
from aiohttp_smg_routing.testing import Recorder, completion
from harness.processes import ROOT, finished
from harness.proxies import CLIENT, pinned_server, proxy_server

from ..crosstalk import (
    Handler,
    assert_no_crosstalk,
    call,
    in_handler,
    in_streamed_body,
    in_streamed_response,
    post,
    server_with,
    three_turns,
    two_chunks,
)
from ..turns import said


def remedy(gateway: Recorder, code: str) -> str:
    """Return the warning about the late calls of ``code``."""
    return (
        f"POST {gateway.chat} is made by {code} in the session of a request that has ended. If "
        "that code serves other sessions too, start it when the app starts; if it is a job of this "
        "session, make it with in_session(...) or within routing_session(...). This is logged once "
        "for that code."
    )


class Late:
    """Code that outlives the requests that start it."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task, which must wait for ``go_on``."""
        self.tasks.append(asyncio.create_task(work))

    async def call(self, request: web.Request, wire: Recorder) -> None:
        """Wait for ``go_on``, then call the gateway in the session of the request."""
        await self.go_on.wait()
        await call(request, wire)

    async def finish(self) -> None:
        """Let all tasks go on and finish."""
        self.go_on.set()
        await asyncio.gather(*self.tasks)


class Batcher:
    """Makes the calls of all sessions in one task that the first request starts."""

    def __init__(self, wire: Recorder) -> None:
        self._wire = wire
        self._waiting: asyncio.Queue[tuple[str, asyncio.Future[None]]] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def call(self, request: web.Request) -> None:
        if self.task is None:
            self.task = asyncio.create_task(self.run(request.config_dict[CLIENT]))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._waiting.put((request.match_info["session_id"], done))
        await done

    async def run(self, session: ClientSession) -> None:
        while True:
            session_id, done = await self._waiting.get()
            try:
                await post(session, self._wire, session_id)
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

    async def close(self) -> None:
        assert self.task
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def batching(gateway: Recorder, batcher: Batcher, **config: object) -> web.Application:
    async def handler(request: web.Request) -> web.Response:
        try:
            await batcher.call(request)
        except MissingSessionError as error:
            return web.Response(status=500, text=str(error))
        return web.Response()

    return server_with(handler, gateway, **config)


@pytest.mark.parametrize("on_late", ["warn", "pass"])
async def test_a_batcher_that_the_first_request_started_is_late_for_all_others(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    on_late: str,
) -> None:
    """``on_missing`` doesn't help, because the calls do have a session: the wrong one."""
    gateway.answer = lambda call: completion(worker="http://10.0.0.1:8000")
    batcher, registry = Batcher(gateway), CollectorRegistry()
    app = batching(
        gateway,
        batcher,
        on_late=on_late,
        on_missing="raise",
        metrics="prometheus",
        metrics_registry=registry,
    )
    client = await aiohttp_client(app)
    for number in range(20):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 200
    assert [sent.keys for sent in gateway.calls] == [[b"s-0"]] * 20
    # A late call also counts by its outcome, as any call.
    assert app[ROUTING].pins.summary() == PinSummary(first=1, kept=19, late=19, sessions=1)
    assert registry.get_sample_value("smg_routing_late_total") == 19
    assert registry.get_sample_value("smg_routing_calls_total", {"outcome": "kept"}) == 19
    assert said(caplog) == ([remedy(gateway, "Batcher.run")] if on_late == "warn" else [])
    await batcher.close()


async def test_on_late_raise_fails_the_call_before_it_leaves(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = Batcher(gateway)
    app = batching(gateway, batcher, on_late="raise")
    client = await aiohttp_client(app)
    statuses, texts = [], set()
    for number in range(5):
        async with client.post(f"/s-{number}") as response:
            statuses.append(response.status)
            texts.add(await response.text())
    assert statuses == [200, 500, 500, 500, 500]
    [text] = texts - {""}
    assert remedy(gateway, "Batcher.run").startswith(text)
    assert [sent.body for sent in gateway.calls] == [b"s-0"]
    assert app[ROUTING].pins.summary() == PinSummary(unknown=1, late=4, sessions=1)
    assert said(caplog) == []
    await batcher.close()


@pytest.mark.parametrize("how", ["task", "call_soon", "call_later", "future", "thread"])
async def test_whatever_a_request_starts_is_late_when_it_has_ended(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """Examples are a limiter or a token refresher that the first request starts."""
    loop = asyncio.get_running_loop()
    go_on, is_done = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    def start(coroutine: Coroutine[Any, Any, None], *_: object) -> None:
        tasks.append(asyncio.ensure_future(coroutine))

    async def refresh() -> None:
        await go_on.wait()
        await post(app[CLIENT], gateway)
        is_done.set()

    async def handler(request: web.Request) -> web.Response:
        if how == "task":
            start(refresh())
        elif how == "call_soon":
            loop.call_soon(start, refresh())
        elif how == "call_later":
            loop.call_later(0, start, refresh())
        elif how == "future":
            ended.add_done_callback(lambda _: start(refresh()))
        else:
            await asyncio.to_thread(loop.call_soon_threadsafe, start, refresh())
        return web.Response(status=202)

    ended: asyncio.Future[None] = loop.create_future()
    app = server_with(handler, gateway)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 202
    ended.set_result(None)
    go_on.set()
    await is_done.wait()
    await asyncio.gather(*tasks)
    assert gateway.last.keys == [b"s-1"]
    assert app[ROUTING].pins.summary() == PinSummary(unknown=1, late=1, sessions=1)
    name = "test_whatever_a_request_starts_is_late_when_it_has_ended.<locals>.refresh"
    assert said(caplog) == [remedy(gateway, name)]


async def test_it_is_said_once_for_each_coroutine(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def limiter() -> None:
        await go_on.wait()
        for _ in range(3):
            await post(app[CLIENT], gateway)

    async def refresher() -> None:
        await limiter()

    async def handler(request: web.Request) -> web.Response:
        tasks.extend(asyncio.create_task(started()) for started in (limiter, refresher))
        return web.Response(status=202)

    app = server_with(handler, gateway)
    client = await aiohttp_client(app)
    for number in range(4):
        async with client.post(f"/s-{number}"):
            pass
    go_on.set()
    await asyncio.gather(*tasks)
    assert app[ROUTING].pins.summary().late == 24
    names = [
        line.partition(" is made by ")[2].partition(" in the session")[0] for line in said(caplog)
    ]
    assert sorted(name.rpartition(".")[2] for name in names) == ["limiter", "refresher"]


class Worker:
    """A thread that makes the calls of all sessions, in the context of the code that started it."""

    def __init__(self, routing: Routing, wire: Recorder) -> None:
        self._routing, self._wire = routing, wire
        self._work: queue.Queue[tuple[str, threading.Event] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def _run(self) -> None:
        while work := self._work.get():
            asyncio.run(self.call(work[0]))
            work[1].set()

    async def call(self, session_id: str) -> None:
        async with ClientSession(trace_configs=[self._routing.trace_config()]) as session:
            await post(session, self._wire, session_id)

    async def ask(self, session_id: str) -> None:
        if self._thread is None:
            context = copy_context()  # as under -X thread_inherit_context=1
            self._thread = threading.Thread(target=context.run, args=(self._run,))
            self._thread.start()
        done = threading.Event()
        self._work.put((session_id, done))
        await asyncio.to_thread(done.wait)

    async def close(self) -> None:
        self._work.put(None)
        assert self._thread
        await asyncio.to_thread(self._thread.join)


async def test_a_thread_that_has_inherited_the_context_is_late_for_all_others(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: web.Request) -> web.Response:
        await worker.ask(request.match_info["session_id"])
        return web.Response()

    app = server_with(handler, gateway)
    worker = Worker(app[ROUTING], gateway)
    client = await aiohttp_client(app)
    for number in range(5):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 200
    await worker.close()
    assert [sent.keys for sent in gateway.calls] == [[b"s-0"]] * 5
    assert app[ROUTING].pins.summary().late == 4
    assert said(caplog) == [remedy(gateway, "Worker.call")]


INHERITING = """
import asyncio, sys
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp_smg_routing import setup

GATEWAY = sys.argv[1]

async def call():
    async with ClientSession() as session, session.post(GATEWAY + "/v1/chat/completions"):
        pass

async def handler(request):
    await asyncio.get_running_loop().run_in_executor(None, asyncio.run, call())
    return web.Response()

async def main():
    app = web.Application()
    app.router.add_post("/{session_id}", handler)
    routing = setup(app, {"gateway": GATEWAY, "instrument": True})
    async with TestClient(TestServer(app)) as client:
        for number in range(5):
            async with client.post(f"/s-{number}") as response:
                assert response.status == 200
    print(routing.pins.summary().late)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.version_info < (3, 14), reason="threads inherit it from Python 3.14 on")
async def test_executor_threads_of_a_python_whose_threads_inherit_the_context_are_late(
    gateway: Recorder,
) -> None:
    argv = (sys.executable, "-X", "thread_inherit_context=1", "-c", INHERITING, str(gateway.url))
    done = await asyncio.to_thread(finished, ROOT, *argv, check=True)
    keys = [key for sent in gateway.calls for key in sent.keys]
    wrong = sum(key != f"s-{number}".encode() for number, key in enumerate(keys))
    assert wrong > 0
    assert int(done.stdout) == wrong
    assert "in the session of a request that has ended" in done.stderr


# Calls that are not late


def run_in_another_task(request: web.Request, handler: Handler) -> "Awaitable[web.StreamResponse]":
    """Run the handler in a task, as ``wait_for()`` does before Python 3.12."""
    return asyncio.create_task(handler(request))  # type: ignore[arg-type]


@web.middleware
async def with_a_time_limit(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await asyncio.wait_for(run_in_another_task(request, handler), 60)


async def in_task(request: web.Request, wire: Recorder) -> web.StreamResponse:
    await asyncio.gather(*(asyncio.create_task(call(request, wire)) for _ in range(2)))
    return web.Response()


async def in_multipart_body(request: web.Request, wire: Recorder) -> web.StreamResponse:
    parts = MultipartWriter("mixed")
    parts.append(two_chunks(request, wire))
    return web.Response(body=parts)


class Events(Payload):
    """A body of a type that aiohttp doesn't know."""

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("it is streamed")

    async def write(self, writer: AbstractStreamWriter) -> None:
        async for chunk in self._value:
            await writer.write(chunk)


async def in_payload(request: web.Request, wire: Recorder) -> web.StreamResponse:
    return web.Response(body=Events(two_chunks(request, wire)))


async def in_block_around_a_yield(request: web.Request, wire: Recorder) -> web.StreamResponse:
    async def body() -> AsyncIterator[bytes]:
        with routing_session("judge"):
            for _ in range(2):
                await post(request.config_dict[CLIENT], wire, "judge")
                yield b"chunk"
        await call(request, wire)

    return web.Response(body=body())


async def after_preparing_in_a_task(request: web.Request, wire: Recorder) -> web.StreamResponse:
    """Before Python 3.12 ``wait_for(response.prepare(request), ...)`` makes such a task."""
    response = web.StreamResponse()
    await asyncio.create_task(prepared(response, request))
    await call(request, wire)
    await response.write(b"chunk")
    await call(request, wire)
    return response


async def prepared(response: web.StreamResponse, request: web.Request) -> None:
    await response.prepare(request)


async def in_pump(request: web.Request, wire: Recorder) -> web.StreamResponse:
    """A task of the handler makes calls while the body is sent, after the handler has returned."""
    chunks: asyncio.Queue[bytes] = asyncio.Queue()
    is_sending = asyncio.Event()

    async def pump() -> None:
        await is_sending.wait()
        try:
            for _ in range(2):
                await call(request, wire)
                await chunks.put(b"chunk")
        finally:
            await chunks.put(b"")

    async def body() -> AsyncIterator[bytes]:
        is_sending.set()
        while chunk := await chunks.get():
            yield chunk
        await task

    task = asyncio.create_task(pump())
    return web.Response(body=body())


async def in_thread(request: web.Request, wire: Recorder) -> web.StreamResponse:
    await asyncio.to_thread(
        asyncio.run,
        Worker(request.config_dict[ROUTING], wire).call(request.match_info["session_id"]),
    )
    return web.Response()


async def in_error(request: web.Request, wire: Recorder) -> web.StreamResponse:
    """aiohttp sends an answer that the handler raises."""
    await call(request, wire)
    raise web.HTTPOk


async def in_streamed_error(request: web.Request, wire: Recorder) -> web.StreamResponse:
    error = web.HTTPOk()
    error.body = two_chunks(request, wire)
    raise error


IN_TIME: dict[str, tuple[Any, int]] = {
    "handler": (in_handler, 1),
    "task": (in_task, 2),
    "streamed body": (in_streamed_body, 2),
    "multipart body": (in_multipart_body, 2),
    "payload": (in_payload, 2),
    "block around a yield": (in_block_around_a_yield, 3),
    "streamed response": (in_streamed_response, 2),
    "prepared in a task": (after_preparing_in_a_task, 2),
    "pump": (in_pump, 2),
    "thread": (in_thread, 1),
    "raised": (in_error, 1),
    "raised with a streamed body": (in_streamed_error, 2),
}
MIDDLEWARES: dict[str, list[Any]] = {"plain": [], "time limit": [with_a_time_limit]}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("middlewares", MIDDLEWARES.values(), ids=MIDDLEWARES)
@pytest.mark.parametrize(("handler", "calls"), IN_TIME.values(), ids=IN_TIME)
async def test_what_belongs_to_the_request_is_not_late(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    handler: Any,
    calls: int,
    middlewares: list[Any],
    eager: bool,
) -> None:
    if eager:
        factory = getattr(asyncio, "eager_task_factory", None)
        if factory is None:
            pytest.skip("tasks can be eager from Python 3.12 on")
        if not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
            pytest.skip("uvloop 0.23 can't make eager tasks: it fails without the plugin, too")
        asyncio.get_running_loop().set_task_factory(factory)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(request, gateway)  # type: ignore[no-any-return]

    app = pinned_server(gateway.url, on_late="raise", on_missing="raise")
    app.middlewares[:0] = middlewares
    app.router.add_post("/{session_id}", handle)
    client = await aiohttp_client(app)

    await asyncio.gather(*(three_turns(client, f"s-{number}") for number in range(4)))
    assert_no_crosstalk(gateway, calls * 12)
    assert app[ROUTING].pins.summary().late == 0
    assert said(caplog) == []


async def test_the_next_request_on_a_connection_does_not_prolong_the_last_one(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    """aiohttp's ``request.task`` belongs to the connection, which outlives the request."""
    connections = set()
    is_next, has_called = asyncio.Event(), asyncio.Event()

    async def straggler(request: web.Request) -> None:
        await is_next.wait()
        await call(request, gateway)
        has_called.set()

    async def handler(request: web.Request) -> web.Response:
        connections.add(request.protocol)
        if not tasks:
            tasks.append(asyncio.create_task(straggler(request)))
        else:
            is_next.set()
            await has_called.wait()
            await call(request, gateway)
        return web.Response()

    tasks: list[asyncio.Task[None]] = []
    app = server_with(handler, gateway)
    client = await aiohttp_client(app)
    for number in range(2):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 200
    await asyncio.gather(*tasks)
    assert len(connections) == 1
    assert_no_crosstalk(gateway, 2)
    assert app[ROUTING].pins.summary() == PinSummary(unknown=2, late=1, sessions=2)


async def test_a_websocket_is_a_request_that_lasts(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    has_ended, tasks = asyncio.Event(), []

    async def straggler(request: web.Request) -> None:
        await has_ended.wait()
        await call(request, gateway)

    async def handler(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        tasks.append(asyncio.create_task(straggler(request)))
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await call(request, gateway)
                await asyncio.create_task(call(request, gateway))
                await socket.send_str("done")
        return socket

    app = pinned_server(gateway.url)
    app.router.add_get("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.ws_connect("/s-1") as socket:
        for _ in range(3):
            await socket.send_str("call")
            assert await socket.receive_str() == "done"
        assert app[ROUTING].pins.summary().late == 0
    await client.close()  # also closes the server, after its requests
    assert_no_crosstalk(gateway, 6)
    has_ended.set()
    async with ClientSession(trace_configs=[app[ROUTING].trace_config()]) as app._state[CLIENT]:
        await asyncio.gather(*tasks)
    assert app[ROUTING].pins.summary().late == 1


async def test_a_client_that_disconnects_does_not_end_a_request_whose_handler_runs_on(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 2**16)
        except (ConnectionError, asyncio.CancelledError):
            await call(request, gateway)
            await asyncio.create_task(call(request, gateway))
            finished.set_result(None)
        return response

    app = server_with(handler, gateway, on_late="raise")
    client = await aiohttp_client(app)
    response = await client.post("/s-1")
    response.close()
    await finished
    assert_no_crosstalk(gateway, 2)
    assert app[ROUTING].pins.summary().late == 0


@pytest.mark.parametrize("is_nested", [False, True])
async def test_a_client_that_disconnects_does_not_end_a_body_that_another_task_sends(
    gateway: Recorder, aiohttp_client: AiohttpClient, is_nested: bool
) -> None:
    senders: list[asyncio.Task[None] | None] = []

    async def handler(request: web.Request) -> web.Response:
        async def body() -> AsyncIterator[bytes]:
            senders.append(asyncio.current_task())
            yield b"chunk"
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:  # aiohttp cancels when the client disconnects
                await call(request, gateway)
                await asyncio.create_task(call(request, gateway))

        return web.Response(body=body())

    app = nested(gateway, handler, with_a_time_limit)
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    response = await client.post(f"{'/inner' * is_nested}/s-1?outer=s-1")
    assert await response.content.readany() == b"chunk"
    response.close()
    [sender] = senders
    assert sender
    await asyncio.wait([sender])
    assert_no_crosstalk(gateway, 2)
    assert app[ROUTING].pins.summary().late == 0


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    import trustme

    authority = trustme.CA()
    servers, clients = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(servers)
    authority.configure_trust(clients)
    return servers, clients


@pytest.mark.parametrize("is_tls", [False, pytest.param(True, marks=pytest.mark.thorough)])
async def test_a_request_is_over_while_its_connection_closes(
    gateway: Recorder, is_tls: bool
) -> None:
    """Closing may take forever if the client doesn't read the rest of the answer."""
    has_begun, is_closing = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []
    requests: list[tuple[Any, Any]] = []

    async def straggler(request: web.Request) -> None:
        await is_closing.wait()
        await call(request, gateway)

    async def handler(request: web.Request) -> web.StreamResponse:
        requests.append((asyncio.current_task(), request.transport))
        tasks.append(asyncio.create_task(straggler(request)))
        await web.StreamResponse().prepare(request)
        assert request.transport
        request.transport.write(bytes(2**25))  # more than the sockets buffer
        has_begun.set()
        raise ZeroDivisionError

    app = server_with(handler, gateway)
    server = TestServer(app)
    servers, clients = tls_contexts() if is_tls else (None, None)
    await server.start_server(ssl=servers)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=clients, limit=1)
    writer.write(b"POST /s-1 HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
    await has_begun.wait()
    [(request, transport)] = requests
    await asyncio.wait([request])
    assert transport.is_closing()
    assert transport.get_write_buffer_size() > 0
    is_closing.set()
    await asyncio.gather(*tasks)
    writer.transport.abort()
    await server.close()
    assert_no_crosstalk(gateway, 1)
    assert app[ROUTING].pins.summary().late == 1


async def test_a_handler_that_is_cancelled_when_its_client_disconnects_leaves_late_tasks(
    gateway: Recorder,
) -> None:
    """A turn under ``shield()`` outlives its request."""
    has_begun, has_ended = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []
    requests: list[asyncio.Task[None] | None] = []

    async def turn(request: web.Request) -> None:
        await call(request, gateway)
        has_begun.set()
        await has_ended.wait()
        await call(request, gateway)

    async def handler(request: web.Request) -> web.Response:
        requests.append(asyncio.current_task())
        tasks.append(asyncio.create_task(turn(request)))
        try:
            await asyncio.shield(tasks[0])
        except asyncio.CancelledError:
            await call(request, gateway)  # the handler is still running
            raise
        return web.Response()

    app = server_with(handler, gateway)
    server = TestServer(app)  # uses handler_cancellation
    await server.start_server()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /s-1 HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
    await has_begun.wait()
    writer.close()
    await writer.wait_closed()
    [request] = requests
    assert request
    await asyncio.wait([request])
    assert app[ROUTING].pins.summary().late == 0
    has_ended.set()
    await tasks[0]
    assert_no_crosstalk(gateway, 3)
    assert app[ROUTING].pins.summary().late == 1
    await server.close()


async def test_a_streamed_body_that_another_task_sends_has_the_session(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    """A time limit above the plugin runs the handler in a task; another task sends the body."""
    app = pinned_server(gateway.url, on_late="raise", on_missing="raise")
    app.middlewares.insert(0, with_a_time_limit)
    senders, handlers = [], []

    async def handler(request: web.Request) -> web.Response:
        handlers.append(asyncio.current_task())

        async def body() -> AsyncIterator[bytes]:
            senders.append(asyncio.current_task())
            await call(request, gateway)
            yield b"chunk"

        return web.Response(body=body())

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    for number in range(3):
        async with client.post(f"/s-{number}") as response:
            assert await response.read() == b"chunk"
    assert set(senders).isdisjoint(handlers)
    assert_no_crosstalk(gateway, 3)
    # The next request on the connection, which names no session, has none.
    async with client.post("/v1/chat/completions") as response:
        assert response.status == 500


async def test_a_block_above_a_time_limit_that_answers_in_it_keeps_its_session(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    is_judged = asyncio.Event()

    @web.middleware
    async def judging(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        try:
            with routing_session("judge"):
                for answer in (response.prepare, lambda _: response.write_eof()):
                    await answer(request)
                    await post(request.app[CLIENT], gateway, "judge")
        finally:
            is_judged.set()
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        return await in_streamed_body(request, gateway)

    app = pinned_server(gateway.url, on_late="raise")
    app.middlewares[:0] = [judging, with_a_time_limit]
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 200
        await response.read()
    await is_judged.wait()
    assert_no_crosstalk(gateway, 4)
    assert said(caplog) == []


async def test_a_request_under_a_time_limit_ends_when_its_answer_is_sent(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    late = Late()

    async def handler(request: web.Request) -> web.Response:
        late.start(late.call(request, gateway))
        return web.Response()

    app = pinned_server(gateway.url)
    app.middlewares.insert(0, with_a_time_limit)
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    for number in range(2):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 200
    await late.finish()
    assert_no_crosstalk(gateway, 2)
    assert app[ROUTING].pins.summary().late == 2


async def test_a_pump_is_not_late_between_a_time_limit_and_the_answer(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler's task has ended, and a middleware above it has not yet answered."""
    handler_task: list[asyncio.Task[Any]] = []
    has_called = asyncio.Event()

    @web.middleware
    async def save_session(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        await has_called.wait()
        return response

    @web.middleware
    async def time_limit(request: web.Request, handler: Handler) -> web.StreamResponse:
        task: Any = run_in_another_task(request, handler)
        handler_task.append(task)
        return await asyncio.wait_for(task, 60)

    async def handler(request: web.Request) -> web.Response:
        async def pump() -> None:
            await asyncio.wait(handler_task)
            try:
                await call(request, gateway)
            finally:
                has_called.set()

        async def body() -> AsyncIterator[bytes]:
            await task
            yield b"chunk"

        task = asyncio.create_task(pump())
        return web.Response(body=body())

    app = pinned_server(gateway.url)
    app.middlewares[:0] = [save_session, time_limit]
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert await response.read() == b"chunk"
    assert_no_crosstalk(gateway, 1)
    assert app[ROUTING].pins.summary().late == 0
    assert said(caplog) == []


async def test_what_a_middleware_above_a_time_limit_waits_for_is_not_late(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler has sent its whole answer, but the request goes on in a middleware."""
    is_sent = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def bookkeeping(request: web.Request) -> None:
        await is_sent.wait()
        await call(request, gateway)

    @web.middleware
    async def waiting(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        is_sent.set()
        await asyncio.gather(*tasks)
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        tasks.append(asyncio.create_task(bookkeeping(request)))
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write_eof(b"chunk")
        return response

    app = pinned_server(gateway.url)
    app.middlewares[:0] = [waiting, with_a_time_limit]
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert await response.read() == b"chunk"
    await asyncio.gather(*tasks)
    assert_no_crosstalk(gateway, 1)
    assert app[ROUTING].pins.summary().late == 0
    assert said(caplog) == []


@pytest.mark.parametrize("inner_has", [True, False])
async def test_nested_apps_end_with_the_one_request_that_they_handle(
    gateway: Recorder, aiohttp_client: AiohttpClient, inner_has: bool
) -> None:
    late = Late()

    async def straggler(request: web.Request) -> None:
        await late.go_on.wait()
        async with request.config_dict[CLIENT].post(gateway.chat):
            pass

    async def handler(request: web.Request) -> web.Response:
        async with request.config_dict[CLIENT].post(gateway.chat):
            pass
        late.start(straggler(request))
        return web.Response()

    app, inner = pinned_server(gateway.url, session_id="query:outer"), web.Application()
    inner.router.add_post("/", handler)
    setup(inner, RoutingConfig(gateway.url, session_id="query:inner"))
    app.add_subapp("/inner", inner)
    client = await aiohttp_client(app)
    query = {"outer": "o", "inner": "i"} if inner_has else {"outer": "o"}
    async with client.post("/inner/", params=query) as response:
        assert response.status == 200
    await late.finish()
    theirs, others = (inner, app) if inner_has else (app, inner)
    assert [sent.keys for sent in gateway.calls] == [[b"i" if inner_has else b"o"]] * 2
    assert theirs[ROUTING].pins.summary() == PinSummary(unknown=2, late=1, sessions=1)
    assert others[ROUTING].pins.summary() == PinSummary()


def nested(gateway: Recorder, handler: Handler, *middlewares: Any) -> web.Application:
    """Return an app with a sub-app; both have the plugin, but only the outer finds ids."""
    app = pinned_server(gateway.url, session_id="query:outer", on_late="raise")
    app.middlewares[:0] = middlewares
    inner = web.Application()
    inner.router.add_post("/{session_id}", handler)
    setup(inner, RoutingConfig(gateway.url, session_id="query:inner", on_late="raise"))
    app.add_subapp("/inner", inner)
    return app


async def test_nested_apps_under_a_time_limit_end_when_the_answer_is_sent(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await in_pump(request, gateway)

    app = nested(gateway, handler, with_a_time_limit)
    client = await aiohttp_client(app)
    for number in range(3):
        async with client.post(f"/inner/s-{number}?outer=s-{number}") as response:
            assert await response.read() == b"chunkchunk"
    assert_no_crosstalk(gateway, 6)
    assert app[ROUTING].pins.summary() == PinSummary(unknown=6, sessions=3)


async def test_in_session_names_the_session_of_an_outer_app(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    late = Late()

    async def handler(request: web.Request) -> web.Response:
        late.start(in_session(late.call(request, gateway)))
        return web.Response()

    app = nested(gateway, handler)
    client = await aiohttp_client(app)
    for number in range(3):
        async with client.post(f"/inner/s-{number}?outer=s-{number}"):
            pass
    await late.finish()
    assert_no_crosstalk(gateway, 3)
    assert app[ROUTING].pins.summary() == PinSummary(unknown=3, sessions=3)


async def test_what_has_no_session_is_missing_and_not_late(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    late = Late()

    async def straggler(request: web.Request) -> None:
        await late.go_on.wait()
        await post(request.app[CLIENT], gateway)

    async def handler(request: web.Request) -> web.Response:
        late.start(straggler(request))
        return web.Response()

    app = pinned_server(gateway.url)
    app.router.add_post("/", handler)
    client = await aiohttp_client(app)
    async with client.post("/"):
        pass
    await late.finish()
    assert app[ROUTING].pins.summary() == PinSummary(untagged=1, missing=1)


async def test_a_late_call_to_somewhere_else_is_not_counted(
    gateway: Recorder, elsewhere: Recorder, aiohttp_client: AiohttpClient
) -> None:
    late = Late()

    async def straggler(request: web.Request) -> None:
        await late.go_on.wait()
        async with request.app[CLIENT].post(elsewhere.url / "telemetry"):
            pass

    async def handler(request: web.Request) -> web.Response:
        late.start(straggler(request))
        return web.Response()

    app = server_with(handler, gateway, on_late="raise")
    client = await aiohttp_client(app)
    async with client.post("/s-1"):
        pass
    await late.finish()
    assert elsewhere.last.keys == []
    assert app[ROUTING].pins.summary().late == 0


async def test_a_middleware_alone_tells_late_code_from_other_code_too(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    late = Late()
    routing = Routing(RoutingConfig(gateway.url))

    async def handler(request: web.Request) -> web.StreamResponse:
        late.start(late.call(request, gateway))
        return await in_streamed_body(request, gateway)

    app = proxy_server(gateway.url)
    app.middlewares.append(routing.middleware)
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    routing.attach(app[CLIENT])
    async with client.post("/s-1") as response:
        await response.read()
    assert routing.pins.summary().late == 0
    await late.finish()
    assert_no_crosstalk(gateway, 3)
    assert routing.pins.summary().late == 1


# Code that names its session


async def jobs(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    start: Callable[[Callable[[], Coroutine[Any, Any, None]]], Coroutine[Any, Any, None]],
) -> PinSummary:
    """Play three requests that each start a job; the jobs make their calls after the requests."""
    late = Late()

    async def handler(request: web.Request) -> web.Response:
        late.start(start(partial(late.call, request, gateway)))
        return web.Response(status=202)

    app = server_with(handler, gateway, on_missing="raise")
    client = await aiohttp_client(app)
    for number in range(3):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 202
    await late.finish()
    return app[ROUTING].pins.summary()


async def test_in_session_names_the_session_of_a_job(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    def start(job: Callable[[], Coroutine[Any, Any, None]]) -> Coroutine[Any, Any, None]:
        return in_session(job())

    assert (await jobs(gateway, aiohttp_client, start)).late == 0
    assert_no_crosstalk(gateway, 3)


async def test_what_a_job_of_in_session_starts_is_named_too(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    def start(job: Callable[[], Coroutine[Any, Any, None]]) -> Coroutine[Any, Any, None]:
        async def starting() -> None:
            await asyncio.create_task(job())
            await in_session(asyncio.sleep(0))

        return in_session(starting())

    assert (await jobs(gateway, aiohttp_client, start)).late == 0
    assert_no_crosstalk(gateway, 3)


async def test_in_session_of_code_that_is_late_stays_late(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    """Otherwise a batcher that wraps each call would hide that all have the first session."""
    late = Late()

    async def job(request: web.Request) -> None:
        await late.go_on.wait()
        await in_session(call(request, gateway))
        await asyncio.create_task(in_session(in_session(call(request, gateway))))

    async def handler(request: web.Request) -> web.Response:
        late.start(job(request))
        return web.Response()

    app = server_with(handler, gateway)
    client = await aiohttp_client(app)
    async with client.post("/s-1"):
        pass
    await late.finish()
    assert_no_crosstalk(gateway, 2)
    assert app[ROUTING].pins.summary().late == 2


async def test_a_routing_session_names_the_session_of_a_job(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    """The late code enters a block for each job."""
    late = Late()
    app = pinned_server(gateway.url, on_late="raise")

    async def batcher() -> None:
        await late.go_on.wait()
        for number in range(3):
            async with routing_session(f"job-{number}"):
                await post(app[CLIENT], gateway, f"job-{number}")

    async def handler(request: web.Request) -> web.Response:
        if not late.tasks:
            late.start(batcher())
        return web.Response()

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    for number in range(2):
        async with client.post(f"/s-{number}"):
            pass
    await late.finish()
    assert_no_crosstalk(gateway, 3)
    assert app[ROUTING].pins.summary() == PinSummary(unknown=3, sessions=3)


async def test_a_task_that_is_made_within_a_block_has_its_session_named(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    late = Late()

    async def handler(request: web.Request) -> web.Response:
        with routing_session(request.match_info["session_id"]):
            late.start(late.call(request, gateway))
        return web.Response()

    app = server_with(handler, gateway, on_late="raise")
    client = await aiohttp_client(app)
    for number in range(3):
        async with client.post(f"/s-{number}"):
            pass
    await late.finish()
    assert_no_crosstalk(gateway, 3)


async def test_a_worker_that_is_started_when_the_app_starts_has_no_request_to_outlive(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    """This is the right way for a batcher: each job brings its session."""
    work: asyncio.Queue[tuple[Coroutine[Any, Any, None], asyncio.Future[None]]] = asyncio.Queue()

    async def run() -> None:
        while True:
            job, done = await work.get()
            await job
            done.set_result(None)

    async def worker(app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def handler(request: web.Request) -> web.Response:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await work.put((in_session(call(request, gateway)), done))
        await done
        return web.Response()

    app = pinned_server(gateway.url, on_late="raise", on_missing="raise")
    app.cleanup_ctx.append(worker)
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    for number in range(5):
        async with client.post(f"/s-{number}") as response:
            assert response.status == 200
    assert_no_crosstalk(gateway, 5)


async def test_a_task_that_prepares_the_answers_of_others_has_none_of_their_sessions(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    waiting: asyncio.Queue[tuple[web.Request, asyncio.Future[web.StreamResponse]]] = asyncio.Queue()

    async def hub(app: web.Application) -> AsyncIterator[None]:
        async def answer() -> None:
            while True:
                request, answered = await waiting.get()
                response = web.StreamResponse()
                await response.prepare(request)
                async with app[CLIENT].post(gateway.chat):
                    await response.write_eof()
                answered.set_result(response)

        task = asyncio.create_task(answer())
        yield
        task.cancel()

    async def handler(request: web.Request) -> web.StreamResponse:
        answered = asyncio.get_running_loop().create_future()
        waiting.put_nowait((request, answered))
        response: web.StreamResponse = await answered
        return response

    app = pinned_server(gateway.url)
    app.cleanup_ctx.append(hub)
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    for number in range(5):
        async with client.post(f"/s-{number}") as response:
            assert await response.read() == b""
    assert [sent.keys for sent in gateway.calls] == [[]] * 5
    assert app[ROUTING].pins.summary().missing == 5


@web.middleware
async def cloning(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Clone the request, as a middleware does that reads a proxy's headers."""
    return await handler(request.clone(scheme="https"))


@web.middleware
async def limiting(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await run_in_another_task(request, handler)


@pytest.mark.parametrize(
    "middlewares", [[cloning], [cloning, limiting], [limiting, cloning]], ids=["", "then", "within"]
)
async def test_a_request_that_was_cloned_on_the_way_is_one_request(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    middlewares: list[Any],
) -> None:
    async def streams(request: web.Request) -> web.StreamResponse:
        async def body() -> AsyncIterator[bytes]:
            await call(request, gateway)
            yield b"chunk"

        return web.Response(body=body())

    async def prepares_elsewhere(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await asyncio.create_task(response.prepare(request))
        await call(request, gateway)
        await response.write(b"chunk")
        return response

    app = pinned_server(gateway.url, on_late="raise")
    app.middlewares[:0] = middlewares
    app.router.add_post("/{session_id}/streams", streams)
    app.router.add_post("/{session_id}/prepares", prepares_elsewhere)
    client = await aiohttp_client(app)
    for path in ("streams", "prepares"):
        for session in ("s-1", "s-2"):
            async with client.post(f"/{session}/{path}") as response:
                assert await response.read() == b"chunk"
    assert_no_crosstalk(gateway, 4)
    assert said(caplog) == []
