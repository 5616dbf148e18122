"""``instrument()`` covers every ClientSession of the process, and none once it is undone."""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import BaseConnector, ClientSession, TCPConnector, TraceConfig, web
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from pytest_aiohttp.plugin import AiohttpClient

import aiohttp_smg_routing
from aiohttp_smg_routing import (
    ROUTING,
    MissingSessionError,
    PinSummary,
    Routing,
    RoutingConfig,
    routing_session,
    setup,
)
from aiohttp_smg_routing.testing import Recorder

from ..crosstalk import anew
from ..turns import keys

PLAIN = ClientSession.__init__

PACKAGE = str(Path(aiohttp_smg_routing.__file__).parent)


@pytest.fixture(autouse=True)
def _pristine() -> Iterator[None]:
    yield
    assert ClientSession.__init__ is PLAIN


async def test_every_session_carries_the_hook_until_it_is_undone(gateway: Recorder) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    async with ClientSession() as before:
        with routing.instrument() as undo:
            async with ClientSession() as during:
                assert await keys(before, gateway) == []
                assert await keys(during, gateway) == [b"s-1"]
                undo.close()
                assert await keys(during, gateway) == []
        # The end of the block changes nothing more.
        async with ClientSession() as after:
            assert await keys(after, gateway) == []
            assert after.trace_configs == []


