"""Agents on real engines behind the real SMG gateway, with the plugin on and with it off.

    make demo

Both arms play the same load through ``session_server.py``; only ``[smg_routing] enabled`` differs.
Everything runs on free loopback ports, and every figure in the table is measured in this run.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import quantiles

import aiohttp
from engines import engines, healthy
from yarl import URL

from aiohttp_smg_routing.testing import child_process, free_port, smg_gateway

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install 'aiohttp_smg_routing[demo]'")

# One character is one token of the engines' model. Long enough that a cold prompt is seen to cost
# time, short enough that both arms end within a minute and a half on two cores.
SYSTEM_CHARACTERS = 500
USER_CHARACTERS = 80
REPLY_CHARACTERS = 8
TEMPLATE_TOKENS = 40  # what the chat template adds to a turn, at the most

TURN_SECONDS = 120  # the longest that a turn may take on a slow machine
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAILURES = (aiohttp.ClientError, asyncio.TimeoutError, ImportError, OSError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Load:
    """What each arm plays: ``sessions`` at once, ``turns`` in each, on ``workers`` engines."""

    sessions: int
    turns: int
    workers: int

    @property
    def slots(self) -> int:
        """The conversations that one engine has to hold when they are spread evenly."""
        return -(-self.sessions // self.workers)

    @property
    def context(self) -> int:
        """The tokens of a whole conversation, or a few more."""
        turn = USER_CHARACTERS + REPLY_CHARACTERS + TEMPLATE_TOKENS
        return SYSTEM_CHARACTERS + TEMPLATE_TOKENS + self.turns * turn


@dataclass(frozen=True, slots=True)
class Turn:
    """One measured turn; ``number`` counts from 0 within its session."""

    session_id: str
    number: int
    worker: str
    first_token_seconds: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Arm:
    """All turns of one load, the gateway's count of each policy branch, and the wall time."""

    turns: tuple[Turn, ...]
    branches: Counter[str]
    seconds: float

    @property
    def sessions(self) -> int:
        """The number of sessions."""
        return len({turn.session_id for turn in self.turns})

    @property
    def stayed(self) -> int:
        """The number of sessions that one worker answered from the first turn to the last."""
        return self.sessions - moved_sessions(self.turns)

    @property
    def later_turns(self) -> list[Turn]:
        """All but the first turns, which no cache can help."""
        return [turn for turn in self.turns if turn.number]

    @property
    def cached_share(self) -> float:
        """The share of the later turns' prompt tokens that came from a KV cache, 0 to 1."""
        cached = sum(turn.cached_tokens for turn in self.later_turns)
        return cached / sum(turn.prompt_tokens for turn in self.later_turns)

    def first_token(self, percent: int) -> float:
        """Return that percentile of the later turns' time to first token, in seconds."""
        times = [turn.first_token_seconds for turn in self.later_turns]
        return quantiles(times, n=100, method="inclusive")[percent - 1]


def moved_sessions(turns: Iterable[Turn]) -> int:
    """Return how many sessions were answered by more than one worker."""
    workers: defaultdict[str, set[str]] = defaultdict(set)
    for turn in turns:
        workers[turn.session_id].add(turn.worker)
    return sum(len(seen) > 1 for seen in workers.values())


async def play_arm(load: Load, *, plugin: bool, progress: Progress) -> Arm:
    """Play ``load`` through fresh processes, so that no arm finds another one's warm cache."""
    name = f"plugin {'on' if plugin else 'off'}"
    total = load.sessions * load.turns
    bar = progress.add_task(f"{name:10}", total=total, state="starting the servers")
    turns: list[Turn] = []

    def show() -> None:
        state = f"{len(turns)}/{total} turns, {moved_sessions(turns)} sessions moved"
        progress.update(bar, completed=len(turns), state=state)

    def played(turn: Turn) -> None:
        turns.append(turn)
        show()

    async with (
        engines(load.workers, slots=load.slots, context=load.context) as workers,
        smg_gateway(workers, policy="manual", args=("--assignment-mode", "min_group")) as gateway,
        session_server(gateway.url, plugin=plugin) as server,
        aiohttp.ClientSession(
            raise_for_status=check_status, timeout=aiohttp.ClientTimeout(total=TURN_SECONDS)
        ) as client,
    ):
        progress.console.print(f"{name}: all servers are up, {load.sessions} agents begin")
        show()
        begin, opening = time.perf_counter(), asyncio.Lock()
        await asyncio.gather(
            *(
                play_session(client, server, seed, load.turns, opening, played)
                for seed in range(load.sessions)
            )
        )
        seconds = time.perf_counter() - begin
        return Arm(tuple(turns), await gateway.branches(), seconds)


