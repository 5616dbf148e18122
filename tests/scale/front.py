"""A balancer in front of the gateways, with the configuration of docs/scaling.md."""

import re
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from yarl import URL

from aiohttp_smg_routing.testing import Recorder, SmgGateway
from harness.processes import ROOT
from harness.workers import recorders

from ..gateways import gateways
from ..waiting import until
from .cluster import WORKERS

PAGE = ROOT / "docs" / "scaling.md"


@dataclass(frozen=True)
class Front:
    url: URL
    log: Path
    in_turn: bool
    """Whether calls without a key come to the gateways in turn."""

    async def gateways(self, turns: int) -> Mapping[str, Sequence[URL]]:
        """Wait for ``turns`` turns; return the gateways that answered each session, in order."""
        served = defaultdict(list)
        await until(lambda: len(self._logged()) >= turns)  # it is written after the answer
        for line in self._logged():
            key, gateway, status = line.split()
            assert status == "200", line
            served[key].append(URL(f"http://{gateway}"))
        return served

    def _logged(self) -> Sequence[str]:
        lines = self.log.read_text().splitlines()
        return [line for line in lines if not line.startswith("- ")]


class Balancer(Protocol):
    """Runs in front of two gateways; without ``hashing`` they take turns."""

    def __call__(
        self, folder: Path, *gateways: URL, hashing: bool = True
    ) -> AbstractAsyncContextManager[Front]: ...


@asynccontextmanager
async def before_gateways(
    balancer: Balancer, folder: Path, policy: str, *, hashing: bool = True
) -> AsyncIterator[tuple[list[Recorder], list[SmgGateway], Front]]:
    """Run the workers, both gateways, and the balancer in front of them."""
    async with (
        recorders(WORKERS) as behind,
        gateways(behind, behind, policy=policy) as both,
        balancer(folder, *(gateway.url for gateway in both), hashing=hashing) as front,
    ):
        yield behind, both, front


def on_the_page(language: str) -> str:
    """Return the page's only block of that language."""
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


def instead(text: str, *pairs: tuple[str, object]) -> str:
    """Return ``text`` with replacements; each old text must occur exactly once."""
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, str(new))
    return text
