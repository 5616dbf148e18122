"""The command lines: ``python -m benchmarks [PART ...]``, ``… trace FILE ...``."""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from . import MISSING
from .figures import Part

try:
    import click

    from .options import FILE, output_file, picture_file
    from .running import Measure, Run, measure
except ModuleNotFoundError as error:
    sys.exit(MISSING.format(error))

PARTS = ("call", "turn", "stream", "growth", "sessions", "cache")
TRACE = "trace"
"""This part has its own command line, because it needs files and takes longer."""


def _picture(ctx: click.Context, param: click.Parameter, value: Path) -> Path | None:
    picture = picture_file(ctx, param, value)
    if find_spec("matplotlib") is None:
        raise click.UsageError(MISSING.format("No module named 'matplotlib'"))
    return picture


@click.command(context_settings={"show_default": True})
@click.argument("parts", nargs=-1, metavar="[PART]...", type=click.Choice(PARTS))
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=FILE,
    callback=output_file,
    default="bench-results.json",
    help="Has all that was measured, every run of it.",
)
@click.option(
    "--picture",
    metavar="FILE",
    type=FILE,
    callback=_picture,
    default="bench-results.svg",
    help="The picture: FILE.svg or FILE.png.",
)
@click.option(
    "--markdown",
    "markdown_file",
    metavar="FILE",
    type=FILE,
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

    The parts, all of them by default: call, turn, stream, growth, sessions, cache. And one by
    itself: python -m benchmarks trace --help

    Exit status: 0 it measured, whatever came out, 1 it failed, 2 it was called wrongly; 129, 130
    and 143 where a signal ended it.
    """
    run = Run({name: partial(_load, name, quick) for name in parts or PARTS}, quick)
    measure(run, json_file=json_file, picture=picture, markdown_file=markdown_file, draw=_draw)


def _load(name: str, quick: bool) -> tuple[str, Measure]:
    module = import_module(f"benchmarks.{name}")
    return module.TITLE, partial(module.run, quick=quick)


def _draw(parts: Sequence[Part], file: Path) -> None:
    import_module("benchmarks.picture").draw(parts, file)


def run() -> None:
    """Run the benchmark, or its part ``trace``."""
    if sys.argv[1:2] == [TRACE]:
        try:
            from .trace.command import main as trace
        except ModuleNotFoundError as error:
            sys.exit(MISSING.format(error))
        # Some arms move sessions on purpose, which the log need not report.
        logging.getLogger("aiohttp_smg_routing").setLevel(logging.ERROR)
        trace(sys.argv[2:], prog_name=f"python -m benchmarks {TRACE}")
    main()


if __name__ == "__main__":
    run()
