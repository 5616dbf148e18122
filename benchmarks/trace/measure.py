"""Play all arms of a trace, and make tables of the results."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, quantiles

from benchmarks.figures import Figure, Part, Progress, Table

from .arms import Arm
from .cache import BLOCK, chain
from .limit import Blocks, shared_cache
from .play import Played, Settings, play
from .read import Session

INFINITE, ONE_LRU = "the limit: one infinite cache", "one LRU cache for all"
CACHED, OF_LIMIT, DONE = "from the cache", "of the limit", "all done"
BEHIND = 0.1
"""The machine's share of the calls' time above which a note warns."""

ROOMS = {1: "all sessions", 1 / 2: "half of the sessions", 1 / 8: "an eighth of the sessions"}


@dataclass(frozen=True, slots=True)
class Plan:
    """A trace to play: its sessions, played by each arm in each room."""

    name: str
    sessions: Sequence[Session]
    arms: Sequence[Arm]
    rooms: Sequence[float]
    """Total sizes of the caches, as shares of the tokens of all sessions that run at once."""

    settings: Settings
    rounds: int = 1

    def tokens(self, room: float) -> int:
        """Return the size of a worker's cache; the longest call always fits."""
        settings = self.settings
        lengths = [session.length for session in self.sessions]
        at_once = min(settings.at_once or len(lengths), len(lengths))
        total = fmean(lengths) * at_once / settings.speed.per_token
        share = BLOCK * round(room * total / settings.workers / BLOCK)
        return max(share, settings.speed.needs(max(lengths)))

    @property
    def calls(self) -> int:
        """The number of calls of all sessions."""
        return sum(len(session.turns) for session in self.sessions)


@dataclass(slots=True)
class Room:
    """The results of all arms in one room, that is with one size of caches."""

    room: float
    tokens: int
    rounds: defaultdict[str, list[Played]] = field(default_factory=lambda: defaultdict(list))
    limit: float = 0
    one_lru: float = 0
    distinct: int = 0
    """The tokens in an infinite cache at the end; tokens that sessions share count once."""


async def measure(progress: Progress, plan: Plan) -> Part:
    """Play all arms of a plan in all rooms; return the tables."""
    rooms = [Room(room, plan.tokens(room)) for room in plan.rooms]
    plays = [
        (number, room, arm)
        for number in range(1, plan.rounds + 1)
        for room in rooms
        for arm in plan.arms
    ]
    for count, (number, room, arm) in enumerate(plays):
        state = f"room for {called(room.room)}: {arm.name}"
        state += f", round {number} of {plan.rounds}" * (plan.rounds > 1)
        done = 0

        def step(count: int = count, state: str = state) -> None:
            nonlocal done
            done += 1
            progress((count + done / plan.calls) / len(plays), state)

        progress(count / len(plays), state)
        speed = replace(plan.settings.speed, tokens=room.tokens)
        settings = replace(plan.settings, speed=speed)
        played = await play(arm, plan.sessions, settings, step)
        if not played.calls:
            raise RuntimeError(f"no call of {arm.name} was answered: {dict(played.failures)}")
        room.rounds[arm.name].append(played)
        if not room.limit:
            progress((count + 1) / len(plays), "what one cache for all would give")
            set_limits(plan, room, played)
    tables = tuple(table_of(plan, room) for room in rooms)
    title = f"Agent trace {plan.name}"
    return Part(title, title, tables, tuple(notes(plan, rooms)), headline(plan, rooms))


def set_limits(plan: Plan, room: Room, played: Played) -> None:
    """Compute what one cache would give, in the order in which an arm's calls began."""
    per_token = plan.settings.speed.per_token
    blocks: list[Blocks] = []
    for call in sorted(played.calls, key=lambda call: call.begun):
        session = plan.sessions[call.session]
        prompt, output = session.prompt(call.number), session.output(call.number)
        names = array("q", chain(prompt + output, per_token))  # a fifth of the memory of a list
        blocks.append((names, len(prompt), len(prompt) + len(output)))
    room.distinct = BLOCK * len(set().union(*(names for names, _, _ in blocks)))
    room.limit = shared_cache(blocks, float("inf"), per_token)
    room.one_lru = shared_cache(blocks, room.tokens * plan.settings.workers, per_token)


def cached(played: Played) -> float:
    """Return the share of all prompt tokens that came from the workers' caches, 0 to 1."""
    prompts = sum(call.prompt_tokens for call in played.calls)
    return sum(call.cached_tokens for call in played.calls) / prompts


def first_token(percent: int) -> Callable[[Played], float]:
    """Return a function for that percentile of the time to first token, in the model's seconds.

    The time includes queue and prefill in the model's seconds, and the wall time that client,
    gateway and worker took to pass the call on, which a real deployment spends too.
    """

    def percentile(played: Played) -> float:
        times = [call.first_token + call.outside for call in played.calls]
        return quantiles(times, n=100, method="inclusive")[percent - 1]

    return percentile


def fullest(workers: int) -> Callable[[Played], float]:
    """Return a function for the prompt tokens of the fullest worker, as a multiple of the mean."""

    def share(played: Played) -> float:
        tokens: Counter[str] = Counter()
        for call in played.calls:
            tokens[call.worker] += call.prompt_tokens
        return max(tokens.values()) * workers / tokens.total()

    return share


