"""A turn through a whole session server, with the plugin and with a header by hand."""

import asyncio
import importlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from statistics import median
from typing import cast

from yarl import URL

from harness.agents import CHAT

from .figures import Figure, Part, Progress, Table, ratios, step
from .rounds import added_up, interleave
from .server_under_test import KEY, ArmName, Kind, Loop, ServerUnderTest, server_under_test
from .servers import upstream
from .stub import REPLY, content_length

NAME = "turn"
TITLE = "A proxied turn through a session server"

LIMIT = 1.05
OVER_THE_FLOOR: Mapping[Loop, float] = {"asyncio": 1.04, "uvloop": 1.05}  # the whole server
PRECISION = 0.1
LOOPS = tuple(OVER_THE_FLOOR)
ARMS: Mapping[Kind, tuple[ArmName, ...]] = {
    "whole": ("by hand", "floor", "plugin"),
    "barest": ("by hand", "floor", "plugin"),
}
AGENTS = 5  # play at once
TURNS = 10  # in a session
SYSTEM_CHARACTERS, USER_CHARACTERS = 3000, 900
SESSIONS: Mapping[Kind, int] = {"whole": 160, "barest": 60}  # per agent and arm
SHORT = 2000  # characters of a turn through the barest proxy
# The openai client (2.x) sends these too, and the whole server passes them on.
OPENAI_HEADERS = """\
Accept: application/json
Accept-Encoding: gzip, deflate
Authorization: Bearer none
Connection: keep-alive
User-Agent: AsyncOpenAI/Python 2.8.0
X-Stainless-Arch: x64
X-Stainless-Async: async:asyncio
X-Stainless-Lang: python
X-Stainless-OS: Linux
X-Stainless-Package-Version: 2.8.0
X-Stainless-Read-Timeout: 600
X-Stainless-Retry-Count: 0
X-Stainless-Runtime: CPython
X-Stainless-Runtime-Version: 3.12.3
""".replace("\n", "\r\n")


class Connection(asyncio.Protocol):
    """An agent's keep-alive connection to the session server."""

    def __init__(self) -> None:
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the wait, if there is one."""
        self.fail(ConnectionError(f"the session server hung up: {exc}"))

    def send(self, method: str, path: str, body: bytes = b"", headers: str = "") -> None:
        """Send a request."""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)

    def send_turn(self, session_id: str, body: bytes, headers: str = "") -> None:
        """Send a turn."""
        self.send("POST", f"/sessions/{session_id}/{CHAT}", body, headers)

    async def until_done(self) -> None:
        """Wait for ``succeed()``; raise what ``fail()`` was given."""
        self._done = asyncio.get_running_loop().create_future()
        await self._done

    def succeed(self) -> None:
        """End the wait, if there is one."""
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def fail(self, error: Exception) -> None:
        """End the wait with an error, if there is one."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def close(self) -> None:
        """Hang up."""
        self._transport.close()


class Caller(Connection):
    """An agent that spends as little time as possible on an answer."""

    def __init__(self) -> None:
        super().__init__()
        self._answer = b""

    def data_received(self, data: bytes) -> None:
        """End the wait when the answer is complete."""
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end or len(body) < content_length(head):
            return
        self._answer = b""
        if head.startswith(b"HTTP/1.1 2"):
            self.succeed()
        else:
            self.fail(RuntimeError(f"a request failed: {(head + end + body)[:500]!r}"))

    async def turn(self, session_id: str, body: bytes, headers: str = "") -> None:
        """Play a turn; return once its answer has arrived. Raises ``RuntimeError`` if it failed."""
        self.send_turn(session_id, body, headers)
        await self.until_done()

    async def begin(self, session_id: str) -> None:
        """Create a session at the whole session server."""
        self.send("POST", "/sessions", json.dumps({"session_id": session_id}).encode())
        await self.until_done()

    async def end(self, session_id: str) -> None:
        """Delete a session at the whole session server."""
        self.send("DELETE", f"/sessions/{session_id}")
        await self.until_done()


