"""The causes that ``verify`` and ``watch`` both find, each in the same words."""

from yarl import URL

from .cause import Cause
from .facts import POLICY_ADVICE, REPLICAS_ADVICE
from .seen import GatewayLoad, Kind

WORKER_ADVICE = "See GET /workers and the logs of the workers that are not healthy."
SERVER_ADVICE = (
    "Check the session server, the likeliest cause first: does it call another host than the "
    "gateway of the plugin's config? Does a source find a session id in each request? Is the hook "
    "on the ClientSession that calls the gateway? Is the plugin enabled?"
)


def one_worker() -> Cause:
    """Return the cause for a gateway that has no choice."""
    return Cause(
        "one_worker",
        "Only one worker is known for this model.",
        "Start a second one; until then there is nothing to pin.",
    )


def policy(kind: Kind | None, policies: str, unless: str = "", then: str = "") -> Cause:
    """Return the cause for a policy that ignores keys, ``unless`` something that is not known."""
    text = f"The gateway's policy is {policies}: it does not route on the key{unless}."
    return Cause("policy", text, POLICY_ADVICE[kind] + then)


def no_healthy_workers(policies: str) -> Cause:
    """Return the cause for calls that found no worker."""
    text = f"The gateway's policy is {policies}, but it finds no healthy worker for a call."
    return Cause("no_healthy_workers", text, WORKER_ADVICE)


def key_lost(policies: str, used: int, calls: int, advice: str) -> Cause:
    """Return the cause for calls that came without a key."""
    return Cause(
        "key_lost",
        f"The policy is {policies}, but only {used} of {calls} calls came with a key that the "
        "gateway accepts.",
        advice,
    )


def any_key(policies: str | None) -> Cause:
    """Return the cause for a policy that may count calls without our key as routed by it."""
    if policies == "prefix_hash":
        return Cause(
            "prefix_hash",
            "The gateway's policy is prefix_hash: SMG 1.10 and newer hash the key in place of the "
            "prompt, but these counters do not tell whether it arrives.",
            "Check that the key reaches the gateway, or launch it with --policy manual or --policy "
            "consistent_hashing, whose counters tell.",
        )
    return Cause(
        "any_key",
        "The gateway counts calls without our key, too, as routed by a key: consistent_hashing "
        "before SMG 1.13 hashes Authorization, X-Forwarded-For or Cookie where there is no key.",
        "Use SMG 1.13 or --policy manual, whose counters tell. Check that nothing in front of the "
        "gateway puts a key on every call.",
    )


def uncounted(policies: str, advice: str) -> Cause:
    """Return the cause for a policy that counts no keys."""
    return Cause(
        "uncounted",
        f"The gateway's policy is {policies}: its counters do not tell whether the key is used.",
        advice,
    )


def replicas(
    kind: Kind | None, metrics: URL, calls: int, ours: int, advice: str, *, hashes: bool = False
) -> Cause:
    """Return the cause for a gateway that routed fewer calls than were made.

    ``advice`` is how to name the right one, if it routed none. If the policy is
    ``consistent_hashing``, it ``hashes`` the keys.
    """
    if calls == 0:
        return Cause(
            "other_gateway",
            f"The gateway whose metrics are at {metrics} routed none of {ours} calls.",
            advice,
        )
    some = f"The gateway whose metrics are at {metrics} routed {calls} of {ours} calls: others "
    if hashes:
        return Cause(
            "replicas",
            f"{some}routed the rest. Replicas with consistent_hashing send a key to the same "
            "worker if they have the same workers.",
            "Compare GET /workers of the gateways. Give the metrics of one after the other.",
        )
    return Cause(
        "replicas",
        f"{some}behind the same address routed the rest, and replicas do not share their pins.",
        f"{REPLICAS_ADVICE[kind]}.",
    )


def pins_lost(kind: Kind | None, then: str) -> Cause:
    """Return the cause for sessions that stay more often than by chance, but not always."""
    return Cause(
        "pins_lost",
        "The key keeps sessions together, but not always: replicas behind one address do not "
        "share their pins, a restart forgets them, and a worker that fails or is overloaded "
        "loses them.",
        f"{REPLICAS_ADVICE[kind]}; {then}",
    )


