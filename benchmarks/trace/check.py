"""Check the model of an engine against real engines: ``python -m benchmarks trace --check``.

Both play a load that real engines can serve on two cores, in some of the arms. Chance partly
decides the worker of a call. So the model is compared twice: on the same calls as the real engines,
each on the same worker, and in a play of its own through the gateway.

Each worker has room for all sessions. With too little room the two may differ, because llama.cpp
then displaces a whole conversation, and the model a block, as vLLM and SGLang do.
"""

import asyncio
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import NamedTuple

from aiohttp import ClientSession, TCPConnector
from yarl import URL

from aiohttp_smg_routing import Routing
from aiohttp_smg_routing.testing import smg_gateway
from benchmarks.figures import Figure, Part, Progress, Table
from harness.agents import CHAT, WORKER_HEADER
from harness.arms import ARRIVAL_SECONDS, TEMPLATE_TOKENS, letters
from harness.engines import engines, write_model
from harness.workers import MODEL

from .arms import CACHE_AWARE, HASHED, PINNED, RANDOM, Arm
from .cache import BLOCK, PrefixCache, chain
from .engine import Speed
from .play import pinned
from .read import Session, Turn
from .workers import model_workers

TITLE = "The model of an engine, beside real ones"
POINTS = 0.02
"""How far the model's cached share may be from that of the real engines."""

APART = 0.1
"""Arms that are closer than this may change places by chance."""

# Not round_robin: with so few sessions its result depends on lockstep.
ARMS = (PINNED, HASHED, CACHE_AWARE, RANDOM)
QUICK_ARMS = (PINNED, RANDOM)
ENGINE_MODEL, ENGINE_BLOCKS = "random-llama", 2
OUTPUT = 8  # tokens
SPEED = Speed(prefill=3000, per_token=1)  # about a real engine's; no result depends on it
REAL, SAME, PLAYED = "real engines", "the model, same calls", "the model, played"


@dataclass(frozen=True, slots=True)
class Load:
    """Sessions played at once, their turns and their sizes; one character is one token."""

    sessions: int = 7  # odd: an even number in lockstep on round_robin can look pinned
    turns: int = 4
    workers: int = 4
    first: int = 1200
    later: int = 100

    @property
    def context(self) -> int:
        """The tokens of a whole session, with a margin."""
        return self.first + self.turns * (self.later + OUTPUT) + TEMPLATE_TOKENS


QUICK = Load(sessions=3, turns=3, workers=2, first=600)


