"""A short soak: the faults that it injects, what it finds, and that it leaves nothing behind."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from harness.agents import Agent
from harness.proc import HAS_PROC, processes_in
from harness.processes import Restartable, restartable, running
from harness.servers import complaints, session_server
from harness.workers import Worker
from soak import agents, run
from soak.agents import ErrorKind, Player, Report, Tally
from soak.causes import causes
from soak.run import Load, Result, alongside, compare_keys, descriptors_left

from ..stopping import assert_stopped
from ..waiting import soon, until


@pytest.fixture
def folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to run the soak in; nothing but its results may be left there afterwards."""
    yield folder
    assert {file.name for file in folder.iterdir()} <= {"soak.json"}


async def test_a_short_soak_loses_nothing(folder: Path) -> None:
    argv = ("-m", "soak", "--sessions=200", "--turns=5", "--at-a-time=32", "--json=soak.json")
    async with running(folder, *argv) as process:
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
    assert len(faults) == 6
    assert all(faults.values())
    assert debug["load"]["debug"]


@pytest.mark.skipif(not HAS_PROC, reason="it is told by /proc that the session server runs")
async def test_a_soak_that_is_stopped_leaves_nothing_behind(folder: Path) -> None:
    async with running(folder, "-m", "soak") as process:
        await until(lambda: "session_server.py" in " ".join(processes_in(folder).values()))
        await assert_stopped(process, signal.SIGTERM, 143)


def nothing_but_outages(result: Result) -> None:
    result.tally.turns.clear()
    result.tally.turns["reported"] = result.causes["gateway"] = result.load.all_turns


def whole() -> Result:
    """Return a result that breaks no promise."""
    result = Result(Load(sessions=50, turns=2, at_a_time=2, seed=1), exit_status=0)
    result.tally.turns.update({"answered": 98, "reported": 1, "hung up": 1})
    result.received = 100
    result.kills.update({"worker": 1, "gateway": 1, "session server": 1})
    result.descriptors = 7, 7
    result.memory = [2**26] * 8
    return result


def test_a_result_that_breaks_no_promise_passes() -> None:
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
        (lambda it: it.causes.update({"workers": 10}), "failed at 10 turns"),
        (lambda it: it.unexplained.append("s-1"), "for no fault: ['s-1']"),
        (lambda it: setattr(it, "descriptors", (7, 8)), "open, at first and at last: (7, 8)"),
        (lambda it: setattr(it, "received", 97), "received 97 turns"),
        (lambda it: it.kills.update({"worker": -1}), "not all were killed"),
        (lambda it: it.memory.extend([2**26 + 2 * it.load.memory_slack] * 4), "memory grew"),
        (lambda it: nothing_but_outages(it), "only 0 turns were answered"),
    ],
)
def test_a_broken_promise_is_a_failure(broken: Callable[[Result], Any], failure: str) -> None:
    result = whole()
    broken(result)
    [told] = result.failures()
    assert failure in told


def test_a_ledger_that_forgets_nothing_is_seen_in_a_full_run() -> None:
    ledger_row = 303  # bytes, by docs/performance.md
    memory = [2**26 + session * ledger_row for session in range(10_000)]
    result = Result(Load(sessions=10_000, turns=10, at_a_time=256, seed=1), memory=memory)
    assert "the memory grew by 0.7 MiB over the second half" in result.failures()


@pytest.mark.parametrize("keys", [[], ["s-2"], ["s-1", "s-1"]])
def test_a_wrong_key_is_found_in_what_a_worker_received(tmp_path: Path, keys: list[str]) -> None:
    file = tmp_path / "received"
    lines = [["s-1", "turn 0", ["s-1"], None, 0], ["s-1", "turn 1", keys, "503", 1]]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = Result(Load(1, 1, 1, 1))
    compare_keys(result, [Worker(1, file)])
    assert result.wrong_keys == [f"s-1 came with {keys}"]
    assert (result.received, result.faults["503"]) == (2, 1)


def test_a_complaint_is_found_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("INFO fine\nTask was destroyed but it is pending!\n")
    assert complaints(log) == ["Task was destroyed but it is pending!"]


@pytest.mark.parametrize("agents", [32, 1])
async def test_an_outage_ends_when_the_agents_that_are_left_have_met_it(agents: int) -> None:
    load = Load(sessions=200, turns=5, at_a_time=32, seed=1)
    result = Result(load)
    result.tally.turns["answered"] = load.all_turns - agents * load.turns

    @asynccontextmanager
    async def dying() -> AsyncIterator[None]:
        yield
        for _ in range(agents):  # each waits for the gateway's return now
            result.tally.end("reported")

    async with restartable(URL(), dying) as gateway:
        await soon(run.kill_gateway(result, gateway, asyncio.Lock()))
        assert gateway.kills == len(run.GATEWAY_KILLS)


async def test_what_fails_beside_the_load_ends_the_soak_at_once() -> None:
    async def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await soon(alongside(forever(), forever(), fail()))


async def test_the_load_that_is_over_ends_what_is_done_beside_it() -> None:
    await soon(alongside(asyncio.sleep(0), forever()))


async def forever() -> None:
    await asyncio.Event().wait()


SINCE, UNTIL = 10, 20  # when the turn was under way


