"""``verify`` with several gateways, behind a front that hashes the key or one that doesn't."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from yarl import URL

from harness.proxies import pinned_server
from harness.servers import serve

from ..commands import LOAD, verify
from ..gateways import gateways
from ..verify_servers import caching_workers, in_background, proxy
from .cluster import WORKERS
from .front import Balancer


@asynccontextmanager
async def behind(
    balancer: Balancer, folder: Path, *, hashing: bool
) -> AsyncIterator[tuple[URL, URL]]:
    async with (
        caching_workers(WORKERS) as urls,
        gateways(urls, urls, policy="manual") as (first, second),
        balancer(folder, first.url, second.url, hashing=hashing) as front,
    ):
        yield front.url, first.metrics_url


@pytest.mark.parametrize(
    ("hashing", "status", "causes"),
    [(True, 0, []), (False, 1, ["replicas"])],
    ids=["hash", "round robin"],
)
def test_verify_names_the_replicas_unless_the_balancer_hashes_the_key(
    tmp_path: Path, balancer: Balancer, hashing: bool, status: int, causes: list[str]
) -> None:
    with in_background(behind(balancer, tmp_path, hashing=hashing)) as (front, metrics):
        run = verify(tmp_path, front, *LOAD, "--metrics", metrics)
    assert (run.status, run.causes) == (status, causes), run.out


def test_verify_names_the_replicas_when_each_session_server_has_a_gateway_of_its_own(
    tmp_path: Path,
) -> None:
    @asynccontextmanager
    async def servers() -> AsyncIterator[tuple[URL, URL, URL]]:
        async with (
            caching_workers(WORKERS) as urls,
            gateways(urls, urls, policy="manual") as (first, second),
            serve(pinned_server(first.url)) as one,
            serve(pinned_server(second.url)) as other,
            serve(proxy(one, other)) as front,
        ):
            yield first.url, first.metrics_url, front

    with in_background(servers()) as (first, metrics, front):
        run = verify(tmp_path, first, *LOAD, "--metrics", metrics, "--through", front)
    assert (run.status, run.causes) == (2, ["replicas", "worker_hidden"]), run.out
