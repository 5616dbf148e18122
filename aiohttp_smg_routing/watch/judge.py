"""Judges what a moment shows: are sessions pinned now, and what is wrong? All is pure here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..verify import known_causes
from ..verify.cause import Cause
from ..verify.counting import CHANCE, keyed_calls, policy_of, sharing
from ..verify.evidence import FEWEST
from ..verify.facts import CACHE_KEEPERS, KEY_ONLY_POLICIES, NO_KEY_BRANCHES, UNCOUNTED_POLICIES
from ..verify.judge import Verdict
from ..verify.seen import Answer, Counters
from .page import KEYED
from .states import states
from .view import Share, View, kept_by_gateway, kept_by_server

_SENT_ADVICE = (
    "The session server sends keys. Look at what stands before the gateway: a proxy may drop the "
    "header. See that `header` in the plugin's config is the one that this gateway reads."
)
_FEWEST_KEYS = 50  # all new; fewer may be of sessions that all begin just now
_LEFT_OUT = frozenset(("worker_down", "circuit_open", "overloaded"))
_SPARE = 20  # calls; fewer may be under way between a session server and its gateway


@dataclass(frozen=True, slots=True)
class Basis:
    """The counts that the verdict is about."""

    counters: Counters
    server: Mapping[str, int]
    when: str
    """Since when the gateway's are counted, as the end of a sentence."""
    server_when: str
    """The same of the session server's."""

    @property
    def is_seen(self) -> bool:
        """Whether the session server saw enough later turns to tell."""
        return kept_by_server(self.server).of >= FEWEST

    @property
    def kept(self) -> Share:
        """How many later calls were kept: by the session server if it can tell."""
        return kept_by_server(self.server) if self.is_seen else kept_by_gateway(self.counters)


def judge(view: View, min_kept: float) -> Verdict:
    """Return the verdict. "Pinned" needs the share ``min_kept`` of keyed calls, and of kept ones.

    It is about the calls of now, or about all so far if too few of those tell of pins.
    """
    basis = _basis(view)
    told = [*states(view), *_key_causes(view, basis, min_kept)]
    told += _moves(view, basis, min_kept, {cause.name for cause in told})
    answer, sentence = _decide(view, basis, {cause.name for cause in told}, min_kept)
    return Verdict(answer, f"{answer.capitalize()}: {sentence}.", tuple(told))


def _basis(view: View) -> Basis:
    now, server_now = view.now, view.server_now or {}
    if now is not None and max(_telling(now), kept_by_server(server_now).of) >= FEWEST:
        server_when = f", in the {view.server.span}" if view.server else ""
        return Basis(now, server_now, f", in the {view.gateway.span}", server_when)
    whens = ", since the gateway started", ", since the session server started"
    return Basis(view.totals, view.server_totals, *whens)


def _telling(counters: Counters) -> int:
    """Return how many calls tell of pins: those whose key came again, or chose no worker."""
    return counters.calls - _new_keys(counters)


def _new_keys(counters: Counters) -> int:
    """Return how many keys came for the first time. Each pool that pins them has counted them."""
    pools = max((sharing(counters, pool) for pool in _pools(counters)), default=1)
    return counters.of("vacant") // max(1, pools)


def _pools(counters: Counters) -> list[str]:
    return [name for name in CACHE_KEEPERS if counters.pools.get(name)]


def _keyed(counters: Counters, pool: str) -> Share:
    return Share(keyed_calls(counters, pool), sum(counters.pools[pool].values()))


def _tells(view: View, counters: Counters, pool: str) -> bool:
    """Tell whether the policy of a pool counts the calls that the key routed, and no others."""
    policy, page = policy_of(counters, pool), view.gateway.page
    if policy == "consistent_hashing":
        return page is not None and page.tells_keys
    return not (policy is None or policy == "prefix_hash" or policy in UNCOUNTED_POLICIES)


def _policies(counters: Counters, pool: str) -> str:
    return " and ".join(sorted(counters.pools[pool]))


