"""Data-parallel ranks, each of which is a worker to SMG under ``--dp-aware``."""

import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import ClientSession

from aiohttp_smg_routing import PinSummary, Routing, routing_session
from aiohttp_smg_routing.testing import (
    Answer,
    Call,
    Recorder,
    SmgGateway,
    answer,
    canned,
    recording_gateway,
    smg_gateway,
)
from harness.agents import chat

from ..smg import SMG

SESSIONS = [f"s-{number}" for number in range(24)]


def engine_of_two_ranks(call: Call) -> Answer:
    """Answer as SGLang: SMG asks it alone for its ranks, and not vLLM."""
    if call.path == "/v1/models":
        model = {"id": "stub", "object": "model", "owned_by": "sglang", "root": "stub"}
        return answer({"object": "list", "data": [{**model, "max_model_len": 4096}]})
    if call.path == "/server_info":
        return answer({"model_id": "stub", "model_path": "stub", "dp_size": 2})
    return canned(call)


@asynccontextmanager
async def gateway_of_ranks() -> AsyncIterator[tuple[SmgGateway, Sequence[Recorder]]]:
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(2):
            workers.append(await stack.enter_async_context(recording_gateway()))
            workers[-1].answer = engine_of_two_ranks
        urls = [worker.url for worker in workers]
        context = smg_gateway(urls, policy="manual", args=["--dp-aware"])
        yield await stack.enter_async_context(context), workers


async def test_each_session_stays_on_one_rank_and_the_ledger_names_it() -> None:
    async with gateway_of_ranks() as (smg, workers):
        routing = Routing({"gateway": str(smg.url)})
        async with ClientSession(trace_configs=[routing.trace_config()]) as session:
            for _, name in itertools.product(range(4), SESSIONS):
                with routing_session(name):
                    url = smg.url / "v1/chat/completions"
                    async with session.post(url, json=chat(name)) as response:
                        assert response.status == 200
        served = defaultdict(set)
        for worker in workers:
            bodies = [call.json() for call in worker.calls if call.method == "POST"]
            for body in bodies:
                served[body["user"]].add(f"{worker.url}@{body['data_parallel_rank']}")
    assert {len(ranks) for ranks in served.values()} == {1}
    assert len(set.union(*served.values())) > 2  # more than workers
    if SMG < (1, 10):
        return
    later = 3 * len(SESSIONS)
    assert routing.pins.summary() == PinSummary(first=24, kept=later, sessions=24)
    assert {name: {routing.pins.of(name)[0].worker} for name in SESSIONS} == served
