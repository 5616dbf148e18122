"""What the ledger reports: its counts, and the pins of each session and worker."""

import time
from collections import Counter as Count
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Outcome = Literal["first", "kept", "moved", "unknown", "untagged", "failed"]
Beside = Literal["missing", "late", "unmatched"]
RECENT_SECONDS = 600
"""For how long an answer makes its session active, and counts among its worker's recent calls."""

_STEP = 10  # seconds that are counted together
_MOST_WORKERS = 1000  # counted apart in a step: a wrong header could name a new one for each call


@dataclass(frozen=True, slots=True)
class PinSummary:
    """How many calls to the gateway had each outcome, and three further counts.

    Each call has one of the first six outcomes. All but ``sessions`` count from the set-up on.

    >>> routing.pins.summary()
    PinSummary(first=1, kept=5, moved=0, unknown=0, untagged=0, failed=0, missing=0, late=0,
    unmatched=0, sessions=1)
    """

    first: int = 0  #: Calls that showed a session on a worker for the first time.
    kept: int = 0  #: Calls that went to the worker that the session had when the call started.
    moved: int = 0  #: Calls that went to another worker.
    unknown: int = 0  #: Answers that named no worker, such as those of SMG before 1.10.
    untagged: int = 0  #: Calls that were answered and had no session.
    failed: int = 0  #: Calls that raised, or were answered with a status of 400 or more.
    missing: int = 0  #: Calls that had no session when they were made, whatever their outcome.
    late: int = 0  #: Calls in a request's session that were made after the request had ended.
    unmatched: int = 0  #: Calls in a session that look like calls to the gateway but had no key.
    sessions: int = 0  #: Sessions that are tracked now.


class SessionPin(NamedTuple):
    """Where a session is pinned. A session has a pin for each key, and for each gateway.

    >>> routing.pins.of("s-17")
    [SessionPin(session='s-17', gateway='http://10.0.0.1:30000', key='s-17',
    worker='http://10.0.0.2:8000', calls=6, moves=0)]
    """

    session: str  #: The session's name: its id or its digest, with the ``prefix``.
    gateway: str  #: The gateway's URL. If gateways share workers, the URL of the first.
    key: str  #: The routing key. It equals ``session`` unless ``pin_by`` is set.
    worker: str | None  #: The session's worker, as the gateway names it. None if it named none.
    calls: int  #: How many of the session's calls were answered.
    moves: int  #: How often the session moved to another worker.


@dataclass(frozen=True, slots=True)
class Move:
    """A session's calls went to one worker, and now go to another.

    >>> def on_move(move):
    ...     print(move.session, move.from_worker, move.to_worker, move.calls)
    >>> routing = Routing({"gateway": "http://10.0.0.1:30000", "on_move": on_move})
    """

    session: str  #: The session's name: its id or its digest, with the ``prefix``.
    from_worker: str  #: The worker that had the session, as the gateway names it.
    to_worker: str  #: The worker that has it now.
    calls: int  #: How many of the session's calls were answered before this one.


@dataclass(slots=True, eq=False)
class Row:
    """A ``SessionPin`` as the ledger keeps it."""

    session: str
    gateway: str
    key: str
    first: str | None = None  # the worker of its first answer
    worker: str | None = None
    calls: int = 0
    moves: int = 0
    answered: float = 0.0  # the time.monotonic() of its last answer
    is_over: bool = False  # the session has ended, or the ledger dropped it
    into: "Row | None" = None  # the row that it was merged into

    def absorb(self, other: "Row") -> None:
        """Take in another row, because the gateways of both now count as one."""
        self.calls, self.moves = self.calls + other.calls, self.moves + other.moves
        self.answered = max(self.answered, other.answered)
        if self.worker is None:
            self.first, self.worker = other.first, other.worker
        other.worker, other.into = None, self

    def merged(self) -> "Row":
        """Return the row that this one was merged into, or this one."""
        row = self
        while row.into is not None:
            row = row.into
        return row

    def pin(self) -> SessionPin:
        """Return the row as users see it."""
        return SessionPin(self.session, self.gateway, self.key, self.worker, self.calls, self.moves)


class Workers:
    """Each worker's pins, and the calls that it answered lately."""

    def __init__(self) -> None:
        self.pins: Count[str] = Count()
        self.lately: Count[str] = Count()  # calls of the step that is under way
        self.until: float = 0.0  # the end of that step
        self._steps: deque[tuple[float, Count[str]]] = deque(maxlen=RECENT_SECONDS // _STEP + 1)

    def pinned(self, worker: str, change: int) -> None:
        """Change the number of a worker's pins. A worker without pins is forgotten."""
        self.pins[worker] += change
        if not self.pins[worker]:
            del self.pins[worker]

    def called(self, worker: str) -> None:
        """Count a call that the worker has just answered."""
        if (now := time.monotonic()) >= self.until:
            self.lately, self.until = Count(), now + _STEP
            self._steps.append((self.until, self.lately))
        if worker in self.lately or len(self.lately) < _MOST_WORKERS:
            self.lately[worker] += 1

    def calls(self, within: float) -> dict[str, int]:
        """Return how many calls each worker answered in the last ``within`` seconds."""
        if not 0 <= within <= RECENT_SECONDS:
            raise ValueError(f"calls are kept for {RECENT_SECONDS} seconds, not for {within:g}")
        since = time.monotonic() - within
        found = dict.fromkeys(list(self.pins), 0)
        for until, calls in list(self._steps):  # copied in one step: other threads change it
            for worker, number in dict(calls).items() if until > since else ():
                found[worker] = found.get(worker, 0) + number
        return found

    def active(
        self, rows: Mapping[str, tuple[Row, ...]], within: float | None = None
    ) -> dict[str, int]:
        """Return each worker's pin count: all, or those used in the last ``within`` seconds."""
        if within is None:
            return dict(self.pins)
        since = time.monotonic() - within
        its = [row for its in list(rows.values()) for row in its]
        found = Count(row.worker for row in its if row.answered >= since)
        return {worker: found[worker] for worker in list(self.pins)}
