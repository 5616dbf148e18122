"""Where a moment is shown: a picture on a terminal, or lines in a log or for a program."""

from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..verify.judge import Verdict
from ..verify.report import COLOURS
from ..verify.streams import columns
from .document import document
from .report import lines
from .view import View

Show = Callable[[View, Verdict], None]


class Picture:
    """In its block it redraws the whole terminal. The last picture stays there at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._last: Text | None = None

    def __enter__(self) -> Show:
        self._live.start()
        return self._redraw

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()
        if self._last is not None:
            self._console.print(self._last, soft_wrap=True)

    def _redraw(self, view: View, verdict: Verdict) -> None:
        # The console has a fixed width, and the terminal may have shrunk below it.
        self._console.width = columns(self._console.file)
        width, height = self._console.size
        # A Text, because what a server said must not count as markup.
        text = "\n".join(lines(view, verdict, width, height))
        self._last = Text(text, no_wrap=True, overflow="crop")
        self._last.highlight_words([verdict.answer.capitalize()], COLOURS[verdict.answer])
        self._live.update(self._last, refresh=True)


class Log:
    """Prints each moment as a block of lines. A new cause is explained, an old one only named."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: frozenset[str] = frozenset()

    def __call__(self, view: View, verdict: Verdict) -> None:
        """Print a block."""
        block = "\n".join((*lines(view, verdict, told=self._told), ""))
        self._console.print(Text(block), soft_wrap=True)
        self._told = frozenset(cause.name for cause in verdict.causes)


class Json:
    """Prints each moment as a line of JSON."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, view: View, verdict: Verdict) -> None:
        """Print a line."""
        self._console.print(Text(document(view, verdict)), soft_wrap=True)
