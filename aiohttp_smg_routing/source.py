"""A session id is found in the request."""

import asyncio
import logging
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable
from inspect import isawaitable
from typing import Any

from aiohttp import hdrs, web

from .body import text_in_json
from .key import SessionId, as_session_id
from .values import imported_function, is_header_name, is_named, need

logger = logging.getLogger(__name__)

#: Where a session id is found: ``"header:X-Session-Id"``, or a function of the request.
Source = str | Callable[[web.Request], SessionId | Awaitable[SessionId | None] | None]

_Reader = Callable[[web.Request], Any]
_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)


def _header(name: str) -> _Reader:
    if not is_header_name(name):
        raise ValueError("does not name a header")
    if name.lower() != hdrs.AUTHORIZATION.lower():
        return lambda request: request.headers.get(name)

    def bearer_token(request: web.Request) -> str | None:
        credentials = _BEARER.fullmatch(request.headers.get(name, ""))
        return credentials and credentials[1]

    return bearer_token


def _stored(name: str) -> _Reader:
    def stored(request: web.Request) -> Any:
        return next((request[key] for key in request if is_named(key, name)), None)

    return stored


def _in_aiohttp_session(name: str) -> _Reader:
    need("aiohttp_session", extra="aiohttp-session")
    get_session = imported_function("aiohttp_session:get_session")

    async def value(request: web.Request) -> Any:
        return (await get_session(request)).get(name)

    return value


_KINDS: dict[str, Callable[[str], _Reader]] = {
    "match_info": lambda name: lambda request: request.match_info.get(name),
    "header": _header,
    "query": lambda name: lambda request: request.query.get(name),
    "cookie": lambda name: lambda request: request.cookies.get(name),
    "json": text_in_json,
    "request": _stored,
    "aiohttp_session": _in_aiohttp_session,
    "call": imported_function,
}
_FORMS = ", ".join(
    f"'{kind}:{'PATH' if kind == 'json' else 'NAME'}'" for kind in _KINDS if kind != "call"
)


def source_reader(source: object) -> _Reader:
    """Return the function that reads ``source`` from a request; ``ValueError`` says what is wrong.

    >>> source_reader("header:X-Session-Id")(request)
    's-17'
    """
    if callable(source):
        return source
    kind, _, name = source.partition(":") if isinstance(source, str) else ("", "", "")
    if kind not in _KINDS or not name:
        raise ValueError(
            f"is not a source: one is {_FORMS}, 'call:package.module:function' or a function"
        )
    return _KINDS[kind](name)


class SessionIdFinder:
    """Finds a request's session id: that of the first source with one.

    A source that raises, or gives what can't be a session id, counts as one without; the first
    time it is logged with its traceback; without what the error says where ``conceal`` is set,
    since that may quote an id which is a credential. An id of ``ignore_ids`` counts as none.
    """

    def __init__(
        self, sources: Iterable[Source], ignore_ids: Iterable[str] = (), *, conceal: bool = False
    ) -> None:
        self._readers = [(source, source_reader(source)) for source in sources]
        self._ignored = frozenset(ignore_ids)
        self._conceal = conceal
        self._logged: set[int] = set()

    def find(self, request: web.Request, begin: int = 0) -> str | Awaitable[str | None] | None:
        """Return the session id; an awaitable of it only where a source returns an awaitable."""
        for place in range(begin, len(self._readers)):
            try:
                found = self._readers[place][1](request)
                if not isinstance(found, str) and isawaitable(found):
                    return self._find_later(request, place, found)
                session_id = self._session_id(found)
            except (Exception, asyncio.CancelledError) as error:
                self._failed(place, error)
            else:
                if session_id is not None:
                    return session_id
        return None

    async def _find_later(
        self, request: web.Request, place: int, found: Awaitable[SessionId | None]
    ) -> str | None:
        try:
            session_id = self._session_id(await found)
        except (Exception, asyncio.CancelledError) as error:
            self._failed(place, error)
        else:
            if session_id is not None:
                return session_id
        rest = self.find(request, place + 1)
        return rest if rest is None or isinstance(rest, str) else await rest

    def _session_id(self, found: object) -> str | None:
        session_id = as_session_id(found)
        return None if session_id in self._ignored else session_id

    def _failed(self, place: int, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise error
        if place not in self._logged:
            self._logged.add(place)
            logger.error(
                "session id source %r failed: it counts as no session, "
                "and further failures of it are not logged%s",
                self._readers[place][0],
                f"\n{_where(error)}" if self._conceal else "",
                exc_info=None if self._conceal else error,
            )


def _where(error: BaseException) -> str:
    """Return the traceback of ``error`` and its type, but nothing of what it says."""
    return "".join([*traceback.format_tb(error.__traceback__), type(error).__name__])


def _is_cancelled() -> bool:
    """Tell whether the request is cancelled, and not just something that a source awaited.

    Python 3.10 cannot tell: there every ``CancelledError`` counts as the request's own.
    """
    task = asyncio.current_task()
    return sys.version_info < (3, 11) or (task is not None and task.cancelling() > 0)
