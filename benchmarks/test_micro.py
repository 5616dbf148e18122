"""Measure each step of a turn, so that a slowdown shows in review: ``make micro``."""

import asyncio
import itertools
from typing import Any, cast

from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from pytest_benchmark.fixture import BenchmarkFixture
from yarl import URL

from aiohttp_smg_routing import Routing, RoutingConfig, routing_key, routing_session
from harness.hook import Calls, done

GATEWAY = URL("http://10.0.0.1:30000")
CHAT_URL = GATEWAY / "v1/chat/completions"


def test_a_key(benchmark: BenchmarkFixture) -> None:
    benchmark(routing_key, "rollout-000017")


def test_a_digest(benchmark: BenchmarkFixture) -> None:
    benchmark(routing_key, "rollout 17", key="digest", secret="hush")


def test_a_call_without_a_session(benchmark: BenchmarkFixture) -> None:
    calls = Calls(Routing({"gateway": str(GATEWAY)}))
    benchmark(calls.call, CHAT_URL)


def test_a_call_to_elsewhere(benchmark: BenchmarkFixture) -> None:
    calls = Calls(Routing({"gateway": str(GATEWAY)}))
    benchmark(calls.call, URL("https://example.com/v1/models"))


def test_a_call_of_a_session_that_stays(benchmark: BenchmarkFixture) -> None:
    calls = Calls(Routing({"gateway": str(GATEWAY)}))
    sessions = itertools.cycle([f"session-{number}" for number in range(1000)])

    def call() -> None:
        with routing_session(next(sessions)):
            calls.call(CHAT_URL)

    benchmark(call)


def test_a_call_of_a_new_session_in_a_full_ledger(benchmark: BenchmarkFixture) -> None:
    calls = Calls(Routing(RoutingConfig(GATEWAY, track_sessions=1000)))
    numbers = itertools.count()

    def call() -> None:
        with routing_session(f"session-{next(numbers)}"):
            calls.call(CHAT_URL)

    benchmark(call)


def test_a_call_within_a_request(benchmark: BenchmarkFixture) -> None:
    routing = Routing({"gateway": str(GATEWAY)})
    calls = Calls(routing)

    async def handler(request: web.Request) -> web.Response:
        benchmark(calls.call, CHAT_URL)
        return web.Response()

    request = make_mocked_request("POST", "/", match_info={"session_id": "rollout-000017"})
    asyncio.run(cast("Any", routing.middleware)(request, handler))


def test_the_middleware_for_a_request(benchmark: BenchmarkFixture) -> None:
    middleware = cast("Any", Routing({"gateway": str(GATEWAY)}).middleware)

    async def handler(request: web.Request) -> web.Response:
        request.clear()  # each round must begin with a fresh request
        return answer

    answer = web.Response()
    request = make_mocked_request("POST", "/", match_info={"session_id": "rollout-000017"})

    async def requests() -> None:  # in a task, as in aiohttp
        benchmark(lambda: done(middleware(request, handler)))

    asyncio.run(requests())
