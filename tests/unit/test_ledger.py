"""The ledger records the worker of each session, and the outcome of each call."""

import asyncio
import functools
import gc
import itertools
import logging
import random
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from aiohttp import ClientError, ClientSession, TraceConfig, web
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import CollectorRegistry
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import (
    ROUTING,
    ConfigError,
    Move,
    PinLedger,
    PinSummary,
    Routing,
    RoutingConfig,
    SessionPin,
    log,
    routing_session,
    setup,
)
from aiohttp_smg_routing.ledger import PendingCall
from aiohttp_smg_routing.log import A_RUN, LOGGED_A_MINUTE
from aiohttp_smg_routing.testing import Call, Recorder, answer, completion, redirect
from harness.proxies import CLIENT, naive_proxy, pinned_server

from ..fresh import python
from ..inputs import LAW
from .ledgers import (
    A_HANG,
    W1,
    W2,
    W3,
    W4,
    A,
    B,
    C,
    answered,
    begun,
    by_worker,
    end_in_a_thread,
    interrupted,
    is_consistent,
    ledger,
    play,
    read_all,
    turn,
    watched,
)


def pin_of(pins: PinLedger, session_id: str) -> SessionPin:
    [pin] = pins.of(session_id)
    return pin


# The outcome of each call.


def test_outcome_of_each_call() -> None:
    pins = ledger()
    play(pins, ("a", W1), ("a", W1), ("b", W2), ("a", W2), ("a", W2), ("c", None), ("b", None))
    assert pins.summary() == PinSummary(first=2, kept=2, moved=1, unknown=2, sessions=3)
    assert pins.workers() == {W2: 2}
    assert pins.of("a") == [SessionPin("a", A, "a", W2, 4, 1)]
    assert pins.of("c") == [SessionPin("c", A, "c", None, 1, 0)]
    assert pins.of("nobody") == []


def test_answers_that_name_no_worker_stay_unknown() -> None:
    pins = ledger()
    play(pins, ("a", None), ("a", None), ("a", None))
    assert pins.summary() == PinSummary(unknown=3, sessions=1)


def test_a_worker_that_is_named_late_is_the_first() -> None:
    pins = ledger()
    play(pins, ("a", None), ("a", W1), ("a", W1))
    assert pins.summary() == PinSummary(first=1, kept=1, unknown=1, sessions=1)
    assert pins.workers() == {W1: 1}


def test_a_call_that_started_before_a_move_is_kept_and_moves_nothing_back() -> None:
    moves: list[Move] = []
    pins = ledger(on_move=moves.append)
    play(pins, ("a", W1))
    slow, later = begun(pins, "a"), begun(pins, "a")
    answered(later, W2)  # W1 has died
    answered(slow, W1)  # routed before the move
    assert pin_of(pins, "a").worker == W2
    play(pins, ("a", W2))
    assert pins.summary() == PinSummary(first=1, kept=2, moved=1, sessions=1)
    assert moves == [Move("a", W1, W2, 1)]
    assert pins.workers() == {W2: 1}


@pytest.mark.parametrize("order", [*itertools.permutations((W1, W2, W1))])
def test_first_calls_that_overlap_are_judged_by_the_first_answer(order: tuple[str, ...]) -> None:
    pins = ledger()
    calls = [begun(pins, "a") for _ in order]
    for call, worker in zip(calls, order, strict=True):
        answered(call, worker)
    same = order.count(order[0]) - 1
    assert pins.summary() == PinSummary(first=1, kept=same, moved=2 - same, sessions=1)


def test_an_answer_from_where_the_session_is_by_now_is_no_second_move() -> None:
    """The call counts as moved, because W2 recomputed the conversation; the pin stays at W2."""
    moves: list[Move] = []
    pins = ledger(on_move=moves.append)
    play(pins, ("a", W1))
    calls = [begun(pins, "a") for _ in range(3)]
    for call in calls:
        answered(call, W2)
    assert pins.summary() == PinSummary(first=1, moved=3, sessions=1)
    assert moves == [Move("a", W1, W2, 1)]
    assert pin_of(pins, "a") == SessionPin("a", A, "a", W2, 4, 1)


def test_a_late_answer_from_before_two_moves_leaves_the_session_where_it_is() -> None:
    pins = ledger()
    play(pins, ("a", W1))
    slow = begun(pins, "a")
    play(pins, ("a", W2), ("a", W3))
    answered(slow, W1)
    assert pins.summary() == PinSummary(first=1, kept=1, moved=2, sessions=1)
    assert pins.workers() == {W3: 1}


@dataclass
class Pin:
    """A pin in the reference model."""

    first: str | None = None
    worker: str | None = None
    calls: int = 0
    moves: int = 0
    is_over: bool = False


class Reference:
    """A minimal model of the ledger."""

    def __init__(self) -> None:
        self.pins: dict[tuple[str, str], Pin] = {}
        self.counts: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.moves: list[Move] = []

    def begin(self, session: str, key: str) -> tuple[str, Pin, str | None]:
        pin = self.pins.setdefault((session, key), Pin())
        return session, pin, pin.worker

    def answer(self, call: tuple[str, Pin, str | None], worker: str | None) -> None:
        session, pin, at_its_start = call
        was = at_its_start or pin.first
        outcome = "kept" if worker == was else "moved"
        if worker is None:
            outcome = "unknown"
        elif was is None:
            outcome = "first"
        self.counts[outcome] += 1
        if worker is not None:
            self.calls[worker] += 1
        pin.first = pin.first or worker
        if pin.is_over:
            return
        if worker is not None and outcome != "kept" and worker != pin.worker:
            if pin.worker is not None:
                self.moves.append(Move(session, pin.worker, worker, pin.calls))
                pin.moves += 1
            pin.worker = worker
        pin.calls += 1

    def end(self, session: str) -> None:
        for place in [place for place in self.pins if place[0] == session]:
            self.pins.pop(place).is_over = True

    def rows(self) -> set[SessionPin]:
        return {
            SessionPin(session, A, key, pin.worker, pin.calls, pin.moves)
            for (session, key), pin in self.pins.items()
            if pin.calls
        }


@pytest.mark.parametrize("workers", [2, 4])
def test_thirty_two_calls_in_flight_say_what_is_true_of_a_gateway_that_ignores_the_key(
    workers: int,
) -> None:
    chance = random.Random(workers)
    moves: list[Move] = []
    pins, reference = ledger(on_move=moves.append), Reference()
    in_flight: list[tuple[PendingCall, tuple[str, Pin, str | None]]] = []
    for _ in range(20_000):
        while len(in_flight) < 32:
            in_flight.append((begun(pins, "a"), reference.begin("a", "a")))
        call, expected = in_flight.pop(chance.randrange(32))
        worker = f"w{chance.randrange(workers)}"
        answered(call, worker)
        reference.answer(expected, worker)
    summary = pins.summary()
    assert summary == PinSummary(**reference.counts, sessions=1)
    assert moves == reference.moves
    assert set(pins.sessions()) == reference.rows()
    assert summary.kept / (summary.kept + summary.moved) == pytest.approx(1 / workers, abs=0.01)


