"""The inbound half: the middleware finds the session of a request and enters it in the context."""

import asyncio
import logging
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from inspect import isawaitable
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload
from aiohttp.typedefs import Handler, Middleware

from . import compat
from .config import RoutingConfig, name_and_key
from .context import Scope, current_scope, enter_scope
from .keys import SessionId, as_session_id, session_key
from .log import Once, Task, say
from .rules import NOTICED, Rules
from .sources import SESSION_ID, JsonBody, Reader, Source, read_body_with, reader

logger: logging.Logger = logging.getLogger(__name__)

_current_task: Callable[[], Task | None] = asyncio.current_task


def inbound(rules: Rules) -> Middleware:
    """Return the middleware that finds the session of a request and enters it in the context.

    A request without a session passes unchanged. So does every request if ``enabled`` is false.
    """
    config = rules.config
    finder = Finder(config)
    form, secret, prefix = config.key, config.secret, config.prefix
    is_simple = config.pin_by.is_session

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not config.enabled:
            return await handler(request)
        found = finder.find(request)
        session_id = found if found is None or isinstance(found, str) else await found
        scope = Scope()
        scope.session_id, scope.owner = session_id, rules
        if session_id is None:
            resource = request.match_info.route.resource
            scope.route = resource.canonical if resource else "(no route)"  # a path may hold an id
        elif is_simple:
            scope.name = scope.key = session_key(session_id, form, secret, prefix)
        else:
            scope.parts = await finder.find_parts(request)
            scope.name, scope.key = name_and_key(config, session_id, scope.parts)
        task = _current_task()  # None if a test runs the coroutine by hand
        scope.task = None if task is None else weakref.ref(task)
        scope.writer = compat.writer_of(request)
        around = current_scope()
        if around is not None:
            scope.outer = _of_outer_app(scope, around.around if around.is_block else around)
        enter_scope(scope)
        response: web.StreamResponse | None = None
        try:
            response = await handler(request)
            return response
        except web.HTTPException as raised:
            response = raised
            raise
        finally:
            body = compat.body_to_send(response)
            writer = None if scope.writer is None else scope.writer()
            if body is not None and writer is not None:
                writing = vars(body).get("write")
                if not isinstance(writing, _Writing):
                    writing = vars(body)["write"] = _Writing(body)
                writing.answers(writer, request.method, scope, rules)
            elif not scope.has_called:
                rules.note_request(request.method, scope)

    return middleware


class _Writing:
    """Stands for ``write()`` of a body, and sends it in the scope of the code that answers with it.

    The request lasts until the body is sent. If a middleware runs the handler in a task, as
    ``wait_for()`` does before Python 3.12, aiohttp sends the body outside that task. This is kept
    on the body, because a middleware may send a copy of the answer. Several answers may share it.
    The reference is weak, because a body that is never sent, as for HEAD, may hold a file open.
    """

    def __init__(self, body: Payload) -> None:
        self._body, self._own = weakref.ref(body), vars(body).get("write")
        self._sent: WeakKeyDictionary[
            AbstractStreamWriter, tuple[Scope | None, str, Scope, Rules]
        ] = WeakKeyDictionary()

    def answers(
        self, writer: AbstractStreamWriter, method: str, scope: Scope, rules: Rules
    ) -> None:
        """Note the request that ``writer`` answers, unless the middleware of an inner app did."""
        self._sent.setdefault(writer, (current_scope(), method, scope, rules))

    async def __call__(self, writer: AbstractStreamWriter, *args: Any, **kwargs: Any) -> None:
        body, request = self._body(), self._sent.pop(writer, None)
        assert body is not None  # noqa: S101 - it is what this is called on
        if not self._sent:
            vars(body).pop("write", None)
            vars(body).update({} if self._own is None else {"write": self._own})
        write = self._own or partial(type(body).write, body)
        if request is None:
            await write(writer, *args, **kwargs)
            return
        current, method, scope, rules = request
        before, task, sent = current_scope(), _current_task(), current
        while sent is not None:
            if sent.task is not None and task is not None:
                sent.task = weakref.ref(task)
            sent = sent.outer or sent.around
        enter_scope(current)
        try:
            await write(writer, *args, **kwargs)
        finally:
            enter_scope(before)
            if not scope.has_called:
                rules.note_request(method, scope)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._body(), "write")  # of the copy, which has no other yet


