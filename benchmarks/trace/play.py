"""Play the sessions of a trace through the real gateway, on simulated workers."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector
from yarl import URL

from aiohttp_smg_routing import Routing, routing_session
from aiohttp_smg_routing.testing import smg_gateway
from harness.agents import CHAT, WORKER_HEADER
from harness.workers import MODEL

from .arms import Arm, times
from .engine import Speed
from .read import Session
from .workers import model_workers

GROUP = "header:X-Group-Id"
CALL_SECONDS = 900  # the longest that a call may take, in wall time
NO_PAUSE_KNOWN = 1.0
STARTS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """The workers that play the sessions, and the pace."""

    workers: int
    speed: Speed
    scale: float = 1
    """The model's seconds in a second of wall time."""

    at_once: int = 0
    """How many sessions run at a time; 0 for all."""

    pause: float | None = None
    """Seconds before each later turn; None for the recorded ones, or ``NO_PAUSE_KNOWN``."""


@dataclass(frozen=True, slots=True)
class Call:
    """An answered call. Times are in the model's seconds, except ``outside``."""

    session: int
    """The index of its session."""

    number: int
    """The index of its turn."""

    worker: str
    begun: float
    first_token: float
    """From arrival at the worker to the first token: queue and prefill."""

    inside: float
    """From arrival at the worker to the last token."""

    prompt_tokens: int
    cached_tokens: int
    outside: float
    """Seconds of wall time outside the worker, from sending the call to its answer."""


@dataclass(slots=True)
class Played:
    """The results of an arm."""

    calls: list[Call] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    """Calls without a 200, by what came instead. Their sessions go on."""

    seconds: float = 0
    """The model's seconds until the end of the last session."""

    wall: float = 0


async def play(
    arm: Arm, sessions: Sequence[Session], settings: Settings, done: Callable[[], None]
) -> Played:
    """Play all sessions on new workers and a new gateway; call ``done`` at each turn."""
    for _ in range(STARTS - 1):
        try:
            return await _play(arm, sessions, settings, done)
        except RuntimeError as error:
            # A run uses hundreds of ports, and another program may take one before its worker does.
            if "address already in use" not in str(error).lower():
                raise
    return await _play(arm, sessions, settings, done)


async def _play(
    arm: Arm, sessions: Sequence[Session], settings: Settings, done: Callable[[], None]
) -> Played:
    scale = settings.scale
    async with (
        model_workers(settings.workers, settings.speed, scale) as workers,
        smg_gateway(workers, policy=arm.policy, args=(*arm.args, *times(scale))) as gateway,
    ):
        return await play_on(gateway.url, arm, sessions, settings, done)


async def play_on(
    gateway: URL,
    arm: Arm,
    sessions: Sequence[Session],
    settings: Settings,
    done: Callable[[], None] = lambda: None,
) -> Played:
    """Play all sessions on a running gateway."""
    config = {"pin_by": f"{{{GROUP}}}"} if arm.key == "group" else {}
    routing = Routing({"gateway": gateway, **config})
    hooks = [] if arm.key == "no" else [routing.trace_config()]
    played = Played()
    places = asyncio.Semaphore(settings.at_once or len(sessions))
    async with ClientSession(
        connector=TCPConnector(limit=0),
        timeout=ClientTimeout(total=CALL_SECONDS),
        trace_configs=hooks,
    ) as client:

        async def play_session(place: int, session: Session) -> None:
            async with places:
                for number, turn in enumerate(session.turns):
                    if number:
                        await asyncio.sleep(pause(turn.pause, settings) / settings.scale)
                    body = chat(session.prompt(number), session.output(number))
                    with pinned(arm, session, number):
                        answered = await call(client, gateway / CHAT, body, settings.scale)
                    if isinstance(answered, str):
                        played.failures[answered] += 1
                    else:
                        played.calls.append(Call(place, number, **answered))
                    done()

        began = time.monotonic()
        await asyncio.gather(*map(play_session, range(len(sessions)), sessions))
        played.wall = time.monotonic() - began
        played.seconds = played.wall * settings.scale
    return played


def pause(recorded: float | None, settings: Settings) -> float:
    """Return the model's seconds before a later turn."""
    if settings.pause is not None:
        return settings.pause
    return NO_PAUSE_KNOWN if recorded is None else recorded


def pinned(arm: Arm, session: Session, number: int) -> AbstractContextManager[None]:
    """Return the block to make a turn in, which names its session if the arm has a key."""
    if arm.key == "no" or (arm.key == "later turns" and not number):
        return nullcontext()
    return routing_session(session.id, {GROUP: session.group})


def chat(prompt: str, output: str) -> bytes:
    """Return the body of a call, with the reply that the model must give."""
    messages = [{"role": "user", "content": prompt}]
    return json.dumps({"model": MODEL, "messages": messages, "reply": output}).encode()


async def call(
    client: ClientSession, url: URL, body: bytes, scale: float
) -> Mapping[str, Any] | str:
    """Make a call; return its measurements, or a short text if it failed."""
    sent = time.monotonic()
    headers = {"Content-Type": "application/json"}
    try:
        async with client.post(url, data=body, headers=headers) as response:
            content = await response.read()
    except (ClientError, asyncio.TimeoutError) as error:
        return type(error).__name__
    seconds = time.monotonic() - sent
    if response.status != 200:
        return reason(response.status, content)
    document = json.loads(content)
    timings, usage = document["timings"], document["usage"]
    return {
        "worker": response.headers[WORKER_HEADER],
        "begun": timings["begun"],
        "first_token": timings["first_token"] - timings["arrived"],
        "inside": timings["done"] - timings["arrived"],
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "outside": seconds - (timings["done"] - timings["arrived"]) / scale,
    }


def reason(status: int, content: bytes) -> str:
    """Return the name to count a refused call by: the status and the gateway's error code."""
    try:
        code = json.loads(content)["error"]["code"]
    except (LookupError, TypeError, ValueError):
        return f"status {status}"
    return f"status {status}, {code}"
