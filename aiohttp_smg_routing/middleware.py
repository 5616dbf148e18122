"""The inbound half: the session of a request is found, and enters the context."""

import asyncio
import logging
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from inspect import isawaitable
from typing import Any

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from . import compat
from .context import Scope, current_scope, enter_scope
from .keys import SessionId, as_session_id, session_key
from .log import Once, say
from .rules import NOTICED, Rules
from .sources import SESSION_ID, JsonBody, Source, read_body_with, reader

logger = logging.getLogger(__name__)

_current_task: Callable[[], "asyncio.Task[Any]"] = asyncio.current_task  # type: ignore[assignment]

# Nested apps run a middleware each for one request: what the outer one found is kept on the
# request, not looked up in the context, which may hold the session of whoever started the server.
_SCOPE = compat.request_key("aiohttp_smg_routing.scope", Scope)


def inbound(rules: Rules) -> Middleware:
    """Return the middleware that finds the session of a request and enters it in the context.

    A request without one passes unchanged, as does every request where the config is not enabled.
    """
    config = rules.config
    finder = Finder(
        config.session_id,
        ignore_ids=config.ignore_ids,
        parts=config.pin_by.sources,
        conceal=config.key == "digest",
        json_max_size=config.json_max_size,
    )
    form, secret, prefix = config.key, config.secret, config.prefix
    is_simple = config.pin_by.is_session

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not config.enabled:
            return await handler(request)
        found = finder.find(request)
        session_id = found if found is None or isinstance(found, str) else await found
        scope = Scope(session_id, rules)
        if session_id is None:
            resource = request.match_info.route.resource
            scope.route = resource.canonical if resource else request.rel_url.raw_path
        else:
            if is_simple:
                scope.name = scope.key = session_key(session_id, form, secret, prefix)
            else:
                scope.parts = await finder.find_parts(request)
                scope.name, scope.key = config.name_and_key(session_id, scope.parts)
        came = compat.received(request)
        scope.task, scope.request = weakref.ref(_current_task()), weakref.ref(came)
        scope.before = current_scope()
        if scope.before is not None:
            scope.outer = request.get(_SCOPE)
        request[_SCOPE] = scope
        if came is not request:
            came[_SCOPE] = scope
        enter_scope(scope)
        try:
            return await handler(request)
        finally:
            if not scope.has_called and request.method == hdrs.METH_POST:
                rules.note_request(scope)

    return middleware


async def answered_here(request: web.Request, response: web.StreamResponse) -> None:
    """Note which task sends the answer: the request is over when that one has ended.

    It is another one than that of the middleware where one above it has used ``wait_for()``. A body
    that is streamed runs there, too, and so in the session of the request.
    """
    task, current = _current_task(), current_scope()
    if current and current.task and current.task() is task:
        return  # nearly always
    scope = innermost = request.get(_SCOPE)
    while scope is not None:
        handled = scope.task and scope.task()
        # Only where the task of the middleware is over: any task may prepare an answer.
        if scope.task is not None and (handled is None or handled.done()):
            scope.task = weakref.ref(task)
            if innermost is not None and current is scope.before:
                enter_scope(innermost)
        scope = scope.outer


class Finder:
    """Finds what a request says of its session: the first session id, and each part of ``pin_by``.

    A source that raises, or gives what can't be a session id, counts as one without; the first
    time it is logged with its traceback; without what the error says where ``conceal`` is set,
    since that may quote an id which is a credential. An id of ``ignore_ids`` counts as none.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        ignore_ids: Iterable[str] = (),
        parts: Iterable[str] = (),
        conceal: bool = False,
        json_max_size: int = 16 * 2**20,
    ) -> None:
        self._readers = [(source, reader(source)) for source in sources]
        self._parts = [(part, reader(part)) for part in parts if part != SESSION_ID]
        self._empty = Counter[str]()
        self._ignored = frozenset(ignore_ids)
        self._conceal = conceal
        self._failures = Once()
        named = [source for source, _ in (*self._readers, *self._parts)]
        paths = [it[5:] for it in named if isinstance(it, str) and it.startswith("json:")]
        may_read = paths or any(map(callable, named))
        self._body = JsonBody(json_max_size, paths) if may_read else None

    def find(self, request: web.Request, begin: int = 0) -> str | Awaitable[str | None] | None:
        """Return the session id; an awaitable of it only where a source returns an awaitable."""
        if self._body:
            read_body_with(request, self._body)
        for place in range(begin, len(self._readers)):
            source, read = self._readers[place]
            try:
                found = read(request)
                if type(found) is str:  # nearly always: as_session_id() without the call
                    session_id = found if found and not found.isspace() else None
                elif isawaitable(found):
                    return self._find_later(request, place, found)
                else:
                    session_id = as_session_id(found)
            except (Exception, asyncio.CancelledError) as error:
                self._failed(source, error)
            else:
                if session_id is not None and session_id not in self._ignored:
                    return session_id
        return None

    async def find_parts(self, request: web.Request) -> dict[str, str | None]:
        """Return what the sources of ``pin_by`` find, by their texts."""
        found: dict[str, str | None] = {}
        for part, read in self._parts:
            try:
                value = read(request)
                found[part] = as_session_id(await value if isawaitable(value) else value)
            except (Exception, asyncio.CancelledError) as error:
                self._failed(part, error)
            is_turn = request.method == hdrs.METH_POST
            self._empty[part] = 0 if found.get(part) else self._empty[part] + is_turn
            if self._empty[part] == NOTICED and self._failures.is_new(("empty", part)):
                message = "pin_by: {%s} found nothing in %d requests: each session is pinned alone"
                say(logger, logging.WARNING, message, part, NOTICED)
        return found

    async def _find_later(
        self, request: web.Request, place: int, found: Awaitable[SessionId | None]
    ) -> str | None:
        try:
            session_id = as_session_id(await found)
        except (Exception, asyncio.CancelledError) as error:
            self._failed(self._readers[place][0], error)
        else:
            if session_id is not None and session_id not in self._ignored:
                return session_id
        rest = self.find(request, place + 1)
        return rest if rest is None or isinstance(rest, str) else await rest

    def _failed(self, source: Source, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise error
        if self._failures.is_new(id(source)):  # it may be one that has no hash
            message = (
                "session id source %r failed: it counts as no session, and further failures of it "
                "are not logged%s"
            )
            where = "".join([*traceback.format_tb(error.__traceback__), type(error).__name__])
            shown = f"\n{where}" if self._conceal else ""
            told = None if self._conceal else error
            say(logger, logging.ERROR, message, source, shown, error=told)


def _is_cancelled() -> bool:
    """Tell whether the request is cancelled, and not just something that a source awaited.

    Python 3.10 cannot tell: there every ``CancelledError`` counts as the request's own.
    """
    task = asyncio.current_task()
    return sys.version_info < (3, 11) or (task is not None and task.cancelling() > 0)
