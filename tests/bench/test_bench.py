"""The benchmark: its figures, its command line, and a whole run.

No test checks a time, because the machine may be busy.
"""

import gc
import json
import os
import signal
import sys
from asyncio.subprocess import Process
from collections import Counter
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner
from rich.console import Console

from aiohttp_smg_routing import routing_key
from aiohttp_smg_routing.testing import free_port
from benchmarks.__main__ import PARTS, main
from benchmarks.counting import calls_into_plugin
from benchmarks.figures import Figure, Part, Progress, Table, Verdict, ratios
from benchmarks.picture import draw, panels
from benchmarks.report import Results, markdown, show, write_json
from benchmarks.rounds import added_up, interleave, on_one_cpu
from benchmarks.server_under_test import KEY, ArmName, Kind, Loop, server_under_test
from benchmarks.servers import Counted, stub_workers, upstream
from benchmarks.sessions import TURNS, Play, pins
from benchmarks.stream import PIECE, Chat, calls_of_a_stream, with_their_share
from benchmarks.turn import ARMS, Caller, connected, conversation, long_turn
from harness.proc import HAS_PROC, processes_in
from harness.processes import running

from ..stopping import assert_stopped, until_it_says

REACHED = Figure((1.0, 1.01, 1.02), "ratio", at_most=1.05)
MISSED = Figure((1.1, 1.2, 1.3), "ratio", at_most=1.05)
NOISY = Figure((0.9, 1.04, 1.2), "ratio", at_most=1.05)


# Figures


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(1, 1, 1), (3, 1, 3), (6, 1, 6), (20, 6, 15), (100, 40, 61), (5000, 2431, 2570)],
)
def test_the_spread_is_the_interval_that_a_table_of_order_statistics_has(
    count: int, low: int, high: int
) -> None:
    runs = tuple(float(number) for number in range(count, 0, -1))
    assert Figure(runs, "s").spread == (low, high)


@pytest.mark.parametrize(
    ("runs", "at_most", "at_least", "verdict"),
    [
        ((1.0, 1.01, 1.05), 1.05, None, "reached"),
        ((1.06, 1.07, 1.08), 1.05, None, "missed"),
        ((1.05, 1.06, 1.07), 1.05, None, "too noisy to tell"),
        ((1.0, 1.01, 1.06), 1.05, None, "too noisy to tell"),
        ((0.97, 0.98, 0.99), None, 0.97, "reached"),
        ((0.9, 0.95, 0.96), None, 0.97, "missed"),
        ((0.9, 0.95, 0.97), None, 0.97, "too noisy to tell"),
        ((10_000.0,), None, 10_000, "reached"),
        ((9_999.0,), None, 10_000, "missed"),
        ((1.0, 5.0), None, None, ""),
    ],
)
def test_a_verdict_needs_the_whole_spread_on_one_side_of_the_limit(
    runs: tuple[float, ...], at_most: float | None, at_least: float | None, verdict: Verdict
) -> None:
    assert Figure(runs, "ratio", at_most=at_most, at_least=at_least).verdict == verdict


def test_a_figure_without_a_limit_is_clear_within_its_precision() -> None:
    assert Figure((99, 100, 101), "s", precision=0.02).is_clear
    assert str(Figure((98, 100, 102), "s", precision=0.02)) == "too noisy to tell"


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure((0.5, 0.512, 0.6), "share"), "51.2 (50.0 to 60.0) %"),
        (Figure((1.0, 1.2, 1.3), "ratio"), "1.200 (1.000 to 1.300)"),
        (Figure((1234.5,), "µs"), "1,234 µs"),
        (Figure((0.25, 0.5, 0.75), "s"), "0.50 (0.25 to 0.75) s"),
        (Figure((19.0,), "calls"), "19 calls"),
        (Figure((10_000,), "sessions"), "10,000 sessions"),
        (NOISY, "too noisy to tell"),
    ],
)
def test_a_figure_is_printed_as_its_median_and_spread(figure: Figure, text: str) -> None:
    assert str(figure) == text


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([{"a": 2.0, "b": 1.0}, {"a": 3.0, "b": 6.0}], "a", "b") == (2.0, 0.5)


