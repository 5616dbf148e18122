"""Each row in the tables of ``docs/gateways.md``, on the gateway of this environment."""

import asyncio
import functools
import itertools
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import ROUTING, PinSummary, setup
from aiohttp_smg_routing.testing import SmgGateway
from harness.agents import WORKER_HEADER
from harness.proxies import proxy_server

from ..commands import verify
from ..series import samples_of
from .launch import FACTS, HEADER, is_pinned, launched, random_turn, served_by_prompt

SESSIONS = [f"s-{number}" for number in range(24)]
TURNS = 4
CALLS = len(SESSIONS) * TURNS


def router_server(upstream: URL, **config: object) -> web.Application:
    """Return a session server with the plugin that passes on the gateway's answers."""
    app = proxy_server(
        upstream,
        lambda request: {"Content-Type": "application/json"},
        frozenset({"Content-Type", WORKER_HEADER}),
    )
    setup(app, {"gateway": str(upstream), "client_session": "client", "header": HEADER, **config})
    return app


async def play(aiohttp_client: AiohttpClient, gateway: SmgGateway) -> PinSummary:
    """Play the sessions through a session server with the plugin; return the ledger's summary."""
    app = router_server(gateway.url)
    client = await aiohttp_client(app)

    async def one(session_id: str) -> None:
        path = f"/sessions/{session_id}/v1/chat/completions"
        async with client.post(path, json=random_turn(session_id)) as response:
            assert response.status == 200, await response.text()

    for _ in range(TURNS):  # in random order, so that round_robin doesn't look pinned
        await asyncio.gather(*map(one, random.sample(SESSIONS, len(SESSIONS))))
    return app[ROUTING].pins.summary()


async def choices(gateway: SmgGateway) -> Counter[str]:
    """Return how often each policy chose a worker, by the gateway's counters."""
    [series] = FACTS["counts its choices in"]
    found: Counter[str] = Counter()
    for sample in await samples_of(gateway.metrics_url):
        if sample.name == series:
            found[sample.labels["policy"]] += int(sample.value)
    return found


async def verified(folder: Path, gateway: SmgGateway, *options: str) -> int:
    """Run ``verify`` on the gateway; return its exit status."""
    named = ("--metrics", str(gateway.metrics_url), "--header", HEADER, *options)
    run = await asyncio.to_thread(verify, folder, gateway.url, *named, program=True)
    if run.json["arms"]["keyed"]["kept"] is None:  # the turns' workers are unknown
        assert "stayed" not in run.out + run.err
    return run.status


def by_key(gateway: SmgGateway) -> dict[bytes, list[URL]]:
    """Return the workers that received each key's calls, for keys with more than one call."""
    found = defaultdict(list)
    for worker in gateway.workers:
        for call in worker.calls:
            for key in call.values(HEADER):
                found[key].append(worker.url)
    return {key: urls for key, urls in found.items() if len(urls) > 1}


@pytest.mark.parametrize("launch", sorted({*FACTS["launch it with"], *FACTS["policies that pin"]}))
async def test_policy_pins_each_session(
    aiohttp_client: AiohttpClient, tmp_path: Path, launch: str
) -> None:
    async with launched(launch) as gateway:
        summary = await play(aiohttp_client, gateway)
        assert is_pinned(served_by_prompt(gateway.workers))
        assert is_pinned(by_key(gateway))
        assert {name: len(urls) for name, urls in by_key(gateway).items()} == {
            session_id.encode(): TURNS for session_id in SESSIONS
        }
        if FACTS["names its worker in"]:
            first = len(SESSIONS)
            assert summary == PinSummary(first=first, kept=CALLS - first, sessions=first)
        else:
            assert summary == PinSummary(unknown=CALLS, sessions=len(SESSIONS))
        assert await choices(gateway) == {launch.split()[0]: CALLS}
        for worker in gateway.workers:
            worker.calls.clear()
        status = await verified(tmp_path, gateway)
        assert is_pinned(by_key(gateway))
    assert [str(status)] == FACTS["`verify`, pinning policy"]


@pytest.mark.parametrize("launch", FACTS["policies that do not"])
async def test_policy_does_not_pin(
    aiohttp_client: AiohttpClient, tmp_path: Path, launch: str
) -> None:
    async with launched(launch) as gateway:
        summary = await play(aiohttp_client, gateway)
        assert not is_pinned(served_by_prompt(gateway.workers))
        if FACTS["names its worker in"]:
            later = summary.kept + summary.moved
            assert (summary.first, later) == (len(SESSIONS), CALLS - len(SESSIONS))
        else:
            assert summary == PinSummary(unknown=CALLS, sessions=len(SESSIONS))
        assert await choices(gateway) == {launch: CALLS}
        status = await verified(tmp_path, gateway)
    assert str(status) in FACTS["`verify`, other policy"]


@pytest.mark.parametrize(
    ("enabled", "options", "column"),
    [
        (True, [], "`verify --through`"),
        (True, ["--concurrency", "1"], "with `--concurrency 1`"),
        (False, [], None),
    ],
)
async def test_verify_through_a_session_server(
    aiohttp_client: AiohttpClient,
    tmp_path: Path,
    enabled: bool,
    options: list[str],
    column: str | None,
) -> None:
    async with launched(FACTS["policies that pin"][0]) as gateway:
        client = await aiohttp_client(router_server(gateway.url, enabled=enabled))
        server = str(client.make_url("/")).rstrip("/")
        status = await verified(tmp_path, gateway, "--through", server, *options)
        assert bool(by_key(gateway)) is enabled
        assert not enabled or is_pinned(by_key(gateway))
    assert [str(status)] == (FACTS[column] if column else ["1"])


OTHER_KEYS: dict[str, Callable[[], str]] = {
    "new each turn": lambda: secrets.token_hex(8),
    "of 24 in turn": functools.partial(next, map("slot-{}".format, itertools.cycle(range(24)))),
    "one for all": lambda: "all",
}


@pytest.mark.parametrize("key", OTHER_KEYS)
async def test_verify_says_pinned_of_no_session_server_that_sends_other_keys_than_the_sessions(
    aiohttp_client: AiohttpClient, tmp_path: Path, key: str
) -> None:
    async with launched(FACTS["policies that pin"][0]) as gateway:
        app = router_server(gateway.url, session_id=lambda request: OTHER_KEYS[key]())
        client = await aiohttp_client(app)
        server = str(client.make_url("/")).rstrip("/")
        assert await verified(tmp_path, gateway, "--through", server) != 0
        assert any(call.values(HEADER) for worker in gateway.workers for call in worker.calls)
