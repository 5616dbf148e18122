"""The command ``verify`` on the real gateway."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from yarl import URL

from aiohttp_smg_routing.testing import SmgGateway, smg_gateway
from harness.processes import finished, together
from harness.servers import serve, session_server

from ..commands import LOAD, gateway, verify
from ..verify_servers import caching_workers, in_background, proxy

TOKENS = ("cached_tokens", "prompt_tokens")


@pytest.mark.parametrize(
    "launch",
    [
        ("manual",),
        ("consistent_hashing",),
        ("cache_aware", "--routing-key-override"),
        ("prefix_hash",),
    ],
)
def test_policy_that_routes_on_the_key_is_pinned(tmp_path: Path, launch: Sequence[str]) -> None:
    with in_background(gateway(*launch)) as smg:
        run = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.metrics_url)
    assert run.status == 0, run.out
    assert "Pinned: 48 of 48 later turns stayed on their session's worker" in run.said
    assert run.json["arms"]["keyed"]["kept"] == 48
    assert run.json["counters"]["pools"] == {"regular": {launch[0]: 128}}
    assert run.causes == []
    assert run.err == ""


@pytest.mark.parametrize("policy", ["round_robin", "random"])
def test_policy_that_ignores_the_key_is_not_pinned(tmp_path: Path, policy: str) -> None:
    # With 4 workers and a fixed order of calls, round_robin would look pinned.
    with in_background(gateway(policy, workers=4)) as smg:
        run = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.metrics_url)
        unknown = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.url / "metrics")
    assert (run.status, run.causes) == (1, ["policy"]), run.out
    assert f"The gateway's policy is {policy}" in run.out
    for flag in ("--policy manual", "--policy consistent_hashing", "--routing-key-override"):
        assert flag in " ".join(run.out.split())
    assert (unknown.status, unknown.causes) == (1, ["policy", "no_counters"]), unknown.out


def test_cache_aware_is_not_the_key_at_work(tmp_path: Path) -> None:
    with in_background(gateway("cache_aware")) as smg:
        run = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.metrics_url)
        unknown = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.url / "metrics")
    assert (run.status, run.causes) == (1, ["policy"]), run.out
    assert "by the gateway's counters, the key chose no worker" in run.said
    assert unknown.status == 2, unknown.out
    assert unknown.causes == ["same_without_key", "no_counters"]


def test_one_worker_cannot_tell(tmp_path: Path) -> None:
    with in_background(gateway("manual", workers=1)) as smg:
        run = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.metrics_url)
    assert (run.status, run.causes) == (2, ["one_worker"]), run.out


@pytest.fixture(scope="session")
def smg_1_9() -> str:
    """A folder with SMG 1.9.0, which can't be installed beside the newer one.

    All test processes share it; the first one installs it in the virtual environment.
    """
    folder = Path(sys.prefix, "smg-1.9.0")
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = f"{folder}.part"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", made]
            subprocess.run([*pip, "smg==1.9.0"], check=True, timeout=300)  # noqa: S603
            os.rename(made, folder)
    return str(folder)


@pytest.fixture
def old_gateway(smg_1_9: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use SMG 1.9.0 instead of the newer one, here and in child processes."""
    monkeypatch.setenv("PYTHONPATH", smg_1_9)
    monkeypatch.syspath_prepend(smg_1_9)


@pytest.mark.usefixtures("old_gateway")
@pytest.mark.parametrize(
    ("launch", "status", "causes"),
    [
        (("manual",), 0, ["no_worker_name"]),
        (("consistent_hashing",), 0, ["no_worker_name"]),
        (("cache_aware", "--routing-key-override"), 0, ["no_worker_name"]),
        (("round_robin",), 1, ["policy", "no_worker_name"]),
        (("cache_aware",), 1, ["policy", "no_worker_name"]),
    ],
)
def test_gateway_too_old_to_name_its_worker_is_judged_by_its_counters(
    tmp_path: Path, launch: Sequence[str], status: int, causes: list[str]
) -> None:
    with in_background(gateway(*launch)) as smg:
        run = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.metrics_url)
        blind = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.url / "metrics")
    assert run.json["arms"]["keyed"]["unknown"] == 64
    assert run.json["arms"]["keyed"]["kept"] is run.json["arms"]["keyed"]["kept_share"] is None
    assert re.search(r"kept on their worker +│ +unknown │ +unknown", run.out)
    assert "stayed" not in run.out
    assert (run.status, run.causes) == (status, causes), run.out
    assert "by the gateway's counters" in run.said
    assert (blind.status, blind.causes) == (2, ["no_worker_name", "no_counters"]), blind.out


