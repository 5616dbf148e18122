"""The client middleware in the ledger, beside the hook; its contract on the wire is test_hook's."""

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientError, ClientSession, web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    PINS,
    ConfigError,
    PinLedger,
    PinSummary,
    RoutingConfig,
    routing_client_middleware,
    routing_session,
    routing_trace_config,
    setup,
)
from aiohttp_smg_routing.testing import Call, Recorder, answer, completion, redirect

WORKER = "http://10.0.0.1:8000"
NAMED = completion(worker=WORKER)

HAS_CLIENT_MIDDLEWARES = hasattr(aiohttp, "ClientMiddlewareType")
needs_client_middlewares = pytest.mark.skipif(
    not HAS_CLIENT_MIDDLEWARES, reason="aiohttp has client middlewares from 3.12 on"
)


def client_session(config: RoutingConfig, pins: PinLedger | None, **more: Any) -> ClientSession:
    middlewares: Any = {"middlewares": [routing_client_middleware(config, pins)]}
    return ClientSession(**middlewares, **more)


@needs_client_middlewares
async def test_each_call_is_entered_by_its_outcome(gateway: Recorder, elsewhere: Recorder) -> None:
    config = RoutingConfig(gateway.url)
    pins = PinLedger(config)
    gateway.answer = lambda call: NAMED
    async with client_session(config, pins) as session:
        async with session.post(gateway.chat), session.post(elsewhere.chat):
            pass  # no session in the first, no gateway in the second
        with routing_session("s-1"):
            for _ in range(3):
                async with session.post(gateway.chat):
                    pass
            gateway.answer = lambda call: answer(status=500)
            async with session.post(gateway.chat):
                pass
            gateway.answer = lambda call: b"garbage\r\n\r\n"
            with pytest.raises(ClientError):
                await session.post(gateway.chat)
    assert pins.summary() == PinSummary(first=1, kept=2, untagged=1, failed=2, sessions=1)
    assert pins.sessions()["s-1"].worker == WORKER


@needs_client_middlewares
async def test_a_cancelled_call_counts_as_failed(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url)
    pins = PinLedger(config)
    received = asyncio.Event()

    def never(call: Call) -> bytes:
        received.set()
        return b""

    gateway.answer = never
    async with client_session(config, pins) as session:
        with routing_session("s-1"):
            call = asyncio.create_task(session.post(gateway.chat))
            await received.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
    assert pins.summary() == PinSummary(failed=1)


@needs_client_middlewares
@pytest.mark.parametrize("header", [b"Location", b"uri"])
async def test_a_redirected_call_is_entered_once_and_only_if_the_gateway_answers(
    gateway: Recorder, elsewhere: Recorder, header: bytes
) -> None:
    config = RoutingConfig(gateway.url)
    pins = PinLedger(config)
    again = redirect("?again").replace(b"Location", header)
    async with client_session(config, pins) as session:
        with routing_session("s-1"):
            gateway.answer = lambda call: NAMED if b"?" in call.start_line else again
            async with session.post(gateway.chat):
                pass
            gateway.answer = lambda call: redirect(elsewhere.chat)
            async with session.post(gateway.chat):
                pass
    assert pins.summary() == PinSummary(first=1, sessions=1)


@needs_client_middlewares
async def test_a_call_within_a_request_is_entered_in_the_apps_ledger(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    config = RoutingConfig(gateway.url)
    others, app = PinLedger(config), web.Application()
    gateway.answer = lambda call: NAMED
    async with client_session(config, others) as session:

        async def handler(request: web.Request) -> web.Response:
            async with session.post(gateway.chat) as response:
                return web.Response(status=response.status)

        app.router.add_post("/{session_id}", handler)
        setup(app, config)
        client = await aiohttp_client(app)
        async with client.post("/s-1") as response:
            assert response.status == 200
    assert gateway.last.keys == [b"s-1"]
    assert app[PINS].summary() == PinSummary(first=1, sessions=1)
    assert others.summary() == PinSummary()


@needs_client_middlewares
async def test_where_a_session_has_the_hook_too_the_hook_has_the_call(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url)
    pins, others = PinLedger(config), PinLedger(config)
    hook = routing_trace_config(config, pins)
    async with client_session(config, others, trace_configs=[hook]) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
    assert gateway.last.keys == [b"s-1"]
    assert (pins.summary().unknown, others.summary().unknown) == (1, 0)


@needs_client_middlewares
async def test_middlewares_of_one_call_replace_it_and_not_the_hook(gateway: Recorder) -> None:
    """What the docs say of which to choose: a fact about aiohttp."""
    config = RoutingConfig(gateway.url)
    none: Any = {"middlewares": ()}
    hook = routing_trace_config(config)
    with routing_session("s-1"):
        async with client_session(config, None) as session, session.post(gateway.chat, **none):
            pass
        assert gateway.last.keys == []
        async with (
            ClientSession(trace_configs=[hook]) as session,
            session.post(gateway.chat, **none),
        ):
            pass
        assert gateway.last.keys == [b"s-1"]


@needs_client_middlewares
async def test_each_attempt_of_a_retrying_middleware_carries_the_key(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url)
    pins = PinLedger(config)
    answers = iter((answer(status=503), NAMED))
    gateway.answer = lambda call: next(answers)

    async def retry(request: Any, handler: Any) -> Any:
        response = await handler(request)
        return response if response.ok else await handler(request)

    middlewares: Any = {"middlewares": [retry, routing_client_middleware(config, pins)]}
    async with ClientSession(**middlewares) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat) as response:
                assert response.status == 200
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-1"]]
    assert pins.summary() == PinSummary(first=1, failed=1, sessions=1)


def test_a_wrong_config_is_a_config_error_at_once() -> None:
    if HAS_CLIENT_MIDDLEWARES:
        with pytest.raises(ConfigError, match="gateway"):
            routing_client_middleware({"gateway": "nonsense"})


def test_an_aiohttp_without_client_middlewares_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(aiohttp, "ClientMiddlewareType", raising=False)
    with pytest.raises(RuntimeError, match=r"aiohttp 3\.12 or newer.*routing_trace_config"):
        routing_client_middleware({"gateway": "http://g"})
