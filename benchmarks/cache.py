"""Measure what pinning does for the KV cache: real llama.cpp engines behind the real gateway.

Seven agents play at once, each on its own session of four turns. A session has its own long system
prompt (tools, task and files together). Each turn adds a short text, like a tool's output, and a
shorter reply. The sizes keep the proportions of an agent's prompt but not its length, so that two
cores can play every policy several times. There are as many turns as workers, so a turn that moves
mostly finds a worker that has never seen its session, as in a fleet of dozens. Longer sessions on
few workers lose less to random routing, if each worker has room for a copy of them all. The model
is small, because the results don't depend on its replies. The workers have one thread each and
share the cores, so a prefix that is computed again delays all of them, as in a loaded fleet.

Every policy plays three scenes. With *enough cache* each worker has room for every session. With
*too little cache* it has room for an even share of them only. With *one shared prompt* all sessions
begin with the same long system prompt. An arm starts cold, with its own engines, gateway and
session server. A round plays all arms once, in shuffled order.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from benchmarks.figures import Figure, Part, Progress, Table, Unit, ratios, shuffled
from harness.arms import PINNED, Load, Played, Policy, Turn, play
from harness.engines import write_model

NAME = "cache"
TITLE = "The KV cache: pinned sessions against the gateway's other policies"

ROUNDS = 4
# Half of the demo's model: tokens still take most of the time, and all arms take four minutes.
BLOCKS = 2
LOAD = Load(
    sessions=7,  # odd: an even number in lockstep on round_robin can look pinned
    turns=4,
    workers=4,
    system_characters=700,
    user_characters=50,
    reply_characters=8,
)
QUICK_LOAD = replace(LOAD, sessions=3, turns=3, workers=2, system_characters=400)

# The targets: nearly all of the allowed share, and the first token in a third of the time.
LEAST_OF_ALLOWED = 0.99
MOST_OF_RANDOM = 1 / 3

PIN, RANDOM, HASHED = "manual, min_group", "random", "consistent_hashing"
UNEVEN, KEYLESS, ROUND_ROBIN = "manual, random assignment", "cache_aware, no key", "round_robin"
POLICIES = {
    PIN: PINNED,
    HASHED: Policy("consistent_hashing"),
    UNEVEN: Policy("manual", ("--assignment-mode", "random")),
    KEYLESS: Policy("cache_aware", plugin=False),
    ROUND_ROBIN: Policy("round_robin"),
    RANDOM: Policy("random"),
}
FIRST_TOKEN: dict[str, Callable[[Played], float]] = {
    "p50": lambda arm: arm.first_token(50),
    "mean": lambda arm: fmean(turn.first_token_seconds for turn in arm.later_turns),
    "p95": lambda arm: arm.first_token(95),
}
ENOUGH, LITTLE, SHARED = "enough cache", "too little cache", "one shared prompt"


@dataclass(frozen=True, slots=True)
class Scene:
    """A load, the number of conversations that fit into one worker, and the policies to play."""

    name: str
    load: Load
    slots: int
    policies: tuple[str, ...]

    @property
    def title(self) -> str:
        """The scene in numbers; one character is one token."""
        load = self.load
        whose = "one system prompt for all" if load.shared_prompt else "a system prompt of its own"
        return (
            f"{self.name.capitalize()}: {load.workers} workers with room for {self.slots} of"
            f" {load.sessions} sessions each; {load.turns} turns; {whose}"
            f" ({load.system_characters} tokens), {load.user_characters} more a turn,"
            f" replies of {load.reply_characters}"
        )


def scenes(load: Load, *, quick: bool) -> tuple[Scene, ...]:
    """Return the scenes of a round; ``quick`` keeps only the arms of the ratios."""
    policies = {
        ENOUGH: (PIN, HASHED, KEYLESS, ROUND_ROBIN, RANDOM),
        LITTLE: (PIN, HASHED, UNEVEN, KEYLESS, ROUND_ROBIN, RANDOM),
        SHARED: (PIN, KEYLESS, RANDOM),
    }
    if quick:
        policies = dict.fromkeys(policies, (PIN, RANDOM))
    shared = replace(load, shared_prompt=True)
    return (
        Scene(ENOUGH, load, load.sessions, policies[ENOUGH]),
        Scene(LITTLE, load, load.even_share, policies[LITTLE]),
        Scene(SHARED, shared, load.sessions, policies[SHARED]),
    )


def allowed_share(turns: Iterable[Turn]) -> float:
    """Return the largest share of the later turns' prompt tokens that a cache can give, 0 to 1.

    A later turn repeats the prompt and the reply of the turn before, then adds a new text. So at
    most the tokens of that prompt and that reply can come from a cache, less one: the reply's last
    token was sampled but never fed back into the model, so its keys and values don't exist. (Greedy
    replies are reused as well, because their text gives the same tokens again.) Another session
    can't add to this, not even one with the same system prompt, because the session's own turn
    before covers that already. A session alone on one of these engines gets exactly this count on
    every turn.

    ``turns`` are those of any number of sessions, in the order in which each session played them.
    """
    allowed = prompts = 0
    reusable: dict[str, int] = {}
    for turn in turns:
        if turn.number:
            allowed += reusable[turn.session_id]
            prompts += turn.prompt_tokens
        reusable[turn.session_id] = turn.prompt_tokens + turn.reply_tokens - 1
    return allowed / prompts


Round = Mapping[tuple[str, str], Played]
"""The arms of a round, by scene name and policy name."""


async def run(progress: Progress, *, quick: bool = False) -> Part:
    """Play every arm of every round; ``quick`` plays a few arms once, on a smaller load."""
    played = scenes(QUICK_LOAD if quick else LOAD, quick=quick)
    with tempfile.TemporaryDirectory(prefix="cache-") as folder:
        model = Path(folder, "model.gguf")
        write_model(model, blocks=BLOCKS)
        rounds = await play_rounds(played, 1 if quick else ROUNDS, model, progress)
    tables = [reach(played, rounds), *(comparison(scene, rounds) for scene in played)]
    return Part(
        NAME, TITLE, tuple(tables), tuple(notes(played, rounds)), in_short(played[0], rounds)
    )


def in_short(scene: Scene, rounds: Sequence[Round]) -> str:
    """Say what share pinned and random sessions took from the cache in a scene."""
    most = median(allowed_share(arms[scene.name, PIN].turns) for arms in rounds)
    pinned, others = (median(cached(scene, policy, rounds)) for policy in (PIN, RANDOM))
    return (
        f"Pinned sessions took {pinned:.1%} of their later prompt tokens from the KV cache (the"
        f" most possible: {most:.1%}). With the policy `{RANDOM}` they took {others:.1%}."
    ).replace("%", " %")


async def play_rounds(
    played: Sequence[Scene], count: int, model: Path, progress: Progress
) -> list[Round]:
    """Play ``count`` rounds; report the progress at each turn."""
    arms = {f"{scene.name}, {name}": (scene, name) for scene in played for name in scene.policies}
    turns = sum(scene.load.sessions * scene.load.turns for scene, _ in arms.values())
    done = 0
    rounds: list[Round] = []
    for number in range(1, count + 1):
        results: dict[tuple[str, str], Played] = {}
        for name in shuffled(list(arms)):
            scene, policy = arms[name]
            state = f"round {number} of {count}: {name}"
            progress(done / (turns * count), state)

            def step(_: Turn, state: str = state) -> None:
                nonlocal done
                done += 1
                progress(done / (turns * count), state)

            results[scene.name, policy] = await play(
                scene.load, POLICIES[policy], slots=scene.slots, model=model, played=step
            )
        rounds.append(results)
    return rounds


def comparison(scene: Scene, rounds: Sequence[Round]) -> Table:
    """Return one scene's table, a row for each policy."""
    columns: dict[str, tuple[Unit, Callable[[Played], float]]] = {
        "prompt tokens from the cache": ("share", lambda arm: arm.cached_share),
        "the most allowed": ("share", lambda arm: allowed_share(arm.turns)),
        **{f"first token, {name}": ("s", seconds) for name, seconds in FIRST_TOKEN.items()},
        "wall time": ("s", lambda arm: arm.seconds),
        "on the busiest worker": ("sessions", lambda arm: arm.busiest),
    }
    rows: list[tuple[str | Figure, ...]] = []
    for policy in scene.policies:
        arms = [results[scene.name, policy] for results in rounds]
        figures = [Figure(tuple(map(value, arms)), unit) for unit, value in columns.values()]
        rows.append((policy, *figures))
    return Table(scene.title, ("second turn on", *columns), tuple(rows))


