"""A job that waits in a queue keeps the session that spawned it."""

from typing import TYPE_CHECKING, Any

from .context import in_current_scope

if TYPE_CHECKING:
    from aiojobs import Scheduler


def keep_sessions(scheduler: "Scheduler") -> None:
    """Make each job of an aiojobs scheduler run in the session of whoever spawns it.

    aiojobs starts a job that had to wait from the end of another one, and so in the context of that
    one's session (aiojobs 1.4.0).
    """
    spawn = scheduler.spawn

    async def spawn_in_scope(coroutine: Any, *args: Any, **kwargs: Any) -> Any:
        return await spawn(in_current_scope(coroutine), *args, **kwargs)

    scheduler.spawn = spawn_in_scope  # type: ignore[assignment,method-assign]
