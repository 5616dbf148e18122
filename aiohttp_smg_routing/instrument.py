"""Every ClientSession: one hook on each that the process makes, whoever makes it."""

import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from aiohttp import ClientSession

from .config import RoutingConfig, as_config
from .hook import RoutingTraceConfig, Target, add_hook
from .ledger import PinLedger


class _EveryHook(RoutingTraceConfig):
    """The hook on every session; its targets are those of each ``instrument()`` in force.

    It is one for all, and asks at each call: a session that a library keeps for the whole process
    serves an app that starts later too, and is left with a hook that does nothing when all is
    undone.
    """


_hook = _EveryHook()
_lock = threading.Lock()
_constructor: Any = None  # ours, while it is in use


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
    target = Target(config, pins)
    if config.enabled:
        with _lock:
            _hook.targets = (*_hook.targets, target)
            _wrap_constructor()

    def undo() -> None:
        with _lock:
            _hook.targets = tuple(other for other in _hook.targets if other is not target)
            if not _hook.targets:
                _unwrap_constructor()

    return undo


def instrument_session(session: ClientSession) -> None:
    """Put the hook of ``instrument()`` on a session, unless it is there."""
    if _hook not in session.trace_configs:
        add_hook(session, _hook)


def _wrap_constructor() -> None:
    global _constructor
    original: Any = ClientSession.__init__
    layer = original
    while layer is not None:  # others may have wrapped it too, over ours
        if layer is _constructor:
            return
        layer = getattr(layer, "__wrapped__", None)

    @wraps(original)
    def constructor(self: ClientSession, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _hook.targets:
            instrument_session(self)

    _constructor = constructor
    ClientSession.__init__ = constructor  # type: ignore[method-assign]


def _unwrap_constructor() -> None:
    global _constructor
    # Over a wrapper of somebody else's it stays where it is, and does nothing.
    if ClientSession.__init__ is _constructor:
        ClientSession.__init__ = _constructor.__wrapped__  # type: ignore[attr-defined,method-assign]
        _constructor = None
