"""The JSON body has the session id, and stays there for the handler to read."""

import json
from collections.abc import Callable, Coroutine
from types import FunctionType, SimpleNamespace
from typing import Any

from aiohttp import StreamReader, streams, web

from .values import request_key

_Unread = Callable[[StreamReader, bytes], None]
_JSON = request_key("aiohttp_smg_routing.json", dict)
_MOST_BYTES = 64 * 2**20  # where the app has no limit


def text_in_json(
    path: str,
) -> Callable[[web.Request], Coroutine[Any, Any, str | None] | None]:
    """Return what reads the text at a dotted path of a request's JSON body, or None.

    It gives an awaitable where the request has a JSON content type. ``ValueError`` says what is
    wrong with the path.
    """
    names = path.split(".")
    if not all(names):
        raise ValueError("has an empty name in its path: one is 'json:metadata.session_id'")
    unread = _silent_unread()

    async def text(request: web.Request) -> str | None:
        found: Any = await _json_object(request, unread)
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, str) else None

    return lambda request: text(request) if _has_json(request) else None


def _has_json(request: web.Request) -> bool:
    kind = request.content_type
    if kind == "application/stream+json":  # such a request may wait for its answer to begin
        return False
    return kind == "application/json" or kind.endswith("+json")


async def _json_object(request: web.Request, unread: _Unread) -> dict[str, Any]:
    """Return the JSON object in the body, without its lists; empty where the body has none."""
    if _JSON not in request:
        try:
            body = await _peek(request, unread)
            found = json.loads(body.decode(request.charset or "utf-8"))
        except (ValueError, LookupError, RecursionError):  # the handler's to answer
            found = None
        found = found if isinstance(found, dict) else {}
        # It is kept for the next source and app. The conversation, the bulk of it, need not be.
        request[_JSON] = {name: it for name, it in found.items() if not isinstance(it, list)}
    return request[_JSON]  # type: ignore[no-any-return]


async def _peek(request: web.Request, unread: _Unread) -> bytes:
    """Return the body, and leave it to be read by the handler in whatever way.

    Empty where it is larger than the app takes, or does not arrive whole: then the handler meets
    what it would have met without this. ``request.read()`` would do neither: it takes the body off
    ``request.content``, and forbids ``request.clone()``.
    """
    content = request.content
    if content.at_eof():
        return await request.read()  # an earlier middleware has read it
    chunks: list[bytes] = []
    left = request.client_max_size or _MOST_BYTES
    try:
        while left >= 0 and (chunk := await content.readany()):
            chunks.append(chunk)
            left -= len(chunk)
    except Exception:  # the same one is raised again when the handler reads
        left = -1
    finally:
        body = b"".join(chunks)
        unread(content, body)
    return body if left >= 0 else b""


def _silent_unread() -> _Unread:
    """Return ``StreamReader.unread_data()`` without the warning that it is deprecated.

    Nothing public takes its place. Where warnings are errors, it would lose the body; and to
    silence them at each request would make all of the server's own warnings appear again.
    """
    silent = {**vars(streams), "warnings": SimpleNamespace(warn=lambda *_, **__: None)}
    return FunctionType(StreamReader.unread_data.__code__, silent)
