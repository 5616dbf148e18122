"""``pin_by`` on the real gateway: calls with equal values in the template share a worker."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from aiohttp import ClientSession, web
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import ROUTING, Routing, SessionPin, routing_session
from aiohttp_smg_routing.testing import (
    Answer,
    Call,
    Recorder,
    SmgGateway,
    StartSmgGateway,
    answer,
    canned,
    smg_gateway,
)
from harness.agents import CHAT, CHAT_PATH, chat
from harness.proxies import CLIENT, pinned_server
from harness.workers import models, recorders

from ..smg import SMG, answer_when_all_are_there, names_workers
from ..turns import answered, turn, turns_of

SESSIONS = [f"s-{number}" for number in range(8)]
TURNS = 4
BY_MODEL = "{session_id}/{json:model}"
OVERRIDE = ["--routing-key-override"]


def engine_of(model: str) -> Callable[[Call], Answer]:
    """Return the answers of an engine that serves ``model`` only.

    A worker can't serve two models, because the gateway takes only the first that it names.
    """
    named = answer(models(model))
    return lambda call: named if call.path == "/v1/models" else canned(call)


@dataclass
class Cluster:
    smg: SmgGateway
    workers: Sequence[Recorder]

    def served(self) -> Mapping[tuple[str, str], set[URL]]:
        """Return the workers that served each session and model, by the bodies of the calls."""
        found = defaultdict(set)
        for worker in self.workers:
            for call in turns_of(worker):
                body = call.json()
                found[body["user"], body["model"]].add(worker.url)
        return found

    def on_one_worker(self, models: Sequence[str]) -> int:
        """Return how many pairs of session and model stayed on one worker."""
        served = self.served()
        assert set(served) == {(each, model) for each in SESSIONS for model in models}
        return sum(len(workers) == 1 for workers in served.values())


@asynccontextmanager
async def cluster(
    models: Sequence[str], policy: str = "manual", args: Sequence[str] = ()
) -> AsyncIterator[Cluster]:
    """Run the real gateway before two workers for each model."""
    async with recorders(2 * len(models)) as workers:
        for worker, model in zip(workers, [*models, *models], strict=True):
            worker.answer = engine_of(model)
        urls = [worker.url for worker in workers]
        async with smg_gateway(urls, policy=policy, args=args) as smg:
            yield Cluster(smg, workers)


async def play(aiohttp_client: AiohttpClient, app: web.Application, models: Sequence[str]) -> None:
    """Play turns of all sessions at once: each turn calls every model, one after the other."""
    client = await aiohttp_client(app)

    async def session(session_id: str) -> None:
        for number in range(1, TURNS + 1):
            for model in models:
                await turn(client, session_id, number, model=model)

    await asyncio.gather(*map(session, SESSIONS))


@names_workers
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("policy", "args"),
    [("manual", []), ("round_robin", OVERRIDE), ("consistent_hashing", [])],
)
async def test_each_model_of_a_session_keeps_its_worker(
    aiohttp_client: AiohttpClient, policy: str, args: list[str], count: int
) -> None:
    models = [f"model-{number}" for number in range(count)]
    pairs = len(SESSIONS) * count
    async with cluster(models, policy, args) as running:
        app = pinned_server(running.smg.url, pin_by=BY_MODEL)
        await play(aiohttp_client, app, models)
        assert running.on_one_worker(models) == pairs
        branches = +await running.smg.branches()
        if policy == "consistent_hashing":
            assert branches == {"routing_key_hit": pairs * TURNS}
        else:
            assert branches == {"vacant": pairs, "occupied_hit": pairs * (TURNS - 1)}
    pins = app[ROUTING].pins
    summary = pins.summary()
    assert (summary.first, summary.kept, summary.moved) == (pairs, pairs * (TURNS - 1), 0)
    for session_id in SESSIONS:
        rows = pins.of(session_id)
        assert {pin.session for pin in rows} == {session_id}
        assert len({pin.key for pin in rows}) == count
        workers = {pin.worker for pin in rows}
        served = [running.served()[session_id, model] for model in models]
        assert workers == {str(url.origin()) for urls in served for url in urls}


@names_workers
async def test_without_it_two_models_on_one_key_stay_but_look_as_if_they_moved(
    aiohttp_client: AiohttpClient,
) -> None:
    models = ["model-0", "model-1"]
    async with cluster(models) as running:
        app = pinned_server(running.smg.url)
        await play(aiohttp_client, app, models)
        assert running.on_one_worker(models) == len(SESSIONS) * len(models)
    summary = app[ROUTING].pins.summary()
    calls = len(SESSIONS) * len(models) * TURNS
    assert (summary.first, summary.moved) == (len(SESSIONS), calls - len(SESSIONS))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("policy", "args", "keeps_three"),
    [
        ("manual", [], False),
        ("manual", OVERRIDE, False),  # no effect under manual
        ("round_robin", OVERRIDE, SMG >= (1, 11)),
        ("consistent_hashing", [], True),
    ],
)
async def test_without_it_three_models_on_one_key_lose_their_pins_under_manual(
    aiohttp_client: AiohttpClient, policy: str, args: list[str], keeps_three: bool, count: int
) -> None:
    models = [f"model-{number}" for number in range(count)]
    async with cluster(models, policy, args) as running:
        await play(aiohttp_client, pinned_server(running.smg.url), models)
        kept = running.on_one_worker(models)
        hits = (await running.smg.branches())["occupied_hit"]
    assert (kept == len(SESSIONS) * len(models)) is (count == 2 or keeps_three)
    if not keeps_three:
        assert (hits > 0) is (count == 2)


async def test_a_turn_that_calls_a_second_model_says_so_and_each_keeps_its_worker(
    aiohttp_client: AiohttpClient,
) -> None:
    """The inbound body names one model; the handler then calls a judge model."""
    models = ["policy", "judge"]
    async with cluster(models) as running:
        app = pinned_server(running.smg.url, pin_by=BY_MODEL)
        url = running.smg.url / CHAT

        async def turn_and_verdict(request: web.Request) -> web.Response:
            session_id = request.match_info["session_id"]
            body = await request.json()
            await answered(request.app[CLIENT], url, json=body)
            with routing_session(session_id, {"json:model": "judge"}):
                body = {**body, "model": "judge"}
                async with request.app[CLIENT].post(url, json=body) as response:
                    return web.Response(status=response.status)

        app.router.add_post("/judged/{session_id}", turn_and_verdict)
        client = await aiohttp_client(app)
        for turn in range(1, TURNS + 1):
            for session_id in SESSIONS:
                body = {**chat(session_id, turn), "model": "policy"}
                await answered(client, f"/judged/{session_id}", json=body)
        pairs = len(SESSIONS) * len(models)
        assert running.on_one_worker(models) == pairs
        branches = +await running.smg.branches()
        assert branches == {"vacant": pairs, "occupied_hit": pairs * (TURNS - 1)}


def server_of_groups(smg: SmgGateway) -> web.Application:
    return pinned_server(
        smg.url, session_id="json:user", pin_by="{header:X-Group-Id}", prefix="job-7/"
    )


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
async def test_the_samples_of_a_group_share_a_worker(
    aiohttp_client: AiohttpClient, smg_gateway: StartSmgGateway, policy: str
) -> None:
    smg = await smg_gateway(4, policy=policy)
    app = server_of_groups(smg)
    client = await aiohttp_client(app)
    groups = [f"group-{number}" for number in range(16)]

    async def turn(group: str, sample: int) -> None:
        body = {**chat(f"{group}/sample-{sample}"), "group": group}
        await answered(client, CHAT_PATH, json=body, headers={"X-Group-Id": group})

    for _ in range(TURNS):
        await asyncio.gather(*(turn(group, sample) for group in groups for sample in range(4)))
    came: dict[str, set[tuple[URL, bytes]]] = defaultdict(set)
    for worker in smg.workers:
        for call in worker.calls:
            if call.method == "POST":
                [key] = call.keys
                came[call.json()["group"]].add((worker.url, key))
    # Each group has one worker, and one key that no other group has.
    assert {group: len(seen) for group, seen in came.items()} == dict.fromkeys(groups, 1)
    keys = {key for seen in came.values() for _, key in seen}
    assert len(keys) == len(groups)
    assert all(key.startswith(b"job-7/sha256-") for key in keys)
    branches = +await smg.branches()
    calls = len(groups) * 4 * TURNS
    assert branches == (
        {"vacant": len(groups), "occupied_hit": calls - len(groups)}
        if policy == "manual"
        else {"routing_key_hit": calls}
    )
    if SMG >= (1, 10):
        pins = app[ROUTING].pins
        assert (pins.summary().moved, pins.summary().sessions) == (0, len(groups) * 4)


@pytest.mark.parametrize(
    ("policy", "args"),
    [("manual", []), ("consistent_hashing", []), ("round_robin", OVERRIDE)],
)
async def test_many_calls_of_one_group_at_once_do_not_stay_together_under_the_override(
    smg_gateway: StartSmgGateway, policy: str, args: list[str]
) -> None:
    smg = await smg_gateway(4, policy=policy, args=args)
    answer_when_all_are_there(smg.workers, 16)
    routing = Routing({"gateway": str(smg.url)})

    async def call() -> None:
        with routing_session("group-1"):
            await answered(session, smg.url / CHAT, json=chat(""))

    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        await asyncio.gather(*(call() for _ in range(16)))
    served = [len(turns_of(worker)) for worker in smg.workers]
    branches = await smg.branches()
    has_cap = bool(args) and SMG >= (1, 10)
    assert sum(served) == 16
    # About 4 each: the gateway's threads may read the same count at once.
    assert (0 < min(served) <= max(served) < 8) if has_cap else max(served) == 16
    assert (branches["cap_respill"] > 0) is has_cap


async def test_a_call_outside_any_group_is_pinned_by_its_session(
    aiohttp_client: AiohttpClient, smg_gateway: StartSmgGateway
) -> None:
    smg = await smg_gateway(3, policy="manual")
    app = server_of_groups(smg)
    client = await aiohttp_client(app)
    for _ in range(TURNS):
        for session_id in SESSIONS:
            await answered(client, CHAT_PATH, json=chat(session_id))
    for session_id in SESSIONS:
        smg.assert_pinned(session_id, turns=TURNS, config=app[ROUTING].config)


@names_workers
async def test_end_drops_all_pins_of_a_session_and_no_other(smg_gateway: StartSmgGateway) -> None:
    smg = await smg_gateway(2, policy="manual")
    routing = Routing({"gateway": str(smg.url), "pin_by": "{session_id}/{header:X-Part}"})

    async def turn(session_id: str, part: str | None) -> None:
        with routing_session(session_id, {"header:X-Part": part}):
            await answered(session, smg.url / CHAT, json=chat(session_id))

    def pins(session_id: str) -> list[SessionPin]:
        return routing.pins.of(session_id)

    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        for session_id in ("s-1", "s-2"):
            for part in ("a", "b", None):
                await turn(session_id, part)
        assert [len(pins("s-1")), len(pins("s-2"))] == [3, 3]
        assert [pin.key for pin in pins("s-1")][-1] == "s-1"  # without a part the key is the id
        routing.end("s-1")
        assert (pins("s-1"), len(pins("s-2"))) == ([], 3)
        assert sum(routing.pins.workers().values()) == 3