class Row(NamedTuple):
    """The cached shares of an arm: of the real engines, and of the model in both comparisons."""

    name: str
    real: float
    same: float
    played: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A call, the worker that answered it, and its tokens from the cache."""

    session: int
    number: int
    worker: str
    prompt_tokens: int
    cached_tokens: int


def sessions_of(load: Load) -> list[Session]:
    """Return sessions whose prompts have no prefix in common."""
    made = []
    for seed in range(load.sessions):
        random = Random(seed)
        text, turns = letters(random, load.first), []
        for _ in range(load.turns):
            text += letters(random, load.later)
            turns.append(Turn(text, "x" * OUTPUT))
        made.append(Session(f"session-{seed}", "", tuple(turns)))
    return made


async def measure(progress: Progress, quick: bool) -> Part:
    """Play each arm on real engines and on the model; return the comparison."""
    load, arms = (QUICK, QUICK_ARMS) if quick else (Load(), ARMS)
    sessions = sessions_of(load)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        model = Path(folder, "model.gguf")
        write_model(model, blocks=ENGINE_BLOCKS)
        for number, arm in enumerate(arms):
            progress(number / len(arms), f"{arm.name}: real engines")
            size = {"slots": load.sessions, "context": load.context}
            async with engines(load.workers, model=model, **size) as workers:
                real = await ask(arm, workers, sessions, ENGINE_MODEL)
            progress((number + 0.7) / len(arms), f"{arm.name}: the model")
            speed = replace(SPEED, tokens=load.sessions * load.context)
            async with model_workers(load.workers, speed, scale=1) as workers:
                played = await ask(arm, workers, sessions, MODEL)
            same = replayed(real, sessions, speed)
            rows.append(Row(arm.name, share(real), share(same), share(played)))
    table = Table(
        f"From the cache, second turn on: {load.workers} workers with room for all of"
        f" {load.sessions} sessions, {load.turns} turns, first prompts of"
        f" {load.first + load.later} tokens, {load.later} more a turn",
        ("", REAL, SAME, PLAYED),
        tuple((name, *(Figure((each,), "share") for each in shares)) for name, *shares in rows),
    )
    return Part(TITLE, TITLE, (table,), (verdict(rows),))


async def ask(
    arm: Arm, workers: Sequence[URL], sessions: Sequence[Session], model: str
) -> list[Asked]:
    """Play the sessions on running workers; return the calls in the order of their answers."""
    asked: list[Asked] = []
    async with smg_gateway(workers, policy=arm.policy, args=arm.args) as gateway:
        hooks = [] if arm.key == "no" else [Routing({"gateway": gateway.url}).trace_config()]
        connector = TCPConnector(limit=0)
        async with ClientSession(
            connector=connector, trace_configs=hooks, raise_for_status=True
        ) as client:

            async def play_session(place: int, session: Session) -> None:
                await asyncio.sleep(place * ARRIVAL_SECONDS)
                for number, turn in enumerate(session.turns):
                    body = {
                        "model": model,
                        "messages": [{"role": "user", "content": turn.prompt}],
                        "max_tokens": OUTPUT,
                        "temperature": 0,
                        "reply": turn.output,
                    }
                    with pinned(arm, session, number):
                        async with client.post(gateway.url / CHAT, json=body) as response:
                            usage = json.loads(await response.read())["usage"]
                    asked.append(
                        Asked(
                            place,
                            number,
                            response.headers[WORKER_HEADER],
                            usage["prompt_tokens"],
                            usage["prompt_tokens_details"]["cached_tokens"],
                        )
                    )

            await asyncio.gather(*map(play_session, range(len(sessions)), sessions))
    return asked


def replayed(real: Sequence[Asked], sessions: Sequence[Session], speed: Speed) -> list[Asked]:
    """Return the same calls with the model's figures, each on the same worker."""
    caches: defaultdict[str, PrefixCache] = defaultdict(lambda: PrefixCache(speed.tokens // BLOCK))
    said = []
    for call in real:
        prompt = sessions[call.session].turns[call.number].prompt
        names = chain(prompt, speed.per_token)
        held = caches[call.worker].begin(names, len(names) + 1)
        if held is None:
            raise RuntimeError("a call is longer than the cache")
        caches[call.worker].end(held, names)
        tokens = held.reused(len(prompt))
        said.append(replace(call, prompt_tokens=len(prompt), cached_tokens=tokens))
    return said


def share(calls: Sequence[Asked]) -> float:
    """Return the share of the prompt tokens from the cache, from the second turn on."""
    later = [call for call in calls if call.number]
    return sum(call.cached_tokens for call in later) / sum(call.prompt_tokens for call in later)


def verdict(rows: Sequence[Row]) -> str:
    """Say how near the model is to the real engines. Raises ``RuntimeError`` if it is not near."""
    off = max(abs(row.real - row.same) for row in rows)
    if off > POINTS:
        raise RuntimeError(
            f"the model is {100 * off:.1f} points off real engines, more than"
            f" {100 * POINTS:g}: {shown(rows)}"
        )
    for one, other in combinations(rows, 2):
        real, played = one.real - other.real, one.played - other.played
        if min(abs(real), abs(played)) > APART and real * played < 0:
            raise RuntimeError(f"{one.name} and {other.name} change places: {shown(rows)}")
    return (
        f"On the same calls the model is at most {100 * off:.1f} points off the real engines. Arms"
        f" that are more than {100 * APART:g} points apart come in the same order. The real engines"
        f" are llama.cpp's, which counts each token; the model counts blocks of {BLOCK}."
    )


def shown(rows: Sequence[Row]) -> str:
    """Return the rows as text for an error."""
    return "; ".join(
        f"{name}: {', '.join(f'{each:.1%}' for each in shares)}" for name, *shares in rows
    )