def _itself(agent: Connection) -> Connection:
    return agent


@asynccontextmanager
async def connected(agents: Sequence[Connection], server: URL) -> AsyncIterator[None]:
    """Connect ``agents`` to a session server."""
    loop = asyncio.get_running_loop()
    made = []
    try:
        for agent in agents:
            await loop.create_connection(
                partial(_itself, agent), server.host or "", server.port or 0
            )
            made.append(agent)
        yield
    finally:
        for agent in made:
            agent.close()


def long_turn(user: str, characters: int) -> bytes:
    """Return the body of a turn whose conversation has so many characters."""
    messages = [{"role": "user", "content": "x" * characters}]
    return json.dumps({"model": "stub", "user": user, "messages": messages}).encode()


def conversation(turns: int) -> list[bytes]:
    """Return the bodies of a session's turns; each repeats the conversation so far."""
    messages = [{"role": "system", "content": _text(SYSTEM_CHARACTERS)}]
    bodies = []
    for _ in range(turns):
        messages.append({"role": "user", "content": _text(USER_CHARACTERS)})
        bodies.append(json.dumps({"model": "stub", "messages": messages}).encode())
        messages.append({"role": "assistant", "content": REPLY})
    return bodies


def _text(characters: int) -> str:
    """Return a text like a tool's output."""
    lines = (f'line {number}: "what there is to read in it"\n' for number in count())
    text = ""
    while len(text) < characters:
        text += next(lines)
    return text[:characters]


@dataclass(slots=True)
class Play:
    """An arm: its agents, each at the same turn of its own session."""

    arm: ArmName
    kind: Kind
    server: ServerUnderTest
    agents: Sequence[Caller]
    bodies: Sequence[bytes]

    def chunk(self) -> Callable[[], Awaitable[float]]:
        """Return a function that plays each agent's next turn.

        It returns the server's CPU seconds per turn, without those to create and delete sessions.
        """
        sessions, places, names = count(), cycle(range(len(self.bodies))), [""]

        async def turn() -> float:
            place = next(places)
            if place == 0:
                names[:] = [f"rollout-{next(sessions):06}" for _ in self.agents]
                await self._all(Caller.begin, names)
            before = await self.server.cpu_seconds()
            await asyncio.gather(
                *(
                    agent.turn(name, self.bodies[place], self._headers(name))
                    for agent, name in zip(self.agents, names, strict=True)
                )
            )
            cost = await self.server.cpu_seconds() - before
            if place == len(self.bodies) - 1:
                await self._all(Caller.end, names)
            return cost / len(self.agents)

        return turn

    def _headers(self, name: str) -> str:
        if self.kind == "barest":
            return ""
        by_hand = self.arm in ("by hand", "floor")
        return OPENAI_HEADERS + (f"{KEY}: {name}\r\n" if by_hand else "")

    async def _all(
        self, request: Callable[[Caller, str], Awaitable[None]], names: Sequence[str]
    ) -> None:
        if self.kind == "whole":
            await asyncio.gather(*map(request, self.agents, names))


async def measure(
    kind: Kind, loop: Loop, sessions: int, step: Callable[[float], None]
) -> list[dict[str, float]]:
    """Return the cost of a turn, for each of an agent's ``sessions`` sessions, on an event loop."""
    bodies = conversation(TURNS) if kind == "whole" else [long_turn("s", SHORT)] * TURNS
    async with (
        upstream() as gateway,
        server_under_test(gateway, ARMS[kind], kind=kind, loop=loop) as server,
        AsyncExitStack() as stack,
    ):
        arms: dict[str, Callable[[], Awaitable[float]]] = {}
        for arm, url in server.urls.items():
            agents = [Caller() for _ in range(AGENTS)]
            await stack.enter_async_context(connected(agents, url))
            arms[arm] = Play(arm, kind, server, agents, bodies).chunk()
        # Any TURNS successive rounds have one turn of each number, wherever a session begins.
        rounds = added_up(await interleave(arms, sessions * TURNS, step), TURNS)
        return [{arm: cost / TURNS for arm, cost in costs.items()} for costs in rounds]


