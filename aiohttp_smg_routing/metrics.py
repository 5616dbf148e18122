"""What the ledger counts, and its export to Prometheus, which needs the extra ``metrics``."""

import os
import threading
import time
from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary, WeakSet

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

Outcome = Literal["first", "kept", "moved", "unknown", "untagged", "failed"]
Beside = Literal["missing", "late", "unmatched"]
#: An outcome, something seen beside it, or a change in the number of a worker's pins.
Counted = Outcome | Beside | Literal["pinned"]
#: Takes what was counted, the worker concerned, and the amount.
Metrics = Callable[[Counted, str | None, int], None]


@dataclass(frozen=True, slots=True)
class PinSummary:
    """How many calls to the gateway had each outcome, and what was counted beside it.

    Each call has one of the first six outcomes. All but ``sessions`` count from the set-up on.

    >>> routing.pins.summary()
    PinSummary(first=1, kept=5, moved=0, unknown=0, untagged=0, failed=0, missing=0, late=0,
    unmatched=0, sessions=1)
    """

    first: int = 0  #: Calls that showed a session on a worker for the first time.
    kept: int = 0  #: Calls that came to the worker that the session had when the call started.
    moved: int = 0  #: Calls that came to another worker.
    unknown: int = 0  #: Answers that named no worker, as those of SMG before 1.10.
    untagged: int = 0  #: Calls that were answered and had no session.
    failed: int = 0  #: Calls that raised, or were answered with a status of 400 or more.
    missing: int = 0  #: Calls that had no session when they were made, whatever their outcome.
    late: int = 0  #: Calls in a request's session that were made after the request had ended.
    unmatched: int = 0  #: Calls in a session that look like calls to the gateway but had no key.
    sessions: int = 0  #: Sessions that are tracked now.


class SessionPin(NamedTuple):
    """Where a session is pinned. A session has a pin for each key, and for each gateway.

    >>> routing.pins.of("s-17")
    [SessionPin(session='s-17', gateway='http://10.0.0.1:30000', key='s-17',
    worker='http://10.0.0.2:8000', turns=6, moves=0)]
    """

    session: str  #: The session's name: its id, or its digest if that goes out in place of the id.
    gateway: str  #: The gateway's URL; of gateways that share workers, the first one's.
    key: str  #: The routing key. It equals ``session`` unless ``pin_by`` is set.
    worker: str | None  #: The worker that has it, as the gateway names it. None if none was named.
    turns: int  #: How many of its calls were answered.
    moves: int  #: How often it changed its worker.


@dataclass(frozen=True, slots=True)
class Move:
    """A session's calls went to one worker, and now go to another.

    >>> def on_move(move):
    ...     print(move.session, move.from_worker, move.to_worker, move.turns)
    >>> routing = Routing({"gateway": "http://10.0.0.1:30000", "on_move": on_move})
    """

    session: str  #: The session's name: its id, or its digest if that goes out in place of the id.
    from_worker: str  #: The worker that had the session, as the gateway names it.
    to_worker: str  #: The worker that has it now.
    turns: int  #: How many of the session's calls were answered before this one.


@dataclass(slots=True, eq=False)
class Row:
    """A ``SessionPin`` as the ledger keeps it."""

    session: str
    gateway: str
    key: str
    first: str | None = None  # the worker of its first answer
    worker: str | None = None
    turns: int = 0
    moves: int = 0
    answered: float = 0.0  # when it was last, as time.monotonic() has it
    is_over: bool = False  # the session has ended, or was pushed out
    into: "Row | None" = None  # the row that it was merged into

    def absorb(self, other: "Row") -> None:
        """Take in another row, because the gateways of both now count as one."""
        self.turns, self.moves = self.turns + other.turns, self.moves + other.moves
        self.answered = max(self.answered, other.answered)
        if self.worker is None:
            self.first, self.worker = other.first, other.worker
        other.worker, other.into = None, self

    @staticmethod
    def by_worker(
        rows: Iterable[tuple["Row", ...]], workers: Iterable[str], within: float
    ) -> dict[str, int]:
        """Return how many rows each of the workers has that were answered within the seconds."""
        since = time.monotonic() - within
        found = Count(row.worker for its in rows for row in its if row.answered >= since)
        return {worker: found[worker] for worker in workers}

    def pin(self) -> SessionPin:
        """Return what users see of it."""
        return SessionPin(self.session, self.gateway, self.key, self.worker, self.turns, self.moves)


