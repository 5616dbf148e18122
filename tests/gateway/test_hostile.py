"""Clients that send routing headers, on the real gateway: with the plugin and with code by hand."""

import asyncio
import json
from typing import TYPE_CHECKING, Protocol

import pytest
from aiohttp import web
from yarl import URL

from aiohttp_smg_routing.testing import SmgGateway, StartSmgGateway
from harness.agents import CHAT_PATH, chat
from harness.proxies import Forward, Headers, copied, pinned_server, proxy_server

from ..turns import served

if TYPE_CHECKING:
    from pytest_aiohttp.plugin import AiohttpServer  # since 1.1, which needs aiohttp 3.11

POLICIES = pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])

ROUTING_KEY, TARGET = "X-SMG-Routing-Key", "X-SMG-Target-Worker"

_HEAD = [("Host", "h"), ("Content-Type", "application/json")]


def attacks(victim: str) -> list[Headers]:
    """Return headers that an agent may send to move a pin, pick a worker or break a call."""
    # SMG 1.13 also reads these; none of them chose a worker for a call with a key.
    others = ["Routing-Tokens", "Priority", "Tenant-Id", "MCP", "Parser", "Cache-Trace"]
    return [
        *(
            [(spelled, victim)]
            for spelled in (ROUTING_KEY, ROUTING_KEY.lower(), "x-SMG-routing-KEY")
        ),
        [(ROUTING_KEY, victim), (ROUTING_KEY, victim)],
        [(ROUTING_KEY, ""), (ROUTING_KEY, victim)],
        [(ROUTING_KEY, ""), (ROUTING_KEY.lower(), victim), (ROUTING_KEY.upper(), "new")],
        [(ROUTING_KEY, "x" * 129)],
        *([(spelled, "99")] for spelled in (TARGET, TARGET.lower(), TARGET.upper())),
        *([(TARGET, index)] for index in ("0", "1", "2", "-1", "", "no-number")),
        [(TARGET, ""), (TARGET, "99")],
        [(TARGET.lower(), "0"), (TARGET, "99")],
        [(TARGET, "99"), (ROUTING_KEY, victim)],
        [(f"X-SMG-{name}", "1") for name in others],
        [("X-Data-Parallel-Rank", "1"), ("X-Request-Id", victim), ("X-Correlation-Id", victim)],
        [("Authorization", victim), ("X-Forwarded-For", "10.0.0.1"), ("Cookie", f"a={victim}")],
        [("Connection", f"keep-alive, {ROUTING_KEY}")],
    ]


class Send(Protocol):
    async def __call__(self, session_id: str, headers: Headers, path: str = ...) -> int: ...


def by_hand(request: web.Request) -> dict[str, str]:
    """Return the headers as most handwritten code sets them."""
    return {**dict(copied(request)), ROUTING_KEY: request.match_info["session_id"]}


def by_hand_appended(request: web.Request) -> Headers:
    """Return the headers as handwritten code sets them that allows a header to come twice."""
    return [*copied(request), (ROUTING_KEY, request.match_info["session_id"])]


async def agents(aiohttp_server: "AiohttpServer", app: web.Application) -> Send:
    """Run a session server; return a function that sends it a turn with raw headers.

    By default the path has the id. The body always has it, for the worker to see.
    """
    server = await aiohttp_server(app)

    async def send(session_id: str, headers: Headers, path: str = "") -> int:
        body = json.dumps(chat(session_id)).encode()
        lines = [*_HEAD, ("Content-Length", str(len(body))), *headers]
        head = "".join(f"{name}: {value}\r\n" for name, value in lines)
        path = path or f"/sessions/{session_id}{CHAT_PATH}"
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        writer.close()
        await writer.wait_closed()
        return status

    return send


def workers_of(smg: SmgGateway, session_id: str) -> list[URL]:
    """Return the worker that served each turn of a session, by the bodies of the turns."""
    return [*served(*smg.workers)[session_id].elements()]


async def two_apart(smg: SmgGateway, send: Send) -> tuple[str, str, int]:
    """Open sessions until two are on different workers; return both, and the number open."""
    assert await send("s-1", []) == 200
    for count in range(2, 100):
        assert await send(f"s-{count}", []) == 200
        if workers_of(smg, "s-1") != workers_of(smg, f"s-{count}"):
            return "s-1", f"s-{count}", count
    raise AssertionError("all sessions are on one worker")