# Rounds


async def test_every_arm_works_once_in_a_round_and_once_before() -> None:
    worked: list[str] = []

    async def cost(arm: str) -> float:
        worked.append(arm)
        return float(len(worked))

    steps: list[float] = []
    names = ("a", "b", "c")
    gc.unfreeze()
    arms = {name: partial(cost, name) for name in names}
    rounds = await interleave(arms, 4, steps.append)
    assert [set(worked[place : place + 3]) for place in range(0, 15, 3)] == [set(names)] * 5
    assert len(worked) == 15
    assert sorted(cost for costs in rounds for cost in costs.values()) == list(range(4, 16))
    assert steps == [0.25, 0.5, 0.75, 1]
    assert gc.get_freeze_count() == 0


def test_pieces_are_added_up_to_wholes() -> None:
    pieces = [{"nothing": 1.0, "plugin": 2.0}] * 6
    assert added_up(pieces, 3) == [{"nothing": 3.0, "plugin": 6.0}] * 2


def test_the_cpu_is_shared_until_the_block_ends() -> None:
    before = cpus()
    with on_one_cpu():
        assert len(cpus()) == 1 or sys.platform != "linux"
    assert cpus() == before


def cpus() -> set[int]:
    return os.sched_getaffinity(0) if sys.platform == "linux" else set()


# Parts


async def test_a_stream_makes_no_call_into_the_plugin_per_chunk() -> None:
    few = await calls_of_a_stream(20)
    assert few > 0
    assert await calls_of_a_stream(200) == few


async def test_the_calls_that_are_counted_are_those_of_the_core() -> None:
    async def core() -> None:
        routing_key("s-1")

    async def beside_it() -> None:
        free_port()

    assert await calls_into_plugin(core) > 0
    assert await calls_into_plugin(beside_it) == 0


def test_a_piece_of_a_stream_has_its_share_of_the_beginning() -> None:
    midst, begins = {"nothing": 1.0, "plugin": 2.0}, {"nothing": 4.0, "plugin": 8.0}
    pieces = [midst, midst, begins] * 2
    # Together they cost as much as the two streams.
    assert with_their_share(pieces, 3) == [{"nothing": 2.0, "plugin": 4.0}] * 4


async def test_the_arms_send_the_key_that_they_say() -> None:
    arms: tuple[ArmName, ...] = get_args(ArmName)
    async with stub_workers(1) as workers, server_under_test(workers.urls[0], arms) as server:
        for arm, url in server.urls.items():
            agent = Caller()
            async with connected([agent], url):
                await agent.turn(f"s-{arms.index(arm)}", long_turn(arm, 10))
        received = await workers.received()
        assert await server.cpu_seconds() > 0
        assert await workers.received() == []
    keys = {line.user: line.key for line in received}
    keyed = {arm: f"s-{arms.index(arm)}" for arm in arms}
    assert keys == {**keyed, "nothing": None}
    assert {(line.worker, line.turns) for line in received} == {(workers.urls[0].port, 1)}


async def test_the_arms_of_the_whole_server_send_the_key_that_they_say() -> None:
    async with (
        stub_workers(1) as workers,
        server_under_test(workers.urls[0], ("nothing", *ARMS["whole"]), kind="whole") as server,
    ):
        for arm, url in server.urls.items():
            agent, headers = Caller(), f"{KEY}: s\r\n" if arm in ("by hand", "floor") else ""
            async with connected([agent], url):
                await agent.begin("s")
                await agent.turn("s", long_turn(arm, 10), headers)
                await agent.end("s")
                with pytest.raises(RuntimeError, match="404"):
                    await agent.turn("s", long_turn(arm, 10), headers)
        received = await workers.received()
    keys = {line.user: line.key for line in received}
    assert keys == {**dict.fromkeys(ARMS["whole"], "s"), "nothing": None}


