"""Draw the picture: a panel for each comparison, a dot for each median, a line for its spread."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .figures import Figure, Part, Table, Unit
from .report import limit
from .style import FAINT, INK, STYLE

# Okabe and Ito's colours, which colour-blind people can tell apart. Each has its own marker.
_SERIES = (
    *(("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^")),
    *(("#E69F00", "v"), ("#56B4E9", "P")),
)
_TICKS: Mapping[Unit, str] = {"ratio": "{:g}", "share": "{:g} %", "s": "{:g} s", "bytes": "{:,g} B"}
"""The units to draw. CPU times depend on the machine, and counts are in the tables."""
_NOT_DRAWN = ("wall time",)
"""Columns that only the tables have: they would dominate the axis of the first tokens."""

_COLUMN_WIDTH, _AXES_LEFT, _AXES_WIDTH = 6.4, 2.1, 4.1  # inches, like the sizes below
_SERIES_HEIGHT, _LINE_HEIGHT, _HEAD, _FOOT = 0.17, 0.155, 0.42, 0.72
_LABEL_CHARACTERS, _TITLE_CHARACTERS = 32, 84


@dataclass(frozen=True, slots=True)
class Panel:
    """The figures of a table that have the same unit, one line for each row with any."""

    part: str
    title: str
    unit: Unit
    series: tuple[str, ...]
    rows: tuple[tuple[str, Mapping[str, Figure]], ...]

    @property
    def titles(self) -> list[str]:
        """The lines of the title."""
        return wrap(self.title, _TITLE_CHARACTERS)

    @property
    def labels(self) -> list[list[str]]:
        """The lines of each row's name."""
        return [wrap(name, _LABEL_CHARACTERS) for name, _ in self.rows]

    @property
    def head(self) -> float:
        """The height above the axes, in inches."""
        return _HEAD + _LINE_HEIGHT * len(self.titles)

    @property
    def axes(self) -> float:
        """The height of the axes, in inches."""
        lines = _LINE_HEIGHT * max(map(len, self.labels))
        return len(self.rows) * (0.1 + max(lines, _SERIES_HEIGHT * len(self.series)))

    @property
    def height(self) -> float:
        """The height of the panel, in inches."""
        return self.head + self.axes + _FOOT


def panels(parts: Sequence[Part]) -> list[Panel]:
    """Return the panels of the parts that ran."""
    return [panel for part in parts for table in part.tables for panel in _panels(part, table)]


def _panels(part: Part, table: Table) -> Iterator[Panel]:
    for unit in _TICKS:
        rows = []
        for name, *cells in table.rows:
            found = {
                column: cell
                for column, cell in zip(table.columns[1:], cells, strict=True)
                if isinstance(cell, Figure) and cell.unit == unit and column not in _NOT_DRAWN
            }
            if found:
                rows.append((str(name), found))
        if rows:
            series = tuple(c for c in table.columns if any(c in found for _, found in rows))
            yield Panel(part.title, table.title, unit, series, tuple(rows))


def draw(parts: Sequence[Part], file: Path) -> None:
    """Draw the picture into ``file``, in the format of its suffix: ``.svg`` or ``.png``."""
    columns = _columns(panels(parts))
    width, height = _COLUMN_WIDTH * len(columns), max(map(_height, columns)) or 1
    with rc_context(STYLE):
        canvas = Canvas(figsize=(width, height))
        for place, column in enumerate(columns):
            left, top = place * _COLUMN_WIDTH + _AXES_LEFT, height
            for panel in column:
                bottom = top - panel.head - panel.axes
                box = (left / width, bottom / height, _AXES_WIDTH / width, panel.axes / height)
                _draw(canvas.add_axes(box), panel)
                top -= panel.height
        canvas.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)


def _columns(drawn: Sequence[Panel]) -> list[list[Panel]]:
    """Return the panels in two columns of about the same height."""
    columns: list[list[Panel]] = [[], []]
    for panel in drawn:
        left_is_full = _height(columns[0]) + panel.height / 2 > _height(drawn) / 2
        columns[bool(columns[1]) or (bool(columns[0]) and left_is_full)].append(panel)
    return columns if columns[1] else columns[:1]


def _height(column: Sequence[Panel]) -> float:
    return sum(panel.height for panel in column)


def _draw(axes: Axes, panel: Panel) -> None:
    share = 0.7 / len(panel.series)
    for line, (_, figures) in enumerate(panel.rows):
        for place, name in enumerate(panel.series):
            if name in figures:
                y = line + share * (place - (len(panel.series) - 1) / 2)
                _figure(axes, figures[name], y, share, *_SERIES[place % len(_SERIES)])
    if panel.unit == "ratio":
        axes.axvline(1, color=FAINT, linewidth=0.8, zorder=0)
    else:
        axes.set_xlim(left=0)
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(panel.rows)), ["\n".join(lines) for lines in panel.labels])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    scale = 100 if panel.unit == "share" else 1
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _TICKS[panel.unit].format(x * scale)))
    above = 72 * _LINE_HEIGHT * len(panel.titles) + 7
    for text, offset, weight in (
        (panel.part, above, "bold"),
        ("\n".join(panel.titles), 5, "normal"),
    ):
        axes.annotate(
            text,
            (-_AXES_LEFT / _AXES_WIDTH + 0.02, 1),
            (0, offset),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=9,
            fontweight=weight,
            annotation_clip=False,
        )
    _legend(axes, panel)


def _figure(axes: Axes, figure: Figure, y: float, height: float, colour: str, marker: str) -> None:
    """Draw the spread, the median (hollow if the runs don't agree) and the limit."""
    low, high = figure.spread
    axes.plot((low, high), (y, y), color=colour, linewidth=2.2, solid_capstyle="butt", alpha=0.55)
    fill_colour = colour if figure.is_clear else "white"
    axes.plot(
        (figure.median,), (y,), marker, color=colour, markerfacecolor=fill_colour, markersize=5
    )
    at = figure.at_most if figure.at_most is not None else figure.at_least
    if at is not None:
        axes.plot((at, at), (y - height / 2, y + height / 2), color=INK, linewidth=1.4)


def _legend(axes: Axes, panel: Panel) -> None:
    handles = []
    if len(panel.series) > 1:
        for name, (colour, marker) in zip(panel.series, _SERIES, strict=False):
            handles.append(Line2D([], [], color=colour, marker=marker, linewidth=0, label=name))
    if any(limit(figure) for _, figures in panel.rows for figure in figures.values()):
        handles.append(
            Line2D([], [], color=INK, marker="|", markersize=9, linewidth=0, label="limit")
        )
    if handles:
        axes.legend(
            handles=handles,
            loc="upper right",
            bbox_to_anchor=(1, 0),
            frameon=False,
            fontsize=7.5,
            ncols=len(handles),
            borderaxespad=2.4,
            handletextpad=0.3,
            columnspacing=1.2,
        )
