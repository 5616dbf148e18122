"""A job that waits in a queue keeps the session that spawned it."""

import sys
from collections.abc import Callable
from typing import Any

from .context import in_current_scope
from .patch import Patch


def keep_sessions_in_jobs() -> Callable[[], None]:
    """Make each job of aiojobs run in the session of whoever spawns it; return what undoes it.

    aiojobs starts a job that had to wait from the end of another one, and so in the context of that
    one's session (aiojobs 1.4.0). Nothing happens where aiojobs is not imported.
    """
    aiojobs = sys.modules.get("aiojobs")
    return _spawn.hold(aiojobs.Scheduler, "spawn") if aiojobs else lambda: None


def _around(original: Callable[..., Any]) -> Callable[..., Any]:
    def spawn(scheduler: Any, coro: Any, *args: Any, **kwargs: Any) -> Any:
        return original(scheduler, in_current_scope(coro), *args, **kwargs)

    return spawn


_spawn = Patch(_around)