def _key_causes(view: View, basis: Basis, min_kept: float) -> Iterator[Cause]:
    """Yield why the key does not choose the worker, or why the counters can't tell."""
    page, counters = view.gateway.page, basis.counters
    if page is None or not view.totals.calls:
        return
    if view.workers == 1:
        yield known_causes.one_worker()
        return
    kind = page.load.kind
    sent = any(view.server_totals.get(name) for name in KEYED)
    advice = _SENT_ADVICE if sent else known_causes.SERVER_ADVICE
    for pool in _pools(counters):
        policies, keyed = _policies(counters, pool), _keyed(counters, pool)
        if policies in ("prefix_hash", "consistent_hashing") and not _tells(view, counters, pool):
            yield known_causes.any_key(policies)
        elif not _tells(view, counters, pool):
            yield _uncounted(view, policies)
        elif (keyed.value or 0) >= min_kept or page.load.overloaded:
            pass  # an overloaded gateway leaves its policy aside, and states() has it
        elif 2 * counters.of("no_healthy_workers") > keyed.of - keyed.part:
            yield known_causes.no_healthy_workers(policies)
        elif _keyed(view.totals, pool).part or counters.of(*NO_KEY_BRANCHES):
            yield known_causes.key_lost(policies, keyed.part, keyed.of, advice)
        elif kind == "smg":  # the override shows only where a key comes
            yield known_causes.policy(
                kind,
                policies,
                ", unless it has --routing-key-override",
                f" If it has that already, no key reaches it. {advice}",
            )
        else:
            yield known_causes.policy(kind, policies)


def _uncounted(view: View, policies: str) -> Cause:
    got = [name for name, calls in view.totals.workers.items() if calls]
    if policies in KEY_ONLY_POLICIES and len(got) == 1 and view.totals.calls >= FEWEST:
        return Cause(
            "wrong_header",
            f"All {view.totals.calls} calls came to one worker of {view.workers}: they are of one "
            f"session, or the policy {policies} does not route on the header that carries the key.",
            'vllm-router reads X-Session-ID: set header = "X-Session-ID" in the plugin\'s config.',
        )
    return known_causes.uncounted(
        policies,
        "Run verify with --concurrency 1 when nothing else calls the gateway. What watch shows of "
        "such a gateway is how its calls are spread.",
    )


def _moves(view: View, basis: Basis, min_kept: float, found: set[str]) -> Iterator[Cause]:
    """Yield why sessions move, or share a key, or call another gateway."""
    page, counters = view.gateway.page, basis.counters
    if page is None:
        return
    if missed := counters.of("occupied_miss"):
        yield known_causes.worker_lost(missed)
    if spilled := counters.of("cap_respill"):
        yield known_causes.spilled(spilled)
    yield from _one_key(view, found)
    yield from _many_keys(view, basis)
    if elsewhere := _calls_elsewhere(view):
        yield elsewhere
    elif _is_below(basis.kept, min_kept) and not (found or missed or counters.of("cap_respill")):
        yield known_causes.pins_lost(page.load.kind, "and see the log of the session server.")


def _one_key(view: View, found: set[str]) -> Iterator[Cause]:
    """Yield that sessions share a key."""
    totals, server = view.totals, view.server.page if view.server else None
    sessions = sum(server.sessions.values()) if server else 0
    if "manual" in totals.branches:
        if _new_keys(totals) == 1 != sessions and kept_by_gateway(totals).of >= FEWEST:
            yield known_causes.shared_key(f"has met one key only in {totals.calls} calls")
        return
    got = [name for name, calls in totals.workers.items() if calls]
    is_chance = sessions and view.workers ** (1.0 - sessions) >= CHANCE
    is_one = len(got) == 1 < view.workers and not (is_chance or found & _LEFT_OUT)
    if is_one and totals.of("routing_key_hit") >= FEWEST:
        yield known_causes.shared_key(
            f"sent all {totals.calls} calls to one worker of {view.workers}",
            "unless they are of few sessions, ",
        )


