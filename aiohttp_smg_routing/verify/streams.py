"""Output streams that never fail, and consoles that write no control code into a file."""

import os
from io import StringIO, TextIOWrapper
from typing import IO, Any, TextIO, cast

from rich.console import Console

WIDTH = 80


def lasting(stream: TextIO | None) -> TextIO:
    """Return a stream that writes to ``stream`` without an error, even if it breaks or is None.

    A reader that goes away (``| head``) or a full disk must not change the exit status.
    """
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a server may say anything
    return cast("TextIO", _Lasting(stream or StringIO()))


class _Lasting:
    """The stream that ``lasting()`` returns."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_broken: bool = False

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
        """Flush what was written, or drop it."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Discard all output, even what is buffered: Python would try that again when it exits."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self.is_broken = True


def is_broken(stream: TextIO) -> bool:
    """Tell whether a stream of ``lasting()`` has lost its reader."""
    return isinstance(stream, _Lasting) and stream.is_broken


def terminal(stream: TextIO) -> Console:
    """Return a console of at most 80 columns that writes no control code to a file or pipe."""
    is_terminal = stream.isatty()
    # Explicit, or the environment could make rich write colours and moving bars into a file.
    console = Console(
        file=stream, force_terminal=is_terminal, force_interactive=is_terminal, highlight=False
    )
    console.width = columns(stream) if is_terminal else WIDTH
    return console


def columns(stream: IO[str]) -> int:
    """Return how many columns of a terminal to use; 0 of them mean that nobody knows its width."""
    return min(WIDTH, Console(file=stream).width or WIDTH)
