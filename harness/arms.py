"""Arms: a load that agents play on real engines, behind the real gateway, under one policy.

    arm = await play(Load(sessions=9, turns=5, workers=3), PINNED)
    print(arm.cached_share, arm.first_token(50))

The demo and the benchmark of the KV cache share them. All servers run on free loopback ports.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import quantiles
from uuid import uuid4

from aiohttp import ClientSession, ClientTimeout

from aiohttp_smg_routing.testing import smg_gateway

from .agents import Agent, Message
from .engines import engines
from .servers import session_server
from .sse import Completion

TEMPLATE_TOKENS = 40  # what the chat template adds to a turn, at most
ARRIVAL_SECONDS = 0.03  # between two agents: far less than a first turn takes
TURN_SECONDS = 120  # the longest that a turn may take on a slow machine


@dataclass(frozen=True, slots=True)
class Load:
    """What an arm plays: ``sessions`` at once, ``turns`` in each, on ``workers`` engines.

    One character is one token of the engines' model. With ``shared_prompt`` all sessions
    begin with one system prompt. Otherwise no two share a prefix, and a session finds nothing in a
    cache but what it left there itself.
    """

    sessions: int
    turns: int
    workers: int
    # Long enough that a cold prompt visibly costs time, short enough that both arms of the demo
    # end within a minute on two cores.
    system_characters: int = 500
    user_characters: int = 80
    reply_characters: int = 8
    shared_prompt: bool = False

    @property
    def even_share(self) -> int:
        """The conversations that one engine has to hold when they are spread evenly."""
        return -(-self.sessions // self.workers)

    @property
    def context(self) -> int:
        """The tokens of a whole conversation, or a few more."""
        turn = self.user_characters + self.reply_characters + TEMPLATE_TOKENS
        return self.system_characters + TEMPLATE_TOKENS + self.turns * turn


@dataclass(frozen=True, slots=True)
class Policy:
    """The gateway's ``--policy``, its further arguments, and whether the plugin sends a key."""

    name: str
    args: tuple[str, ...] = ()
    plugin: bool = True


PINNED = Policy("manual", ("--assignment-mode", "min_group"))


@dataclass(frozen=True, slots=True)
class Turn:
    """One measured turn; ``number`` counts from 0 within its session."""

    session_id: str
    number: int
    worker: str
    first_token_seconds: float
    prompt_tokens: int
    cached_tokens: int
    reply_tokens: int


@dataclass(frozen=True, slots=True)
class Played:
    """All turns of one load, the gateway's count of each policy branch, and the wall time."""

    turns: tuple[Turn, ...]
    branches: Counter[str]
    seconds: float

    @property
    def sessions(self) -> int:
        """The number of sessions."""
        return len({turn.session_id for turn in self.turns})

    @property
    def stayed(self) -> int:
        """The number of sessions that one worker answered from the first turn to the last."""
        return self.sessions - moved_sessions(self.turns)

    @property
    def busiest(self) -> int:
        """The number of sessions in which the busiest worker answered a turn."""
        visits = {(turn.worker, turn.session_id) for turn in self.turns}
        return max(Counter(worker for worker, _ in visits).values())

    @property
    def later_turns(self) -> list[Turn]:
        """All but the first turns, which no cache can help."""
        return [turn for turn in self.turns if turn.number]

    @property
    def cached_share(self) -> float:
        """The share of the later turns' prompt tokens that came from a KV cache, 0 to 1."""
        cached = sum(turn.cached_tokens for turn in self.later_turns)
        return cached / sum(turn.prompt_tokens for turn in self.later_turns)

    def first_token(self, percent: int) -> float:
        """Return that percentile of the later turns' time to first token, in seconds."""
        times = [turn.first_token_seconds for turn in self.later_turns]
        return quantiles(times, n=100, method="inclusive")[percent - 1]


