"""The ledger sees where each call went: the worker of every session, and every move."""

import itertools
import logging
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol, get_args

from .config import RoutingConfig
from .key import SessionId, as_session_id
from .values import sync_function

logger = logging.getLogger(__name__)

Outcome = Literal["first", "kept", "moved", "unknown", "untagged", "failed"]

MOVES_LOGGED_PER_MINUTE = 60
_BEFORE = 3  # as many moves as can overlap with one turn, and more


@dataclass(frozen=True, slots=True)
class PinSummary:
    """How many calls to the gateway had which outcome, and how many sessions are tracked.

    An evicted or forgotten session's calls stay in the counts.
    """

    first: int = 0
    """The session was seen on a worker for the first time."""
    kept: int = 0
    """It was on the worker that served it before."""
    moved: int = 0
    """It was on another one."""
    unknown: int = 0
    """The answer did not name its worker: SMG before 1.10, or gRPC workers."""
    untagged: int = 0
    """The call had no session."""
    failed: int = 0
    """The call raised, or was answered with a status of 400 or more: it says nothing of a pin."""
    sessions: int = 0
    """The sessions that are tracked now."""


class SessionPin(NamedTuple):
    """Where a session is pinned."""

    worker: str | None
    """The worker that served it last, as the gateway names it; None where it never did."""
    turns: int
    """Its answered calls."""
    moves: int
    """How often it changed its worker."""
    since: int
    """The number of the call that came to ``worker`` first: calls are numbered as they start."""
    newest: int
    """The number of the newest call that was answered."""
    before: tuple[str, ...] = ()
    """Its workers before, the last one first: no more than three."""


@dataclass(frozen=True, slots=True)
class Move:
    """A session's calls went to one worker and now go to another."""

    session: str
    """Its routing key: the session id itself, unless that goes out as a digest."""
    from_worker: str
    to_worker: str
    turns: int
    """The session's answered calls before this one."""


class Metrics(Protocol):
    """What the ledger tells the metrics."""

    def called(self, outcome: Outcome) -> None:
        """Count a call."""

    def missing(self) -> None:
        """Count a call that matched but had no session."""

    def pinned(self, worker: str, change: int) -> None:
        """Add ``change`` to the sessions of a worker."""