class Interleavings(RuleBasedStateMachine):
    """Calls of two sessions with two keys each start, are answered or lost, and sessions end."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[Move] = []
        self.pins, self.reference = ledger(on_move=self.moves.append), Reference()
        self.in_flight: list[tuple[PendingCall, tuple[str, Pin, str | None]]] = []

    @rule(session=st.sampled_from("ab"), key=st.sampled_from("12"))
    def begin(self, session: str, key: str) -> None:
        self.in_flight.append(
            (begun(self.pins, session, key=key), self.reference.begin(session, key))
        )

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), worker=st.sampled_from([W1, W1, W2, None]))
    def answer(self, data: st.DataObject, worker: str | None) -> None:
        place = data.draw(st.integers(0, len(self.in_flight) - 1))
        call, expected = self.in_flight.pop(place)
        answered(call, worker)
        self.reference.answer(expected, worker)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))

    @rule(session=st.sampled_from("ab"))
    def end(self, session: str) -> None:
        self.pins.end(session)
        self.reference.end(session)

    @invariant()
    def the_ledger_says_what_the_reference_says(self) -> None:
        rows = self.reference.rows()
        assert set(self.pins.sessions()) == rows
        assert self.pins.workers() == Counter(pin.worker for pin in rows if pin.worker)
        assert self.pins.calls() == self.reference.calls
        counts = dict.fromkeys(("first", "kept", "moved", "unknown"), 0) | self.reference.counts
        sessions = len({pin.session for pin in rows})
        assert self.pins.summary() == PinSummary(**counts, sessions=sessions)
        assert self.moves == self.reference.moves


Interleavings.TestCase.settings = settings(LAW, stateful_step_count=30)
TestInterleavings = pytest.mark.thorough(Interleavings.TestCase)


async def test_calls_in_flight_on_the_wire_are_judged_by_where_the_session_was_at_their_start(
    gateway: Recorder, outgoing: ClientSession
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    routing.attach(outgoing)
    arrived: asyncio.Queue[asyncio.Future[str]] = asyncio.Queue()

    async def later(worker: asyncio.Future[str]) -> AsyncGenerator[bytes, None]:
        yield completion(worker=await worker)

    def hold(call: Call) -> AsyncGenerator[bytes, None]:
        worker = asyncio.get_running_loop().create_future()
        arrived.put_nowait(worker)
        return later(worker)

    async def call() -> None:
        with routing_session("a"):
            async with outgoing.post(gateway.chat) as response:
                await response.read()

    gateway.answer = hold
    chance, reference = random.Random(12), Reference()
    in_flight = []
    for number in range(300 + 32):
        if number < 300:
            begun_now, expected = asyncio.create_task(call()), reference.begin("a", "a")
            in_flight.append((begun_now, await arrived.get(), expected))
        if number < 32:
            continue
        task, answered, expected = in_flight.pop(chance.randrange(len(in_flight)))
        worker = chance.choice((W1, W2))
        answered.set_result(worker)
        await task
        reference.answer(expected, worker)
    assert in_flight == []
    assert routing.pins.summary() == PinSummary(**reference.counts, sessions=1)
    assert pin_of(routing.pins, "a").moves == len(reference.moves)


# The sessions that the ledger keeps, and how they end.


def test_a_session_that_moved_has_called_last() -> None:
    pins = ledger(track_sessions=2)
    play(pins, ("a", W1), ("b", W1), ("a", W2), ("c", W1))
    assert [pin.session for pin in pins.sessions()] == ["a", "c"]


def test_it_keeps_the_sessions_that_called_last_and_every_count() -> None:
    pins = ledger(track_sessions=2)
    play(pins, ("a", W1), ("b", W1), ("a", W1), ("c", W2))
    assert [pin.session for pin in pins.sessions()] == ["a", "c"]
    assert pins.workers() == {W1: 1, W2: 1}
    assert pins.summary() == PinSummary(first=3, kept=1, sessions=2)


def test_a_session_that_was_pushed_out_is_entered_anew_while_an_old_call_is_under_way() -> None:
    pins = ledger(track_sessions=1)
    old = [begun(pins, "a") for _ in range(2)]
    answered(old.pop(), W1)
    play(pins, ("b", W1), ("a", W1))
    assert [pin.session for pin in pins.sessions()] == ["a"]
    answered(old.pop(), W1)
    assert pins.workers() == {W1: 1}


def test_active_pins_are_those_with_an_answer_in_the_last_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pins = ledger()
    play(pins, ("a", W1), ("b", W1), ("c", W2), ("d", None))
    now += 50
    play(pins, ("b", W1), ("d", W1))
    assert pins.workers(60) == pins.workers() == {W1: 3, W2: 1}
    now += 20
    assert pins.workers(60) == {W1: 2, W2: 0}  # the worker still has a session
    play(pins, ("a", W2))
    assert pins.workers(60) == {W1: 2, W2: 1}
    pins.end("a")
    assert pins.workers(60) == {W1: 2, W2: 0}


@pytest.mark.parametrize("has_metrics", [False, True])
def test_calls_of_a_worker_are_those_that_it_answered_in_the_last_seconds(
    monkeypatch: pytest.MonkeyPatch, has_metrics: bool
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    registry = {"metrics": "prometheus", "metrics_registry": CollectorRegistry()}
    pins = ledger(**(registry if has_metrics else {}))
    play(pins, ("a", W1), ("a", W1), ("b", W1), ("a", W2), ("b", None))
    assert pins.calls() == {W1: 3, W2: 1}
    now += 70
    play(pins, ("b", W1), ("c", W3))
    assert pins.calls() == {W1: 4, W2: 1, W3: 1}
    assert pins.calls(60) == {W1: 1, W2: 0, W3: 1}  # W2 has a session, but no recent call
    pins.end("c")
    assert pins.calls(60) == {W1: 1, W2: 0, W3: 1}  # its calls still count
    now += 600
    assert pins.calls() == {W1: 1, W2: 0, W3: 1}  # the window may be ten seconds too long
    now += 10
    assert pins.calls() == {W1: 0, W2: 0}


def test_calls_that_bring_no_session_or_fail_are_no_calls_of_a_worker() -> None:
    pins = ledger()
    answered(PendingCall(pins, "", "", A, ""), W1)
    call = begun(pins, "a")
    pins.answered(call, 500, {"X-SMG-Routed-Worker-Id": W1})
    assert pins.calls() == {}


def test_calls_know_of_a_session_that_ended_while_another_thread_worked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pins = ledger()
    play(pins, ("a", W1))
    now += 700
    with pins._lock:
        thread = threading.Thread(target=pins.end, args=["a"])
        thread.start()
        thread.join()
    assert pins.calls() == {}


@pytest.mark.parametrize("seconds", [3600, -1, float("nan")])
def test_seconds_that_calls_are_not_kept_for_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"calls are kept for 600 seconds, not for {seconds}"):
        ledger().calls(seconds)


def test_a_header_that_names_a_worker_for_each_call_does_not_fill_the_memory() -> None:
    pins = ledger(track_sessions=10, worker_header="X-Request-Id")
    for number in range(3000):
        call = begun(pins, f"session-{number}")
        pins.answered(call, 200, {"X-Request-Id": f"request-{number}"})
    assert pins.summary().first == 3000
    assert len(pins.calls()) <= 1010


def test_pins_of_gateways_that_count_as_one_are_as_active_as_the_one_that_was_answered_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pins = ledger(A, B)
    play(pins, ("a", W1), gateway=A)
    now += 50
    play(pins, ("a", W2), gateway=B)
    now += 20
    play(pins, ("b", W1), gateway=B)  # shows that the gateways share a worker
    assert pins.workers(60) == {W1: 2}


def test_a_pin_that_was_read_stays_as_it_was() -> None:
    pins = ledger()
    play(pins, ("a", W1), ("a", W1))
    before, [pin] = pins.sessions(), pins.of("a")
    play(pins, ("a", W1))
    before.clear()
    assert (pin.calls, pin_of(pins, "a").calls) == (2, 3)


def test_the_end_of_a_session_drops_it_and_keeps_the_counts() -> None:
    routing = Routing(RoutingConfig(A, key="digest", secret="k"))
    pins, name = routing.pins, routing.config.routing_key("a")
    play(pins, (name, W1))
    for not_tracked in ("b", "", 7):
        routing.end(not_tracked)
    assert pins.summary().sessions == 1
    routing.end("a")
    assert (pins.sessions(), pins.of("a"), pins.workers()) == ([], [], {})
    assert pins.summary() == PinSummary(first=1)


def test_the_end_of_what_is_no_session_id_is_refused() -> None:
    with pytest.raises(TypeError, match="not a bytes"):
        ledger().end(b"a")  # type: ignore[arg-type]


def test_answers_to_calls_that_began_before_the_end_leave_no_row() -> None:
    pins = ledger()
    never_answered = begun(pins, "a")
    play(pins, ("a", W1))
    pinned = begun(pins, "a")
    pins.end("a")
    for call, worker in ((never_answered, W1), (pinned, W1), (pinned, W2)):
        answered(call, worker)
    assert (pins.sessions(), pins.workers()) == ([], {})
    assert pins.summary() == PinSummary(first=1, kept=2, moved=1)


def test_a_session_that_begins_anew_is_tracked_though_an_old_call_is_under_way() -> None:
    pins = ledger()
    old = [begun(pins, "a") for _ in range(3)]
    answered(old.pop(), W1)
    pins.end("a")
    new = begun(pins, "a")
    answered(old.pop(), W1)
    answered(new, W2)
    assert pins.of("a") == [SessionPin("a", A, "a", W2, 1, 0)]
    answered(old.pop(), W1)
    assert pins.of("a") == [SessionPin("a", A, "a", W2, 1, 0)]
    play(pins, ("a", W2))
    assert pin_of(pins, "a").calls == 2


def test_the_end_drops_every_pin_of_the_session_and_no_other() -> None:
    pins = ledger(A, B)
    under_way = []
    for session, gateway, key in itertools.product("ab", (A, B), "12"):
        under_way.append(begun(pins, session, gateway=gateway, key=key))
        worker = f"{gateway}/worker"
        answered(begun(pins, session, gateway=gateway, key=key), worker)
    assert len(pins.of("a")) == len(pins.of("b")) == 4
    pins.end("a")
    for call in under_way:
        answered(call, f"{call.gateway}/worker")
    assert pins.of("a") == []
    assert len(pins.of("b")) == 4
    assert sum(pins.workers().values()) == 4


# Several gateways, and several keys.


def test_pins_are_kept_apart_between_gateways_that_have_workers_of_their_own() -> None:
    pins = ledger(A, B)
    for session, _ in itertools.product("abc", range(8)):
        play(pins, (session, W1), gateway=A)
        play(pins, (session, W2), gateway=B)
    assert pins.summary() == PinSummary(first=6, kept=42, sessions=3)
    assert [(pin.gateway, pin.worker, pin.calls) for pin in pins.of("a")] == [
        (A, W1, 8),
        (B, W2, 8),
    ]
    assert pins.workers() == {W1: 3, W2: 3}


def test_a_session_that_is_split_between_two_gateways_of_the_same_workers_shows() -> None:
    pins = ledger(A, B)
    play(pins, ("a", W1), ("b", W2), gateway=A)
    play(pins, ("a", W2), ("b", W2), gateway=B)  # shows that they share W2
    assert pins.summary() == PinSummary(first=2, moved=1, kept=1, sessions=2)
    assert len({pin.gateway for pin in pins.sessions()}) == 1
    for _ in range(10):
        play(pins, ("a", W1), ("b", W2), gateway=A)
        play(pins, ("a", W2), ("b", W2), gateway=B)
    assert pins.summary() == PinSummary(first=2, moved=1 + 20, kept=1 + 20, sessions=2)
    assert pin_of(pins, "a").calls == 22
    assert pin_of(pins, "b").moves == 0


def test_only_gateways_that_named_a_worker_in_common_count_as_one() -> None:
    pins = ledger(A, B, C)
    for gateway, worker in ((A, W1), (B, W2), (C, W3)):
        play(pins, ("a", worker), gateway=gateway)
    play(pins, ("b", W3), gateway=A)
    assert [(pin.worker, pin.calls) for pin in pins.of("a")] == [(W1, 2), (W2, 1)]
    play(pins, ("b", W2), gateway=C)
    assert [pin.calls for pin in pins.of("a")] == [3]
    assert sum(pins.workers().values()) == 2


SHOWN = list(itertools.permutations([(A, W1), (B, W1), (B, W2), (C, W2)]))


@pytest.mark.parametrize("shown", SHOWN)
def test_gateways_count_as_one_in_whatever_order_they_show_it(
    shown: tuple[tuple[str, str], ...],
) -> None:
    pins = ledger(A, B, C)
    for gateway, worker in shown:
        play(pins, ("a", worker), gateway=gateway)
    for gateway in (A, B, C):
        play(pins, ("b", W1), gateway=gateway)
    assert pin_of(pins, "a").calls == 4
    assert pin_of(pins, "b").calls == 3
    assert pins.workers().keys() <= {W1, W2}


@pytest.mark.parametrize(("worker", "outcome", "is_at"), [(W2, "kept", W1), (W3, "moved", W3)])
def test_a_call_that_began_at_a_pin_of_its_own_is_judged_by_that_and_counts_in_the_one_row(
    worker: str, outcome: str, is_at: str
) -> None:
    pins = ledger(A, B)
    play(pins, ("a", W1), gateway=A)
    play(pins, ("a", W2), gateway=B)
    under_way = begun(pins, "a", gateway=B)
    play(pins, ("b", W1), gateway=A)
    play(pins, ("b", W1), gateway=B)  # they count as one from now on: "a" is on W1
    before = pins.summary()
    assert (before.first, before.kept) == (3, 1)
    answered(under_way, worker)
    assert getattr(pins.summary(), outcome) == getattr(before, outcome) + 1
    assert [(pin.worker, pin.calls) for pin in pins.of("a")] == [(is_at, 3)]


def test_calls_that_began_before_their_gateways_counted_as_one_have_one_row() -> None:
    pins = ledger(A, B)
    at_a, at_b = [begun(pins, "a", gateway=gateway) for gateway in (A, B)]
    play(pins, ("b", W1), gateway=A)
    play(pins, ("b", W1), gateway=B)
    answered(at_a, W1)
    answered(at_b, W2)
    assert pins.of("a") == [SessionPin("a", A, "a", W2, 2, 1)]


def test_a_split_shows_where_the_sessions_come_one_after_the_other() -> None:
    pins = ledger(A, B)
    for session, at_a, at_b in (("a", W1, W2), ("b", W2, W1), ("c", W1, W2)):
        for _ in range(4):
            play(pins, (session, at_a), gateway=A)
            play(pins, (session, at_b), gateway=B)
        pins.end(session)
    # "a" shows that A has W1 and B has W2. The first turn of "b" shows that A has W2 too.
    assert pins.summary() == PinSummary(first=2 + 1 + 1, kept=6, moved=7 + 7)


def test_a_worker_that_one_gateway_named_is_known_once_two_count_as_one() -> None:
    pins = ledger(A, B)
    play(pins, ("a", None), ("b", W2), gateway=A)
    play(pins, ("a", W1), ("b", W2), gateway=B)
    assert (pin_of(pins, "a").worker, pins.workers()) == (W1, {W1: 1, W2: 1})
    play(pins, ("a", W1), gateway=A)
    play(pins, ("a", W1), gateway=B)
    assert pins.summary() == PinSummary(first=2, kept=3, unknown=1, sessions=2)


def test_the_answer_that_shows_two_gateways_as_one_is_judged_by_the_sessions_first_answer() -> None:
    for worker, outcome in ((W1, "kept"), (W2, "moved")):
        moves: list[Move] = []
        pins = ledger(A, B, on_move=moves.append)
        under_way = begun(pins, "a", gateway=B)
        play(pins, ("a", W1), ("b", W2), gateway=A)
        answered(under_way, worker)
        assert pins.summary() == PinSummary(first=2, **{outcome: 1}, sessions=2)
        assert len(moves) == pin_of(pins, "a").moves == (outcome == "moved")


@pytest.mark.parametrize("seed", range(40))
def test_whatever_gateways_answer_the_counts_agree_with_each_other(seed: int) -> None:
    chance = random.Random(seed)
    moves: list[Move] = []
    pins = ledger(A, B, C, on_move=moves.append)
    in_flight, finished = [], 0
    for _ in range(200):
        session, key = chance.choice("abc"), chance.choice("12")
        in_flight.append(begun(pins, session, gateway=chance.choice((A, B, C)), key=key))
        if chance.random() < 0.05:
            pins.end(chance.choice("abc"))
        if chance.random() < 0.8:
            call = in_flight.pop(chance.randrange(len(in_flight)))
            answered(call, chance.choice((W1, W2, W3, W4, f"{call.gateway}/own", None)))
            finished += 1
        rows = pins.sessions()
        assert pins.workers() == Counter(row.worker for row in rows if row.worker)
        assert len({row[:3] for row in rows}) == len(rows)
        summary = pins.summary()
        assert sum((summary.first, summary.kept, summary.moved, summary.unknown)) == finished
        assert summary.sessions == len({row.session for row in rows})
        assert sum(row.moves for row in rows) <= len(moves) <= summary.moved
    for session in "abc":
        pins.end(session)
    assert (pins.sessions(), pins.workers()) == ([], {})


def test_sessions_that_pin_several_models_have_a_row_for_each() -> None:
    pins = ledger(pin_by="{session_id}/{json:model}")
    for _ in range(4):
        answered(begun(pins, "a", key="digest-of-x"), W1)
        answered(begun(pins, "a", key="digest-of-y"), W2)
    assert pins.summary() == PinSummary(first=2, kept=6, sessions=1)
    assert [(pin.key, pin.worker, pin.calls) for pin in pins.of("a")] == [
        ("digest-of-x", W1, 4),
        ("digest-of-y", W2, 4),
    ]


@pytest.mark.parametrize("key", ["session_id", "digest"])
async def test_rows_are_the_sessions_name_the_gateway_and_the_key_that_went_out(
    gateway: Recorder, aiohttp_client: AiohttpClient, key: str
) -> None:
    app = pinned_server(
        gateway.url, key=key, session_id="header:Token", pin_by="{session_id}/{json:model}"
    )
    client = await aiohttp_client(app)
    gateway.answer = by_worker(*[W1, W2] * 3)
    sent = []
    for model in "xyxyxy":
        body = {"model": model, "messages": []}
        async with client.post("/v1/chat/completions", json=body, headers={"Token": "hush"}):
            sent += [each.decode() for each in gateway.last.keys]
    pins = app[ROUTING].pins
    name = app[ROUTING].config.routing_key("hush")
    assert pins.of("hush") == [
        SessionPin(name, str(gateway.url), sent[0], W1, 3, 0),
        SessionPin(name, str(gateway.url), sent[1], W2, 3, 0),
    ]
    assert len(set(sent)) == 2
    assert pins.summary() == PinSummary(first=2, kept=4, sessions=1)
    assert ("hush" in str(pins.sessions())) == (key == "session_id")
    app[ROUTING].end("hush")
    assert pins.sessions() == []


async def test_samples_of_a_group_are_rows_of_their_own_on_the_worker_of_the_group(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = pinned_server(gateway.url, pin_by="{header:X-Group-Id}")
    client = await aiohttp_client(app)
    gateway.answer = lambda call: completion(worker=W1)
    for session_id in ("s-1", "s-2", "s-1"):
        path = f"/sessions/{session_id}/v1/chat/completions"
        async with client.post(path, json={}, headers={"X-Group-Id": "g"}):
            pass
    pins = app[ROUTING].pins
    assert [(pin.session, pin.calls) for pin in pins.sessions()] == [("s-2", 1), ("s-1", 2)]
    assert len({pin.key for pin in pins.sessions()}) == 1
    assert pins.summary() == PinSummary(first=2, kept=1, sessions=2)


async def test_two_gateways_on_the_wire_that_pin_each_for_itself_show_no_move(
    gateway: Recorder, elsewhere: Recorder, outgoing: ClientSession
) -> None:
    routing = Routing(RoutingConfig([gateway.url, elsewhere.url]))
    routing.attach(outgoing)
    gateway.answer = lambda call: completion(worker=W1)
    elsewhere.answer = lambda call: completion(worker=W2)
    for number in range(48):
        with routing_session(f"s-{number % 6}"):
            async with outgoing.post((gateway, elsewhere)[number // 6 % 2].chat):
                pass
    assert routing.pins.summary() == PinSummary(first=12, kept=36, sessions=6)
    assert routing.pins.workers() == {W1: 6, W2: 6}


# The memory that the ledger takes.


def test_a_session_with_endless_keys_is_bounded() -> None:
    pins = ledger()
    for number in range(5_000):
        answered(begun(pins, "a", key=f"key-{number}"), W1)
    rows = pins.of("a")
    assert len(rows) < 500
    assert rows[-1].key == "key-4999"
    assert pins.workers() == {W1: len(rows)}
    assert pins.summary() == PinSummary(first=5_000, sessions=1)


def grown(work: Callable[[int], None], times: int = 2_000) -> float:
    """Return how many bytes Python allocates for good in each call of ``work``.

    It is the least of three measurements, because Python's own tables grow now and then.
    """
    sizes = []
    tracemalloc.start()
    try:
        for number in range(4 * times):
            if number % times == 0:
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
            work(number)
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    _, *begin, _ = sizes  # the first round warms up
    return min(end - size for size, end in zip(begin, sizes[2:], strict=True)) / times


@pytest.mark.thorough
def test_sessions_calls_and_workers_that_come_and_go_leave_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)  # otherwise caplog's records grow
    pins = ledger(A, B, track_sessions=10)
    kept: list[PendingCall] = []

    def work(number: int) -> None:
        session, worker = f"session-{number}", f"http://worker-{number}:8000"
        gateway = (A, B)[number % 2]
        begun(pins, f"lost-{number}", gateway=gateway)
        play(pins, (session, worker), gateway=gateway)
        ended = begun(pins, session, gateway=gateway)
        if number % 3:
            pins.end(session)
        answered(ended, f"{worker}1")
        kept[:] = [ended]

    keeps_interned = sys.version_info[:2] == (3, 12)  # it never frees the workers' names
    assert grown(work) < (120 if keeps_interned else 20)


# Threads, and re-entry at any point.


def test_sessions_can_be_read_while_another_thread_enters_turns() -> None:
    pins = ledger(track_sessions=50)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            assert len(pins.sessions()) <= 50
            pins.workers()

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        try:
            play(pins, *((f"s-{number}", W1) for number in range(2_000)))
        finally:
            done.set()
        reading.result()


@pytest.fixture
def threads_take_turns() -> Iterator[None]:
    """Make Python switch threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.thorough
