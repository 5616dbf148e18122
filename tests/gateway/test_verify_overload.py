"""``verify`` on the real gateway while it skips overloaded workers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aiohttp_smg_routing.testing import SmgGateway, smg_gateway

from ..commands import Run, verify
from ..series import samples_of
from ..verify_servers import caching_workers, in_background

ON, OFF = ("--worker-overload-protection",), ("--disable-worker-overload-protection",)


@asynccontextmanager
async def loaded(kv_usage: Sequence[float], *args: str) -> AsyncIterator[SmgGateway]:
    """Run the gateway with workers whose KV caches are so full; yield once it knows that."""
    args = ("--load-monitor-interval", "1", *args)
    async with (
        caching_workers(len(kv_usage), kv_usage=kv_usage) as urls,
        smg_gateway(urls, policy="manual", args=args) as smg,
    ):
        known = 0
        while known < len(kv_usage):
            await asyncio.sleep(0.05)
            series = [sample.name for sample in await samples_of(smg.metrics_url)]
            known = series.count("smg_engine_token_usage")
        yield smg


def names(run: Run) -> list[str]:
    return [cause["name"] for cause in run.json["causes"]]


@pytest.mark.parametrize(
    ("kv_usage", "args", "status", "causes"),
    [
        ([0.95, 0.95, 0.95], ON, 1, ["overloaded"]),
        ([0.95, 0.1, 0.1], ON, 0, ["overloaded"]),
        ([0.1, 0.1, 0.1], ON, 0, ["overload_protection"]),
        ([0.1, 0.1, 0.1], OFF, 0, ["overload_protection"]),
        ([0.95, 0.95, 0.95], OFF, 0, []),
        ([0.95, 0.1, 0.1], OFF, 0, []),
    ],
)
def test_overload_is_named_and_not_the_policy(
    tmp_path: Path,
    kv_usage: Sequence[float],
    args: Sequence[str],
    status: int,
    causes: list[str],
) -> None:
    with in_background(loaded(kv_usage, *args)) as smg:
        run = verify(tmp_path, smg.url, "--metrics", smg.metrics_url)
    assert (run.status, names(run)) == (status, causes), run.out
    assert "does not route on the key" not in run.said
    assert ("--disable-worker-overload-protection" in run.said) == bool(causes)
