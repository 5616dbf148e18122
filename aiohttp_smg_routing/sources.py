"""Reads the session id from the request, or from its JSON body."""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

from aiohttp import hdrs, web

from . import compat
from .gateway import is_header_name
from .keys import SessionId
from .log import Once, say

logger: logging.Logger = logging.getLogger(__name__)

#: Where to find a session id: a string such as ``"header:X-Session-Id"``, or a function.
Source = str | Callable[[web.Request], SessionId | Awaitable[SessionId | None] | None]

#: The name in ``pin_by`` that stands for the session id, and is no source.
SESSION_ID = "session_id"

JSON_MAX_SIZE, SECONDS_WITHOUT_A_BYTE = 16 * 2**20, 5.0  # bytes

Reader = Callable[[web.Request], Any]
# Not every charset that Python knows: it takes hours to decode 16 MiB of punycode.
_UNICODE = re.compile("utf[-_]?(8|16|32)([-_]?(le|be|sig))?|(us-)?ascii")
_OTHER_CHARSETS = frozenset(
    ("iso-8859-1", "latin-1", "latin1", "windows-1252", "gbk", "gb18030", "shift_jis", "euc-kr")
)
_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)
_GONE = {
    "call": "pass the function itself, in code: session_id=[function]",
    "aiohttp_session": "pass a function that awaits aiohttp_session.get_session(request)",
}


def _header(name: str) -> Reader:
    if not is_header_name(name):
        raise ValueError("does not name a header")
    if name.lower() != hdrs.AUTHORIZATION.lower():
        return lambda request: request.headers.get(name)

    def bearer_token(request: web.Request) -> str | None:
        credentials = _BEARER.fullmatch(request.headers.get(name, ""))
        return credentials and credentials[1]

    return bearer_token


def _route_variable(name: str) -> Reader:
    if not set("{}").isdisjoint(name):
        raise ValueError("has braces: write the name of the route's variable without them")
    return lambda request: request.match_info.get(name)


def _stored(name: str) -> Reader:
    """Read what an earlier middleware stored, under a string or a ``RequestKey`` of that name."""
    return lambda request: next((request[key] for key in request if is_named(key, name)), None)


def _json(path: str) -> Reader:
    if not all(path.split(".")):
        raise ValueError("has an empty name in its path: use 'json:metadata.session_id'")
    return lambda request: _body.get().value(request, path)


_KINDS: Mapping[str, Callable[[str], Reader]] = {
    "match_info": _route_variable,
    "header": _header,
    "query": lambda name: lambda request: request.query.get(name),
    "cookie": lambda name: lambda request: request.cookies.get(name),
    "json": _json,
    "request": _stored,
}
_FORMS = ", ".join(f"'{kind}:{'PATH' if kind == 'json' else 'NAME'}'" for kind in _KINDS)


def is_named(key: object, name: object) -> bool:
    """Tell whether a key of an app's or a request's storage is ``name``, or has that name.

    The name of an ``AppKey`` or ``RequestKey`` may come with its module or without.
    """
    if key == name or isinstance(key, str) or not isinstance(name, str):
        return key == name
    full_name = compat.storage_name(key)
    return full_name == name or full_name.endswith(f".{name}")


def reader(source: object) -> Reader:
    """Return the function that reads a source from a request; ``ValueError`` says what is wrong."""
    if callable(source):
        return source
    kind, _, name = source.partition(":") if isinstance(source, str) else ("", "", "")
    if kind in _GONE:
        raise ValueError(f"is gone: {_GONE[kind]}")
    if kind not in _KINDS or not name or name != name.strip():
        raise ValueError(f"is not a source: use {_FORMS} or a function")
    return _KINDS[kind](name)


def named_sources(sources: Iterable[Source]) -> str:
    """Return the names of sources for a log line."""
    return ", ".join(str(getattr(source, "__qualname__", source)) for source in sources)


class PinBy(NamedTuple):
    """What shares a worker: the ``pin_by`` of a config, as ``RoutingConfig`` keeps it.

    >>> RoutingConfig("http://10.0.0.1:30000", pin_by="{session_id}/{json:model}").pin_by
    PinBy(template='{session_id}/{json:model}', sources=('session_id', 'json:model'))
    >>> RoutingConfig("http://10.0.0.1:30000").pin_by.is_session
    True
    """

    template: str  #: The text of the option.
    sources: tuple[str, ...]  #: The sources in its braces.

    @property
    def is_session(self) -> bool:
        """Whether each session is pinned alone."""
        return self.template == "{session_id}"