@pytest.mark.usefixtures("threads_take_turns")
def test_threads_lose_no_count() -> None:
    pins = ledger(track_sessions=50)
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for number in range(5_000):
            play(pins, (f"s-{number % 100}", W1))
            pins.count("untagged")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary = pins.summary()
    assert summary.first + summary.kept == summary.untagged == 40_000
    assert summary.sessions == 50
    assert pins.workers() == {W1: 50}


@pytest.mark.thorough
@pytest.mark.usefixtures("threads_take_turns")
def test_threads_that_end_each_others_sessions_leave_the_counts_right() -> None:
    pins = ledger(A, B)
    start = threading.Barrier(6)

    def work(number: int) -> None:
        chance = random.Random(number)
        start.wait()
        for _ in range(3_000):
            session, gateway = f"s-{chance.randrange(5)}", chance.choice((A, B))
            play(pins, (session, chance.choice((W1, W2, W3))), gateway=gateway)
            pins.end(f"s-{chance.randrange(5)}")
            pins.sessions()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    summary, rows = pins.summary(), pins.sessions()
    assert summary.first + summary.kept + summary.moved == 18_000
    assert pins.workers() == Counter(row.worker for row in rows)
    for number in range(5):
        pins.end(f"s-{number}")
    assert (pins.sessions(), pins.workers()) == ([], {})


