"""The commands ``verify``, ``watch`` and ``run``, and what they left."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import entry_points
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from yarl import URL

from aiohttp_smg_routing.testing import SmgGateway, smg_gateway
from harness.processes import CLI, ROOT, finished

from .verify_servers import caching_workers
from .waiting import PATIENCE_SECONDS

NAME = "aiohttp-smg-routing"
SCRIPT = Path(sys.executable).with_name(NAME)

# Options of ``verify``: 128 calls instead of 288. With three workers, chance puts all 16 sessions
# on one of them in 1 of 10⁷ runs. Chance keeps all 48 later turns in 1 of 10²². A key that works
# goes unseen if 39 of 48 turns in new sessions stay by chance: 1 of 10¹⁰.
LOAD = ("--sessions", "16", "--turns", "4")


@dataclass(frozen=True)
class Run:
    """A run of ``verify``: its exit status, its output and its JSON."""

    status: int
    out: str
    err: str
    json: dict[str, Any]

    @property
    def causes(self) -> list[str]:
        """The causes, without the note that SMG 1.12 and newer always gets."""
        names = [cause["name"] for cause in self.json["causes"]]
        return [name for name in names if name != "overload_protection"]

    @property
    def said(self) -> str:
        """The output as one line."""
        return " ".join(self.out.split())


def verify(folder: Path, gateway: URL, *options: str | URL, program: bool = False) -> Run:
    """Run ``verify``, in this process to save imports, or as a ``program`` in ``folder``.

    Only the main thread can run it in this process.
    """
    file = folder / "seen.json"
    arguments = ["verify", *map(str, (gateway, *options)), "--json", str(file)]
    status, out, err = _ran(folder, arguments, seconds=120, program=program)
    assert file.exists(), err
    run = Run(status, out, err, json.loads(file.read_text("utf-8")))
    assert run.json["exit_status"] == run.status
    return run


def watch_once(*arguments: str | URL, program: bool = False) -> tuple[int, dict[str, Any]]:
    """Run ``watch --once``; return its exit status and its JSON document.

    In this process only the main thread can run it, as ``verify``.
    """
    options = ["watch", *map(str, arguments), "--once", "--json", "--interval", "0.1"]
    status, out, err = _ran(ROOT, options, seconds=PATIENCE_SECONDS, program=program)
    assert err == ""
    return status, json.loads(out)


def _ran(
    folder: Path, arguments: Sequence[str], *, seconds: float, program: bool
) -> tuple[int, str, str]:
    """Run the command line; return its exit status and what it printed."""
    if program:
        argv = (str(SCRIPT), *arguments)
        done = finished(folder, *argv, stdin=subprocess.DEVNULL, timeout=seconds)
        return done.returncode, done.stdout, done.stderr
    with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
        [script] = entry_points(group="console_scripts", name=NAME)
        status = script.load()(arguments)
    return status, stdout.getvalue(), stderr.getvalue()


RUN = (*CLI, "run")


def run_program(
    folder: Path, *argv: str, env: Mapping[str, str] | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a program in ``folder``, where ``RUN`` finds its options."""
    given = {"SMG_ROUTING_GATEWAY": "http://127.0.0.1:1", **(env or {})}
    return finished(folder, *argv, env=given, **options)


def broken_pipe() -> TextIO:
    """Return a stream whose reader has gone away."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


@asynccontextmanager
async def gateway(
    policy: str, *args: str, workers: int = 3, report: bool = True
) -> AsyncIterator[SmgGateway]:
    """Run the gateway before workers that stream; ``report``: they tell their cached tokens."""
    async with (
        caching_workers(workers, report=report) as urls,
        smg_gateway(urls, policy=policy, args=args) as smg,
    ):
        yield smg
