"""The outbound half for httpx and httpx2: the same contract on the wire as for aiohttp."""

import asyncio
import functools
import importlib.util
import logging
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import httpx2
import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    ROUTING,
    MissingSessionError,
    PinSummary,
    Routing,
    RoutingConfig,
    routing_session,
    setup,
)
from aiohttp_smg_routing.testing import Call, Recorder, answer, completion, failure, redirect
from harness.agents import CHAT_PATH

SMUGGLED = [
    ("x-smg-routing-key", ""),
    ("x-smg-routing-key", "evil"),
    ("X-Smg-Target-Worker", "1"),
]
MODULES = pytest.mark.parametrize("module", [httpx, httpx2], ids=["httpx", "httpx2"])

Send = Callable[..., Awaitable[Any]]


class Caller:
    """An httpx client, sync or async, with or without the hook."""

    def __init__(self, module: ModuleType, kind: str, how: str) -> None:
        self.module, self.kind, self.how = module, kind, how
        self._stack = ExitStack()
        self.routing: Routing

    def use(self, config: RoutingConfig) -> None:
        """Use the hook of a new routing for every client from now on."""
        self.routing = Routing(config)
        if self.how == "instrument":
            self._stack.enter_context(self.routing.instrument())

    def close(self) -> None:
        self._stack.close()

    async def __call__(self, method: str, url: object, **options: Any) -> Any:
        """Make a call with a new client that follows redirects."""
        own: dict[str, Any] = {
            name: options.pop(name) for name in ("auth", "base_url") if name in options
        }
        if self.how == "hooks":
            own["event_hooks"] = self.routing.httpx_hooks()
        own["follow_redirects"] = True
        if self.kind == "async":
            async with self.module.AsyncClient(**own) as client:
                return await client.request(method, str(url), **options)

        def call() -> Any:
            with self.module.Client(**own) as client:
                return client.request(method, str(url), **options)

        return await asyncio.to_thread(call)

    async def post(self, url: object, **options: Any) -> Any:
        return await self("POST", url, **options)


@pytest.fixture(params=["hooks", "instrument"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[(module, kind) for module in (httpx, httpx2) for kind in ("async", "sync")],
    ids=lambda it: f"{it[0].__name__}-{it[1]}",
)
def caller(request: pytest.FixtureRequest, how: str, gateway: Recorder) -> Iterator[Caller]:
    module, kind = request.param
    caller = Caller(module, kind, how)
    caller.use(RoutingConfig(gateway.url))
    yield caller
    caller.close()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"json": {"stream": True}},
        {"content": b"{}"},
        {"params": {"a": "b"}},
        {"headers": {"x-smg-routing-key": "evil"}},
        {"headers": {"X-SMG-Routing-Key": ""}},
        {"headers": SMUGGLED},
        {"headers": [(b"X-smg-routing-KEY", b"\xe9")]},
    ],
)
async def test_a_matching_call_carries_exactly_one_key(
    gateway: Recorder, caller: Caller, arguments: dict[str, Any]
) -> None:
    with routing_session("s-1"):
        await caller.post(gateway.chat, **arguments)
    assert gateway.last.keys == [b"s-1"]
    assert gateway.last.values("X-SMG-Target-Worker") == []


async def test_the_callers_other_headers_leave_as_they_are(
    gateway: Recorder, caller: Caller
) -> None:
    headers = [(b"X-One", b"\xe9"), (b"x-two", b"a"), (b"X-Two", b"b"), (b"Cookie", b"c=d")]
    with routing_session("s-1"):
        await caller.post(gateway.chat, headers=headers, json={})
    sent = gateway.last.header_lines
    await caller.post(gateway.chat, headers=headers, json={})
    assert sent == (*gateway.last.header_lines, b"X-SMG-Routing-Key: s-1")


async def test_connection_does_not_name_the_key_for_a_proxy_to_drop(
    gateway: Recorder, caller: Caller
) -> None:
    headers = {"Connection": "keep-alive, X-SMG-Routing-Key, x-a"}
    with routing_session("s-1"):
        await caller.post(gateway.chat, headers=headers)
    assert gateway.last.keys == [b"s-1"]
    assert gateway.last.values("Connection") == [b"keep-alive, x-a"]


