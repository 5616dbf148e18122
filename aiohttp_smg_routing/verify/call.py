"""Makes one call: reads a streamed chat completion to its end, or finds why there is none."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from ..gateway import ROUTED_WORKER_HEADER
from .seen import Failure

_SHOWN = 200  # characters of a server's text
BRIEF = 5  # seconds for a call that the run does not depend on
_LARGEST = 16 * 2**20  # bytes of one answer that are read; a gateway's metrics have some 100 kB
_LARGEST_ERROR = 65536
_TOO_LONG = f"the answer has more than {_LARGEST // 2**20} MiB"

_NO_TLS = "the server speaks no TLS that can be trusted; for plain HTTP write http://"
_NO_HTTP = "the server does not speak HTTP/1.1; is it a port of TLS (https://), gRPC or HTTP/2?"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its text, its worker, its first token's time, and its prompt's tokens."""

    text: str
    worker: str | None
    first_token_seconds: float | None
    prompt_tokens: int | None
    cached_tokens: int | None


class CallError(Exception):
    """A call has no answer; ``failure`` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class Client:
    """Calls the URLs that it is given, and follows no redirect.

    It takes no proxy from the environment. It keeps no cookie: a load balancer's cookie would pin
    the sessions instead of the key. ``timeout`` is in seconds, for one turn. The ``api_key`` goes
    with every call except those of ``text()``, and no ``Failure`` shows it.
    """

    def __init__(self, timeout: float, api_key: str | None) -> None:
        self._secrets = _spellings(api_key) if api_key else []
        self._auth = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def text(self, url: URL) -> str:
        """Return the text at ``url``; send no API key. Raises ``CallError``."""
        return await self._call("GET", url, {}, _text, timeout=BRIEF)

    async def json(self, url: URL, *, timeout: float = inf) -> Any:
        """Return the JSON at ``url``. Raises ``CallError``.

        The limit is ``timeout`` seconds, or the limit of a turn if that is shorter.
        """
        return await self._call("GET", url, self._auth, _json, timeout=timeout)

    async def post(self, url: URL, body: Mapping[str, Any]) -> str:
        """Send ``body`` to ``url``; return the text of the answer. Raises ``CallError``."""
        return await self._call("POST", url, self._auth, _text, body)

    async def delete(self, url: URL) -> None:
        """Ask ``url`` to delete what is there. Raises ``CallError``."""
        await self._call("DELETE", url, self._auth, _text, timeout=BRIEF)

    async def chat(self, url: URL, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        """Send a turn and read the streamed answer to its end. Raises ``CallError``."""
        begin = time.perf_counter()

        async def reply(response: aiohttp.ClientResponse) -> Reply:
            text, first_token = "", None
            usage: Mapping[str, Any] = {}
            async for event in _events(response.content):
                delta = _delta(event)
                if first_token is None and any(delta[name] for name in delta if name != "role"):
                    first_token = time.perf_counter() - begin
                content = delta.get("content")
                text += content if isinstance(content, str) else ""
                usage = _mapping(event.get("usage")) or usage
            worker = self.clean(response.headers.get(ROUTED_WORKER_HEADER, ""))
            cached = _mapping(usage.get("prompt_tokens_details")).get("cached_tokens")
            prompt = usage.get("prompt_tokens")
            return Reply(text, worker or None, first_token, _count(prompt), _count(cached))

        headers = {**self._auth, **headers}
        return await self._call("POST", url, headers, reply, body)

    async def _call(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        read: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        body: object = None,
        timeout: float = inf,
    ) -> T:
        """Return what ``read`` makes of a good answer. Raises ``CallError`` for every failure."""
        limit = aiohttp.ClientTimeout(total=min(timeout, self._timeout))
        try:
            async with self._session.request(
                method, url, json=body, headers=headers, allow_redirects=False, timeout=limit
            ) as response:
                if 200 <= response.status < 300:
                    return await read(response)
                body_read = await _beginning(response, _LARGEST_ERROR)
                said = _message(body_read.decode(errors="replace"))
                failure = Failure("status", url, response.status, self.clean(said))
        except asyncio.TimeoutError:
            failure = Failure("timeout", url)
        except aiohttp.ClientSSLError as error:
            said = self.clean(str(getattr(error, "os_error", error)))
            failure = Failure("refused", url, text=f"{_NO_TLS}: {said}"[:_SHOWN])
        except aiohttp.ClientConnectorError as error:
            failure = Failure("refused", url, text=self.clean(error.strerror or str(error)))
        except aiohttp.ClientResponseError:
            # The bytes of a server that speaks TLS, gRPC or HTTP/2 would help nobody.
            failure = Failure("broken", url, text=_NO_HTTP)
        except (
            *(aiohttp.ClientError, HttpProcessingError),  # the last error is for an overlong line
            *(ValueError, RecursionError),
        ) as error:
            failure = Failure("broken", url, text=self.clean(str(error)))
        raise CallError(failure)

    def printable(self, text: str) -> str:
        """Return a server's ``text`` without control codes and without the API key."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return "".join(char if char.isprintable() else " " for char in text)

    def clean(self, text: str) -> str:
        """Return a server's ``text`` as one short, printable line without the API key."""
        return " ".join(self.printable(text).split())[:_SHOWN]


def _spellings(api_key: str) -> list[str]:
    """Return the forms in which a server may repeat the key: plain, or within a JSON string."""
    escaped = json.dumps(api_key)[1:-1]
    return sorted({api_key, escaped, escaped.replace("/", "\\/")}, key=len, reverse=True)


async def _beginning(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Read at most ``most`` bytes of the body."""
    body = b""
    while chunk := await response.content.read(most - len(body)):
        body += chunk
    return body


async def _text(response: aiohttp.ClientResponse) -> str:
    body = await _beginning(response, _LARGEST + 1)
    if len(body) > _LARGEST:
        raise ValueError(_TOO_LONG)
    return body.decode(errors="replace")


async def _json(response: aiohttp.ClientResponse) -> Any:
    return json.loads(await _text(response))


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the events of an SSE stream. Raises ``ValueError`` if it is not one, or is cut off."""
    size = 0
    async for line in content:
        size += len(line)
        if size > _LARGEST:
            raise ValueError(_TOO_LONG)
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if not isinstance(event, dict) or event.get("error") is not None:
            raise ValueError(f"the stream says {data.decode(errors='replace')}")
        yield event
    raise ValueError("the answer is not a stream that ends in [DONE]")


def _delta(event: Mapping[str, Any]) -> Mapping[str, Any]:
    match event:
        case {"choices": [{"delta": dict() as delta}, *_]}:
            return delta
    return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None


def _message(said: str) -> str:
    """Return the message of an error in OpenAI's form, else the whole text."""
    with suppress(ValueError, RecursionError):
        match json.loads(said):
            case {"error": {"message": str() as message}} | {"message": str() as message}:
                return message
    return said
