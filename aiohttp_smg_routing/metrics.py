"""The ledger's counts as Prometheus metrics; needs the extra ``metrics``."""

from functools import cache
from typing import Any, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from .ledger import Outcome
from .values import registry


class PrometheusMetrics:
    """The metrics of one registry. No session id stands in a label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "smg_routing_calls",
            "Calls to the gateway: kept, first or moved by the worker that answered; unknown "
            "where it is not named; untagged without a session; failed.",
            ["outcome"],
            registry=registry,
        )
        for outcome in get_args(Outcome):
            self._calls.labels(outcome)  # from 0: rate() misses the value that a series begins with
        self._sessions = Gauge(
            "smg_routing_sessions",
            "Tracked sessions by the worker that answered last.",
            ["worker"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._moves = Counter(
            "smg_routing_moves", "Sessions that went to another worker.", registry=registry
        )
        self._missing = Counter(
            "smg_routing_missing_session",
            "Calls to the gateway that had no session when they were made.",
            registry=registry,
        )

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


@cache
def _metrics_on(registry: CollectorRegistry) -> PrometheusMetrics:
    # Apps that share a registry share the metrics: it takes each name once.
    return PrometheusMetrics(registry)


def prometheus_metrics(named: Any) -> PrometheusMetrics:
    """Return the metrics on a registry, the one that a text names, or prometheus-client's own."""
    return _metrics_on(REGISTRY if named is None else registry(named))
