"""A soak: a load, what fails around it, and what is to be true of it at the end."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import aiohttp
from yarl import URL

from aiohttp_smg_routing.testing import smg_gateway

from .agents import Agent, Tally
from .servers import SessionServer, Worker, complaints, session_server, worker_processes

WORKERS = 4
KILLS = 40  # of a worker, spread over the run
FAILURE_SHARE = 0.02  # of the turns that a worker receives, for each way to fail
LIMIT_SECONDS = 1800  # for one load
SAMPLES = 200  # of the session server's memory
MEMORY_SLACK = 4 * 2**20  # bytes: 160 for each turn between the last two quarters of a full run
MOST_REPORTED = 0.05  # of the turns: five times what the faults come to
TRACKED = 500  # sessions in the ledger: full long before half, so that it must not grow any more
# A worker that is back is tried again after two seconds, not after a minute.
GATEWAY_ARGS = (
    "--assignment-mode",
    "min_group",
    "--disable-retries",
    "--cb-timeout-duration-secs",
    "2",
)


@dataclass(frozen=True, slots=True)
class Load:
    """So many sessions of so many turns, so many at a time."""

    sessions: int
    turns: int
    at_a_time: int
    seed: int
    debug: bool = False
    """The session server runs with ``PYTHONASYNCIODEBUG=1``."""

    @property
    def all_turns(self) -> int:
        """The turns of all sessions."""
        return self.sessions * self.turns


@dataclass(slots=True)
class Outcome:
    """What came of a load."""

    load: Load
    tally: Tally = field(default_factory=Tally)
    kills: int = 0
    received: int = 0
    wrong_keys: list[str] = field(default_factory=list)
    """The first turns whose key was not the session that the body names."""

    faults: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    exit_status: int | None = None
    seconds: float = 0

    def memory_of_quarter(self, number: int) -> float | None:
        """Return the median of the bytes that the session server held; the first quarter is 1."""
        size = len(self.memory) // 4
        return median(self.memory[(number - 1) * size : number * size]) if size else None

    @property
    def memory_growth(self) -> float:
        """The bytes by which the last quarter is above the third, 0 where they are not known."""
        return (self.memory_of_quarter(4) or 0) - (self.memory_of_quarter(3) or 0)

    def failures(self) -> list[str]:
        """Return which promises are broken, in plain words."""
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
                self.memory_growth > MEMORY_SLACK
            ),
            f"the session server complained: {self.complaints[:3]}": self.complaints,
            f"the session server ended with status {self.exit_status}": self.exit_status,
            # Where nothing works nothing is lost, and nothing shown.
            f"{turns['reported']} turns failed": turns["reported"] > MOST_REPORTED * load.all_turns,
            f"workers received {self.received} turns": self.received < turns["answered"],
            "no worker was killed": not self.kills,
        }
        return [text for text, is_broken in checks.items() if is_broken]


async def soak(load: Load, progress: Callable[[Outcome], None]) -> Outcome:
    """Play a load while workers are killed and fail; ``progress`` is called now and then."""
    outcome = Outcome(load)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        async with (
            worker_processes(folder, WORKERS, seed=load.seed, share=FAILURE_SHARE) as workers,
            smg_gateway(
                [worker.url for worker in workers], policy="manual", args=GATEWAY_ARGS
            ) as gateway,
            session_server(
                folder, gateway.url, env=environment(load), track_sessions=TRACKED
            ) as server,
        ):
            begin = asyncio.get_running_loop().time()
            async with background(
                break_workers(outcome, workers), watch(outcome, server, progress)
            ):
                await in_time(play(load, server.url, outcome.tally), outcome.tally)
            outcome.seconds = asyncio.get_running_loop().time() - begin
            outcome.exit_status = await server.stop()
            outcome.complaints = complaints(server.log)
            compare_keys(outcome, workers)
    return outcome


async def in_time(work: Coroutine[Any, Any, None], tally: Tally) -> None:
    """Do ``work``; raise ``RuntimeError`` when it takes too long."""
    try:
        await asyncio.wait_for(work, LIMIT_SECONDS)
    except asyncio.TimeoutError as error:
        raise RuntimeError(f"not over after {LIMIT_SECONDS} s: {dict(tally.turns)}") from error


def environment(load: Load) -> Mapping[str, str]:
    """Return what the session server finds in its environment besides."""
    return {"PYTHONASYNCIODEBUG": "1"} if load.debug else {}


async def play(load: Load, server: URL, tally: Tally) -> None:
    """Play all sessions."""
    numbers = iter(range(load.sessions))
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as client:

        async def one_after_another() -> None:
            for number in numbers:
                random = Random(f"{load.seed}-{number}")
                await Agent(client, server, f"s-{number}", random, tally).play(load.turns)

        await asyncio.gather(*(one_after_another() for _ in range(load.at_a_time)))


@asynccontextmanager
async def background(*works: Awaitable[None]) -> AsyncIterator[None]:
    """Do ``works`` until the block ends; what goes wrong in one ends the soak."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


async def break_workers(outcome: Outcome, workers: Sequence[Worker]) -> None:
    """Kill one worker after another, each for some share of the run."""
    random, step = Random(outcome.load.seed), outcome.load.all_turns / KILLS
    for number in range(KILLS):
        await outcome.tally.until((number + 0.25) * step)
        worker = random.choice(workers)
        await worker.kill()
        outcome.kills += 1
        await outcome.tally.until((number + 0.75) * step)
        await worker.start()


async def watch(
    outcome: Outcome, server: SessionServer, progress: Callable[[Outcome], None]
) -> None:
    """Sample the session server's memory, and tell how far the load is."""
    for number in range(SAMPLES):
        await outcome.tally.until(number / SAMPLES * outcome.load.all_turns)
        if (memory := server.memory()) is not None:
            outcome.memory.append(memory)
        progress(outcome)


def compare_keys(outcome: Outcome, workers: Sequence[Worker]) -> None:
    """Compare each key that a worker received with the session that the body names."""
    for worker in workers:
        for turn in worker.received():
            outcome.received += 1
            outcome.faults[turn.fault or "none"] += 1
            if turn.keys != [turn.user]:
                outcome.wrong_keys.append(f"{turn.user} came with {turn.keys}")
