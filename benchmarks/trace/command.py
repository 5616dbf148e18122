"""The command line: ``python -m benchmarks trace FILE ...``."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from benchmarks import MISSING
from benchmarks.options import FILE, Range, output_file, picture_file
from benchmarks.running import LoadPart, Measure, Run
from benchmarks.running import measure as run_measure

from .arms import FURTHER, FURTHER_GROUPED, GROUPED, MAIN, arms
from .engine import Speed
from .grow import grow, sample
from .measure import Plan, measure
from .picture import draw
from .play import Settings
from .read import Session, TraceError, read

FOLDER = "TRACE_FOLDER"
"""The environment variable with a second folder to look for files in."""

WIDTH = 132  # characters of a table's line in a file
SPEED = Speed()
SESSIONS, WORKERS = 256, 16
SCALE = 10  # SMG polls every 10 s, and can poll at most every second
MAIN_ROOMS, ALL_ROOMS = (1.0, 0.5), (1.0, 0.5, 0.125)
QUICK_SESSIONS, QUICK_WORKERS, QUICK_SCALE = 12, 3, 40
ARM_NAMES = [arm.name for arm in (*MAIN, GROUPED, *FURTHER, *FURTHER_GROUPED)]

OLDEST = (1, 12)
"""The first version of SMG with worker overload protection, which some arms turn on."""

Trace = tuple[Path, list[Session]]


def _traces(ctx: click.Context, param: click.Parameter, values: Sequence[Path]) -> list[Trace]:
    traces: list[Trace] = []
    for value in values:
        file = value
        if not file.exists() and FOLDER in os.environ:
            file = Path(os.environ[FOLDER], file)
        try:
            traces.append((file, read(file)))
        except TraceError as error:
            raise click.BadParameter(str(error)) from None
        except OSError as error:
            raise click.BadParameter(
                f"{str(file)!r} can't be read: {error.strerror}. Name a file that is there, or set"
                f" {FOLDER} to the folder that has it."
            ) from None
    names = [_name(file) for file, _ in traces]
    if len(set(names)) < len(names):
        raise click.BadParameter("two files have one name: rename one of them.")
    return traces


def _name(file: Path) -> str:
    return file.name.partition(".")[0]


@click.command(context_settings={"show_default": True})
@click.argument("traces", nargs=-1, metavar="[FILE]...", type=FILE, callback=_traces)
@click.option("--sessions", type=click.IntRange(1), default=SESSIONS, help="Sessions to play.")
@click.option(
    "--samples",
    type=click.IntRange(2),
    help="Samples of each recorded session: a group with the same first prompt. [default: as"
    " recorded]",
)
@click.option(
    "--workers", type=click.IntRange(1, 512), default=WORKERS, help="Workers behind the gateway."
)
@click.option("--at-once", type=click.IntRange(1), help="Sessions at a time. [default: all]")
@click.option(
    "--room",
    "rooms",
    type=Range(0, 1000, min_open=True),
    multiple=True,
    help="Size of all caches together, as a multiple of the sessions that run at a time."
    " [default: 1 and 0.5; with --all 0.125 too]",
)
@click.option("--all", "every", is_flag=True, help="Play all arms, not only the main ones.")
@click.option(
    "--arm",
    "only",
    metavar="NAME",
    type=click.Choice(ARM_NAMES),
    multiple=True,
    help="Play this arm, named as in the tables. Several times: these arms.",
)
@click.option("--rounds", type=click.IntRange(1), default=1, help="How often each arm is played.")
@click.option(
    "--pause",
    type=Range(0, 86_400),
    help="Seconds before each later turn. [default: as recorded, or 1 where nothing is]",
)
@click.option(
    "--scale",
    type=Range(0, 1000, min_open=True),
    default=SCALE,
    help="Seconds of the model in a second.",
)
@click.option(
    "--prefill",
    type=Range(1, 1e9),
    default=SPEED.prefill,
    help="Tokens a second of a worker.",
)
@click.option(
    "--running",
    type=click.IntRange(1),
    default=SPEED.running,
    help="Calls that a worker runs at once; more have to wait.",
)
@click.option(
    "--prefill-stalls",
    is_flag=True,
    help="Decoding stands still during a prefill. By default neither slows the other down.",
)
@click.option("--json", "json_file", metavar="FILE", type=FILE, callback=output_file,
    help="Write all that was measured, every run of it.")  # fmt: skip
@click.option("--picture", metavar="FILE", type=FILE, callback=picture_file,
    default="trace-results.svg", help="The picture: FILE.svg or FILE.png.")  # fmt: skip
@click.option("--markdown", "markdown_file", metavar="FILE", type=FILE, callback=output_file,
    help="Write the tables as Markdown too.")  # fmt: skip
@click.option("--check", is_flag=True, help="Compare the model with real engines, first.")
@click.option("--quick", is_flag=True, help="Only show that it works: its figures mean nothing.")
def main(
    traces: Sequence[Trace],
    sessions: int,
    samples: int | None,
    workers: int,
    at_once: int | None,
    rooms: Sequence[float],
    every: bool,
    only: Sequence[str],
    rounds: int,
    pause: float | None,
    scale: float,
    prefill: float,
    running: int,
    prefill_stalls: bool,
    json_file: Path | None,
    picture: Path,
    markdown_file: Path | None,
    quick: bool,
    check: bool,
) -> None:
    """Play recorded agent sessions through the real gateway, on workers that are a model.

    Without a FILE, --check alone compares the model with real engines.

    FILE is JSONL, or .jsonl.xz: a line is a call with session_id, timestamp, input and output, or a
    session with session_id, messages and perhaps group. A file that is not in this folder is looked
    for in the folder that the environment variable TRACE_FOLDER names.

    Exit status: 0 it measured, whatever came out, 1 it failed, 2 it was called wrongly; 129, 130
    and 143 where a signal ended it.
    """
    if not (traces or check):
        raise click.UsageError("name the files of a trace, or --check")
    _require_gateway()
    if quick:
        sessions, workers, scale = QUICK_SESSIONS, QUICK_WORKERS, QUICK_SCALE
    speed = replace(SPEED, prefill=prefill, running=running, stalls=prefill_stalls)
    settings = Settings(workers, speed, scale, at_once or 0, pause)
    loads: dict[str, LoadPart] = {"check": partial(_check, quick)} if check else {}
    for file, recorded in traces:
        grown = grow(sample(recorded, samples) if samples else recorded, sessions)
        known = list(arms(grown, every=every or bool(only)))
        chosen = [arm for arm in known if not only or arm.name in only]
        if not chosen:
            raise click.UsageError(f"{file} has no groups, which the chosen arms need")
        sizes = tuple(dict.fromkeys(rooms)) or (ALL_ROOMS if every else MAIN_ROOMS)
        plan = Plan(_name(file), grown, chosen, sizes, settings, rounds)
        loads[plan.name] = partial(_load, plan)
    run = Run(loads, quick)
    run_measure(
        run,
        json_file=json_file,
        picture=picture if traces else None,
        markdown_file=markdown_file,
        draw=draw,
        width=WIDTH,
    )


def _require_gateway() -> None:
    try:
        installed = version("smg")
    except PackageNotFoundError as error:
        raise click.UsageError(MISSING.format(error)) from None
    if tuple(map(int, installed.split(".")[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise click.UsageError(f"the arms need smg {needed} or newer, and this is {installed}.")


def _check(quick: bool) -> tuple[str, Measure]:
    from . import check  # needs the engines' packages

    return check.TITLE, partial(check.measure, quick=quick)


def _load(plan: Plan) -> tuple[str, Measure]:
    return f"Agent trace {plan.name}", partial(measure, plan=plan)
