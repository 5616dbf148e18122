"""One call: a streamed chat completion read to its end, or why there is no answer."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from ..gateway import ROUTED_WORKER_HEADER
from .seen import Failure

_SHOWN = 200  # characters of what a server says
_BRIEF = 5  # seconds at most for anything but a turn


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: what was said, by which worker, how soon, and what its prompt cost."""

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
    """Sends to the URLs that it is given, and to nothing that they point at.

    It follows no redirect, takes no proxy from the environment and keeps no cookie: that of a load
    balancer would pin the sessions in the key's place. ``timeout`` is in seconds, for one turn.
    The ``api_key`` goes with every call but those of ``text()``, and is in no ``Failure``.
    """

    def __init__(self, timeout: float, api_key: str | None) -> None:
        self._secret = api_key
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
        """Return the text at ``url``, asked for without the API key. Raises ``CallError``."""
        return await self._call("GET", url, {}, _text)

    async def json(self, url: URL) -> Any:
        """Return the JSON at ``url``. Raises ``CallError``."""
        return await self._call("GET", url, self._auth, _json)

    async def post(self, url: URL, body: Mapping[str, Any]) -> None:
        """Send ``body`` to ``url``. Raises ``CallError``."""
        await self._call("POST", url, self._auth, _text, body)

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
            worker = self._clean(response.headers.get(ROUTED_WORKER_HEADER, ""))
            cached = _mapping(usage.get("prompt_tokens_details")).get("cached_tokens")
            prompt = usage.get("prompt_tokens")
            return Reply(text, worker or None, first_token, _count(prompt), _count(cached))

        headers = {**self._auth, **headers}
        return await self._call("POST", url, headers, reply, body, self._timeout)

    async def _call(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        read: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        body: object = None,
        timeout: float = _BRIEF,
    ) -> T:
        """Return what ``read`` makes of a good answer; all that can go wrong is a ``CallError``."""
        limit = aiohttp.ClientTimeout(total=min(timeout, self._timeout))
        try:
            async with self._session.request(
                method, url, json=body, headers=headers, allow_redirects=False, timeout=limit
            ) as response:
                if 200 <= response.status < 300:
                    return await read(response)
                said = _message((await response.content.read(65536)).decode(errors="replace"))
                failure = Failure("status", url, response.status, self._clean(said))
        except asyncio.TimeoutError:
            failure = Failure("timeout", url)
        except aiohttp.ClientConnectorError as error:
            failure = Failure("refused", url, text=self._clean(error.strerror or str(error)))
        except (aiohttp.ClientError, ValueError) as error:
            failure = Failure("broken", url, text=self._clean(str(error)))
        raise CallError(failure)

    def _clean(self, text: str) -> str:
        """Return what may be shown of ``text``: one short line without control codes or secrets."""
        if self._secret:
            text = text.replace(self._secret, "***")
        shown = "".join(char if char.isprintable() else " " for char in text)
        return " ".join(shown.split())[:_SHOWN]


async def _text(response: aiohttp.ClientResponse) -> str:
    return await response.text()


async def _json(response: aiohttp.ClientResponse) -> Any:
    return json.loads(await response.read())


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the events of an SSE stream. ``ValueError`` where it is none, or has no end."""
    async for line in content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if not isinstance(event, dict) or "error" in event:
            raise ValueError(f"the stream says {data.decode(errors='replace')}")
        yield event
    raise ValueError("the answer is no stream that ends in [DONE]")


def _delta(event: Mapping[str, Any]) -> Mapping[str, Any]:
    match event:
        case {"choices": [{"delta": dict() as delta}, *_]}:
            return delta
    return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _message(said: str) -> str:
    """Return the message in an error of OpenAI's form, else all that was said."""
    try:
        match json.loads(said):
            case {"error": {"message": str() as message}} | {"message": str() as message}:
                return message
    except ValueError:
        pass
    return said