@asynccontextmanager
async def session_server(gateway: URL, *, plugin: bool) -> AsyncIterator[URL]:
    """Run the example session server before ``gateway``, with or without the plugin."""
    url = URL(f"http://127.0.0.1:{free_port()}")
    program = Path(__file__).with_name("session_server.py")
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        file = Path(folder, "settings.toml")
        write_settings(file, url, gateway, plugin=plugin)
        async with (
            aiohttp.ClientSession() as session,
            child_process(
                *(sys.executable, str(program), str(file)), ready=partial(healthy, session, url)
            ),
        ):
            yield url


def write_settings(file: Path, server: URL, gateway: URL, *, plugin: bool) -> None:
    """Write the session server's settings; a JSON string or boolean is a TOML one too."""
    text = f"""\
[server]
host = {json.dumps(server.host)}
port = {server.port}

[gateway]
url = {json.dumps(str(gateway))}
timeout_seconds = {TURN_SECONDS}
retries = 2

[smg_routing]
enabled = {json.dumps(plugin)}
gateway = {json.dumps(str(gateway))}
client_session = "client_session"
"""
    file.write_text(text, encoding="utf-8")


async def check_status(response: aiohttp.ClientResponse) -> None:
    """Raise ``RuntimeError`` with what the server had to say, unless it succeeded."""
    if not response.ok:
        text = await response.text()
        raise RuntimeError(f"{response.method} {response.url}: {response.status} {text}")


async def play_session(
    client: aiohttp.ClientSession,
    server: URL,
    seed: int,
    turns: int,
    opening: asyncio.Lock,
    played: Callable[[Turn], None],
) -> None:
    """Be one agent: hold a conversation in which every turn repeats all that was said before.

    The same ``seed`` says the same in both arms; two seeds share no prefix, so a session finds
    nothing in a cache but what it left there itself. First turns come one at a time, under
    ``opening``: of those that come at once ``min_group`` can send too many to one worker, whose
    cache then has no room for them.
    """
    random = Random(seed)
    async with client.post(server / "sessions") as response:
        session_id: str = (await response.json())["session_id"]
    messages = [{"role": "system", "content": letters(random, SYSTEM_CHARACTERS)}]
    for number in range(turns):
        messages.append({"role": "user", "content": letters(random, USER_CHARACTERS)})
        async with opening if number == 0 else nullcontext():
            turn, reply = await play_turn(client, server, session_id, number, messages)
        messages.append({"role": "assistant", "content": reply})
        played(turn)


def letters(random: Random, count: int) -> str:
    """Return ``count`` random letters and spaces: nobody reads them but the engines."""
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz ", k=count))


