"""Anthropic's SDK through a proxy of its API, streamed and not, before the real gateway."""

import asyncio
from typing import Any

import pytest
from anthropic import AsyncAnthropic, DefaultAioHttpClient
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import RoutingConfig, setup
from aiohttp_smg_routing.testing import Answer, Call, StartSmgGateway, answer, canned

from .serving import SESSIONS, TURNS
from .unedited import make_app

EVENTS = b"""\
event: message_start
data: {"type":"message_start","message":{"id":"m","type":"message","role":"assistant",\
"model":"stub","content":[],"usage":{"input_tokens":1,"output_tokens":1}}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"ok"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_stop
data: {"type":"message_stop"}

"""


def streamed(call: Call) -> Answer:
    if call.path == "/v1/messages" and call.json().get("stream"):
        return answer(EVENTS, headers={"Content-Type": "text/event-stream"})
    return canned(call)


@pytest.mark.parametrize("stream", [False, True])
async def test_each_session_stays_on_one_worker(
    smg_gateway: StartSmgGateway, aiohttp_client: AiohttpClient, stream: bool
) -> None:
    smg = await smg_gateway(3, policy="manual")
    for worker in smg.workers:
        worker.answer = streamed
    app = make_app(smg.url)
    setup(
        app,
        RoutingConfig(
            smg.url,
            instrument=True,
            session_id="json:metadata.user_id",
            paths=["/v1/messages"],
        ),
    )
    url = str((await aiohttp_client(app)).make_url("/"))

    async def agent(session_id: str) -> None:
        http_client = DefaultAioHttpClient()
        async with AsyncAnthropic(base_url=url, api_key="none", http_client=http_client) as sdk:
            for _ in range(TURNS):
                turn: Any = {
                    "model": "stub",
                    "max_tokens": 16,
                    "messages": [{"role": "user", "content": "hello"}],
                    "metadata": {"user_id": session_id},
                }
                if stream:
                    async with sdk.messages.stream(**turn) as events:
                        message = await events.get_final_message()
                else:
                    message = await sdk.messages.create(**turn)
                assert message.content[0].text == "ok"  # type: ignore[union-attr]

    await asyncio.gather(*map(agent, SESSIONS))
    for session_id in SESSIONS:
        smg.assert_pinned(session_id, turns=TURNS)
    count = len(SESSIONS)
    assert +await smg.branches() == {"vacant": count, "occupied_hit": count * (TURNS - 1)}
