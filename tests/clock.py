"""Time that passes at once."""

import asyncio


def let_pass(seconds: float) -> None:
    """Put the clock of the running event loop forward, so that time limits of its calls end now.

    A test that waits for a short limit instead fails on a busy machine: what should have been done
    by then is not done.
    """
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]
