"""How often a piece of work calls the plugin: a count that no busy machine changes."""

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType

import aiohttp_smg_routing

_PACKAGE = str(Path(aiohttp_smg_routing.__file__).parent)


async def calls_into_plugin(work: Callable[[], Awaitable[object]]) -> int:
    """Return how many calls of the plugin's functions ``work`` makes, in this process."""
    # A coroutine's frame is "called" each time it goes on after a wait: that is no new call.
    frames: set[FrameType] = set()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            frames.add(frame)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        await work()
    finally:
        sys.setprofile(before)
    return len(frames)