def reach(played: Sequence[Scene], rounds: Sequence[Round]) -> Table:
    """Return the targets of pinning, a column for each scene; a shared prompt has no limit."""

    def of_allowed(scene: Scene) -> Figure:
        arms = [results[scene.name, PIN] for results in rounds]
        shares = tuple(arm.cached_share / allowed_share(arm.turns) for arm in arms)
        limit = None if scene.load.shared_prompt else LEAST_OF_ALLOWED
        return Figure(shares, "ratio", at_least=limit)

    def of_random(scene: Scene, seconds: Callable[[Played], float]) -> Figure:
        limit = None if scene.load.shared_prompt else MOST_OF_RANDOM
        costs = [
            {policy: seconds(arms[scene.name, policy]) for policy in (PIN, RANDOM)}
            for arms in rounds
        ]
        return Figure(ratios(costs, PIN, RANDOM), "ratio", at_most=limit)

    rows: list[tuple[str | Figure, ...]] = [
        ("prompt tokens from the cache / the most allowed", *map(of_allowed, played))
    ]
    for name, seconds in FIRST_TOKEN.items():
        figures = [of_random(scene, seconds) for scene in played]
        rows.append((f"first token, {name}: {PIN} / {RANDOM}", *figures))
    columns = "each in one round", *(scene.name for scene in played)
    return Table(f"What {PIN} reaches, second turn on", columns, tuple(rows))


