"""Draw each arm's share of the limit, a panel for each trace and room."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from benchmarks.figures import Figure, Part, Table
from benchmarks.style import FAINT, INK, STYLE

from .measure import DONE, INFINITE, OF_LIMIT, ONE_LRU

PANELS = 2
"""The most traces to draw, each with two rooms; more would be hard to read."""

KEY, NO_KEY = "#0072B2", "#E69F00"  # Okabe and Ito's colours


def draw(parts: Sequence[Part], file: Path) -> None:
    """Draw the first and the last room of the first two traces, as ``.svg`` or ``.png``."""
    shown = [
        [(part, table) for table in dict.fromkeys([part.tables[0], part.tables[-1]])]
        for part in [part for part in parts if OF_LIMIT in part.tables[0].columns][:PANELS]
    ]
    columns = max(map(len, shown), default=1)
    lines = max((len(table.rows) for row in shown for _, table in row), default=1)
    with rc_context({**STYLE, "axes.spines.bottom": False}):
        height = 0.7 + len(shown) * (1.0 + 0.27 * lines)
        canvas = Canvas(figsize=(1.6 + 4.6 * columns, height), layout="constrained")
        panels = canvas.subplots(max(len(shown), 1), columns, squeeze=False)
        for line, row in enumerate(panels):
            for place, axes in enumerate(row):
                if line < len(shown) and place < len(shown[line]):
                    _panel(axes, *shown[line][place], names=not place)
                else:
                    axes.set_axis_off()
        patches = [
            Patch(color=KEY, label="the gateway pins by the key"),
            Patch(color=NO_KEY, label="no key"),
        ]
        canvas.legend(
            handles=patches, loc="outside lower right", ncols=2, frameon=False, fontsize=8
        )
        canvas.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)


def _panel(axes: Axes, part: Part, table: Table, *, names: bool) -> None:
    rows = {
        str(name): dict(zip(table.columns[1:], cells, strict=True)) for name, *cells in table.rows
    }
    rows.pop(INFINITE)
    lru = rows.pop(ONE_LRU)[OF_LIMIT]
    for line, (name, cells) in enumerate(rows.items()):
        share, done = cells[OF_LIMIT], cells[DONE]
        assert isinstance(share, Figure) and isinstance(done, Figure)  # noqa: PT018, S101
        axes.barh(line, share.median, 0.72, color=NO_KEY if "no key," in f"{name}," else KEY)
        axes.annotate(
            f"{100 * share.median:.0f} %, done in {done.median:,.0f} s",
            (share.median, line),
            (4, 0) if share.median < 0.6 else (-4, 0),
            textcoords="offset points",
            ha="left" if share.median < 0.6 else "right",
            va="center",
            fontsize=7.5,
            color=INK if share.median < 0.6 or "no key," in f"{name}," else "white",
        )
    assert isinstance(lru, Figure)  # noqa: S101
    axes.axvline(1, color=INK, linewidth=1)
    axes.axvline(lru.median, color=FAINT, linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate(
        "one LRU cache",
        (lru.median, -0.5),
        (-3, 1),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=7,
        color=FAINT,
    )
    axes.set_xlim(0, 1.02)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), list(rows) if names else [""] * len(rows))
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "limit"])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=7.5)
    room = table.title.partition(":")[0]
    axes.set_title(
        fill(f"{part.title}. {room}", 60), loc="left", fontsize=9, fontweight="bold", pad=14
    )