def moves(played: Played) -> float:
    """Return how many calls came to another worker than the session's call before."""
    count = 0
    last: dict[int, str] = {}
    for call in sorted(played.calls, key=lambda call: (call.session, call.number)):
        count += last.get(call.session, call.worker) != call.worker
        last[call.session] = call.worker
    return count


def of_machine(played: Played, scale: float) -> float:
    """Return the share of the calls' time that was the machine's instead of the model's."""
    outside = scale * sum(call.outside for call in played.calls)
    return outside / (outside + sum(call.inside for call in played.calls))


def table_of(plan: Plan, room: Room) -> Table:
    """Return the table of a room: the limits, and a row for each arm."""
    settings = plan.settings
    columns: Mapping[str, tuple[Callable[[Played], float], str]] = {
        CACHED: (cached, "share"),
        OF_LIMIT: (lambda played: cached(played) / room.limit, "share"),
        "first token, p50": (first_token(50), "s"),
        "p95": (first_token(95), "s"),
        DONE: (lambda played: played.seconds, "s"),
        "fullest / mean": (fullest(settings.workers), "ratio"),
        "moved": (moves, "calls"),
    }
    rows: list[tuple[str | Figure, ...]] = []
    for name, limit in ((INFINITE, room.limit), (ONE_LRU, room.one_lru)):
        shares = (Figure((each,), "share") for each in (limit, limit / room.limit))
        rows.append((name, *shares, *["-"] * (len(columns) - 2)))
    for name, rounds in room.rounds.items():
        cells = (Figure(tuple(map(of, rounds)), unit) for of, unit in columns.values())  # type: ignore[arg-type]
        rows.append((name, *cells))
    at_once = f", {settings.at_once} at a time" if settings.at_once else ""
    share = 100 * settings.workers * room.tokens / room.distinct
    groups = len({session.group for session in plan.sessions} - {""})
    in_groups = f" in {groups:,} group{'s' * (groups > 1)}" if groups else ""
    title = (
        f"Room for {called(room.room)}: {settings.workers} workers with a cache of"
        f" {room.tokens:,} tokens each, together {share:.0f} % of all distinct tokens;"
        f" {len(plan.sessions):,} sessions{in_groups}{at_once}, {plan.calls:,} calls"
    )
    return Table(title, ("", *columns), tuple(rows))


def called(room: float) -> str:
    """Return the name of a room, such as ``half of the sessions``."""
    return ROOMS.get(room, f"{100 * room:g} % of the sessions")


def headline(plan: Plan, rooms: Sequence[Room]) -> str:
    """Say which arm came closest to the limit in each room, and which was the worst."""
    sentences = []
    for room in rooms:
        shares = {name: fmean(map(cached, rounds)) for name, rounds in room.rounds.items()}
        best, worst = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
        sentences.append(
            f"Room for {called(room.room)}: the trace allows {room.limit:.1%}; `{best}` took"
            f" {shares[best]:.1%} of the prompt tokens from the cache, `{worst}`"
            f" {shares[worst]:.1%}."
        )
    return " ".join(sentences).replace("%", " %").replace("  %", " %")


def notes(plan: Plan, rooms: Sequence[Room]) -> Iterator[str]:
    """Yield how to read the tables, and the problems of the run."""
    settings, speed = plan.settings, plan.settings.speed
    yield (
        "All seconds are the model's. A worker prefills"
        f" {speed.prefill:,.0f} tokens a second, one prompt after the other, and admits calls while"
        f" {speed.budget:,} tokens or fewer are to be prefilled; a decode step takes"
        f" {1000 * speed.step:g} ms and {1000 * speed.step_per_call:g} ms more for each running"
        f" call, of which there are {speed.running} at the most"
        f"{', and stands still during a prefill' * speed.stalls}. {speed.per_token:g} characters"
        f" are a token, {BLOCK} tokens a block of the cache. The gateway is the real one, in real"
        f" time: {settings.scale:g} seconds of the model pass in a second."
    )
    yield (
        "The limit is the most that the trace allows. One LRU cache for all has the size of all"
        f" caches together. Both take the calls in the order in which {plan.arms[0].name} began"
        " them. First turns count too."
    )
    yield (
        "Fullest / mean: the prompt tokens of the fullest worker. Moved: calls whose session had"
        " the call before on another worker."
    )
    if any(session.group for session in plan.sessions):
        first = sum(len(session.prompt(0)) for session in plan.sessions)
        share = 100 * first / sum(session.length for session in plan.sessions)
        yield (
            f"The first prompts come to {share:.0f} % of the sessions' longest calls. At the most,"
            " a group key saves computing them for all sessions of a group but one."
        )
    behind, failed = (0.0, ""), False
    for room in rooms:
        for name, rounds in room.rounds.items():
            for played in rounds:
                for failure, count in played.failures.items():
                    failed = True
                    yield f"Failed under {name}, its session went on: {count} calls, {failure}"
                behind = max(behind, (of_machine(played, settings.scale), name))
        if room.tokens == settings.speed.needs(max(session.length for session in plan.sessions)):
            yield (
                f"Room for {called(room.room)}: the caches are larger than that, because a worker"
                f" has room for the longest call, {room.tokens:,} tokens."
            )
    if not failed:
        yield "No call failed."
    kept = f"Up to {behind[0]:.0%} of the calls' time was the machine's own".replace("%", " %")
    kept += f" (under {behind[1]})"
    if behind[0] > BEHIND:
        yield f"{kept}: it did not keep up. Play again with fewer sessions or a lower --scale."
    else:
        yield f"{kept}, and not the model's."
