"""Rounds: in each one every arm works once, in a new order, so that all meet the same machine."""

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
    """Run every arm once in each of ``rounds`` rounds; return what each cost in each round.

    An arm does a short chunk of work and returns its cost: CPU seconds of the process under test
    for a unit of work. One chunk of each comes first and doesn't count. ``step`` is called with
    the share of the rounds that are done, 0 to 1.

    Many short rounds tell more than a few long ones: a disturbance then hits all arms of a round,
    or only one round of hundreds, which does not change the median.
    """
    for arm in shuffled(list(arms)):
        await arms[arm]()
    # The collector would scan the objects that exist now in one arm's chunk and not in another's.
    # It stays on, because an arm has to pay for the objects that it makes.
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
    """Add up each ``count`` rounds in a row, which make a whole of ``count`` short pieces."""
    return [
        {arm: sum(costs[arm] for costs in rounds[begin : begin + count]) for arm in rounds[begin]}
        for begin in range(0, len(rounds), count)
    ]


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Keep this process, and those that it starts meanwhile, on one CPU, where the system can.

    Otherwise processes that take turns are woken on another CPU, whose caches are cold: that makes
    half of the noise of a stream.
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
