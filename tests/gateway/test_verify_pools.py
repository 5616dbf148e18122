"""``verify`` with prefill and decode workers: each call has one of both, pinned separately."""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from yarl import URL

from harness.servers import session_server

from ..commands import LOAD, verify
from ..gateways import gateway_program
from ..verify_servers import caching_workers, in_background


@asynccontextmanager
async def pd_gateway(
    *args: str, prefill: int = 3, decode: int = 3
) -> AsyncIterator[tuple[URL, URL]]:
    """Run the gateway with prefill and decode workers; yield the URLs of it and of its metrics."""
    async with caching_workers(prefill + decode) as urls:
        kinds = ["--prefill"] * prefill + ["--decode"] * decode
        pairs = zip(kinds, map(str, urls), strict=True)
        async with gateway_program(
            *(sys.executable, "-m", "smg", "launch", "--pd-disaggregation", "--policy", "manual"),
            *(word.rstrip("/") for pair in pairs for word in pair),
            *("--disable-tokenizer-autoload", "--disable-worker-overload-protection"),
            *("--log-level", "warn", *args),
            workers=urls,
        ) as smg:
            yield smg.url, smg.metrics_url


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
        run = verify(tmp_path, url, *LOAD, "--metrics", metrics)
    assert (run.status, run.causes) == (status, causes), run.out
    prefill = "the key chose the prefill worker of 48 of 48 later turns"
    if status == 0 or causes == ["decode_policy"]:
        assert prefill in run.said
    else:
        assert "the key chose no prefill worker" in run.said
    if causes in ([], ["prefill_policy"]):
        assert "48 of 48 later turns stayed on their session's decode worker" in run.said
    else:
        assert "the key chose no decode worker" in run.said


def test_prefill_workers_can_not_be_judged_without_counters(tmp_path: Path) -> None:
    with in_background(pd_gateway(*policies("round_robin", "manual"))) as (url, _):
        run = verify(tmp_path, url, *LOAD, "--metrics", url / "metrics")
    assert (run.status, run.causes) == (2, ["prefill_unknown", "no_counters"]), run.out


def test_kind_that_has_one_worker_needs_no_policy(tmp_path: Path) -> None:
    with in_background(pd_gateway(*policies("manual", "round_robin"), decode=1)) as (url, metrics):
        run = verify(tmp_path, url, *LOAD, "--metrics", metrics)
    assert run.status == 0, run.out


@pytest.mark.parametrize(("prefill", "status"), [("manual", 0), ("round_robin", 1)])
def test_session_server_before_both_kinds(tmp_path: Path, prefill: str, status: int) -> None:
    with (
        in_background(pd_gateway(*policies(prefill, "manual"))) as (url, metrics),
        in_background(session_server(url)) as through,
    ):
        run = verify(tmp_path, url, *LOAD, "--metrics", metrics, "--through", through.url)
    assert run.status == status, run.out