async def test_it_is_in_force_before_a_block_begins_and_after_an_error_it_is_not(
    gateway: Recorder,
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    undo = routing.instrument()
    async with ClientSession() as session:
        assert await keys(session, gateway) == [b"s-1"]
        with pytest.raises(KeyError), undo:
            raise KeyError
        assert await keys(session, gateway) == []


@pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
async def test_subclasses_and_sessions_that_aiohttp_makes_itself_are_among_them(
    gateway: Recorder,
) -> None:
    class Session(ClientSession):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(headers={"X-Own": "1"}, **kwargs)

    with Routing({"gateway": str(gateway.url)}).instrument():
        async with Session() as session:
            assert await keys(session, gateway) == [b"s-1"]
            assert gateway.last.values("X-Own") == [b"1"]
        with routing_session("s-2"):
            async with aiohttp.request("POST", gateway.chat):
                assert gateway.last.keys == [b"s-2"]


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
    with Routing({"gateway": str(gateway.url)}).instrument():
        async with ClientSession() as session:
            assert await sent(session) == without


async def test_a_session_that_has_the_hook_is_tagged_and_counted_once(gateway: Recorder) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument():
        hook = routing.trace_config()
        async with ClientSession(trace_configs=[hook]) as made, ClientSession() as attached:
            routing.attach(attached)
            for session in (made, attached):
                assert await keys(session, gateway) == [b"s-1"]
    assert routing.pins.summary() == PinSummary(unknown=2, sessions=1)


async def test_a_hook_that_was_attached_meanwhile_stays_when_it_is_undone(
    gateway: Recorder,
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument() as undo:
        async with ClientSession() as session:
            routing.attach(session)
            undo.close()
            assert await keys(session, gateway) == [b"s-1"]


async def test_several_gateways_side_by_side_and_one_is_undone(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    one = Routing(RoutingConfig(gateway.url)).instrument()
    async with ClientSession() as kept:  # as a library may keep one for the whole process
        config = RoutingConfig(elsewhere.url, header="X-Pin", prefix="job-7/")
        with one, Routing(config).instrument():
            async with ClientSession() as session:
                for each in (kept, session):
                    assert len(each.trace_configs) == 1
                    assert await keys(each, gateway) == [b"s-1"]
                    assert await keys(each, elsewhere) == []
                    assert elsewhere.last.values("X-Pin") == [b"job-7/s-1"]
                one.close()
                for each in (kept, session):
                    assert await keys(each, gateway) == []
                    await keys(each, elsewhere)
                    assert elsewhere.last.values("X-Pin") == [b"job-7/s-1"]


@pytest.mark.parametrize("undone", [0, 1])
async def test_equal_routings_are_undone_one_by_one(gateway: Recorder, undone: int) -> None:
    routings = [Routing(RoutingConfig(gateway.url)) for _ in range(2)]
    blocks = [routing.instrument() for routing in routings]
    async with ClientSession() as session:
        blocks[undone].close()
        assert await keys(session, gateway) == [b"s-1"]
        # The call counts in the remaining routing only.
        assert routings[1 - undone].pins.summary() == PinSummary(unknown=1, sessions=1)
        assert routings[undone].pins.summary() == PinSummary()
        blocks[1 - undone].close()
        assert await keys(session, gateway) == []


async def test_a_routing_that_is_in_force_twice_is_undone_twice(gateway: Recorder) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument() as outer:
        async with ClientSession() as session:
            with routing.instrument():
                assert await keys(session, gateway) == [b"s-1"]
            assert await keys(session, gateway) == [b"s-1"]
            assert routing.pins.summary() == PinSummary(unknown=2, sessions=1)
            outer.close()
            assert await keys(session, gateway) == []


async def test_not_enabled_does_nothing(gateway: Recorder) -> None:
    with Routing(RoutingConfig(gateway.url, enabled=False)).instrument():
        assert ClientSession.__init__ is PLAIN


async def test_it_gets_along_with_others_that_wrap_the_constructor(gateway: Recorder) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    telemetry = AioHttpClientInstrumentor()
    undo = routing.instrument()
    telemetry.instrument()
    async with ClientSession() as session:
        assert await keys(session, gateway) == [b"s-1"]
        assert len(session.trace_configs) == 2
    undo.close()  # telemetry's wrapper around ours stays
    async with ClientSession() as session:
        assert await keys(session, gateway) == []
        assert len(session.trace_configs) == 1
    with routing.instrument():
        async with ClientSession() as session:
            assert await keys(session, gateway) == [b"s-1"]
            assert len(session.trace_configs) == 2
        telemetry.uninstrument()
        async with ClientSession() as session:
            assert await keys(session, gateway) == [b"s-1"]
            assert len(session.trace_configs) == 1


async def test_it_is_not_lost_where_another_one_takes_the_constructor_back_to_what_it_was(
    gateway: Recorder,
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument():
        ClientSession.__init__ = PLAIN  # type: ignore[method-assign]
        with routing.instrument():
            async with ClientSession() as session:
                assert await keys(session, gateway) == [b"s-1"]


async def test_sessions_made_in_threads_are_among_them(gateway: Recorder) -> None:
    async def call() -> None:
        async with ClientSession() as session, session.post(gateway.chat):
            pass

    with Routing({"gateway": str(gateway.url)}).instrument(), routing_session("s-1"):
        await asyncio.to_thread(asyncio.run, call())
    assert gateway.last.keys == [b"s-1"]


def server(wire: Recorder, **config: Any) -> web.Application:
    """Return a server without the plugin that makes a ClientSession for each call."""
    app = web.Application()
    app.router.add_post("/{session_id}", anew(wire.chat))
    setup(app, {"gateway": str(wire.url), "instrument": True, **config})
    return app


@pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
async def test_a_session_that_is_odd_is_made_as_without_it(gateway: Recorder) -> None:
    class Odd(ClientSession):
        trace_configs = None  # type: ignore[assignment]

    class OddTraceConfig(TraceConfig):
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

        __hash__ = None  # type: ignore[assignment]

    with Routing(RoutingConfig(gateway.url)).instrument():
        async with Odd(trace_configs=[OddTraceConfig()]) as session:
            assert await keys(session, gateway) == [b"s-1"]


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
        setup(app, {"gateway": str(gateway.url), "instrument": True, **configs[number]})
        apps.append((app, await aiohttp_client(app)))
    for app, client in apps:
        async with client.post("/"):
            pass
        key = app[ROUTING].config.routing_key("sk-credential")
        assert gateway.last.keys == [key.encode()]
        assert [pin.key for pin in app[ROUTING].pins.sessions()] == [key]


@pytest.mark.parametrize("order", [("pass", "raise"), ("raise", "pass")])
async def test_a_call_outside_any_request_fails_only_where_all_ask_for_it(
    gateway: Recorder, order: tuple[Any, Any]
) -> None:
    configs = [RoutingConfig(gateway.url, on_missing=missing) for missing in order]
    with Routing(configs[0]).instrument() as first, Routing(configs[1]).instrument() as second:
        async with ClientSession() as session:
            assert await keys(session, gateway, None) == []
            (first, second)[order.index("pass")].close()
            with pytest.raises(MissingSessionError):
                await keys(session, gateway, None)


async def test_every_session_that_is_made_while_the_app_runs(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = server(gateway)
    client = await aiohttp_client(app)
    for session_id in ("s-1", "s-2", "s-1"):
        async with client.post(f"/{session_id}") as response:
            assert response.status == 200
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-2"], [b"s-1"]]
    assert app[ROUTING].pins.summary() == PinSummary(unknown=3, sessions=2)
    await client.close()
    assert ClientSession.__init__ is PLAIN


async def test_it_reaches_what_the_app_makes_when_it_starts(gateway: Recorder) -> None:
    made: list[ClientSession] = []

    async def client(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as session:
            made.append(session)
            yield
            assert await keys(session, gateway, "at-the-end") == [b"at-the-end"]

    app = web.Application()
    app.cleanup_ctx.append(client)
    setup(app, {"gateway": str(gateway.url), "instrument": True})
    runner = web.AppRunner(app)
    await runner.setup()
    assert await keys(made[0], gateway) == [b"s-1"]
    await runner.cleanup()
    assert gateway.last.keys == [b"at-the-end"]


@pytest.mark.parametrize("client_session", [(), "kept"])
async def test_it_reaches_what_apps_keep_before_they_start_once(
    gateway: Recorder, client_session: Any
) -> None:
    async with ClientSession() as kept:
        runners = []
        for _ in range(2):
            app = web.Application()
            app[web.AppKey("kept", ClientSession)] = kept
            setup(
                app,
                RoutingConfig(gateway.url, instrument=True, client_session=client_session),
            )
            runners.append(web.AppRunner(app))
            await runners[-1].setup()
        assert await keys(kept, gateway) == [b"s-1"]
        # The process has one hook, and so has each app that names the ClientSession.
        assert len(kept.trace_configs) == (3 if client_session else 1)
        for runner in runners:
            await runner.cleanup()
        assert await keys(kept, gateway) == []


async def test_instrument_of_an_app_that_is_never_started_changes_nothing(
    gateway: Recorder,
) -> None:
    server(gateway)
    assert ClientSession.__init__ is PLAIN
    async with ClientSession() as session:
        assert await keys(session, gateway) == []


async def test_instrument_of_an_app_that_fails_to_start_is_undone(gateway: Recorder) -> None:
    async def fail(app: web.Application) -> None:
        raise ZeroDivisionError

    app = server(gateway)
    app.on_startup.append(fail)
    runner = web.AppRunner(app)
    with pytest.raises(ZeroDivisionError):
        await runner.setup()
    await runner.cleanup()
    assert ClientSession.__init__ is PLAIN


async def test_instrument_of_several_apps_side_by_side_and_undone_with_the_last(
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


class Interruption:
    """Calls ``do`` once, when this thread reaches a given step of the core's code.

    A step is a line, or in ``client.py`` a bytecode instruction. Another thread could run at each
    of these points.
    """

    def __init__(self, step: int, do: Callable[[], object]) -> None:
        self._left = step
        self._do = do
        self.has_come = False

    def __enter__(self) -> "Interruption":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if self.has_come or not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = frame.f_code.co_filename.endswith("client.py")
        if event in ("line", "opcode"):
            if self._left == 0:
                self.has_come = True
                sys.settrace(None)
                self._do()
                return None
            self._left -= 1
        return self._trace


class Trial(NamedTuple):
    """Work, an action of another thread meanwhile, and a check after both."""

    work: Callable[[BaseConnector], Awaitable[None]]
    do: Callable[[], object]
    check: Callable[[], Awaitable[None]]


async def at_each_step(begin: Callable[[], Trial]) -> int:
    """Interrupt a piece of work at each of its steps in turn; return the number of steps.

    It runs in a thread of its own, because coverage traces this one.
    """

    async def has_steps_beyond(step: int, connector: BaseConnector) -> bool:
        trial = begin()
        with Interruption(step, trial.do) as interruption:
            await trial.work(connector)
        await trial.check()
        return interruption.has_come

    async def count() -> int:
        steps = 0
        async with TCPConnector() as connector:  # all trials share its connections
            while await has_steps_beyond(steps, connector):
                steps += 1
        return steps

    return await asyncio.to_thread(asyncio.run, count())


async def call_once(wire: Recorder, connector: BaseConnector) -> None:
    async with ClientSession(connector=connector, connector_owner=False) as session:
        with routing_session("s-1"):
            async with session.post(wire.chat):
                pass


@pytest.mark.thorough
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("what", ["lets go", "comes"])
@pytest.mark.parametrize("gateways", ["two", "one"])
async def test_a_call_is_tagged_and_counted_once_wherever_another_app_lets_go_or_comes(
    gateway: Recorder, elsewhere: Recorder, order: str, what: str, gateways: str
) -> None:
    their_url = elsewhere.url if gateways == "two" else gateway.url
    # Routings with on_missing = "raise" come last; the others keep their order.
    their_config = RoutingConfig(their_url, on_missing="pass" if order == "first" else "raise")
    our_config = RoutingConfig(gateway.url)

    def begin() -> Trial:
        theirs, ours = Routing(their_config), Routing(our_config)
        blocks = [theirs.instrument()] if what == "lets go" else []
        blocks.append(ours.instrument())

        def do() -> None:
            if what == "lets go":
                blocks[0].close()
            else:
                blocks.append(theirs.instrument())

        async def check() -> None:
            for block in blocks:
                block.close()
            assert gateway.calls.pop().keys == [b"s-1"]
            counts = [routing.pins.summary().unknown for routing in (theirs, ours)]
            assert counts == [0, 1] or (gateways == "one" and counts == [1, 0])

        return Trial(partial(call_once, gateway), do, check)

    assert await at_each_step(begin) > 50


async def test_a_near_miss_fails_no_call_wherever_the_last_app_lets_go(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    config = RoutingConfig(gateway.url)

    def begin() -> Trial:
        block = Routing(config).instrument()

        async def check() -> None:
            block.close()
            assert elsewhere.calls.pop().keys == []

        return Trial(partial(call_once, elsewhere), block.close, check)

    assert await at_each_step(begin) > 50


async def test_a_session_that_is_made_while_the_last_app_lets_go_has_the_hook_of_the_next(
    gateway: Recorder,
) -> None:
    def begin() -> Trial:
        theirs = Routing(RoutingConfig("http://other")).instrument()
        routing = Routing(RoutingConfig(gateway.url))
        sessions: list[ClientSession] = []
        blocks = [theirs]

        def do() -> None:  # briefly no routing is in force
            theirs.close()
            blocks.append(routing.instrument())

        async def work(_: BaseConnector) -> None:
            sessions.append(ClientSession())

        async def check() -> None:
            if len(blocks) == 1:
                do()
            sessions.append(ClientSession())
            for session in sessions:
                async with session:
                    assert await keys(session, gateway) == [b"s-1"]
                    assert len(session.trace_configs) == 1
            for block in blocks:
                block.close()

        return Trial(work, do, check)

    assert await at_each_step(begin) > 5


@pytest.mark.thorough
async def test_calls_in_threads_are_tagged_while_other_apps_come_and_let_go(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    """Threads make the calls while other routings start and stop."""
    threads, calls = 4, 100
    others = [Routing(RoutingConfig(elsewhere.url)) for _ in range(3)]
    is_over = threading.Event()
    routing = Routing(RoutingConfig(gateway.url))

    async def play(number: int) -> None:
        async with ClientSession() as kept:
            for turn in range(calls):
                async with ClientSession() as anew:
                    for session in (kept, anew):
                        with routing_session(f"s-{number}"):
                            data = f"s-{number}".encode()
                            async with session.post(gateway.chat, data=data):
                                pass
                    assert len(anew.trace_configs) == 1, turn

    def come_and_go() -> None:
        while not is_over.is_set():
            for other in others:
                with other.instrument(), others[0].instrument():
                    pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    disturber = threading.Thread(target=come_and_go)
    disturber.start()
    try:
        with routing.instrument():
            await asyncio.gather(
                *(asyncio.to_thread(asyncio.run, play(number)) for number in range(threads))
            )
    finally:
        is_over.set()
        await asyncio.to_thread(disturber.join)
        sys.setswitchinterval(interval)
    assert len(gateway.calls) == 2 * threads * calls
    assert all(call.keys == [call.body] for call in gateway.calls)
    assert routing.pins.summary() == PinSummary(unknown=2 * threads * calls, sessions=threads)
