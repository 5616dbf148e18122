"""What a developer's program shows: a table, bars that move, and options that are numbers."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def console() -> Console:
    """Return the console that is standard output; a file gets no control codes."""
    # rich would let FORCE_COLOR put them, and moving bars, into a file.
    return Console(force_terminal=sys.stdout.isatty(), highlight=False)


def table(*columns: str, **options: Any) -> Table:
    """Return a table with no row yet: the first column has names, the others numbers."""
    made = Table(**options)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left")
    return made


def bars(console: Console, *more: ProgressColumn, **options: Any) -> Progress:
    """Return bars that show how far tasks are, with ``more`` after each; a file gets none."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    return Progress(*columns, *more, console=console, disable=not console.is_interactive, **options)


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader for an option of ``argparse``: an integer that must not be less."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number