def notes(played: Sequence[Scene], rounds: Sequence[Round]) -> Iterator[str]:
    """Yield how to read the tables, and where pinning gained little or lost in these rounds."""
    yield (
        "The most allowed is what a turn shares with the prompt and the reply of the turn before"
        " it, less the reply's last token, which never went through the model. First turns are left"
        " out."
    )
    yield (
        "On few workers, longer sessions lose less to random routing. If each worker has room for"
        " all sessions, it has a copy of each of them after some turns."
    )
    own, little, shared = played
    for policy in (HASHED, UNEVEN):
        if policy in little.policies:
            yield from hot_worker(little, policy, rounds)
    alone, together = cached(own, RANDOM, rounds), cached(shared, RANDOM, rounds)
    if min(together) > max(alone):
        yield (
            "Pinning gains less if all sessions begin with one long system prompt. There,"
            f" {RANDOM} took {median(together):.0%} of the prompt tokens from a cache. If each"
            f" session has a prompt of its own, it took {median(alone):.0%}. These engines keep a"
            " cache for each slot. An engine whose slots share a prefix leaves less to gain."
        )
    if KEYLESS in own.policies:
        yield from without_key(played, rounds)


def hot_worker(scene: Scene, policy: str, rounds: Sequence[Round]) -> Iterator[str]:
    """Yield a note if ``policy`` pinned more sessions to a worker than it has room for."""
    arms = [results[scene.name, policy] for results in rounds]
    hot = [arm for arm in arms if arm.busiest > scene.slots]
    pinned = median(cached(scene, PIN, rounds))
    if hot and (share := median(arm.cached_share for arm in hot)) < pinned:
        yield (
            f"A hot worker: {policy} does not count the sessions of a worker. In {len(hot)} of"
            f" {len(rounds)} rounds it pinned up to {max(arm.busiest for arm in hot)} sessions to a"
            f" worker with room for {scene.slots}. In these rounds {share:.0%} of the prompt tokens"
            f" came from a cache; under {PIN} it was {pinned:.0%}."
        )


def without_key(played: Sequence[Scene], rounds: Sequence[Round]) -> Iterator[str]:
    """Yield notes on ``cache_aware`` without a key."""
    own, little, shared = played
    if all(
        arm.cached_share >= LEAST_OF_ALLOWED * allowed_share(arm.turns)
        for arms in rounds
        for arm in (arms[own.name, KEYLESS], arms[little.name, KEYLESS])
    ):
        yield (
            "If no two sessions begin alike, cache_aware found as much in the cache without a key."
            " A single gateway sees every turn, and finds the worker by the text."
        )
    busiest, pinned = (
        median(arms[shared.name, policy].busiest for arms in rounds) for policy in (KEYLESS, PIN)
    )
    if busiest > pinned:
        yield (
            "With one shared prompt, all sessions have the same text at first. cache_aware sent"
            f" {busiest:.0f} of {shared.load.sessions} to one worker; {PIN} sent {pinned:.0f}."
        )


def cached(scene: Scene, policy: str, rounds: Sequence[Round]) -> list[float]:
    """Return the cached share of that arm in each round."""
    return [results[scene.name, policy].cached_share for results in rounds]
