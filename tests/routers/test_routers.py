"""Each row in the tables of ``docs/gateways.md``, on the gateway of this environment."""

import asyncio
import functools
import itertools
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from yarl import URL

from aiohttp_smg_routing import ROUTING, PinSummary, setup
from aiohttp_smg_routing.testing import SmgGateway
from harness.agents import CHAT, WORKER_HEADER
from harness.proxies import proxy_server
from harness.servers import serve

from ..commands import LOAD, verify
from ..series import samples_of
from ..turns import answered, forget
from ..verify_servers import in_background
from .launch import FACTS, HEADER, is_pinned, launched, random_turn, served_by_prompt

SESSIONS = [f"s-{number}" for number in range(16)]
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


async def play_on_a_server(gateway: SmgGateway) -> PinSummary:
    """Play the sessions through a session server with the plugin; return the ledger's summary."""
    app = router_server(gateway.url)
    async with serve(app) as server, ClientSession() as client:

        async def one(session_id: str) -> None:
            url = server / "sessions" / session_id / CHAT
            await answered(client, url, json=random_turn(session_id))

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


def verified(folder: Path, gateway: SmgGateway, *options: str | URL) -> int:
    """Run ``verify`` on the gateway; return its exit status."""
    named = ("--metrics", gateway.metrics_url, "--header", HEADER)
    run = verify(folder, gateway.url, *LOAD, *named, *options)
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
def test_policy_pins_each_session(tmp_path: Path, launch: str) -> None:
    with in_background(launched(launch)) as gateway:
        summary = asyncio.run(play_on_a_server(gateway))
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
        assert asyncio.run(choices(gateway)) == {launch.split()[0]: CALLS}
        forget(*gateway.workers)
        status = verified(tmp_path, gateway)
        assert is_pinned(by_key(gateway))
    assert [str(status)] == FACTS["`verify`, pinning policy"]


@pytest.mark.parametrize("launch", FACTS["policies that do not"])
def test_policy_does_not_pin(tmp_path: Path, launch: str) -> None:
    with in_background(launched(launch)) as gateway:
        summary = asyncio.run(play_on_a_server(gateway))
        assert not is_pinned(served_by_prompt(gateway.workers))
        if FACTS["names its worker in"]:
            later = summary.kept + summary.moved
            assert (summary.first, later) == (len(SESSIONS), CALLS - len(SESSIONS))
        else:
            assert summary == PinSummary(unknown=CALLS, sessions=len(SESSIONS))
        assert asyncio.run(choices(gateway)) == {launch: CALLS}
        status = verified(tmp_path, gateway)
    assert str(status) in FACTS["`verify`, other policy"]


@pytest.fixture(scope="module")
def shared() -> Iterator[SmgGateway]:
    """Run a gateway that pins, for the tests of session servers: each run has new sessions."""
    with in_background(launched(FACTS["policies that pin"][0])) as gateway:
        yield gateway


@pytest.fixture
def pinning(shared: SmgGateway) -> SmgGateway:
    """Return a gateway that pins, whose workers have received nothing."""
    forget(*shared.workers)
    return shared


@pytest.mark.parametrize(
    ("enabled", "options", "column"),
    [
        (True, [], "`verify --through`"),
        (True, ["--concurrency", "1"], "with `--concurrency 1`"),
        (False, [], None),
    ],
)
def test_verify_through_a_session_server(
    pinning: SmgGateway, tmp_path: Path, enabled: bool, options: list[str], column: str | None
) -> None:
    with in_background(serve(router_server(pinning.url, enabled=enabled))) as server:
        status = verified(tmp_path, pinning, "--through", server, *options)
    assert bool(by_key(pinning)) is enabled
    assert not enabled or is_pinned(by_key(pinning))
    assert [str(status)] == (FACTS[column] if column else ["1"])


OTHER_KEYS: dict[str, Callable[[], str]] = {
    "new each turn": lambda: secrets.token_hex(8),
    "of 24 in turn": functools.partial(next, map("slot-{}".format, itertools.cycle(range(24)))),
    "one for all": lambda: "all",
}


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_verify_says_pinned_of_no_session_server_that_sends_other_keys_than_the_sessions(
    pinning: SmgGateway, tmp_path: Path, key: str
) -> None:
    app = router_server(pinning.url, session_id=lambda request: OTHER_KEYS[key]())
    with in_background(serve(app)) as server:
        assert verified(tmp_path, pinning, "--through", server) != 0
    assert any(call.values(HEADER) for worker in pinning.workers for call in worker.calls)
