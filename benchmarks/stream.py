"""A streamed answer of 2,000 chunks with and without the plugin; no work per chunk."""

import asyncio
import importlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import cycle
from statistics import median

from yarl import URL

from harness.processes import local_url
from harness.servers import serve

from .counting import calls_into_plugin
from .figures import Figure, Part, Progress, Table, ratios, step
from .rounds import interleave, on_one_cpu
from .server_under_test import SSE, ArmName, Loop, ServerUnderTest, barest_app, server_under_test
from .stub import Requests
from .turn import Connection, connected

NAME = "stream"
TITLE = "A streamed answer"

LIMIT = 1.01
CHUNKS = 2000
FEW_CHUNKS = 20
PIECE = 50  # chunks of an arm before the other's turn
SERVERS = 3
# Streams of each arm on each server; the faster loop has time for more.
STREAMS: Mapping[Loop, int] = {"asyncio": 20, "uvloop": 42}
LOOPS = tuple(STREAMS)
ARMS: tuple[ArmName, ...] = ("nothing", "plugin")

_DELTA = {"choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]}
_EVENT = b"data: " + json.dumps({"id": "chatcmpl-1", "model": "stub", **_DELTA}).encode() + b"\n\n"
_CHUNK = f"{len(_EVENT):x}\r\n".encode() + _EVENT + b"\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_HEAD = (
    f"HTTP/1.1 200 OK\r\ncontent-type: {SSE}\r\ntransfer-encoding: chunked\r\n"
    "x-smg-routed-worker-id: http://127.0.0.1:8000\r\n\r\n"
).encode()

_NOTES = (
    f"CPU time of the session server's process for an answer of {CHUNKS:,} chunks. Each chunk "
    "travels alone, as an engine's tokens do: the engine sends the next chunk when the agent has "
    f"the one before. The streams of all arms are open at once. Each goes on by {PIECE} chunks in "
    f"turn. {SERVERS} servers run one after the other. Server, engine and agent share a CPU. A "
    "ratio compares such pieces of the arms. Each piece also bears its share of the cost of the "
    "answer's begin and end.",
    "The interpreter counts the calls, in the second turn of a session. A chunk makes no call: it "
    "resumes the handler, and the middleware that awaits it.",
)


class Engine(Requests):
    """The engine behind the session server; it streams an answer, chunk by chunk on request."""

    def __init__(self, chats: Mapping[str, "Chat"]) -> None:
        super().__init__()
        self._chats = chats

    def request(self, head: bytes, body: bytes) -> None:
        """Begin the stream; the body names the agent."""
        self.transport.write(_HEAD)
        self._chats[json.loads(body)["user"]].begun(self)

    def send(self, chunk: bytes) -> None:
        """Send a chunk."""
        self.transport.write(chunk)


class Chat(Connection):
    """An agent that asks the engine for the next chunk once it has received one."""

    def __init__(self, user: str, session_id: str = "s-1") -> None:
        super().__init__()
        self._session_id = session_id
        self._body = json.dumps({"model": "stub", "stream": True, "user": user}).encode()
        self._wanted = 0
        self.is_open = False

    def begun(self, engine: Engine) -> None:
        """Remember the engine that answers, and have it send the first chunk."""
        self._engine = engine
        engine.send(_CHUNK)

    def data_received(self, data: bytes) -> None:
        """Count the events, and ask for the next."""
        if data.startswith(b"HTTP/") and not data.startswith(b"HTTP/1.1 200"):
            self.fail(RuntimeError(f"a turn failed: {data[:500]!r}"))
            return
        # A small write to a loopback socket arrives in one piece, so no event is cut.
        for _ in range(data.count(b"\n\n")):
            self._wanted -= 1
            if self._wanted:
                self._engine.send(_CHUNK)
            else:
                self.succeed()
        if data.endswith(_LAST_CHUNK):
            self.succeed()

    async def begin(self, chunks: int) -> None:
        """Begin a turn; return once ``chunks`` chunks of its answer have arrived."""
        self._wanted, self.is_open = chunks, True
        self.send_turn(self._session_id, self._body)
        await self.until_done()

    async def go_on(self, chunks: int) -> None:
        """Return once ``chunks`` more chunks have arrived."""
        self._wanted = chunks
        self._engine.send(_CHUNK)
        await self.until_done()

    async def end(self) -> None:
        """End the stream; return once the agent has received the end."""
        self.is_open = False
        self._engine.send(_LAST_CHUNK)
        await self.until_done()


