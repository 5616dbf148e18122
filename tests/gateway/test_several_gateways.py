"""One ledger for two real gateways: it shows the sessions that they split."""

import asyncio
from collections.abc import Sequence

import pytest
from aiohttp import ClientSession

from aiohttp_smg_routing import PinSummary, Routing, routing_session
from aiohttp_smg_routing.testing import SmgGateway
from harness.agents import CHAT, chat
from harness.workers import recorders

from ..gateways import gateways
from ..smg import names_workers
from ..turns import answered, assert_keys, served, turns_of

SESSIONS = [f"s-{number}" for number in range(24)]
TURNS = 8


async def play(both: Sequence[SmgGateway], *, turns: int = TURNS) -> Routing:
    """Play all sessions at once, each turn on the next gateway; return the routing."""
    routing = Routing({"gateway": [str(gateway.url) for gateway in both]})

    async def play_session(number: int, session_id: str) -> None:
        with routing_session(session_id):
            for turn in range(turns):
                url = both[(number + turn) % len(both)].url / CHAT
                await answered(session, url, json=chat(session_id))

    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        await asyncio.gather(*(play_session(*each) for each in enumerate(SESSIONS)))
    return routing


@names_workers
async def test_two_manual_gateways_before_the_same_workers_show_each_session_that_they_split() -> (
    None
):
    async with recorders(2) as workers, gateways(workers, workers, policy="manual") as both:
        routing = await play(both)
        assert_keys(turns_of(*workers))
        split = {each for each, at in served(*workers).items() if len(at) > 1}
    assert 0 < len(split) < len(SESSIONS)  # each gateway picks its own worker
    assert {pin.session for pin in routing.pins.sessions() if pin.moves} == split
    assert {len(routing.pins.of(each)) for each in SESSIONS} == {1}  # one pin
    assert routing.pins.summary().sessions == len(SESSIONS)


@names_workers
@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
async def test_gateways_with_workers_of_their_own_split_nothing(policy: str) -> None:
    async with (
        recorders(2) as first,
        recorders(2) as second,
        gateways(first, second, policy=policy) as both,
    ):
        routing = await play(both)
        assert {len(at) for at in served(*first, *second).values()} == {2}
    calls, pins = len(SESSIONS) * TURNS, len(SESSIONS) * len(both)
    assert routing.pins.summary() == PinSummary(
        first=pins, kept=calls - pins, sessions=len(SESSIONS)
    )
    for session_id in SESSIONS:
        rows = routing.pins.of(session_id)
        assert {pin.gateway for pin in rows} == {str(gateway.url) for gateway in both}
        assert {pin.worker for pin in rows} == {*map(str, served(*first, *second)[session_id])}


@names_workers
async def test_one_worker_in_common_is_enough_to_show_the_split() -> None:
    """Each gateway also has a worker of its own. Overlapping sets of workers are one cluster."""
    async with (
        recorders(3) as (own, common, others),
        gateways([own, common], [common, others], policy="manual") as both,
    ):
        routing = await play(both)
        split = {each for each, at in served(own, common, others).items() if len(at) > 1}
    assert split
    assert {pin.session for pin in routing.pins.sessions() if pin.moves} == split


@names_workers
async def test_consistent_hashing_before_the_same_workers_splits_nothing() -> None:
    async with (
        recorders(3) as workers,
        gateways(workers, workers, policy="consistent_hashing") as both,
    ):
        routing = await play(both)
        assert {len(at) for at in served(*workers).values()} == {1}
    summary = routing.pins.summary()
    # A session may count as first on both, until the ledger knows that they share a worker.
    assert (summary.moved, summary.first + summary.kept) == (0, len(SESSIONS) * TURNS)
    assert not any(pin.moves for pin in routing.pins.sessions())