def test_a_conversation_repeats_what_was_said() -> None:
    turns = [json.loads(body)["messages"] for body in conversation(10)]
    assert [len(messages) for messages in turns] == list(range(2, 21, 2))
    assert turns[-1][: len(turns[0])] == turns[0]
    assert 10_000 < len(conversation(10)[-1]) < 16_500


@pytest.mark.parametrize("kind", ["whole", "barest"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_both_event_loops_serve(loop: Loop, kind: Kind) -> None:
    agent = Caller()
    async with (
        upstream() as gateway,
        server_under_test(gateway, ["plugin"], kind=kind, loop=loop) as server,
        connected([agent], server.urls["plugin"]),
    ):
        if kind == "whole":
            await agent.begin("s-1")
        await agent.turn("s-1", long_turn("s-1", 10))


async def test_a_turn_that_fails_stops_the_measurement() -> None:
    async def fail(request: web.Request) -> web.Response:
        raise web.HTTPBadGateway

    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    app = web.Application()
    app.router.add_post("/sessions/fails/{path:.*}", fail)
    app.router.add_post("/sessions/ends/{path:.*}", hang_up)
    async with TestServer(app) as server:
        for session_id, error in (("fails", RuntimeError), ("ends", ConnectionError)):
            agent, stream = Caller(), Chat("s", session_id)
            async with connected([agent, stream], server.make_url("/")):
                with pytest.raises(error):
                    await agent.turn(session_id, b"{}")
                with pytest.raises(error):
                    await stream.begin(1)


def test_a_session_counts_as_pinned_when_one_worker_had_all_its_turns() -> None:
    play = Play("plugin", [], sessions=4, branches=Counter({"vacant": 4, "cap_respill": 1}))
    received = [
        Counted(1, "plugin-0", "plugin-0", TURNS),  # the only one that is pinned
        Counted(1, "plugin-1", "plugin-1", TURNS - 1),
        Counted(2, "plugin-1", "plugin-1", 1),
        Counted(1, "plugin-2", "plugin-2", TURNS - 1),  # a turn is missing
        Counted(2, "plugin-3", "plugin-0", TURNS),  # another session's key
    ]
    rows = {row[0]: row[1] for row in pins({"plugin": play}, received).rows}
    pinned, keyed = (
        rows["on one worker, first turn to last"],
        rows["turns with their session's key"],
    )
    assert isinstance(pinned, Figure)
    assert isinstance(keyed, Figure)
    assert (pinned.runs, pinned.verdict) == ((2,), "missed")
    assert (keyed.runs, keyed.verdict) == ((3 * TURNS - 1,), "missed")
    assert rows["gateway: vacant"] == "4"
    assert rows["gateway: cap_respill"] == "1"


# The report


def results(*figures: Figure, quick: bool = False) -> Results:
    rows = tuple((f"row {place}", figure) for place, figure in enumerate(figures))
    part = Part("call", "A call", (Table("Costs", ("", "plugin"), rows),), ("A | note.",))
    return Results((part,), {"call": 2.5}, {"CPU": "some"}, quick)


def test_the_report_says_what_was_reached_missed_and_is_too_noisy() -> None:
    file = StringIO()
    show(results(REACHED, MISSED, NOISY, Figure((7.0,), "µs")), Console(file=file, width=80))
    said = file.getvalue()
    assert "1.010 (1.000 to 1.020)" in said
    assert "≤ 1.05: reached" in said
    assert "≤ 1.05: missed" in said
    assert "≤ 1.05: too noisy to tell" in said
    assert "1.040" not in said  # no median when the figure is too noisy
    assert "7.00 µs" in said
    assert "1 of 3 limits reached." in said
    assert "Missed: call: row 1, plugin." in said
    assert "Too noisy to tell: call: row 2, plugin." in said
    assert "It took 2 s (call 2 s)." in said
    assert not any(line.endswith(" ") for line in said.splitlines())


def test_the_markdown_has_the_same_cells() -> None:
    lines = markdown(results(REACHED, NOISY)).splitlines()
    assert "## A call" in lines
    assert "|  | plugin |" in lines
    assert "| row 0 | 1.010 (1.000 to 1.020); ≤ 1.05: reached |" in lines
    assert "| row 1 | ≤ 1.05: too noisy to tell |" in lines
    assert "A | note." in lines
    assert "| CPU | some |" in lines


def test_the_json_has_every_run(tmp_path: Path) -> None:
    write_json(results(MISSED), tmp_path / "b.json")
    document = json.loads((tmp_path / "b.json").read_text("utf-8"))
    name, cell = document["parts"][0]["tables"][0]["rows"][0]
    assert name == "row 0"
    assert cell["runs"] == [1.1, 1.2, 1.3]
    assert (cell["median"], cell["low"], cell["high"]) == (1.2, 1.1, 1.3)
    assert (cell["verdict"], cell["at_most"], cell["unit"]) == ("missed", 1.05, "ratio")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_draws_what_there_is(suffix: str, tmp_path: Path) -> None:
    seconds = Figure((2.0, 4.0), "s")
    shares = Table(
        "Cached",
        ("policy", "enough", "too little", "p50", "wall time"),
        (
            ("manual", Figure((0.9,), "share"), Figure((0.5,), "share"), seconds, seconds),
            ("random", Figure((0.2,), "share"), "not run", Figure((9.0,), "s"), "-"),
            ("none", "-", "-", "-", "-"),
        ),
    )
    parts = [*results(REACHED, NOISY).parts, Part("cache", "Cache", (shares,))]
    file = tmp_path / f"b{suffix}"
    draw(parts, file)
    assert file.stat().st_size > 1000
    drawn = [(panel.unit, panel.series, len(panel.rows)) for panel in panels(parts)]
    assert drawn == [
        ("ratio", ("plugin",), 2),
        ("share", ("enough", "too little"), 2),
        ("s", ("p50",), 2),
    ]


def test_a_picture_of_nothing_is_a_picture(tmp_path: Path) -> None:
    draw([], tmp_path / "b.svg")
    assert (tmp_path / "b.svg").exists()


# The command line


def part_module(name: str, figure: Figure | Exception) -> ModuleType:
    async def run(progress: Progress, *, quick: bool = False) -> Part:
        progress(0.5, "half of it")
        if isinstance(figure, Exception):
            raise figure
        return Part(name, name, (Table("Costs", ("", "plugin"), (("a", figure),)),))

    module = ModuleType(f"benchmarks.{name}")
    module.__dict__.update(NAME=name, TITLE=name, run=run)
    return module


@pytest.mark.parametrize(
    ("figure", "status"),
    [
        (REACHED, 0),
        (NOISY, 0),
        (MISSED, 0),
        (RuntimeError("no gateway"), 1),
        (KeyError("a mistake"), 1),
    ],
)
def test_the_exit_status_says_whether_it_measured(
    figure: Figure | Exception,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "benchmarks.call", part_module("call", REACHED))
    monkeypatch.setitem(sys.modules, "benchmarks.cache", part_module("cache", figure))
    run = CliRunner().invoke(main, ["call", "cache"])
    assert run.exit_code == status, run.output
    assert "cache: half of it\n" in run.stdout
    document = json.loads(Path("bench-results.json").read_text("utf-8"))
    # The results from before a failure are kept.
    measured = ["call"] if isinstance(figure, Exception) else ["call", "cache"]
    assert [part["name"] for part in document["parts"]] == measured
    assert Path("bench-results.svg").exists()
    if isinstance(figure, Exception):
        assert run.stderr.endswith(f"The benchmark failed: {figure}\n")
    assert ("Traceback" in run.stderr) == isinstance(figure, KeyError)


def test_a_missing_package_names_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = ModuleNotFoundError("No module named 'uvloop'")
    monkeypatch.setitem(sys.modules, "benchmarks.call", part_module("call", error))
    run = CliRunner().invoke(main, ["call"])
    assert run.exit_code == 1
    assert run.stderr == (
        "The benchmark failed: No module named 'uvloop': pip install -e . --group bench\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["frobnicate"], "'frobnicate' is not one of"),
        (["--json", "nowhere/b.json"], "'nowhere/b.json' can't be written"),
        (["--json", ""], "'.' can't be written"),
        (["--markdown", "nowhere/b.md"], "'nowhere/b.md' can't be written"),
        (["--picture", "nowhere/b.svg"], "'nowhere/b.svg' can't be written"),
        (["--picture", "b.gif"], "ends neither in .svg nor in .png"),
    ],
)
def test_a_wrong_option_is_said_before_anything_is_measured(
    options: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(main, options)
    assert run.exit_code == 2
    assert complaint in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_part_is_told_the_known_ones() -> None:
    run = CliRunner().invoke(main, ["frobnicate"])
    assert all(part in run.stderr for part in PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_there(part: str) -> None:
    assert find_spec(f"benchmarks.{part}") is not None


# A whole run


def benchmark(folder: Path, *argv: str) -> AbstractAsyncContextManager[Process]:
    return running(folder, "-m", "benchmarks", *argv)


async def test_a_quick_run_shows_and_writes_the_same(folder: Path) -> None:
    names = ["call", "turn", "stream", "growth", "sessions"]
    files = ("--json", "b.json", "--picture", "b.svg", "--markdown", "b.md")
    async with benchmark(folder, *names, "--quick", *files) as process:
        out, err = (text.decode() for text in await process.communicate())
    assert (process.returncode, err) == (0, "")
    for line in out.splitlines():  # in a file: no control codes, no bars
        assert len(line) <= 100
        assert line.isprintable()
    assert sorted(os.listdir(folder)) == ["b.json", "b.md", "b.svg"]
    document = json.loads((folder / "b.json").read_text("utf-8"))
    assert [part["name"] for part in document["parts"]] == names
    assert set(document["seconds"]) == set(names)
    assert document["quick"] is True
    assert document["machine"]["aiohttp"] in out
    text = (folder / "b.md").read_text("utf-8")
    for part in document["parts"]:
        for table in part["tables"]:
            for name, *cells in table["rows"]:
                assert f"| {name} | " in text
                for cell in cells:
                    said = cell if isinstance(cell, str) else cell["text"]
                    assert said in text
                    assert said.split()[0] in out
    assert (folder / "b.svg").read_text("utf-8").startswith("<?xml")
    # These don't depend on the machine: each session is on one worker, and a chunk costs no call.
    tables = {part["name"]: part["tables"] for part in document["parts"]}
    stream, sessions = tables["stream"][1]["rows"], tables["sessions"][1]["rows"]
    [memory], [calls, _] = tables["growth"][1]["rows"], tables["growth"][2]["rows"]
    assert [cell["verdict"] for cell in (memory[1], *calls[1:])] == ["reached"] * 3
    assert [cell["verdict"] for _, cell in stream] == ["", "reached"]
    assert stream[1][0] == f"an answer of {2 * PIECE} chunks"
    assert [cells[0]["verdict"] for _, *cells in sessions[1:3]] == ["reached", "reached"]


async def test_a_signal_stops_it_and_all_that_it_started(folder: Path) -> None:
    async with benchmark(folder, "sessions") as process:
        await until_it_says(process, b"agents at once")
        if HAS_PROC:  # the benchmark, the workers, the gateway and the session server
            assert len(processes_in(folder)) >= 4
        await assert_stopped(process, signal.SIGINT, 130)  # others: see tests/unit/test_harness.py
    assert os.listdir(folder) == []
