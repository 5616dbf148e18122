"""Polls a page of metrics, and keeps the pages behind the current figures."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Generic, TypeVar

from prometheus_client.samples import Sample
from yarl import URL

from ..verify.ask import read_page
from ..verify.call import CallError, Client

WINDOW_SECONDS = 10
"""How many seconds the current figures cover; one interval if that is longer."""

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Look(Generic[P]):
    """What is known of an endpoint at a moment."""

    url: URL
    page: P | None = None
    """The last page; None if there was none yet."""
    before: P | None = None
    """The page ``seconds`` before it; None if there was none, or a restart lies between."""
    seconds: float = 0
    error: str = ""
    """Why the last look found no page."""
    since: datetime | None = None
    """When a look first found no page."""
    restarts: int = 0
    """How often the counters began anew."""
    restarted: datetime | None = None
    """When a look last found that."""

    @property
    def span(self) -> str:
        """The period of the current figures, in words."""
        return f"last {self.seconds:.{0 if self.seconds >= 1 else 1}f} s"


class Endpoint(Generic[P]):
    """A page of metrics at ``url``.

    ``read`` makes a page of samples, or raises ``ValueError``. ``shrank`` tells whether the
    program that serves it was restarted between two pages. ``seen`` is what is known so far.
    """

    def __init__(
        self,
        client: Client,
        url: URL,
        read: Callable[[Sequence[Sample]], P],
        shrank: Callable[[P, P], bool],
    ) -> None:
        self.seen: Look[P] = Look(url)
        self._client = client
        self._read = read
        self._shrank = shrank
        self._pages: deque[tuple[float, P]] = deque()

    async def look(self) -> None:
        """Look once. It ends within seconds, whatever answers."""
        try:
            page = await read_page(self._client, self.seen.url, self._read)
        except CallError as error:
            self.failed(error.failure.reason)
        except ValueError as error:
            self.failed(self._client.clean(str(error)))
        else:
            self.add(asyncio.get_running_loop().time(), page)

    async def keep_looking(self, interval: float) -> None:
        """Look every ``interval`` seconds, until it is cancelled."""
        while True:
            await asyncio.gather(self.look(), asyncio.sleep(interval))

    def failed(self, error: str) -> None:
        """Note that there is no page now, and since when."""
        self.seen = replace(self.seen, error=error, since=self.seen.since or datetime.now())

    def add(self, now: float, page: P) -> None:
        """Add the page of time ``now``, in seconds; forget pages that are too old to compare."""
        pages = self._pages
        if pages and self._shrank(pages[-1][1], page):
            restarts = self.seen.restarts + 1
            self.seen = replace(self.seen, restarts=restarts, restarted=datetime.now())
            pages.clear()
        pages.append((now, page))
        while len(pages) > 2 and now - pages[1][0] >= WINDOW_SECONDS:
            pages.popleft()
        first, before = pages[0]
        self.seen = replace(
            self.seen,
            page=page,
            before=before if len(pages) > 1 else None,
            seconds=now - first,
            error="",
            since=None,
        )
