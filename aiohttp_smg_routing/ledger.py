"""The ledger records which worker answered which session, and every move."""

import logging
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple
from functools import partial
from weakref import WeakValueDictionary

from multidict import istr

from .config import RoutingConfig
from .gateway import Gateways
from .keys import SessionId, as_session_id
from .log import Capped, News
from .metrics import Counted, Metrics
from .pins import Beside, Move, Outcome, PinSummary, Row, SessionPin, Workers

_MOST_PINS = 64  # of one session
_HINT = "the policy may ignore the key (see verify), or a worker is overloaded or gone"


class PendingCall:
    """A call under way: what it carries, and which worker its session had when it began."""

    __slots__ = ("__weakref__", "gateway", "header", "key", "ledger", "row", "session", "worker")

    def __init__(self, ledger: "PinLedger", header: str, session: str, gateway: str, key: str):
        self.ledger: PinLedger = ledger
        self.header: str = header
        self.session: str = session
        self.gateway: str = gateway
        self.key: str = key
        self.row: Row | None = ledger._row_of(self) if header and ledger._is_on else None
        self.worker: str | None = self.row.worker if self.row else None
        if header and ledger._is_on and not self.row:
            ledger._beginning[id(self)] = self


class PinLedger:
    """Which worker answered which session of an app: ``app[ROUTING].pins``.

    It keeps the ``track_sessions`` sessions that called last. Any thread, finalizer or
    signal handler may use it at any point.
    """

    # Not public: count(), answered(), show(), news and worker_header.
    def __init__(self, config: RoutingConfig, metrics: Metrics | None = None) -> None:
        self._is_on = config.enabled and config.track_sessions > 0
        self.worker_header: istr = istr(config.worker_header)
        # Those that have no row yet.
        self._beginning: WeakValueDictionary[int, PendingCall] = WeakValueDictionary()
        self.news: News = News(logger := logging.getLogger(__name__))
        self._config, self._metrics, self._gateways = config, metrics, Gateways(config.gateway)
        self._rows: OrderedDict[str, tuple[Row, ...]] = OrderedDict()
        self._workers, self._counts = Workers(), asdict(PinSummary())
        self._lock, self._is_working, self._is_shown = threading.RLock(), False, True
        self._waiting: deque[partial[None]] = deque()  # work to do under the lock, in order
        self._moves_log = Capped(logger, "moves", _HINT)

    def sessions(self) -> list[SessionPin]:
        """Return the pins of all tracked sessions; the session that called last comes last."""
        self._catch_up()
        return [row.pin() for rows in list(self._rows.values()) for row in rows]

    def of(self, session_id: SessionId) -> list[SessionPin]:
        """Return a session's pins: one, unless it has several keys or gateways; none if unknown."""
        self._catch_up()
        return [row.pin() for row in self._rows.get(self._name(session_id), ())]

    def workers(self, within: float | None = None) -> dict[str, int]:
        """Return each worker's pin count: all, or those used in the last ``within`` seconds."""
        self._catch_up()
        return self._workers.active(self._rows, within)

    def calls(self, within: float = 600) -> dict[str, int]:
        """Return how many calls in sessions each worker answered in the last ``within`` seconds.

        It counts in steps of ten seconds. ``within`` is 0 to 600, the default; otherwise it raises
        ``ValueError``.
        """
        self._catch_up()
        return self._workers.calls(within)

    def summary(self) -> PinSummary:
        """Return the counts of all calls so far, including those of sessions that have ended."""
        self._catch_up()
        return PinSummary(**{**self._counts, "sessions": len(self._rows)})

    def end(self, session_id: SessionId) -> None:
        """Forget a session that is over, even if answers to its calls are still under way."""
        self._waiting.append(partial(self._end, self._name(session_id)))
        # A finalizer may call this, so it must not wait. The next call updates the metrics.
        if self._lock.acquire(blocking=False):
            try:
                self._catch_up()
            finally:
                self._lock.release()

    def count(self, what: Outcome | Beside) -> None:
        """Count a call that shows nothing about a pin, or an event beside its outcome."""
        if self._is_on:
            self._waiting.append(partial(self._count, what))
            self._catch_up()
            self.news.tell()

    def answered(self, call: PendingCall, status: int, headers: Mapping[str, str]) -> None:
        """Enter the answer to a call: how it went, and which worker its headers name."""
        if status >= 400 or not (call.header and self._is_on):
            self.count("failed" if status >= 400 else "untagged")
            return
        row, worker, now = call.row, headers.get(self.worker_header) or None, time.monotonic()
        with self._lock:
            is_outer, self._is_working = not self._is_working, True
            try:
                is_plain = not (self._waiting or self._metrics or now >= self._workers.until)
                is_kept = row and worker == call.worker == row.worker
                if row and worker and is_kept and is_plain and is_outer:  # nearly every turn
                    row.calls, row.answered = row.calls + 1, now
                    self._rows.move_to_end(row.session)
                    self._workers.lately[worker] += 1
                    self._counts["kept"] += 1
                else:
                    self._waiting.append(partial(self._answered, call, worker))
            finally:
                self._is_working = not is_outer
        if self._waiting:
            self._catch_up()
        if self.news.waiting:
            self.news.tell()

    def show(self, is_shown: bool) -> None:
        """Export the pins as metrics when the app starts, and stop that when it ends."""
        self._waiting.append(partial(self._show, is_shown))
        self._catch_up()
        self._moves_log.flush()
        self.news.tell()

    def _row_of(self, call: PendingCall) -> Row | None:
        """Return the row of a call's pin, if there is one."""
        if self._waiting:  # its session may have ended in the meantime
            self._catch_up()
        gateway = self._gateways.group[call.gateway]
        for row in self._rows.get(call.session, ()):
            if row.key == call.key and row.gateway == gateway:
                return row
        return None

    def _name(self, session_id: SessionId) -> str:
        text = as_session_id(session_id)
        return "" if text is None else self._config.routing_key(text)

    def _catch_up(self) -> None:
        """Do the waiting work. Code that interrupts this method adds its own work to the queue."""
        with self._lock:
            if self._is_working:
                return
            self._is_working = True
            try:
                while self._waiting:
                    self._waiting.popleft()()
            finally:
                self._is_working = False

    def _to_metrics(self, what: Counted, worker: str | None, change: int) -> None:
        if self._metrics:
            self.news.add("metrics", partial(self._metrics, what, worker, change))

    def _count(self, what: Outcome | Beside, worker: str | None = None) -> None:
        self._counts[what] += 1
        if worker is not None:
            self._workers.called(worker)
        self._to_metrics(what, worker, 1)

    def _show(self, is_shown: bool) -> None:
        for worker, pins in self._workers.pins.items() if is_shown != self._is_shown else ():
            self._to_metrics("pinned", worker, pins if is_shown else -pins)
        self._is_shown = is_shown

    def _end(self, session: str) -> None:
        rows = {(row.gateway, row.key): row for row in self._rows.pop(session, ())}
        for call in [it() for it in self._beginning.valuerefs()]:  # copied in one step
            if call is not None and call.session == session and call.row is None:
                pin = self._gateways.group[call.gateway], call.key
                call.row = rows.setdefault(pin, Row(session, *pin))
        self._drop(rows.values())

    def _drop(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._pinned(row.worker, -1)
            row.worker, row.is_over = None, True

    def _pinned(self, worker: str | None, change: int) -> None:
        if worker is not None:
            self._workers.pinned(worker, change)
            if self._is_shown:
                self._to_metrics("pinned", worker, change)

    def _answered(self, call: PendingCall, worker: str | None) -> None:
        if worker is not None:
            worker = worker.encode("utf-8", "backslashreplace").decode()  # it may not be UTF-8
            if len(self._gateways.group) > 1 and self._gateways.named(call.gateway, worker):
                self._merge()
        row = (call.row or self._row_of(call) or self._entered(call)).merged()
        was = call.worker or row.first
        if not row.is_over:
            if worker is not None and worker not in (was, row.worker):
                self._move(row, sys.intern(worker))
            row.calls, row.answered = row.calls + 1, time.monotonic()
            self._rows.move_to_end(row.session)
        row.first = row.first or worker
        outcome: Outcome = "first" if was is None else "kept" if worker == was else "moved"
        self._count("unknown" if worker is None else outcome, worker)

    def _entered(self, call: PendingCall) -> Row:
        """Enter the row of a pin at its first answer."""
        row = Row(call.session, self._gateways.group[call.gateway], call.key)
        there = self._rows.get(row.session, ())
        self._drop(there[: 1 - _MOST_PINS])
        self._rows[row.session] = (*there[1 - _MOST_PINS :], row)
        if len(self._rows) > self._config.track_sessions:
            self._drop(self._rows.popitem(last=False)[1])
        return row

    def _move(self, row: Row, worker: str) -> None:
        if row.worker is None:
            row.first = worker
        else:
            row.moves += 1
            move = Move(row.session, row.worker, worker, row.calls)
            message = "session %s moved from %s to %s after call %d"
            self.news.add("the log", partial(self._moves_log.warn, message, *astuple(move)))
            if self._config.on_move:
                self.news.add("on_move", partial(self._config.on_move, move))
        self._pinned(row.worker, -1)
        self._pinned(worker, +1)
        row.worker = worker

    def _merge(self) -> None:
        """Merge the rows whose gateways now count as one."""
        for session, rows in self._rows.items():
            kept: dict[tuple[str, str], Row] = {}
            for row in rows:
                row.gateway = self._gateways.group[row.gateway]
                into = kept.setdefault((row.gateway, row.key), row)
                if into is not row:
                    if into.worker is not None:
                        self._pinned(row.worker, -1)
                    into.absorb(row)
            self._rows[session] = tuple(kept.values())
