"""A worker behind the real gateway: it notes who called, and fails as often as it is told.

Each turn that it receives is a line of a file at once, so that a kill takes nothing with it. A
turn whose body has ``"hold": PORT`` is not answered by the worker on that port, only begun when it
is streamed; one with ``"hold": true`` by none.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from aiohttp_smg_routing.gateway import CHAT_COMPLETIONS
from aiohttp_smg_routing.testing import (
    Answer,
    Call,
    canned,
    completion,
    failure,
    recording_gateway,
    stream,
)

Fault = Literal["503", "cut off"]
FAULTS: tuple[Fault, ...] = ("503", "cut off")


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker does with a turn; it fails with a chance of ``share`` in each way."""

    port: int
    file: int
    random: Random
    share: float

    def answer(self, call: Call) -> Answer:
        """Return the answer to a call, and note it when it is a turn."""
        if call.path != CHAT_COMPLETIONS:
            return canned(call)
        turn = call.json()
        roll = self.random.random()
        fault = FAULTS[int(roll / self.share)] if roll < len(FAULTS) * self.share else None
        keys = [key.decode() for key in call.keys]
        noted = [turn["user"], turn["messages"][-1]["content"], keys, fault, time.monotonic()]
        # One write: a line is there whole, or not at all.
        os.write(self.file, json.dumps(noted).encode() + b"\n")
        if fault == "503":
            return failure(503)
        whole = reply(turn)
        if turn.get("hold") in (True, self.port):
            return begun(whole, stop=asyncio.Event())
        return begun(whole) if fault else whole


def reply(turn: dict[str, Any]) -> Answer:
    """Return a completion that tells whose turn it answers, and which."""
    text = reply_text(turn["user"], turn["messages"])
    half = len(text) // 2
    return stream(text[:half], text[half:]) if turn.get("stream") else completion(text)


def reply_text(session_id: str, messages: list[dict[str, str]]) -> str:
    """Return what the assistant says."""
    return f"{session_id} heard {messages[-1]['content']}"


async def begun(whole: Answer, stop: asyncio.Event | None = None) -> AsyncGenerator[bytes, None]:
    """Yield the first half of an answer; then wait for ``stop``, if there is one, and hang up."""
    if isinstance(whole, bytes):
        if stop is None:  # a call that is held has seen nothing yet
            yield whole[: -len(whole) // 4]
    else:
        yield await anext(whole) + await anext(whole)
        await whole.aclose()
    if stop:
        await stop.wait()
    yield b""


def main(port: int, file: str, seed: int, share: float) -> None:
    """Be a worker, until it is killed."""
    asyncio.run(_run(port, file, seed, share))


async def _run(port: int, file: str, seed: int, share: float) -> None:
    received = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    async with recording_gateway(port) as recorder:
        worker = Worker(port, received, Random(seed), share)

        def answer(call: Call) -> Answer:
            recorder.calls.clear()  # a hundred thousand bodies would be kept
            return worker.answer(call)

        recorder.answer = answer
        await asyncio.Event().wait()
