"""Checks the options of the command line. No error shows a secret."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

import click
from yarl import URL

from ..gateway import is_header_name
from .chain import endpoint

API_KEY_VARIABLE = "SMG_API_KEY"

# A name, or an address that may have a zone. yarl takes what can't be a host, such as <host>.
_HOST = re.compile(r"[\w.~-]+|[\da-f:.]+(%[\w.~-]+)?", re.IGNORECASE)


class FiniteRange(click.FloatRange):
    """A range of numbers that refuses ``nan`` and ``inf``, which pass click's lower bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or fail."""
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail("it is not a finite number.", param, ctx)
        return number


def without_urls(message: str, argv: Sequence[str]) -> str:
    """Return ``message`` without the URLs of the command line, which may have a password."""
    for argument in argv:
        for piece in (argument, argument.partition("=")[2]):
            if "://" in piece or "@" in piece:
                message = message.replace(piece, "***").replace(repr(piece)[1:-1], "***")
    return message


def url(ctx: click.Context, param: click.Parameter, value: str | None) -> URL | None:
    """Read an absolute http(s) URL without a password: other users can see a command line."""
    if value is None:
        return None
    with suppress(ValueError):
        url = URL(value)
        if url.user is not None or url.password is not None:
            raise click.BadParameter(f"no user or password in a URL: use {API_KEY_VARIABLE}.")
        is_whole = url.scheme in ("http", "https") and not url.query_string + url.fragment
        if is_whole and _HOST.fullmatch(url.host or ""):
            return url
    raise click.BadParameter("it is not a URL of the form http://HOST:PORT.")


def through(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Complete the URL of a session server's chat completions."""
    if value is None:
        return None
    path, _, query = value.partition("?")
    if query and not re.fullmatch(r"[\w.-]+=\{session_id\}", query):
        raise click.BadParameter("its query may be NAME={session_id} and nothing else.")
    elsewhere = ctx.params.get("session_header") or ctx.params.get("session_json")
    if "{session_id}" not in value and not elsewhere:
        base = path.rstrip("/")
        value = base + ("/" if base.endswith("/sessions") else "/sessions/") + "{session_id}"
    url(ctx, param, value.partition("?")[0].replace("{session_id}", "id"))
    return endpoint(value)


def header_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse a string that can't be the name of a header."""
    if value is None or is_header_name(value):
        return value
    raise click.BadParameter("it can't be the name of a header.")


def json_path(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse a dotted path with an empty part."""
    if value is None or all(value.split(".")):
        return value
    raise click.BadParameter("it is not a path such as metadata.session_id.")


def session_id(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse a pattern under which all sessions would have one id."""
    if "{n}" not in value or not value.isprintable():
        raise click.BadParameter("it needs {n}, the number of the session, and no control codes.")
    return value


def model(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse a name that can't be printed, such as one with bytes that are no UTF-8."""
    if value is None or value.isprintable():
        return value
    raise click.BadParameter("it is not printable text.")


def output_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that can't be written, before the run and not after it."""
    if value is None:
        return None
    place = value if value.exists() else value.parent
    if value.is_dir() or not os.access(place, os.W_OK):  # Path("") is a folder too
        raise click.BadParameter(f"{str(value)!r} can't be written.")
    return value


def picture_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse also a file whose name ends in neither ``.svg`` nor ``.png``."""
    if value is not None and value.suffix not in (".svg", ".png"):
        raise click.BadParameter(f"{str(value)!r} ends neither in .svg nor in .png.")
    return output_file(ctx, param, value)


def api_key(file: Path | None) -> str | None:
    """Return the key from the file, else from the environment. No error shows any of it."""
    try:
        text = file.read_text("utf-8") if file else os.environ.get(API_KEY_VARIABLE, "")
    except (OSError, ValueError):
        raise click.BadParameter(f"{str(file)!r} can't be read.") from None
    key = text.strip()
    if not (key.isascii() and key.isprintable()) or (file and not key):
        raise click.BadParameter("the API key is not one line of ASCII.")
    return key or None
