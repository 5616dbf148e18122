"""Reads a page of metrics of a gateway, or of a session server with the plugin."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import fmean
from typing import Final, Literal

from prometheus_client.samples import Sample

from ..verify.ask import counted, shrank
from ..verify.facts import CACHE_KEEPERS, CIRCUITS, OPEN
from ..verify.seen import Counters, GatewayLoad

Circuit = Literal["closed", "open", "half open"]

_CIRCUITS: Final[Mapping[int, Circuit]] = {0: "closed", OPEN: "open", 2: "half open"}
#: Whether each worker is healthy: by SMG and sglang-router, and by vllm-router.
_HEALTH: Final = frozenset(("smg_worker_health", "vllm_router_worker_health"))
#: The state and the circuit of a worker that was taken off sglang-router 0.3.2.
_REMOVED: Final = -1
_IN_FLIGHT: Final = "smg_worker_requests_active"
_KEYS: Final = "smg_worker_routing_keys_active"
_TOKEN_USAGE: Final = "smg_engine_token_usage"  # noqa: S105 - of a KV cache
_CACHE_HIT_RATE: Final = "smg_engine_cache_hit_rate"
_POOL_SIZE: Final = "smg_worker_pool_size"
#: SMG 1.13 has it. Earlier ones count a hashed ``Authorization`` as a call with a key.
_SINCE_1_13: Final = "smg_worker_requests_total"

_CALLS: Final = "smg_routing_calls_total"
_BESIDE: Final[Mapping[str, str]] = {
    "smg_routing_missing_session_total": "missing",
    "smg_routing_late_total": "late",
    "smg_routing_unmatched_total": "unmatched",
}
#: The outcomes of answered calls that carried a key.
KEYED: Final = ("first", "kept", "moved", "unknown")
_SESSIONS: Final = "smg_routing_sessions"
_ACTIVE: Final = "smg_routing_active_sessions"


@dataclass(frozen=True, slots=True)
class Worker:
    """What the gateway says of a worker. A figure that it doesn't give is None."""

    calls: int = 0
    """The calls that it got since the gateway started."""
    healthy: bool | None = None
    circuit: Circuit | None = None
    keys: int | None = None
    """How many routing keys have a call in flight there."""
    token_usage: float | None = None
    """How full its KV cache is, 0 to 1; the mean of its data-parallel ranks."""
    cache_hit_rate: float | None = None
    """The share of prompt tokens that its prefix cache had, 0 to 1, as the engine counts it."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway's page. Counts are since it started."""

    counters: Counters
    load: GatewayLoad
    workers: Mapping[str, Worker] = field(default_factory=dict)
    pools: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """How many workers of each kind and model it has."""
    in_flight: int | None = None
    """How many calls its workers have now; None if it doesn't say, as vllm-router."""
    tells_keys: bool = True
    """Whether ``consistent_hashing`` counts a call as keyed by our key alone."""

    @property
    def pool_sizes(self) -> Mapping[str, int]:
        """How many workers of each kind it has."""
        sizes: Counter[str] = Counter()
        for (kind, _), size in self.pools.items():
            sizes[kind] += size
        return dict(sizes)

    @property
    def models(self) -> int:
        """How many models its workers serve. A call goes to a worker of its model only."""
        return len({model for (_, model), size in self.pools.items() if size})

    @property
    def choices(self) -> int:
        """How many workers there are to choose from for a call, at the most."""
        return max((n for (kind, _), n in self.pools.items() if kind in CACHE_KEEPERS), default=0)

    @property
    def down(self) -> int:
        """How many of its workers are not healthy; 0 if there are several kinds of them."""
        if len(self.pool_sizes) > 1:
            return 0
        return sum(worker.healthy is False for worker in self.workers.values())