# Apps that share a registry share the metrics on it: it takes each name once.
_on_registry: "WeakKeyDictionary[CollectorRegistry, PrometheusMetrics]" = WeakKeyDictionary()
ACTIVE_SECONDS = 600  # a session that was answered since counts as active
_BESIDE = {
    "missing": (
        "smg_routing_missing_session",
        "Calls to the gateway that had no session when they were made.",
    ),
    "late": (
        "smg_routing_late",
        "Calls in a request's session that were made after the request had ended.",
    ),
    "unmatched": (
        "smg_routing_unmatched",
        "Calls in a session that look like ones to the gateway, and carried no key.",
    ),
}


class PrometheusMetrics:
    """The metrics on one registry, which collects them from here. No label has a session id.

    In prometheus-client's multi-process mode, which can't remove series, the series of a worker
    stays when the worker has gone. There are no active sessions there: it collects nothing.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        self.ledgers: WeakSet[Any] = WeakSet()
        self._lock = threading.RLock()
        self._pins: Count[str] = Count()
        self._calls = Counter(
            "smg_routing_calls",
            "Calls to the gateway: kept, first or moved by the worker that answered; unknown "
            "where it is not named; untagged without a session; failed.",
            ["outcome"],
            registry=None,
        )
        for outcome in get_args(Outcome):
            self._calls.labels(outcome)  # from 0: rate() misses the first value of a series
        self._worker_calls = Counter(
            "smg_routing_worker_calls",
            "Calls that a worker answered in a session, while sessions are pinned to it.",
            ["worker"],
            registry=None,
        )
        self._sessions = Gauge(
            "smg_routing_sessions",
            "Tracked sessions by the worker where they are.",
            ["worker"],
            registry=None,
            multiprocess_mode="livesum",
        )
        self._beside: dict[str, Counter] = {
            what: Counter(name, text, registry=None) for what, (name, text) in _BESIDE.items()
        }
        self._all = (self._calls, self._worker_calls, self._sessions, *self._beside.values())

    def describe(self) -> Iterable["Metric"]:
        """Yield the metrics without values: a registry reads their names when it takes them."""
        for metric in self._all:
            yield from metric.describe()
        yield self._active(())

    def collect(self) -> Iterator["Metric"]:
        """Yield the metrics with their values, for a scrape of the registry."""
        ledgers = list(self.ledgers)
        for ledger in ledgers:
            ledger.news.tell()
        for metric in self._all:
            yield from metric.collect()
        yield self._active(ledger for ledger in ledgers if ledger._is_shown)

    def _active(self, ledgers: Iterable[Any]) -> "Metric":
        """Return the active sessions. A scrape counts them: nobody calls when they cease to be."""
        from prometheus_client.core import GaugeMetricFamily

        text = "Tracked sessions with an answer in the last ten minutes, by the worker."
        family = GaugeMetricFamily("smg_routing_active_sessions", text, labels=["worker"])
        active: Count[str] = Count()
        for ledger in ledgers:
            active.update(ledger.workers(ACTIVE_SECONDS))
        for worker, sessions in active.items():
            family.add_metric([worker], sessions)
        return family

    def add(self, what: Counted, worker: str | None, change: int) -> None:
        """Count what the ledger saw. A worker's series end with its last pin."""
        if what == "pinned":
            self._pinned(str(worker), change)
        elif what in self._beside:
            self._beside[what].inc(change)
        else:
            self._calls.labels(what).inc(change)
            if worker is not None:
                with self._lock:
                    if self._pins[worker]:
                        self._worker_calls.labels(worker).inc(change)

    def _pinned(self, worker: str, change: int) -> None:
        with self._lock:
            self._pins[worker] += change
            if self._pins[worker]:
                self._sessions.labels(worker).set(self._pins[worker])
            elif "PROMETHEUS_MULTIPROC_DIR" in os.environ:
                self._sessions.labels(worker).set(0)
            else:
                del self._pins[worker]
                for metric in (self._sessions, self._worker_calls):
                    metric.remove(worker)


def prometheus_metrics(registry: Any) -> PrometheusMetrics:
    """Return the metrics on a registry, or on the default one.

    If somebody has emptied the registry, it gets them again. Raises ``ValueError`` if it has other
    metrics of these names.
    """
    from prometheus_client import REGISTRY

    registry = REGISTRY if registry is None else registry
    metrics = _on_registry.get(registry)
    if metrics is None:
        metrics = PrometheusMetrics()
    else:
        with suppress(KeyError):
            registry.unregister(metrics)
    registry.register(metrics)
    _on_registry[registry] = metrics
    return metrics
