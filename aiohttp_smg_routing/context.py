"""The session rides in the context: from the request, through every task that it starts."""

from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType

from yarl import URL

from .config import RoutingConfig
from .key import SessionId, as_session_id


@dataclass(frozen=True, slots=True)
class RoutedSession:
    """A session id, and the config whose middleware found it.

    A ``config`` of None means that ``routing_session()`` set the id: it goes wherever the hook
    that carries the call says. An id found under a config is bound to it: it goes to that config's
    gateways only, in that config's key form. ``outer`` is what the middleware of an app around
    this one found for the same request.
    """

    session_id: str
    config: RoutingConfig | None = None
    outer: "RoutedSession | None" = None


#: The session of the code that runs now. Tasks and ``asyncio.to_thread`` inherit it.
_session: ContextVar[RoutedSession | None] = ContextVar("aiohttp_smg_routing", default=None)


def enter_session(session: RoutedSession | None) -> None:
    """Make ``session`` that of the current context, for good.

    It is never taken back: aiohttp runs each request in a task, and so in a context, of its own,
    and sends a streamed body in there after the handler has returned.
    """
    _session.set(session)


def current_session_id() -> str | None:
    """Return the id of the session that the running code belongs to, or None.

    >>> logger.info("turn done", extra={"session_id": current_session_id()})
    """
    session = _session.get()
    return session.session_id if session else None


def session_of_call(method: str, url: URL) -> RoutedSession | None:
    """Return the innermost session of the current context that may go with this call."""
    session = _session.get()
    while session and session.config and not session.config.tags(method, url):
        session = session.outer
    return session


class routing_session:  # noqa: N801 - used like a function, as contextlib.suppress is
    """Set the session for a block of code outside a request: a job, a queue consumer, a rollout.

    Works as ``with`` and as ``async with``. Within a request it outranks the request's session;
    an empty or blank id, or None, means no session. Tasks that the block starts keep the session.
    Make a new one for each block: ``RuntimeError`` otherwise. ``TypeError`` for what is no id.

    >>> with routing_session("rollout-7"):
    ...     await client.post("http://gateway:30000/v1/chat/completions", json=turn)
    """

    __slots__ = ("_session", "_token")

    def __init__(self, session_id: SessionId | None) -> None:
        text = as_session_id(session_id)
        self._session = RoutedSession(text) if text is not None else None
        self._token: Token[RoutedSession | None] | None = None

    def __enter__(self) -> None:
        if self._token is not None:
            raise RuntimeError("this routing_session() is in use: make a new one for each block")
        self._token = _session.set(self._session)

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
            _session.reset(self._token)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)
