"""Streams to write to that never fail, and consoles that put no control code into a file."""

import os
from io import StringIO, TextIOWrapper
from typing import Any, TextIO, cast

from rich.console import Console

_WIDTH = 80


def lasting(stream: TextIO | None) -> TextIO:
    """Return ``stream`` such that it may break, fill up, or be None without an error.

    A reader that goes away (``| head``) or a full disk is no reason to end otherwise.
    """
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # what a server says fits no encoding surely
    return cast("TextIO", _Lasting(stream or StringIO()))


class _Lasting:
    """What ``lasting()`` returns: the stream, but for what can fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``, or drop it."""
        try:
            self._stream.write(text)
        except OSError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Send on what was written, or drop it."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Let all go nowhere, what is buffered too: Python would try that again at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def terminal(stream: TextIO) -> Console:
    """Return a console of 80 columns at the most; no control code gets into a file or a pipe."""
    is_terminal = stream.isatty()
    # Given, because rich would let the environment put colours and moving bars into a file.
    console = Console(
        file=stream, force_terminal=is_terminal, force_interactive=is_terminal, highlight=False
    )
    if not is_terminal or console.width > _WIDTH:
        console.width = _WIDTH
    return console
