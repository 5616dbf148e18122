"""All that this package uses of aiohttp's private and deprecated parts, and nothing else.

Each function has one purpose, and a test in ``tests/unit/test_compat.py`` that fails if aiohttp
changes the part that it uses.
"""

import weakref
from collections.abc import Callable
from functools import cache, wraps
from operator import attrgetter
from types import FunctionType, SimpleNamespace
from typing import Any, TypeGuard

from aiohttp import StreamReader, TraceConfig, streams, web, web_urldispatcher
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client import ClientSession  # not from aiohttp, where a test may replace the name
from aiohttp.payload import Payload


def is_client_session(value: object) -> bool:
    """Tell whether ``value`` is a ``ClientSession``, and no mock that claims to be one."""
    return issubclass(type(value), ClientSession)


#: Returns the trace configs that a session runs. A subclass may override the public property.
hooks: Callable[[ClientSession], list[TraceConfig]] = attrgetter("_trace_configs")


def add_hook(session: ClientSession, hook: TraceConfig) -> None:
    """Add a trace config to a session that exists already."""
    hook.freeze()  # a session does that only in its constructor
    # A new list, because the old one may be the caller's, and in use by other sessions.
    session._trace_configs = [*hooks(session), hook]


def remove_hook(session: ClientSession, hook: TraceConfig) -> None:
    """Take a trace config off a session, if it is there."""
    session._trace_configs = [there for there in hooks(session) if there is not hook]


def wrap_constructor(made: Callable[[ClientSession], None], layer: Any) -> Any:
    """Call ``made`` for each ``ClientSession`` from now on; return the wrapper that does it.

    ``layer`` is the wrapper of an earlier call, which is returned if it is still in force. Other
    code may wrap the constructor too, before or after.
    """
    original = vars(ClientSession)["__init__"]
    if layer is not None and _stands_on(original, layer):
        return layer

    @wraps(original)
    def constructor(session: ClientSession, /, *args: Any, **kwargs: Any) -> None:
        _bound(original, session)(*args, **kwargs)
        if hasattr(session, "_trace_configs"):  # a mock of the constructor makes nothing
            made(session)

    setattr(ClientSession, "__init__", constructor)  # noqa: B010 - mypy minds the other form
    return constructor


def unwrap_constructor(layer: Any) -> bool:
    """Undo ``wrap_constructor()``. If another wrapper is around ours, ours stays: return False."""
    if vars(ClientSession)["__init__"] is not layer:
        return False
    setattr(ClientSession, "__init__", layer.__wrapped__)  # noqa: B010
    return True


def _bound(function: Any, instance: object) -> Callable[..., Any]:
    """Bind a method as Python does: other code may have replaced it by any object."""
    bind = getattr(type(function), "__get__", None)
    return bind(function, instance, type(instance)) if bind else function  # type: ignore[no-any-return]


def _stands_on(outermost: Any, layer: Any) -> bool:
    while outermost is not None and outermost is not layer:
        outermost = getattr(outermost, "__wrapped__", None)
    return outermost is layer


@cache
def unreader() -> Callable[[StreamReader, bytes], None]:
    """Return ``StreamReader.unread_data()``, which puts bytes back at the beginning of a stream.

    This copy does not warn that it is deprecated, because nothing public replaces it. If warnings
    are errors, the warning would lose the body. Silencing it for each request would make the
    server's own warnings appear again and again.
    """
    silent = {**vars(streams), "warnings": SimpleNamespace(warn=lambda *_, **__: None)}
    return FunctionType(StreamReader.unread_data.__code__, silent)


def has_own_expect_handler(request: web.Request) -> bool:
    """Tell whether the user's route decides when a client may send the body."""
    default = web_urldispatcher._default_expect_handler
    return getattr(request.match_info.route, "_expect_handler", default) is not default


def writer_of(request: web.Request) -> "weakref.ref[AbstractStreamWriter] | None":
    """Return the writer of a request's answer; None if it is a mock without weak references."""
    try:
        return weakref.ref(request.writer)
    except TypeError:
        return None


def is_answered(writer: AbstractStreamWriter) -> bool:
    """Tell whether an answer is sent, or can no longer be sent, and no code is at work on it."""
    current = getattr(getattr(writer, "protocol", None), "_current_request", None)
    if current is not None and current.writer is writer:  # a middleware has yet to return
        return False
    transport = getattr(writer, "transport", None)  # aiohttp 3.9 promises none
    return getattr(writer, "_eof", True) or transport is None or transport.is_closing()


def is_to_be_sent(response: object) -> "TypeGuard[web.Response]":
    """Tell whether aiohttp sends an answer's body in pieces after its handler has returned."""
    return isinstance(getattr(response, "_body", None), Payload)  # a subclass may have its own body


def storage_name(key: object) -> str:
    """Return the name of an ``AppKey`` or ``RequestKey`` with its module, or a text as it is."""
    return key if isinstance(key, str) else getattr(key, "_name", "")


def request_key(name: str, kind: type) -> Any:
    """Return a key of a request's storage: a text if aiohttp is older than 3.14."""
    return getattr(web, "RequestKey", lambda name, _: name)(name, kind)
