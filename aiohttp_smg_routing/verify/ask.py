"""What the gateway says about itself: its models, its workers, its counters."""

from collections import Counter
from collections.abc import Mapping
from math import isfinite

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from yarl import URL

from .call import BRIEF, CallError, Client
from .facts import POLICY_BRANCHES, WORKER_SELECTIONS
from .seen import Counters


async def models(client: Client, gateway: URL) -> tuple[str, ...]:
    """Return the names of the gateway's models. Raises ``CallError``."""
    match await client.json(gateway / "v1/models"):
        case {"data": list() as listed}:
            ids = (model.get("id") for model in listed if isinstance(model, dict))
            return tuple(client.printable(name) for name in ids if isinstance(name, str))
    return ()


async def healthy_workers(client: Client, gateway: URL, model: str) -> int | None:
    """Return how many healthy workers serve ``model``, or None where the gateway doesn't say."""
    try:
        answer = await client.json(gateway / "workers", timeout=BRIEF)
    except CallError:
        return None
    match answer:  # as SMG gives it; another gateway may have something else there
        case {"workers": [{"is_healthy": _}, *_] as workers} if all(
            isinstance(worker, dict) for worker in workers
        ):
            return sum(_serves(worker, model) for worker in workers)
    return None


def _serves(worker: Mapping[str, object], model: str) -> bool:
    return bool(worker.get("is_healthy")) and worker.get("model_id", model) == model


async def read_counters(client: Client, metrics: URL) -> Counters:
    """Return the gateway's counters as they stand. Raises ``CallError``, and ``ValueError``."""
    text = await client.text(metrics)
    branches: Counter[str] = Counter()
    selections: Counter[str] = Counter()
    pools = set()
    found = False
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found = found or sample.name.startswith("smg_")
            if sample.name in POLICY_BRANCHES:
                branches[client.printable(sample.labels.get("branch", ""))] += _value(sample)
            elif sample.name == WORKER_SELECTIONS:
                selections[client.printable(sample.labels.get("policy", ""))] += _value(sample)
                pools.add(sample.labels.get("worker_type"))
    if not found:
        raise ValueError("what answers there is no SMG gateway's metrics")
    return Counters(dict(branches), dict(selections), max(1, len(pools)))


def _value(sample: Sample) -> int:
    if not isfinite(sample.value):
        raise ValueError(f"{sample.name} is {sample.value}")
    return int(sample.value)


def growth(before: Counters | None, after: Counters | None) -> Counters | None:
    """Return by how much the counters grew, or None where either is not known.

    They start at 0 again where the gateway restarted: what shrank is left out.
    """
    if before is None or after is None:
        return None
    branches = Counter(after.branches) - Counter(before.branches)
    selections = Counter(after.selections) - Counter(before.selections)
    return Counters(dict(branches), dict(selections), after.pools)
