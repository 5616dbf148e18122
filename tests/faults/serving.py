"""The example session server in this process, its agents, and a check that nothing is left."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, TCPConnector, web
from yarl import URL

from aiohttp_smg_routing import ROUTING, PinLedger, PinSummary
from aiohttp_smg_routing.testing import Call, Recorder, canned
from examples.session_server import CLIENT, make_app
from harness.agents import Agent, Reply, conversation
from harness.proc import HAS_PROC, connections_to, open_files
from harness.servers import serve
from harness.workers import Worker

from ..waiting import soon, until

SESSIONS = [f"s-{number}" for number in range(9)]


def is_failure_of_the_gateway(got: Reply) -> bool:
    """Tell whether the agent's error came from the gateway failing or being absent."""
    # A stream broke off, or the error has a code of the gateway.
    return bool(got.error.get("code")) if got.whole else got.status == 200


@dataclass
class Agents:
    """The agents of all sessions of a server."""

    server: URL
    client: ClientSession
    by_id: dict[str, Agent] = field(default_factory=dict)

    async def begin(self, sessions: Iterable[str] = SESSIONS) -> "Agents":
        new = {each: Agent(self.client, self.server / "sessions" / each) for each in sessions}
        await asyncio.gather(*(agent.begin() for agent in new.values()))
        self.by_id |= new
        return self

    async def all(self, number: int = 1, **more: Any) -> dict[str, Reply]:
        """Play a turn of each session, all at once."""
        turns = (agent.turn(conversation(number), **more) for agent in self.by_id.values())
        return dict(zip(self.by_id, await soon(asyncio.gather(*turns)), strict=True))

    def start(
        self, number: int = 1, **more: Any
    ) -> tuple[dict[str, "asyncio.Task[Reply]"], list[asyncio.Event]]:
        """Begin a turn of each session; set its event when a piece of its answer arrives."""
        turns, pieces = {}, []
        for each, agent in self.by_id.items():
            pieces.append(asyncio.Event())

            def arrived(_: bytes, piece: asyncio.Event = pieces[-1]) -> None:
                piece.set()

            turn = agent.turn(conversation(number), arrived=arrived, **more)
            turns[each] = asyncio.create_task(turn)
        return turns, pieces

    @asynccontextmanager
    async def begun(
        self, number: int = 1, **more: Any
    ) -> AsyncIterator["asyncio.Future[dict[str, Reply]]"]:
        """Begin a streamed turn of each session; enter the block once each agent has a piece of it.

        The block gets a future of the agents' replies; its end waits for them.
        """
        turns, pieces = self.start(number, **more)

        async def got() -> dict[str, Reply]:
            return dict(zip(turns, await soon(asyncio.gather(*turns.values())), strict=True))

        await soon(asyncio.gather(*(piece.wait() for piece in pieces)))
        under_way = asyncio.ensure_future(got())
        yield under_way
        await under_way

    async def all_answered(self, number: int = 1, **more: Any) -> None:
        """Play a turn of each session; fail if any turn does."""
        failed = {k: got for k, got in (await self.all(number, **more)).items() if not got.answered}
        assert failed == {}

    async def turns_kept(self) -> dict[str, int]:
        kept = (agent.turns_kept() for agent in self.by_id.values())
        return dict(zip(self.by_id, await soon(asyncio.gather(*kept)), strict=True))


@dataclass
class Server:
    app: web.Application
    agents: Agents

    @property
    def pins(self) -> PinLedger:
        return self.app[ROUTING].pins

    @property
    def pinned(self) -> dict[str, str | None]:
        """The worker of each session in the ledger."""
        return {pin.session: pin.worker for pin in self.pins.sessions()}

    @property
    def calls_under_way(self) -> int:
        """The number of connections to the gateway that are in use."""
        connector = self.app[CLIENT].connector
        assert connector is not None
        return len(connector._acquired)


def running_tasks() -> set["asyncio.Task[Any]"]:
    """Return all tasks but the recorders', because the real gateway keeps connections to them."""
    return {
        task
        for task in asyncio.all_tasks()
        if "recording_gateway" not in getattr(task.get_coro(), "__qualname__", "")
    }


@asynccontextmanager
async def watched_server(
    gateway: URL, *, plugin: bool = True, **settings: object
) -> AsyncIterator[Server]:
    """Run the example in this process, with its sessions; fail if anything is left at the end."""
    tasks, files = running_tasks(), len(open_files())
    routing = {"gateway": str(gateway), "client_session": "client_session", "enabled": plugin}
    app = make_app({"gateway": {"url": str(gateway), **settings}, "smg_routing": routing})
    async with (
        serve(app, handler_cancellation=True, shutdown_timeout=5) as url,
        ClientSession(connector=TCPConnector(limit=0)) as client,
    ):
        server = Server(app, await Agents(url, client).begin())
        yield server
        await until(lambda: not server.calls_under_way)
        assert connections_to(url.port) or not HAS_PROC, "found no connection"
        assert set(server.pinned) == (set(server.agents.by_id) if plugin else set())
        if not plugin:
            assert server.pins.summary() == PinSummary()
    await until(lambda: running_tasks() <= tasks)
    await until(lambda: not connections_to(gateway.port, url.port))
    assert len(open_files()) <= files, open_files()


@contextmanager
def holding(*gateways: Recorder) -> Iterator[asyncio.Event]:
    """Hold each session's second turn until the event is set or the block ends.

    A streamed turn gets the first half of its answer before.
    """
    release = asyncio.Event()

    async def held(call: Call) -> AsyncGenerator[bytes, None]:
        whole = canned(call)
        if isinstance(whole, bytes):
            await release.wait()
            yield whole
            return
        yield await anext(whole) + await anext(whole)
        await release.wait()
        async for piece in whole:
            yield piece

    for gateway in gateways:
        gateway.answer = lambda call: held(call) if is_turn(call, 2) else canned(call)
    try:
        yield release
    finally:
        release.set()


def is_turn(call: Call, number: int) -> bool:
    """Tell whether a call is turn ``number`` of its session."""
    return call.method == "POST" and len(call.json()["messages"]) == number


def assert_keys_of(workers: Iterable[Worker], *, plugin: bool) -> None:
    """Assert that each turn that the worker processes received had its session's key."""
    turns = [turn for worker in workers for turn in worker.received()]
    assert turns
    assert [turn for turn in turns if turn.keys != ([turn.user] if plugin else [])] == []
