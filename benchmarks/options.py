"""Check the options of the command lines."""

import os
from math import isnan
from pathlib import Path
from typing import Any

import click

FILE = click.Path(dir_okay=False, path_type=Path)


class Range(click.FloatRange):
    """A range of numbers that excludes ``nan``, which click accepts in any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or fail if it is ``nan``."""
        number = super().convert(value, param, ctx)
        if isnan(number):
            self.fail("it is no number.", param, ctx)
        return number


def output_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that can't be written, before the run instead of after it."""
    if value is not None:
        place = value if value.exists() else value.parent
        if value.is_dir() or not os.access(place, os.W_OK):  # Path("") is a folder too
            raise click.BadParameter(f"{str(value)!r} can't be written.")
    return value


def picture_file(ctx: click.Context, param: click.Parameter, value: Path) -> Path | None:
    """Also refuse a file whose name ends in neither ``.svg`` nor ``.png``."""
    if value.suffix not in (".svg", ".png"):
        raise click.BadParameter(f"{str(value)!r} ends neither in .svg nor in .png.")
    return output_file(ctx, param, value)
