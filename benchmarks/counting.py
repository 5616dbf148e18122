"""How often a piece of work calls the plugin's core: a count that no busy machine changes."""

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType

import aiohttp_smg_routing

# Its subpackages, ``testing`` and ``verify``, are not part of what a turn costs.
_CORE = {str(file) for file in Path(aiohttp_smg_routing.__file__).parent.glob("*.py")}


async def calls_into_plugin(work: Callable[[], Awaitable[object]]) -> int:
    """Return how many calls of the core's functions ``work`` makes, in this process."""
    # Python reports a coroutine's frame each time it resumes, which is no new call.
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
