"""Asks the gateway about itself: its models, its workers and their load, its counters."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import TypeVar

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from yarl import URL

from .call import BRIEF, CallError, Client
from .facts import (
    CIRCUITS,
    KINDS,
    KV_USAGE,
    LOAD_POLLS,
    OPEN,
    OVERLOADED,
    POLICY_BRANCHES,
    SELECTIONS,
    SESSION_SERVER,
    TROUBLES,
    WORKER_CALLS,
)
from .seen import Counters, GatewayLoad

_LONGEST = 4 * 2**20  # characters, which take seconds to parse; 1,000 workers have 2 MB
_LONGEST_LINE = 64 * 2**10  # characters; the parser's time grows with their square

P = TypeVar("P")


async def models(client: Client, gateway: URL) -> tuple[str, ...]:
    """Return the names of the gateway's models. Raises ``CallError``."""
    match await client.json(gateway / "v1/models"):
        case {"data": list() as listed} | {"models": list() as listed}:
            names = (_model(entry) for entry in listed)
            return tuple(client.printable(name) for name in names if name)
    return ()


def _model(entry: object) -> str | None:
    """Return a model's name: the ``id`` as in OpenAI's API, another field, or the text itself."""
    if isinstance(entry, dict):
        fields = (entry.get(name) for name in ("id", "name", "model", "model_path"))
        entry = next((value for value in fields if value is not None), None)
    return entry if isinstance(entry, str) else None


async def healthy_workers(client: Client, gateway: URL, model: str) -> dict[str, int] | None:
    """Return how many healthy workers of each kind serve ``model``; None if the gateway won't say.

    If none lists the model, as with an alias, return all kinds of healthy workers, each with 0.
    """
    try:
        answer = await client.json(gateway / "workers", timeout=BRIEF)
    except CallError:
        return None
    match answer:  # the form of SMG; another gateway may answer anything
        case {"workers": [{"is_healthy": _}, *_] as workers} if all(
            isinstance(worker, dict) for worker in workers
        ):
            healthy = [worker for worker in workers if worker.get("is_healthy")]
            serving = Counter(_kind(client, worker) for worker in healthy if _serves(worker, model))
            return dict(serving or {_kind(client, worker): 0 for worker in healthy})
    return None


def _kind(client: Client, worker: Mapping[str, object]) -> str:
    return client.printable(str(worker.get("worker_type", "regular")))


def _serves(worker: Mapping[str, object], model: str) -> bool:
    # sglang-router and vllm-router list no model names: their workers serve "unknown".
    return worker.get("model_id", model) in (model, "unknown")


async def read_metrics(client: Client, metrics: URL) -> tuple[Counters, GatewayLoad]:
    """Return the gateway's counters as they are now, and its kind and load.

    Raises ``CallError``, and ``ValueError``.
    """
    return await read_page(client, metrics, counted)


async def read_page(client: Client, metrics: URL, read: Callable[[Sequence[Sample]], P]) -> P:
    """Return what ``read`` makes of a page of metrics. Raises ``CallError``, and ``ValueError``."""
    text = await client.text(metrics)
    # A page of hundreds of workers takes a moment: what is measured or shown goes on meanwhile.
    return await asyncio.to_thread(lambda: read(samples_of(client, text)))


