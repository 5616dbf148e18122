"""Names why sessions are not pinned, or why nobody can tell."""

from collections.abc import Iterator

from ..verify import known_causes
from ..verify.cause import Cause
from ..verify.chance import beyond_chance
from ..verify.evidence import FEWEST
from ..verify.facts import KEY_ONLY_POLICIES, NO_KEY_BRANCHES, PROBES
from .basis import (
    Basis,
    hashes,
    is_below,
    keyed_by,
    new_keys,
    policies_of,
    pools_of,
    telling,
    tells,
)
from .page import KEYED
from .states import states
from .view import Share, View, kept_by_gateway, kept_by_server

_SENT_ADVICE = (
    "The session server sends keys. Check what is in front of the gateway: a proxy may drop the "
    "header. Check that `header` in the plugin's config is the one that this gateway reads."
)
_OTHERS_ADVICE = (
    "As many keys arrive as the session server sends: other calls come without one. Find out who "
    "makes those. In the session server it is a client without the hook, such as a second "
    "ClientSession: name it in client_session, too, or set instrument = true."
)
_PROBES_ADVICE = f" Each run of verify makes {PROBES} calls without a key, too."
_FEWEST_KEYS = 50  # nearly all new; fewer may be of sessions that have just begun
_FEW_LATER = 20  # new keys for each call whose key came again
_LEFT_OUT = frozenset(("worker_down", "circuit_open", "overloaded"))
_SPARE = 20  # calls; fewer may be under way between a session server and its gateway


def causes(view: View, basis: Basis, min_kept: float) -> list[Cause]:
    """Return what is wrong. The share ``min_kept`` of calls must have a key, and be kept."""
    told = [*states(view), *_key_causes(view, basis, min_kept)]
    return [*told, *_moves(view, basis, min_kept, {cause.name for cause in told})]


def _key_causes(view: View, basis: Basis, min_kept: float) -> Iterator[Cause]:
    """Yield why the key does not choose the worker, or why the counters can't tell."""
    page, counters = view.gateway.page, basis.counters
    if page is None or not view.totals.calls:
        return
    if view.workers == 1:
        yield known_causes.one_worker()
        return
    kind = page.load.kind
    for pool in pools_of(counters):
        policies, keyed = policies_of(counters, pool), keyed_by(counters, pool)
        advice = _key_advice(view, basis, keyed)
        if policies in ("prefix_hash", "consistent_hashing") and not tells(view, counters, pool):
            yield known_causes.any_key(policies)
        elif not tells(view, counters, pool):
            yield _uncounted(view, policies)
        elif (basis.without_probes(keyed).value or 0) >= min_kept or page.load.overloaded:
            pass  # an overloaded gateway ignores its policy, and states() says so
        elif 2 * counters.of("no_healthy_workers") > keyed.of - keyed.part:
            yield known_causes.no_healthy_workers(policies)
        elif keyed_by(view.totals, pool).part or counters.of(*NO_KEY_BRANCHES):
            yield known_causes.key_lost(policies, keyed.part, keyed.of, advice)
        elif kind == "smg":  # the override shows only if a key arrives
            yield known_causes.policy(
                kind,
                policies,
                ", unless it has --routing-key-override",
                f" If it has that already, no key reaches it. {advice}",
            )
        else:
            yield known_causes.policy(kind, policies)


