"""Makes Ctrl-C and SIGTERM end a run, but not the report on it."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from types import FrameType
from typing import Any


class Stop:
    """In its block, the first Ctrl-C or SIGTERM ends the run. Later ones do not end the report.

    A signal that is ignored when the block begins, as under ``nohup``, stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._cancel: Callable[[], object] = _nothing
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before = {
            number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN
        }

    def __enter__(self) -> "Stop":
        for number in self._before:
            signal.signal(number, self._heard)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._cancel()

    async def run(self, work: Coroutine[Any, Any, object]) -> None:
        """Do ``work`` to its end, or until a signal. Nothing is left running."""
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)
        self._cancel = partial(loop.call_soon_threadsafe, task.cancel)
        if self.received is not None:  # it came before the run began
            task.cancel()
        try:
            await asyncio.wait({task})
        finally:
            self._cancel = _nothing
        if not task.cancelled():
            task.result()


def _nothing() -> None:
    pass
