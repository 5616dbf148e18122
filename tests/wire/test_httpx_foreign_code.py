"""Each call has one key, even if other code sends, copies, holds or replaces parts of httpx."""

import asyncio
import copy
import logging
import sys
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import httpx
import httpx2
import pytest
from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing import PinSummary, Routing, RoutingConfig, routing_session
from aiohttp_smg_routing.testing import Recorder

GATEWAY = "http://gateway:30000"
CHAT_URL = f"{GATEWAY}/v1/chat/completions"
MODULES = pytest.mark.parametrize("module", [httpx, httpx2], ids=["httpx", "httpx2"])


class Wire:
    """A transport that records the keys of each request, and gives the answers that a test sets.

    An answer is a status, the target of a redirect, or an error.
    """

    def __init__(self, module: ModuleType, *outcomes: int | str | Exception) -> None:
        self.module, self.outcomes = module, [*outcomes]
        self.keys: list[list[bytes]] = []
        self.requests: list[Any] = []

    def __call__(self, request: Any) -> Any:
        lines = request.headers.raw
        self.keys.append([value for name, value in lines if name.lower() == b"x-smg-routing-key"])
        self.requests.append(request)
        outcome = self.outcomes.pop(0) if self.outcomes else 200
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, str):
            return self.module.Response(307, headers={"Location": outcome})
        return self.module.Response(outcome)

    def client(self, **options: Any) -> Any:
        transport = self.module.MockTransport(self)
        return self.module.Client(transport=transport, follow_redirects=True, **options)


@contextmanager
def any_client(wire: Wire, routing: Routing, is_instrumented: bool) -> Iterator[Any]:
    """Make a client that has the hook in one way or the other."""
    if not is_instrumented:
        with wire.client(event_hooks=routing.httpx_hooks()) as client:
            yield client
        return
    with routing.instrument(), wire.client() as client:
        yield client


@pytest.fixture
def routing() -> Routing:
    return Routing(RoutingConfig(GATEWAY))


async def test_a_call_that_an_app_in_the_same_process_makes_carries_its_key(
    gateway: Recorder,
) -> None:
    routing, go_on = Routing(RoutingConfig(gateway.url)), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    with routing.instrument():
        session = ClientSession()
    async with session:

        async def turn() -> None:
            async with session.post(gateway.chat):
                pass

        async def later() -> None:
            await go_on.wait()
            await turn()

        async def app(request: httpx.Request) -> httpx.Response:
            tasks.append(asyncio.create_task(later()))
            await turn()
            return httpx.Response(200)

        transport = httpx.MockTransport(app)
        with routing.instrument():
            async with httpx.AsyncClient(transport=transport) as client:
                with routing_session("s-1"):
                    await client.post("http://in-process/turn")
            go_on.set()
            await asyncio.gather(*tasks)
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-1"]]
    assert routing.pins.summary() == PinSummary(unknown=2, sessions=1)


async def test_a_task_that_a_call_started_carries_its_key_on_the_same_url(
    gateway: Recorder,
) -> None:
    routing, go_on = Routing(RoutingConfig(gateway.url)), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def later() -> None:
        await go_on.wait()
        async with ClientSession() as session, session.post(gateway.chat):
            pass

    async def send(request: httpx.Request) -> httpx.Response:
        tasks.append(asyncio.create_task(later()))
        return httpx.Response(200)

    with routing.instrument():
        async with httpx.AsyncClient(transport=httpx.MockTransport(send)) as client:
            with routing_session("s-1"):
                await client.post(str(gateway.chat))
        go_on.set()
        await asyncio.gather(*tasks)
    assert gateway.last.keys == [b"s-1"]


