"""Shows a run to the user: its progress, then the table, the verdict and what to do."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any, Final, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .judge import Verdict
from .seen import ARM_TITLES, ARMS, Arm, Outcome, Plan, Seen, Turn
from .summary import Summary, summarise

COLOURS: Final = {"pinned": "bold green", "not pinned": "bold red", "could not tell": "bold yellow"}


class Bars:
    """A bar for each arm, with the outcomes of its turns. Only a terminal shows them."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._shown = console.is_terminal
        self._outcomes: dict[Arm, Counter[Outcome]] = {arm: Counter() for arm in ARMS}
        total = plan.sessions * plan.turns
        self._tasks = {
            arm: self._progress.add_task(ARM_TITLES[arm], total=total, state=_state(Counter()))
            for arm in ARMS
        }

    def start(self) -> None:
        """Show the bars."""
        if self._shown:
            self._progress.start()

    def played(self, turn: Turn) -> None:
        """Count a turn."""
        outcomes = self._outcomes[turn.arm]
        outcomes[turn.outcome] += 1
        self._progress.update(self._tasks[turn.arm], advance=1, state=_state(outcomes))

    def stop(self) -> None:
        """Stop moving the bars."""
        if self._shown:
            self._progress.stop()


def _state(outcomes: Counter[Outcome]) -> str:
    seldom: tuple[Outcome, ...] = ("unknown", "failed")
    named = not outcomes["unknown"] or outcomes["first"]
    always: tuple[Outcome, ...] = ("kept", "moved") if named else ()
    names = (*always, *(name for name in seldom if outcomes[name]))
    return ", ".join(f"{outcomes[name]} {name}" for name in names)


_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


def show_plan(seen: Seen, console: Console) -> None:
    """Print what the run will play."""
    plan = seen.plan
    way = f" through {plan.through}" if plan.through else ""
    _print(
        console,
        f"{plan.sessions} sessions of {plan.turns} turns on {plan.gateway}{way}, and as many turns "
        f"in a new session each; model {plan.model}, {_workers(seen.workers)}.",
    )


def _workers(listed: Mapping[str, int] | None) -> str:
    if listed is None:
        return "workers not listed"
    if set(listed) <= {"regular"}:
        count = listed.get("regular", 0)
        return f"{count} worker{'s' * (count != 1)} listed"
    return f"{' and '.join(f'{count} {kind}' for kind, count in listed.items())} workers listed"


def show_seen(seen: Seen, console: Console) -> None:
    """Print the table of both arms and the gateway's counters, if any call succeeded."""
    keyed, unkeyed = (summarise(seen.turns, arm) for arm in ARMS)
    if not keyed.answered + unkeyed.answered:
        return
    table = Table("", *(ARM_TITLES[arm] for arm in ARMS))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in _ROWS.items():
        table.add_row(name, value(keyed), value(unkeyed))
    console.print(table)
    if seen.counters:
        counted = {
            " ".join(("policy", name, pool.replace("regular", ""))).strip(): count
            for pool, policies in seen.counters.pools.items()
            for name, count in policies.items()
        }
        for branches in seen.counters.branches.values():
            counted |= branches
        told = ", ".join(f"{name} {count}" for name, count in counted.items())
        _print(console, f"The gateway's counters grew by: {told or 'nothing'}.")


def _count(outcome: Outcome) -> Callable[[Summary], str]:
    def row(summary: Summary) -> str:
        return str(summary.outcomes[outcome]) if _known(summary, outcome) else "unknown"

    return row


def _known(summary: Summary, outcome: Outcome) -> bool:
    return summary.named or outcome in ("unknown", "failed")


def _kept(summary: Summary) -> str:
    if summary.kept_share is None:
        return "unknown" if summary.later else "0"
    return f"{summary.outcomes['kept']} ({summary.kept_share:.1%})"


def _percent(share: float | None) -> str:
    return "not reported" if share is None else f"{share:.1%}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f} s"


_ROWS: dict[str, Callable[[Summary], str]] = {
    "conversations": lambda arm: str(arm.sessions),
    "turns answered": lambda arm: str(arm.answered),
    "workers": lambda arm: str(len(arm.workers) or "unknown"),
    "later turns kept on their worker": _kept,
    "later turns moved to another": _count("moved"),
    "turns whose worker is unknown": _count("unknown"),
    "turns that failed": _count("failed"),
    "later prompt tokens from the KV cache": lambda arm: _percent(arm.cached_share),
    "time to first token, later turns, p50": lambda arm: _seconds(arm.first_token_p50),
    "time to first token, later turns, p95": lambda arm: _seconds(arm.first_token_p95),
}


def show_verdict(verdict: Verdict, console: Console) -> None:
    """Print the verdict in a sentence, then each cause and what to do about it."""
    console.print()
    _print(console, verdict.sentence, COLOURS[verdict.answer])
    for cause in verdict.causes:
        console.print()
        _print(console, cause.text)
        _print(console, cause.advice, indent="  -> ")


def _print(console: Console, text: str, style: str = "", indent: str = "") -> None:
    # Wrapped here, because rich leaves blanks at the ends of lines. A Text, because what a server
    # said must not count as markup.
    lines = wrap(
        text,
        console.width,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_on_hyphens=False,
    )
    console.print(Text("\n".join(lines), style), soft_wrap=True)


def write_json(seen: Seen, verdict: Verdict, status: int, file: Path) -> None:
    """Write everything that was seen and concluded as JSON. Raises ``OSError``."""
    document = {
        "verdict": verdict.answer,
        "exit_status": status,
        "sentence": verdict.sentence,
        "causes": [asdict(cause) for cause in verdict.causes],
        "arms": {arm: _figures(summarise(seen.turns, arm)) for arm in ARMS},
        **asdict(seen),
    }
    text = json.dumps(document, indent=2, default=str)  # str() is for the URLs
    file.write_text(f"{text}\n", encoding="utf-8")


def _figures(summary: Summary) -> dict[str, Any]:
    return {
        **{name: summary.outcomes[name] if _known(summary, name) else None for name in _OUTCOMES},
        "conversations": summary.sessions,
        "kept_share": summary.kept_share,
        "cached_share": summary.cached_share,
        "first_token_p50_seconds": summary.first_token_p50,
        "first_token_p95_seconds": summary.first_token_p95,
        "sessions_per_worker": dict(summary.workers),
    }
