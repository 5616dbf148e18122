"""The ledger's counts as Prometheus metrics; needs the extra ``metrics``."""

from typing import Any, get_args
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from . import values
from .ledger import Outcome

# Apps that share a registry share the metrics on it: it takes each name once.
_on_registry: WeakKeyDictionary[CollectorRegistry, "PrometheusMetrics"] = WeakKeyDictionary()


class PrometheusMetrics:
    """The metrics of one registry. No session id stands in a label."""

    def __init__(self) -> None:
        self._calls = Counter(
            "smg_routing_calls",
            "Calls to the gateway: kept, first or moved by the worker that answered; unknown "
            "where it is not named; untagged without a session; failed.",
            ["outcome"],
            registry=None,
        )
        for outcome in get_args(Outcome):
            self._calls.labels(outcome)  # from 0: rate() misses the value that a series begins with
        self._sessions = Gauge(
            "smg_routing_sessions",
            "Tracked sessions by the worker that answered last.",
            ["worker"],
            registry=None,
            multiprocess_mode="livesum",
        )
        self._moves = Counter(
            "smg_routing_moves", "Sessions that went to another worker.", registry=None
        )
        self._missing = Counter(
            "smg_routing_missing_session",
            "Calls to the gateway that had no session when they were made.",
            registry=None,
        )

    def register(self, registry: CollectorRegistry) -> None:
        """Put all of the metrics on ``registry``, or none and raise ``ValueError``."""
        done: list[Counter | Gauge] = []
        for metric in (self._calls, self._sessions, self._moves, self._missing):
            try:
                registry.register(metric)
            except ValueError:
                for earlier in done:
                    registry.unregister(earlier)
                raise
            done.append(metric)

    def called(self, outcome: Outcome) -> None:
        """Count a call."""
        self._calls.labels(outcome).inc()
        if outcome == "moved":
            self._moves.inc()

    def missing(self) -> None:
        """Count a call that matched but had no session."""
        self._missing.inc()

    def pinned(self, worker: str, change: int) -> None:
        """Add ``change`` to the sessions of a worker."""
        self._sessions.labels(worker).inc(change)


def prometheus_metrics(registry: Any) -> PrometheusMetrics:
    """Return the metrics on a registry, on the one that a text names, or on the default one.

    Raises ``ValueError`` where the registry has other metrics of these names.
    """
    registry = REGISTRY if registry is None else values.registry(registry)
    metrics = _on_registry.get(registry)
    if metrics is None:
        metrics = PrometheusMetrics()
        metrics.register(registry)
        _on_registry[registry] = metrics
    return metrics
