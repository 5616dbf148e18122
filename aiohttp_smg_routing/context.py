"""The session rides in the context: from the request, through every task that it starts."""

import weakref
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from yarl import URL

from .config import RoutingConfig
from .key import SessionId, as_session_id, key_of
from .ledger import PinLedger

T = TypeVar("T")


@dataclass(slots=True, eq=False, repr=False)  # the id may be a credential
class Scope:
    """What the running code belongs to: a session, and the app whose request it is.

    A session id that an app's middleware found is bound to the ``config`` of that app: it goes to
    that config's gateways only, in that config's key form and header. Without a ``config``, which
    is how ``routing_session()`` sets it, it goes where the hook that carries the call says.
    ``outer`` is the scope of an app around this one, for the same request.
    """

    session_id: str | None
    config: RoutingConfig | None = None
    pins: PinLedger | None = None
    outer: "Scope | None" = None
    # Worked out here, once a request, and not in each of its calls.
    ledger: PinLedger | None = field(init=False, default=None)
    """``pins``, where they track sessions."""
    header: str = field(init=False, default="")
    key: str = field(init=False, default="")
    """What each call carries; empty without a session or a config."""
    name: str = field(init=False, default="")
    """How the ledger names the session."""

    def __post_init__(self) -> None:
        if self.pins and self.pins.config.track_sessions:
            self.ledger = self.pins
        if self.config is None or self.session_id is None:
            return
        if self.session_id not in self.config.ignore_ids:
            self.header = self.config.header
            self.key = self.name = _key(self.session_id, self.config)
            if self.pins and self.pins.config is not self.config:
                self.name = _key(self.session_id, self.pins.config)


def _key(session_id: str, config: RoutingConfig) -> str:
    return key_of(session_id, config.key, config.secret, config.prefix)


#: The scope of the code that runs now. Tasks and ``asyncio.to_thread`` inherit it.
_scope: ContextVar[Scope | None] = ContextVar("aiohttp_smg_routing", default=None)


def enter_scope(scope: Scope) -> None:
    """Make ``scope`` that of the current context, for good.

    It is never taken back: aiohttp runs each request in a task, and so in a context, of its own,
    and sends a streamed body in there after the handler has returned.
    """
    _scope.set(scope)


def in_current_scope(coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return what runs ``coroutine`` in the scope of this code, whoever makes a task of it."""
    scope = _scope.get()

    async def run() -> T:
        _scope.set(scope)
        return await coroutine

    running: Any = run()
    running.__qualname__ = getattr(coroutine, "__qualname__", running.__qualname__)
    # Where it is cancelled before it starts, it is all well that nobody awaits the coroutine.
    weakref.finalize(running, coroutine.close)
    return running  # type: ignore[no-any-return]


def current_scope() -> Scope | None:
    """Return the innermost scope of the running code that has a session, or None."""
    scope = _scope.get()
    while scope and scope.session_id is None:
        scope = scope.outer
    return scope


def current_session_id() -> str | None:
    """Return the id of the session that the running code belongs to, or None.

    >>> logger.info("turn done in session %s", current_session_id())
    """
    scope = current_scope()
    return scope.session_id if scope else None


def scope_of_call(config: RoutingConfig, pins: PinLedger | None, method: str, url: URL) -> Scope:
    """Return the scope that a call which ``config`` tags belongs to; it has a config.

    It is the innermost scope with a session that may go there. Without any such session it is the
    innermost scope of an app that tags this call. What is not bound to an app is bound to the app
    around it, whose ledger it has, where that tags the call; else to the hook's ``config``, and is
    entered in its ``pins``.
    """
    scope = _scope.get()
    if scope and scope.config is config and scope.key:
        return scope  # nearly every call
    sessionless = None
    while scope:
        if scope.config is None or scope.config.tags(method, url):
            if scope.session_id is not None:
                break
            sessionless = sessionless or scope
        scope = scope.outer
    scope = scope or sessionless or Scope(None)
    if scope.config:
        return scope
    around = scope.pins.config if scope.pins else config
    if not around.tags(method, url):
        around = config
    return Scope(scope.session_id, around, scope.pins or pins)


class routing_session:  # noqa: N801 - used like a function, as contextlib.suppress is
    """Set the session for a block of code outside a request: a job, a queue consumer, a rollout.

    Works as ``with`` and as ``async with``. Within a request it outranks the request's session;
    an empty or blank id, or None, means no session. Tasks that the block starts keep the session.
    Make a new one for each block: ``RuntimeError`` otherwise. ``TypeError`` for what is no id.

    >>> with routing_session("rollout-7"):
    ...     await client.post("http://gateway:30000/v1/chat/completions", json=turn)
    """

    __slots__ = ("_session_id", "_token")

    def __init__(self, session_id: SessionId | None) -> None:
        self._session_id = as_session_id(session_id)
        self._token: Token[Scope | None] | None = None

    def __enter__(self) -> None:
        if self._token is not None:
            raise RuntimeError("this routing_session() is in use: make a new one for each block")
        around = _scope.get()
        # Calls in the block still count in the ledger of the app whose request it is in.
        self._token = _scope.set(Scope(self._session_id, pins=around.pins if around else None))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None  # noqa: S101 - __enter__ has run
        # An async generator can be closed, and a fixture torn down, in another context than the
        # one that entered: there is nothing to take back in that one.
        with suppress(ValueError):
            _scope.reset(self._token)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)