def circuit_open(workers: str, kind: Kind | None) -> Cause:
    """Return the cause for workers that the gateway leaves out after failed calls."""
    off = "Launch sglang-router with --disable-circuit-breaker: bad requests open it."
    return Cause(
        "circuit_open",
        f"The gateway sends nothing to {workers}: too many calls failed there, and the circuit is "
        "open. Their sessions move.",
        off if kind == "sglang-router" else WORKER_ADVICE,
    )


def worker_lost(kind: Kind | None, missed: int) -> Cause:
    """Return the cause for keys whose worker was not there."""
    text = f"{missed} calls went to another worker than their session's, which was gone or failed."
    if kind != "smg":
        return Cause("worker_lost", text, WORKER_ADVICE)
    return Cause(
        "worker_lost",
        f"{text} SMG 1.13 also tries another one if the worker answers 408, 429 or 5xx.",
        f"{WORKER_ADVICE} If all are healthy, find out why they answer so. With --disable-retries "
        "such a call fails, and its session stays.",
    )


def spilled(calls: int) -> Cause:
    """Return the cause for calls with one key that were too many at once."""
    return Cause(
        "shared_key",
        f"The gateway took {calls} calls to another worker because too many with the same "
        "key were in flight at once.",
        "Give each session an id of its own.",
    )


def shared_key(told: str, unless: str = "") -> Cause:
    """Return the cause for sessions that the gateway can't tell apart."""
    return Cause(
        "shared_key",
        f"The gateway {told}: {unless}they share a key.",
        "Give each session an id, and so a key, of its own.",
    )


def left_out(reached: int, workers: int, sessions: int) -> Cause:
    """Return the cause for healthy workers that ``consistent_hashing`` gives no session."""
    return Cause(
        "left_out",
        f"The {sessions} sessions came to {reached} of {workers} healthy workers. Unless sessions "
        "share keys, the gateway's hash ring lacks the others: SMG 1.10 may lose workers there "
        "that register at once.",
        "Send the gateway PATCH /workers/ID with the JSON body {} for a worker of GET /workers: it "
        "changes nothing, but builds the ring again. Or use SMG 1.11 or newer, or --policy manual.",
    )


def key_changes(keys: int, calls: str, guess: str = "") -> Cause:
    """Return the cause for calls of one session that carry several keys."""
    return Cause(
        "key_changes",
        f"The gateway met {keys} new keys in {calls}: {guess}the session server sends a session's "
        "turns under more than one key.",
        "Point session_id at an id that is the same in each turn of a session.",
    )


def overloaded(load: GatewayLoad) -> Cause:
    """Return the cause for a gateway that leaves workers out."""
    fullest = max(load.kv_usage.values(), default=0.0)
    return Cause(
        "overloaded",
        f"The gateway leaves {load.overloaded} overloaded "
        f"worker{'s' * (load.overloaded != 1)} out of routing (the fullest KV cache is at "
        f"{fullest:.0%}): sessions that are pinned there move, and come back when the load "
        "falls. If all workers are overloaded, it follows no pin.",
        f"Run fewer sessions at a time, or add workers. {protection_off(load)} if sessions must "
        "stay: then they wait for their own worker, and the job may end later.",
    )


def protection_off(load: GatewayLoad) -> str:
    """Say how to launch the gateway so that it leaves no worker out."""
    if load.can_protect:
        return "Launch the gateway with --disable-worker-overload-protection"
    return "Launch the gateway without the options that limit its workers' load"


def spread(kind: Kind | None) -> str:
    """Say how to spread sessions over the workers."""
    distinct = "Use keys that differ in more than their tail"
    match kind:
        case "smg":
            return f"Spread them with --policy manual --assignment-mode min_group. {distinct}."
        case "sglang-router":
            return f"Spread them with --assignment-mode min_group (0.3.2 and newer). {distinct}."
    return f"See whether the gateway routes on this header. {distinct}."
