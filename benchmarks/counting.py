"""Count the calls of the plugin's core, a figure that a busy machine doesn't change."""

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType

import aiohttp_smg_routing

# A turn doesn't run the subpackages.
_CORE = {str(file) for file in Path(aiohttp_smg_routing.__file__).parent.glob("*.py")}


async def calls_into_plugin(work: Callable[[], Awaitable[object]]) -> int:
    """Return how many calls of the core's functions ``work`` makes, in this process."""
    # A set, because Python reports a coroutine's frame again each time it resumes.
    frames: set[FrameType] = set()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename in _CORE:
            frames.add(frame)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        await work()
    finally:
        sys.setprofile(before)
    return len(frames)