def kept_turn(pins: PinLedger) -> Callable[[], object]:
    play(pins, ("a", W1))
    return functools.partial(answered, begun(pins, "a"), W1)


def first_turn(pins: PinLedger) -> Callable[[], object]:
    return functools.partial(answered, begun(pins, "a"), W1)


def moved_turn(pins: PinLedger) -> Callable[[], object]:
    play(pins, ("a", W1))
    return functools.partial(answered, begun(pins, "a"), W2)


def merging_turn(pins: PinLedger) -> Callable[[], object]:
    play(pins, ("a", W1), ("b", W1))
    play(pins, ("b", W2), gateway=B)
    return functools.partial(answered, begun(pins, "a", gateway=B), W1)


def a_turn_that_pushes_out(pins: PinLedger) -> Callable[[], object]:
    play(pins, ("b", W1), ("c", W2), ("d", W1))
    return functools.partial(answered, begun(pins, "a"), W1)


def reading(pins: PinLedger) -> Callable[[], object]:
    play(pins, ("a", W1), ("b", W2), ("c", W1))

    def read() -> None:
        pins.sessions(), pins.of("a"), pins.summary()
        pins.workers(), pins.workers(60), pins.calls()

    return read


def an_end(pins: PinLedger) -> Callable[[], object]:
    play(pins, ("a", W1), ("b", W2))
    under_way = [begun(pins, "a"), begun(pins, "c")]

    def end() -> None:
        pins.end("b")
        under_way.clear()

    return end