def samples_of(client: Client, text: str) -> list[Sample]:
    """Return all samples of a page of metrics, with printable labels. Raises ``ValueError``."""
    if len(text) > _LONGEST:
        raise ValueError(f"the page has more than {_LONGEST // 2**20} MiB")
    if max(map(len, text.split("\n"))) > _LONGEST_LINE:
        raise ValueError(f"the page has a line of more than {_LONGEST_LINE // 2**10} KiB")
    try:
        return [
            sample._replace(
                labels={name: client.printable(value) for name, value in sample.labels.items()},
                value=float(sample.value),
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    except (ValueError, IndexError, OverflowError) as error:  # odd lines, and overlong numbers
        # The parser's own message may be empty.
        said = "the answer is not a page of metrics"
        raise ValueError(f"{said}: {error}" if str(error) else said) from error


def counted(samples: Iterable[Sample]) -> tuple[Counters, GatewayLoad]:
    """Return the counters of a gateway's page, and its kind and load. Raises ``ValueError``."""
    pools: defaultdict[str, Counter[str]] = defaultdict(Counter)
    branches: defaultdict[str, Counter[str]] = defaultdict(Counter)
    workers: Counter[str] = Counter()
    usage: dict[str, float] = {}
    overloaded = circuits = troubles = 0
    names = set()
    for sample in samples:
        names.add(sample.name)
        labels, worker = sample.labels, sample.labels.get("worker", "")
        troubles += _count(sample) if _is_trouble(sample) else 0
        if policy := POLICY_BRANCHES.get(sample.name):
            branches[policy][labels.get("branch", "")] += _count(sample)
        elif sample.name in SELECTIONS:
            pool = pools[labels.get("worker_type", "regular")]
            pool[labels.get("policy", "")] += _count(sample)
            if worker:
                workers[worker] += _count(sample)
        elif sample.name == WORKER_CALLS:
            workers[worker] += _count(sample)
        elif sample.name == OVERLOADED:
            overloaded += _count(sample)
        elif sample.name in CIRCUITS:
            circuits += sample.value == OPEN
        elif sample.name == KV_USAGE and isfinite(sample.value):
            usage[worker] = max(sample.value, usage.get(worker, 0.0))
    names = {name for name in names if not name.startswith(SESSION_SERVER)}
    kind = next((kind for begin, kind in KINDS if any(n.startswith(begin) for n in names)), None)
    if kind is None:
        raise ValueError("the answer is not an SMG gateway's metrics")
    return (
        Counters(_plain(pools), _plain(branches), dict(workers), troubles),
        GatewayLoad(kind, LOAD_POLLS in names, overloaded, usage, circuits),
    )


def _is_trouble(sample: Sample) -> bool:
    good = TROUBLES.get(sample.name)
    return good is not None and good not in sample.labels.values()


def _plain(counts: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: dict(counter) for name, counter in counts.items()}


def _count(sample: Sample) -> int:
    if not isfinite(sample.value):
        raise ValueError(f"{sample.name} is {sample.value}")
    return int(sample.value)


def growth(before: Counters | None, after: Counters | None) -> Counters | None:
    """Return how much the counters grew, without those that did not.

    Return None if either is unknown, or if one shrank because the gateway was restarted.
    """
    if before is None or after is None or shrank(before, after):
        return None

    def grown(now: Mapping[str, int], then: Mapping[str, int]) -> dict[str, int]:
        return dict(Counter(now) - Counter(then))

    def each(
        now: Mapping[str, Mapping[str, int]], then: Mapping[str, Mapping[str, int]]
    ) -> dict[str, dict[str, int]]:
        pairs = ((name, grown(counts, then.get(name, {}))) for name, counts in now.items())
        return {name: counts for name, counts in pairs if counts}

    return Counters(
        each(after.pools, before.pools),
        each(after.branches, before.branches),
        grown(after.workers, before.workers),
        after.troubles - before.troubles,
    )


def shrank(before: Counters, after: Counters) -> bool:
    """Tell whether the gateway was restarted in between."""
    pairs = (
        *((then, after.pools.get(name, {})) for name, then in before.pools.items()),
        *((then, after.branches.get(name, {})) for name, then in before.branches.items()),
    )
    return any(now.get(name, 0) < count for then, now in pairs for name, count in then.items())


class Follower:
    """Finds the worker of the last call in the gateway's counters, if nobody else calls."""

    def __init__(self, client: Client, metrics: URL, counters: Counters) -> None:
        self._client = client
        self._metrics = metrics
        self._counters = counters

    async def worker(self) -> str | None:
        """Return the only worker whose count grew, by one call, since the last time; else None."""
        try:
            now, _ = await read_metrics(self._client, self._metrics)
        except (CallError, ValueError):
            return None
        before, self._counters = self._counters, now
        grown = growth(before, now)
        return next(iter(grown.workers)) if grown and [*grown.workers.values()] == [1] else None
