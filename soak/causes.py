"""The causes of the errors that agents got: a fault must explain each."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from harness.processes import Restartable
from harness.workers import Received, Worker

from .agents import Report

TRIES = 3  # the example server tries a turn so often
BREAKER_SECONDS = 2  # the gateway skips a worker that refused for this long

Tries = Sequence[tuple[Worker, Received]]


def causes(
    reports: Sequence[Report],
    server: Restartable[Any],
    gateway: Restartable[Any],
    workers: Sequence[Worker],
) -> tuple[Counter[str], list[Report]]:
    """Return how many reports each cause explains, and the reports without an explanation."""
    tries: dict[tuple[str, str], list[tuple[Worker, Received]]] = defaultdict(list)
    reported = {(report.user, report.text) for report in reports}
    for worker in workers:
        for turn in worker.received():
            if (turn.user, turn.text) in reported:
                tries[turn.user, turn.text].append((worker, turn))
    counts: Counter[str] = Counter()
    unexplained = []
    for report in reports:
        if server.was_down(report.since, report.until):
            counts["session server"] += 1
        elif gateway.was_down(report.since, report.until):
            counts["gateway"] += 1
        elif is_of_workers(report, tries[report.user, report.text], workers):
            counts["workers"] += 1
        else:
            unexplained.append(report)
    return counts, unexplained


def is_of_workers(report: Report, tries: Tries, workers: Sequence[Worker]) -> bool:
    """Tell whether workers failed all tries that they received, and one was down for the others.

    If no worker received a try, the gateway must have reported the error as its own.
    """
    failed = all(
        turn.fault or worker.process.was_down(turn.at, report.until) for worker, turn in tries
    )
    if len(tries) >= (1 if report.error == "cut off" else TRIES):
        return failed
    was_told = bool(tries) or report.error == "gateway's"
    since = report.since - BREAKER_SECONDS
    was_down = any(worker.process.was_down(since, report.until) for worker in workers)
    return failed and was_told and was_down
