"""Figures: the median and spread of several runs, or the verdict that they can't tell."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Literal

Unit = Literal["ratio", "share", "s", "µs", "bytes", "turns/s", "sessions", "calls"]
Verdict = Literal["", "reached", "missed", "too noisy to tell"]

_CONFIDENCE = 0.95
_COUNTS = ("bytes", "sessions", "calls")
_SUFFIXES = {"ratio": "", "share": "%"}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number from each run, and the limit that it must keep.

    ``at_most`` or ``at_least`` is the limit for the median. ``precision`` is for a figure without a
    limit: the widest spread, as a share of the median, at which the figure is still meaningful. It
    is None if the spread is itself a result.
    """

    runs: tuple[float, ...]
    unit: Unit
    at_most: float | None = None
    at_least: float | None = None
    precision: float | None = None

    @property
    def median(self) -> float:
        """The median of the runs."""
        return median(self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        """The 95 % confidence interval of the median, or the extremes of fewer than six runs.

        It depends only on the order of the runs, so it holds for any distribution.
        """
        ordered = sorted(self.runs)
        outside = _runs_outside(len(ordered))
        return ordered[outside], ordered[-1 - outside]

    @property
    def is_clear(self) -> bool:
        """Whether the runs agree well enough to print their median."""
        low, high = self.spread
        if self.at_most is not None:
            return not low <= self.at_most < high
        if self.at_least is not None:
            return not low < self.at_least <= high
        return self.precision is None or high - low <= self.precision * abs(self.median)

    @property
    def verdict(self) -> Verdict:
        """What the runs show about the limit; empty if there is none and the figure is clear."""
        if not self.is_clear:
            return "too noisy to tell"
        if self.at_most is not None:
            return "reached" if self.median <= self.at_most else "missed"
        if self.at_least is not None:
            return "reached" if self.median >= self.at_least else "missed"
        return ""

    def __str__(self) -> str:
        if not self.is_clear:
            return "too noisy to tell"
        low, high = self.spread
        text = self._number(self.median)
        if low != high:
            text += f" ({self._number(low)} to {self._number(high)})"
        return f"{text} {_SUFFIXES.get(self.unit, self.unit)}".rstrip()

    def _number(self, value: float) -> str:
        if self.unit == "share":
            return f"{100 * value:.1f}"
        if self.unit == "ratio":
            return f"{value:.3f}"
        exact = self.unit in _COUNTS or value >= 100
        return f"{value:,.{0 if exact else 2}f}"


@cache
def _runs_outside(count: int) -> int:
    """Return how many runs on each side lie outside a 95 % interval of the median."""
    # Each run is on one side of the median: of the 2**count ways, how many have so few on a side?
    ways = term = 1
    outside = 0
    while 2 * ways / 2**count <= 1 - _CONFIDENCE:
        term = term * (count - outside) // (outside + 1)
        ways += term
        outside += 1
    return max(outside - 1, 0)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one comparison; a cell is a figure or a text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Figure, ...], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The results of one part of the benchmark: its tables, and notes on how to read them."""

    name: str
    title: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()
    headline: str = ""
    """The main result in a sentence, for a reader with one minute."""


Progress = Callable[[float, str], None]
"""Called with the share of a part that is done, 0 to 1, and the current step."""


def step(progress: Progress, begin: float, share: float, what: str) -> Callable[[float], None]:
    """Return a function that reports the progress of a step of a part.

    The step begins at ``begin`` and is ``share`` of the part, both 0 to 1.
    """
    return lambda done: progress(begin + share * done, what)


def ratios(rounds: Sequence[Mapping[str, float]], arm: str, base: str) -> tuple[float, ...]:
    """Return the cost of ``arm`` as a multiple of the cost of ``base``, for each round."""
    return tuple(costs[arm] / costs[base] for costs in rounds)


def shuffled(arms: Sequence[str]) -> list[str]:
    """Return the arms in random order, so that no arm always follows the same one."""
    return random.sample(arms, len(arms))
