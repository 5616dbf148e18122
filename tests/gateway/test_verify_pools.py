"""``verify`` with prefill and decode workers: each call has one of both, pinned separately."""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing.testing import child_process, free_ports
from harness.servers import session_server

from ..commands import verify
from ..verify_servers import in_background, stub_engines


@asynccontextmanager
async def pd_gateway(
    *args: str, prefill: int = 3, decode: int = 3
) -> AsyncIterator[tuple[URL, URL]]:
    """Run the gateway with prefill and decode workers; yield the URLs of it and of its metrics."""
    port, metrics_port = free_ports(2)
    url = URL(f"http://127.0.0.1:{port}")
    async with ClientSession() as session, stub_engines(prefill + decode) as urls:

        async def ready() -> bool:
            async with session.get(url / "workers") as response:
                workers = (await response.json())["workers"]
            healthy = [URL(worker["url"]) for worker in workers if worker["is_healthy"]]
            return sorted(healthy) == sorted(urls)

        kinds = ["--prefill"] * prefill + ["--decode"] * decode
        pairs = zip(kinds, map(str, urls), strict=True)
        async with child_process(
            *(sys.executable, "-m", "smg", "launch", "--pd-disaggregation", "--policy", "manual"),
            *("--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1"),
            *("--prometheus-port", str(metrics_port)),
            *(word.rstrip("/") for pair in pairs for word in pair),
            *("--disable-tokenizer-autoload", "--disable-worker-overload-protection"),
            *("--log-level", "warn", *args),
            ready=ready,
        ):
            yield url, URL(f"http://127.0.0.1:{metrics_port}/metrics")


def policies(prefill: str, decode: str) -> Sequence[str]:
    return ("--prefill-policy", prefill, "--decode-policy", decode)


@pytest.mark.parametrize(
    ("launch", "status", "causes"),
    [
        (policies("manual", "manual"), 0, []),
        (policies("consistent_hashing", "manual"), 0, []),
        (policies("manual", "consistent_hashing"), 0, []),
        ((*policies("cache_aware", "manual"), "--routing-key-override"), 0, []),
        ((*policies("round_robin", "random"), "--routing-key-override"), 0, []),
        (policies("round_robin", "manual"), 1, ["prefill_policy"]),
        (policies("cache_aware", "consistent_hashing"), 1, ["prefill_policy"]),
        (policies("manual", "round_robin"), 1, ["decode_policy"]),
        (policies("random", "round_robin"), 1, ["policy"]),
    ],
)
def test_both_kinds_of_worker_are_judged(
    tmp_path: Path, launch: Sequence[str], status: int, causes: list[str]
) -> None:
    with in_background(pd_gateway(*launch)) as (url, metrics):
        run = verify(tmp_path, url, "--metrics", metrics)
    assert (run.status, run.causes) == (status, causes), run.out
    prefill = "the key chose the prefill worker of 120 of 120 later turns"
    if status == 0 or causes == ["decode_policy"]:
        assert prefill in run.said
    else:
        assert "the key chose no prefill worker" in run.said
    if causes in ([], ["prefill_policy"]):
        assert "120 of 120 later turns stayed on their session's decode worker" in run.said
    else:
        assert "the key chose no decode worker" in run.said


def test_prefill_workers_can_not_be_judged_without_counters(tmp_path: Path) -> None:
    with in_background(pd_gateway(*policies("round_robin", "manual"))) as (url, _):
        run = verify(tmp_path, url, "--metrics", url / "metrics")
    assert (run.status, run.causes) == (2, ["prefill_unknown", "no_counters"]), run.out


def test_kind_that_has_one_worker_needs_no_policy(tmp_path: Path) -> None:
    with in_background(pd_gateway(*policies("manual", "round_robin"), decode=1)) as (url, metrics):
        run = verify(tmp_path, url, "--metrics", metrics)
    assert run.status == 0, run.out


@pytest.mark.parametrize(("prefill", "status"), [("manual", 0), ("round_robin", 1)])
def test_session_server_before_both_kinds(tmp_path: Path, prefill: str, status: int) -> None:
    with (
        in_background(pd_gateway(*policies(prefill, "manual"))) as (url, metrics),
        in_background(session_server(url)) as through,
    ):
        run = verify(tmp_path, url, "--metrics", metrics, "--through", through.url)
    assert run.status == status, run.out
