"""A soak: a load, the failures around it, and the promises that must hold at the end."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import aiohttp

from aiohttp_smg_routing.testing import SmgGateway, free_ports, smg_gateway
from harness.agents import Agent
from harness.processes import Restartable, local_url, restartable
from harness.servers import SessionServer, complaints, session_server
from harness.workers import Worker, worker_processes

from .agents import SETTLE_SECONDS, Player, Report, Tally
from .causes import BREAKER_SECONDS, causes

WORKERS = 4
WORKER_KILLS = 40  # spread over the run, at most
TURNS_OF_A_KILL = 50  # a short run has fewer kills, so that its workers are also up now and then
# The shares of the run after which each is killed. The session server survives the second half,
# because its memory is checked there. It starts without any transcripts.
GATEWAY_KILLS = (0.2, 0.4, 0.6)
SERVER_KILLS = (0.1, 0.3)
FAILURE_SHARE = 0.02  # the share of a worker's turns with each kind of failure
LIMIT_SECONDS = 1800  # for one load
SAMPLES = 200  # how often to read the session server's memory
OUTAGE_SHARE = 0.01  # the most turns that end before the gateway restarts, as a share of all
# The share of turns that workers may fail, five times what their faults cause. A short run may
# fail one more turn of each agent.
MOST_REPORTED = 0.05
LEAST_ANSWERED = 0.8  # as a share of the turns without an outage or a hang-up
TRACKED = 200  # sessions in the ledger, so that it is full long before half of the run
# The gateway tries a worker again after seconds instead of a minute.
GATEWAY_ARGS = (
    "--assignment-mode",
    "min_group",
    "--disable-retries",
    "--cb-timeout-duration-secs",
    str(BREAKER_SECONDS),
)


@dataclass(frozen=True, slots=True)
class Load:
    """The number of sessions, of turns in each, and of sessions at a time."""

    sessions: int
    turns: int
    at_a_time: int
    seed: int
    debug: bool = False
    """The session server runs with ``PYTHONASYNCIODEBUG=1``."""

    @property
    def all_turns(self) -> int:
        """The number of turns of all sessions."""
        return self.sessions * self.turns

    @property
    def memory_slack(self) -> int:
        """The bytes by which memory may grow over the second half.

        In a full run a ledger that forgets nothing grows by more than twice that. A shorter run
        may grow by more, because memory still grows at its beginning.
        """
        return 2**18 if self.all_turns >= 100_000 else 2**20


@dataclass(slots=True)
class Result:
    """The result of a load."""

    load: Load
    tally: Tally = field(default_factory=Tally)
    kills: Counter[str] = field(default_factory=Counter)
    received: int = 0
    wrong_keys: list[str] = field(default_factory=list)
    """The turns whose key was not the id of the session that the body names."""

    faults: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    """How many of the reported turns each cause explains."""

    unexplained: list[Report] = field(default_factory=list)
    """The reported turns that no fault explains."""

    descriptors: tuple[int, int] | None = None
    """The session server's open descriptors before the first turn and after the last."""

    memory: list[int] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    exit_status: int | None = None
    seconds: float = 0

    def memory_of_quarter(self, number: int) -> float | None:
        """Return the median bytes that the session server held in a quarter, counted from 1."""
        size = len(self.memory) // 4
        return median(self.memory[(number - 1) * size : number * size]) if size else None

    @property
    def memory_growth(self) -> float:
        """The bytes by which the last quarter exceeds the third, 0 if they are unknown."""
        return (self.memory_of_quarter(4) or 0) - (self.memory_of_quarter(3) or 0)

    @property
    def answerable(self) -> int:
        """The number of turns without an outage or a hang-up."""
        outages = self.causes["gateway"] + self.causes["session server"]
        return self.load.all_turns - outages - self.tally.turns["hung up"]

    def failures(self) -> list[str]:
        """Return the broken promises, in plain words."""
        turns, load = self.tally.turns, self.load
        checks = {
            f"{turns['lost']} turns got no answer and no error": turns["lost"],
            f"{turns['crosstalk']} turns got the answer to another": turns["crosstalk"],
            f"{load.all_turns - self.tally.played} turns were not played": (
                load.all_turns != self.tally.played
            ),
            f"keys were not the session's own: {self.wrong_keys[:3]}": self.wrong_keys,
            f"transcripts were not what their agents got: {self.tally.wrong[:3]}": self.tally.wrong,
            f"the memory grew by {self.memory_growth / 2**20:.1f} MiB over the second half": (
                self.memory_growth > load.memory_slack
            ),
            f"the session server has descriptors open, at first and at last: {self.descriptors}": (
                self.descriptors and self.descriptors[1] > self.descriptors[0]
            ),
            f"turns were reported for no fault: {self.unexplained[:3]}": self.unexplained,
            f"the session server complained: {self.complaints[:3]}": self.complaints,
            f"the session server ended with status {self.exit_status}": self.exit_status,
            # If nothing works, nothing is lost, but nothing is proven either.
            f"workers failed at {self.causes['workers']} turns": (
                self.causes["workers"] > MOST_REPORTED * load.all_turns + load.at_a_time
            ),
            f"only {turns['answered']} turns were answered": (
                turns["answered"] < max(load.all_turns / 4, LEAST_ANSWERED * self.answerable)
            ),
            f"workers received {self.received} turns": self.received < turns["answered"],
            f"not all were killed: {dict(self.kills)}": len(+self.kills) < 3,
        }
        return [text for text, is_broken in checks.items() if is_broken]


