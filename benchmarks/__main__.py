"""The command line: ``python -m benchmarks [PART ...]``."""

import asyncio
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from harness.stopping import FAILURES, run_until_signal

from .figures import Part

MISSING = "{}: pip install -e . --group bench"

try:
    import click
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID, TextColumn

    from aiohttp_smg_routing.verify.options import output_file, picture_file
    from harness import tables

    from .report import Results, machine, markdown, show, write_json
except ModuleNotFoundError as error:
    sys.exit(MISSING.format(error))

PARTS = ("call", "turn", "stream", "growth", "sessions", "cache")
FAILED = 1
REFRESH_SECONDS = 0.2
WIDTH = 100  # of what goes into a file


@dataclass(slots=True)
class Run:
    """A run of the benchmark: what it is to do, and what it has measured so far."""

    names: Sequence[str]
    quick: bool
    parts: dict[str, Part] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    async def work(self, console: Console) -> None:
        """Measure part by part. A file gets a line for each, a terminal gets bars."""
        columns = TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[state]}")
        # No refresh from a thread: its CPU time would be one of what is measured in this process.
        with tables.bars(console, *columns, auto_refresh=False) as bars:
            waiting = {
                name: bars.add_task(f"{name:8}", start=False, total=1, state="")
                for name in self.names
            }
            for name, bar in waiting.items():
                # Imported by now and no sooner: what a part brings in is not in another's way.
                module = import_module(f"benchmarks.{name}")
                bars.start_task(bar)
                shown = Shown(console, bars, bar, name)
                shown(0, module.TITLE)
                begin = time.perf_counter()
                self.parts[name] = await module.run(shown, quick=self.quick)
                self.seconds[name] = time.perf_counter() - begin
                shown(1, "done")

    @property
    def results(self) -> Results:
        """What has been measured so far."""
        return Results(tuple(self.parts.values()), self.seconds, machine(), self.quick)


@dataclass(slots=True)
class Shown:
    """The progress of a part: its bar, or in a file a line for each new thing that it is at."""

    console: Console
    bars: Bars
    bar: TaskID
    name: str
    state: str = ""
    refreshed: float = 0

    def __call__(self, share: float, state: str) -> None:
        """Show how far the part is, 0 to 1, and what it is at."""
        self.bars.update(self.bar, completed=share, state=state)
        now = time.monotonic()
        if now - self.refreshed > REFRESH_SECONDS or state != self.state:
            self.bars.refresh()
            self.refreshed = now
        if state != self.state and not self.console.is_interactive:
            self.console.print(f"{self.name}: {state}", soft_wrap=True)
        self.state = state


def _picture(ctx: click.Context, param: click.Parameter, value: Path) -> Path | None:
    picture = picture_file(ctx, param, value)
    if find_spec("matplotlib") is None:
        raise click.UsageError(MISSING.format("No module named 'matplotlib'"))
    return picture


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True})
@click.argument("parts", nargs=-1, metavar="[PART]...", type=click.Choice(PARTS))
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=_FILE,
    callback=output_file,
    default="bench-results.json",
    help="Has all that was measured, every run of it.",
)
@click.option(
    "--picture",
    metavar="FILE",
    type=_FILE,
    callback=_picture,
    default="bench-results.svg",
    help="The picture: FILE.svg or FILE.png.",
)
@click.option(
    "--markdown",
    "markdown_file",
    metavar="FILE",
    type=_FILE,
    callback=output_file,
    help="Write the tables as Markdown too.",
)
@click.option("--quick", is_flag=True, help="Only show that it works: its figures mean nothing.")
def main(
    parts: Sequence[str],
    json_file: Path,
    picture: Path,
    markdown_file: Path | None,
    quick: bool,
) -> None:
    """Measure what the plugin costs and what pinning gains.

    The parts, all of them by default: call, turn, stream, growth, sessions, cache.

    Exit status: 0 it measured, whatever came out, 1 it failed, 2 it was called wrongly; 129, 130
    and 143 where a signal ended it.
    """
    console = tables.console()
    if not console.is_terminal:
        console.width = WIDTH
    run = Run(list(dict.fromkeys(parts or PARTS)), quick)
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
    results = run.results
    if results.parts:  # what was measured before a failure is worth reading
        show(results, console)
        write_json(results, json_file)
        import_module("benchmarks.picture").draw(results.parts, picture)
        if markdown_file:
            markdown_file.write_text(markdown(results), encoding="utf-8")
        written = [str(file) for file in (json_file, picture, markdown_file) if file]
        console.print(f"Written: {', '.join(written)}.", soft_wrap=True)
    if failure:
        print(f"The benchmark failed: {failure}", file=sys.stderr)
        sys.exit(FAILED)


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return MISSING.format(error)
    return str(error) or repr(error)


if __name__ == "__main__":
    main()