@POLICIES
async def test_no_header_of_a_client_moves_a_pin_or_picks_a_worker_or_breaks_a_call(
    smg_gateway: StartSmgGateway, aiohttp_server: "AiohttpServer", policy: str
) -> None:
    smg = await smg_gateway(3, policy=policy)
    send = await agents(aiohttp_server, pinned_server(smg.url))
    agent, victim, opened = await two_apart(smg, send)
    sent = attacks(victim)
    for headers in sent:
        assert await send(agent, headers) == 200, headers
        assert await send(victim, []) == 200, headers
    for session_id in (agent, victim):
        workers = workers_of(smg, session_id)
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
    send = await agents(aiohttp_server, proxy_server(smg.url, by_hand))
    for index in ("0", "1", "2"):
        assert await send("agent", [(TARGET.lower(), index)]) == 200
    assert sorted(workers_of(smg, "agent")) == sorted(worker.url for worker in smg.workers)
    assert await send("agent", [(TARGET, "99")]) == 503
    branches = await smg.branches()
    assert (branches["target_worker_hit"], branches["routing_key_hit"]) == (3, 0)
    assert branches["target_worker_miss"] > 0


@POLICIES
@pytest.mark.parametrize(
    ("forward", "names"),
    [
        # In the dict our key replaces only the same spelling. The other spelling comes after it,
        # and aiohttp sends the last one.
        (by_hand, (ROUTING_KEY, ROUTING_KEY.lower())),
        (by_hand_appended, (ROUTING_KEY,)),
    ],
)
async def test_code_by_hand_lets_a_client_move_its_pin(
    smg_gateway: StartSmgGateway,
    aiohttp_server: "AiohttpServer",
    policy: str,
    forward: Forward,
    names: tuple[str, ...],
) -> None:
    smg = await smg_gateway(3, policy=policy)
    send = await agents(aiohttp_server, proxy_server(smg.url, forward))
    agent, victim, _ = await two_apart(smg, send)
    assert await send(agent, [(name, victim) for name in names]) == 200
    assert set(workers_of(smg, agent)) > {*workers_of(smg, victim)}, (
        "it did not come to the victim's worker"
    )
    before = await smg.branches()
    assert await send(agent, [(name, "") for name in names]) == 200
    [branch] = await smg.branches() - before
    assert branch in ("no_routing_id", "random_fallback"), "it did not hide its own key"


def numbered(request: web.Request) -> int:
    return int(request.headers["X-Number"])


#: The config of a server that takes the id from anything that an agent sends.
TAKEN_FROM = {
    "session_id": [
        *("header:X-Session", "query:session", "cookie:session", "json:session"),
        *(numbered, "match_info:session_id"),
    ],
    "ignore_ids": "default",
}
#: Requests to that server that name no session.
LEFT_OUT: list[tuple[str, Headers]] = [
    (CHAT_PATH, []),
    (CHAT_PATH, [("X-Session", " ")]),
    (CHAT_PATH, [("X-Session", "default")]),
    (f"{CHAT_PATH}?session=%20", []),
    (CHAT_PATH, [("Cookie", "session=")]),
    (CHAT_PATH, [("X-Number", "none")]),  # the source raises
    (f"/sessions/%20{CHAT_PATH}", []),
]


@POLICIES
async def test_a_client_whose_call_has_no_session_reaches_any_pin_and_worker(
    smg_gateway: StartSmgGateway, aiohttp_server: "AiohttpServer", policy: str
) -> None:
    smg = await smg_gateway(3, policy=policy)
    send = await agents(aiohttp_server, pinned_server(smg.url, **TAKEN_FROM))
    _, victim, opened = await two_apart(smg, send)
    for number, (path, left_out) in enumerate(LEFT_OUT):
        agent = f"agent-{number}"
        assert await send(agent, [*left_out, (ROUTING_KEY, victim)], path) == 200
        assert workers_of(smg, agent) == workers_of(smg, victim), left_out
        if policy == "consistent_hashing":
            for index in ("0", "1", "2"):
                assert await send(agent, [*left_out, (TARGET, index)], path) == 200
            assert {*workers_of(smg, agent)} == {it.url for it in smg.workers}, left_out
            assert await send(agent, [*left_out, (TARGET, "99")], path) == 503, left_out
    branches = await smg.branches()
    if policy == "manual":
        assert +branches == {"vacant": opened, "occupied_hit": len(LEFT_OUT)}
    else:
        assert branches["routing_key_hit"] == opened + len(LEFT_OUT)
        assert branches["target_worker_hit"] == 3 * len(LEFT_OUT)


@POLICIES
async def test_where_a_missing_session_raises_no_such_call_reaches_the_gateway(
    smg_gateway: StartSmgGateway, aiohttp_server: "AiohttpServer", policy: str
) -> None:
    smg = await smg_gateway(3, policy=policy)
    app = pinned_server(smg.url, **TAKEN_FROM, on_missing="raise")
    send = await agents(aiohttp_server, app)
    _, victim, opened = await two_apart(smg, send)
    for path, left_out in LEFT_OUT:
        for headers in ([], [(ROUTING_KEY, victim)], [(TARGET, "0")], [(TARGET, "99")]):
            assert await send("agent", [*left_out, *headers], path) == 500, left_out
    assert workers_of(smg, "agent") == []
    branch = "vacant" if policy == "manual" else "routing_key_hit"
    assert +await smg.branches() == {branch: opened}
