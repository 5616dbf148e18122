"""Keeps the session of the running code in the context, which every task inherits."""

import logging
import weakref
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import suppress
from contextvars import ContextVar, Token
from copy import copy
from types import MappingProxyType
from typing import Any, TypeVar

from aiohttp.abc import AbstractStreamWriter

from . import compat
from .config import RoutingConfig, as_config, name_and_key
from .keys import SessionId, as_session_id, routing_key
from .log import Once, Task, running_code, running_task, say

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

_NO_PARTS: Mapping[str, str | None] = MappingProxyType({})


class Owner:
    """What a session belongs to: the config of the app that serves the request."""

    config: RoutingConfig


class Scope:
    """The session of the running code, and the owner of the request around that code.

    A session that an app's middleware found goes only to the gateways of its owner. The hook
    decides where the session of a ``routing_session()`` block goes.
    """

    session_id: str | None = None
    owner: Owner | None = None
    name = ""  # the session's name in the owner's ledger and in the logs
    key = ""  # the key of the owner's calls; empty without a session
    route = ""  # the route of a request without a session
    parts = _NO_PARTS  # what the sources in ``pin_by`` found
    outer: "Scope | None" = None  # of the app around the owner's, for the same request
    around: "Scope | None" = None  # of the request around a block
    before: "Scope | None" = None  # the scope to return to after a block
    is_block = is_left = has_called = False
    task: "weakref.ref[Task] | None" = None  # the task that handles the request
    writer: "weakref.ref[AbstractStreamWriter] | None" = None  # of the request's answer

    def called(self) -> None:
        """Note for each app of the request that it led to a call."""
        scope: Scope | None = self
        while scope is not None:
            scope.has_called = True
            scope = scope.outer or scope.around

    def is_late(self) -> bool:
        """Tell whether the request is over: its handler has ended, and its answer is sent."""
        if self.task is None or self.writer is None:
            return False
        task, writer = self.task(), self.writer()
        # After the handler, a body may still be streamed, or an outer middleware still work.
        is_answered = writer is None or compat.is_answered(writer)
        return (task is None or task.done()) and is_answered

    def for_good(self) -> "Scope":
        """Return a copy of this scope that does not end with the request."""
        scope = copy(self)
        scope.task = scope.before = None
        scope.outer = self.outer and self.outer.for_good()
        return scope


#: The scope of the code that runs now. Tasks and ``asyncio.to_thread`` inherit it.
_scope: ContextVar[Scope | None] = ContextVar("aiohttp_smg_routing", default=None)

#: Returns the scope of the running code, or None.
current_scope: Callable[[], Scope | None] = _scope.get

#: Makes a scope the current one. The scope of a request is never reset: aiohttp runs each request
#: in a task of its own, and so in a context of its own. It sends a streamed body in that context
#: after the handler has returned.
enter_scope: Callable[[Scope | None], Token[Scope | None]] = _scope.set


def session_scope() -> Scope | None:
    """Return the innermost scope of the running code that has a session, or None."""
    scope = _scope.get()
    while scope and scope.session_id is None:
        scope = scope.outer
    return scope


def current_session_id() -> str | None:
    """Return the id of the session that the running code belongs to, or None.

    >>> current_session_id()
    's-17'
    """
    scope = session_scope()
    return scope.session_id if scope else None


class _InSession(Coroutine[Any, Any, T]):
    """A coroutine that enters a scope when it starts, and otherwise behaves as the one inside."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], scope: Scope | None) -> None:
        self._coroutine, self._scope = coroutine, scope
        self._running: Generator[Any, Any, T] | None = None
        self.__name__ = getattr(coroutine, "__name__", type(coroutine).__name__)
        self.__qualname__ = getattr(coroutine, "__qualname__", self.__name__)

    def __await__(self) -> Generator[Any, Any, T]:
        token = _scope.set(self._scope)
        try:
            return (yield from self._coroutine.__await__())
        finally:
            with suppress(ValueError):  # garbage collection runs in any context
                _scope.reset(token)

    def send(self, value: Any) -> Any:
        self._running = self._running or self.__await__()
        return self._running.send(value)

    def throw(self, *error: Any) -> Any:
        return (self._running or self._coroutine).throw(*error)

    def close(self) -> None:
        (self._running or self._coroutine).close()


def in_session(coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return a coroutine that runs ``coroutine`` in the session of the calling code.

    Use it for queues and job schedulers, which run the coroutine in another context. The coroutine
    keeps the session after the request has ended. If you call this only after the request has
    ended, the coroutine's calls are late.
    Raises ``TypeError`` for anything but a coroutine.

    >>> await queue.put(in_session(play_turn()))
    """
    if not isinstance(coroutine, Coroutine):
        raise TypeError(f"in_session() takes a coroutine, not a {type(coroutine).__name__}")
    scope, session = _scope.get(), session_scope()
    if scope and session and not session.is_late():
        scope = scope.for_good()
    return _InSession(coroutine, scope)