UNTAGGED: dict[str, Callable[[Caller, Recorder, Recorder], Awaitable[Any]]] = {
    "another method": lambda call, wire, _: call("GET", wire.chat, headers=SMUGGLED),
    "another path": lambda call, wire, _: call.post(wire.url / "v1/models", headers=SMUGGLED),
    "another host": lambda call, _, other: call.post(other.chat, json={}, headers=SMUGGLED),
}


@pytest.mark.parametrize("call", UNTAGGED.values(), ids=UNTAGGED)
async def test_other_calls_leave_byte_for_byte_as_without_the_plugin(
    gateway: Recorder,
    elsewhere: Recorder,
    caller: Caller,
    call: Callable[[Caller, Recorder, Recorder], Awaitable[Any]],
) -> None:
    plain = Caller(caller.module, caller.kind, "plain")
    caller.close()  # the plain client must not have the hook
    seen = []
    for one in (plain, caller):
        if one is caller:
            caller.use(RoutingConfig(gateway.url))
        with routing_session("s-1"):
            await call(one, gateway, elsewhere)
        [sent] = [*gateway.calls, *elsewhere.calls]
        seen.append((sent.start_line, sent.header_lines, sent.body))
        gateway.calls.clear()
        elsewhere.calls.clear()
    assert seen[0] == seen[1]


async def test_a_call_without_a_session_leaves_as_it_is_and_is_counted(
    gateway: Recorder, caller: Caller
) -> None:
    await caller.post(gateway.chat, json={}, headers={"x-smg-routing-key": "mine"})
    assert gateway.last.keys == [b"mine"]
    assert caller.routing.pins.summary() == PinSummary(missing=1, untagged=1)


async def test_on_missing_raise_fails_the_call_before_it_leaves(
    gateway: Recorder, caller: Caller
) -> None:
    caller.close()
    caller.use(RoutingConfig(gateway.url, on_missing="raise"))
    with pytest.raises(MissingSessionError, match="has no session"):
        await caller.post(gateway.chat)
    assert gateway.calls == []
    await caller.post(gateway.url / "other")
    assert [call.path for call in gateway.calls] == ["/other"]


async def test_the_ledger_sees_where_each_call_went(gateway: Recorder, caller: Caller) -> None:
    workers = ["http://w:1", "http://w:1", "http://w:2", None]
    gateway.answer_with(*(completion(worker=worker) for worker in workers), failure(503))
    with routing_session("s-1"):
        for _ in range(5):
            await caller.post(gateway.chat, json={})
    assert [call.keys for call in gateway.calls] == [[b"s-1"]] * 5
    assert caller.routing.pins.summary() == PinSummary(
        first=1, kept=1, moved=1, unknown=1, failed=1, sessions=1
    )
    [pin] = caller.routing.pins.of("s-1")
    assert (pin.worker, pin.moves) == ("http://w:2", 1)


async def test_a_call_that_never_gets_an_answer_is_a_failure_where_httpx_shows_it(
    gateway: Recorder, caller: Caller
) -> None:
    gateway.answer_with(b"")
    with routing_session("s-1"), pytest.raises(caller.module.TransportError):
        await caller.post(gateway.chat, json={})
    assert caller.routing.pins.summary().failed == (caller.how == "instrument")


