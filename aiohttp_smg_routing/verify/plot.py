"""Draws the picture: stripes if sessions stay on their worker, confetti if they don't."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .judge import Verdict
from .seen import ARM_TITLES, ARMS, Arm, Seen, Turn
from .summary import by_session, cached_share

# Okabe and Ito's colours, then eight that colour-blind eyes can also tell from them. Each comes
# with a letter, in case of doubt.
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#882255"),
    *("#1A1A80", "#A753FB", "#A7BC92", "#3E1414", "#FFB3A7", "#00525A", "#7A6A00", "#C00030"),
)
_DARK = frozenset(PALETTE[index] for index in (0, 2, 5, 7, 8, 9, 11, 13, 14, 15))
_FAILED, _EDGE, _UNKNOWN = "#D9D9D9", "#7A7A7A", "#E6E6E6"
INK, FAINT = "#1A1A1A", "#8A8A8A"
_LINES: Mapping[Arm, Mapping[str, Any]] = {
    "keyed": {"color": INK, "linewidth": 2.2, "marker": "o", "markersize": 4.5},
    "control": {
        "color": FAINT,
        "linewidth": 2.2,
        "linestyle": (0, (4, 2)),
        "marker": "s",
        "markersize": 4,
    },
}
_ANSWER_COLOURS = {"pinned": "#00694C", "not pinned": "#A63A00", "could not tell": "#6B5500"}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # a server may call a worker $x
    "svg.hashsalt": "aiohttp-smg-routing",
    "hatch.linewidth": 0.6,
}


def draw(seen: Seen, verdict: Verdict, file: Path) -> None:
    """Draw the picture into ``file``, in the format of its suffix: ``.svg`` or ``.png``."""
    row = min(0.17, 8 / seen.plan.sessions)  # inches
    workers = sorted({turn.worker for turn in seen.turns if turn.worker})
    patches = _patches(seen, workers)
    foot = 0.75 + 0.18 * -(-len(patches) // 4)
    height = 1.85 + foot + 2 * max(1.7, row * seen.plan.sessions)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, height))
        grid = GridSpec(
            2,
            2,
            figure,
            width_ratios=(1.75, 1),
            left=0.055,
            right=0.965,
            top=1 - 1.25 / height,
            bottom=foot / height,
            hspace=1.2 / (height - 1.85 - foot),
            wspace=0.16,
        )
        _title(figure, seen, verdict, height)
        for line, arm in enumerate(ARMS):
            _sessions(figure.add_subplot(grid[line, 0]), seen, arm, workers, row)
        _cached(figure.add_subplot(grid[0, 1]), seen)
        _first_token(figure.add_subplot(grid[1, 1]), seen)
        if patches:
            figure.legend(
                handles=patches,
                loc="lower left",
                bbox_to_anchor=(0.045, 0.0),
                ncols=4,
                frameon=False,
                fontsize=7.5,
                handlelength=1.4,
                columnspacing=1.6,
            )
        figure.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)


def _title(figure: Figure, seen: Seen, verdict: Verdict, height: float) -> None:
    figure.text(
        0.055,
        1 - 0.18 / height,
        verdict.answer.upper(),
        color=_ANSWER_COLOURS[verdict.answer],
        fontsize=15,
        fontweight="bold",
        va="top",
    )
    _, _, sentence = verdict.sentence.partition(": ")
    text = fill(sentence[:1].upper() + sentence[1:], 118)
    figure.text(0.055, 1 - 0.47 / height, text, fontsize=9.5, color=INK, va="top", linespacing=1.3)
    where = f"{seen.plan.gateway}   {seen.plan.model or ''}"
    figure.text(0.965, 1 - 0.22 / height, where, fontsize=8, color=FAINT, ha="right", va="top")


def _sessions(axes: Axes, seen: Seen, arm: Arm, workers: Sequence[str], row: float) -> None:
    """Draw a row for each session and a cell for each turn, with equal rows together."""
    rows = by_session(seen.turns, arm)
    rows.sort(key=lambda turns: [turn.worker for turn in turns if turn.worker])
    answered: list[Rectangle] = []
    for line, turns in enumerate(rows):
        for _, same in groupby(turns, key=lambda turn: (turn.worker, turn.outcome == "failed")):
            first, *others = same
            stripe = _stripe(first, 1 + len(others), line, workers)
            if first.outcome == "failed":
                axes.add_patch(stripe)  # alone, because a collection has one hatch for all
            else:
                answered.append(stripe)
            if first.worker and row > 0.1:
                _letter(axes, first.worker, first.number, line, workers)
    axes.add_collection(PatchCollection(answered, match_original=True))
    axes.set_xlim(0, seen.plan.turns)
    axes.set_ylim(max(1, len(rows)), 0)
    axes.set_title(ARM_TITLES[arm].capitalize(), loc="left", fontweight="bold", pad=6)
    moves = sum(turn.outcome == "moved" for turns in rows for turn in turns)
    if any(turn.worker for turns in rows for turn in turns):
        axes.set_title(f"{moves} moves", loc="right", color=FAINT, pad=6)
    axes.set_ylabel(f"{len(rows)} conversations")
    axes.set_yticks([])
    ticks = range(1, seen.plan.turns + 1, -(-seen.plan.turns // 20))
    axes.set_xticks([number - 0.5 for number in ticks], [str(number) for number in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if arm == ARMS[-1]:
        axes.set_xlabel("turn")


def _stripe(turn: Turn, length: int, line: int, workers: Sequence[str]) -> Rectangle:
    """Return the stripe of ``length`` equal turns that begins with ``turn``."""
    place, height = (turn.number - 1, line + 0.06), 0.88
    if turn.outcome == "failed":
        return Rectangle(place, length, height, facecolor=_FAILED, edgecolor=_EDGE, hatch="////")
    colour = _colour(turn.worker, workers) if turn.worker else _UNKNOWN
    return Rectangle(place, length, height, facecolor=colour, linewidth=0)


def _letter(axes: Axes, worker: str, number: int, line: int, workers: Sequence[str]) -> None:
    """Name the worker where a stripe begins."""
    axes.text(
        number - 1 + 0.07,
        line + 0.54,
        _name(workers.index(worker)),
        fontsize=6.5,
        color="white" if _colour(worker, workers) in _DARK else INK,
        va="center_baseline",
    )


def _colour(worker: str, workers: Sequence[str]) -> str:
    return PALETTE[workers.index(worker) % len(PALETTE)]


def _name(index: int) -> str:
    """Return A to Z, then A2 to Z2 and so on."""
    again, letter = divmod(index, 26)
    return chr(ord("A") + letter) + (str(again + 1) if again else "")


def _cached(axes: Axes, seen: Seen) -> None:
    axes.set_title("Prompt tokens from the KV cache", loc="left", fontweight="bold", pad=6)
    told = False
    for arm in ARMS:
        points = [
            (number, share)
            for number, turns in _by_turn(seen, arm)
            if (share := cached_share(turns)) is not None
        ]
        told = told or bool(points)
        _line(axes, arm, points)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(axes, seen, "" if told else "the engines do not report it")


def _first_token(axes: Axes, seen: Seen) -> None:
    axes.set_title("Time to first token, median", loc="left", fontweight="bold", pad=6)
    told = False
    for arm in ARMS:
        points = [
            (number, median(times))
            for number, turns in _by_turn(seen, arm)
            if (times := [turn.first_token_seconds for turn in turns if turn.first_token_seconds])
        ]
        told = told or bool(points)
        _line(axes, arm, points)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    in_milliseconds = axes.get_ylim()[1] < 1
    axes.yaxis.set_major_formatter(
        (lambda x, _: f"{x * 1000:g} ms") if in_milliseconds else "{x:g} s"
    )
    axes.set_xlabel("turn")
    _finish(axes, seen, "" if told else "no turn was answered")


def _by_turn(seen: Seen, arm: Arm) -> list[tuple[int, list[Turn]]]:
    return [
        (number, [turn for turn in seen.turns if turn.arm == arm and turn.number == number])
        for number in range(1, seen.plan.turns + 1)
    ]


def _line(axes: Axes, arm: Arm, points: Sequence[tuple[int, float]]) -> None:
    numbers, values = [number for number, _ in points], [value for _, value in points]
    axes.plot(numbers, values, label=ARM_TITLES[arm], clip_on=False, **_LINES[arm])


def _finish(axes: Axes, seen: Seen, nothing: str) -> None:
    axes.set_xlim(0.7, seen.plan.turns + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color=FAINT)
    if nothing:
        axes.text(0.5, 0.5, nothing, transform=axes.transAxes, ha="center", color=FAINT)
    else:
        axes.legend(frameon=False, loc="best", handlelength=2.8)


def _patches(seen: Seen, workers: Sequence[str]) -> list[Patch]:
    """Return the legend: which colour is which worker."""
    patches = [
        Patch(facecolor=_colour(worker, workers), label=f"{_name(index)}  {worker}")
        for index, worker in enumerate(workers)
    ]
    outcomes = {turn.outcome for turn in seen.turns}
    if "unknown" in outcomes:
        patches.append(Patch(facecolor=_UNKNOWN, label="answered, worker not named"))
    if "failed" in outcomes:
        patches.append(Patch(facecolor=_FAILED, edgecolor=_EDGE, hatch="////", label="failed"))
    return patches