def an_uncounted_call(pins: PinLedger) -> Callable[[], object]:
    return functools.partial(pins.count, "untagged")


def an_app_that_ends(pins: PinLedger) -> Callable[[], object]:
    play(pins, ("a", W1), ("b", W2), ("c", W3))

    def end_and_begin() -> None:
        pins.show(False)
        pins.show(True)

    return end_and_begin


PREPARED = [
    kept_turn,
    first_turn,
    moved_turn,
    merging_turn,
    a_turn_that_pushes_out,
    reading,
    an_end,
    an_uncounted_call,
    an_app_that_ends,
]


LIMITED = RoutingConfig((A, B), track_sessions=3)


def at_every_point(
    prepare: Callable[[PinLedger], Callable[[], object]], interrupt: Callable[[PinLedger], object]
) -> Iterator[tuple[PinLedger, PinLedger]]:
    """Yield a ledger interrupted at each point in turn, each with one that was not interrupted."""
    undisturbed = PinLedger(LIMITED)  # a config for each ledger would take longer than the rest
    interrupted(prepare(undisturbed), -1, gc.collect)  # Python 3.12 traces from the second run
    for at in itertools.count():
        pins = PinLedger(LIMITED)
        if not interrupted(prepare(pins), at, functools.partial(interrupt, pins)):
            break
        yield pins, undisturbed
    assert at > 10


class Compared(str):
    """A worker's name that makes a call whenever the ledger compares it."""

    __slots__ = ("call",)
    call: Callable[[], object]

    def __eq__(self, other: object) -> bool:
        self.call()
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_an_end_while_its_own_thread_is_at_work_is_done_after_that_work() -> None:
    """The name of a worker stands in for a finalizer, which may run at any point."""
    moves: list[Move] = []
    pins = ledger(on_move=moves.append)
    play(pins, ("a", W1), ("b", W1))

    class Name(str):
        __slots__ = ()

        def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
            pins.end("b")
            return super().encode(encoding, errors)

    watched(lambda: answered(begun(pins, "b"), Name(W2)))
    assert moves == [Move("b", W1, W2, 1)]  # as if the session had ended after the answer
    assert pins.of("b") == []
    assert pins.workers() == {W1: 1}
    assert pins.summary() == PinSummary(first=2, moved=1, sessions=1)


def test_an_end_while_another_thread_is_at_work_is_done_with_the_next_call() -> None:
    pins = ledger()
    play(pins, ("a", W1), ("b", W1))
    under_way, worker = begun(pins, "a"), Compared(W1)
    worker.call = functools.partial(end_in_a_thread, pins)
    watched(lambda: answered(under_way, worker))
    play(pins, ("a", W2))
    assert pins.of("a") == [SessionPin("a", A, "a", W2, 1, 0)]
    assert calls_of(pins) == 4


def beside_a_thread_at_work(pins: PinLedger, work: Callable[[], object]) -> None:
    """Start ``work`` in a thread while this one enters a turn of session "b"; wait for both."""
    under_way, worker = begun(pins, "b"), Compared(W1)
    thread = threading.Thread(target=work, daemon=True)

    def at_work() -> None:
        if thread.ident is None:
            thread.start()
            thread.join(0.1)  # seconds; it may be waiting for this thread

    worker.call = at_work
    watched(lambda: answered(under_way, worker))
    watched(thread.join)


def test_turns_of_a_thread_are_judged_by_those_before_while_another_one_is_at_work() -> None:
    pins = ledger()
    play(pins, ("a", W1), ("b", W1))
    beside_a_thread_at_work(pins, lambda: play(pins, ("a", W2), ("a", W2), ("a", W2)))
    assert pin_of(pins, "a") == SessionPin("a", A, "a", W2, 4, 1)
    assert pins.summary() == PinSummary(first=2, kept=3, moved=1, sessions=2)


def test_a_session_that_a_thread_ends_and_begins_while_another_one_is_at_work_is_new() -> None:
    pins = ledger()
    play(pins, ("a", W1), ("b", W1))

    def work() -> None:
        pins.end("a")
        play(pins, ("a", W2), ("a", W2))

    beside_a_thread_at_work(pins, work)
    assert pin_of(pins, "a") == SessionPin("a", A, "a", W2, 2, 0)
    assert pins.summary() == PinSummary(first=3, kept=2, sessions=2)


