"""Every ClientSession: one hook on each that the process makes, whoever makes it."""

from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import ClientSession
from yarl import URL

from .config import RoutingConfig, as_config
from .hook import RoutingTraceConfig, Target, add_hook, hooks
from .ledger import PinLedger
from .patch import Patch


class _EveryHook(RoutingTraceConfig):
    """The hook on every session; its targets are those of each ``instrument()`` in force.

    It is one for all, and asks at each call: a session that a library keeps for the whole process
    serves an app that starts later too, and is left with a hook that does nothing when all is
    undone.
    """

    def target(self, method: str, url: URL) -> Target | None:
        """Return the first target whose config tags a call, and which fails none, if there is one.

        It matters outside of requests only: within one, the call is that of the request's app.
        """
        tagging = [target for target in self.targets if target.config.tags(method, url)]
        return min(tagging, key=lambda it: it.config.on_missing == "raise", default=None)


_hook = _EveryHook()


def instrument(
    config: RoutingConfig | Mapping[str, Any], pins: PinLedger | None = None
) -> Callable[[], None]:
    """Put the hook on every ``ClientSession`` that is made from now on; return what undoes it.

    For sessions that other people's code makes and keeps to itself: it wraps the constructor of
    ``aiohttp.ClientSession``, for subclasses and for whoever has imported the class already. The
    rule for a call stays the same: to the gateway, to a path of the config, in a session; no other
    traffic is touched. Where you make the ``ClientSession`` yourself, use
    ``routing_trace_config()``. Several in force at once work side by side, and a session has one
    hook for all of them. A session that was made before has none. Nothing happens where
    ``config`` is not enabled.

    ``client_session = "all"`` does this for as long as an app runs.

    >>> undo = instrument({"gateway": "http://10.0.0.1:30000"})
    >>> undo()
    """
    config = as_config(config)
    if not config.enabled:
        return lambda: None
    target = Target(config, pins)
    _hook.targets.append(target)
    release = _constructor.hold(ClientSession, "__init__")

    def undo() -> None:
        if target in _hook.targets:
            _hook.targets.remove(target)
        release()

    return undo


def instrument_session(session: ClientSession) -> None:
    """Put the hook of ``instrument()`` on a session, unless it is there."""
    if not any(there is _hook for there in hooks(session)):
        add_hook(session, _hook)


def _around(original: Callable[..., None]) -> Callable[..., None]:
    def constructor(session: ClientSession, *args: Any, **kwargs: Any) -> None:
        original(session, *args, **kwargs)
        instrument_session(session)

    return constructor


_constructor = Patch(_around)
