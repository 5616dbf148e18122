"""Data-parallel ranks: under ``--dp-aware`` each is a worker for SMG."""

import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import ClientSession

from aiohttp_smg_routing import PinSummary, Routing, routing_session
from aiohttp_smg_routing.testing import (
    Answer,
    Call,
    Recorder,
    SmgGateway,
    answer,
    canned,
    smg_gateway,
)
from harness.agents import CHAT, chat
from harness.workers import models, recorders

from ..smg import SMG
from ..turns import answered, turns_of

SESSIONS = [f"s-{number}" for number in range(24)]


def engine_of_two_ranks(call: Call) -> Answer:
    """Answer as SGLang does, the only engine that SMG asks for its ranks."""
    if call.path == "/v1/models":
        return answer(models(owned_by="sglang"))
    if call.path == "/server_info":
        return answer({"model_id": "stub", "model_path": "stub", "dp_size": 2})
    return canned(call)


@asynccontextmanager
async def gateway_of_ranks() -> AsyncIterator[tuple[SmgGateway, Sequence[Recorder]]]:
    async with recorders(2) as workers:
        for worker in workers:
            worker.answer = engine_of_two_ranks
        urls = [worker.url for worker in workers]
        async with smg_gateway(urls, policy="manual", args=["--dp-aware"]) as smg:
            yield smg, workers


async def test_each_session_stays_on_one_rank_and_the_ledger_names_it() -> None:
    async with gateway_of_ranks() as (smg, workers):
        routing = Routing({"gateway": str(smg.url)})
        async with ClientSession(trace_configs=[routing.trace_config()]) as session:
            for _, name in itertools.product(range(4), SESSIONS):
                with routing_session(name):
                    await answered(session, smg.url / CHAT, json=chat(name))
        served = defaultdict(set)
        for worker in workers:
            for body in [call.json() for call in turns_of(worker)]:
                served[body["user"]].add(f"{worker.url}@{body['data_parallel_rank']}")
    assert {len(ranks) for ranks in served.values()} == {1}
    assert len(set.union(*served.values())) > 2  # more ranks than workers
    if SMG < (1, 10):
        return
    later = 3 * len(SESSIONS)
    assert routing.pins.summary() == PinSummary(first=24, kept=later, sessions=24)
    assert {name: {routing.pins.of(name)[0].worker} for name in SESSIONS} == served
