"""Every use of private and deprecated parts of aiohttp and httpx.

Each function has one purpose, and a test in ``tests/unit/test_compat.py`` that fails if aiohttp or
httpx changes the part that it uses.
"""

import inspect
import weakref
from collections.abc import Awaitable, Callable, Iterator
from functools import cache, wraps
from operator import attrgetter
from types import FunctionType, SimpleNamespace
from typing import Any

from aiohttp import StreamReader, TraceConfig, streams, web, web_urldispatcher
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client import ClientSession  # not from aiohttp, where a test may replace the name
from aiohttp.payload import Payload


def is_client_session(value: object) -> bool:
    """Tell whether ``value`` is a ``ClientSession``, not a mock that claims to be one."""
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

    ``layer`` is the wrapper of an earlier call. If it is still in force, it is returned. Other
    code may wrap the constructor too, before or after.
    """

    def around(original: Any) -> Callable[..., None]:
        def constructor(session: ClientSession, /, *args: Any, **kwargs: Any) -> None:
            _bound(original, session)(*args, **kwargs)
            if hasattr(session, "_trace_configs"):  # a mock of the constructor makes nothing
                made(session)

        return constructor

    return _wrap(ClientSession, "__init__", around, layer)


def unwrap_constructor(layer: Any) -> bool:
    """Undo ``wrap_constructor()``; return False if another wrapper around ours keeps it there."""
    return _unwrap(ClientSession, "__init__", layer)


def sender(client: type) -> type:
    """Return the class that sends for an httpx client.

    Other code may put a subclass in its place, as OpenTelemetry did until 0.48.
    """
    return [client, *(it for it in client.__mro__ if _HTTPX_SENDS in vars(it))][-1]


def wrap_httpx(client: type, send: Callable[..., Any], layer: Any) -> Any:
    """Send each request of an httpx client through ``send(original, request)``; return the wrapper.

    ``client`` is the ``sender()`` of ``Client`` or ``AsyncClient`` of httpx or httpx2. Each hop of
    a redirect is a request, and so is each try of an auth flow. ``layer`` is as in
    ``wrap_constructor()``. Raises ``AttributeError`` if this httpx sends in another way.
    """

    def around(original: Any) -> Callable[..., Any]:
        def send_single_request(self: Any, request: Any) -> Any:
            return send(_bound(original, self), request)

        return send_single_request

    return _wrap(client, _HTTPX_SENDS, around, layer)


def unwrap_httpx(client: type, layer: Any) -> bool:
    """Undo ``wrap_httpx()``, as ``unwrap_constructor()`` does."""
    return _unwrap(client, _HTTPX_SENDS, layer)


def wrap_runner(about_to_start: Callable[[web.Application], Awaitable[None]]) -> None:
    """Await ``about_to_start(app)`` whenever an app is about to be served, before it is frozen."""

    def around(original: Any) -> Callable[..., Awaitable[None]]:
        async def setup(runner: web.AppRunner) -> None:
            await about_to_start(runner.app)
            await _bound(original, runner)()

        return setup

    _wrap(web.AppRunner, "setup", around, None)


def when_cleaned_up(app: web.Application, done: Callable[[], object]) -> None:
    """Call ``done()`` when an app and those below it have been cleaned up, even if that fails.

    A last handler could not: others may be added behind it, and after one that raises aiohttp runs
    no more.
    """

    class Cleanup(type(app.on_cleanup)):  # type: ignore[misc]
        __slots__ = ()

        async def send(self, *args: Any, **kwargs: Any) -> None:
            try:
                await super().send(*args, **kwargs)
            finally:
                done()

    app.on_cleanup.__class__ = Cleanup


def tree(app: web.Application) -> Iterator[web.Application]:
    """Yield an app and all that are below it."""
    yield app
    for below in app._subapps:
        yield from tree(below)


_HTTPX_SENDS = "_send_single_request"


def _wrap(owner: type, name: str, around: Callable[[Any], Any], layer: Any) -> Any:
    original = inspect.getattr_static(owner, name)
    if layer is not None and _stands_on(original, layer):
        return layer
    wrapper = wraps(original)(around(original))
    setattr(owner, name, wrapper)
    return wrapper


def _unwrap(owner: type, name: str, layer: Any) -> bool:
    original = layer.__wrapped__
    if vars(owner).get(name) is not layer:
        return False
    setattr(owner, name, original)
    return True


def _bound(function: Any, instance: object) -> Callable[..., Any]:
    """Bind a method as Python does: other code may have replaced it with any object."""
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
    """Return the writer of a request's answer; None for a mock that takes no weak references."""
    try:
        return weakref.ref(request.writer)
    except TypeError:
        return None


def is_answered(writer: AbstractStreamWriter) -> bool:
    """Tell whether an answer is sent or can't be sent any more, and no code still works on it."""
    current = getattr(getattr(writer, "protocol", None), "_current_request", None)
    if current is not None and current.writer is writer:  # a middleware has yet to return
        return False
    transport = getattr(writer, "transport", None)  # aiohttp 3.9 promises no such attribute
    return getattr(writer, "_eof", True) or transport is None or transport.is_closing()


def body_to_send(response: object) -> Payload | None:
    """Return an answer's body if aiohttp calls its ``write()`` after the handler has returned."""
    body = getattr(response, "_body", None)  # a subclass may have its own ``body``
    return body if isinstance(body, Payload) else None


def storage_name(key: object) -> str:
    """Return the name of an ``AppKey`` or ``RequestKey`` with its module, and a string as it is."""
    return key if isinstance(key, str) else getattr(key, "_name", "")
