"""The dangers that ``docs/gateways.md`` warns of, on the gateway of this environment."""

import itertools
from collections.abc import Mapping

import pytest
from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing import Routing, RoutingConfig, routing_session
from aiohttp_smg_routing.testing import Answer, Call, SmgGateway, canned, failure
from harness.agents import CHAT, CHAT_PATH

from .launch import (
    FACTS,
    HEADER,
    is_pinned,
    launched,
    prompt,
    random_turn,
    served_by_prompt,
)

POLICIES = [launch for launch in FACTS["policies that pin"] if " " not in launch]


def bodies(session: object) -> dict[str, Mapping[str, object]]:
    """Return the body of a turn of a session for each path."""
    text = prompt(session)
    messages = [{"role": "user", "content": text}]
    return {
        CHAT_PATH: {"messages": messages},
        "/v1/completions": {"prompt": text},
        "/v1/responses": {"input": text},
        "/v1/messages": {"messages": messages, "max_tokens": 16},
        "/generate": {"text": text},
    }


PATHS = tuple(bodies(""))


@pytest.mark.parametrize("policy", POLICIES)
async def test_paths_on_which_it_pins(policy: str) -> None:
    sessions = [f"s-{number}" for number in range(16)]
    async with launched(policy) as gateway:
        routing = Routing(RoutingConfig(gateway.url, header=HEADER, paths=PATHS))
        async with ClientSession(trace_configs=[routing.trace_config()]) as session:
            for path, name, _ in itertools.product(PATHS, sessions, range(2)):
                with routing_session(name):
                    body = {"model": "stub", **bodies(name)[path]}
                    async with session.post(gateway.url.with_path(path), json=body) as response:
                        assert response.status == (200 if path in FACTS["pins on"] else 404)
        seen = {path: served_by_prompt(gateway.workers, path) for path in FACTS["pins on"]}
    assert all(seen[path].keys() == {*sessions} and is_pinned(seen[path]) for path in seen)


async def one(session: ClientSession, gateway: SmgGateway, key: str | None) -> int:
    """Make a call with that key, without the plugin; return the status."""
    headers = {HEADER: key} if key is not None else {}
    url = gateway.url / CHAT
    async with session.post(url, json=random_turn(key), headers=headers) as response:
        await response.read()
        return response.status


async def is_pinned_by(gateway: SmgGateway, tail: str) -> bool:
    """Tell whether the gateway pins keys that end in ``tail``."""
    for worker in gateway.workers:
        worker.calls.clear()
    async with ClientSession() as session:
        for number, _ in itertools.product(range(10, 26), range(3)):
            assert await one(session, gateway, f"{number}{tail}") == 200
    return is_pinned(served_by_prompt(gateway.workers))


@pytest.mark.parametrize("policy", POLICIES)
async def test_keys_that_it_takes(policy: str) -> None:
    async with launched(policy) as gateway:
        assert await is_pinned_by(gateway, "x" * 126)
        assert await is_pinned_by(gateway, "x" * 127) is (
            policy in FACTS["pins a key of 129 bytes under"]
        )
        assert await is_pinned_by(gateway, "é") is (policy in FACTS["pins a key in UTF-8 under"])


@pytest.mark.parametrize("policy", POLICIES)
async def test_calls_without_a_key(policy: str) -> None:
    async with launched(policy) as gateway, ClientSession() as session:
        for _ in range(40):
            assert await one(session, gateway, None) == 200
        workers = {*served_by_prompt(gateway.workers)["None"]}
    assert (len(workers) == 1) is (
        policy in FACTS["sends all calls without a key to one worker under"]
    )


def refuse_the_bad(call: Call) -> Answer:
    return failure(400) if b"bad" in b"".join(call.values(HEADER)) else canned(call)


@pytest.mark.parametrize("options", ["", " --disable-circuit-breaker"])
async def test_bad_requests_of_one_session(options: str) -> None:
    async with launched(POLICIES[0] + options) as gateway, ClientSession() as session:
        for worker in gateway.workers:
            worker.answer = refuse_the_bad
        answered = [await one(session, gateway, "bad") for _ in range(30)]
        others = {await one(session, gateway, f"s-{number}") for number in range(16)}
    assert answered == [400] * 30
    assert {*map(str, others)} == (
        {"200"} if options else {*FACTS["answers other sessions after 30 bad requests"]}
    )


@pytest.mark.parametrize("launch", FACTS["refuses"])
async def test_launch_that_it_refuses(launch: str) -> None:
    with pytest.raises(RuntimeError, match=r"did not start(.|\n)*error: "):
        async with launched(launch):
            raise AssertionError("it started")


async def test_its_list_of_models_is_of_openai_s_shape() -> None:
    async with (
        launched(POLICIES[0]) as gateway,
        ClientSession() as session,
        session.get(gateway.url / "v1/models") as response,
    ):
        listed = (await response.json(content_type=None))["data"]
    assert [model["id"] for model in listed] == FACTS["lists the model `stub` as"]


async def test_end_of_a_session() -> None:
    async with launched(POLICIES[0]) as gateway, ClientSession() as session:
        url: URL = gateway.url.with_path("/finish_session").with_query(session_id="s-1")
        async with session.post(url) as response:
            assert response.status == (200 if FACTS["ends a session by"] else 404)