@MODULES
@pytest.mark.parametrize("is_in_session", [False, True])
@pytest.mark.parametrize("kind", ["httpx", "aiohttp"])
async def test_a_call_that_is_made_while_a_call_to_the_same_url_yields_its_body_carries_its_key(
    gateway: Recorder, module: ModuleType, kind: str, is_in_session: bool
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument():
        async with module.AsyncClient() as client, ClientSession() as session:

            async def body() -> AsyncGenerator[bytes, None]:
                yield b"{"
                with ExitStack() if is_in_session else routing_session("s-1"):
                    if kind == "httpx":
                        await client.post(str(gateway.chat))
                    else:
                        async with session.post(gateway.chat):
                            pass
                yield b"}"

            with routing_session("s-1") if is_in_session else ExitStack():
                await client.post(str(gateway.chat), content=body())
    inner, outer = sorted(gateway.calls, key=lambda call: len(call.body))
    assert (inner.keys, outer.keys) == ([b"s-1"], [b"s-1"] if is_in_session else [])
    assert routing.pins.summary().unknown == 1 + is_in_session


@MODULES
@pytest.mark.parametrize(
    "copied",
    [
        {"X-SMG-Routing-Key": "s-1"},
        {"X-SMG-Routing-Key": "s-1", "X-SMG-Target-Worker": "0"},
    ],
)
@pytest.mark.parametrize("session_id", ["s-1", "judge"])
async def test_a_call_that_a_body_makes_with_the_headers_of_an_agent_carries_its_own_key(
    gateway: Recorder, module: ModuleType, session_id: str, copied: dict[str, str]
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument():
        async with module.AsyncClient() as client:

            async def body() -> AsyncGenerator[bytes, None]:
                yield b"{"
                with routing_session(session_id):
                    await client.post(str(gateway.chat), headers=copied)
                yield b"}"

            with routing_session("s-1"):
                await client.post(str(gateway.chat), content=body())
    inner, outer = sorted(gateway.calls, key=lambda call: len(call.body))
    assert (inner.keys, outer.keys) == ([session_id.encode()], [b"s-1"])
    assert inner.values("X-SMG-Target-Worker") == []


@MODULES
@pytest.mark.parametrize("is_copied", [False, True])
def test_a_transport_that_is_another_client_is_counted_once(
    module: ModuleType, routing: Routing, is_copied: bool
) -> None:
    wire = Wire(module)
    with routing.instrument(), wire.client() as inner:

        def pass_on(it: Any) -> Any:
            if is_copied:
                it = module.Request(it.method, it.url, headers=it.headers, content=it.read())
            return inner.send(it)

        with module.Client(transport=module.MockTransport(pass_on)) as client:
            with routing_session("s-1"):
                client.post(CHAT_URL)
            client.post(CHAT_URL)
    assert wire.keys == [[b"s-1"], []]
    assert routing.pins.summary() == PinSummary(unknown=1, untagged=1, missing=1, sessions=1)


@MODULES
async def test_a_transport_that_tries_twice_by_another_client_is_counted_once(
    module: ModuleType, routing: Routing
) -> None:
    wire = Wire(module, 503, 200, 503, 200)
    transport = module.MockTransport(wire)
    with routing.instrument(), module.Client(transport=transport) as inner:

        def tries(request: Any) -> Any:
            inner.send(request)
            return inner.send(request)

        with (
            module.Client(transport=module.MockTransport(tries)) as client,
            routing_session("s-1"),
        ):
            client.post(CHAT_URL)
        async with module.AsyncClient(transport=transport) as inner_async:

            async def tries_async(request: Any) -> Any:
                await inner_async.send(request)
                return await inner_async.send(request)

            async with module.AsyncClient(transport=module.MockTransport(tries_async)) as client:
                with routing_session("s-2"):
                    await client.post(CHAT_URL)
    assert wire.keys == [[b"s-1"], [b"s-1"], [b"s-2"], [b"s-2"]]
    assert routing.pins.summary() == PinSummary(unknown=2, sessions=2)


@MODULES
@pytest.mark.parametrize(
    "base",
    [
        *("http://[0:0:0:0:0:0:0:1]:30000", "http://[::FFFF:127.0.0.1]", "http://[FE80::1%25a]"),
        *("http://h/v1%2fx", "http://h/%7Eteam", "http://h/a[b]|^", "http://h//a", "http://h/%c3é"),
    ],
)
def test_a_gateway_is_the_same_in_each_spelling_that_httpx_keeps(
    module: ModuleType, base: str
) -> None:
    wire = Wire(module)
    with any_client(wire, Routing({"gateway": base}), True) as client, routing_session("s-1"):
        client.post(f"{base}/v1/chat/completions")
    assert wire.keys == [[b"s-1"]]


@pytest.mark.parametrize("is_encoded", [False, True])
async def test_a_transport_of_aiohttps_that_spells_the_url_in_its_way_is_counted_once(
    gateway: Recorder, is_encoded: bool
) -> None:
    async def send(request: httpx.Request) -> httpx.Response:
        url = URL(str(request.url), encoded=is_encoded)
        async with session.post(url, headers=request.headers.multi_items()) as response:
            return httpx.Response(response.status)

    base = f"{gateway.url}/%7Eteam"
    routing = Routing({"gateway": base})
    with routing.instrument():
        async with (
            ClientSession() as session,
            httpx.AsyncClient(transport=httpx.MockTransport(send)) as client,
        ):
            with routing_session("s-1"):
                await client.post(f"{base}/v1/chat/completions")
    assert gateway.last.keys == [b"s-1"]
    assert routing.pins.summary() == PinSummary(unknown=1, sessions=1)


@MODULES
@pytest.mark.parametrize("path", ["/x/%2e%2e", "/%2e", "/x%2f..", "//", "/v1%2F.."])
def test_a_path_that_names_another_resource_on_the_wire_carries_no_key(
    module: ModuleType, routing: Routing, path: str
) -> None:
    wire = Wire(module)
    with any_client(wire, routing, True) as client, routing_session("s-1"):
        client.post(f"{GATEWAY}{path}/v1/chat/completions")
    assert wire.keys == [[]]


# httpx takes it, and yarl does not.
UNREADABLE = r"http://tenant\box"


@MODULES
@pytest.mark.parametrize("is_instrumented", [False, True])
def test_a_url_that_yarl_cannot_read_leaves_as_without_the_plugin(
    module: ModuleType,
    routing: Routing,
    is_instrumented: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "aiohttp_smg_routing")  # the line about such a call too
    wire = Wire(module)
    with any_client(wire, routing, is_instrumented) as client, routing_session("s-1"):
        for method in ("GET", "POST"):
            client.request(method, f"{UNREADABLE}/v1/chat/completions", headers={"X-A": "1"})
    assert wire.keys == [[], []]


@MODULES
@pytest.mark.parametrize("is_instrumented", [False, True])
def test_the_key_does_not_follow_a_redirect_to_a_url_that_yarl_cannot_read(
    module: ModuleType, routing: Routing, is_instrumented: bool
) -> None:
    wire = Wire(module, f"{UNREADABLE}/v1/chat/completions")
    with any_client(wire, routing, is_instrumented) as client, routing_session("s-1"):
        client.post(CHAT_URL)
    assert wire.keys == [[b"s-1"], []]


@MODULES
def test_a_failure_is_counted_where_a_client_has_the_hooks_in_an_instrumented_process(
    module: ModuleType, routing: Routing
) -> None:
    wire = Wire(module, module.ConnectError("refused"))
    hooks = routing.httpx_hooks()
    with routing.instrument(), wire.client(event_hooks=hooks) as client, routing_session("s-1"):
        with pytest.raises(module.ConnectError):
            client.post(CHAT_URL)
        client.event_hooks = {"request": hooks["request"]}
        client.post(CHAT_URL)
    assert routing.pins.summary() == PinSummary(failed=1, unknown=1, sessions=1)


@MODULES
@pytest.mark.parametrize("is_instrumented", [False, True])
def test_a_request_that_failed_carries_the_key_of_the_session_that_sends_it_again(
    module: ModuleType, routing: Routing, is_instrumented: bool
) -> None:
    wire, request = Wire(module, module.ConnectError("refused")), module.Request("POST", CHAT_URL)
    with (
        wire.client(event_hooks=routing.httpx_hooks()) as client,
        routing_session("s-1"),
        pytest.raises(module.ConnectError),
    ):
        client.send(request)
    other = Routing(RoutingConfig(GATEWAY))
    hooks = {} if is_instrumented else other.httpx_hooks()
    with other.instrument(), wire.client(event_hooks=hooks) as client, routing_session("s-2"):
        client.send(request)
    assert wire.keys == [[b"s-1"], [b"s-2"]]


@MODULES
def test_a_subclass_in_the_place_of_the_client_leaves_no_client_out(
    module: ModuleType, routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire, original = Wire(module), module.Client
    earlier = type("Earlier", (original,), {})
    replaced = type("Replaced", (original,), {})
    before = original._send_single_request
    monkeypatch.setattr(module, "Client", replaced)
    with routing.instrument():
        for kind in (original, earlier, replaced):
            with (
                kind(transport=module.MockTransport(wire)) as client,
                routing_session("s-1"),
            ):
                client.post(CHAT_URL)
    assert wire.keys == [[b"s-1"]] * 3
    assert original._send_single_request is before
    assert "_send_single_request" not in vars(replaced)


@MODULES
def test_what_an_auth_flow_writes_on_headers_that_it_holds_is_sent(
    module: ModuleType, routing: Routing
) -> None:
    class Auth(module.Auth):  # type: ignore[misc, name-defined]
        def auth_flow(self, request: Any) -> Generator[Any, Any, None]:
            headers = request.headers
            yield request
            headers["X-Token"] = "new"
            yield request

    wire = Wire(module, 401)
    with routing.instrument(), wire.client(auth=Auth()) as client, routing_session("s-1"):
        client.post(CHAT_URL)
    assert wire.keys == [[b"s-1"], [b"s-1"]]
    assert wire.requests[-1].headers["X-Token"] == "new"


@MODULES
async def test_one_request_that_is_sent_in_two_sessions_at_once_carries_the_key_of_each(
    module: ModuleType, routing: Routing
) -> None:
    keys, go_on = [], asyncio.Event()

    async def tries(request: Any) -> Any:
        for _ in range(2):
            keys.append(request.headers["X-SMG-Routing-Key"])
            if keys[-1] == "s-2":
                go_on.set()
            await go_on.wait()
        return module.Response(200)

    request = module.Request("POST", CHAT_URL)
    with routing.instrument():
        async with module.AsyncClient(transport=module.MockTransport(tries)) as client:

            async def turn(session_id: str) -> None:
                with routing_session(session_id):
                    response = await client.send(request)
                assert response.request is request

            await asyncio.gather(turn("s-1"), turn("s-2"))
    assert sorted(keys[:2]) == sorted(keys[2:]) == ["s-1", "s-2"]


@MODULES
def test_a_key_never_stands_on_the_request_of_the_caller(
    module: ModuleType, routing: Routing
) -> None:
    wire, own = Wire(module), [("X-SMG-Routing-Key", "own"), ("X-SMG-Target-Worker", "1")]
    request = module.Request("POST", CHAT_URL, headers=own)
    before = request.headers.raw
    with routing.instrument(), wire.client() as client:
        with routing_session("s-1"):
            client.send(request)
            client.send(request)
        assert request.headers.raw == before
        client.send(request)
    assert wire.keys == [[b"s-1"], [b"s-1"], [b"own"]]


@MODULES
def test_an_error_names_the_request_of_the_caller(module: ModuleType, routing: Routing) -> None:
    class OtherError(Exception):
        request = "its own"

    wire = Wire(module, module.ConnectError("refused"), OtherError())
    request = module.Request("POST", CHAT_URL)
    with routing.instrument(), wire.client() as client, routing_session("s-1"):
        with pytest.raises(module.ConnectError) as refused:
            client.send(request)
        with pytest.raises(OtherError) as other:
            client.send(request)
    assert refused.value.request is request
    assert other.value.request == "its own"


@MODULES
def test_a_body_that_a_transport_has_read_follows_a_redirect(
    module: ModuleType, routing: Routing
) -> None:
    wire = Wire(module, CHAT_URL)
    with routing.instrument(), wire.client() as client, routing_session("s-1"):
        client.post(CHAT_URL, content=(part for part in [b"a", b"b"]))
    assert [request.content for request in wire.requests] == [b"ab", b"ab"]


@MODULES
def test_the_hook_takes_no_header_off_a_request_that_others_may_send_now(
    module: ModuleType, routing: Routing
) -> None:
    seen = []

    class Headers(module.Headers):  # type: ignore[misc, name-defined]
        def update(self, headers: Any = None) -> None:
            seen.append("Host" in self)
            super().update(headers)

    request = module.Request("POST", CHAT_URL)
    request.headers = Headers(request.headers)
    with any_client(Wire(module), routing, False) as client, routing_session("s-1"):
        client.send(request)
    assert seen == [True]


@MODULES
def test_a_transport_finds_the_extensions_of_the_caller(
    module: ModuleType, routing: Routing
) -> None:
    found = []

    def send(request: Any) -> Any:
        found.append(copy.deepcopy(request.extensions))
        return module.Response(200)

    with module.Client(transport=module.MockTransport(send)) as client, routing_session("s-1"):
        client.post(CHAT_URL)
        with routing.instrument():
            client.post(CHAT_URL)
    assert found[0] == found[1]


@MODULES
@pytest.mark.parametrize("is_instrumented", [False, True])
def test_the_extensions_of_one_request_may_serve_another(
    module: ModuleType,
    routing: Routing,
    is_instrumented: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wire, request = Wire(module), module.Request("POST", CHAT_URL)
    extensions = request.extensions
    hooks = {} if is_instrumented else routing.httpx_hooks()
    with ExitStack() as stack:
        if is_instrumented:
            stack.enter_context(routing.instrument())
        client = stack.enter_context(wire.client(event_hooks=hooks))
        with routing_session("s-1"):
            client.send(request)
            other = module.Request("POST", "http://other/", headers={"X-SMG-Routing-Key": "own"})
            other.extensions = extensions
            client.send(other)
    assert wire.keys == [[b"s-1"], [b"own"]]
    assert "redirected" not in caplog.text


def test_a_module_that_may_not_be_imported_is_no_warning(
    routing: Routing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with routing.instrument():
        pass
    assert caplog.records == []
