"""The cost of a turn and a session with a million known sessions, or while disabled."""

import gc
import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from uuid import UUID

from aiohttp import ClientSession, web
from yarl import URL

from aiohttp_smg_routing import Routing, RoutingConfig, routing_session, setup
from harness.agents import CHAT
from harness.hook import Calls
from harness.servers import serve

from .call import Work, post
from .counting import calls_into_plugin
from .figures import Figure, Part, Progress, Table, ratios, step
from .rounds import interleave
from .servers import upstream

NAME = "growth"
TITLE = "Many sessions, and a plugin that is off"

KNOWN, QUICK_KNOWN = (100, 10_000, 1_000_000), (100, 1_000)
# At 175,000 the ledger's table has just grown, so each session's share of it is largest.
TRACKED, QUICK_TRACKED = (10_000, 175_000), (1_000,)
CALLS, ROUNDS, QUICK_ROUNDS = 25, 150, 2
BYTES_AT_MOST = 400
CALLS_AT_MOST = 12  # calls of the core's functions in a proxied turn

_CLIENT = web.AppKey("client_session", ClientSession)


async def run(progress: Progress, *, quick: bool = False) -> Part:
    """Measure in this process; the upstream runs in another."""
    known = QUICK_KNOWN if quick else KNOWN
    sizes = QUICK_TRACKED if quick else TRACKED
    rounds = QUICK_ROUNDS if quick else ROUNDS
    async with upstream() as gateway:
        progress(0, f"getting to know {known[-1]:,} sessions")
        turns = await _known(gateway, known, rounds, step(progress, 0.1, 0.35, "turns"))
        off = await _disabled(gateway, rounds, step(progress, 0.45, 0.35, "plugin disabled"))
        calls = {arm: await _calls_of_a_turn(gateway, arm) for arm in ("disabled", "enabled")}
    memory = []
    for place, tracked in enumerate(sizes):
        progress(0.8 + 0.05 * place, f"the memory of {tracked:,} sessions")
        memory.append((tracked, bytes_per_session(tracked)))
    first = f"{known[0]:,}"
    return Part(
        NAME,
        TITLE,
        (
            Table(
                "CPU time of an outgoing call, hook with ledger",
                ("known sessions", f"as a multiple of that with {first}"),
                tuple(
                    (f"{number:,}", Figure(ratios(turns, f"{number:,}", first), "ratio", 1.1))
                    for number in known[1:]
                ),
            ),
            Table(
                "Memory of the ledger for a session of three turns",
                ("tracked sessions", "a session"),
                tuple(
                    (f"{tracked:,}", Figure((size,), "bytes", BYTES_AT_MOST))
                    for tracked, size in memory
                ),
            ),
            Table(
                "A proxied turn, with the plugin and with enabled = false",
                ("", "enabled", "disabled"),
                (
                    (
                        "calls of the plugin's functions in a turn",
                        Figure((calls["enabled"],), "calls", CALLS_AT_MOST),
                        Figure((calls["disabled"],), "calls", 0),
                    ),
                    (
                        "CPU time / of that without the plugin",
                        "see a proxied turn",
                        Figure(ratios(off, "disabled", "without"), "ratio", 1.01),
                    ),
                ),
            ),
        ),
        (
            "Each call belongs to a session that is drawn from all known sessions.",
            "The bytes of a session include its key, a UUID of 36 characters.",
            "The count of calls does not include a coroutine that resumes.",
        ),
    )


def _ids(count: int) -> list[str]:
    draw = random.Random(count)
    return [str(UUID(int=draw.getrandbits(128), version=4)) for _ in range(count)]


def _known_to(gateway: URL, ids: list[str], workers: list[str], turns: int) -> Routing:
    """Return a routing whose ledger knows ``turns`` turns of each session."""
    routing = Routing(RoutingConfig(gateway, track_sessions=len(ids)))
    calls = Calls(routing)
    for _ in range(turns):
        for number, session_id in enumerate(ids):
            with routing_session(session_id):
                calls.call(gateway / CHAT, workers[number % len(workers)])
    return routing


async def _known(
    gateway: URL, known: tuple[int, ...], rounds: int, told: Callable[[float], None]
) -> list[dict[str, float]]:
    """Return the CPU seconds of a call, for ledgers that know so many sessions."""
    async with AsyncExitStack() as stack:
        arms: dict[str, Work] = {}
        for number in known:
            ids = _ids(number)
            hook = _known_to(gateway, ids, [str(gateway)], 1).trace_config()
            session = await stack.enter_async_context(ClientSession(trace_configs=[hook]))
            arms[f"{number:,}"] = partial(_calls, session, gateway / CHAT, ids)
        return await interleave(arms, rounds, told)


async def _calls(session: ClientSession, url: URL, ids: list[str]) -> float:
    drawn = random.choices(ids, k=CALLS)
    begin = time.process_time()
    for session_id in drawn:
        with routing_session(session_id):
            await post(session, url)
    return (time.process_time() - begin) / CALLS


def bytes_per_session(tracked: int) -> float:
    """Return the bytes that Python allocates in the ledger for each tracked session."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        workers = [f"http://10.0.0.{number}:8000" for number in range(8)]
        pins = _known_to(URL("http://gateway"), _ids(tracked), workers, 3).pins
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        return (after - before) / pins.summary().sessions
    finally:
        tracemalloc.stop()


def _app(gateway: URL, arm: str) -> web.Application:
    async def handler(request: web.Request) -> web.Response:
        async with request.app[_CLIENT].post(gateway / CHAT, data=await request.read()) as answer:
            return web.Response(body=await answer.read())

    async def client_session(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as app[_CLIENT]:
            yield

    app = web.Application()
    app.cleanup_ctx.append(client_session)
    app.router.add_post("/sessions/{session_id}", handler)
    if arm != "without":
        config = {"gateway": gateway, "enabled": arm == "enabled", "client_session": _CLIENT}
        setup(app, config)
    return app


async def _disabled(
    gateway: URL, rounds: int, told: Callable[[float], None]
) -> list[dict[str, float]]:
    """Return the CPU seconds of a turn, for agent and session server together."""
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(ClientSession())
        arms: dict[str, Work] = {}
        for arm in ("without", "disabled"):
            url = await stack.enter_async_context(serve(_app(gateway, arm))) / "sessions/s-1"
            arms[arm] = partial(_turns, agent, url)
        return await interleave(arms, rounds, told)


async def _turns(agent: ClientSession, url: URL) -> float:
    begin = time.process_time()
    for _ in range(CALLS):
        await post(agent, url)
    return (time.process_time() - begin) / CALLS


async def _calls_of_a_turn(gateway: URL, arm: str) -> int:
    """Return how many calls of the plugin's functions a turn makes, after a warm-up."""
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(ClientSession())
        url = await stack.enter_async_context(serve(_app(gateway, arm))) / "sessions/s-1"
        await post(agent, url)
        return await calls_into_plugin(partial(post, agent, url))