def _of_outer_app(scope: Scope, around: Scope | None) -> Scope | None:
    """Return the scope of the app around the app of ``scope``, if both serve the same request.

    ``around`` may belong to the code that started the server. If a middleware tries a request
    again, the scopes of the earlier try are still there.
    """
    if around is None or around.writer != scope.writer:  # two weakrefs to one writer are equal
        return None
    tried: Scope | None = around
    while tried is not None and tried.owner is not scope.owner:
        tried = tried.outer
    return tried.outer if tried else around


class Finder:
    """Finds the session id of a request, and each part of ``pin_by``.

    A source that raises, or returns what can't be a session id, counts as one that found nothing.
    Its first failure is logged with the traceback. With ``key = "digest"`` the log leaves out the
    error's text, which may quote a credential. An id in ``ignore_ids`` counts as none.
    """

    def __init__(self, config: RoutingConfig) -> None:
        self._readers = [(source, reader(source)) for source in config.session_id]
        self._parts = [(part, reader(part)) for part in config.pin_by.sources if part != SESSION_ID]
        self._empty = Counter[str]()
        self._ignored = frozenset(config.ignore_ids)
        self._conceal = config.key == "digest"
        self._failures = Once()
        named = [source for source, _ in (*self._readers, *self._parts)]
        paths = [it[5:] for it in named if isinstance(it, str) and it.startswith("json:")]
        may_read = paths or any(map(callable, named))
        self._body = JsonBody(config.json_max_size, paths) if may_read else None

    def find(
        self, request: web.Request, readers: Iterator[tuple[Source, Reader]] | None = None
    ) -> str | Awaitable[str | None] | None:
        """Return the session id, or an awaitable of it if a source returns an awaitable.

        ``readers`` are the sources that are left to ask.
        """
        if readers is None:
            readers = iter(self._readers)
            if self._body:
                read_body_with(self._body)
        for source, read in readers:
            try:
                found = read(request)
                if type(found) is str:  # nearly always; this inlines as_session_id()
                    session_id = found if found and not found.isspace() else None
                elif isawaitable(found):
                    return self._find_later(request, source, found, readers)
                else:
                    session_id = as_session_id(found)
            except (Exception, asyncio.CancelledError) as error:
                self._failed(source, error)
            else:
                if session_id is not None and session_id not in self._ignored:
                    return session_id
        return None

    async def find_parts(self, request: web.Request) -> dict[str, str | None]:
        """Return what each source of ``pin_by`` finds, by the text of the source."""
        found: dict[str, str | None] = {}
        for part, read in self._parts:
            try:
                value = read(request)
                found[part] = as_session_id(await value if isawaitable(value) else value)
            except (Exception, asyncio.CancelledError) as error:
                self._failed(part, error)
            is_turn = request.method == hdrs.METH_POST
            self._empty[part] = 0 if found.get(part) else self._empty[part] + is_turn
            many = NOTICED["missing"]
            if self._empty[part] == many and self._failures.is_new(("empty", part)):
                message = "pin_by: {%s} found nothing in %d requests: each session is pinned alone"
                say(logger, logging.WARNING, message, part, many)
        return found

    async def _find_later(
        self,
        request: web.Request,
        source: Source,
        found: Awaitable[SessionId | None],
        readers: Iterator[tuple[Source, Reader]],
    ) -> str | None:
        try:
            session_id = as_session_id(await found)
        except (Exception, asyncio.CancelledError) as error:
            self._failed(source, error)
        else:
            if session_id is not None and session_id not in self._ignored:
                return session_id
        rest = self.find(request, readers)
        return rest if rest is None or isinstance(rest, str) else await rest

    def _failed(self, source: Source, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise error
        if self._failures.is_new(id(source)):  # the source may not be hashable
            message = (
                "session id source %r failed: it counts as no session, and further failures of it "
                "are not logged%s"
            )
            where = "".join([*traceback.format_tb(error.__traceback__), type(error).__name__])
            shown = f"\n{where}" if self._conceal else ""
            told = None if self._conceal else error
            say(logger, logging.ERROR, message, source, shown, error=told)


def _is_cancelled() -> bool:
    """Tell whether the request is cancelled, and not only something that a source awaited.

    Python 3.10 can't tell them apart: there every ``CancelledError`` counts as the request's own.
    """
    task = asyncio.current_task()
    return sys.version_info < (3, 11) or (task is not None and task.cancelling() > 0)


async def hide(header: str, request: web.Request, response: web.StreamResponse) -> None:
    """Take the header that names the worker off an answer to an agent."""
    response.headers.popall(header, None)
