"""A server without the plugin in front of the real gateway, pinned by config alone."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import RoutingConfig, setup
from aiohttp_smg_routing.testing import StartSmgGateway
from harness.agents import CHAT_PATH, chat

from .serving import SESSIONS, TURNS, assert_gateway_pinned, by_body, play
from .unedited import make_app


def by_metadata(session_id: str) -> Mapping[str, Any]:
    return {"path": CHAT_PATH, "json": {**chat("someone"), "metadata": {"session_id": session_id}}}


def by_streamed_body(session_id: str) -> Mapping[str, Any]:
    return {"path": CHAT_PATH, "json": chat(session_id, stream=True)}


def by_token(session_id: str) -> Mapping[str, Any]:
    headers = {"Authorization": f"Bearer {session_id}"}
    return {"path": CHAT_PATH, "json": chat("someone"), "headers": headers}


def by_header_only(session_id: str) -> Mapping[str, Any]:
    return {"path": CHAT_PATH, "json": chat("someone"), "headers": {"X-Session-Id": session_id}}


SERVERS: dict[str, tuple[dict[str, Any], Callable[[str], Mapping[str, Any]]]] = {
    "the id in the body": ({"session_id": "json:metadata.session_id"}, by_metadata),
    "the id in the body of a stream": ({"session_id": "json:user"}, by_streamed_body),
    "the bearer token is the id": (
        {"session_id": "header:Authorization", "key": "digest", "secret": "k"},
        by_token,
    ),
    "the agent sends X-Session-Id": ({"session_id": "header:X-Session-Id"}, by_header_only),
}


@pytest.mark.parametrize(("values", "call"), SERVERS.values(), ids=SERVERS)
async def test_each_session_stays_on_one_worker(
    smg_gateway: StartSmgGateway,
    aiohttp_client: AiohttpClient,
    values: dict[str, Any],
    call: Callable[[str], Mapping[str, Any]],
) -> None:
    smg = await smg_gateway(3, policy="manual")
    app = make_app(smg.url)
    config = RoutingConfig(smg.url, instrument=True, **values)
    setup(app, config)
    client = await aiohttp_client(app)
    await play(client.make_url("/"), call)
    await assert_gateway_pinned(smg, config)


async def test_placeholder_ids_are_no_session(
    smg_gateway: StartSmgGateway, aiohttp_client: AiohttpClient
) -> None:
    smg = await smg_gateway(3, policy="manual")
    app = make_app(smg.url)
    setup(
        app,
        {
            "gateway": str(smg.url),
            "instrument": True,
            "session_id": "json:user",
            "ignore_ids": "default",
        },
    )
    client = await aiohttp_client(app)
    await play(client.make_url("/"), lambda _: by_body("default"))
    assert +await smg.branches() == {"no_routing_id": len(SESSIONS) * TURNS}


async def test_jobs_with_a_prefix_do_not_share_pins(
    smg_gateway: StartSmgGateway, aiohttp_client: AiohttpClient
) -> None:
    smg = await smg_gateway(3, policy="manual")
    values = {"instrument": True, "session_id": "json:user"}
    for job in ("job-7/", "job-8/"):
        app = make_app(smg.url)
        setup(app, RoutingConfig(smg.url, prefix=job, **values))
        client = await aiohttp_client(app)
        await play(client.make_url("/"), by_streamed_body)
    assert (await smg.branches())["vacant"] == 2 * len(SESSIONS)