READERS: dict[str, Callable[[PinLedger], object]] = {
    "sessions": lambda pins: {pin.session for pin in pins.sessions()},
    "of": lambda pins: pins.of("a"),
    "workers": PinLedger.workers,
    "summary": lambda pins: pins.summary().sessions,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_thread_reads_what_it_has_entered_while_another_one_is_at_work(
    read: Callable[[PinLedger], object],
) -> None:
    pins = ledger()
    play(pins, ("a", W2), ("b", W1))
    seen: list[object] = []

    def work() -> None:
        pins.end("a")
        seen.append(read(pins))

    beside_a_thread_at_work(pins, work)
    assert seen == [read(pins)]


def ended_while_another_thread_begins_its_work(at: int) -> bool:
    """End a session; at point ``at`` another thread starts work. Tell whether it did."""
    pins = ledger()
    play(pins, ("a", W1), ("b", W1))
    is_at_work, is_ended, worker = threading.Event(), threading.Event(), Compared(W1)

    def work() -> None:
        if threading.current_thread() is other:  # this thread may run the other's work
            is_at_work.set()
            is_ended.wait()

    worker.call = work
    answer = functools.partial(answered, begun(pins, "a"), worker)
    other = threading.Thread(target=answer, daemon=True)

    def begin() -> None:
        other.start()
        is_at_work.wait(0.002)  # seconds; this thread may be in the ledger

    was_interrupted = interrupted(lambda: pins.end("b"), at, begin)
    is_ended.set()
    if other.ident is not None:
        other.join()
        play(pins, ("a", W1))
        assert [(pin.session, pin.calls) for pin in pins.sessions()] == [("a", 3)]
    return was_interrupted


def test_an_end_waits_for_no_other_thread_at_whatever_point_that_begins_its_work() -> None:
    """A finalizer may run while its thread holds a lock that the other thread waits for."""

    def check() -> None:
        points = itertools.count(-1)  # -1 warms up, as in at_every_point()
        assert next(at for at in points if not ended_while_another_thread_begins_its_work(at)) > 5

    watched(check)


@pytest.mark.thorough
@pytest.mark.parametrize("prepare", PREPARED)
@pytest.mark.parametrize("end", [lambda pins: pins.end("a"), end_in_a_thread])
def test_a_session_may_be_ended_at_any_point(
    prepare: Callable[[PinLedger], Callable[[], object]], end: Callable[[PinLedger], object]
) -> None:
    def check() -> None:
        for number, (pins, undisturbed) in enumerate(at_every_point(prepare, end)):
            if number % 2:
                assert pins.of("a") == []
            play(pins, ("a", W3))  # the session that ended left nothing
            assert [(pin.worker, pin.calls) for pin in pins.of("a")] == [(W3, 1)]
            assert calls_of(pins) == calls_of(undisturbed) + 1
            assert is_consistent(pins)

    watched(check)


@pytest.mark.thorough
@pytest.mark.parametrize("prepare", PREPARED)
def test_the_ledger_may_be_read_at_any_point(
    prepare: Callable[[PinLedger], Callable[[], object]],
) -> None:
    def check() -> None:
        for pins, undisturbed in at_every_point(prepare, read_all):
            assert pins.sessions() == undisturbed.sessions()
            assert pins.summary() == undisturbed.summary()
            assert is_consistent(pins)

    watched(check)


@pytest.mark.thorough
@pytest.mark.parametrize("prepare", PREPARED)
def test_a_turn_may_be_entered_at_any_point(
    prepare: Callable[[PinLedger], Callable[[], object]],
) -> None:
    def check() -> None:
        for pins, undisturbed in at_every_point(prepare, lambda pins: play(pins, ("e", W3))):
            assert calls_of(pins) == calls_of(undisturbed) + 1
            assert pin_of(pins, "e").calls == 1
            assert is_consistent(pins)

    watched(check)


@pytest.mark.thorough
@pytest.mark.parametrize("prepare", PREPARED)
def test_a_turn_that_is_kept_may_be_entered_at_any_point(
    prepare: Callable[[PinLedger], Callable[[], object]],
) -> None:
    under_way: list[PendingCall] = []

    def prepare_both(pins: PinLedger) -> Callable[[], object]:
        run = prepare(pins)
        play(pins, ("e", W3))
        under_way[:] = [begun(pins, "e")]
        return run

    def check() -> None:
        answer = lambda pins: answered(under_way[0], W3)  # noqa: E731
        for pins, undisturbed in at_every_point(prepare_both, answer):
            assert calls_of(pins) == calls_of(undisturbed) + 1
            assert pin_of(pins, "e").calls == 2
            assert is_consistent(pins)

    watched(check)


def calls_of(pins: PinLedger) -> int:
    summary = pins.summary()
    return summary.first + summary.kept + summary.moved + summary.unknown + summary.untagged


def test_a_finalizer_may_end_and_read_sessions_wherever_the_collector_runs() -> None:
    """It may also run within a C function, such as one that copies a dictionary."""
    pins = ledger(A, B, on_move=lambda move: None)
    finalized = 0

    class Rollout:
        """It refers to itself, so only the garbage collector frees it, at any moment."""

        def __init__(self, session_id: str) -> None:
            self.session_id, self.itself = session_id, self

        def __del__(self) -> None:
            nonlocal finalized
            finalized += 1
            pins.end(self.session_id)
            read_all(pins)

    def check() -> None:
        chance = random.Random(3)
        for number in range(300):
            session, gateway = f"s-{number % 7}", chance.choice((A, B))
            Rollout(f"s-{chance.randrange(7)}")
            play(pins, (session, chance.choice((W1, W2))), gateway=gateway)
            read_all(pins)

    threshold = gc.get_threshold()
    try:
        gc.set_threshold(1, 1, 1)
        watched(check)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert finalized == 300
    assert calls_of(pins) == 300
    assert is_consistent(pins)


@pytest.mark.thorough
def test_a_signal_handler_may_end_and_read_sessions() -> None:
    program = """
        import faulthandler, signal
        from collections import Counter
        from aiohttp_smg_routing import Routing
        from aiohttp_smg_routing.ledger import PendingCall

        faulthandler.dump_traceback_later(60, exit=True)
        pins = Routing({"gateway": "http://g"}).pins
        handled = 0

        def handle(*_):
            global handled
            handled += 1
            pins.end(f"s-{handled % 5}")
            pins.sessions(), pins.of("s-1"), pins.workers(), pins.summary()

        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        turns = 0
        while handled < 2000:
            turns += 1
            session = f"s-{turns % 5}"
            call = PendingCall(pins, "X-SMG-Routing-Key", session, "http://g", session)
            pins.answered(call, 200, {"X-SMG-Routed-Worker-Id": f"w-{turns % 3}"})
            pins.sessions()
        signal.setitimer(signal.ITIMER_REAL, 0)
        summary = pins.summary()
        assert summary.first + summary.kept + summary.moved == turns, summary
        assert pins.workers() == Counter(pin.worker for pin in pins.sessions())
    """
    python(program)


# Moves are reported to the log and to on_move.


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_move_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pins = ledger()
    play(pins, *[("s-17", W1)] * 5, ("s-17", W2), ("s-17", W2))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"session s-17 moved from {W1} to {W2} after call 5"


def moves_of(pins: PinLedger, count: int) -> None:
    """Play a turn, then ``count`` turns that each move to the other worker."""
    play(pins, *(("a", (W1, W2)[number % 2]) for number in range(count + 1)))


def one_by_one(caplog: pytest.LogCaptureFixture) -> int:
    return sum(" moved from " in line for line in lines(caplog))


def held_back(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [int(line.split()[0]) for line in lines(caplog) if " more " in line]


def test_a_run_of_moves_says_once_what_it_may_mean(caplog: pytest.LogCaptureFixture) -> None:
    pins = ledger()
    moves_of(pins, A_RUN - 1)
    assert len(caplog.records) == one_by_one(caplog) == A_RUN - 1
    moves_of(pins, 2 * A_RUN)
    [hint] = [line for line in lines(caplog) if " moved from " not in line]
    assert lines(caplog).index(hint) == A_RUN
    for cause in ("policy", "verify", "overloaded", "gone"):
        assert cause in hint


def test_moves_are_logged_one_by_one_up_to_the_cap(caplog: pytest.LogCaptureFixture) -> None:
    pins = ledger()
    moves_of(pins, LOGGED_A_MINUTE + 7)
    assert pins.summary().moved == LOGGED_A_MINUTE + 7
    assert one_by_one(caplog) == LOGGED_A_MINUTE
    assert held_back(caplog) == []


async def test_moves_that_the_cap_held_back_are_logged_when_the_minute_is_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_MINUTE", 0.5)  # seconds
    told, pins = asyncio.Event(), ledger()

    class Tells(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if " more " in record.getMessage():
                told.set()

    logger, handler = logging.getLogger("aiohttp_smg_routing"), Tells()
    logger.addHandler(handler)
    try:
        # On a slow machine this takes several of the shortened minutes.
        while one_by_one(caplog) == pins.summary().moved:
            moves_of(pins, 20)
        await asyncio.wait_for(told.wait(), A_HANG)  # without a further move
    finally:
        logger.removeHandler(handler)
    assert one_by_one(caplog) + sum(held_back(caplog)) == pins.summary().moved


def test_moves_that_the_cap_held_back_are_logged_at_the_next_move_where_no_loop_runs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = ledger()
    moves_of(pins, LOGGED_A_MINUTE + 7)
    monkeypatch.setattr(log, "_MINUTE", 0.0)
    caplog.clear()
    play(pins, ("a", W3))
    assert held_back(caplog) == [7]
    assert one_by_one(caplog) == 1
    assert pins.summary().moved == LOGGED_A_MINUTE + 8


async def test_moves_that_the_cap_held_back_are_logged_when_the_app_ends(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    app = pinned_server(URL(A))
    client = await aiohttp_client(app)
    moves_of(app[ROUTING].pins, LOGGED_A_MINUTE + 2)
    assert held_back(caplog) == []
    await client.close()
    assert held_back(caplog) == [2]


def test_on_move_gets_each_move() -> None:
    seen: list[Move] = []
    play(ledger(on_move=seen.append), ("a", W1), ("a", W2), ("a", W2), ("a", W1))
    assert seen == [Move("a", W1, W2, 1), Move("a", W2, W1, 3)]


def test_on_move_may_use_the_ledger() -> None:
    seen: list[object] = []

    def on_move(move: Move) -> None:
        seen.extend((pins.summary().moved, pin_of(pins, move.session).worker))
        pins.end(move.session)
        seen.append(pins.of(move.session))

    pins = ledger(on_move=on_move)
    watched(lambda: play(pins, ("a", W1), ("a", W2)))
    assert seen == [1, W2, []]


@contextmanager
def raising_handler() -> Iterator[None]:
    """Add a handler to the package's logger that raises at each record."""

    class Broken(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise OSError("no space left")

    logger, handler = logging.getLogger("aiohttp_smg_routing"), Broken()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


async def test_a_logging_handler_that_raises_fails_no_turn(
    gateway: Recorder, aiohttp_client: AiohttpClient, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Move] = []
    app = pinned_server(gateway.url, on_move=seen.append)
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1, W2, W1)
    with raising_handler():
        for _ in range(3):
            assert await turn(client) == 200
    assert app[ROUTING].pins.summary() == PinSummary(first=1, moved=2, sessions=1)
    assert len(seen) == 2
    assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
async def test_on_move_that_raises_fails_no_turn_and_is_logged_once(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    def broken(move: Move) -> None:
        raise error(f"after call {move.calls}")

    app = pinned_server(gateway.url, on_move=broken)
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1, W2, W1)
    for _ in range(3):
        assert await turn(client) == 200
    assert app[ROUTING].pins.summary() == PinSummary(first=1, moved=2, sessions=1)
    assert one_by_one(caplog) == 2
    [record] = [record for record in caplog.records if record.exc_info]
    assert "on_move" in record.getMessage()
    assert f"{error.__name__}: after call 1" in caplog.text


class Async:
    async def __call__(self, move: Move) -> None:
        raise AssertionError("nobody awaits it")

    async def method(self, move: Move) -> None:
        await self(move)


@pytest.mark.parametrize(
    "on_move", [Async(), Async().method, functools.partial(Async().method), Async.__call__]
)
def test_an_async_on_move_is_a_fault_of_the_config(on_move: object) -> None:
    with pytest.raises(ConfigError, match=r"on_move: .*async"):
        RoutingConfig(A, on_move=on_move)


async def test_an_on_move_that_turns_out_to_be_async_fails_no_turn_and_is_logged_once(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    asynchronous = Async()
    app = pinned_server(gateway.url, on_move=lambda move: asynchronous(move))
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1, W2, W1)
    for _ in range(3):
        assert await turn(client) == 200
    assert app[ROUTING].pins.summary() == PinSummary(first=1, moved=2, sessions=1)
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert "async" in caplog.text
    gc.collect()  # would warn of a coroutine that was never awaited


# The ledger that records a call of an app, or of a hook.


async def test_the_app_enters_every_call_in_its_ledger(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = pinned_server(gateway.url)
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
    assert app[ROUTING].pins.summary() == PinSummary(
        first=2, kept=1, moved=1, unknown=1, untagged=1, failed=4, missing=2, sessions=2
    )
    assert app[ROUTING].pins.workers() == {W2: 2}


@pytest.mark.parametrize(("status", "failed"), [(399, 0), (400, 1), (401, 1), (599, 1)])
@pytest.mark.parametrize("session_id", ["s-1", None])
async def test_a_status_of_400_or_more_is_failed(
    gateway: Recorder,
    outgoing: ClientSession,
    status: int,
    failed: int,
    session_id: str | None,
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    routing.attach(outgoing)
    gateway.answer = lambda call: answer(status=status, headers={"X-SMG-Routed-Worker-Id": W1})
    with routing_session(session_id):
        async with outgoing.post(gateway.chat) as response:
            assert response.status == status
    summary = routing.pins.summary()
    assert (summary.failed, summary.first + summary.untagged) == (failed, 1 - failed)
    assert routing.pins.workers() == ({W1: 1} if session_id and not failed else {})


async def test_other_calls_are_not_entered(
    gateway: Recorder, elsewhere: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = pinned_server(gateway.url)

    async def handler(request: web.Request) -> web.Response:
        async with request.app[CLIENT].post(elsewhere.url / "judge"):
            pass
        async with request.app[CLIENT].get(gateway.chat):
            return web.Response()

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 200
    summary = app[ROUTING].pins.summary()
    # Both recorders are on the same host, so the POST to the other one is a near miss.
    assert summary == PinSummary(unmatched=summary.unmatched)


async def test_a_call_is_entered_when_the_answers_head_is_there(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = pinned_server(gateway.url)
    gateway.answer = lambda call: (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nX-SMG-Routed-Worker-Id: w\r\n\r\n"
    )

    async def handler(request: web.Request) -> web.Response:
        async with request.app[CLIENT].post(gateway.chat):
            return web.Response(text=str(pin_of(request.app[ROUTING].pins, "s-1").worker))

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert await response.text() == "w"


async def test_a_redirected_call_is_entered_once_and_only_if_the_gateway_answers(
    gateway: Recorder, elsewhere: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = pinned_server(gateway.url)
    client = await aiohttp_client(app)
    named = by_worker(W1)
    gateway.answer = lambda call: named(call) if b"?" in call.start_line else redirect("?again")
    assert await turn(client) == 200
    gateway.answer = lambda call: redirect(elsewhere.chat)
    assert await turn(client) == 200
    summary = app[ROUTING].pins.summary()
    assert (calls_of(app[ROUTING].pins), summary.first, summary.sessions) == (1, 1, 1)


async def test_a_failed_call_is_counted_however_it_fails(
    gateway: Recorder, outgoing: ClientSession
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    routing.attach(outgoing)
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
    assert routing.pins.summary() == PinSummary(failed=3)


async def test_two_hooks_on_one_session_count_a_call_once(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    """A call counts in the ledger of the app that handles the request, whichever hook sees it."""
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
    one, two = (app[ROUTING].pins for app in apps)
    assert one.summary() == PinSummary(first=1, sessions=1)
    assert two.summary() == PinSummary(first=1, moved=1, untagged=1, missing=1, sessions=1)


async def test_a_hook_of_the_users_own_enters_calls_of_a_request_in_the_apps_ledger(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    config = RoutingConfig(gateway.url)
    app = web.Application()
    app.router.add_post("/sessions/{session_id}/v1/chat/completions", naive_proxy(gateway.url))
    setup(app, config)
    users_own = Routing(config)
    async with ClientSession(trace_configs=[users_own.trace_config()]) as app[CLIENT]:
        client = await aiohttp_client(app)
        assert await turn(client) == 200
    assert app[ROUTING].pins.summary() == PinSummary(unknown=1, sessions=1)
    assert users_own.pins.summary() == PinSummary()


async def test_calls_outside_a_request_count_in_the_ledger_of_the_app_that_attached_the_hook(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = pinned_server(gateway.url)
    await aiohttp_client(app)
    gateway.answer = by_worker(W1, W1, W1)
    with routing_session("job"):
        for _ in range(2):
            async with app[CLIENT].post(gateway.chat):
                pass
    async with app[CLIENT].post(gateway.chat):
        pass
    assert app[ROUTING].pins.summary() == PinSummary(
        first=1, kept=1, untagged=1, missing=1, sessions=1
    )


async def test_a_block_within_a_request_counts_in_the_apps_ledger(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    """The hook belongs to another routing; the ledger still has this app's form of key."""
    app = web.Application()
    Routing(RoutingConfig(gateway.url)).attach(outgoing)

    async def handler(request: web.Request) -> web.Response:
        with routing_session("bearer-token"):
            async with outgoing.post(gateway.chat):
                return web.Response()

    app.router.add_post("/", handler)
    config = RoutingConfig(gateway.url, key="digest", secret="k")
    routing = setup(app, config)
    client = await aiohttp_client(app)
    async with client.post("/") as response:
        assert response.status == 200
    assert [pin.session for pin in routing.pins.sessions()] == [config.routing_key("bearer-token")]


async def test_digest_never_shows_the_session_id(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aiohttp_smg_routing")
    moves: list[Move] = []
    app = pinned_server(gateway.url, key="digest", on_move=moves.append, session_id="header:Token")
    gateway.answer = by_worker(W1, W2)
    client = await aiohttp_client(app)
    for _ in range(2):
        async with client.post("/v1/chat/completions", headers={"Token": "hush-hush"}):
            pass
    pins = app[ROUTING].pins
    shown = [pins.sessions(), pins.of("hush-hush"), pins.summary(), moves, gateway.last.keys]
    assert app[ROUTING].config.routing_key("hush-hush") in str(shown)
    assert "moved from" in caplog.text
    assert "hush-hush" not in f"{shown}{caplog.text}"


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
    assert [app[ROUTING].pins.summary() for app, _ in apps] == [PinSummary(), PinSummary()]


async def test_a_call_counts_in_the_ledger_of_the_routing_that_found_the_session(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    config = RoutingConfig(gateway.url, session_id="query:sid")
    inbound, outbound = Routing(config), Routing(config)
    outbound.attach(outgoing)
    app = web.Application(middlewares=[inbound.middleware])
    app[CLIENT] = outgoing
    app.router.add_post("/", naive_proxy(gateway.url))
    client = await aiohttp_client(app)
    async with client.post("/?sid=s-1"):
        pass
    assert gateway.last.keys == [b"s-1"]
    assert inbound.pins.summary() == PinSummary(unknown=1, sessions=1)
    assert outbound.pins.summary() == PinSummary()


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
    expected = [PinSummary(unknown=1, sessions=1)] * 2
    assert [app[ROUTING].pins.summary() for app, _ in apps] == expected


async def test_a_job_counts_once_in_the_ledger_of_the_first_hook_on_the_session(
    gateway: Recorder, outgoing: ClientSession
) -> None:
    config = RoutingConfig(gateway.url)
    first, second = Routing(config), Routing(config)
    for routing in (first, second, first):
        routing.attach(outgoing)
    with routing_session("job"):
        async with outgoing.post(gateway.chat):
            pass
    assert gateway.last.keys == [b"job"]
    assert first.pins.summary() == PinSummary(unknown=1, sessions=1)
    assert second.pins.summary() == PinSummary()


async def test_another_hook_that_raises_is_no_second_outcome(gateway: Recorder) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    other = TraceConfig()
    other.on_request_end.append(broken)
    routing = Routing(RoutingConfig(gateway.url))
    async with ClientSession(trace_configs=[routing.trace_config(), other]) as session:
        with routing_session("s-1"), pytest.raises(ZeroDivisionError):
            await session.post(gateway.chat)
    assert routing.pins.summary() == PinSummary(unknown=1, sessions=1)


@pytest.mark.parametrize(
    "unnamed", [answer(headers={"X-SMG-Routed-Worker-Id": ""}), answer(status=307)]
)
async def test_an_answer_that_names_no_worker_is_unknown(
    gateway: Recorder, aiohttp_client: AiohttpClient, unnamed: bytes
) -> None:
    app = pinned_server(gateway.url)
    client = await aiohttp_client(app)
    gateway.answer = lambda call: unnamed
    await turn(client)
    assert app[ROUTING].pins.summary() == PinSummary(unknown=1, sessions=1)
    assert app[ROUTING].pins.workers() == {}


async def test_no_tracking_no_ledger(gateway: Recorder, aiohttp_client: AiohttpClient) -> None:
    app = pinned_server(gateway.url, track_sessions=0)
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1, W2)
    for _ in range(2):
        assert await turn(client) == 200
    assert gateway.last.keys == [b"s-1"]
    gateway.answer = lambda call: answer(status=503)
    assert await turn(client) == 503
    async with client.post("/v1/chat/completions"):
        pass
    assert app[ROUTING].pins.summary() == PinSummary()
    app[ROUTING].end("s-1")


@pytest.mark.parametrize("hide", [False, True])
async def test_a_gateway_may_name_the_worker_in_another_header(
    gateway: Recorder, aiohttp_client: AiohttpClient, hide: bool
) -> None:
    app = pinned_server(gateway.url, hide_worker_ids=hide, worker_header="X-Served-By")

    async def passing_headers_on(request: web.Request) -> web.StreamResponse:
        async with request.app[CLIENT].post(gateway.chat) as answer:
            return web.Response(headers=answer.headers, body=await answer.read())

    app.router.add_post("/{session_id}", passing_headers_on)
    client = await aiohttp_client(app)
    gateway.answer = lambda call: answer(b"{}", headers={"x-served-by": W1})
    async with client.post("/s-1") as response:
        assert response.headers.getall("X-Served-By", []) == ([] if hide else [W1])
    gateway.answer = by_worker(W2)  # names no worker in X-Served-By
    async with client.post("/s-1") as response:
        assert response.headers.getall("X-SMG-Routed-Worker-Id", []) == [W2]
    assert app[ROUTING].pins.of("s-1") == [SessionPin("s-1", str(gateway.url), "s-1", W1, 2, 0)]
