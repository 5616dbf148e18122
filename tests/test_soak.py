"""The soak, in its short form: what it injects, what it finds, and what it leaves behind."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from soak import agents
from soak.agents import Agent, Tally
from soak.run import MEMORY_SLACK, Load, Outcome, compare_keys
from soak.servers import Worker, complaints

from .processes import HAS_PROC, processes_in, running

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder to run the soak in; nothing but its results may be left there afterwards."""
    yield tmp_path.resolve()
    assert processes_in(tmp_path.resolve()) == {}
    assert {file.name for file in tmp_path.iterdir()} <= {"soak.json"}


async def test_a_short_soak_loses_nothing(folder: Path) -> None:
    argv = ("-m", "soak", "--sessions=200", "--turns=5", "--at-a-time=32", "--json=soak.json")
    async with running(folder, *argv, PYTHONPATH=str(ROOT)) as process:
        out, err = (text.decode() for text in await process.communicate())
    assert (process.returncode, err) == (0, ""), out
    soak, debug = json.loads((folder / "soak.json").read_text("utf-8"))
    for each in (soak, debug):
        figures = each["figures"]
        ends = ("turns answered", "turns reported to the agent as an error")
        hung_up = figures["fault: agents that hung up"]
        assert sum(figures[end] for end in ends) + hung_up == figures["turns"]
        assert each["failures"] == []
        assert (figures["lost"], figures["crosstalk"]) == (0, 0)
    faults = {name: count for name, count in soak["figures"].items() if name.startswith("fault: ")}
    assert len(faults) == 4
    assert all(faults.values())
    assert debug["load"]["debug"]


@pytest.mark.skipif(not HAS_PROC, reason="it is told by /proc that the session server runs")
async def test_a_soak_that_is_stopped_leaves_nothing_behind(folder: Path) -> None:
    async with running(folder, "-m", "soak", PYTHONPATH=str(ROOT)) as process:

        async def until_it_serves() -> None:
            while "session_server.py" not in " ".join(processes_in(folder).values()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

        await asyncio.wait_for(until_it_serves(), 60)
        process.send_signal(signal.SIGTERM)
        _, err = await process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Stopped by SIGTERM" in err


def whole() -> Outcome:
    """Return an outcome that breaks no promise."""
    outcome = Outcome(Load(sessions=50, turns=2, at_a_time=2, seed=1), exit_status=0)
    outcome.tally.turns.update({"answered": 98, "reported": 1, "hung up": 1})
    outcome.received, outcome.kills = 100, 1
    outcome.memory = [2**26] * 8
    return outcome


def test_an_outcome_that_breaks_no_promise_passes() -> None:
    assert whole().failures() == []


@pytest.mark.parametrize(
    ("broken", "failure"),
    [
        (lambda it: it.tally.turns.update({"answered": -1, "lost": 1}), "got no answer"),
        (lambda it: it.tally.turns.update({"answered": -1, "crosstalk": 1}), "to another"),
        (lambda it: it.tally.turns.update({"answered": -1}), "not played"),
        (lambda it: it.tally.wrong.append("s-1"), "transcripts"),
        (lambda it: it.wrong_keys.append("s-1"), "keys"),
        (lambda it: it.complaints.append("Traceback"), "complained"),
        (lambda it: setattr(it, "exit_status", -9), "status -9"),
        (lambda it: it.tally.turns.update({"answered": -9, "reported": 9}), "10 turns failed"),
        (lambda it: setattr(it, "received", 97), "received 97 turns"),
        (lambda it: setattr(it, "kills", 0), "no worker was killed"),
        (lambda it: it.memory.extend([2**26 + 2 * MEMORY_SLACK] * 4), "memory grew"),
    ],
)
def test_a_broken_promise_is_a_failure(broken: Callable[[Outcome], Any], failure: str) -> None:
    outcome = whole()
    broken(outcome)
    [told] = outcome.failures()
    assert failure in told


@pytest.mark.parametrize("keys", [[], ["s-2"], ["s-1", "s-1"]])
async def test_a_wrong_key_is_found_in_what_a_worker_received(
    tmp_path: Path, client: aiohttp.ClientSession, keys: list[str]
) -> None:
    file = tmp_path / "received"
    lines = [["s-1", ["s-1"], None], ["s-1", keys, "503"]]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    outcome = Outcome(Load(1, 1, 1, 1))
    compare_keys(outcome, [Worker(1, file, client)])
    assert outcome.wrong_keys == [f"s-1 came with {keys}"]
    assert (outcome.received, outcome.faults["503"]) == (2, 1)


def test_a_complaint_is_found_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("INFO fine\nTask was destroyed but it is pending!\n")
    assert complaints(log) == ["Task was destroyed but it is pending!"]


@asynccontextmanager
async def server_that_keeps(times: int, status: int, reply: str) -> AsyncIterator[URL]:
    """Run a session server that keeps each turn so many times, whatever it tells its agent."""
    turns, messages = [0], [[]]  # type: ignore[var-annotated]

    async def make(request: web.Request) -> web.Response:
        return web.Response(status=201)

    async def play(request: web.Request) -> web.Response:
        body = await request.json()
        said = f"{reply or body['user']} heard {body['messages'][-1]['content']}"
        message = {"role": "assistant", "content": said}
        turns[0] += times
        if times:
            messages[0] = [*body["messages"], message]
        return web.json_response({"choices": [{"message": message}]}, status=status)

    async def read(request: web.Request) -> web.Response:
        return web.json_response({"turns": turns[0], "messages": messages[0]})

    app = web.Application()
    app.router.add_post("/sessions", make)
    app.router.add_post("/sessions/{id}/v1/chat/completions", play)
    app.router.add_get("/sessions/{id}", read)
    app.router.add_delete("/sessions/{id}", make)
    async with TestServer(app) as server:
        yield server.make_url("/")


@pytest.mark.parametrize(
    ("times", "status", "reply", "outcome", "is_wrong"),
    [
        (1, 200, "", "answered", False),
        (2, 200, "", "answered", True),  # kept twice
        (0, 200, "", "answered", True),  # not kept
        (1, 503, "", "reported", True),  # kept, and reported as an error
        (0, 503, "", "reported", False),
        (0, 200, "s-2", "crosstalk", False),
    ],
)
async def test_an_agent_sees_what_a_session_server_does_wrong(
    monkeypatch: pytest.MonkeyPatch,
    client: aiohttp.ClientSession,
    times: int,
    status: int,
    reply: str,
    outcome: str,
    is_wrong: bool,
) -> None:
    monkeypatch.setattr(agents, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(agents, "HANG_UPS", 0)
    monkeypatch.setattr(agents, "STREAMED", 0)
    tally = Tally()
    async with server_that_keeps(times, status, reply) as url:
        await Agent(client, url, "s-1", Random(1), tally).play(1)
    assert tally.turns == {outcome: 1}
    assert bool(tally.wrong) == is_wrong
