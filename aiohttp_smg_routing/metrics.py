"""Exports the ledger's counts to Prometheus. Needs the extra ``metrics``."""

import os
import threading
from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary, WeakSet

from .pins import RECENT_SECONDS, Beside, Outcome

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

#: An outcome, something seen beside it, or a change in the number of a worker's pins.
Counted = Outcome | Beside | Literal["pinned"]
#: Takes what was counted, the worker concerned, and the amount.
Metrics = Callable[[Counted, str | None, int], None]

# Apps that share a registry share its metrics, because it takes each name only once.
_on_registry: "WeakKeyDictionary[CollectorRegistry, PrometheusMetrics]" = WeakKeyDictionary()
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
        "Calls in a session that look like calls to the gateway, but carried no key.",
    ),
}


class PrometheusMetrics:
    """The metrics on one registry, which collects them from here. No label has a session id.

    prometheus-client's multi-process mode can't remove series: the series of a worker stay after
    the worker has gone. It collects nothing from here, so it shows no active sessions.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        self.ledgers: WeakSet[Any] = WeakSet()
        self._lock = threading.RLock()
        self._pins: Count[str] = Count()
        self._calls = Counter(
            "smg_routing_calls",
            "Calls to the gateway by outcome: kept, first or moved, by the worker that answered; "
            "unknown if it is not named; untagged without a session; failed.",
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
            "Tracked sessions by worker.",
            ["worker"],
            registry=None,
            multiprocess_mode="livesum",
        )
        self._beside: dict[str, Counter] = {
            what: Counter(name, text, registry=None) for what, (name, text) in _BESIDE.items()
        }
        self._all = (self._calls, self._worker_calls, self._sessions, *self._beside.values())

    def describe(self) -> Iterable["Metric"]:
        """Yield the metrics without values. A registry reads their names when it registers them."""
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
        """Return the active sessions, counted at the scrape: no event tells when one goes idle."""
        from prometheus_client.core import GaugeMetricFamily

        text = "Tracked sessions with an answer in the last ten minutes, by worker."
        family = GaugeMetricFamily("smg_routing_active_sessions", text, labels=["worker"])
        active: Count[str] = Count()
        for ledger in ledgers:
            active.update(ledger.workers(RECENT_SECONDS))
        for worker, sessions in active.items():
            family.add_metric([worker], sessions)
        return family

    def add(self, what: Counted, worker: str | None, change: int) -> None:
        """Count what the ledger saw. A worker's series are removed with its last pin."""
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

    If the registry has been emptied, it gets them again. Raises ``ValueError`` if it has other
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