def _many_keys(view: View, basis: Basis) -> Iterator[Cause]:
    """Yield that a session has many keys. A hash does not count new ones, but the ledger does."""
    counters = view.now if view.now and view.now.calls else view.totals
    new = _new_keys(counters)
    if "manual" not in view.totals.branches:
        counters, new = basis.counters, basis.server.get("first", 0)
    elif _telling(counters) >= FEWEST:
        return
    if new >= _FEWEST_KEYS and not basis.is_seen:
        when = f" in the {view.gateway.span}" if counters is view.now else ""
        guess = "unless no session has had its second turn, "
        yield known_causes.key_changes(new, f"{counters.calls} calls{when}", guess)


def _calls_elsewhere(view: View) -> Cause | None:
    """Return the cause for turns of the server that this gateway did not route."""
    gateway, server = view.gateway, view.server
    if not (view.now and server and view.server_now and gateway.page and gateway.before):
        return None
    if gateway.before.in_flight is None or server.seconds > 1.5 * gateway.seconds:
        return None
    # A page that is slow to come is looked at less often: its now may be longer.
    longer = max(1, server.seconds / gateway.seconds)
    ours = int(sum(view.server_now.get(name, 0) for name in KEYED) / longer)
    # Turns that the server finished now may have been routed before.
    routed = view.now.calls + gateway.before.in_flight
    if ours - routed < max(_SPARE, ours / 20):
        return None
    return known_causes.replicas(
        gateway.page.load.kind,
        gateway.url,
        view.now.calls,
        ours,
        "Give the metrics URL of the gateway that the session server calls.",
    )


def _is_below(share: Share, least: float) -> bool:
    # Exactly so many are enough.
    return share.of >= FEWEST and share.part < least * share.of - 1e-9


def _decide(view: View, basis: Basis, found: set[str], min_kept: float) -> tuple[Answer, str]:
    """Return the answer of the first rule that applies; ``docs/watch.md`` has the rules."""
    counters, kept = basis.counters, basis.kept
    if nothing := _nothing(view, found):
        return "could not tell", nothing
    pools = _pools(counters)
    for pool in pools:
        worker = "worker" if pool == "regular" else f"{pool} worker"
        keyed = _keyed(counters, pool)
        said = f"the key chose the {worker} of {keyed.part} of {keyed.of} calls{basis.when}"
        if _tells(view, counters, pool) and _is_below(keyed, min_kept):
            return "not pinned", said
    if basis.is_seen or "manual" in counters.branches:
        whose, when = ("session", basis.server_when) if basis.is_seen else ("key", basis.when)
        said = f"{kept.part} of {kept.of} later calls came to the worker of their {whose}{when}"
    if _is_below(kept, min_kept):
        return "not pinned", said
    is_told = basis.is_seen or all(_tells(view, counters, pool) for pool in pools)
    unsure = _unsure(counters, kept, found, is_told=is_told)
    return ("could not tell", unsure.format(said)) if unsure else ("pinned", said)


def _nothing(view: View, found: set[str]) -> str:
    """Say why there is nothing to judge, if there isn't."""
    if view.gateway.page is None:
        return (
            "the gateway's metrics could not be read"
            if view.gateway.error
            else "the gateway has not answered yet"
        )
    if view.gateway.error:
        return "the gateway's metrics can't be read any more"
    if not view.totals.calls:
        return "the gateway has routed no call"
    return "only one worker is known, so every session stays on it" if "one_worker" in found else ""


def _unsure(counters: Counters, kept: Share, found: set[str], *, is_told: bool) -> str:
    """Say why nobody can tell whether sessions stay, if so; ``{}`` is what was counted."""
    if not is_told:
        return "the gateway's counters do not tell whether a key chose the worker"
    if found & {"shared_key", "key_changes", "replicas", "other_gateway"}:
        return "{}; but see below"
    if kept.of < FEWEST and ("manual" in counters.branches or counters.calls < FEWEST):
        return "{}, which are too few to tell"
    if kept.of < FEWEST and found & _LEFT_OUT:
        return "{}, but some workers are left out"
    return ""
