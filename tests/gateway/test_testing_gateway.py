import sys
from dataclasses import replace
from importlib.machinery import BuiltinImporter
from pathlib import Path

import pytest
from aiohttp import ClientSession

from aiohttp_smg_routing import Routing, routing_session
from aiohttp_smg_routing.testing import StartSmgGateway, free_port, smg_gateway
from harness.agents import CHAT, chat
from harness.processes import local_url

from ..smg import names_workers
from ..turns import answered
from .loaded import POLLS, loaded_workers


async def test_missing_gateway_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])  # finds no installed package
    monkeypatch.delitem(sys.modules, "smg", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'aiohttp_smg_routing\[gateway\]'"):
        async with smg_gateway([local_url(free_port())], policy="manual"):
            raise AssertionError("it is not installed")


async def test_pinned_is_all_calls_on_one_of_the_workers(smg_gateway: StartSmgGateway) -> None:
    smg = await smg_gateway(3, policy="manual")
    assert len(smg.workers) == 3
    hook = Routing({"gateway": str(smg.url)}).trace_config()
    async with ClientSession(trace_configs=[hook]) as session:
        for session_id in ("s-1", "s-2", "s-1"):
            with routing_session(session_id):
                body = chat("s-1")
                async with session.post(smg.url / CHAT, json=body) as response:
                    assert (await response.json())["choices"][0]["message"]["content"] == "ok"
    smg.assert_pinned("s-1", turns=2)
    smg.assert_pinned("s-2")
    assert +await smg.branches() == {"vacant": 2, "occupied_hit": 1}


async def test_not_pinned_is_calls_on_several_workers(smg_gateway: StartSmgGateway) -> None:
    smg = await smg_gateway(2, policy="round_robin")  # ignores the key
    hook = Routing({"gateway": str(smg.url)}).trace_config()
    async with ClientSession(trace_configs=[hook]) as session:
        for _ in range(4):
            with routing_session("s-1"):
                body = chat("s-1")
                async with session.post(smg.url / CHAT, json=body):
                    pass
    with pytest.raises(AssertionError, match="its key 's-1' came to 2 workers"):
        smg.assert_pinned("s-1", turns=4)


@names_workers  # older gateways don't poll the load
async def test_an_overloaded_worker_keeps_its_sessions(smg_gateway: StartSmgGateway) -> None:
    async with loaded_workers(2) as workers:
        recorders = [worker.recorder for worker in workers]
        urls = [recorder.url for recorder in recorders]
        smg = await smg_gateway(urls, policy="manual", args=POLLS)
        hook = Routing({"gateway": str(smg.url)}).trace_config()
        async with ClientSession(trace_configs=[hook]) as session:
            for kv_usage in (0.1, 0.95):
                await workers[0].report(kv_usage=kv_usage)
                for number in range(8):
                    with routing_session(f"s-{number}"):
                        await answered(session, smg.url / CHAT, json=chat("s"))
        for number in range(8):
            replace(smg, workers=tuple(recorders)).assert_pinned(f"s-{number}", turns=2)


@pytest.mark.parametrize(
    ("release", "policy", "is_changed"),
    [
        ("1.10.1", "consistent_hashing", True),
        ("1.10.1", "manual", False),
        ("1.11.0", "consistent_hashing", False),
    ],
)
async def test_a_worker_is_changed_so_that_smg_1_10_builds_its_hash_ring_again(
    smg_gateway: StartSmgGateway,
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    policy: str,
    is_changed: bool,
) -> None:
    monkeypatch.setattr("aiohttp_smg_routing.testing.gateway.version", lambda _: release)
    smg = await smg_gateway(2, policy=policy)
    async with ClientSession() as session, session.get(smg.url / "workers") as response:
        workers = (await response.json())["workers"]
    labels = [{*worker["labels"]} for worker in workers]
    assert ["hash_ring" in its for its in labels].count(True) == is_changed
    assert all("model_path" in its for its in labels), "a label was lost"


async def test_a_hash_ring_that_is_not_built_again_in_time_is_an_error_with_a_remedy(
    smg_gateway: StartSmgGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiohttp_smg_routing.testing.gateway.version", lambda _: "1.10.1")
    monkeypatch.setattr("aiohttp_smg_routing.testing.gateway.START_SECONDS", 0)
    with pytest.raises(RuntimeError, match=r"hash ring .*: use SMG 1\.11 or newer"):
        await smg_gateway(2, policy="consistent_hashing")


@pytest.mark.parametrize(("release", "starts"), [("1.9.0", 2), ("1.10.0", 1)])
async def test_a_gateway_of_smg_1_9_that_does_not_start_is_started_again(
    smg_gateway: StartSmgGateway,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    release: str,
    starts: int,
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho started >> {tmp_path}/starts\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("aiohttp_smg_routing.testing.gateway.version", lambda _: release)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(RuntimeError, match="did not start"):
        await smg_gateway(1, policy="manual")
    assert (tmp_path / "starts").read_text() == "started\n" * starts


async def test_the_second_start_of_smg_1_9_is_a_whole_gateway(
    smg_gateway: StartSmgGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\nmkdir {tmp_path}/started && exit 1\nexec {sys.executable} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("aiohttp_smg_routing.testing.gateway.version", lambda _: "1.9.0")
    monkeypatch.setattr(sys, "executable", str(program))
    smg = await smg_gateway(2, policy="manual")
    assert len(smg.workers) == 2
    assert (tmp_path / "started").is_dir()


async def test_another_gateway_on_the_port_is_not_taken_for_the_one_that_starts(
    smg_gateway: StartSmgGateway,
) -> None:
    other = await smg_gateway(1, policy="manual")
    with pytest.raises(RuntimeError, match="did not start"):
        await smg_gateway(1, policy="manual", port=other.url.port)


async def test_a_gateway_that_wants_an_api_key_is_an_error_with_a_remedy(
    smg_gateway: StartSmgGateway,
) -> None:
    said = r"did not start: it answers GET /workers with 401: leave out its API key\. The end of"
    with pytest.raises(RuntimeError, match=said):
        await smg_gateway(1, policy="manual", args=("--api-key", "sesame"))
