"""A client that sends every routing header, on the real gateway: with the plugin, and by hand."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, web
from yarl import URL

from aiohttp_smg_routing import setup
from aiohttp_smg_routing.gateway import CHAT_COMPLETIONS
from aiohttp_smg_routing.testing import SmgGateway, StartSmgGateway

from .conftest import CLIENT
from .workers import chat

if TYPE_CHECKING:
    from pytest_aiohttp.plugin import AiohttpServer  # since 1.1, which needs aiohttp 3.11

POLICIES = pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])

Headers = list[tuple[str, str]]
Forward = Callable[[web.Request], Any]
Send = Callable[[str, Headers], Awaitable[int]]

# The body is sent anew; all else is copied, which is what a naive proxy does.
_FRAMING = {"host", "content-length", "transfer-encoding"}
_HEAD = [("Host", "h"), ("Content-Type", "application/json")]


def attacks(victim: str) -> list[Headers]:
    """Return what an agent may send to move a pin, to pick a worker, to break a call."""
    routing_key, target = "X-SMG-Routing-Key", "X-SMG-Target-Worker"
    # What SMG 1.13 reads besides; none of it chose a worker for a call with a key.
    others = ["Routing-Tokens", "Priority", "Tenant-Id", "MCP", "Parser", "Cache-Trace"]
    return [
        *(
            [(spelled, victim)]
            for spelled in (routing_key, routing_key.lower(), "x-SMG-routing-KEY")
        ),
        [(routing_key, victim), (routing_key, victim)],
        [(routing_key, ""), (routing_key, victim)],
        [(routing_key, ""), (routing_key.lower(), victim), (routing_key.upper(), "new")],
        [(routing_key, "x" * 129)],
        *([(spelled, "99")] for spelled in (target, target.lower(), target.upper())),
        *([(target, index)] for index in ("0", "1", "2", "-1", "", "no-number")),
        [(target, ""), (target, "99")],
        [(target.lower(), "0"), (target, "99")],
        [(target, "99"), (routing_key, victim)],
        [(f"X-SMG-{name}", "1") for name in others],
        [("X-Data-Parallel-Rank", "1"), ("X-Request-Id", victim), ("X-Correlation-Id", victim)],
        [("Authorization", victim), ("X-Forwarded-For", "10.0.0.1"), ("Cookie", f"a={victim}")],
        [("Connection", f"keep-alive, {routing_key}")],
    ]


def proxy(upstream: URL, forward: Forward) -> web.Application:
    """Return a session server that sends on the headers that ``forward`` returns."""

    async def handler(request: web.Request) -> web.Response:
        async with request.app[CLIENT].post(
            upstream.with_path(CHAT_COMPLETIONS),
            data=await request.read(),
            headers=forward(request),
        ) as response:
            return web.Response(body=await response.read(), status=response.status)

    async def client_session(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as app[CLIENT]:
            yield

    app = web.Application()
    app.cleanup_ctx.append(client_session)
    app.router.add_post("/sessions/{session_id}/v1/chat/completions", handler)
    return app


def copied(request: web.Request) -> Headers:
    """Return the client's headers, as a naive proxy sends them on."""
    return [pair for pair in request.headers.items() if pair[0].lower() not in _FRAMING]


def by_hand(request: web.Request) -> dict[str, str]:
    """Return what is written by hand most often."""
    return {**dict(copied(request)), "X-SMG-Routing-Key": request.match_info["session_id"]}


def by_hand_appended(request: web.Request) -> Headers:
    """Return what is written by hand where a header may come twice."""
    return [*copied(request), ("X-SMG-Routing-Key", request.match_info["session_id"])]


async def agents(aiohttp_server: "AiohttpServer", app: web.Application) -> Send:
    """Run a session server; return the function that sends a turn with raw headers to it."""
    server = await aiohttp_server(app)

    async def send(session_id: str, headers: Headers) -> int:
        body = json.dumps(chat(session_id)).encode()
        lines = [*_HEAD, ("Content-Length", str(len(body))), *headers]
        head = "".join(f"{name}: {value}\r\n" for name, value in lines)
        path = f"/sessions/{session_id}/v1/chat/completions"
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        writer.close()
        await writer.wait_closed()
        return status

    return send


def served(smg: SmgGateway, session_id: str) -> list[int]:
    """Return which workers served a session, by the body of its turns."""
    return [
        number
        for number, worker in enumerate(smg.workers)
        for call in worker.calls
        if call.method == "POST" and call.json()["user"] == session_id
    ]


async def two_apart(smg: SmgGateway, send: Send) -> tuple[str, str, int]:
    """Open sessions until two are on different workers; return them, and how many are open."""
    assert await send("s-1", []) == 200
    for count in range(2, 100):
        assert await send(f"s-{count}", []) == 200
        if served(smg, "s-1") != served(smg, f"s-{count}"):
            return "s-1", f"s-{count}", count
    raise AssertionError("all sessions are on one worker")


@POLICIES
async def test_no_header_of_a_client_moves_a_pin_or_picks_a_worker_or_breaks_a_call(
    smg_gateway: StartSmgGateway, aiohttp_server: "AiohttpServer", policy: str
) -> None:
    smg = await smg_gateway(3, policy=policy)
    app = proxy(smg.url, copied)
    setup(app, {"gateway": str(smg.url), "client_session": "client"})
    send = await agents(aiohttp_server, app)
    agent, victim, opened = await two_apart(smg, send)
    sent = attacks(victim)
    for headers in sent:
        assert await send(agent, headers) == 200, headers
        assert await send(victim, []) == 200, headers
    for session_id in (agent, victim):
        workers = served(smg, session_id)
        assert len(workers) == 1 + len(sent)
        assert len(set(workers)) == 1, f"{session_id} was moved"
    turns = 2 * len(sent)
    assert +await smg.branches() == (
        {"vacant": opened, "occupied_hit": turns}
        if policy == "manual"
        else {"routing_key_hit": opened + turns}
    )


async def test_code_by_hand_lets_a_client_pick_its_worker_and_get_a_503(
    smg_gateway: StartSmgGateway, aiohttp_server: "AiohttpServer"
) -> None:
    smg = await smg_gateway(3, policy="consistent_hashing")
    send = await agents(aiohttp_server, proxy(smg.url, by_hand))
    for index in ("0", "1", "2"):
        assert await send("agent", [("x-smg-target-worker", index)]) == 200
    assert sorted(served(smg, "agent")) == [0, 1, 2]
    assert await send("agent", [("X-SMG-Target-Worker", "99")]) == 503
    branches = await smg.branches()
    assert (branches["target_worker_hit"], branches["routing_key_hit"]) == (3, 0)
    assert branches["target_worker_miss"] > 0


@POLICIES
async def test_code_by_hand_that_keeps_double_headers_lets_a_client_move_its_pin(
    smg_gateway: StartSmgGateway, aiohttp_server: "AiohttpServer", policy: str
) -> None:
    smg = await smg_gateway(3, policy=policy)
    send = await agents(aiohttp_server, proxy(smg.url, by_hand_appended))
    agent, victim, _ = await two_apart(smg, send)
    assert await send(agent, [("X-SMG-Routing-Key", victim)]) == 200
    assert set(served(smg, agent)) > {*served(smg, victim)}, "it came to the victim's worker"
    before = await smg.branches()
    assert await send(agent, [("X-SMG-Routing-Key", "")]) == 200
    [branch] = await smg.branches() - before
    assert branch in ("no_routing_id", "random_fallback"), "it hid its own key"
