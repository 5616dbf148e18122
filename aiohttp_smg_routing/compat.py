"""Everything private or deprecated in aiohttp that this package leans on, and nothing else.

Each function has one purpose, and a test in ``tests/unit/test_compat.py`` that fails when aiohttp
changes what it leans on.
"""

import weakref
from collections.abc import Callable
from functools import cache, wraps
from operator import attrgetter
from types import FunctionType, SimpleNamespace
from typing import Any, TypeGuard

from aiohttp import StreamReader, TraceConfig, streams, web, web_urldispatcher
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client import ClientSession  # where it is defined: the name in aiohttp may be replaced
from aiohttp.payload import Payload


def is_client_session(value: object) -> bool:
    """Tell whether ``value`` is a ``ClientSession``, and not a mock that claims to be one."""
    return issubclass(type(value), ClientSession)


#: Returns the trace configs that a session runs; the public property can be overridden.
hooks: Callable[[ClientSession], list[TraceConfig]] = attrgetter("_trace_configs")


def add_hook(session: ClientSession, hook: TraceConfig) -> None:
    """Add a trace config to a session that exists already."""
    hook.freeze()  # a session does that in its constructor only
    # A new list: the old one may be the caller's own, and that of other sessions.
    session._trace_configs = [*hooks(session), hook]


def remove_hook(session: ClientSession, hook: TraceConfig) -> None:
    """Take a trace config off a session, where it is there."""
    session._trace_configs = [there for there in hooks(session) if there is not hook]


def wrap_constructor(made: Callable[[ClientSession], None], layer: Any) -> Any:
    """Call ``made`` for each ``ClientSession`` from now on; return the wrapper that does it.

    ``layer`` is the wrapper of an earlier call: it is returned where it is still in force. Others
    may wrap the constructor too, before or after.
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
    """Undo ``wrap_constructor()``; False where another wrapper stands on ours, which then stays."""
    if vars(ClientSession)["__init__"] is not layer:
        return False
    setattr(ClientSession, "__init__", layer.__wrapped__)  # noqa: B010
    return True


def _bound(function: Any, instance: object) -> Callable[..., Any]:
    """Bind a method as Python does: what others put in its place need not be a function."""
    bind = getattr(type(function), "__get__", None)
    return bind(function, instance, type(instance)) if bind else function  # type: ignore[no-any-return]


def _stands_on(outermost: Any, layer: Any) -> bool:
    while outermost is not None and outermost is not layer:
        outermost = getattr(outermost, "__wrapped__", None)
    return outermost is layer


@cache
def unreader() -> Callable[[StreamReader, bytes], None]:
    """Return what puts bytes back at the beginning of a stream: ``StreamReader.unread_data()``.

    It comes without the warning that it is deprecated, since nothing public takes its place. Where
    warnings are errors, the warning would lose the body; and to silence it for each request would
    make all of the server's own warnings appear again.
    """
    silent = {**vars(streams), "warnings": SimpleNamespace(warn=lambda *_, **__: None)}
    return FunctionType(StreamReader.unread_data.__code__, silent)


def has_own_expect_handler(request: web.Request) -> bool:
    """Tell whether a route of the user's own decides when a client may send the body."""
    default = web_urldispatcher._default_expect_handler
    return getattr(request.match_info.route, "_expect_handler", default) is not default


def writer_of(request: web.Request) -> "weakref.ref[AbstractStreamWriter] | None":
    """Return what writes the answer to a request; a mock of it may take no weak reference."""
    try:
        return weakref.ref(request.writer)
    except TypeError:
        return None


def is_answered(writer: AbstractStreamWriter) -> bool:
    """Tell whether an answer is sent, or can't be sent any more, and nothing is at work on it."""
    current = getattr(getattr(writer, "protocol", None), "_current_request", None)
    if current is not None and current.writer is writer:  # a middleware has yet to return
        return False
    transport = getattr(writer, "transport", None)  # aiohttp 3.9 promises none
    return getattr(writer, "_eof", True) or transport is None or transport.is_closing()


def is_to_be_sent(response: object) -> "TypeGuard[web.Response]":
    """Tell whether an answer's body is sent piece by piece, once its handler is over."""
    return isinstance(getattr(response, "_body", None), Payload)  # a subclass may have its own body


def storage_name(key: object) -> str:
    """Return the name of an ``AppKey`` or ``RequestKey`` with its module, or a text as it is."""
    return key if isinstance(key, str) else getattr(key, "_name", "")


def request_key(name: str, kind: type) -> Any:
    """Return a key of a request's storage: a text where aiohttp is older than 3.14."""
    return getattr(web, "RequestKey", lambda name, _: name)(name, kind)
