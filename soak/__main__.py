"""The command line: ``python -m soak``."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.stopping import exit_status

from .run import GATEWAY_KILLS, SERVER_KILLS, WORKER_KILLS, Load, Result, soak

try:
    from rich.box import MARKDOWN
    from rich.console import Console

    from harness import tables
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install -e . --group demo")

DEBUG_SHARE = 10  # PYTHONASYNCIODEBUG=1 makes turns several times slower, so it plays fewer
MIB = 2**20


async def run(loads: list[Load], console: Console) -> list[Result]:
    """Play the loads one after the other. A terminal gets a bar for each."""
    results = []
    with tables.bars(console) as bars:
        for load in loads:
            bar = bars.add_task(name(load), total=load.all_turns)

            def show(result: Result, bar: Any = bar) -> None:
                bars.update(bar, completed=result.tally.played)

            results.append(await soak(load, show))
    return results


def name(load: Load) -> str:
    """Return the name of a load."""
    return "PYTHONASYNCIODEBUG=1" if load.debug else "soak"


def row_values(result: Result) -> dict[str, Any]:
    """Return the values of a load for the table and the file."""
    turns, load = result.tally.turns, result.load
    at_first, at_last = result.descriptors or (None, None)
    half, end = result.memory_of_quarter(3), result.memory_of_quarter(4)
    return {
        "sessions": load.sessions,
        "turns": load.all_turns,
        "turns in flight, at most": result.tally.most_in_flight,
        "turns per second": round(load.all_turns / result.seconds, 1),
        "seconds": round(result.seconds, 1),
        "fault: workers killed and restarted": result.kills["worker"],
        "fault: gateway killed and restarted": result.kills["gateway"],
        "fault: session server killed and restarted": result.kills["session server"],
        "fault: 503 of a worker": result.faults["503"],
        "fault: answers cut off": result.faults["cut off"],
        "fault: agents that hung up": turns["hung up"],
        "turns answered": turns["answered"],
        "turns reported to the agent as an error": turns["reported"],
        "- because the session server was killed": result.causes["session server"],
        "- because the gateway was down": result.causes["gateway"],
        "- because workers failed or were down": result.causes["workers"],
        "- for no fault": len(result.unexplained),
        "lost": turns["lost"],
        "transcripts that are wrong": len(result.tally.wrong),
        "turns that workers received": result.received,
        "crosstalk": len(result.wrong_keys) + turns["crosstalk"],
        "memory after half, MiB": None if half is None else round(half / MIB, 1),
        "memory at the end, MiB": None if end is None else round(end / MIB, 1),
        "descriptors before the first turn": at_first,
        "descriptors after the last turn": at_last,
    }


def report(console: Console, results: list[Result]) -> int:
    """Print the results of the loads; return the exit status."""
    table = tables.table("", *(name(result.load) for result in results), box=MARKDOWN)
    columns = [row_values(result) for result in results]
    for label in columns[0]:
        values = (column[label] for column in columns)
        table.add_row(label, *(f"{value:,}" if value is not None else "-" for value in values))
    console.print(table)
    failed = 0
    for result in results:
        for failure in result.failures():
            console.print(f"{name(result.load)}: {failure}", soft_wrap=True)
            failed = 1
    return failed


def write_json(file: Path, results: list[Result]) -> None:
    """Write the results of the loads to a file."""
    documents = [
        {
            "name": name(result.load),
            "load": asdict(result.load),
            "figures": row_values(result),
            "reported as": result.tally.reported_as,
            "failures": result.failures(),
            "memory in bytes": result.memory,
        }
        for result in results
    ]
    file.write_text(json.dumps(documents, indent=1) + "\n", encoding="utf-8")


async def play(loads: list[Load], console: Console, file: Path | None) -> int:
    """Play the loads and report their results; return the exit status."""
    results = await run(loads, console)
    if file:
        write_json(file, results)
    return report(console, results)


def main() -> int:
    """Run the soak that the command line asks for; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m soak",
        description=f"Play sessions while up to {WORKER_KILLS} times a worker is killed, "
        f"{len(GATEWAY_KILLS)} times the gateway and {len(SERVER_KILLS)} times the session server, "
        "workers fail, answers break off and agents hang up. It passes (status 0) when each turn "
        "is answered, or reported to its agent for one of these faults, none is kept twice, no key "
        "is another session's, the session server's memory is flat over the second half, and all "
        "its connections are closed at the end.",
    )
    for option, default in (("sessions", 10_000), ("turns", 10), ("at-a-time", 256)):
        read = tables.at_least(1)
        parser.add_argument(f"--{option}", type=read, default=default, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="has all that was counted")
    options = vars(parser.parse_args())
    file: Path | None = options.pop("json")
    load = Load(**options)
    smaller = {each: -(-options[each] // DEBUG_SHARE) for each in ("sessions", "at_a_time")}
    loads = [load, Load(**options | smaller, debug=True)]
    return exit_status("soak", play(loads, tables.console(), file))


if __name__ == "__main__":
    sys.exit(main())