@pytest.mark.usefixtures("old_gateway")
def test_old_gateway_that_hashes_the_api_key_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMG_API_KEY", "sesame")
    with (
        in_background(gateway("consistent_hashing")) as smg,
        in_background(serve(proxy(smg.url, drop=frozenset({"x-smg-routing-key"})))) as url,
    ):
        run = verify(tmp_path, url, *LOAD, "--metrics", smg.metrics_url)
    assert run.json["counters"]["branches"] == {"consistent_hashing": {"routing_key_hit": 128}}
    assert (run.status, run.causes) == (2, ["any_key", "no_worker_name"]), run.out


def test_proxy_that_drops_the_key_is_named(tmp_path: Path, manual: SmgGateway) -> None:
    with in_background(serve(proxy(manual.url, drop=frozenset({"x-smg-routing-key"})))) as url:
        run = verify(tmp_path, url, *LOAD, "--metrics", manual.metrics_url)
    assert (run.status, run.causes) == (1, ["key_lost"]), run.out


def test_replicas_that_do_not_share_their_pins_are_seen(tmp_path: Path) -> None:
    @asynccontextmanager
    async def replicas() -> AsyncIterator[tuple[URL, SmgGateway]]:
        async with (
            caching_workers(3) as urls,
            together(smg_gateway(urls, policy="manual") for _ in range(2)) as (first, second),
            serve(proxy(first.url, second.url)) as url,
        ):
            yield url, first

    with in_background(replicas()) as (url, smg):
        run = verify(tmp_path, url, "--metrics", smg.metrics_url)
        unknown = verify(tmp_path, url, "--metrics", smg.url / "metrics")
    assert (run.status, run.causes) == (1, ["replicas"]), run.out
    assert unknown.status == 1, unknown.out
    assert "replicas" in unknown.out


def test_proxy_that_drops_the_key_is_named_where_its_own_header_routes_all_calls(
    tmp_path: Path,
) -> None:
    """consistent_hashing of SMG 1.13 hashes X-Forwarded-For if there is no key."""
    drop, add = frozenset({"x-smg-routing-key"}), [("X-Forwarded-For", "10.0.0.7")]
    with (
        in_background(gateway("consistent_hashing")) as smg,
        in_background(serve(proxy(smg.url, drop=drop, add=add))) as url,
    ):
        run = verify(tmp_path, url, *LOAD, "--metrics", smg.metrics_url)
    assert run.json["counters"]["branches"] == {"consistent_hashing": {"implicit_key_hit": 128}}
    assert run.status == 1, run.out
    assert "key_lost" in run.causes, run.out


def test_session_server_with_the_plugin_is_pinned(tmp_path: Path, manual: SmgGateway) -> None:
    with in_background(session_server(manual.url)) as through:
        options = (*LOAD, "--metrics", manual.metrics_url, "--through", through.url)
        run = verify(tmp_path, manual.url, *options)
    assert (run.status, run.causes) == (0, []), run.out
    assert run.json["counters"]["branches"] == {"manual": {"vacant": 80, "occupied_hit": 48}}
    # Each of 80 sessions is created and deleted; a few first turns got a 404 before.
    assert run.json["sent_for_sessions"] > 2 * 80


def test_session_server_without_the_plugin_is_not_pinned(
    tmp_path: Path, manual: SmgGateway
) -> None:
    with in_background(session_server(manual.url, enabled=False)) as through:
        url = f"{through.url}/sessions/{{session_id}}"
        run = verify(tmp_path, manual.url, *LOAD, "--metrics", manual.metrics_url, "--through", url)
    assert (run.status, run.causes) == (1, ["key_lost"]), run.out
    assert "another host than the gateway of the plugin's config" in run.said


def test_session_server_that_hides_the_worker_is_judged_by_the_counters(
    tmp_path: Path, manual: SmgGateway
) -> None:
    hidden = frozenset({"x-smg-routed-worker-id"})
    with (
        in_background(session_server(manual.url)) as hides,
        in_background(serve(proxy(hides.url, drop=hidden))) as through,
    ):
        options = (*LOAD, "--metrics", manual.metrics_url, "--through", through)
        run = verify(tmp_path, manual.url, *options)
    assert (run.status, run.causes) == (2, ["whose_key", "worker_hidden"]), run.out


