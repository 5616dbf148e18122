"""Tells what is no accident."""

from math import comb, exp, lgamma, log

from .summary import Summary

CHANCE = 0.001  # anything less probable is no accident


def beyond_chance(reached: int, workers: int, keys: int) -> bool:
    """Tell whether it is no accident that so many keys came to so few of the workers.

    If each key comes to a worker at random, the probability that any ``reached`` workers get all of
    them is less than ``CHANCE``.
    """
    if not 0 < reached < workers:
        return False
    keys = min(keys, 10**9)  # a page of metrics may have any number
    return log(comb(workers, reached)) + keys * log(reached / workers) < log(CHANCE)


def more_than_chance(keyed: Summary, control: Summary) -> bool:
    """Tell whether the keyed arm kept more turns than the other arm, beyond chance.

    Fisher's exact test, one-sided: how likely is a keyed arm this good if the key did nothing?
    """
    kept, moved = keyed.outcomes["kept"], keyed.outcomes["moved"]
    other_kept, other_moved = control.outcomes["kept"], control.outcomes["moved"]
    mine, all_kept = kept + moved, kept + other_kept
    total = mine + other_kept + other_moved

    def ways(of: int, taken: int) -> float:
        return lgamma(of + 1) - lgamma(taken + 1) - lgamma(of - taken + 1)

    likelihood = sum(
        exp(ways(mine, more) + ways(total - mine, all_kept - more) - ways(total, all_kept))
        for more in range(kept, min(mine, all_kept) + 1)
    )
    return likelihood < CHANCE
