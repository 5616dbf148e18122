"""The demo, run for real: its output, its exit status, and that it leaves nothing behind."""

import os
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from demo import __main__ as demo
from harness.arms import PINNED, Load, moved_sessions, play
from harness.engines import write_model
from harness.proc import HAS_PROC, processes_in
from harness.processes import running

from ..stopping import assert_stopped, until_it_says

SESSIONS, TURNS, WORKERS = 4, 3, 3
OPTIONS = [f"--sessions={SESSIONS}", f"--turns={TURNS}", f"--workers={WORKERS}"]


@pytest.fixture
def folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to run the demo in; afterwards it must hold no file and no process."""
    yield folder
    assert list(folder.iterdir()) == []


@asynccontextmanager
async def halfway(folder: Path) -> AsyncIterator[Process]:
    """Run the demo; enter the block once all servers run and the agents play."""
    async with running(folder, "-m", "demo", *OPTIONS) as process:
        await until_it_says(process, b"agents begin")
        yield process


async def test_the_demo_compares_both_arms(folder: Path) -> None:
    async with running(folder, "-m", "demo", *OPTIONS) as process:
        out, err = (text.decode() for text in await process.communicate())
    assert (process.returncode, err) == (0, ""), out
    rows = {}
    for line in out.splitlines():
        # Output into a file has no control codes, no bars, and no line over 80 characters.
        assert len(line) <= 80
        assert line.isprintable()
        if line.startswith("│"):
            name, on, off = (cell.strip() for cell in line.strip("│").split("│"))
            rows[name] = on, off
    turns, follow_ups = SESSIONS * TURNS, SESSIONS * (TURNS - 1)
    assert rows["sessions"] == (f"{SESSIONS}", f"{SESSIONS}")
    assert rows["turns"] == (f"{turns}", f"{turns}")
    assert rows["sessions that stayed on one worker"][0] == f"{SESSIONS}"
    assert rows["gateway: vacant (a session was pinned)"] == (f"{SESSIONS}", "0")
    assert rows["gateway: occupied_hit (a turn followed)"] == (f"{follow_ups}", "0")
    assert rows["gateway: no_routing_id (no key)"] == ("0", f"{turns}")
    on, off = rows["second turn on: prompt tokens from KV cache"]
    assert float(on.rstrip("%")) > float(off.rstrip("%"))
    assert f"{SESSIONS} of {SESSIONS} sessions stayed on one worker" in " ".join(out.split())


async def test_a_signal_stops_the_demo_and_all_that_it_started(folder: Path) -> None:
    async with halfway(folder) as process:
        if HAS_PROC:
            # The demo, the engines, the gateway and the session server must be running.
            assert len(processes_in(folder)) >= WORKERS + 3
        await assert_stopped(process, signal.SIGTERM, 143)  # others: see tests/unit/test_harness.py


@pytest.mark.skipif(not HAS_PROC, reason="there is no /proc")
async def test_a_server_that_dies_fails_the_demo_and_ends_the_others(folder: Path) -> None:
    async with halfway(folder) as process:
        for pid, command in processes_in(folder).items():
            if "session_server.py" in command:
                os.kill(pid, signal.SIGKILL)
        out, err = await process.communicate()
    assert process.returncode == 1
    assert err.startswith(b"The demo failed: ")
    assert b"Traceback" not in out + err


async def test_a_missing_engine_names_what_to_install(folder: Path) -> None:
    script = (
        "import runpy, sys; sys.modules['xllamacpp'] = None; sys.argv[:] = ['demo'];"
        "runpy.run_module('demo', run_name='__main__')"
    )
    async with running(folder, "-c", script) as process:
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode() == (
        "The demo failed: the engines need xllamacpp: pip install -e . --group engine\n"
    )


async def test_sessions_that_move_fail_the_demo(tmp_path: Path) -> None:
    """The measurements of the arm without the plugin don't pass as those of the arm with it."""
    console = Console(file=StringIO(), width=80)
    model = tmp_path / "model.gguf"
    write_model(model, blocks=1)
    load = Load(SESSIONS, TURNS, WORKERS, system_characters=100)
    arm = await play(load, replace(PINNED, plugin=False), model=model)
    moved = moved_sessions(arm.turns)
    assert moved > 0
    with console.capture() as capture:
        assert demo.report(console, on=arm, off=arm) == 1
    said = " ".join(capture.get().split())
    assert f"{moved} of {SESSIONS} sessions moved to another worker" in said
    assert f"the gateway counted 0 turns that followed a pin and {SESSIONS * TURNS} without" in said
