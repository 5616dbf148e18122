"""A wrapper around a method of somebody else's class, for as long as anybody needs it."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any


class Patch:
    """Wraps a method in what ``around`` makes of it, from the first ``hold()`` to the last release.

    Others may wrap the method too, before or after. What they did stays; then ours may have to stay
    below it, and does nothing.
    """

    def __init__(self, around: Callable[..., Callable[..., Any]]) -> None:
        self._around = around
        self._lock = threading.Lock()
        self._holders: list[object] = []
        self._wrapper: Any = None

    def hold(self, owner: type, name: str) -> Callable[[], None]:
        """Wrap ``owner.name``, unless it is; return what releases it, which may be called twice."""
        holder = object()
        with self._lock:
            self._holders.append(holder)
            if not self._is_in(owner, name):
                self._wrapper = self._wrap(vars(owner)[name])
                setattr(owner, name, self._wrapper)

        def release() -> None:
            with self._lock:
                if holder in self._holders:
                    self._holders.remove(holder)
                if not self._holders and vars(owner)[name] is self._wrapper:
                    setattr(owner, name, self._wrapper.__wrapped__)

        return release

    def _is_in(self, owner: type, name: str) -> bool:
        layer = vars(owner)[name]
        while layer is not None and layer is not self._wrapper:
            layer = getattr(layer, "__wrapped__", None)
        return layer is not None

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        patched = self._around(original)

        @wraps(original)
        def wrapper(self_: Any, /, *args: Any, **kwargs: Any) -> Any:
            return (patched if self._holders else original)(self_, *args, **kwargs)

        return wrapper
