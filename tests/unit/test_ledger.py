import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, TraceConfig, web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    PINS,
    Move,
    PinLedger,
    PinSummary,
    RoutingConfig,
    SessionPin,
    attach,
    routing_middleware,
    routing_session,
    routing_trace_config,
    setup,
)
from aiohttp_smg_routing.ledger import MOVES_LOGGED_PER_MINUTE
from aiohttp_smg_routing.testing import Call, Recorder, answer, completion, redirect

from ..conftest import CLIENT, naive_proxy, session_server

GATEWAY = "http://gateway"
W1, W2, W3 = "http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://10.0.0.3:8000"


def ledger(**config: Any) -> PinLedger:
    return PinLedger(RoutingConfig(GATEWAY, **config))


def play(pins: PinLedger, *turns: tuple[str, str | None]) -> None:
    for session_id, worker in turns:
        pins.answered(session_id, worker, pins.start())


def by_worker(*workers: str) -> Callable[[Call], bytes]:
    """Return answers that name one worker after the other."""
    names = iter(workers)
    return lambda call: completion(worker=next(names))


def test_outcome_of_each_call() -> None:
    pins = ledger()
    play(pins, ("a", W1), ("a", W1), ("b", W2), ("a", W2), ("a", W2), ("c", None), ("b", None))
    assert pins.summary() == PinSummary(first=2, kept=2, moved=1, unknown=2, sessions=3)
    assert pins.workers() == {W2: 2}
    a = pins.sessions()["a"]
    assert (a.worker, a.turns, a.moves) == (W2, 4, 1)
    c = pins.sessions()["c"]
    assert (c.worker, c.turns, c.moves) == (None, 1, 0)


def test_answers_that_name_no_worker_stay_unknown() -> None:
    pins = ledger()
    play(pins, ("a", None), ("a", None), ("a", None))
    assert pins.summary() == PinSummary(unknown=3, sessions=1)


def test_a_late_turn_on_the_same_worker_does_not_make_later_turns_look_late() -> None:
    pins = ledger()
    first, second, third, fourth = (pins.start() for _ in range(4))
    pins.answered("a", W1, first)
    pins.answered("a", W1, third)
    pins.answered("a", W1, second)
    assert pins.sessions()["a"].newest == third
    pins.answered("a", W2, fourth)
    assert pins.workers() == {W2: 1}


def test_a_session_that_moved_has_called_last() -> None:
    pins = ledger(track_sessions=2)
    play(pins, ("a", W1), ("b", W1), ("a", W2), ("c", W1))
    assert list(pins.sessions()) == ["a", "c"]


def test_a_pin_that_was_read_stays_as_it_was_and_the_view_is_live() -> None:
    pins = ledger()
    view = pins.sessions()
    play(pins, ("a", W1), ("a", W1))
    before = view["a"]
    play(pins, ("a", W1))
    assert isinstance(before, SessionPin)
    assert (before.turns, view["a"].turns) == (2, 3)


def test_sessions_can_be_copied_while_another_thread_enters_turns() -> None:
    pins = ledger(track_sessions=50)
    done = threading.Event()

    def copy() -> None:
        while not done.is_set():
            dict(pins.sessions())

    with ThreadPoolExecutor() as pool:
        copies = pool.submit(copy)
        play(pins, *((f"s-{number}", W1) for number in range(20_000)))
        done.set()
        copies.result()


def test_a_worker_that_is_named_late_is_the_first() -> None:
    pins = ledger()
    play(pins, ("a", None), ("a", W1), ("a", W1))
    assert pins.summary() == PinSummary(first=1, kept=1, unknown=1, sessions=1)
    assert pins.workers() == {W1: 1}


def test_a_turn_that_overlaps_a_move_is_no_move_back() -> None:
    pins = ledger()
    play(pins, ("a", W1))
    slow, later = pins.start(), pins.start()
    pins.answered("a", W2, later)  # W1 has died meanwhile
    pins.answered("a", W1, slow)  # routed before, answered after
    play(pins, ("a", W2))
    assert pins.summary() == PinSummary(first=1, kept=2, moved=1, sessions=1)
    assert pins.sessions()["a"].worker == W2


