"""Run parts one after the other, show their progress, and write their results."""

import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID, TextColumn

from harness import tables
from harness.stopping import FAILURES, run_until_signal

from . import MISSING
from .figures import Part, Progress
from .report import Results, machine, markdown, show, write_json

FAILED = 1
REFRESH_SECONDS = 0.2
WIDTH = 100  # characters of a line in a file

Measure = Callable[[Progress], Awaitable[Part]]
LoadPart = Callable[[], tuple[str, Measure]]
"""Returns the title of a part, and the function that measures it."""


class Draw(Protocol):
    """Draws a picture of the results into a file."""

    def __call__(self, parts: Sequence[Part], file: Path) -> None:
        """Draw."""


@dataclass(slots=True)
class Run:
    """A run of the benchmark: its parts, and their results so far."""

    loads: Mapping[str, LoadPart]
    """The parts by name. A part is loaded when it begins."""

    quick: bool
    parts: dict[str, Part] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    async def work(self, console: Console) -> None:
        """Measure part by part. A terminal gets bars, a file gets lines."""
        columns = TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[state]}")
        # No refresh from a thread, because it would count in this process's CPU time.
        with tables.bars(console, *columns, auto_refresh=False) as bars:
            waiting = {
                name: bars.add_task(f"{name:8}", start=False, total=1, state="")
                for name in self.loads
            }
            for name, bar in waiting.items():
                # Imported only now, so that the imports of one part don't disturb another.
                title, measure = self.loads[name]()
                bars.start_task(bar)
                shown = Shown(console, bars, bar, name)
                shown(0, title)
                begin = time.perf_counter()
                self.parts[name] = await measure(shown)
                self.seconds[name] = time.perf_counter() - begin
                shown(1, "done")

    @property
    def results(self) -> Results:
        """The results so far."""
        return Results(tuple(self.parts.values()), self.seconds, machine(), self.quick)


@dataclass(slots=True)
class Shown:
    """The progress of a part: a bar on a terminal, or a line in a file for each step."""

    console: Console
    bars: Bars
    bar: TaskID
    name: str
    state: str = ""
    refreshed: float = 0

    def __call__(self, share: float, state: str) -> None:
        """Show the share that is done, 0 to 1, and the current step."""
        self.bars.update(self.bar, completed=share, state=state)
        now = time.monotonic()
        if now - self.refreshed > REFRESH_SECONDS or state != self.state:
            self.bars.refresh()
            self.refreshed = now
        if state != self.state and not self.console.is_interactive:
            self.console.print(f"{self.name}: {state}", soft_wrap=True)
        self.state = state


def measure(
    run: Run,
    *,
    json_file: Path | None,
    picture: Path | None,
    markdown_file: Path | None,
    draw: Draw,
    width: int = WIDTH,
) -> None:
    """Measure, show the results and write the files; exit with the status.

    ``width`` is the number of characters in a line if there is no terminal.
    """
    console = tables.console()
    if not console.is_terminal:
        console.width = width
    try:
        failure = ""
        stopped_by = asyncio.run(run_until_signal(run.work(console)))
    except Exception as error:
        if not isinstance(error, FAILURES):
            traceback.print_exc()
        failure, stopped_by = _reason(error), None
    if stopped_by:
        print(f"Stopped by {stopped_by.name}; all processes are gone.", file=sys.stderr)
        sys.exit(128 + stopped_by)
    if run.parts:  # keep the results from before a failure
        show(run.results, console)
        files = json_file, picture, markdown_file
        _write(run.results, draw, *files)
        if written := [str(file) for file in files if file]:
            console.print(f"Written: {', '.join(written)}.", soft_wrap=True)
    if failure:
        print(f"The benchmark failed: {failure}", file=sys.stderr)
        sys.exit(FAILED)


def _write(
    results: Results, draw: Draw, json_file: Path | None, picture: Path | None, text: Path | None
) -> None:
    if json_file:
        write_json(results, json_file)
    if picture:
        draw(results.parts, picture)
    if text:
        text.write_text(markdown(results), encoding="utf-8")


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return MISSING.format(error)
    return str(error) or repr(error)