def test_engines_that_do_not_report_cached_tokens_are_named(tmp_path: Path) -> None:
    with in_background(gateway("manual", report=False)) as smg:
        run = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.metrics_url)
    assert (run.status, run.causes) == (0, ["no_cached_tokens"]), run.out
    assert "--enable-cache-report" in run.out


def test_keys_that_the_gateway_drops_or_shortens_are_named(
    tmp_path: Path, manual: SmgGateway
) -> None:
    options = (*LOAD, "--metrics", manual.metrics_url, "--session-id")
    long = verify(tmp_path, manual.url, *options, "{n}" + 128 * "x")
    tail = verify(tmp_path, manual.url, *options, "{run}-{n}_t1")
    assert (long.status, long.causes) == (1, ["key_lost", "bad_key"]), long.out
    assert (tail.status, tail.causes) == (0, ["key_tail"]), tail.out


def test_ids_that_differ_in_their_tail_only_share_a_worker(tmp_path: Path) -> None:
    with in_background(gateway("random", "--routing-key-override")) as smg:
        run = verify(tmp_path, smg.url, "--metrics", smg.metrics_url, "--session-id", "{run}_t{n}")
    # All sessions have one key, and the gateway spreads that many concurrent calls with one key. On
    # a busy machine the first calls may not be concurrent.
    assert (run.status, run.causes[:2]) == (1, ["shared_key", "key_tail"]), run.out
    assert run.causes[2:] in ([], ["one_sided"]), run.out


def test_unknown_model_lists_those_that_exist(tmp_path: Path, manual: SmgGateway) -> None:
    run = verify(tmp_path, manual.url, "--metrics", manual.metrics_url, "--model", "nope")
    assert (run.status, run.causes) == (2, ["unknown_model", "gave_up"]), run.out
    assert "--model: stub" in run.out


def test_gateway_without_workers_cannot_tell(tmp_path: Path) -> None:
    with in_background(gateway("manual", workers=0)) as smg:
        run = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.metrics_url, "--model", "stub")
    assert (run.status, run.causes) == (2, ["unknown_model", "gave_up"]), run.out
    assert "see in GET /workers" in run.said


def test_gateway_that_asks_for_an_api_key_gets_it(tmp_path: Path, manual: SmgGateway) -> None:
    secret = "sesame-7f3a"
    file = tmp_path / "key"
    file.write_text(f"{secret}\n")
    wrong = tmp_path / "wrong"
    wrong.write_text("sesame-0000")
    with in_background(serve(proxy(manual.url, api_key=secret))) as url:
        options = (*LOAD, "--metrics", manual.metrics_url, "--api-key-file")
        refused = verify(tmp_path, url, *options, str(wrong))
        run = verify(tmp_path, url, *options, str(file))
    assert (refused.status, refused.causes) == (2, ["http_401"]), refused.out
    assert "wrong API key: Bearer ***" in refused.out
    assert run.status == 0, run.out
    assert secret not in run.out + run.err + json.dumps(run.json)
    assert "sesame" not in refused.out + refused.err + json.dumps(refused.json)


def test_real_engines_tell_their_cached_tokens(tmp_path: Path) -> None:
    load = ("--sessions", "5", "--turns", "4", "--concurrency", "2", "--max-tokens", "4")
    program = (sys.executable, "-m", "benchmarks.pins")
    done = finished(tmp_path, *program, *load, "--json", "seen.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pinned: 15 of 15 later turns stayed" in done.stdout
    assert (tmp_path / "pins.svg").read_text("utf-8").startswith("<?xml")
    seen = json.loads((tmp_path / "seen.json").read_text("utf-8"))
    arms = seen["arms"]
    assert arms["keyed"]["kept"] == 15
    # Each later prompt is the prompt before, the reply, and a little more.
    assert arms["keyed"]["cached_share"] > 0.6
    # Turns that moved found less in the cache than turns that stayed.
    moved = [turn for turn in seen["turns"] if turn["outcome"] == "moved"]
    cached, prompts = (sum(turn[name] for turn in moved) for name in TOKENS)
    assert arms["keyed"]["cached_share"] > cached / prompts


def test_piped_output_has_no_control_codes_and_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    with in_background(gateway("manual", workers=4)) as smg:
        run = verify(tmp_path, smg.url, program=True)
    assert (run.status, run.err) == (0, ""), run.out
    assert all(char == "\n" or char.isprintable() for char in run.out)
    assert max(map(len, run.out.splitlines())) <= 80
    assert all(line == line.rstrip() for line in run.out.splitlines())