def test_first_turns_that_overlap_on_two_workers_are_a_first_and_a_move() -> None:
    for order in (0, 1), (1, 0):
        pins = ledger()
        calls = [(pins.start(), W1), (pins.start(), W2)]
        for place in order:
            number, worker = calls[place]
            pins.answered("a", worker, number)
        assert pins.summary() == PinSummary(first=1, moved=1, sessions=1)
        assert pins.sessions()["a"].worker == W2
        assert pins.workers() == {W2: 1}


def test_a_late_turn_from_before_two_moves_is_no_third_move() -> None:
    pins = ledger()
    calls = [(pins.start(), worker) for worker in (W1, W1, W2, W3)]
    for place in (0, 2, 3, 1):
        number, worker = calls[place]
        pins.answered("a", worker, number)
    assert pins.summary() == PinSummary(first=1, kept=1, moved=2, sessions=1)
    assert pins.workers() == {W3: 1}


def test_a_late_turn_from_elsewhere_leaves_the_session_where_it_is() -> None:
    pins = ledger()
    calls = [(pins.start(), worker) for worker in (W1, W2, W1)]
    for place in (0, 2, 1):
        number, worker = calls[place]
        pins.answered("a", worker, number)
    assert pins.summary() == PinSummary(first=1, kept=1, moved=1, sessions=1)
    assert pins.workers() == {W1: 1}


def test_it_keeps_the_sessions_that_called_last_and_every_count() -> None:
    pins = ledger(track_sessions=2)
    play(pins, ("a", W1), ("b", W1), ("a", W1), ("c", W2))
    assert list(pins.sessions()) == ["a", "c"]
    assert pins.workers() == {W1: 1, W2: 1}
    assert pins.summary() == PinSummary(first=3, kept=1, sessions=2)


def test_forget_drops_a_session_and_keeps_the_counts() -> None:
    pins = ledger(key="digest", secret="k")
    play(pins, (pins.config.routing_key("a"), W1))
    for not_tracked in ("b", "", 7):
        pins.forget(not_tracked)
    assert pins.summary().sessions == 1
    pins.forget("a")
    assert pins.workers() == {}
    assert pins.summary() == PinSummary(first=1)


def test_sessions_is_read_only() -> None:
    with pytest.raises(TypeError):
        ledger().sessions()["a"] = None  # type: ignore[index]


