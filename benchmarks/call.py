"""The cost of an outgoing call, with each way to put the key on it."""

import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from aiohttp import (
    ClientHandlerType,
    ClientRequest,
    ClientResponse,
    ClientSession,
    TraceConfig,
    web,
)
from opentelemetry.instrumentation.aiohttp_client import create_trace_config
from opentelemetry.sdk.trace import TracerProvider
from yarl import URL

from aiohttp_smg_routing import ROUTING_KEY_HEADER, Routing, RoutingConfig
from harness.agents import CHAT
from harness.servers import serve

from .figures import Figure, Part, Progress, Table, Unit, ratios, step
from .rounds import interleave
from .servers import upstream

NAME = "call"
TITLE = "An outgoing call"

CALLS = 25  # calls of an arm in a round
ROUNDS, QUICK_ROUNDS = 500, 2
SESSION_ID = "rollout-000017"
BODY = json.dumps({"model": "stub", "messages": [{"role": "user", "content": "Go on."}]}).encode()
HEADERS = {"Content-Type": "application/json"}
# A conversation of about 5,000 tokens, so that a call also encodes a body and decodes an answer.
CONVERSATION = {
    "model": "stub",
    "messages": [
        {"role": role, "content": f"{role} {number}: " + "what was said " * 70}
        for number in range(10)
        for role in ("user", "assistant")
    ],
}

NOTHING = "no key"
HAND = "by hand: headers={…}"
FLOOR = "an empty TraceConfig, no key"
HAND_FLOOR = "an empty TraceConfig, by hand"
HOOK = "the hook"
LEDGER = "the hook with the ledger"
HAND_MIDDLEWARE = "by hand: a client middleware"
OTEL = "OpenTelemetry's client instrumentation"

Work = Callable[[], Awaitable[float]]
Call = Callable[[ClientSession, URL, Mapping[str, str]], Awaitable[None]]


async def run(progress: Progress, *, quick: bool = False) -> Part:
    """Measure this process's CPU time for a call, in interleaved arms.

    A call is made within a request, as in a session server. The inbound half finds the session
    before the clock starts.
    """
    async with upstream() as gateway, AsyncExitStack() as stack:
        rounds = QUICK_ROUNDS if quick else ROUNDS
        arms = await _arms(stack, gateway, post)
        first = step(progress, 0, 0.85, "calls of each kind, in turn")
        calls = await interleave(arms, rounds, first)
        names, few = list(arms), (HAND, HAND_MIDDLEWARE, HAND_FLOOR, LEDGER)
        several = await _arms(stack, gateway, _whole_turn)
        arms = {name: several[name] for name in few}
        second = step(progress, 0.85, 0.15, "calls with a whole conversation")
        turns = await interleave(arms, max(QUICK_ROUNDS, rounds // 4), second)
    return Part(
        NAME,
        TITLE,
        (
            _costs("A call with a short body, CPU time", calls, names),
            _promises(calls),
            _costs(
                "A call that encodes a conversation of 20 messages and decodes the answer",
                turns,
                few,
            ),
        ),
        (
            "An empty TraceConfig is aiohttp's own floor: aiohttp spends as much on any trace hook."
            " A client middleware that sets the header by hand does not pay it.",
            "OpenTelemetry's SDK records a span for each call, and exports none.",
            "Each call is made within a request. The middleware finds the session and its key once"
            " for all calls of a request. The table of a proxied turn has that cost.",
        ),
    )


async def _arms(stack: AsyncExitStack, gateway: URL, call: Call) -> dict[str, Work]:
    routings = {
        HOOK: Routing(RoutingConfig(gateway, track_sessions=0)),
        LEDGER: Routing(RoutingConfig(gateway)),
    }
    instrumentation = create_trace_config(tracer_provider=TracerProvider())
    options: dict[str, dict[str, Any]] = {
        NOTHING: {},
        HAND: {},
        HAND_MIDDLEWARE: {"middlewares": [_by_hand]},
        FLOOR: {"trace_configs": [TraceConfig()]},
        HAND_FLOOR: {"trace_configs": [TraceConfig()]},
        **{name: {"trace_configs": [it.trace_config()]} for name, it in routings.items()},
        OTEL: {"trace_configs": [instrumentation]},
    }
    client = await stack.enter_async_context(ClientSession())
    arms: dict[str, Work] = {}
    for name, of_session in options.items():
        session = await stack.enter_async_context(ClientSession(**of_session))
        headers = dict(HEADERS)
        if name in (HAND, HAND_FLOOR):
            headers[ROUTING_KEY_HEADER] = SESSION_ID
        work = partial(call, session, gateway / CHAT, headers)
        inbound = [routings[name].middleware] if name in routings else []
        url = await _server(stack, web.Application(middlewares=inbound), work)
        arms[name] = partial(_cost, client, url)
    return arms


async def _by_hand(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
    request.headers[ROUTING_KEY_HEADER] = SESSION_ID
    return await handler(request)


async def _server(
    stack: AsyncExitStack, app: web.Application, call: Callable[[], Awaitable[None]]
) -> URL:
    """Run ``app``; it answers a request with the CPU seconds of one call."""

    async def handler(request: web.Request) -> web.Response:
        begin = time.process_time()
        for _ in range(CALLS):
            await call()
        return web.Response(text=str((time.process_time() - begin) / CALLS))

    app.router.add_post("/sessions/{session_id}", handler)
    return await stack.enter_async_context(serve(app)) / "sessions" / SESSION_ID


async def _cost(client: ClientSession, url: URL) -> float:
    async with client.post(url) as response:
        return float(await response.text())


async def post(session: ClientSession, url: URL, headers: Mapping[str, str] = HEADERS) -> None:
    """Send a short chat completion and read its answer."""
    async with session.post(url, data=BODY, headers={**headers}) as response:
        await response.read()


async def _whole_turn(session: ClientSession, url: URL, headers: Mapping[str, str]) -> None:
    async with session.post(url, json=CONVERSATION, headers={**headers}) as response:
        await response.json()


def _costs(title: str, rounds: list[dict[str, float]], names: Iterable[str]) -> Table:
    base = HAND

    def row(name: str) -> tuple[str | Figure, ...]:
        micros: Unit = "µs"
        cost = Figure(tuple(costs[name] * 1e6 for costs in rounds), micros, precision=0.1)
        ratio = Figure(ratios(rounds, name, base), "ratio", precision=0.05)
        return name, cost, ratio if name != base else "1"

    return Table(title, ("", "a call", "as a multiple of by hand"), tuple(map(row, names)))


def _promises(rounds: list[dict[str, float]]) -> Table:
    share = tuple((costs[LEDGER] - costs[FLOOR]) / (costs[OTEL] - costs[FLOOR]) for costs in rounds)
    return Table(
        "Limits",
        ("", "ratio of each round"),
        (
            (
                "hook with ledger / empty TraceConfig",
                Figure(ratios(rounds, LEDGER, FLOOR), "ratio", at_most=1.03),
            ),
            (
                "hook with ledger / empty TraceConfig, by hand: the same bytes on the wire",
                Figure(ratios(rounds, LEDGER, HAND_FLOOR), "ratio", precision=0.05),
            ),
            (
                "what the hook with ledger adds to that floor / what OpenTelemetry adds",
                Figure(share, "ratio", at_most=0.1),
            ),
        ),
    )
