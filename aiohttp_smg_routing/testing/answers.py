"""Answers of a gateway or an engine: canned, failing, streamed."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from yarl import URL

from ..gateway import CHAT_COMPLETIONS, ROUTED_WORKER_HEADER
from .call import Call

MODEL = "stub"
"""The model that ``GET /v1/models`` names: the real gateway asks its workers for it."""

Answer = bytes | AsyncGenerator[bytes, None]
r"""A whole HTTP answer, or an async generator of its pieces.

An empty piece closes the connection. ``ConnectionResetError`` in the generator resets it.

>>> async def breaks_off():
...     yield b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"
...     yield b""
>>> recorder.answer_with(breaks_off())
"""


def answer(
    body: object = b"", *, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Return a whole HTTP answer. A ``body`` that is not bytes goes out as JSON.

    By default the body is empty and the status is 200. ``headers`` come after ``Content-Length``,
    and replace it or ``Content-Type`` if they name it; by default there are no others. Raises
    ``TypeError`` if JSON can't express the body.

    >>> recorder.answer_with(answer({"error": "busy"}, status=503, headers={"Retry-After": "1"}))
    """
    kind = {} if isinstance(body, bytes) else {"Content-Type": "application/json"}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _head(status, {**kind, "Content-Length": str(len(content)), **headers}) + content


def failure(status: int = 503, message: str = "no worker is available") -> bytes:
    """Return an error in the form of the OpenAI API.

    By default the status is 503 and the message "no worker is available".

    >>> recorder.answer_with(failure(429, "too many requests"))
    """
    return answer({"error": {"message": message, "type": "gateway_error"}}, status=status)


def redirect(location: str | URL, status: int = 307) -> bytes:
    """Return a redirect to ``location``.

    The default 307 keeps a POST a POST (RFC 9110, section 15.4.8).

    >>> recorder.answer_with(redirect("http://10.0.0.9:30000/v1/chat/completions"))
    """
    return answer(status=status, headers={"Location": str(location)})


def completion(text: str = "ok", *, model: str = MODEL, worker: str | None = None) -> bytes:
    """Return a chat completion with the ``text`` "ok" and the model "stub" unless given.

    If ``worker`` is given, the answer names it in ``X-SMG-Routed-Worker-Id``, as SMG 1.10 and newer
    do for HTTP workers (``docs/gateways.md``).

    >>> recorder.answer_with(completion("hello", worker="http://10.0.0.2:8000"))
    """
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    document: dict[str, object] = {"id": "c", "object": "chat.completion", "created": 1}
    headers = {str(ROUTED_WORKER_HEADER): worker} if worker else {}
    document |= {"model": model, "choices": [choice], "usage": _USAGE}
    return answer(document, headers=headers)


async def stream(*texts: str, model: str = MODEL) -> AsyncGenerator[bytes, None]:
    """Yield a streamed chat completion, each of the ``texts`` in a chunk of its own.

    The model is "stub" unless given.

    >>> recorder.answer_with(stream("some", "pieces"))
    """
    yield _head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
    document = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model}
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts), {}]
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        yield _chunk(json.dumps({**document, "choices": [choice]}).encode())
    yield _chunk(b"[DONE]") + b"0\r\n\r\n"


def canned(call: Call) -> Answer:
    """Return what an engine would answer to a call: a health check, or a prompt in any API.

    >>> recorder.answer = lambda call: failure() if len(recorder.calls) == 1 else canned(call)
    """
    if call.path == "/v1/models":
        entry = {"id": MODEL, "object": "model", "owned_by": "vllm", "root": MODEL}
        return answer({"object": "list", "data": [{**entry, "max_model_len": 4096}]})
    if call.path != CHAT_COMPLETIONS:
        return answer(_CANNED.get(call.path, b""))
    asked: Any = {}
    with suppress(ValueError):
        asked = call.json()
    if not isinstance(asked, dict):
        asked = {}
    model = str(asked.get("model", MODEL))
    return stream("ok", model=model) if asked.get("stream") is True else completion(model=model)


_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
_CANNED: dict[str, object] = {
    "/generate": {"text": "ok", "meta_info": {"finish_reason": {"type": "stop"}}},
    "/v1/completions": {
        "id": "c",
        "object": "text_completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "text": "ok", "finish_reason": "stop", "logprobs": None}],
        "usage": _USAGE,
    },
    "/v1/messages": {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "ok"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
    "/v1/responses": {
        "id": "r",
        "object": "response",
        "created_at": 1,
        "model": MODEL,
        "status": "completed",
        "output": [
            {
                "id": "m",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "ok", "annotations": []}],
            }
        ],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
    },
}


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    known = status in HTTPStatus._value2member_map_
    reason = HTTPStatus(status).phrase if known else "Unknown"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} {reason}\r\n{lines}\r\n".encode()


def _chunk(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"
