"""Rounds: each runs every arm once in a new order, so all arms have the same conditions."""

import gc
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from .figures import shuffled


async def interleave(
    arms: Mapping[str, Callable[[], Awaitable[float]]],
    rounds: int,
    step: Callable[[float], None],
) -> list[dict[str, float]]:
    """Run every arm once in each of ``rounds`` rounds; return the cost of each arm in each round.

    An arm does a short chunk of work and returns its cost: the CPU seconds of the process under
    test for a unit of work. A first chunk of each arm doesn't count. ``step`` is called with the
    share of the rounds that are done, 0 to 1.

    Many short rounds tell more than a few long ones. A disturbance then hits all arms of a round,
    or one round of hundreds, which doesn't change the median.
    """
    for arm in shuffled(list(arms)):
        await arms[arm]()
    # Otherwise the collector would scan the objects that exist now during one arm and not another.
    # It stays on, because an arm must pay for the objects that it makes.
    gc.collect()
    gc.freeze()
    try:
        costs = []
        for done in range(rounds):
            costs.append({arm: await arms[arm]() for arm in shuffled(list(arms))})
            step((done + 1) / rounds)
        return costs
    finally:
        gc.unfreeze()


def added_up(rounds: Sequence[Mapping[str, float]], count: int) -> list[dict[str, float]]:
    """Add up the costs of each ``count`` successive rounds."""
    return [
        {arm: sum(costs[arm] for costs in rounds[begin : begin + count]) for arm in rounds[begin]}
        for begin in range(0, len(rounds), count)
    ]


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Keep this process, and those that it starts in the block, on one CPU. Linux only.

    Otherwise processes that take turns are woken on another CPU with cold caches, which causes half
    of the noise of a stream.
    """
    if sys.platform != "linux":
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
