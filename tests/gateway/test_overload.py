"""Worker overload protection moves sessions; SMG 1.12 and newer have it on by default."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import ROUTING, PinLedger
from aiohttp_smg_routing.testing import SmgGateway, smg_gateway
from harness.proxies import pinned_server

from ..series import samples_of
from ..smg import SMG, names_workers
from ..turns import forget, play_sessions, served
from .loaded import POLLS, Kind, LoadedWorker, loaded_workers, report

if TYPE_CHECKING:
    from ..turns import Client

SESSIONS = [f"s-{number}" for number in range(30)]
IS_DEFAULT = SMG >= (1, 12)
# 1.10 and 1.11 take the first flag too, and have the protection off by default.
ON = ("--worker-overload-protection",) if IS_DEFAULT else ()
OFF = ("--disable-worker-overload-protection",) if IS_DEFAULT else ()


@dataclass
class Sessions:
    """A session server with the plugin in front of the real gateway and three workers."""

    smg: SmgGateway
    workers: Sequence[LoadedWorker]
    client: "Client"
    pins: PinLedger

    async def turn(self) -> dict[str, LoadedWorker]:
        """Play a turn of each session; return the worker that received it."""
        forget(*(worker.recorder for worker in self.workers))
        await play_sessions(self.client, SESSIONS)
        return {each: worker for worker in self.workers for each in served(worker.recorder)}

    async def counts(self, name: str) -> float | None:
        """Return the sum of a series of the gateway over its labels, or None if it is absent."""
        samples = await samples_of(self.smg.metrics_url)
        values = [sample.value for sample in samples if sample.name == name]
        return sum(values) if values else None


@asynccontextmanager
async def before_three_workers(
    aiohttp_client: AiohttpClient, policy: str, *args: str, kind: Kind = "vllm"
) -> AsyncIterator[Sessions]:
    async with loaded_workers(3, kind) as workers:
        urls = [worker.recorder.url for worker in workers]
        async with smg_gateway(urls, policy=policy, args=[*POLLS, *args]) as smg:
            app = pinned_server(smg.url)
            yield Sessions(smg, workers, await aiohttp_client(app), app[ROUTING].pins)


def moved(before: dict[str, LoadedWorker], after: dict[str, LoadedWorker]) -> set[str]:
    """Return the sessions that are on another worker."""
    return {session_id for session_id in SESSIONS if before[session_id] is not after[session_id]}


def test_the_protection_is_on_by_default_since_1_12() -> None:
    arguments = import_module("smg.router_args").RouterArgs
    assert getattr(arguments, "worker_overload_protection", False) is IS_DEFAULT


@names_workers
@pytest.mark.parametrize(
    ("policy", "args", "come_back"),
    [
        ("manual", ["--assignment-mode", "min_group"], True),
        ("consistent_hashing", [], True),
        ("round_robin", ["--routing-key-override"], False),  # they stay where they moved
    ],
)
async def test_the_sessions_of_an_overloaded_worker_move(
    aiohttp_client: AiohttpClient, policy: str, args: list[str], come_back: bool
) -> None:
    async with before_three_workers(aiohttp_client, policy, *args, *ON) as sessions:
        first = await sessions.turn()
        hot = sessions.workers[0]
        its_own = {session_id for session_id, worker in first.items() if worker is hot}
        assert 0 < len(its_own) < len(SESSIONS)
        expected = its_own if IS_DEFAULT else set()

        await hot.report(kv_usage=0.95)
        assert moved(first, await sessions.turn()) == expected
        assert await sessions.counts("smg_workers_overloaded") == (1 if expected else None)
        assert sessions.pins.summary().moved == len(expected)
        assert {pin.session for pin in sessions.pins.sessions() if pin.moves} == expected

        await hot.report(kv_usage=0.1)
        assert moved(first, await sessions.turn()) == (set() if come_back else expected)
        assert sessions.pins.summary().moved == len(expected) * (2 if come_back else 1)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@names_workers
async def test_a_kv_usage_of_four_fifths_or_eight_waiting_calls_are_an_overload(
    aiohttp_client: AiohttpClient, kind: Kind
) -> None:
    async with before_three_workers(aiohttp_client, "manual", *ON, kind=kind) as sessions:
        first = await sessions.turn()
        hot = first[SESSIONS[0]]
        its_own = {session_id for session_id, worker in first.items() if worker is hot}
        await hot.report(kv_usage=0.79, waiting=7)
        assert moved(first, await sessions.turn()) == set()
        await hot.report(waiting=8)
        assert moved(first, await sessions.turn()) == (its_own if IS_DEFAULT else set())
        await hot.report(kv_usage=0.8)
        assert moved(first, await sessions.turn()) == (its_own if IS_DEFAULT else set())


@names_workers
async def test_the_limits_can_be_set(aiohttp_client: AiohttpClient) -> None:
    # The limits also switch the protection on in 1.10 and 1.11.
    limits = ("--worker-overload-token-usage", "1.0", "--worker-overload-waiting-requests", "100")
    kind: Kind = "sglang --enable-metrics"
    async with before_three_workers(aiohttp_client, "manual", *limits, kind=kind) as sessions:
        first = await sessions.turn()
        hot = first[SESSIONS[0]]
        await hot.report(kv_usage=0.99, waiting=99)
        assert moved(first, await sessions.turn()) == set()
        await hot.report(kv_usage=0.1, waiting=100)
        assert SESSIONS[0] in moved(first, await sessions.turn())


@names_workers
async def test_where_every_worker_is_overloaded_no_call_goes_by_its_key(
    aiohttp_client: AiohttpClient,
) -> None:
    async with before_three_workers(aiohttp_client, "manual", *ON) as sessions:
        first = await sessions.turn()
        await report(sessions.workers, kv_usage=0.95)
        went = moved(first, await sessions.turn())
        assert bool(went) is IS_DEFAULT  # each stays by a chance of one third
        assert sessions.pins.summary().moved == len(went)
        turns = len(SESSIONS) if IS_DEFAULT else 0
        assert (await sessions.smg.branches())["no_healthy_workers"] == turns
        assert (await sessions.counts("smg_worker_overload_fallback_total") or 0) == turns
        assert (await sessions.counts("smg_workers_overloaded") or 0) == (3 if turns else 0)

        await report(sessions.workers, kv_usage=0.1)
        assert moved(first, await sessions.turn()) == set()


@names_workers
@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
async def test_without_the_protection_no_session_moves(
    aiohttp_client: AiohttpClient, policy: str
) -> None:
    async with before_three_workers(aiohttp_client, policy, *OFF) as sessions:
        first = await sessions.turn()
        for overloaded in (sessions.workers[:1], sessions.workers):
            await report(overloaded, kv_usage=0.95, waiting=100)
            assert moved(first, await sessions.turn()) == set()
        assert sessions.pins.summary().moved == 0
        assert not (await sessions.smg.branches())["no_healthy_workers"]
        # The gateway still knows the load; no series says that the protection is off.
        assert await sessions.counts("smg_engine_token_usage") == pytest.approx(3 * 0.95)
        assert await sessions.counts("smg_workers_overloaded") is None
