"""What a moment shows: both pages, and how their counts grew just now."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..verify.ask import growth
from ..verify.counting import answering
from ..verify.seen import Counters
from .endpoint import Look
from .page import Gateway, Server

#: The branches of ``manual`` in which a key came again. The first of them is on its worker.
LATER_BRANCHES = ("occupied_hit", "occupied_miss", "cap_respill")


@dataclass(frozen=True, slots=True)
class Share:
    """A part, and the whole that it is a part of."""

    part: int
    of: int

    @property
    def value(self) -> float | None:
        """The share, 0 to 1; None if the whole is 0."""
        return self.part / self.of if self.of else None


@dataclass(frozen=True, slots=True)
class Skew:
    """How unevenly something is spread over the workers."""

    worker: str
    """The fullest worker."""
    most: int
    mean: float

    @property
    def ratio(self) -> float:
        """The fullest over the mean."""
        return self.most / self.mean


@dataclass(frozen=True)
class View:
    """What is known of a gateway and, if its URL was given, of a session server."""

    gateway: Look[Gateway]
    server: Look[Server] | None = None

    @cached_property
    def totals(self) -> Counters:
        """The gateway's counters since it started."""
        page = self.gateway.page
        return page.counters if page else Counters()

    @cached_property
    def now(self) -> Counters | None:
        """The totals' growth just now; None if the gateway doesn't answer, or only just does."""
        before, page = self.gateway.before, self.gateway.page
        if self.gateway.error or before is None or page is None:
            return None
        return growth(before.counters, page.counters)

    @cached_property
    def server_totals(self) -> Mapping[str, int]:
        """The session server's counts since it started."""
        return self.server.page.counts if self.server and self.server.page else {}

    @cached_property
    def server_now(self) -> Mapping[str, int] | None:
        """The growth of those totals just now; None as with the gateway."""
        server = self.server
        if server is None or server.error or server.before is None or server.page is None:
            return None
        return Counter(server.page.counts) - Counter(server.before.counts)

    @cached_property
    def workers(self) -> int:
        """How many workers there are to choose from: the size of the largest pool."""
        return self.gateway.page.choices if self.gateway.page else 0

    @cached_property
    def models(self) -> int:
        """How many models the workers serve, as far as it is known."""
        return self.gateway.page.models if self.gateway.page else 0

    @cached_property
    def calls_skew(self) -> Skew | None:
        """The spread of the current calls; None if there are none, or several kinds of workers.

        Several models count as several kinds, because the counters don't tell them apart.
        """
        page = self.gateway.page
        if page is None or self.now is None or len(self.now.pools) > 1 or self.models > 1:
            return None
        return _skew(self.now.workers, self.workers - page.down)

    @cached_property
    def sessions_skew(self) -> Skew | None:
        """The spread of the active sessions; None if nobody names their workers.

        None also if there are several models: nobody says which of them a session calls.
        """
        page = self.gateway.page
        if not (self.server and self.server.page and page) or self.models > 1:
            return None
        sizes, active = page.pool_sizes, self.server.page.active or {}
        return _skew(active, sizes.get(answering(tuple(sizes)), 0) - page.down)


def _skew(counts: Mapping[str, int], workers: int) -> Skew | None:
    total = sum(counts.values())
    if not total:
        return None
    worker = max(counts, key=counts.__getitem__)
    return Skew(worker, counts[worker], total / max(workers, len(counts)))


def kept_by_gateway(counters: Counters) -> Share:
    """Return how many calls with a key that came before went to the worker of that key."""
    taken = counters.branches.get("manual", {})
    return Share(taken.get(LATER_BRANCHES[0], 0), sum(taken.get(it, 0) for it in LATER_BRANCHES))


def kept_by_server(counts: Mapping[str, int]) -> Share:
    """Return how many later turns went to the worker of their session, as the ledger saw it."""
    kept = counts.get("kept", 0)
    return Share(kept, kept + counts.get("moved", 0))
