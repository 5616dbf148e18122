"""The pieces of a turn, one by one, so that a slowdown shows in review: ``make micro``.

They use as few names of the package as they can, so that they run on an earlier version too.
"""

import asyncio
import itertools
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, cast

from aiohttp import (
    ClientResponse,
    ClientSession,
    TraceRequestEndParams,
    TraceRequestStartParams,
    web,
)
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict
from pytest_benchmark.fixture import BenchmarkFixture
from yarl import URL

from aiohttp_smg_routing import ROUTING_KEY_HEADER, Routing, RoutingConfig, routing_key
from aiohttp_smg_routing.gateway import ROUTED_WORKER_HEADER
from aiohttp_smg_routing.ledger import Call
from aiohttp_smg_routing.rules import Rules

GATEWAY = URL("http://10.0.0.1:30000")
CHAT = GATEWAY / "v1/chat/completions"
HEADERS = {"Host": "10.0.0.1:30000", "Accept": "*/*", "Content-Type": "application/json"}
WORKER = "http://10.0.0.2:8000"


def done(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run to its end what never waits, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("it waits for something")


def rules_of(routing: Routing) -> Rules:
    return Rules(routing.config, routing.pins)


def turn(routing: Routing, session_id: str) -> None:
    """Enter a call and its answer in the ledger."""
    call = Call(routing.pins, ROUTING_KEY_HEADER, session_id, str(GATEWAY), session_id)
    routing.pins.answered(call, 200, {ROUTED_WORKER_HEADER: WORKER})


def test_a_key(benchmark: BenchmarkFixture) -> None:
    benchmark(routing_key, "rollout-000017")


def test_a_digest(benchmark: BenchmarkFixture) -> None:
    benchmark(routing_key, "rollout 17", key="digest", secret="hush")


def test_a_call_that_matches(benchmark: BenchmarkFixture) -> None:
    # A URL of its own for each call, which is what aiohttp shows to a hook.
    rules = rules_of(Routing({"gateway": str(GATEWAY)}))
    benchmark(lambda: rules.gateway_of("POST", CHAT.update_query(None)))


def test_a_call_to_elsewhere(benchmark: BenchmarkFixture) -> None:
    rules = rules_of(Routing({"gateway": str(GATEWAY)}))
    elsewhere = URL("https://example.com/v1/models")
    benchmark(lambda: rules.gateway_of("POST", elsewhere.update_query(None)))


def test_a_turn_that_stays_in_the_ledger(benchmark: BenchmarkFixture) -> None:
    routing = Routing({"gateway": str(GATEWAY)})
    sessions = itertools.cycle([f"session-{number}" for number in range(1000)])
    benchmark(lambda: turn(routing, next(sessions)))


def test_a_new_session_in_a_full_ledger(benchmark: BenchmarkFixture) -> None:
    routing = Routing(RoutingConfig(GATEWAY, track_sessions=1000))
    numbers = itertools.count()
    benchmark(lambda: turn(routing, f"session-{next(numbers)}"))


def test_the_hook_from_start_to_end_of_a_call(benchmark: BenchmarkFixture) -> None:
    routing = Routing({"gateway": str(GATEWAY)})
    hook = routing.trace_config()
    hook.freeze()
    session = cast("ClientSession", SimpleNamespace(trace_configs=[hook], _trace_configs=[hook]))
    head = CIMultiDict({"X-SMG-Routed-Worker-Id": WORKER})
    response = cast("ClientResponse", SimpleNamespace(status=200, headers=head))

    async def call() -> None:
        context, headers = SimpleNamespace(), CIMultiDict(HEADERS)
        url = CHAT.update_query(None)
        start = TraceRequestStartParams("POST", url, headers)
        await hook.on_request_start.send(session, context, start)
        end = TraceRequestEndParams("POST", url, headers, response)
        await hook.on_request_end.send(session, context, end)

    async def handler(request: web.Request) -> web.Response:
        benchmark(lambda: done(call()))
        return web.Response()

    request = make_mocked_request("POST", "/", match_info={"session_id": "rollout-000017"})
    asyncio.run(cast("Any", routing.middleware)(request, handler))


def test_the_middleware_for_a_request(benchmark: BenchmarkFixture) -> None:
    middleware = cast("Any", Routing({"gateway": str(GATEWAY)}).middleware)

    async def handler(request: web.Request) -> web.Response:
        request.clear()  # a request is one request: what the last round kept is not for this one
        return answer

    answer = web.Response()
    request = make_mocked_request("POST", "/", match_info={"session_id": "rollout-000017"})

    async def requests() -> None:  # in a task, as aiohttp has them
        benchmark(lambda: done(middleware(request, handler)))

    asyncio.run(requests())