class PinLedger:
    """What an app's calls to its gateways show of the pins; ``app[PINS]`` after ``setup()``.

    Sessions are named by their routing key: the session id itself, unless that goes out as a
    digest. The ``config.track_sessions`` that called last are kept. It may be used from any thread.

    >>> app[PINS].summary().moved
    0
    """

    def __init__(
        self,
        config: RoutingConfig,
        *,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._metrics = metrics
        self._metrics_failed = False
        self._on_move = sync_function(config.on_move) if config.on_move else None
        self._clock = clock
        self._lock = threading.Lock()
        #: Returns the number of a call that starts now.
        self.start: Callable[[], int] = itertools.count(1).__next__
        self._sessions: OrderedDict[str, SessionPin] = OrderedDict()
        self._workers: Counter[str] = Counter()
        self._calls: dict[str, int] = dict.fromkeys(get_args(Outcome), 0)
        self._minute = clock()
        self._logged = self._held_back = 0

    def sessions(self) -> Mapping[str, SessionPin]:
        """Return a live, read-only view of the tracked sessions; the last one called last.

        Copy it before you await while you go through it: ``dict(ledger.sessions())``.
        """
        return MappingProxyType(self._sessions)

    def workers(self) -> dict[str, int]:
        """Return how many of the tracked sessions each worker has."""
        with self._lock:
            return dict(self._workers)

    def summary(self) -> PinSummary:
        """Return the counts of all calls so far."""
        with self._lock:
            return PinSummary(**self._calls, sessions=len(self._sessions))

    def forget(self, session_id: SessionId) -> None:
        """Stop tracking a session, one that has ended say; nothing happens if it is not tracked."""
        if (text := as_session_id(session_id)) is not None:
            with self._lock:
                self._drop(self._sessions.pop(self.config.routing_key(text), None))

    def missing(self) -> None:
        """Note a call that matched but had no session."""
        self._tell(lambda metrics: metrics.missing())

    def count(self, outcome: Outcome) -> None:
        """Count a call that shows nothing of a pin: ``untagged`` or ``failed``."""
        with self._lock:
            self._count(outcome)

    def answered(self, key: str, worker: str | None, number: int) -> None:
        """Enter the answer to the call ``number`` of the session with the routing key ``key``."""
        with self._lock:
            sessions = self._sessions
            pin = sessions.get(key)
            if pin and pin.newest < number and pin.worker == worker and worker:
                # So nearly every turn ends: tuple.__new__() takes half the time of SessionPin().
                after = (pin.worker, pin.turns + 1, pin.moves, pin.since, number, pin.before)
                sessions[key] = tuple.__new__(SessionPin, after)
                sessions.move_to_end(key)
                self._calls["kept"] += 1
                if self._metrics:
                    self._tell_called("kept")
                return
            worker = worker and sys.intern(worker)  # each answer has a text of its own
            entered, outcome, move = _enter(key, pin, worker, number)
            sessions[key] = entered
            sessions.move_to_end(key)
            self._count(outcome)
            if pin is None or pin.worker != entered.worker:
                self._drop(pin)
                self._pinned(entered.worker, +1)
            if len(sessions) > self.config.track_sessions:
                self._drop(sessions.popitem(last=False)[1])
        if move:
            self._moved(move)

    def close(self) -> None:
        """End with the app: log what the cap held back, and take its sessions off the metrics.

        What the ledger holds can still be read.
        """
        self._log_held_back()
        with self._lock:
            for worker, sessions in self._workers.items():
                self._metrics_pinned(worker, -sessions)
            self._metrics = None

    def _log_held_back(self) -> None:
        """Log how many moves the cap on log records held back, if it did."""
        with self._lock:
            held_back, self._held_back = self._held_back, 0
        if held_back:
            logger.warning(
                "%d more moves: no more than %d a minute are logged one by one",
                held_back,
                MOVES_LOGGED_PER_MINUTE,
            )

    def _count(self, outcome: Outcome) -> None:
        self._calls[outcome] += 1
        self._tell_called(outcome)

    def _tell_called(self, outcome: Outcome) -> None:
        self._tell(lambda metrics: metrics.called(outcome))

    def _tell(self, what: Callable[[Metrics], None]) -> None:
        """Tell the metrics; what goes wrong there is logged once, and no call fails of it."""
        if self._metrics:
            try:
                what(self._metrics)
            except Exception:
                if not self._metrics_failed:
                    self._metrics_failed = True
                    logger.exception("the metrics failed: further failures are not logged")

    def _drop(self, pin: SessionPin | None) -> None:
        if pin:
            self._pinned(pin.worker, -1)

    def _pinned(self, worker: str | None, change: int) -> None:
        if worker is None:
            return
        self._workers[worker] += change
        if not self._workers[worker]:
            del self._workers[worker]
        self._metrics_pinned(worker, change)

    def _metrics_pinned(self, worker: str, change: int) -> None:
        self._tell(lambda metrics: metrics.pinned(worker, change))

    def _moved(self, move: Move) -> None:
        with self._lock:
            new_minute = self._clock() - self._minute >= 60
            if new_minute:
                self._minute, self._logged = self._clock(), 0
            is_logged = self._logged < MOVES_LOGGED_PER_MINUTE
            self._logged += is_logged
            self._held_back += not is_logged
        if new_minute:
            self._log_held_back()
        if is_logged:
            logger.warning(
                "session %s moved from %s to %s after %d turns",
                move.session,
                move.from_worker,
                move.to_worker,
                move.turns,
            )
        if self._on_move:
            try:
                self._on_move(move)
            except Exception:
                logger.exception("on_move failed: the call goes on")


def _enter(
    key: str, pin: SessionPin | None, worker: str | None, number: int
) -> tuple[SessionPin, Outcome, Move | None]:
    """Return the session's pin after an answer, its outcome, and the move if there was one.

    Turns of a session can overlap: an answer is judged by when its call started. One that comes
    late, from where the session was before it moved, is no move back.
    """
    if pin is None:
        outcome: Outcome = "unknown" if worker is None else "first"
        return SessionPin(worker, 1, 0, number, number), outcome, None
    late = number < pin.newest
    seen = pin._replace(turns=pin.turns + 1, newest=max(number, pin.newest))
    if worker is None:
        return seen, "unknown", None
    if pin.worker is None:
        return seen._replace(worker=worker, since=number), "first", None
    if worker == pin.worker or (number < pin.since and worker in pin.before):
        return seen, "kept", None
    seen = seen._replace(moves=pin.moves + 1)
    if late:
        # It stays where its newer calls went, and was on ``worker`` before, or in between.
        seen = seen._replace(before=(*pin.before, worker)[:_BEFORE])
        return seen, "moved", Move(key, worker, pin.worker, pin.turns)
    seen = seen._replace(worker=worker, since=number, before=(pin.worker, *pin.before)[:_BEFORE])
    return seen, "moved", Move(key, pin.worker, worker, pin.turns)
