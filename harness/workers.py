"""Workers behind the real gateway, each a process: they note who called, and fail as they are told.

A worker writes each turn that it receives to a file at once, so that a kill loses none.
If a turn's body has ``"hold": PORT``, the worker on that port does not answer, or only begins a
streamed answer. No worker answers a turn with ``"hold": true``.
"""

import asyncio
import json
import os
import time
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from yarl import URL

from aiohttp_smg_routing.testing import (
    Answer,
    Call,
    Recorder,
    canned,
    completion,
    failure,
    free_ports,
    recording_gateway,
    stream,
)

from .agents import CHAT_PATH, Message
from .processes import Restartable, answering, command, local_url, together

MODEL = "stub"
Fault = Literal["503", "cut off"]
FAULTS: tuple[Fault, ...] = ("503", "cut off")


def models(name: str = MODEL, owned_by: str = "vllm") -> dict[str, object]:
    """Return what an engine answers to ``GET /v1/models``: SMG reads there which engine it is."""
    model = {"id": name, "object": "model", "owned_by": owned_by, "root": name}
    return {"object": "list", "data": [{**model, "max_model_len": 4096}]}


@asynccontextmanager
async def recorders(count: int) -> AsyncIterator[list[Recorder]]:
    """Run workers in this process that keep what they receive, until the block ends."""
    async with together(recording_gateway() for _ in range(count)) as started:
        yield started


class Received(NamedTuple):
    """A turn as a worker received it."""

    user: str
    """The session that the body names."""

    text: str
    """The last message."""

    keys: list[str]
    fault: str | None
    at: float


@dataclass(slots=True)
class Worker:
    """A worker process on a port that stays its own. It fails in each way with chance ``share``.

    It writes what it receives to ``file``.
    """

    port: int
    file: Path
    seed: int = 0
    share: float = 0
    process: Restartable[Process] = field(init=False)

    def __post_init__(self) -> None:
        self.process = Restartable(self.url, self._run)

    @property
    def url(self) -> URL:
        """Where it answers."""
        return local_url(self.port)

    def _run(self) -> AbstractAsyncContextManager[Process]:
        told = {"port": self.port, "file": str(self.file), "seed": self.seed, "share": self.share}
        self.seed += 1  # a restarted one does not fail at the same turns again
        return answering(self.url / "health", *command(main, **told))

    async def start(self) -> None:
        """Run it; return once it answers."""
        await self.process.start()

    async def kill(self) -> None:
        """Kill it, if it runs."""
        await self.process.kill()

    def received(self) -> Iterator[Received]:
        """Yield the turns that it received, before and after restarts."""
        with self.file.open(encoding="utf-8") as lines:
            for line in lines:
                yield Received(*json.loads(line))


@asynccontextmanager
async def worker_processes(
    folder: Path, count: int, *, seed: int = 0, share: float = 0
) -> AsyncIterator[Sequence[Worker]]:
    """Run workers until the block ends; they note what they receive in ``folder``."""
    workers = []
    for port in free_ports(count):
        file = folder / f"received-{port}.jsonl"
        file.touch()
        workers.append(Worker(port, file, seed * 1000 + port, share))
    try:
        await asyncio.gather(*(worker.start() for worker in workers))
        yield workers
    finally:
        await asyncio.gather(*(worker.kill() for worker in workers))


@dataclass(frozen=True, slots=True)
class Answers:
    """What the process of a worker does with a turn."""

    port: int
    file: int
    random: Random
    share: float

    def answer(self, call: Call) -> Answer:
        """Return the answer to a call, and note it when it is a turn."""
        if call.path != CHAT_PATH:
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
    """Return a completion that names its session and repeats the turn's last message."""
    text = reply_text(turn["user"], turn["messages"])
    half = len(text) // 2
    return stream(text[:half], text[half:]) if turn.get("stream") else completion(text)


def reply_text(session_id: str, messages: Sequence[Message]) -> str:
    """Return what the assistant says."""
    return f"{session_id} heard {messages[-1]['content']}"


async def begun(whole: Answer, stop: asyncio.Event | None = None) -> AsyncGenerator[bytes, None]:
    """Yield the first half of an answer; then wait for ``stop``, if there is one, and hang up."""
    if isinstance(whole, bytes):
        if stop is None:  # a held call gets nothing before it is stopped
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
        answers = Answers(port, received, Random(seed), share)

        def answer(call: Call) -> Answer:
            recorder.calls.clear()  # or it would keep a hundred thousand bodies
            return answers.answer(call)

        recorder.answer = answer
        await asyncio.Event().wait()