def with_their_share(pieces: Sequence[Mapping[str, float]], count: int) -> list[dict[str, float]]:
    """Return the middle pieces of streams of ``count`` pieces, each with its share of the rest.

    The rest is the cost to begin and end a stream. Every ``count``-th piece does that; the rest is
    the difference between the median cost of these pieces and of the others. Many pieces tell more
    than a few whole streams, because something disturbs every whole stream.
    """
    midst = [piece for place, piece in enumerate(pieces, 1) if place % count]
    ends = pieces[count - 1 :: count]
    rest = {
        arm: median(piece[arm] for piece in ends) - median(piece[arm] for piece in midst)
        for arm in pieces[0]
    }
    return [{arm: piece[arm] + rest[arm] / count for arm in piece} for piece in midst]


@asynccontextmanager
async def engine(chats: Mapping[str, Chat]) -> AsyncIterator[URL]:
    """Run the engine in this process, as the gateway of the session server."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Engine(chats), "127.0.0.1", 0)
    try:
        yield local_url(server.sockets[0].getsockname()[1])
    finally:
        server.close()


def arm_of(server: ServerUnderTest, chat: Chat, chunks: int) -> Callable[[], Awaitable[float]]:
    """Return a function that plays the next piece of a stream and returns the server's CPU seconds.

    The piece that begins a stream also ends the stream before.
    """
    places = cycle(range(0, chunks, PIECE))

    async def piece() -> float:
        place, before = next(places), await server.cpu_seconds()
        if place == 0 and chat.is_open:
            await chat.end()
        await (chat.go_on if place else chat.begin)(PIECE)
        return await server.cpu_seconds() - before

    return piece


async def measure(
    loop: Loop, chunks: int, streams: int, step: Callable[[float], None]
) -> list[dict[str, float]]:
    """Return the cost of each piece of ``streams`` streams in each arm, on an event loop."""
    chats: dict[str, Chat] = {arm: Chat(arm) for arm in ARMS}
    async with (
        engine(chats) as gateway,
        server_under_test(gateway, ARMS, loop=loop) as server,
        AsyncExitStack() as stack,
    ):
        arms: dict[str, Callable[[], Awaitable[float]]] = {}
        for arm, url in server.urls.items():
            await stack.enter_async_context(connected([chats[arm]], url))
            arms[arm] = arm_of(server, chats[arm], chunks)
        pieces = chunks // PIECE
        return with_their_share(await interleave(arms, streams * pieces, step), pieces)


async def calls_of_a_stream(chunks: int) -> int:
    """Return how often a turn with an answer of ``chunks`` chunks calls the plugin's functions.

    The turn is the second of its session, so the ledger knows the session. The session server runs
    in this process.
    """
    chat = Chat("plugin")

    async def turn(first: int) -> None:
        await chat.begin(first)
        await chat.end()

    async with engine({"plugin": chat}) as gateway, AsyncExitStack() as stack:
        url = await stack.enter_async_context(serve(barest_app(gateway, "plugin")))
        async with connected([chat], url):
            await turn(1)
            return await calls_into_plugin(partial(turn, chunks))


async def run(progress: Progress, *, quick: bool = False) -> Part:
    """Measure the streams on both event loops; count the calls of a short and a long stream."""
    importlib.import_module("uvloop")  # the server process needs it; fail early
    chunks, servers = (2 * PIECE, 1) if quick else (CHUNKS, SERVERS)
    measured = []
    with on_one_cpu():
        for place, loop in enumerate(LOOPS):
            costs = []
            for server in range(servers):
                share = 1 / servers / len(LOOPS)
                told = step(progress, (place * servers + server) * share, share, f"on {loop}")
                costs += await measure(loop, chunks, 2 if quick else STREAMS[loop], told)
            measured.append(costs)
    nothing = [
        Figure(tuple(1e6 * piece["nothing"] / PIECE for piece in pieces), "µs")
        for pieces in measured
    ]
    plugin = [Figure(ratios(pieces, "plugin", "nothing"), "ratio", LIMIT) for pieces in measured]
    table = Table(
        f"CPU time of the session server for an answer of {chunks:,} chunks",
        ("", *LOOPS),
        (("nothing, a chunk", *nothing), ("plugin / nothing, the whole answer", *plugin)),
    )
    few, many = [await calls_of_a_stream(number) for number in (FEW_CHUNKS, chunks)]
    calls = Table(
        "Calls of the plugin's functions in a turn",
        ("", "calls"),
        (
            (f"an answer of {FEW_CHUNKS} chunks", Figure((few,), "calls")),
            (f"an answer of {chunks:,} chunks", Figure((many,), "calls", at_most=few)),
        ),
    )
    return Part(NAME, TITLE, (table, calls), _NOTES)
