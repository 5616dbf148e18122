"""The example session server in this process, its agents, and the look at what is left over."""

import asyncio
import json
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
)
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import aiohttp
from aiohttp import ClientSession, TCPConnector, web
from session_server import CLIENT, make_app
from yarl import URL

from aiohttp_smg_routing import ROUTING, PinLedger, PinSummary
from aiohttp_smg_routing.testing import Call, Recorder, canned
from soak.servers import Worker

from ..processes import HAS_PROC, connections_to, open_files
from ..workers import chat

T = TypeVar("T")
SESSIONS = [f"s-{number}" for number in range(12)]
PATIENCE_SECONDS = 30


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait for what must happen; a test that waits in vain fails instead of hanging."""
    return await asyncio.wait_for(awaitable, PATIENCE_SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds, which nobody tells of."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_SECONDS
    while not condition():
        assert loop.time() < deadline, "it has not come about"
        await asyncio.sleep(0.01)


class Got(NamedTuple):
    """What an agent got for a turn; ``status`` is None where it was hung up on without a word."""

    status: int | None
    body: bytes
    whole: bool = True

    @property
    def answered(self) -> bool:
        return self.whole and self.status == 200

    @property
    def is_failure_of_the_gateway(self) -> bool:
        """Tell whether the gateway, or the lack of it, is what the agent was told of."""
        if not self.whole:
            return self.status == 200  # a stream that broke off
        try:
            return bool(json.loads(self.body)["error"]["code"])
        except (LookupError, TypeError, ValueError):
            return False


@dataclass
class Agent:
    """One session's agent."""

    client: ClientSession
    session: URL
    worker: str = ""
    """The one that answered last, where the gateway says so."""

    async def begin(self) -> None:
        body = {"session_id": self.session.name}
        async with self.client.post(self.session.parent, json=body) as response:
            assert response.status == 201

    async def turn(
        self, number: int = 1, *, begun: asyncio.Event | None = None, **more: Any
    ) -> Got:
        """Play a turn; ``begun`` is set when a piece of the answer is here."""
        status, body = None, b""
        chat_url = self.session / "v1/chat/completions"
        turn = {**chat(self.session.name, number), **more}
        try:
            async with self.client.post(chat_url, json=turn, allow_redirects=False) as response:
                status = response.status
                self.worker = response.headers.get("x-smg-routed-worker-id", self.worker)
                async for piece in response.content.iter_any():
                    body += piece
                    if begun:
                        begun.set()
        except aiohttp.ClientError:
            return Got(status, body, whole=False)
        return Got(status, body)

    async def turns_kept(self) -> int:
        """Return how many turns the server keeps, once no turn is under way."""
        while True:
            async with self.client.get(self.session) as response:
                document = await response.json()
            messages = document["messages"]
            if not messages or messages[-1]["role"] == "assistant":
                return int(document["turns"])
            await asyncio.sleep(0.01)


@dataclass
class Agents:
    """All of a server's sessions."""

    server: URL
    client: ClientSession
    by_id: dict[str, Agent] = field(default_factory=dict)

    async def begin(self, sessions: Iterable[str] = SESSIONS) -> "Agents":
        new = {each: Agent(self.client, self.server / "sessions" / each) for each in sessions}
        await asyncio.gather(*(agent.begin() for agent in new.values()))
        self.by_id |= new
        return self

    async def all(self, number: int = 1, **more: Any) -> dict[str, Got]:
        """Play a turn of each session, all at once."""
        turns = (agent.turn(number, **more) for agent in self.by_id.values())
        return dict(zip(self.by_id, await soon(asyncio.gather(*turns)), strict=True))

    @asynccontextmanager
    async def begun(
        self, number: int = 1, **more: Any
    ) -> AsyncIterator["asyncio.Future[dict[str, Got]]"]:
        """Begin a streamed turn of each session; enter once each agent has a piece of it.

        What is yielded has what the agents got, at the end of the block or later.
        """
        begun = {each: asyncio.Event() for each in self.by_id}
        turns = [
            asyncio.create_task(agent.turn(number, begun=begun[each], **more))
            for each, agent in self.by_id.items()
        ]

        async def got() -> dict[str, Got]:
            return dict(zip(begun, await soon(asyncio.gather(*turns)), strict=True))

        await soon(asyncio.gather(*(event.wait() for event in begun.values())))
        under_way = asyncio.ensure_future(got())
        yield under_way
        await under_way

    async def all_answered(self, number: int = 1, **more: Any) -> None:
        """Play a turn of each session; none may fail."""
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
        """The worker of each session, as the ledger has it."""
        return {pin.session: pin.worker for pin in self.pins.sessions()}

    @property
    def calls_under_way(self) -> int:
        """How many connections to the gateway are in use."""
        connector = self.app[CLIENT].connector
        assert connector is not None
        return len(connector._acquired)


def running_tasks() -> set["asyncio.Task[Any]"]:
    """Return all tasks but those of recorders: the real gateway keeps its connections to them."""
    return {
        task
        for task in asyncio.all_tasks()
        if "recording_gateway" not in getattr(task.get_coro(), "__qualname__", "")
    }


@asynccontextmanager
async def session_server(
    gateway: URL, *, plugin: bool = True, **settings: object
) -> AsyncIterator[Server]:
    """Run the example in this process, with its sessions; nothing may be left of it at the end."""
    tasks, files = running_tasks(), len(open_files())
    routing = {"gateway": str(gateway), "client_session": "client_session", "enabled": plugin}
    app = make_app({"gateway": {"url": str(gateway), **settings}, "smg_routing": routing})
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=5)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        async with ClientSession(connector=TCPConnector(limit=0)) as client:
            agents = Agents(URL(f"http://{host}:{port}"), client)
            server = Server(app, await agents.begin())
            yield server
            await until(lambda: not server.calls_under_way)
            assert connections_to(port) or not HAS_PROC, "they are seen"
            assert set(server.pinned) == (set(agents.by_id) if plugin else set())
            if not plugin:
                assert server.pins.summary() == PinSummary()
    finally:
        await runner.cleanup()
    await until(lambda: running_tasks() <= tasks)
    await until(lambda: not connections_to(gateway.port, port))
    assert len(open_files()) <= files, open_files()


@contextmanager
def holding(*gateways: Recorder) -> Iterator[asyncio.Event]:
    """Have each second turn held until the event that is yielded is set, or the block ends.

    One that is streamed is answered to its half before.
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
    """Tell whether it is that turn of a session."""
    return call.method == "POST" and len(call.json()["messages"]) == number


def turns_of(*gateways: Recorder) -> list[Call]:
    """Return the turns that arrived."""
    return [call for each in gateways for call in each.calls if call.method == "POST"]


def assert_keys(calls: Iterable[Call], *, plugin: bool = True) -> None:
    """Assert that each call carried the key of the session that its body names, and no other."""
    turns = [call for call in calls if call.method == "POST"]
    assert turns
    for call in turns:
        assert call.keys == ([call.json()["user"].encode()] if plugin else [])


def assert_keys_of(workers: Iterable[Worker], *, plugin: bool) -> None:
    """Assert the same of what worker processes have received."""
    turns = [turn for worker in workers for turn in worker.received()]
    assert turns
    assert [turn for turn in turns if turn.keys != ([turn.user] if plugin else [])] == []
