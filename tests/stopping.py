"""Helpers for tests that stop a program by a signal."""

import signal
from asyncio.subprocess import Process


async def until_it_says(process: Process, words: bytes) -> None:
    """Read a program's output up to a line with these words."""
    assert process.stdout is not None
    while words not in (line := await process.stdout.readline()):
        assert line, (await process.communicate())[1].decode()


async def assert_stopped(process: Process, number: signal.Signals, status: int) -> None:
    """Send the signal; assert that the program ends cleanly and says why."""
    process.send_signal(number)
    _, err = await process.communicate()
    assert process.returncode == status
    assert err.decode() == f"Stopped by {number.name}; all processes are gone.\n"
