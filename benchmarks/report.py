"""The report of a run: tables on the terminal, the same as Markdown, and everything as JSON."""

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import starmap
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from harness import tables
from harness.markdown import head, row

from .figures import Figure, Part, Table, Verdict

_PACKAGES = ("aiohttp_smg_routing", "aiohttp", "uvloop", "smg", "xllamacpp")
_COLOURS: Mapping[Verdict, str] = {
    "reached": "green",
    "missed": "bold red",
    "too noisy to tell": "yellow",
}


@dataclass(frozen=True, slots=True)
class Results:
    """The results of a run of the benchmark, with the machine, the date and the time it took."""

    parts: tuple[Part, ...]
    seconds: Mapping[str, float]
    """Wall seconds of each part."""
    machine: Mapping[str, str]
    quick: bool

    @property
    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Each figure with a limit, and its place in the tables."""
        for part in self.parts:
            for table in part.tables:
                for cells in table.rows:
                    for column, cell in zip(table.columns, cells, strict=True):
                        if isinstance(cell, Figure) and limit(cell):
                            yield f"{part.name}: {cells[0]}, {column}", cell

    def with_verdict(self, verdict: Verdict) -> list[str]:
        """Return the places of the figures with that verdict."""
        return [place for place, figure in self.figures if figure.verdict == verdict]


def machine() -> dict[str, str]:
    """Describe the machine and the versions of the software."""
    described = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for package in _PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "not installed"
    return described


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def limit(figure: Figure) -> str:
    """Return the limit of a figure, such as ``≤ 1.05``; empty if it has none."""
    for sign, bound in (("≤", figure.at_most), ("≥", figure.at_least)):
        if bound is not None:
            percent = figure.unit == "share"
            number = f"{100 * bound if percent else bound:,.3f}".rstrip("0").rstrip(".")
            return f"{sign} {number} %" if percent else f"{sign} {number}"
    return ""


def verdict_of(figure: Figure) -> str:
    """Return the limit with the verdict, such as ``≤ 1.05: reached``; empty if it has none."""
    return f"{limit(figure)}: {figure.verdict}" if limit(figure) else ""


def show(results: Results, console: Console) -> None:
    """Print the tables of each part, the missed limits and the machine."""
    for part in results.parts:
        console.print(Text(f"\n{part.title}", "bold"))
        if part.headline:
            _print(console, part.headline)
        for table in part.tables:
            _print(console, table.title)
            console.print(_rich(table))
        for note in part.notes:
            _print(console, note)
    console.print()
    for line in conclusion(results):
        _print(console, line)
    told = ", ".join(f"{name} {what}" for name, what in results.machine.items())
    _print(console, f"Measured on: {told}.")


def _print(console: Console, text: str) -> None:
    # Wrapped here, because rich would leave blanks at the ends of lines.
    console.print(Text(fill(text, console.width, break_on_hyphens=False)), soft_wrap=True)


def _rich(table: Table) -> RichTable:
    shown = tables.table(*table.columns)
    for cells in table.rows:
        shown.add_row(*map(_rich_cell, cells))
    return shown


def _rich_cell(cell: str | Figure) -> Text:
    if isinstance(cell, str):
        return Text(cell)
    if not limit(cell):
        return Text(str(cell))
    verdict = Text(verdict_of(cell), _COLOURS[cell.verdict])
    return Text("\n").join([Text(str(cell)), verdict]) if cell.is_clear else verdict


def conclusion(results: Results) -> list[str]:
    """Say which limits were reached, which were missed, and which figures are too noisy."""
    lines = []
    if results.quick:
        lines.append("A quick run: it shows that all of it works, and its figures mean nothing.")
    count = sum(1 for _ in results.figures)
    reached = len(results.with_verdict("reached"))
    if count:
        lines.append(f"{reached} of {count} limits reached.")
    lines += [
        f"{verdict.capitalize()}: {'; '.join(places)}."
        for verdict in ("missed", "too noisy to tell")
        if (places := results.with_verdict(verdict))
    ]
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results.seconds.items())
    lines.append(f"It took {sum(results.seconds.values()):.0f} s ({took}).")
    return lines


def markdown(results: Results) -> str:
    """Return the tables and the notes as Markdown."""
    blocks = []
    for part in results.parts:
        if part.headline:
            blocks += [f"## In short: {part.name}", part.headline]
    for part in results.parts:
        blocks.append(f"## {part.title}")
        for table in part.tables:
            blocks += [f"**{table.title}**", "\n".join(_markdown_lines(table))]
        blocks += part.notes
    blocks += ["## How it was measured", *conclusion(results)]
    machine_rows = starmap(row, results.machine.items())
    blocks.append("\n".join([row("", ""), row("---", "---"), *machine_rows]))
    return "\n\n".join(blocks) + "\n"


def _markdown_lines(table: Table) -> Iterator[str]:
    yield head(*table.columns)
    for cells in table.rows:
        yield row(*map(_markdown_cell, cells))


def _markdown_cell(cell: str | Figure) -> str:
    if isinstance(cell, str):
        return cell
    if not limit(cell):
        return str(cell)
    return f"{cell}; {verdict_of(cell)}" if cell.is_clear else verdict_of(cell)


def write_json(results: Results, file: Path) -> None:
    """Write all results, with each run of each figure. Raises ``OSError``."""
    document = {
        "machine": dict(results.machine),
        "quick": results.quick,
        "seconds": dict(results.seconds),
        "parts": [
            {
                **asdict(part),
                "tables": [{**asdict(table), "rows": _json_rows(table)} for table in part.tables],
            }
            for part in results.parts
        ],
    }
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _json_rows(table: Table) -> Sequence[Sequence[Any]]:
    return [[_json_cell(cell) for cell in cells] for cells in table.rows]


def _json_cell(cell: str | Figure) -> Any:
    if isinstance(cell, str):
        return cell
    low, high = cell.spread
    summary = {"median": cell.median, "low": low, "high": high, "verdict": cell.verdict}
    return {"text": str(cell), **summary, **asdict(cell)}