@dataclass(frozen=True, slots=True)
class Server:
    """A session server's page. Counts are since it started."""

    counts: Mapping[str, int]
    """Its calls by outcome, and ``missing``, ``late`` and ``unmatched`` beside it."""
    sessions: Mapping[str, int] = field(default_factory=dict)
    """How many sessions are pinned to each worker, including those that are idle."""
    active: Mapping[str, int] | None = None
    """How many of them had an answer in the last ten minutes; None if it doesn't say."""


def read_gateway(samples: Sequence[Sample]) -> Gateway:
    """Return a gateway's page. Raises ``ValueError`` if it is none."""
    counters, load = counted(samples)
    # A gateway has other series with this label, which number its threads.
    removed = {_worker_of(it) for it in samples if it.value == _REMOVED}
    named = {*counters.workers, *(_worker_of(it) for it in samples)} - removed - {""}
    values: dict[str, defaultdict[str, list[float]]] = {
        name: defaultdict(list) for name in sorted(named)
    }
    pools: Counter[tuple[str, str]] = Counter()
    for sample in samples:
        if isfinite(sample.value):
            if sample.name == _POOL_SIZE:
                kind = sample.labels.get("worker_type", "regular")
                pools[kind, sample.labels.get("model", "")] += int(sample.value)
            elif (worker := sample.labels.get("worker", "")) in values:
                values[worker][sample.name].append(sample.value)
    # SMG gives 0 if the engine has no figure.
    has_hit_rates = any(sum(its[_CACHE_HIT_RATE]) for its in values.values())
    in_flight = int(sum(sum(its[_IN_FLIGHT]) for its in values.values()))
    return Gateway(
        counters,
        load,
        {
            name: Worker(
                counters.workers.get(name, 0),
                _healthy(its),
                _circuit(its),
                int(sum(its[_KEYS])) if its[_KEYS] else None,
                _mean(its[_TOKEN_USAGE]),
                _mean(its[_CACHE_HIT_RATE]) if has_hit_rates else None,
            )
            for name, its in values.items()
        },
        dict(pools) or {("regular", ""): len(values)},
        None if load.kind == "vllm-router" else in_flight,
        load.kind != "smg" or any(sample.name == _SINCE_1_13 for sample in samples),
    )


def _worker_of(sample: Sample) -> str:
    return sample.labels.get("worker", "") if sample.name in _HEALTH | CIRCUITS else ""


def _healthy(values: Mapping[str, Sequence[float]]) -> bool | None:
    told = [value for name in _HEALTH for value in values.get(name, ())]
    return all(told) if told else None


def _circuit(values: Mapping[str, Sequence[float]]) -> Circuit | None:
    told = [int(value) for name in CIRCUITS for value in values.get(name, ())]
    return _CIRCUITS.get(max(told)) if told else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def read_server(samples: Iterable[Sample]) -> Server:
    """Return a session server's page. Raises ``ValueError`` if it is none."""
    counts: Counter[str] = Counter()
    sessions: Counter[str] = Counter()
    active: Counter[str] = Counter()
    names = set()
    for sample in samples:
        names.add(sample.name)
        value = int(sample.value) if isfinite(sample.value) else 0
        worker = sample.labels.get("worker", "")
        if sample.name == _CALLS:
            counts[sample.labels.get("outcome", "")] += value
        elif what := _BESIDE.get(sample.name):
            counts[what] += value
        elif sample.name == _SESSIONS:
            sessions[worker] += value
        elif sample.name == _ACTIVE:
            active[worker] += value
    if _CALLS not in names:
        raise ValueError(f"the answer has no {_CALLS}")
    # The series of sessions begin with the first pin.
    is_told = _ACTIVE in names or _SESSIONS not in names
    return Server(dict(counts), dict(sessions), dict(active) if is_told else None)


def server_shrank(before: Server, after: Server) -> bool:
    """Tell whether the session server was restarted in between."""
    return any(after.counts.get(name, 0) < count for name, count in before.counts.items())


def gateway_shrank(before: Gateway, after: Gateway) -> bool:
    """Tell whether the gateway was restarted in between."""
    return shrank(before.counters, after.counters)