async def play_turn(
    client: aiohttp.ClientSession,
    server: URL,
    session_id: str,
    number: int,
    messages: list[dict[str, str]],
) -> tuple[Turn, str]:
    """Send the conversation, read the streamed reply, and return what was measured and said."""
    body = {
        "model": "random-llama",
        "messages": messages,
        "max_tokens": REPLY_CHARACTERS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reply, usage, first_token = "", None, 0.0
    begin = time.perf_counter()
    url = server / "sessions" / session_id / "v1/chat/completions"
    async with client.post(url, json=body) as response:
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "choices" not in event:
                raise RuntimeError(f"turn {number + 1} of a session failed: {event}")
            for choice in event["choices"]:
                reply += choice["delta"].get("content") or ""
            if reply and not first_token:
                first_token = time.perf_counter() - begin
            usage = event.get("usage") or usage
    if usage is None:
        raise RuntimeError(f"turn {number + 1} of a session broke off after {reply!r}")
    worker = response.headers.get("x-smg-routed-worker-id")
    if worker is None:
        raise RuntimeError(
            "the gateway does not say which worker answered: smg 1.10.1 or newer does"
        )
    turn = Turn(
        session_id=session_id,
        number=number,
        worker=worker,
        first_token_seconds=first_token,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
    )
    return turn, reply


def report(console: Console, on: Arm, off: Arm) -> int:
    """Print what both arms measured and what it shows; return the demo's exit status."""
    console.print()
    console.print(comparison(on, off))
    if found := faults(on):
        console.print(f"The plugin does not do its work here: {'; '.join(found)}.")
        return 1
    console.print(
        f"With the plugin on, {on.stayed} of {on.sessions} sessions stayed on one worker, and"
        f" {on.cached_share:.0%} of the prompt tokens came from a KV cache; with it off,"
        f" {off.stayed} of {off.sessions} stayed, and {off.cached_share:.0%} did."
    )
    return 0


def comparison(on: Arm, off: Arm) -> Table:
    """Return the table, a column for each arm."""
    table = Table("", "plugin on", "plugin off")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, value: Callable[[Arm], object], *, end_section: bool = False) -> None:
        table.add_row(name, str(value(on)), str(value(off)), end_section=end_section)

    row("sessions", lambda arm: arm.sessions)
    row("turns", lambda arm: len(arm.turns))
    row("sessions that stayed on one worker", lambda arm: arm.stayed)
    row("wall time", lambda arm: f"{arm.seconds:.1f} s", end_section=True)
    row("gateway: vacant (a session was pinned)", lambda arm: arm.branches["vacant"])
    row("gateway: occupied_hit (a turn followed)", lambda arm: arm.branches["occupied_hit"])
    row(
        "gateway: no_routing_id (no key)",
        lambda arm: arm.branches["no_routing_id"],
        end_section=True,
    )
    row("second turn on: prompt tokens from KV cache", lambda arm: f"{arm.cached_share:.1%}")
    row("second turn on: time to first token, p50", lambda arm: f"{arm.first_token(50):.2f} s")
    row("second turn on: time to first token, p95", lambda arm: f"{arm.first_token(95):.2f} s")
    return table


def faults(arm: Arm) -> list[str]:
    """Return what keeps ``arm`` from being one whose every session was pinned, in plain words."""
    found = []
    moved = moved_sessions(arm.turns)
    if moved:
        found.append(f"{moved} of {arm.sessions} sessions moved to another worker")
    follow_ups = len(arm.later_turns)
    hits, keyless = arm.branches["occupied_hit"], arm.branches["no_routing_id"]
    if hits < follow_ups or keyless:  # more: the gateway counts its own retries too
        found.append(
            f"the gateway counted {hits} turns that followed a pin and {keyless} without a key,"
            f" where {follow_ups} and 0 were due"
        )
    return found


async def demo(load: Load, console: Console) -> int:
    """Play both arms, print the comparison, and return the exit status."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    # A file gets the lines alone, without the bars.
    with Progress(*columns, console=console, disable=not console.is_interactive) as progress:
        on = await play_arm(load, plugin=True, progress=progress)
        off = await play_arm(load, plugin=False, progress=progress)
    return report(console, on, off)


async def run_until_signal(load: Load, console: Console) -> int:
    """Run the demo; a signal or a failure ends it in order, with nothing left behind."""
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:  # a second one must not cut the clearing up short
            task.cancel()

    task = asyncio.ensure_future(demo(load, console))
    for number in STOP_SIGNALS:
        nohup = number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
        if not nohup:
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except (asyncio.CancelledError, *FAILURES) as error:
        if received:
            print(f"Stopped by {received[0].name}; all processes are gone.", file=sys.stderr)
            return 128 + received[0]
        if isinstance(error, asyncio.CancelledError):
            raise
        print(f"The demo failed: {str(error) or repr(error)}", file=sys.stderr)
        return 1


def at_least_two(text: str) -> int:
    """Read an option: of one session, turn or worker nothing can be compared."""
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is less than 2")
    return number


def main() -> int:
    """Run the demo that the command line asks for; return its exit status."""
    parser = argparse.ArgumentParser(description="Compare the same load, plugin on and off.")
    for option, default in (("--sessions", 9), ("--turns", 5), ("--workers", 3)):
        parser.add_argument(option, type=at_least_two, default=default, help="(%(default)s)")
    args = parser.parse_args()
    # rich would let FORCE_COLOR put control codes and moving bars into a file.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False)
    return asyncio.run(run_until_signal(Load(**vars(args)), console))


if __name__ == "__main__":
    sys.exit(main())