async def test_a_near_miss_is_counted_and_explained_once(
    gateway: Recorder, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aiohttp_smg_routing")
    with routing_session("s-1"):
        await caller.post(gateway.url / "chat/completions")
    assert caller.routing.pins.summary() == PinSummary(unmatched=1)
    lines = [it.getMessage() for it in caplog.records if "without a key" in it.getMessage()]
    assert len(lines) == 1
    assert "/chat/completions" in lines[0]


# Redirects


async def test_the_key_follows_no_redirect_off_the_gateway(
    gateway: Recorder, elsewhere: Recorder, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.answer = lambda call: redirect(elsewhere.chat)
    with routing_session("s-1"):
        await caller.post(gateway.chat, json={}, headers=SMUGGLED)
    assert gateway.last.keys == [b"s-1"]
    assert elsewhere.last.keys == []
    assert elsewhere.last.values("X-SMG-Target-Worker") == []
    assert "is redirected, and the key does not follow: " in caplog.text


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_the_key_follows_no_redirect_that_makes_a_get_of_the_call(
    gateway: Recorder, caller: Caller, status: int
) -> None:
    gateway.answer = lambda call: (
        answer() if call.method == "GET" else redirect(gateway.chat, status)
    )
    with routing_session("s-1"):
        await caller.post(gateway.chat, json={})
    assert [(call.method, call.keys) for call in gateway.calls] == [
        ("POST", [b"s-1"]),
        ("GET", []),
    ]


async def test_the_key_is_there_again_when_a_redirect_comes_back(
    gateway: Recorder, elsewhere: Recorder, caller: Caller
) -> None:
    def from_the_gateway(call: Call) -> bytes:
        return answer() if b"?" in call.start_line else redirect(elsewhere.url / "a")

    gateway.answer = from_the_gateway
    elsewhere.answer = lambda call: redirect(gateway.chat.with_query("again"))
    with routing_session("s-1"):
        await caller.post(gateway.chat, json={})
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-1"]]
    assert [call.keys for call in elsewhere.calls] == [[]]
    # The other server is on the gateway's host, so a call to it is a near miss.
    assert caller.routing.pins.summary() == PinSummary(unknown=2, unmatched=1, sessions=1)


# Several routings: one tags a call, and it counts once


async def test_each_try_of_an_auth_flow_carries_the_key(gateway: Recorder, caller: Caller) -> None:
    challenge = answer(status=401, headers={"WWW-Authenticate": 'Digest realm="r", nonce="n"'})
    gateway.answer_with(challenge, completion(worker="http://w:1"))
    with routing_session("s-1"):
        await caller.post(gateway.chat, json={}, auth=caller.module.DigestAuth("u", "p"))
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-1"]]
    assert caller.routing.pins.summary() == PinSummary(first=1, failed=1, sessions=1)


@MODULES
async def test_a_client_with_the_hooks_in_an_instrumented_process_is_counted_once(
    gateway: Recorder, module: ModuleType
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument():
        async with module.AsyncClient(event_hooks=routing.httpx_hooks()) as client:
            with routing_session("s-1"):
                for path in (CHAT_PATH, "/chat/completions"):
                    await client.post(f"{gateway.url}{path}")
    assert routing.pins.summary() == PinSummary(unknown=1, unmatched=1, sessions=1)


async def test_a_transport_of_aiohttps_is_counted_once(gateway: Recorder) -> None:
    openai = pytest.importorskip("openai")
    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument():
        async with openai.DefaultAioHttpClient() as client:
            with routing_session("s-1"):
                for path in (CHAT_PATH, "/chat/completions"):
                    await client.post(f"{gateway.url}{path}", headers=SMUGGLED)
    assert gateway.calls[0].keys == [b"s-1"]
    assert routing.pins.summary() == PinSummary(unknown=1, unmatched=1, sessions=1)


@MODULES
async def test_instrument_holds_where_a_caller_assigns_event_hooks(
    gateway: Recorder, module: ModuleType
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    async with module.AsyncClient() as made_before:
        with routing.instrument():
            async with module.AsyncClient() as client:
                with routing_session("s-1"):
                    for it in (client, made_before):
                        it.event_hooks = {}
                        await it.post(str(gateway.chat))
        with routing_session("s-1"):
            await made_before.post(str(gateway.chat))
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-1"], []]


@MODULES
def test_nothing_stays_when_the_last_routing_lets_go(gateway: Recorder, module: ModuleType) -> None:
    before = [vars(it)["_send_single_request"] for it in (module.Client, module.AsyncClient)]
    one, other = (Routing(RoutingConfig(gateway.url)) for _ in range(2))
    with one.instrument():
        with other.instrument():
            pass
        during = [vars(it)["_send_single_request"] for it in (module.Client, module.AsyncClient)]
    after = [vars(it)["_send_single_request"] for it in (module.Client, module.AsyncClient)]
    assert during != before
    assert after == before


@MODULES
async def test_a_wrapper_that_others_put_around_ours_stays_and_does_nothing_more(
    gateway: Recorder, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends = "_send_single_request"
    monkeypatch.setattr(module.AsyncClient, sends, vars(module.AsyncClient)[sends])
    with Routing(RoutingConfig(gateway.url)).instrument():
        ours = vars(module.AsyncClient)[sends]
        theirs = functools.wraps(ours)(lambda self, request: ours(self, request))
        setattr(module.AsyncClient, sends, theirs)
    assert vars(module.AsyncClient)[sends] is theirs
    async with module.AsyncClient() as client:
        with routing_session("s-1"):
            await client.post(str(gateway.chat))
            assert gateway.last.keys == []
            with Routing(RoutingConfig(gateway.url)).instrument():
                await client.post(str(gateway.chat))
                assert gateway.last.keys == [b"s-1"]


def test_a_process_without_httpx_has_nothing_to_reach(
    gateway: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("httpx", "httpx2"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with Routing(RoutingConfig(gateway.url)).instrument():
        assert not {"httpx", "httpx2"} & {*sys.modules}
    assert caplog.records == []


@MODULES
async def test_it_does_nothing_where_it_is_not_enabled(
    gateway: Recorder, module: ModuleType
) -> None:
    routing = Routing(RoutingConfig(gateway.url, enabled=False, on_missing="raise"))
    assert routing.httpx_hooks() == {"request": [], "response": []}
    with routing.instrument():
        async with module.AsyncClient(event_hooks=routing.httpx_hooks()) as client:
            await client.post(str(gateway.chat), headers={"x-smg-routing-key": "mine"})
    assert gateway.last.keys == [b"mine"]


def test_a_version_that_sends_otherwise_is_named(
    gateway: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = SimpleNamespace(__version__="9.0", Client=type("Client", (), {}), AsyncClient=int)
    monkeypatch.setitem(sys.modules, "httpx", other)
    with Routing(RoutingConfig(gateway.url)).instrument():
        pass
    [line] = [record.getMessage() for record in caplog.records]
    assert "does not reach the clients of httpx 9.0" in line
    assert "event_hooks=routing.httpx_hooks()" in line


@MODULES
async def test_a_response_hook_alone_counts_nothing(gateway: Recorder, module: ModuleType) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    hooks = {"response": routing.httpx_hooks()["response"]}
    async with module.AsyncClient(event_hooks=hooks) as client:
        with routing_session("s-1"):
            assert (await client.post(str(gateway.chat))).status_code == 200
    assert (gateway.last.keys, routing.pins.summary()) == ([], PinSummary())


@MODULES
async def test_a_transport_that_is_another_client_is_counted_once(
    gateway: Recorder, module: ModuleType
) -> None:
    class Through(module.AsyncBaseTransport):  # type: ignore[misc,name-defined]
        async def handle_async_request(self, request: Any) -> Any:
            return await inner.send(request, stream=True)

    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument():
        async with module.AsyncClient() as inner, module.AsyncClient(transport=Through()) as client:
            with routing_session("s-1"):
                await client.post(str(gateway.chat))
    assert [call.keys for call in gateway.calls] == [[b"s-1"]]
    assert routing.pins.summary() == PinSummary(unknown=1, sessions=1)


# In a server


@MODULES
@pytest.mark.parametrize("stream", [False, True])
async def test_a_session_server_that_calls_by_httpx_pins_its_sessions(
    gateway: Recorder, aiohttp_client: AiohttpClient, module: ModuleType, stream: bool
) -> None:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(module.AsyncClient())

        async def handler(request: web.Request) -> web.StreamResponse:
            async with client.stream("POST", str(gateway.chat), json={"stream": stream}) as got:
                response = web.StreamResponse()
                await response.prepare(request)
                async for chunk in got.aiter_bytes():
                    await response.write(chunk)
                return response

        app = web.Application()
        app.router.add_post("/{session_id}", handler)
        setup(app, {"gateway": str(gateway.url), "instrument": True})
        agent = await aiohttp_client(app)

        async def play(session_id: str) -> None:
            for _ in range(3):
                async with agent.post(f"/{session_id}", json={}) as response:
                    assert response.status == 200
                    await response.read()

        await asyncio.gather(*(play(f"s-{number}") for number in range(8)))
    for number in range(8):
        gateway.assert_pinned(f"s-{number}", turns=3)
    assert app[ROUTING].pins.summary() == PinSummary(unknown=24, sessions=8)


@MODULES
async def test_a_call_that_is_cancelled_is_a_failure(gateway: Recorder, module: ModuleType) -> None:
    routing, arrived = Routing(RoutingConfig(gateway.url)), asyncio.Event()

    async def never(call: Call) -> AsyncGenerator[bytes, None]:
        arrived.set()
        await asyncio.Event().wait()
        yield b""

    gateway.answer = never
    with routing.instrument():
        async with module.AsyncClient() as client:
            with routing_session("s-1"):
                task = asyncio.create_task(client.post(str(gateway.chat)))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert routing.pins.summary() == PinSummary(failed=1)
