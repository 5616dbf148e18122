"""Agents on real engines behind the real SMG gateway, with the plugin on and with it off.

    make demo

Both arms play the same load through ``examples/session_server.py``; only ``[smg_routing] enabled``
differs.
Everything runs on free loopback ports, and every figure in the table is measured in this run.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

from harness.arms import PINNED, Load, Played, Turn, moved_sessions, play
from harness.stopping import exit_status

try:
    from rich.console import Console
    from rich.progress import Progress, TextColumn
    from rich.table import Table

    from harness import tables
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install -e . --group demo")


async def play_arm(load: Load, *, plugin: bool, progress: Progress) -> Played:
    """Play ``load`` with the plugin or without it, and show how far it has come."""
    name = f"plugin {'on' if plugin else 'off'}"
    total = load.sessions * load.turns
    bar = progress.add_task(f"{name:10}", total=total, state="starting the servers")
    turns: list[Turn] = []

    def show() -> None:
        state = f"{len(turns)}/{total} turns, {moved_sessions(turns)} sessions moved"
        progress.update(bar, completed=len(turns), state=state)

    def played(turn: Turn) -> None:
        turns.append(turn)
        show()

    def started() -> None:
        progress.console.print(f"{name}: all servers are up, {load.sessions} agents begin")
        show()

    return await play(load, replace(PINNED, plugin=plugin), started=started, played=played)


def report(console: Console, on: Played, off: Played) -> int:
    """Print what both arms measured and what it shows; return the demo's exit status."""
    console.print()
    console.print(comparison(on, off))
    if found := faults(on):
        console.print(f"The plugin does not do its work here: {'; '.join(found)}.")
        return 1
    console.print(
        f"With the plugin on, {on.stayed} of {on.sessions} sessions stayed on one worker, and"
        f" {on.cached_share:.0%} of the prompt tokens came from a KV cache; with it off,"
        f" {off.stayed} of {off.sessions} stayed, and {off.cached_share:.0%} did."
    )
    return 0


def comparison(on: Played, off: Played) -> Table:
    """Return the table, a column for each arm."""
    table = tables.table("", "plugin on", "plugin off")

    def row(name: str, value: Callable[[Played], object], *, end_section: bool = False) -> None:
        table.add_row(name, str(value(on)), str(value(off)), end_section=end_section)

    row("sessions", lambda arm: arm.sessions)
    row("turns", lambda arm: len(arm.turns))
    row("sessions that stayed on one worker", lambda arm: arm.stayed)
    row("wall time", lambda arm: f"{arm.seconds:.1f} s", end_section=True)
    row("gateway: vacant (a session was pinned)", lambda arm: arm.branches["vacant"])
    row("gateway: occupied_hit (a turn followed)", lambda arm: arm.branches["occupied_hit"])
    row(
        "gateway: no_routing_id (no key)",
        lambda arm: arm.branches["no_routing_id"],
        end_section=True,
    )
    row("second turn on: prompt tokens from KV cache", lambda arm: f"{arm.cached_share:.1%}")
    row("second turn on: time to first token, p50", lambda arm: f"{arm.first_token(50):.2f} s")
    row("second turn on: time to first token, p95", lambda arm: f"{arm.first_token(95):.2f} s")
    return table


def faults(arm: Played) -> list[str]:
    """Return, in plain words, why not every session of ``arm`` was pinned."""
    found = []
    moved = moved_sessions(arm.turns)
    if moved:
        found.append(f"{moved} of {arm.sessions} sessions moved to another worker")
    follow_ups = len(arm.later_turns)
    hits, keyless = arm.branches["occupied_hit"], arm.branches["no_routing_id"]
    if hits < follow_ups or keyless:  # more: the gateway counts its own retries too
        found.append(
            f"the gateway counted {hits} turns that followed a pin and {keyless} without a key,"
            f" where {follow_ups} and 0 were due"
        )
    return found


async def demo(load: Load, console: Console) -> int:
    """Play both arms, print the comparison, and return the exit status."""
    with tables.bars(console, TextColumn("{task.fields[state]}")) as progress:
        on = await play_arm(load, plugin=True, progress=progress)
        off = await play_arm(load, plugin=False, progress=progress)
    return report(console, on, off)


def main() -> int:
    """Run the demo that the command line asks for; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m demo", description="Compare the same load, plugin on and off."
    )
    for option, default in (("--sessions", 9), ("--turns", 5), ("--workers", 3)):
        # With one session, turn or worker there is nothing to compare.
        parser.add_argument(option, type=tables.at_least(2), default=default, help="(%(default)s)")
    args = parser.parse_args()
    return exit_status("demo", demo(Load(**vars(args)), tables.console()))


if __name__ == "__main__":
    sys.exit(main())