def moved_sessions(turns: Iterable[Turn]) -> int:
    """Return how many sessions were answered by more than one worker."""
    workers: defaultdict[str, set[str]] = defaultdict(set)
    for turn in turns:
        workers[turn.session_id].add(turn.worker)
    return sum(len(seen) > 1 for seen in workers.values())


async def play(
    load: Load,
    policy: Policy,
    *,
    slots: int | None = None,
    model: Path | None = None,
    started: Callable[[], None] = lambda: None,
    played: Callable[[Turn], None] = lambda _: None,
) -> Played:
    """Play ``load`` through fresh processes, so that no arm finds another one's warm cache.

    ``slots`` is the number of conversations that one engine holds, an even share by
    default; ``model`` is the file to run, see ``engines()``. ``started`` is called when
    all servers are up, ``played`` with each turn as it ends.
    """
    slots = load.even_share if slots is None else slots
    turns: list[Turn] = []

    def keep(turn: Turn) -> None:
        turns.append(turn)
        played(turn)

    async with (
        engines(load.workers, slots=slots, context=load.context, model=model) as workers,
        smg_gateway(workers, policy=policy.name, args=policy.args) as gateway,
        session_server(gateway.url, timeout_seconds=TURN_SECONDS, enabled=policy.plugin) as server,
        ClientSession(timeout=ClientTimeout(total=TURN_SECONDS)) as client,
    ):
        started()
        # New ids in each arm, so that a policy that hashes the key spreads them anew.
        sessions = [server.url / "sessions" / uuid4().hex for _ in range(load.sessions)]
        begin = time.perf_counter()
        await asyncio.gather(
            *(
                play_session(Agent(client, url), load, seed, keep)
                for seed, url in enumerate(sessions)
            )
        )
        seconds = time.perf_counter() - begin
        return Played(tuple(turns), await gateway.branches(), seconds)


async def play_session(agent: Agent, load: Load, seed: int, played: Callable[[Turn], None]) -> None:
    """Hold a conversation in which every turn repeats all that was said before.

    The same ``seed`` makes the same words in every arm. Agents arrive one after another, while the
    earlier ones wait for their first answer: ``min_group`` counts the keys that have a call in
    flight (SMG 1.13.0), so it would place at random an agent that comes when all others are idle.
    """
    random = Random(seed)
    await asyncio.sleep(seed * ARRIVAL_SECONDS)
    system = letters(Random(-1) if load.shared_prompt else random, load.system_characters)
    await agent.begin()
    messages = [{"role": "system", "content": system}]
    for number in range(load.turns):
        messages.append({"role": "user", "content": letters(random, load.user_characters)})
        turn, reply = await play_turn(agent, number, messages, max_tokens=load.reply_characters)
        messages.append({"role": "assistant", "content": reply})
        played(turn)


def letters(random: Random, count: int) -> str:
    """Return ``count`` random letters and spaces: nobody reads them but the engines."""
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz ", k=count))


async def play_turn(
    agent: Agent, number: int, messages: Sequence[Message], *, max_tokens: int
) -> tuple[Turn, str]:
    """Send the conversation, read the streamed reply, and return what was measured and said."""
    completion, first_token = Completion(), 0.0
    begin = time.perf_counter()

    def arrived(piece: bytes) -> None:
        nonlocal first_token
        completion.feed(piece)
        if completion.text and not first_token:
            first_token = time.perf_counter() - begin

    got = await agent.turn(
        messages,
        arrived=arrived,
        model="random-llama",
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = completion.usage
    if not (got.answered and completion.is_whole) or usage is None:
        said = f"{got.status} {got.broke} {got.body.decode(errors='replace')[-500:]}"
        raise RuntimeError(f"turn {number + 1} of a session failed: {said}")
    if not agent.worker:
        raise RuntimeError(
            "the gateway does not say which worker answered: smg 1.10.1 or newer does"
        )
    turn = Turn(
        session_id=agent.session_id,
        number=number,
        worker=agent.worker,
        first_token_seconds=first_token,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        reply_tokens=usage["completion_tokens"],
    )
    return turn, completion.text