@pytest.mark.parametrize(
    ("down", "tries", "error", "cause"),
    [
        # A fault explains every try.
        ({}, ["503", "503", "503"], "other", "workers"),
        ({}, ["cut off"], "cut off", "workers"),
        ({"worker": [15, 30]}, [None, None, None], "other", "workers"),
        ({"worker": [5, 12]}, [], "gateway's", "workers"),
        ({"worker": [5, 9]}, [], "gateway's", "workers"),  # just back, not asked yet
        ({"worker": [5, 12]}, ["503", "503"], "other", "workers"),
        ({"gateway": [5, 12]}, [None], "other", "gateway"),
        ({"session server": [15, 16]}, [None], "other", "session server"),
        # An error was reported although a worker answered, tries were left, or no fault occurred.
        ({}, ["503", "503", None], "other", None),
        ({"worker": [5, 11]}, [None], "cut off", None),  # killed before it received the turn
        ({"worker": [5, 11]}, ["503", None], "other", None),
        ({}, ["503", "503"], "other", None),
        ({}, [], "cut off", None),
        ({"worker": [5, 12]}, [], "other", None),  # nothing shows that a worker was asked
        ({"worker": [1, 7], "gateway": [21, 22]}, [], "gateway's", None),
        ({"session server": [2, 3]}, [], "other", None),
    ],
)
def test_each_report_must_have_met_a_fault(
    tmp_path: Path,
    down: dict[str, list[float]],
    tries: list[str | None],
    error: ErrorKind,
    cause: str | None,
) -> None:
    worker = Worker(1, tmp_path / "received")
    lines = [["s-1", "turn 0", ["s-1"], fault, 14] for fault in tries]
    others = [["s-1", "turn 1", ["s-1"], "503", 14], ["s-2", "turn 0", ["s-2"], None, 14]]
    worker.file.write_text("".join(f"{json.dumps(line)}\n" for line in lines + others))
    gateway, server = (Restartable(URL(), nullcontext) for _ in range(2))
    for name, it in ("worker", worker.process), ("gateway", gateway), ("session server", server):
        it.down = [down[name]] if name in down else []
    report = Report("s-1", "turn 0", error, SINCE, UNTIL)
    counts, unexplained = causes([report], server, gateway, [worker])
    assert (dict(counts), unexplained) == (({cause: 1}, []) if cause else ({}, [report]))


@pytest.mark.skipif(not HAS_PROC, reason="descriptors are read from /proc")
async def test_a_descriptor_that_stays_open_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session_server(URL("http://127.0.0.1:9"), folder=tmp_path) as server:
        async with aiohttp.ClientSession() as client:
            async with client.get(server.url / "health") as response:
                await response.read()
            connected = server.descriptors()  # not before: it may have had its source open
            assert connected
            with monkeypatch.context() as patch:
                patch.setattr(run, "SETTLE_SECONDS", 0)
                assert await descriptors_left(server, connected - 1) == connected
        assert await descriptors_left(server, connected - 1) == connected - 1


@asynccontextmanager
async def server_that_keeps(
    times: int, status: int | None, reply: str = ""
) -> AsyncIterator[Restartable[None]]:
    """Run a session server that keeps each turn ``times`` times, whatever it tells its agent.

    With status 0 it hangs up, and with None it never answers.
    """
    turns, messages = [0], [[]]  # type: ignore[var-annotated]
    stop = asyncio.Event()

    async def make(request: web.Request) -> web.Response:
        return web.Response(status=201)

    async def play(request: web.Request) -> web.Response:
        body = await request.json()
        said = f"{reply or body['user']} heard {body['messages'][-1]['content']}"
        message = {"role": "assistant", "content": said}
        turns[0] += times
        if times:
            messages[0] = [*body["messages"], message]
        if status is None:
            await stop.wait()
        elif status == 0 and request.transport:
            request.transport.close()
        return web.json_response({"choices": [{"message": message}]}, status=status or 200)

    async def read(request: web.Request) -> web.Response:
        return web.json_response({"turns": turns[0], "messages": messages[0]})

    app = web.Application()
    app.router.add_post("/sessions", make)
    app.router.add_post("/sessions/{id}/v1/chat/completions", play)
    app.router.add_get("/sessions/{id}", read)
    app.router.add_delete("/sessions/{id}", make)
    async with TestServer(app) as server, restartable(server.make_url("/"), nullcontext) as it:
        yield it
        stop.set()


@pytest.mark.parametrize(
    ("times", "status", "reply", "outcome", "is_wrong"),
    [
        (1, 200, "", "answered", False),
        (2, 200, "", "answered", True),  # kept twice
        (0, 200, "", "answered", True),  # not kept
        (1, 503, "", "reported", True),  # kept, and reported as an error
        (0, 503, "", "reported", False),
        (0, 200, "s-2", "crosstalk", False),
        (0, 0, "", "lost", False),  # nobody killed it
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
    monkeypatch.setattr(agents, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(agents, "STREAMED", 0)
    tally = Tally()
    async with server_that_keeps(times, status, reply) as server:
        agent = Agent(client, server.url / "sessions/s-1")
        await Player(agent, server, server, Random(1), tally).play(1)
    assert tally.turns == {outcome: 1}
    assert bool(tally.wrong) == is_wrong


@pytest.mark.parametrize(("times", "is_wrong"), [(0, False), (1, False), (2, True)])
async def test_a_turn_that_an_agent_hung_up_in_may_be_kept_once(
    monkeypatch: pytest.MonkeyPatch, client: aiohttp.ClientSession, times: int, is_wrong: bool
) -> None:
    monkeypatch.setattr(agents, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(agents, "HANG_UPS", 1)
    tally = Tally()
    async with server_that_keeps(times, None) as server:
        agent = Agent(client, server.url / "sessions/s-1")
        await Player(agent, server, server, Random(1), tally).play(20)
    assert tally.turns == {"hung up": 20}
    assert bool(tally.wrong) == is_wrong
