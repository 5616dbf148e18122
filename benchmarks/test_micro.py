"""The pieces of a turn, one by one, so that a slowdown shows in review: ``make micro``.

They use public names alone, so that they run on an earlier version of the package too.
"""

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

from aiohttp_smg_routing import (
    PinLedger,
    RoutingConfig,
    routing_key,
    routing_middleware,
    routing_trace_config,
)

GATEWAY = URL("http://10.0.0.1:30000")
CHAT = GATEWAY / "v1/chat/completions"
CONFIG = RoutingConfig(GATEWAY)
HEADERS = {"Host": "10.0.0.1:30000", "Accept": "*/*", "Content-Type": "application/json"}
WORKER = "http://10.0.0.2:8000"


def done(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run what never waits to its end."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("it waits for something")


def test_a_key(benchmark: BenchmarkFixture) -> None:
    benchmark(routing_key, "rollout-000017")


def test_a_digest(benchmark: BenchmarkFixture) -> None:
    benchmark(routing_key, "rollout 17", key="digest", secret="hush")


def test_a_call_that_matches(benchmark: BenchmarkFixture) -> None:
    # A URL of its own for each call, which is what aiohttp shows to a hook.
    benchmark(lambda: CONFIG.tags("POST", CHAT.update_query(None)))


def test_a_call_to_elsewhere(benchmark: BenchmarkFixture) -> None:
    elsewhere = URL("https://example.com/v1/models")
    benchmark(lambda: CONFIG.tags("POST", elsewhere.update_query(None)))


def test_a_turn_that_stays_in_the_ledger(benchmark: BenchmarkFixture) -> None:
    pins = PinLedger(CONFIG)
    keys = itertools.cycle([f"session-{number}" for number in range(1000)])
    benchmark(lambda: pins.answered(next(keys), WORKER, pins.start()))


def test_a_new_session_in_a_full_ledger(benchmark: BenchmarkFixture) -> None:
    pins = PinLedger(RoutingConfig(GATEWAY, track_sessions=1000))
    numbers = itertools.count()
    benchmark(lambda: pins.answered(f"session-{next(numbers)}", WORKER, pins.start()))


def test_the_hook_from_start_to_end_of_a_call(benchmark: BenchmarkFixture) -> None:
    pins = PinLedger(CONFIG)
    hook = routing_trace_config(CONFIG)
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
    done(cast("Any", routing_middleware(CONFIG, pins))(request, handler))


def test_the_middleware_for_a_request(benchmark: BenchmarkFixture) -> None:
    middleware = cast("Any", routing_middleware(CONFIG))

    async def handler(request: web.Request) -> web.Response:
        request.clear()  # a request is one request: what the last round kept is not for this one
        return answer

    answer = web.Response()
    request = make_mocked_request("POST", "/", match_info={"session_id": "rollout-000017"})
    benchmark(lambda: done(middleware(request, handler)))