@pytest.fixture
def threads_take_turns() -> Iterator[None]:
    """Let threads interrupt each other as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("threads_take_turns")
def test_threads_lose_no_count() -> None:
    pins = ledger(track_sessions=50)
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for turn in range(10_000):
            play(pins, (f"s-{turn % 100}", W1))
            pins.count("untagged")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary = pins.summary()
    assert summary.first + summary.kept == summary.untagged == 80_000
    assert summary.sessions == 50
    assert pins.workers() == {W1: 50}


def test_a_move_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pins = ledger()
    play(pins, *[("s-17", W1)] * 5, ("s-17", W2), ("s-17", W2))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"session s-17 moved from {W1} to {W2} after 5 turns"


def test_moves_that_the_cap_holds_back_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    pins = PinLedger(RoutingConfig(GATEWAY), clock=lambda: now)
    moves = [("a", (W1, W2)[number % 2]) for number in range(MOVES_LOGGED_PER_MINUTE + 8)]
    play(pins, *moves)
    assert pins.summary().moved == MOVES_LOGGED_PER_MINUTE + 7
    assert len(caplog.records) == MOVES_LOGGED_PER_MINUTE
    now = 60.0
    caplog.clear()
    play(pins, ("a", W3))
    assert [record.getMessage() for record in caplog.records] == [
        "7 more moves: no more than 60 a minute are logged one by one",
        f"session a moved from {W2} to {W3} after {MOVES_LOGGED_PER_MINUTE + 8} turns",
    ]


async def test_moves_held_back_are_counted_when_the_app_ends(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    app = session_server(gateway.url)
    client = await aiohttp_client(app)
    play(app[PINS], *[("a", (W1, W2)[number % 2]) for number in range(MOVES_LOGGED_PER_MINUTE + 3)])
    await client.close()
    assert caplog.records[-1].getMessage().startswith("2 more moves: ")


seen: list[Move] = []


def on_move(move: Move) -> None:
    seen.append(move)


@pytest.mark.parametrize("given", [on_move, "call:tests.unit.test_ledger:on_move"])
def test_on_move_gets_each_move(given: Any) -> None:
    seen.clear()
    play(ledger(on_move=given), ("a", W1), ("a", W2), ("a", W2), ("a", W1))
    assert seen == [Move("a", W1, W2, 1), Move("a", W2, W1, 3)]


def test_on_move_that_raises_is_logged_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def broken(move: Move) -> None:
        raise ZeroDivisionError("in on_move")

    pins = ledger(on_move=broken)
    play(pins, ("a", W1), ("a", W2), ("a", W2))
    assert pins.summary().moved == 1
    assert "ZeroDivisionError: in on_move" in caplog.text


@pytest.fixture
async def outgoing() -> AsyncIterator[ClientSession]:
    async with ClientSession() as session:
        yield session


async def turn(client: Any, session_id: str = "s-1") -> int:
    async with client.post(f"/sessions/{session_id}/v1/chat/completions", json={}) as response:
        await response.read()
        status: int = response.status
        return status


async def test_the_app_enters_every_call_in_its_ledger(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = session_server(gateway.url)
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1, W1, W2, W2)
    for session_id in ("s-1", "s-1", "s-1", "s-2"):
        assert await turn(client, session_id) == 200
    gateway.answer = lambda call: answer()
    assert await turn(client) == 200
    gateway.answer = lambda call: answer(status=404)
    assert await turn(client) == 404
    gateway.answer = lambda call: answer(status=503)
    assert await turn(client) == 503
    async with client.post("/v1/chat/completions"):
        pass
    gateway.answer = lambda call: answer()
    async with client.post("/v1/chat/completions"):
        pass
    gateway.answer = lambda call: b"garbage\r\n\r\n"
    assert await turn(client) == 500
    assert app[PINS].summary() == PinSummary(
        first=2, kept=1, moved=1, unknown=1, untagged=1, failed=4, sessions=2
    )
    assert app[PINS].workers() == {W2: 2}


async def test_other_calls_are_not_entered(
    gateway: Recorder, elsewhere: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = session_server(gateway.url)

    async def handler(request: web.Request) -> web.Response:
        for url in (elsewhere.chat, gateway.url / "v1/models"):
            async with request.app[CLIENT].post(url):
                pass
        async with request.app[CLIENT].get(gateway.chat):
            return web.Response()

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 200
    assert app[PINS].summary() == PinSummary()


async def test_a_call_is_entered_when_the_answers_head_is_there(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = session_server(gateway.url)
    gateway.answer = lambda call: (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nX-SMG-Routed-Worker-Id: w\r\n\r\n"
    )

    async def handler(request: web.Request) -> web.Response:
        async with request.app[CLIENT].post(gateway.chat):
            return web.Response(text=str(request.app[PINS].sessions()["s-1"].worker))

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert await response.text() == "w"


async def test_a_redirected_call_is_entered_once_and_only_if_the_gateway_answers(
    gateway: Recorder, elsewhere: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = session_server(gateway.url)
    client = await aiohttp_client(app)
    named = by_worker(W1)
    gateway.answer = lambda call: named(call) if b"?" in call.start_line else redirect("?again")
    assert await turn(client) == 200
    gateway.answer = lambda call: redirect(elsewhere.chat)
    assert await turn(client) == 200
    assert app[PINS].summary() == PinSummary(first=1, sessions=1)


async def test_a_failed_call_is_counted_however_it_fails(
    gateway: Recorder, outgoing: ClientSession
) -> None:
    pins = ledger()
    attach(outgoing, RoutingConfig(gateway.url), pins)
    received = asyncio.Event()

    def never(call: Call) -> bytes:
        received.set()
        return b""

    with routing_session("s-1"):
        gateway.answer = lambda call: answer(status=500)
        with pytest.raises(ClientError):
            await outgoing.post(gateway.chat, raise_for_status=True)
        gateway.answer = never
        call = asyncio.create_task(outgoing.post(gateway.chat))
        await received.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    with routing_session("s-2"):
        gateway.answer = lambda call: b"garbage\r\n\r\n"
        with pytest.raises(ClientError):
            await outgoing.post(gateway.chat)
    assert pins.summary() == PinSummary(failed=3)


async def test_two_hooks_on_one_session_count_a_call_once(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    """A call counts in the ledger of the app whose request it is made in, whoever's hook it is."""
    apps, clients = [], []
    for name in ("one", "two"):
        app = web.Application()
        app[CLIENT] = outgoing
        app.router.add_post("/", naive_proxy(gateway.url))
        config = RoutingConfig(gateway.url, session_id=f"query:{name}", client_session=CLIENT)
        setup(app, config)
        apps.append(app)
        clients.append(await aiohttp_client(app))
    assert len(outgoing.trace_configs) == 2
    gateway.answer = by_worker(W1, W1, W2)
    for client, session_id in zip((*clients, clients[1]), ("a", "b", "b"), strict=True):
        async with client.post("/", params={"one": session_id, "two": session_id}):
            pass
    gateway.answer = lambda call: answer()
    async with clients[1].post("/"):
        pass
    one, two = (app[PINS] for app in apps)
    assert one.summary() == PinSummary(first=1, sessions=1)
    assert two.summary() == PinSummary(first=1, moved=1, untagged=1, sessions=1)


