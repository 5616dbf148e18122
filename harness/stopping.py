"""Ends a program that starts processes: a signal cancels it, and it cleans up."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")

#: What may go wrong with processes and the calls to them; anything else is a mistake in the code.
FAILURES = (aiohttp.ClientError, asyncio.TimeoutError, ImportError, OSError, RuntimeError)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run_until_signal(work: Coroutine[Any, Any, T]) -> T | signal.Signals:
    """Do ``work`` and return its result, or the signal that ended it once all is cleaned up."""
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:  # a second one must not cut the clean-up short
            task.cancel()

    task = asyncio.ensure_future(work)
    for number in _STOP_SIGNALS:
        nohup = number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
        if not nohup:
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except (asyncio.CancelledError, *FAILURES):  # a failure while cancelled is a stop, too
        if received:
            return received[0]
        raise


def exit_status(name: str, work: Coroutine[Any, Any, int]) -> int:
    """Do the ``work`` of a program and return its exit status; print why if it did not end."""
    try:
        outcome = asyncio.run(run_until_signal(work))
    except FAILURES as error:
        print(f"The {name} failed: {str(error) or repr(error)}", file=sys.stderr)
        return 1
    if isinstance(outcome, signal.Signals):
        print(f"Stopped by {outcome.name}; all processes are gone.", file=sys.stderr)
        return 128 + outcome
    return outcome