class routing_session:  # noqa: N801 - used like a function, as contextlib.suppress is
    """Set the session for a block of code: a job, a queue consumer, a rollout.

    It works as ``with`` and as ``async with``, and outranks the session of a request around it.
    None, or an empty or blank id, means no session. Tasks that the block starts keep the session.
    ``parts`` are the values of the sources in ``pin_by``, such as ``{"json:model": "judge"}``. A
    source that they leave out keeps its value from around the block, if the session is the same.

    Put it around the code that consumes a generator, not around a ``yield``: code that runs between
    two values would be in this session. Raises ``RuntimeError`` if it is used for a second block,
    ``TypeError`` unless the id is a string, integer, ``UUID`` or None.

    >>> with routing_session("rollout-7"):
    ...     response = await session.post("http://10.0.0.1:30000/v1/chat/completions", json=turn)
    """

    __slots__ = ("_entered", "_parts", "_scope", "_session_id")

    def __init__(
        self, session_id: SessionId | None, parts: Mapping[str, str | None] = _NO_PARTS
    ) -> None:
        self._session_id = as_session_id(session_id)
        self._parts = {part: as_session_id(value) for part, value in parts.items()}
        self._scope: Scope | None = None
        #: The token that resets the scope, and the task that entered it.
        self._entered: tuple[Token[Scope | None], Task | None] | None = None

    def __enter__(self) -> None:
        if self._scope is not None:
            raise RuntimeError("this routing_session() is in use: make a new one for each block")
        around = _scope.get()
        owner = around.owner if around else None
        self._scope = Scope()
        self._scope.session_id, self._scope.owner = self._session_id, owner
        self._scope.is_block = True
        self._scope.around = around and (around.around if around.is_block else around)
        is_same = around is not None and around.session_id == self._session_id
        self._scope.parts = {**(around.parts if around and is_same else {}), **self._parts}
        if owner and self._session_id is not None:
            config = owner.config
            self._scope.name, key = name_and_key(config, self._session_id, self._scope.parts)
            self._scope.key = "" if self._session_id in config.ignore_ids else key
        self._entered = _scope.set(self._scope), running_task()

    def __exit__(self, *error: object) -> None:
        assert self._scope is not None and self._entered is not None  # noqa: PT018, S101 - entered
        (token, task), self._entered = self._entered, None
        before: Scope | None = token.old_value if token.old_value is not Token.MISSING else None
        while before and before.is_left:
            before = before.before
        if _scope.get() is self._scope:
            with suppress(ValueError):  # left in another context, of a task or of the loop
                _scope.reset(token)
                _scope.set(before)
                return
        self._scope.is_left, self._scope.before = True, before
        code = running_code(task)
        if _left_elsewhere.is_new(code):
            message = (
                "routing_session() was left in %s while another session was current: it stands "
                "around a yield. Put it around the code that consumes the generator."
            )
            say(logger, logging.WARNING, message, code)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *error: object) -> None:
        self.__exit__(*error)


_left_elsewhere = Once()


class SessionIdFilter(logging.Filter):
    """Puts the session of the running code on each log record as ``record.session_id``.

    The value is the id or its digest, with the ``prefix``, or ``-`` without a session. A record
    that has a ``session_id`` already keeps it. If ``routing_session()`` sets ids that are
    credentials, pass the ``config``, so that no log shows them. Raises ``ConfigError`` for faults.

    >>> handler.addFilter(SessionIdFilter())
    >>> handler.setFormatter(logging.Formatter("%(session_id)s %(message)s"))
    """

    def __init__(self, config: RoutingConfig | Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._config = None if config is None else as_config(config)

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the session on ``record`` and let it pass."""
        if not hasattr(record, "session_id"):
            scope = session_scope()
            if scope is None or scope.session_id is None:
                record.session_id = "-"
            elif scope.name:
                record.session_id = scope.name
            else:
                key_of = self._config.routing_key if self._config else routing_key
                record.session_id = key_of(scope.session_id)
        return True