async def run(progress: Progress, *, quick: bool = False) -> Part:
    """Measure the whole server, then the barest proxy, each on both event loops."""
    importlib.import_module("uvloop")  # the server process needs it; fail early
    plan = dict.fromkeys(SESSIONS, 1) if quick else SESSIONS
    tables: list[Table] = []
    headline = ""
    done = 0.0
    for kind, sessions in plan.items():
        measured = []
        for loop in LOOPS:
            share = sessions / sum(plan.values()) / len(LOOPS)
            told = step(progress, done, share, f"the {kind} one on {loop}")
            measured.append(await measure(kind, loop, sessions, told))
            done += share
        tables.append(costs(kind, measured))
        headline = headline or in_short(measured)  # the whole server comes first
    return Part(NAME, TITLE, tuple(tables), notes(), headline)


def in_short(measured: Sequence[Sequence[dict[str, float]]]) -> str:
    """Say what a turn through the whole server costs on the event loops, in ``LOOPS`` order."""

    def more(arm: str, base: str) -> list[str]:
        return [f"{median(ratios(rounds, arm, base)) - 1:.0%}" for rounds in measured]

    by_hand, floor, over = (
        more("plugin", "by hand"),
        more("floor", "by hand"),
        more("plugin", "floor"),
    )
    return (
        f"A turn through a whole session server takes {by_hand[0]} more CPU time than with the"
        f" header written by hand ({LOOPS[1]}: {by_hand[1]}). aiohttp itself spends {floor[0]} on"
        f" any middleware and any trace hook; the plugin adds {over[0]} to that"
        f" ({LOOPS[1]}: {over[1]})."
    )


def costs(kind: Kind, measured: Sequence[Sequence[dict[str, float]]]) -> Table:
    """Return the costs of the arms on each event loop, in the order of ``LOOPS``."""
    by_hand = [Figure(tuple(1e6 * r["by hand"] for r in rounds), "µs") for rounds in measured]
    rows: list[tuple[str | Figure, ...]] = [("by hand, a turn", *by_hand)]
    floor_limits = OVER_THE_FLOOR if kind == "whole" else {}
    for arm, base, limits in (
        ("floor", "by hand", {}),
        ("plugin", "by hand", dict.fromkeys(LOOPS, LIMIT)),
        ("plugin", "floor", floor_limits),
    ):
        figures = (
            Figure(ratios(rounds, arm, base), "ratio", limits.get(loop), precision=PRECISION)
            for loop, rounds in zip(LOOPS, measured, strict=True)
        )
        rows.append((f"{arm} / {base}", *figures))
    titles = {"whole": "A whole session server", "barest": "A minimal proxy"}
    return Table(f"{titles[kind]}, CPU time", ("", *LOOPS), tuple(rows))


def notes() -> tuple[str, ...]:
    """Say what the tables measure."""
    last = conversation(TURNS)[-1]
    return (
        "CPU time of the session server's process, without an access log. The agents and the "
        f"upstream are other processes. {AGENTS} agents on keep-alive connections play a turn at "
        f"once in one arm, then in the next. A ratio compares {TURNS} such turns. The ledger is "
        "on, as it is by default.",
        f"Whole: examples/session_server.py. A session has {TURNS} turns. The last turn has "
        f"{len(json.loads(last)['messages'])} messages, {len(last) / 1000:.0f} kB. The server "
        "reads them, keeps the transcript, and forgets the session when it is over. The agents "
        "send the headers of the openai client. By hand: [smg_routing] is not enabled. The agent "
        f"itself sends {KEY}, and the server passes it on. So the server parses and copies one "
        "more inbound header.",
        f"Barest: a handler that passes on {SHORT / 1000:.0f} kB unread and keeps nothing. By "
        f"hand: the handler itself passes headers={{'{KEY}': session_id}}.",
        "Floor: by hand, with a middleware and a TraceConfig that do nothing. It costs what "
        "aiohttp itself costs.",
    )
