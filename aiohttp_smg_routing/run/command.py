"""``aiohttp-smg-routing run``: starts a server, as it is, with the plugin on its apps."""

import argparse
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import ConfigError
from .config import is_name, load

SUMMARY = "Run an aiohttp server as it is, with the plugin on every app that it serves."

_USAGE = 64  # EX_USAGE of sysexits.h
_NO_PROGRAM, _NOT_FOUND = 126, 127  # what a shell returns
_SITE = Path(__file__).parent / "site"
_PYTHON = re.compile(r"python[\d.]*t?(\.exe)?")


def main(argv: Sequence[str]) -> int:
    """Become the server that ``argv`` names; return an exit status if that fails."""
    parser = argparse.ArgumentParser(
        prog="aiohttp-smg-routing run",
        description=SUMMARY,
        usage="%(prog)s [--config FILE.toml|MODULE:NAME] [--children] -- COMMAND ...",
    )
    parser.add_argument(
        "--config",
        default="",
        metavar="FILE.toml|MODULE:NAME",
        help="the file whose table [smg_routing] has the options, or the server's object with them "
        "(default: the environment variables SMG_ROUTING_*)",
    )
    parser.add_argument(
        "--children", action="store_true", help="on the apps of the processes that it starts, too"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    try:
        given = parser.parse_args(argv)
    except SystemExit as end:  # argparse has printed why, or the help
        return _USAGE if end.code else 0
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    config = given.config
    try:
        if not is_name(config):  # an object of the server exists only in the server
            load(config)
            config = config and str(Path(config).absolute())
    except ConfigError as error:
        return _failed(str(error), _USAGE)
    if command[:1] == ["-m"]:
        command = [sys.executable, *command]
    if not command:
        return _failed("there is no command: write it after --, as in: -- python server.py", _USAGE)
    program = shutil.which(command[0])
    if program is None:
        return _failed(f"{command[0]!r} was not found", _NOT_FOUND)
    if option := _without_site(command):
        reason = f"{option} keeps Python from reading PYTHONPATH, which run needs: leave it out"
        return _failed(reason, _USAGE)
    before = os.environ.get("PYTHONPATH")
    run = {
        "config": config,
        "children": given.children,
        "is_child": False,
        "has_pythonpath": before is not None,
    }
    path = os.pathsep.join([str(_SITE), *([before] if before else [])])
    environ = {**os.environ, "AIOHTTP_SMG_ROUTING_RUN": json.dumps(run), "PYTHONPATH": path}
    sys.stdout.flush()
    sys.stderr.flush()
    # This Python ignores these signals, and the server would inherit that.
    for ignored in [it for it in signal.Signals if it.name in ("SIGPIPE", "SIGXFSZ")]:
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execve(program, command, environ)  # noqa: S606 - its streams, signals and exit status
    except OSError as error:
        return _failed(f"{command[0]!r} can't be run: {error.strerror}", _NO_PROGRAM)


def _failed(reason: str, status: int) -> int:
    print(f"aiohttp-smg-routing run: {reason}", file=sys.stderr)
    return status


def _without_site(command: Sequence[str]) -> str:
    """Return the option that keeps a Python from importing ``sitecustomize``, if there is one."""
    if _PYTHON.fullmatch(Path(command[0]).name):
        words = iter(command[1:])
        for word in words:
            if word in ("-X", "-W"):
                next(words, "")
            if not word.startswith("-") or word.startswith(("--", "-c", "-m")):
                break
            if re.search("[EIS]", word.partition("X")[0].partition("W")[0]):
                return word
    return ""
