"""Every ClientSession of the process, whoever makes it, and none after it is undone."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientSession, TraceConfig, web
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    PINS,
    ROUTING_CONFIG,
    MissingSessionError,
    PinLedger,
    PinSummary,
    RoutingConfig,
    attach,
    instrument,
    routing_client_middleware,
    routing_session,
    routing_trace_config,
    setup,
)
from aiohttp_smg_routing.testing import Recorder

PLAIN = ClientSession.__init__


@pytest.fixture(autouse=True)
def _pristine() -> Iterator[None]:
    yield
    assert ClientSession.__init__ is PLAIN


async def post(
    session: ClientSession, wire: Recorder, session_id: str | None = "s-1"
) -> list[bytes]:
    """Call the gateway in a session; return the keys that arrived."""
    with routing_session(session_id):
        async with session.post(wire.chat):
            return wire.last.keys


async def test_every_session_carries_the_hook_until_it_is_undone(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url)
    async with ClientSession() as before:
        undo = instrument(config)
        async with ClientSession() as during:
            assert await post(before, gateway) == []
            assert await post(during, gateway) == [b"s-1"]
            undo()
            assert await post(during, gateway) == []
        undo()  # a second time it changes nothing
        async with ClientSession() as after:
            assert await post(after, gateway) == []
            assert after.trace_configs == []


@pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
async def test_subclasses_and_sessions_that_aiohttp_makes_itself_are_among_them(
    gateway: Recorder,
) -> None:
    class Session(ClientSession):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(headers={"X-Own": "1"}, **kwargs)

    undo = instrument({"gateway": str(gateway.url)})
    try:
        async with Session() as session:
            assert await post(session, gateway) == [b"s-1"]
            assert gateway.last.values("X-Own") == [b"1"]
        with routing_session("s-2"):
            async with aiohttp.request("POST", gateway.chat):
                assert gateway.last.keys == [b"s-2"]
    finally:
        undo()


async def test_other_traffic_leaves_byte_for_byte_as_without_it(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    async def sent(session: ClientSession) -> list[object]:
        calls: list[object] = []
        with routing_session("s-1"):
            for method, url in (
                ("POST", elsewhere.chat),
                ("GET", gateway.chat),
                ("POST", gateway.url / "v1/embeddings"),
            ):
                async with session.request(method, url, headers={"X-SMG-Target-Worker": "1"}):
                    pass
        async with session.post(gateway.chat, headers={"X-SMG-Routing-Key": "own"}):
            pass
        for wire in (gateway, elsewhere):
            calls += wire.calls
            wire.calls.clear()
        return calls

    async with ClientSession() as plain:
        without = await sent(plain)
    undo = instrument({"gateway": str(gateway.url)})
    try:
        async with ClientSession() as session:
            assert await sent(session) == without
    finally:
        undo()


async def test_a_session_that_has_the_hook_is_tagged_and_counted_once(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url)
    pins = PinLedger(config)
    undo = instrument(config, pins)
    try:
        hook = routing_trace_config(config, pins)
        async with ClientSession(trace_configs=[hook]) as made, ClientSession() as attached:
            attach(attached, config, pins)
            for session in (made, attached):
                assert await post(session, gateway) == [b"s-1"]
    finally:
        undo()
    assert pins.summary() == PinSummary(unknown=2, sessions=1)


async def test_a_hook_that_was_attached_meanwhile_stays_when_it_is_undone(
    gateway: Recorder,
) -> None:
    config = RoutingConfig(gateway.url)
    undo = instrument(config)
    async with ClientSession() as session:
        attach(session, config)
        undo()
        assert await post(session, gateway) == [b"s-1"]


async def test_several_gateways_side_by_side_and_one_is_undone(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    one = instrument(RoutingConfig(gateway.url))
    async with ClientSession() as kept:  # a library may keep one for the whole process
        other = instrument(RoutingConfig(elsewhere.url, header="X-Pin", prefix="job-7/"))
        async with ClientSession() as session:
            for each in (kept, session):
                assert len(each.trace_configs) == 1
                assert await post(each, gateway) == [b"s-1"]
                assert await post(each, elsewhere) == []
                assert elsewhere.last.values("X-Pin") == [b"job-7/s-1"]
            one()
            for each in (kept, session):
                assert await post(each, gateway) == []
                await post(each, elsewhere)
                assert elsewhere.last.values("X-Pin") == [b"job-7/s-1"]
            other()


async def test_equal_configs_are_undone_one_by_one(gateway: Recorder) -> None:
    undo, undo_other = (instrument(RoutingConfig(gateway.url)) for _ in range(2))
    async with ClientSession() as session:
        undo()
        assert await post(session, gateway) == [b"s-1"]
        undo_other()


async def test_not_enabled_does_nothing(gateway: Recorder) -> None:
    undo = instrument(RoutingConfig(gateway.url, enabled=False))
    assert ClientSession.__init__ is PLAIN
    undo()


async def test_it_gets_along_with_others_that_wrap_the_constructor(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url)
    telemetry = AioHttpClientInstrumentor()
    undo = instrument(config)
    telemetry.instrument()
    async with ClientSession() as session:
        assert await post(session, gateway) == [b"s-1"]
        assert len(session.trace_configs) == 2
    undo()  # the other one's wrapper stands over ours, and stays
    async with ClientSession() as session:
        assert await post(session, gateway) == []
        assert len(session.trace_configs) == 1
    undo = instrument(config)
    async with ClientSession() as session:
        assert await post(session, gateway) == [b"s-1"]
        assert len(session.trace_configs) == 2
    telemetry.uninstrument()
    async with ClientSession() as session:
        assert await post(session, gateway) == [b"s-1"]
        assert len(session.trace_configs) == 1
    undo()


async def test_it_is_not_lost_where_another_one_takes_the_constructor_back_to_what_it_was(
    gateway: Recorder,
) -> None:
    config = RoutingConfig(gateway.url)
    undo = instrument(config)
    ClientSession.__init__ = PLAIN  # type: ignore[method-assign]
    undo_other = instrument(config)
    async with ClientSession() as session:
        assert await post(session, gateway) == [b"s-1"]
    undo()
    undo_other()


async def test_sessions_made_in_threads_are_among_them(gateway: Recorder) -> None:
    async def call() -> None:
        async with ClientSession() as session, session.post(gateway.chat):
            pass

    undo = instrument({"gateway": str(gateway.url)})
    with routing_session("s-1"):
        await asyncio.to_thread(asyncio.run, call())
    undo()
    assert gateway.last.keys == [b"s-1"]


def server(wire: Recorder, **config: Any) -> web.Application:
    """Return a server that makes a ClientSession for each call, and knows nothing of the plugin."""

    async def handler(request: web.Request) -> web.Response:
        async with ClientSession() as session, session.post(wire.chat):
            return web.Response()

    app = web.Application()
    app.router.add_post("/{session_id}", handler)
    setup(app, {"gateway": str(wire.url), "client_session": "all", **config})
    return app


@pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
async def test_a_session_that_is_odd_is_made_as_without_it(gateway: Recorder) -> None:
    class Odd(ClientSession):
        trace_configs = None  # type: ignore[assignment]

    class OddTraceConfig(TraceConfig):
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

        __hash__ = None  # type: ignore[assignment]

    undo = instrument(RoutingConfig(gateway.url))
    async with Odd(trace_configs=[OddTraceConfig()]) as session:
        assert await post(session, gateway) == [b"s-1"]
    undo()


@pytest.mark.skipif(not hasattr(aiohttp, "ClientMiddlewareType"), reason="aiohttp 3.12 and newer")
async def test_a_client_middleware_beside_it_leaves_the_call_to_it(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url)
    pins = PinLedger(config)
    undo = instrument(config, pins)
    async with ClientSession(middlewares=[routing_client_middleware(config, pins)]) as session:
        assert await post(session, gateway) == [b"s-1"]
    undo()
    assert pins.summary() == PinSummary(unknown=1, sessions=1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_apps_that_share_a_gateway_have_each_its_own_keys_also_in_a_block(
    gateway: Recorder, aiohttp_client: AiohttpClient, order: tuple[int, int]
) -> None:
    async def handler(request: web.Request) -> web.Response:
        with routing_session("sk-credential"):
            async with ClientSession() as session, session.post(gateway.chat):
                return web.Response()

    configs: list[dict[str, Any]] = [{"prefix": "job-a/"}, {"key": "digest", "secret": "k"}]
    apps = []
    for number in order:
        app = web.Application()
        app.router.add_post("/", handler)
        setup(app, {"gateway": str(gateway.url), "client_session": "all", **configs[number]})
        apps.append((app, await aiohttp_client(app)))
    for app, client in apps:
        async with client.post("/"):
            pass
        key = app[ROUTING_CONFIG].routing_key("sk-credential")
        assert gateway.last.keys == [key.encode()]
        assert list(app[PINS].sessions()) == [key]


@pytest.mark.parametrize("order", [("pass", "raise"), ("raise", "pass")])
async def test_a_call_outside_any_request_fails_only_where_all_ask_for_it(
    gateway: Recorder, order: tuple[Any, Any]
) -> None:
    undos = [instrument(RoutingConfig(gateway.url, on_missing=missing)) for missing in order]
    async with ClientSession() as session:
        assert await post(session, gateway, None) == []
        undos[order.index("pass")]()
        with pytest.raises(MissingSessionError):
            await post(session, gateway, None)
    for undo in undos:
        undo()


async def test_all_is_every_session_made_while_the_app_runs(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = server(gateway)
    client = await aiohttp_client(app)
    for session_id in ("s-1", "s-2", "s-1"):
        async with client.post(f"/{session_id}") as response:
            assert response.status == 200
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-2"], [b"s-1"]]
    assert app[PINS].summary() == PinSummary(unknown=3, sessions=2)
    await client.close()
    assert ClientSession.__init__ is PLAIN


async def test_all_reaches_what_the_app_makes_when_it_starts(gateway: Recorder) -> None:
    made: list[ClientSession] = []

    async def client(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as session:
            made.append(session)
            yield
            assert await post(session, gateway, "at-the-end") == [b"at-the-end"]

    app = web.Application()
    app.cleanup_ctx.append(client)
    setup(app, {"gateway": str(gateway.url), "client_session": "all"})
    runner = web.AppRunner(app)
    await runner.setup()
    assert await post(made[0], gateway) == [b"s-1"]
    await runner.cleanup()
    assert gateway.last.keys == [b"at-the-end"]


@pytest.mark.parametrize("client_session", ["all", "all, kept"])
async def test_all_reaches_what_apps_keep_before_they_start_once(
    gateway: Recorder, client_session: str
) -> None:
    async with ClientSession() as kept:
        runners = []
        for _ in range(2):
            app = web.Application()
            app[web.AppKey("kept", ClientSession)] = kept
            setup(app, {"gateway": str(gateway.url), "client_session": client_session})
            runners.append(web.AppRunner(app))
            await runners[-1].setup()
        assert await post(kept, gateway) == [b"s-1"]
        assert len(kept.trace_configs) == len(client_session.split())
        for runner in runners:
            await runner.cleanup()


async def test_all_of_an_app_that_is_never_started_changes_nothing(gateway: Recorder) -> None:
    server(gateway)
    assert ClientSession.__init__ is PLAIN
    async with ClientSession() as session:
        assert await post(session, gateway) == []


async def test_all_of_an_app_that_fails_to_start_is_undone(gateway: Recorder) -> None:
    async def fail(app: web.Application) -> None:
        raise ZeroDivisionError

    app = server(gateway)
    app.on_startup.append(fail)
    runner = web.AppRunner(app)
    with pytest.raises(ZeroDivisionError):
        await runner.setup()
    await runner.cleanup()
    assert ClientSession.__init__ is PLAIN


async def test_all_of_several_apps_side_by_side_and_undone_with_the_last(
    gateway: Recorder, elsewhere: Recorder, aiohttp_client: AiohttpClient
) -> None:
    clients = [
        await aiohttp_client(server(gateway)),
        await aiohttp_client(server(elsewhere, key="digest", secret="k")),
    ]
    for client in clients:
        async with client.post("/s-1"):
            pass
    assert gateway.last.keys == [b"s-1"]
    [key] = elsewhere.last.keys
    assert key.startswith(b"hmac-sha256-")
    await clients[0].close()
    async with clients[1].post("/s-1"):
        pass
    assert [call.keys for call in elsewhere.calls] == [[key], [key]]
    await clients[1].close()
    assert ClientSession.__init__ is PLAIN
