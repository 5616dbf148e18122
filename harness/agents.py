"""An agent plays one session through the example session server, and reads what that keeps."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
from aiohttp import ClientSession
from yarl import URL

from .sse import read_completion

Message = Mapping[str, Any]
CHAT_PATH = "/v1/chat/completions"
"""The path of a chat completion on a gateway."""

CHAT = CHAT_PATH[1:]
"""The same, below the URL of a gateway or of a session."""

WORKER_HEADER = "X-SMG-Routed-Worker-Id"


def conversation(turns: int) -> list[Message]:
    """Return the messages that an agent has sent after ``turns`` turns."""
    return [{"role": "user", "content": f"turn {number}"} for number in range(turns)]


def chat(session_id: str, turns: int = 1, **fields: object) -> dict[str, Any]:
    """Return the body of a turn: the conversation so far, and the session id as ``user``."""
    return {"model": "stub", "user": session_id, "messages": conversation(turns), **fields}


@dataclass(frozen=True, slots=True)
class Reply:
    """What an agent got for a turn."""

    status: int | None = None
    """None if the server hung up before it sent a status."""

    body: bytes = b""
    whole: bool = True
    """Whether the connection held to the end of the answer."""

    broke: str = field(default="", compare=False)
    """The name of the error that broke the connection; empty if none did."""

    headers: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def answered(self) -> bool:
        """Tell whether the turn got a whole answer."""
        return self.whole and self.status == 200

    @property
    def text(self) -> str | None:
        """What the assistant said; None if the answer is not whole."""
        completion = read_completion(self.body)
        return completion.text if completion.is_whole else None

    @property
    def error(self) -> Mapping[str, Any]:
        """The error that the agent got, in OpenAI's form; empty if there is none to read."""
        try:
            error = json.loads(self.body)["error"]
        except (LookupError, TypeError, ValueError):
            return {}
        return error if isinstance(error, dict) else {}


class Transcript(NamedTuple):
    """What the session server keeps of a session."""

    turns: int
    messages: list[Message]


@dataclass(slots=True)
class Agent:
    """One session's agent; each of its turns repeats all that was said before."""

    client: ClientSession
    url: URL
    """The URL of its session, which ends in the session's id."""

    worker: str = ""
    """The worker that answered last, if the gateway names it."""

    @property
    def session_id(self) -> str:
        """Its session."""
        return self.url.name

    @property
    def chat_url(self) -> URL:
        """The URL for its turns."""
        return self.url / CHAT

    async def begin(self) -> None:
        """Make the session."""
        body = {"session_id": self.session_id}
        async with self.client.post(self.url.parent, json=body, raise_for_status=True):
            pass

    async def turn(
        self,
        messages: Sequence[Message],
        *,
        arrived: Callable[[bytes], None] = lambda _: None,
        **fields: object,
    ) -> Reply:
        """Play a turn; ``arrived`` gets each piece of the answer as it arrives.

        ``fields`` are further fields of the body.
        """
        status, body = None, b""
        headers: Mapping[str, str] = {}
        sent = {**chat(self.session_id), "messages": messages, **fields}
        try:
            async with self.client.post(
                self.chat_url, json=sent, allow_redirects=False
            ) as response:
                status, headers = response.status, response.headers
                self.worker = headers.get(WORKER_HEADER, self.worker)
                async for piece in response.content.iter_any():
                    body += piece
                    arrived(piece)
        except aiohttp.ClientError as error:
            return Reply(status, body, False, type(error).__name__, headers)
        return Reply(status, body, headers=headers)

    async def transcript(self) -> Transcript:
        """Return what the server keeps at this moment, even in the middle of a turn."""
        async with self.client.get(self.url, raise_for_status=True) as response:
            document = await response.json()
        return Transcript(document["turns"], document["messages"])

    async def turns_kept(self) -> int:
        """Return how many turns the server keeps, once no turn is under way."""
        while True:
            turns, messages = await self.transcript()
            if not messages or messages[-1]["role"] == "assistant":
                return turns
            await asyncio.sleep(0.01)

    async def end(self) -> None:
        """Make the server forget the session."""
        async with self.client.delete(self.url, raise_for_status=True):
            pass
