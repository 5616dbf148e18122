"""The command ``verify``, run on a gateway, and what it left."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from yarl import URL

from aiohttp_smg_routing.__main__ import main
from aiohttp_smg_routing.testing import SmgGateway, smg_gateway

from .verify_servers import stub_engines

SCRIPT = Path(sys.executable).with_name("aiohttp-smg-routing")


@dataclass(frozen=True)
class Run:
    """A run of the command: its exit status, its output and its JSON."""

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


def verify(tmp_path: Path, gateway: URL, *options: str | URL, program: bool = False) -> Run:
    """Run the command, in this process to save imports, or as a ``program``."""
    file = tmp_path / "seen.json"
    arguments = ["verify", *map(str, (gateway, *options)), "--json", str(file)]
    if program:
        done = subprocess.run(  # noqa: S603
            [SCRIPT, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
            status = main(arguments)
        out, err = stdout.getvalue(), stderr.getvalue()
    assert file.exists(), err
    run = Run(status, out, err, json.loads(file.read_text("utf-8")))
    assert run.json["exit_status"] == run.status
    return run


@asynccontextmanager
async def gateway(
    policy: str, *args: str, workers: int = 3, report: bool = True
) -> AsyncIterator[SmgGateway]:
    """Run the gateway before workers that stream; ``report``: they tell their cached tokens."""
    async with (
        stub_engines(workers, report=report) as urls,
        smg_gateway(urls, policy=policy, args=args) as smg,
    ):
        yield smg