async def test_a_hook_of_the_users_own_enters_calls_of_a_request_in_the_apps_ledger(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    config = RoutingConfig(gateway.url)
    app = web.Application()
    app.router.add_post("/sessions/{session_id}/v1/chat/completions", naive_proxy(gateway.url))
    setup(app, config)
    async with ClientSession(trace_configs=[routing_trace_config(config)]) as app[CLIENT]:
        client = await aiohttp_client(app)
        assert await turn(client) == 200
    assert app[PINS].summary() == PinSummary(unknown=1, sessions=1)


async def test_calls_outside_a_request_count_in_the_ledger_of_the_app_that_attached_the_hook(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = session_server(gateway.url)
    await aiohttp_client(app)
    gateway.answer = by_worker(W1, W1, W1)
    with routing_session("job"):
        for _ in range(2):
            async with app[CLIENT].post(gateway.chat):
                pass
    async with app[CLIENT].post(gateway.chat):
        pass
    assert app[PINS].summary() == PinSummary(first=1, kept=1, untagged=1, sessions=1)


async def test_a_block_within_a_request_counts_in_the_apps_ledger(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    """Even if the hook, of another config, is not of this app: and in this app's key form."""
    app = web.Application()
    attach(outgoing, RoutingConfig(gateway.url))

    async def handler(request: web.Request) -> web.Response:
        with routing_session("bearer-token"):
            async with outgoing.post(gateway.chat):
                return web.Response()

    app.router.add_post("/", handler)
    config = RoutingConfig(gateway.url, key="digest", secret="k")
    setup(app, config)
    client = await aiohttp_client(app)
    async with client.post("/") as response:
        assert response.status == 200
    assert list(app[PINS].sessions()) == [config.routing_key("bearer-token")]


async def test_digest_never_shows_the_session_id(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aiohttp_smg_routing")
    moves: list[Move] = []
    app = session_server(gateway.url, key="digest", on_move=moves.append, session_id="header:Token")
    gateway.answer = by_worker(W1, W2)
    client = await aiohttp_client(app)
    for _ in range(2):
        async with client.post("/v1/chat/completions", headers={"Token": "hush-hush"}):
            pass
    pins = app[PINS]
    shown = [dict(pins.sessions()), pins.summary(), moves, caplog.text, gateway.last.keys]
    key = app[PINS].config.routing_key("hush-hush")
    assert key in str(shown)
    assert "moved from" in caplog.text
    assert "hush-hush" not in str(shown)


async def test_no_tracking_in_one_app_is_not_anothers_to_make_up_for(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    async def in_a_block(request: web.Request) -> web.Response:
        with routing_session("s-3"):
            return await naive_proxy(gateway.url)(request)

    apps = []
    for name, track_sessions in (("one", 10), ("two", 0)):
        app = web.Application()
        app[CLIENT] = outgoing
        app.router.add_post("/", naive_proxy(gateway.url))
        app.router.add_post("/block", in_a_block)
        config = RoutingConfig(
            gateway.url,
            session_id=f"query:{name}",
            client_session=CLIENT,
            track_sessions=track_sessions,
        )
        setup(app, config)
        apps.append((app, await aiohttp_client(app)))
    async with apps[1][1].post("/?two=s-2"):
        pass
    assert gateway.last.keys == [b"s-2"]
    async with apps[1][1].post("/block?two=s-2"):
        pass
    assert gateway.last.keys == [b"s-3"]
    assert [app[PINS].summary() for app, _ in apps] == [PinSummary(), PinSummary()]


async def test_a_middleware_without_a_ledger_leaves_others_alone(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    pins = ledger()
    config = RoutingConfig(gateway.url, session_id="query:sid")
    attach(outgoing, config, pins)
    app = web.Application(middlewares=[routing_middleware(config)])
    app[CLIENT] = outgoing
    app.router.add_post("/", naive_proxy(gateway.url))
    client = await aiohttp_client(app)
    async with client.post("/?sid=s-1"):
        pass
    assert gateway.last.keys == [b"s-1"]
    assert pins.summary() == PinSummary()


async def test_apps_with_equal_configs_on_one_session_have_a_ledger_each(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    apps = []
    for _ in range(2):
        app = web.Application()
        app[CLIENT] = outgoing
        app.router.add_post("/sessions/{session_id}/v1/chat/completions", naive_proxy(gateway.url))
        setup(app, RoutingConfig(gateway.url, client_session=CLIENT))
        apps.append((app, await aiohttp_client(app)))
    for _, client in apps:
        await turn(client)
    assert [app[PINS].summary() for app, _ in apps] == [PinSummary(unknown=1, sessions=1)] * 2


async def test_a_hook_attached_before_setup_takes_the_apps_ledger(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    config = RoutingConfig(gateway.url, client_session=CLIENT)
    attach(outgoing, config)
    app = web.Application()
    app[CLIENT] = outgoing
    setup(app, config)
    await aiohttp_client(app)
    assert len(outgoing.trace_configs) == 1
    with routing_session("job"):
        async with outgoing.post(gateway.chat):
            pass
    assert app[PINS].summary() == PinSummary(unknown=1, sessions=1)


async def test_another_hook_that_raises_is_no_second_outcome(gateway: Recorder) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    other = TraceConfig()
    other.on_request_end.append(broken)
    pins = ledger()
    ours = routing_trace_config(RoutingConfig(gateway.url), pins)
    async with ClientSession(trace_configs=[ours, other]) as session:
        with routing_session("s-1"), pytest.raises(ZeroDivisionError):
            await session.post(gateway.chat)
    assert pins.summary() == PinSummary(unknown=1, sessions=1)


@pytest.mark.parametrize(
    "unnamed", [answer(headers={"X-SMG-Routed-Worker-Id": ""}), answer(status=307)]
)
async def test_an_answer_that_names_no_worker_is_unknown(
    gateway: Recorder, aiohttp_client: AiohttpClient, unnamed: bytes
) -> None:
    app = session_server(gateway.url)
    client = await aiohttp_client(app)
    gateway.answer = lambda call: unnamed
    await turn(client)
    assert app[PINS].summary() == PinSummary(unknown=1, sessions=1)
    assert app[PINS].workers() == {}


async def test_no_tracking_no_ledger(gateway: Recorder, aiohttp_client: AiohttpClient) -> None:
    app = session_server(gateway.url, track_sessions=0)
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1, W2)
    for _ in range(2):
        assert await turn(client) == 200
    assert gateway.last.keys == [b"s-1"]
    assert app[PINS].summary() == PinSummary()


@pytest.mark.parametrize(("hide", "names"), [(False, [W1]), (True, [])])
async def test_hide_worker_ids_strips_them_from_what_agents_get(
    gateway: Recorder, aiohttp_client: AiohttpClient, hide: bool, names: list[str]
) -> None:
    app = session_server(gateway.url, hide_worker_ids=hide)

    async def passing_headers_on(request: web.Request) -> web.StreamResponse:
        async with request.app[CLIENT].post(gateway.chat) as answer:
            response = web.StreamResponse(headers=answer.headers)
            await response.prepare(request)
            await response.write(await answer.read())
            return response

    app.router.add_post("/{session_id}", passing_headers_on)
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1)
    async with client.post("/s-1") as response:
        assert response.headers.getall("X-SMG-Routed-Worker-Id", []) == names
    assert app[PINS].workers() == {W1: 1}
