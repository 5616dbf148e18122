"""A figure is what several runs measured: their median and spread, or that they can't tell."""

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
    """One number of each run, and what is promised of it.

    ``at_most`` or ``at_least`` is the limit that the median has to keep. ``precision``, for a
    figure without a limit, is the widest spread, as a share of the median, with which it still
    says something; None where the spread is a finding of its own.
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
        """The 95 % confidence interval of the median; of fewer than six runs, their extremes.

        It comes from the order of the runs alone, so that it holds however they are distributed.
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
        """What the runs say of the limit; empty where there is none and the figure is clear."""
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
    """Return how many runs may be left out on each side of a 95 % interval of the median."""
    # Of the 2**count ways to lie on one side of the median or the other: how many have so few here.
    ways = term = 1
    outside = 0
    while 2 * ways / 2**count <= 1 - _CONFIDENCE:
        term = term * (count - outside) // (outside + 1)
        ways += term
        outside += 1
    return max(outside - 1, 0)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one comparison; a cell is a figure, or a text that needs no measurement."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Figure, ...], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of the benchmark measured: its tables, and a sentence on how to read each."""

    name: str
    title: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()
    headline: str = ""
    """What a reader with one minute wants to know, in a sentence."""


Progress = Callable[[float, str], None]
"""Called with the share of a part that is done, 0 to 1, and what it is at."""


def step(progress: Progress, begin: float, share: float, what: str) -> Callable[[float], None]:
    """Return what tells ``progress`` of a stretch that begins there and is that share of a part."""
    return lambda done: progress(begin + share * done, what)


def ratios(rounds: Sequence[Mapping[str, float]], arm: str, base: str) -> tuple[float, ...]:
    """Return what ``arm`` cost as a multiple of ``base``, for each round."""
    return tuple(costs[arm] / costs[base] for costs in rounds)


def shuffled(arms: Sequence[str]) -> list[str]:
    """Return the order in which a round takes its arms: no arm always follows the same one."""
    return random.sample(arms, len(arms))
