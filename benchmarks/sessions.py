"""Ten thousand sessions through the real gateway, with and without the plugin."""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from aiohttp_smg_routing.testing import SmgGateway, smg_gateway

from .figures import Figure, Part, Progress, Table, Unit, ratios, step
from .rounds import interleave
from .server_under_test import ArmName, server_under_test
from .servers import Counted, Workers, stub_workers
from .turn import Caller, connected

NAME = "sessions"
TITLE = "Many sessions on the real gateway"

LIMIT = 0.97
OTHERS: tuple[ArmName, ...] = ("nothing", "by hand")
ARMS: tuple[ArmName, ...] = ("plugin", *OTHERS)
TURNS, WORKERS, AT_ONCE = 5, 4, 64
# A block is one session of each agent. A round has BLOCKS blocks of the plugin's arm and one of
# each other arm. With the warm-up round, the plugin's arm plays 10,368 sessions.
BLOCKS, ROUNDS = 6, 26
QUICK_AT_ONCE, QUICK_BLOCKS, QUICK_ROUNDS = 8, 2, 2
BRANCHES = ("vacant", "occupied_hit", "no_routing_id")

_NOTES = (
    f"{AT_ONCE} sessions at once, each of {TURNS} turns, on smg launch --policy manual "
    f"--assignment-mode min_group --disable-worker-overload-protection with {WORKERS} stub "
    "workers. Wall time: the agents, the session server, the gateway and the workers share this "
    f"machine. A round plays {BLOCKS} times as many sessions with the plugin as in each other arm, "
    "in shuffled order. A ratio compares the arms of one round.",
    "Without a key the gateway looks up no pin and makes none. In both arms of plugin / by hand "
    "the gateway does the same.",
    "The workers counted workers and keys. The gateway counted branches.",
)


@dataclass(slots=True)
class Play:
    """An arm: its agents, the number of sessions played, and the gateway's branch counts."""

    arm: ArmName
    agents: Sequence[Caller]
    sessions: int = 0
    branches: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """The prefix of the arm's session ids."""
        return self.arm.replace(" ", "-")

    @property
    def turns(self) -> int:
        """The number of turns played."""
        return self.sessions * TURNS

    async def block(self) -> float:
        """Play a session of each agent, all at once; return the wall seconds per turn."""
        numbers = range(self.sessions, self.sessions + len(self.agents))
        names = [f"{self.name}-{number}" for number in numbers]
        begin = time.perf_counter()
        await asyncio.gather(*map(play, self.agents, names))
        seconds = time.perf_counter() - begin
        self.sessions += len(names)
        return seconds / (len(names) * TURNS)


async def play(agent: Caller, session_id: str) -> None:
    """Play a session; each body has its id, so that workers know it even without a key."""
    messages = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"turn {turn}"})
        body = {"model": "stub", "user": session_id, "messages": messages}
        await agent.turn(session_id, json.dumps(body).encode())


@dataclass(frozen=True, slots=True)
class Bench:
    """The running workers, gateway and arms."""

    workers: Workers
    gateway: SmgGateway
    plays: Mapping[ArmName, Play]
    counted: Counter[str]

    async def block(self, arm: ArmName) -> float:
        """Play a block of an arm, and add the gateway's counts to it."""
        cost = await self.plays[arm].block()
        counted = await self.gateway.branches()
        self.plays[arm].branches.update(counted - self.counted)
        self.counted.clear()
        self.counted.update(counted)
        return cost


@asynccontextmanager
async def bench(at_once: int) -> AsyncIterator[Bench]:
    """Run everything until the block ends, with ``at_once`` agents in each arm."""
    async with (
        stub_workers(WORKERS) as workers,
        smg_gateway(
            workers.urls, policy="manual", args=("--assignment-mode", "min_group")
        ) as gateway,
        server_under_test(gateway.url, ARMS) as server,
        AsyncExitStack() as stack,
    ):
        plays = {arm: Play(arm, [Caller() for _ in range(at_once)]) for arm in ARMS}
        for arm, url in server.urls.items():
            await stack.enter_async_context(connected(plays[arm].agents, url))
        yield Bench(workers, gateway, plays, await gateway.branches())


async def run(progress: Progress, *, quick: bool = False) -> Part:
    """Interleave the plugin's sessions with those without a key and those by hand."""
    at_once, blocks, rounds = AT_ONCE, BLOCKS, ROUNDS
    if quick:
        at_once, blocks, rounds = QUICK_AT_ONCE, QUICK_BLOCKS, QUICK_ROUNDS
    told = step(progress, 0, 1, f"{at_once} agents at once")
    async with bench(at_once) as running:
        told(0)
        plugin = [f"plugin {number}" for number in range(blocks)]
        arms = {block: partial(running.block, "plugin") for block in plugin}
        arms.update({arm: partial(running.block, arm) for arm in OTHERS})
        costs = await interleave(arms, rounds, told)
        received = await running.workers.received()
    for cost in costs:
        cost["plugin"] = fmean(cost.pop(block) for block in plugin)
    return Part(NAME, TITLE, (speed(costs), pins(running.plays, received)), _NOTES)


def speed(costs: Sequence[Mapping[str, float]]) -> Table:
    """Return each arm's turns per second, and the plugin's as a multiple of it."""

    def rate(arm: ArmName) -> Figure:
        return Figure(tuple(1 / cost[arm] for cost in costs), "turns/s")

    rows: list[tuple[str | Figure, ...]] = [("plugin", rate("plugin"), "1")]
    for other in OTHERS:
        # A ratio of turns per second is the inverse ratio of the times.
        ratio = Figure(ratios(costs, other, "plugin"), "ratio", at_least=LIMIT)
        rows.append((other, rate(other), ratio))
    return Table("Turns per second", ("", "turns/s", "plugin / this"), tuple(rows))


def pins(plays: Mapping[ArmName, Play], received: Sequence[Counted]) -> Table:
    """Return what the workers received and the gateway counted; the plugin's must be perfect."""
    workers: defaultdict[str, set[int]] = defaultdict(set)
    turns: Counter[str] = Counter()
    keyed: Counter[str] = Counter()
    for each in received:
        workers[each.user].add(each.worker)
        turns[each.user] += each.turns
        keyed[each.user.rpartition("-")[0]] += each.turns if each.key == each.user else 0
    # A session without all its turns proves nothing.
    whole = Counter(
        user.rpartition("-")[0]
        for user, seen in workers.items()
        if len(seen) == 1 and turns[user] == TURNS
    )

    rows: list[tuple[str | Figure, ...]] = [
        ("sessions", *(f"{play.sessions:,}" for play in plays.values())),
        (
            "on one worker, first turn to last",
            *(_count(play, whole[play.name], play.sessions, "sessions") for play in plays.values()),
        ),
        (
            "turns with their session's key",
            *(_count(play, keyed[play.name], play.turns, "calls") for play in plays.values()),
        ),
    ]
    others = {branch for play in plays.values() for branch in play.branches} - {*BRANCHES}
    for branch in (*BRANCHES, *sorted(others)):
        counted = (f"{play.branches[branch]:,}" for play in plays.values())
        rows.append((f"gateway: {branch}", *counted))
    return Table("Pins", ("", *plays), tuple(rows))


def _count(play: Play, count: int, due: int, unit: Unit) -> Figure:
    """Return a count as a figure; the plugin's arm must reach all that are ``due``."""
    return Figure((count,), unit, at_least=due if play.arm == "plugin" else None)
