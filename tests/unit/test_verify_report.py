"""The report, as printed on a terminal and into a file."""

import io
import os
import re
import subprocess

import pytest
from yarl import URL

from aiohttp_smg_routing.verify.cause import Cause
from aiohttp_smg_routing.verify.judge import Verdict, judge
from aiohttp_smg_routing.verify.report import Bars, show_plan, show_seen, show_verdict
from aiohttp_smg_routing.verify.seen import Counters, Failure, Outcome, Plan, Seen, Turn
from aiohttp_smg_routing.verify.streams import lasting, terminal
from harness.processes import CLI
from harness.servers import serve

from ..verify_servers import engine, in_background

PLAN = Plan(URL("http://10.0.0.1:30000"), URL("http://10.0.0.1:29000/metrics"), model="m")


class Terminal(io.StringIO):
    """A stream that rich takes for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("wide")
def test_bars_count_live_on_a_terminal() -> None:
    stream = Terminal()
    bars = Bars(Plan(PLAN.gateway, PLAN.metrics, sessions=2, turns=2), terminal(stream))
    bars.start()
    outcomes: tuple[Outcome, ...] = ("first", "kept", "failed", "unknown")
    for outcome in outcomes:
        bars.played(Turn("keyed", 1, 1, outcome))
    bars.played(Turn("control", 1, 1, "moved"))
    bars.stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "4/4 1 kept, 0 moved, 1 unknown, 1 failed" in shown
    assert "1/4 0 kept, 1 moved" in shown
    assert max(map(len, re.split(r"[\r\n]", shown))) <= 80


def test_narrow_terminal_keeps_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    show_verdict(Verdict("pinned", "Pinned: " + 20 * "word ", ()), terminal(stream))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert max(map(len, shown.splitlines())) <= 60


@pytest.mark.parametrize(("columns", "most"), [("0", 80), ("1", 1), ("7", 7)])
def test_terminal_of_any_width_is_written_to(
    columns: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    console = terminal(Terminal())
    assert console.width == most
    seen = Seen(PLAN, (Turn("keyed", 1, 1, "unknown"),))
    bars = Bars(PLAN, console)
    show_plan(seen, console)
    bars.start()
    bars.stop()
    show_seen(seen, console)
    show_verdict(judge(seen, 1), console)


@pytest.mark.usefixtures("wide")
def test_file_gets_neither_bars_nor_colours_nor_long_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    console = terminal(stream)
    bars = Bars(PLAN, console)
    bars.start()
    bars.played(Turn("keyed", 1, 1, "kept"))
    bars.stop()
    assert stream.getvalue() == ""
    long = "http://" + 90 * "x" + "/[bold]red[/bold] " + 20 * "word "
    show_plan(Seen(Plan(URL("http://h"), PLAN.metrics, through=long, model=90 * "m")), console)
    verdict = Verdict("pinned", f"Pinned: {long}.", (Cause("c", long, long),))
    show_verdict(verdict, console)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "[bold]red[/bold]" in "".join(lines)
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        (None, "workers not listed"),
        ({}, "0 workers listed"),
        ({"regular": 1}, "1 worker listed"),
        ({"regular": 3}, "3 workers listed"),
        ({"prefill": 2, "decode": 3}, "2 prefill and 3 decode workers listed"),
    ],
)
def test_plan_says_how_many_workers_there_are(workers: dict[str, int] | None, words: str) -> None:
    stream = io.StringIO()
    show_plan(Seen(PLAN, workers=workers), terminal(stream))
    assert words in " ".join(stream.getvalue().split())


def test_table_says_what_is_not_known() -> None:
    turns = (Turn("keyed", 1, 1, "unknown"), Turn("control", 1, 1, "first", worker="http://w"))
    stream = io.StringIO()
    show_seen(Seen(PLAN, turns, counters=Counters({}, {})), terminal(stream))
    out = stream.getvalue()
    assert re.search(r"workers +\S +unknown \S +1 ", out)
    assert re.search(r"kept on their worker +\S +0 \S +0 ", out)
    assert re.search(r"moved to another +\S +unknown \S +0 ", out)
    assert re.search(r"from the KV cache \S +not reported", out)
    assert "counters grew by: nothing." in out


def test_counters_are_named_by_the_kind_of_worker_where_there_are_two() -> None:
    stream = io.StringIO()
    counters = Counters(
        {"prefill": {"random": 2}, "decode": {"manual": 2}}, {"manual": {"vacant": 1}}
    )
    turns = (Turn("keyed", 1, 1, "unknown"),)
    show_seen(Seen(PLAN, turns, counters=counters), terminal(stream))
    said = " ".join(stream.getvalue().split())
    assert "grew by: policy random prefill 2, policy manual decode 2, vacant 1." in said


def test_no_table_where_nothing_was_answered() -> None:
    turn = Turn("keyed", 1, 1, "failed", failure=Failure("timeout", PLAN.gateway))
    stream = io.StringIO()
    show_seen(Seen(PLAN, (turn,)), terminal(stream))
    assert stream.getvalue() == ""


def test_text_that_the_terminal_can_not_show_is_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    seen = Seen(PLAN, (Turn("keyed", 1, 1, "unknown"),))
    console = terminal(lasting(stream))
    show_seen(seen, console)
    show_verdict(Verdict("pinned", "Pinned: caf\u00e9.", judge(seen, 1).causes), console)
    stream.flush()
    assert b"caf\\xe9" in raw.getvalue()


@pytest.mark.thorough
def test_real_terminal_shows_bars_and_stays_within_80_columns() -> None:
    pty = pytest.importorskip("pty")
    with in_background(serve(engine())) as url:
        leader, follower = pty.openpty()
        argv = [*CLI, "verify", str(url)]
        with subprocess.Popen(  # noqa: S603
            argv,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        ) as process:
            os.close(follower)
            shown = b""
            while chunk := _read(leader):
                shown += chunk
        os.close(leader)
    assert process.returncode == 2
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "144/144" in text
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux: the other end is closed
        return b""
