"""The ledger sees where each call went: the worker of every session, and every move."""

import logging
import sys
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from functools import partial
from weakref import WeakValueDictionary

from .config import RoutingConfig
from .gateway import Gateways
from .keys import SessionId, as_session_id
from .log import Capped, News
from .metrics import Beside, Counted, Metrics, Move, Outcome, PinSummary, Row, SessionPin

_MOST_PINS = 64  # of one session


class Call:
    """A call that is under way: the header with its key, and where its session was at its start."""

    __slots__ = ("gateway", "header", "ledger", "row", "worker")

    def __init__(self, ledger: "PinLedger", header: str, name: str, gateway: str, key: str) -> None:
        self.ledger, self.header, self.gateway = ledger, header, gateway
        self.row: Row | None = None
        self.worker: str | None = None
        if header and ledger.is_on:
            if ledger.waiting:  # a session that has ended meanwhile
                ledger.catch_up()
            gateway = ledger.gateways.group[gateway]
            for row in ledger.rows.get(name, ()):
                if row.key == key and row.gateway == gateway:
                    self.row, self.worker = row, row.worker
                    return
            self.row = ledger.opened(name, gateway, key)


class PinLedger:
    """What an app's calls to its gateways show of the pins: ``app[ROUTING].pins``.

    It keeps the ``config.track_sessions`` sessions that called last. It may be used from any
    thread, and at any point: also by a finalizer or a signal handler that interrupts it.

    >>> app[ROUTING].pins.summary().kept
    """

    def __init__(self, config: RoutingConfig, metrics: Metrics | None = None) -> None:
        self.is_on = config.enabled and config.track_sessions > 0
        self.rows: OrderedDict[str, tuple[Row, ...]] = OrderedDict()
        self.gateways = Gateways(config.gateway)
        self._config, self._metrics = config, metrics
        self._opening: WeakValueDictionary[tuple[str, str, str], Row] = WeakValueDictionary()
        self._workers: Counter[str] = Counter()
        self._counts = dict.fromkeys((it.name for it in fields(PinSummary)), 0)
        self._lock, self._is_working, self._is_shown = threading.RLock(), False, True
        self.waiting: deque[partial[None]] = deque()  # done under the lock, one after the other
        logger = logging.getLogger(__name__)
        self.news = News(logger)
        hint = "the policy may ignore the key (see verify), or a worker is overloaded or gone"
        self._moves_log = Capped(logger, "moves", hint)

    def sessions(self) -> list[SessionPin]:
        """Return the pins of the tracked sessions; the last one called last."""
        with self._turn():
            return [row.pin() for rows in self.rows.values() for row in rows]

    def of(self, session_id: SessionId) -> list[SessionPin]:
        """Return the pins of one session: one, unless it has several keys or gateways."""
        with self._turn():
            return [row.pin() for row in self.rows.get(self._name(session_id), ())]

    def workers(self) -> dict[str, int]:
        """Return how many of the tracked pins each worker has."""
        with self._turn():
            return dict(self._workers)

    def summary(self) -> PinSummary:
        """Return the counts of all calls so far, those of sessions that have ended among them."""
        with self._turn():
            return PinSummary(**{**self._counts, "sessions": len(self.rows)})

    def end(self, session_id: SessionId) -> None:
        """Forget a session that is over; answers to calls that began before leave no row."""
        self.waiting.append(partial(self._end, self._name(session_id)))
        if self._lock.acquire(blocking=False):  # else whoever has it does it, or the next call
            try:
                self.catch_up()
            finally:
                self._lock.release()

    def count(self, what: Outcome | Beside) -> None:
        """Count a call that shows nothing of a pin, or what was seen beside an outcome."""
        if self.is_on:
            self._do(partial(self._count, what))

    def answered(self, call: Call, worker: str | None) -> None:
        """Enter the answer to a call that carried a key, by the ``worker`` that it names."""
        if (row := call.row) is None:
            return
        with self._lock:  # nearly every turn ends here, without a further call
            is_outer, self._is_working = not self._is_working, True
            try:
                is_kept = row.turns and worker is not None and worker == call.worker == row.worker
                is_plain = is_outer and not (row.is_gone or self.waiting or self._metrics)
                if is_kept and is_plain:
                    row.turns += 1
                    self.rows.move_to_end(row.name)
                    self._counts["kept"] += 1
                    return
            finally:
                self._is_working = not is_outer
        if worker is not None and not worker.isascii():  # bytes that may not be UTF-8
            worker = worker.encode("utf-8", "backslashreplace").decode()
        self._do(partial(self._answered, call, row, worker))

    def opened(self, name: str, gateway: str, key: str) -> Row:
        """Return the row of a pin that has no answer yet: one for all calls that are under way."""
        with self._turn():
            return self._opening.setdefault((name, gateway, key), Row(name, gateway, key))

    def show(self, is_shown: bool) -> None:
        """Put the pins on the metrics when the app starts, and take them off when it ends."""
        with self._turn():
            for worker, pins in self._workers.items() if is_shown != self._is_shown else ():
                self._to_metrics("pinned", worker, pins if is_shown else -pins)
            self._is_shown = is_shown
        self._moves_log.flush()
        self.news.tell()

    def _name(self, session_id: SessionId) -> str:
        text = as_session_id(session_id)
        return "" if text is None else self._config.routing_key(text)

    def catch_up(self) -> None:
        """Do the work that waits."""
        with self._turn():
            pass

    def _do(self, work: "partial[None]") -> None:
        self.waiting.append(work)
        self.catch_up()
        self.news.tell()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock, once the waiting work is done. What interrupts it leaves work to it."""
        with self._lock:
            is_outer, self._is_working = not self._is_working, True
            try:
                while is_outer and self.waiting:
                    self.waiting.popleft()()
                yield
            finally:
                self._is_working = not is_outer

    def _to_metrics(self, what: Counted, worker: str | None, change: int) -> None:
        if self._metrics:
            self.news.add("metrics", partial(self._metrics, what, worker, change))

    def _count(self, what: Outcome | Beside, worker: str | None = None) -> None:
        self._counts[what] += 1
        self._to_metrics(what, worker, 1)

    def _end(self, name: str) -> None:
        self._drop(self.rows.pop(name, ()))
        for row in [it() for it in self._opening.valuerefs()]:  # copied in one step
            if row is not None and row.name == name:
                row.is_gone = True
                self._opening.pop((name, row.gateway, row.key), None)

    def _drop(self, rows: Iterable[Row]) -> None:
        for row in rows:
            row.is_gone = True
            self._pinned(row.worker, -1)

    def _pinned(self, worker: str | None, change: int) -> None:
        if worker is not None:
            self._workers[worker] += change
            if not self._workers[worker]:
                del self._workers[worker]
            if self._is_shown:
                self._to_metrics("pinned", worker, change)

    def _answered(self, call: Call, row: Row, worker: str | None) -> None:
        if worker is not None and self.gateways.named(call.gateway, worker):
            self._merge()
        while isinstance(row.is_gone, Row):
            row = row.is_gone
        if not (row.is_gone or row.turns):
            row = self._entered(row)
        was = call.worker or row.first
        if not row.is_gone:
            if worker is not None and worker not in (was, row.worker):
                self._move(row, sys.intern(worker))
            row.turns += 1
            self.rows.move_to_end(row.name)
        row.first = row.first or worker
        known: Outcome = "first" if was is None else "kept" if worker == was else "moved"
        self._count("unknown" if worker is None else known, worker)

    def _entered(self, row: Row) -> Row:
        """Enter a row at its first answer; return the one that is there for that pin."""
        # Calls find it in the rows from now on.
        self._opening.pop((row.name, row.gateway, row.key), None)
        row.gateway = self.gateways.group[row.gateway]
        there = self.rows.get(row.name, ())
        for other in there:
            if (other.key, other.gateway) == (row.key, row.gateway):
                row.is_gone = other
                return other
        self._drop(there[: 1 - _MOST_PINS])
        self.rows[row.name] = (*there[1 - _MOST_PINS :], row)
        if len(self.rows) > self._config.track_sessions:
            self._drop(self.rows.popitem(last=False)[1])
        return row

    def _move(self, row: Row, worker: str) -> None:
        if row.worker is None:
            row.first = worker
        else:
            row.moves += 1
            move = Move(row.name, row.worker, worker, row.turns)
            message = "session %s moved from %s to %s after %d turns"
            self.news.add("the log", partial(self._moves_log.warn, message, *astuple(move)))
            if self._config.on_move:
                self.news.add("on_move", partial(self._config.on_move, move))
        self._pinned(row.worker, -1)
        self._pinned(worker, +1)
        row.worker = worker

    def _merge(self) -> None:
        """Make one row of those whose gateways count as one since."""
        for name, rows in self.rows.items():
            kept: dict[tuple[str, str], Row] = {}
            for row in rows:
                row.gateway = self.gateways.group[row.gateway]
                into = kept.setdefault((row.gateway, row.key), row)
                if into is row:
                    continue
                row.is_gone = into
                into.turns, into.moves = into.turns + row.turns, into.moves + row.moves
                if into.worker is None:
                    into.first, into.worker = row.first, row.worker
                else:
                    self._pinned(row.worker, -1)
            self.rows[name] = tuple(kept.values())
