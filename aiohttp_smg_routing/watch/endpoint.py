"""Polls a page of metrics, and keeps the pages behind the current figures."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Generic, TypeVar

from prometheus_client.samples import Sample
from yarl import URL

from ..verify.ask import samples_of
from ..verify.call import CallError, Client

WINDOW_SECONDS = 10
"""How many seconds the current figures cover; one interval if that is longer."""

_LONGEST = 4 * 2**20  # characters, which take seconds to parse; 1,000 workers have 2 MB

_LONGEST_LINE = 64 * 2**10  # characters; the parser's time grows with their square

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
            text = await self._client.text(self.seen.url)
            # A page of hundreds of workers takes a moment: the picture goes on meanwhile.
            page = await asyncio.to_thread(self._parse, text)
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

    def _parse(self, text: str) -> P:
        if len(text) > _LONGEST:
            raise ValueError(f"the page has more than {_LONGEST // 2**20} MiB")
        if max(map(len, text.splitlines()), default=0) > _LONGEST_LINE:
            raise ValueError(f"the page has a line of more than {_LONGEST_LINE // 2**10} KiB")
        return self._read(samples_of(self._client, text))

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