async def soak(load: Load, progress: Callable[[Result], None]) -> Result:
    """Play a load while each server is killed in turn; call ``progress`` now and then."""
    result = Result(load)
    ports = free_ports(2)
    gateway_url, server_url = map(local_url, ports)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)

        def run_gateway() -> AbstractAsyncContextManager[SmgGateway]:
            urls = [worker.url for worker in workers]
            return smg_gateway(urls, policy="manual", port=ports[0], args=GATEWAY_ARGS)

        def run_server() -> AbstractAsyncContextManager[SessionServer]:
            debug = {"PYTHONASYNCIODEBUG": "1"} if load.debug else {}
            return session_server(
                gateway_url,
                folder=folder,
                port=ports[1],
                env={"PYTHONWARNINGS": "error", **debug},
                track_sessions=TRACKED,
            )

        async with (
            worker_processes(folder, WORKERS, seed=load.seed, share=FAILURE_SHARE) as workers,
            restartable(gateway_url, run_gateway) as gateway,
            restartable(server_url, run_server) as server,
        ):
            at_first = server.running.descriptors()
            all_workers_up = asyncio.Lock()
            begin = asyncio.get_running_loop().time()
            await alongside(
                in_time(play(load, gateway, server, result.tally), result.tally),
                kill_workers(result, workers, all_workers_up),
                kill_gateway(result, gateway, all_workers_up),
                kill_server(result, server),
                watch(result, server, progress),
            )
            result.seconds = asyncio.get_running_loop().time() - begin
            result.kills["worker"] = sum(worker.process.kills for worker in workers)
            result.kills["gateway"], result.kills["session server"] = gateway.kills, server.kills
            compare_keys(result, workers)
            result.causes, result.unexplained = causes(
                result.tally.reports, server, gateway, workers
            )
            # This ends the connections that the session server keeps for later turns.
            await gateway.kill()
            if at_first is not None:
                at_last = await descriptors_left(server.running, at_first)
                result.descriptors = at_first, at_last
            result.exit_status = await server.running.stop()
            result.complaints = complaints(server.running.log)
    return result


async def in_time(work: Coroutine[Any, Any, None], tally: Tally) -> None:
    """Do ``work``; raise ``RuntimeError`` if it takes too long."""
    try:
        await asyncio.wait_for(work, LIMIT_SECONDS)
    except asyncio.TimeoutError as error:
        raise RuntimeError(f"not over after {LIMIT_SECONDS} s: {dict(tally.turns)}") from error


async def play(
    load: Load, gateway: Restartable[Any], server: Restartable[Any], tally: Tally
) -> None:
    """Play all sessions."""
    numbers = iter(range(load.sessions))
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as client:

        async def one_after_another() -> None:
            for number in numbers:
                agent = Agent(client, server.url / "sessions" / f"s-{number}")
                random = Random(f"{load.seed}-{number}")
                await Player(agent, gateway, server, random, tally).play(load.turns)

        await asyncio.gather(*(one_after_another() for _ in range(load.at_a_time)))


async def alongside(work: Awaitable[None], *others: Awaitable[None]) -> None:
    """Do ``work`` and ``others`` at once until ``work`` ends; an error in any ends all."""
    tasks = [asyncio.ensure_future(each) for each in (work, *others)]
    waiting = set(tasks)
    try:
        while tasks[0] in waiting:
            ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def kill_workers(
    result: Result, workers: Sequence[Worker], all_workers_up: asyncio.Lock
) -> None:
    """Kill one worker at a time, each for a share of the run."""
    turns = result.load.all_turns
    kills = max(1, min(WORKER_KILLS, turns // TURNS_OF_A_KILL))
    random, step = Random(result.load.seed), turns / kills
    for number in range(kills):
        await result.tally.until((number + 0.25) * step)
        worker = random.choice(workers)
        async with all_workers_up:
            await worker.kill()
            await result.tally.until((number + 0.75) * step)
            await worker.start()


async def kill_gateway(
    result: Result, gateway: Restartable[Any], all_workers_up: asyncio.Lock
) -> None:
    """Kill the gateway now and then, and restart it with an empty sticky map."""
    for share in GATEWAY_KILLS:
        await result.tally.until(share * result.load.all_turns)
        async with all_workers_up:  # a new gateway waits half a minute for a worker that is down
            # An agent that meets the outage waits for its end: each may play one turn in it. So
            # count the turns that end while the gateway dies, too, and expect no more turns than
            # there are agents who have one left.
            load, played = result.load, result.tally.played
            agents_left = (load.all_turns - played) / load.turns
            met = min(load.at_a_time / 2, OUTAGE_SHARE * load.all_turns, agents_left)
            await gateway.kill()
            await result.tally.until(played + met)
            await gateway.start()


async def kill_server(result: Result, server: Restartable[SessionServer]) -> None:
    """Kill the session server now and then, and restart it without any session."""
    for share in SERVER_KILLS:
        await result.tally.until(share * result.load.all_turns)
        await server.kill()
        await server.start()


async def watch(
    result: Result, server: Restartable[SessionServer], progress: Callable[[Result], None]
) -> None:
    """Sample the session server's memory, and report the progress of the load."""
    for number in range(SAMPLES):
        await result.tally.until(number / SAMPLES * result.load.all_turns)
        if memory := server.running.memory():  # 0 while it is dying
            result.memory.append(memory)
        progress(result)


async def descriptors_left(server: SessionServer, at_first: int) -> int:
    """Return how many descriptors a server has open, once it has had time to close connections."""
    deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
    while (left := server.descriptors() or 0) > at_first:
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.02)
    return left


def compare_keys(result: Result, workers: Sequence[Worker]) -> None:
    """Compare each key that a worker received with the session that the body names."""
    for worker in workers:
        for turn in worker.received():
            result.received += 1
            result.faults[turn.fault or "none"] += 1
            if turn.keys != [turn.user]:
                result.wrong_keys.append(f"{turn.user} came with {turn.keys}")
