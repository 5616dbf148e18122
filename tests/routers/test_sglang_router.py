"""Behaviour specific to sglang-router."""

import itertools

from aiohttp import ClientSession

from aiohttp_smg_routing.testing import Answer, Call, SmgGateway, canned, failure
from harness.agents import CHAT, CHAT_PATH

from .launch import HEADER, launched, random_turn, served_by_prompt

SESSIONS = [f"s-{number}" for number in range(24)]


def refuse_the_bad(call: Call) -> Answer:
    return failure(400) if b"<bad>" in call.body else canned(call)


async def turn(session: ClientSession, gateway: SmgGateway, name: str) -> int:
    url, body = gateway.url / CHAT, {**random_turn(name), "user": name}
    async with session.post(url, json=body, headers={HEADER: name}) as response:
        return response.status


async def test_ten_bad_requests_move_the_other_sessions_of_their_worker() -> None:
    async with launched("manual") as gateway, ClientSession() as session:
        for worker in gateway.workers:
            worker.answer = refuse_the_bad
        for name in SESSIONS:
            assert await turn(session, gateway, name) == 200
        assert [await turn(session, gateway, "bad") for _ in range(10)] == [400] * 10
        for name in SESSIONS:
            assert await turn(session, gateway, name) == 200
        found = served_by_prompt(gateway.workers)
    [ill] = {*found.pop("bad")}
    before = [name for name in SESSIONS if ill in found[name]]
    moved = [name for name in SESSIONS if len({*found[name]}) > 1]
    assert moved == before
    assert before


async def test_it_leaves_the_user_out_of_the_body() -> None:
    async with launched("manual") as gateway, ClientSession() as session:
        assert await turn(session, gateway, "s-1") == 200
        calls = [*itertools.chain(*(worker.calls for worker in gateway.workers))]
    [body] = [call.json() for call in calls if call.path == CHAT_PATH]
    assert "user" not in body