def _key_advice(view: View, basis: Basis, keyed: Share) -> str:
    """Return where to look for the keys of calls that came without one."""
    server = view.server_totals if basis.is_all else (view.server_now or {})
    probes = _PROBES_ADVICE * (basis.is_all or keyed.of - keyed.part <= PROBES)
    sent = sum(server.get(name, 0) for name in KEYED)
    if sent and 20 * abs(sent - keyed.part) <= sent:  # a few are under way
        return _OTHERS_ADVICE + probes
    is_sender = any(view.server_totals.get(name) for name in KEYED)
    return (_SENT_ADVICE if is_sender else known_causes.SERVER_ADVICE) + probes


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
        yield known_causes.worker_lost(page.load.kind, missed)
    if spilled := counters.of("cap_respill"):
        yield known_causes.spilled(spilled)
    yield from _one_key(view, found)
    yield from _many_keys(view, basis)
    if elsewhere := _sessions_elsewhere(view) or _calls_elsewhere(view):
        yield elsewhere
    elif is_below(basis.kept, min_kept) and not (found or missed or counters.of("cap_respill")):
        yield known_causes.pins_lost(page.load.kind, "and see the log of the session server.")


def _one_key(view: View, found: set[str]) -> Iterator[Cause]:
    """Yield that sessions share a key."""
    totals, server = view.totals, view.server.page if view.server else None
    sessions = sum(server.sessions.values()) if server else 0
    if "manual" in totals.branches:
        if new_keys(totals) == 1 != sessions and kept_by_gateway(totals).of >= FEWEST:
            yield known_causes.shared_key(f"has met one key only in {totals.calls} calls")
        return
    got = [name for name, calls in totals.workers.items() if calls]
    if len(got) != 1 or view.workers < 2 or view.models > 1 or found & _LEFT_OUT:
        return
    is_chance = sessions and not beyond_chance(1, view.workers, sessions)
    if not is_chance and totals.of("routing_key_hit") >= FEWEST:
        yield known_causes.shared_key(
            f"sent all {totals.calls} calls to one worker of {view.workers}",
            "unless they are of few sessions, or its hash ring lacks workers, ",
        )


def _many_keys(view: View, basis: Basis) -> Iterator[Cause]:
    """Yield that a session has many keys. A hash does not count new ones, but the ledger does."""
    counters = view.now if view.now and view.now.calls else view.totals
    new, server = new_keys(counters), basis.server
    if "manual" not in view.totals.branches:
        counters = basis.counters
        if counters is view.now:
            server = view.server_now or {}
        new = server.get("first", 0)
    elif counters is view.now:
        server = view.server_now or {}
    later = kept_by_server(server).of
    if "manual" in view.totals.branches:
        later = max(later, telling(counters))
    # A client that tries some calls again brings a few keys twice.
    if new >= _FEWEST_KEYS and later < max(FEWEST, new / _FEW_LATER):
        when = f" in the {view.gateway.span}" if counters is view.now else ""
        guess = "unless hardly any session has had its second turn, "
        yield known_causes.key_changes(new, f"{counters.calls} calls{when}", guess)


def _sessions_elsewhere(view: View) -> Cause | None:
    """Return the cause for a server whose sessions are all on workers of another gateway."""
    page, server = view.gateway.page, view.server.page if view.server else None
    if not (page and server and page.load.kind == "smg"):  # only SMG names its workers
        return None
    pinned = [name for name, sessions in (server.active or server.sessions).items() if sessions]
    theirs, ours = {*map(_address, pinned)}, {*map(_address, page.workers)}
    if not (theirs and ours) or theirs & ours:
        return None
    return Cause(
        "other_gateway",
        f"The session server's sessions are on workers that this gateway does not have, such as "
        f"{pinned[0]}: another gateway routed them, or the workers were replaced.",
        "Give the metrics URLs of a gateway and of a session server that calls it.",
    )


def _address(worker: str) -> str:
    return worker.rpartition("@")[0] or worker  # without the data-parallel rank


def _calls_elsewhere(view: View) -> Cause | None:
    """Return the cause for turns of the server that this gateway did not route."""
    gateway, server = view.gateway, view.server
    if not (view.now and server and view.server_now and gateway.page and gateway.before):
        return None
    if gateway.before.in_flight is None or server.seconds > 1.5 * gateway.seconds:
        return None
    # A slow page is read less often, so that its current period may be longer.
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
        hashes=hashes(view.now),
    )