class JsonBody:
    """Reads the JSON body of a request, and puts it back for the handler to read.

    It gives None for a body that is broken, late, over ``max_size`` bytes, or not JSON by its
    ``Content-Type``. The handler answers such a request as it would without the plugin.
    """

    def __init__(self, max_size: int, paths: Iterable[str] = ()) -> None:
        self._max_size = max_size
        self._paths = frozenset(paths)  # of all sources, so that it is parsed once
        self._unread = compat.unreader()
        self._once = Once()

    async def document(self, request: web.Request) -> Any:
        """Return the document in the body, or None."""
        charset = _charset_to_read(request)
        if charset is None:
            return None
        body, size = b"", request.content_length or 0
        if size <= self._max_size:
            body = await self._peek(request)
            size = len(body)
        if size > self._max_size:
            self._say(
                f"has a JSON body of more than the {self._max_size} bytes that json_max_size allows"
            )
            return None
        return _parsed(body, charset)

    async def value(self, request: web.Request, path: str) -> str | int | None:
        """Return the string or integer at a path of the document, or None."""
        found = _found.get({})
        if path not in found:
            document = await self.document(request)
            # Only these are kept, or the conversation would be in memory twice.
            found.update({it: _at(document, it) for it in {path, *self._paths}})
        return found[path]

    async def _peek(self, request: web.Request) -> bytes:
        """Return the body, the beginning of one that is too long, or empty bytes if there is none.

        The body stays in ``request.content``. ``request.read()`` would take it, and forbid a clone.
        """
        content = request.content
        chunks: list[bytes] = []
        left, is_whole = self._max_size, False
        try:
            if content.at_eof():
                return await request.read()  # an earlier middleware has read it
            while left >= 0 and not content.at_eof():
                chunk = content.read_nowait()
                if not chunk:
                    with suppress(asyncio.TimeoutError):
                        chunk = await asyncio.wait_for(content.readany(), SECONDS_WITHOUT_A_BYTE)
                    # It may have arrived while the loop was busy.
                    chunk = chunk or content.read_nowait()
                    if not chunk and not content.at_eof():
                        raise asyncio.TimeoutError
                chunks.append(chunk)
                left -= len(chunk)
            is_whole = True
        except asyncio.TimeoutError:
            self._say(f"did not send its body for {SECONDS_WITHOUT_A_BYTE:g} seconds")
        except Exception:  # noqa: S110 - the handler gets the same one when it reads
            pass
        finally:
            body = b"".join(chunks)
            chunks.clear()
            self._unread(content, body)
        return body if is_whole else b""

    def _say(self, what: str) -> None:
        if self._once.is_new(what):
            message = "a request %s: its body gives no session. This is logged once."
            say(logger, logging.WARNING, message, what)


_ANY_BODY = JsonBody(JSON_MAX_SIZE)  # one for all, so that it logs a fault once
#: How to read the body of the request that this context serves, and what was found in that body.
#: They are not in the request's storage, because a handler may list that, or answer with it.
_body: ContextVar[JsonBody] = ContextVar("aiohttp_smg_routing_body", default=_ANY_BODY)
_found: ContextVar[dict[str, str | int | None]] = ContextVar("aiohttp_smg_routing_found")


def _at(document: Any, path: str) -> str | int | None:
    for name in path.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    is_one = isinstance(document, (str, int)) and not isinstance(document, bool)
    return document if is_one else None


def _parsed(body: bytes, charset: str) -> Any:
    try:
        if _UNICODE.fullmatch(charset):
            return json.loads(body)  # detects the encoding, and takes a byte order mark
        return json.loads(body.decode(charset)) if charset in _OTHER_CHARSETS else None
    except (ValueError, RecursionError):
        return None


def read_body_with(body: JsonBody) -> None:
    """Let the sources read the body of a new request with ``body`` and its limit."""
    _body.set(body)
    _found.set({})


async def peek_json(request: web.Request) -> Any:
    """Return the document in the JSON body of a request, for a source that is a function.

    It is None if the body is not JSON by its ``Content-Type``, is broken, does not arrive, or has
    more bytes than ``json_max_size``. It raises nothing. The handler can still read the body. Each
    call parses the body anew.

    >>> async def session_id(request):
    ...     return (await peek_json(request))["messages"][0]["name"]
    >>> config = RoutingConfig("http://10.0.0.1:30000", session_id=session_id)
    """
    return await _body.get().document(request)


def _charset_to_read(request: web.Request) -> str | None:
    """Return the charset of a JSON body that arrives before the answer begins, or None."""
    if hdrs.EXPECT in request.headers and compat.has_own_expect_handler(request):
        return None  # the client may wait until the handler asks for the body
    try:
        kind, charset = request.content_type, (request.charset or "utf-8").lower()
    except Exception:  # Python's parser fails at some values, such as "application/json; charset*"
        return None
    is_json = kind.endswith(("/json", "+json")) and kind != "application/stream+json"
    return charset if is_json else None  # a stream may wait for the answer to begin
