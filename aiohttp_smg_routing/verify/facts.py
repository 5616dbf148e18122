"""Facts about gateways that only ``verify`` needs: their metrics, and their options.

Measured on SMG 1.9 to 1.13, sglang-router 0.3.2 and vllm-router 0.1.17. ``docs/gateways.md`` and
``docs/verify.md`` have the tables.
"""

from collections.abc import Mapping
from typing import Final

from .seen import Kind

#: Where the gateway serves its Prometheus metrics unless ``--prometheus-port`` says otherwise.
METRICS_PORT: Final = 29000

#: What a policy did with each call, in the label ``branch``. Under ``--routing-key-override`` calls
#: with a key count as those of ``manual``, whatever the policy's name is.
POLICY_BRANCHES: Final[Mapping[str, str]] = {
    f"smg_{policy}_policy_branch_total": policy
    for policy in ("manual", "consistent_hashing", "prefix_hash")
}

#: The branches in which the key chose the worker. ``ring_hit`` also counts calls without a key,
#: except for prefill workers; a probe shows whether it does.
KEY_BRANCHES: Final = (
    *("vacant", "occupied_hit", "occupied_miss", "cap_respill"),
    *("routing_key_hit", "ring_hit"),
)
#: The branches of a call without a key that the policy accepts.
NO_KEY_BRANCHES: Final = (
    *("no_routing_id", "random_fallback", "implicit_key_hit"),
    "no_routing_key",
)

#: The policies of vllm-router that route on a key but do not count it.
UNCOUNTED_POLICIES: Final = frozenset(("consistent_hash", "sticky_least_loaded", "kv_aware"))

#: Those of them that follow nothing but the key. ``kv_aware`` also follows the prompt.
KEY_ONLY_POLICIES: Final = UNCOUNTED_POLICIES - {"kv_aware"}

#: Each choice of a worker; ``policy`` names the policy, ``worker_type`` the kind of worker.
SELECTIONS: Final = frozenset(("smg_worker_selection_total", "vllm_router_policy_decisions_total"))

#: How many calls each ``worker`` got. vllm-router counts that in ``SELECTIONS``.
WORKER_CALLS: Final = "smg_worker_cb_outcomes_total"

#: Counters that grow while a worker is in trouble, and the label value that shows no trouble. If
#: they grow, the workers may have changed, and a call may have been tried again elsewhere.
TROUBLES: Final[Mapping[str, str]] = {
    "smg_worker_health_checks_total": "success",
    "smg_worker_cb_transitions_total": "",
    WORKER_CALLS: "success",
}

#: The state of each worker's circuit breaker, in SMG and sglang-router, and in vllm-router.
CIRCUITS: Final = frozenset(("smg_worker_cb_state", "vllm_router_cb_state"))
OPEN: Final = 1

#: The kinds of workers that keep a session's KV cache; ``encode`` workers do not.
CACHE_KEEPERS: Final = ("regular", "prefill", "decode")

#: How many workers overload protection leaves out. It exists while a worker is over its limit.
OVERLOADED: Final = "smg_workers_overloaded"
KV_USAGE: Final = "smg_engine_token_usage"
#: SMG 1.12 and newer have it: they always poll their workers' load.
LOAD_POLLS: Final = "smg_engine_load_polls_total"
#: The share of its KV cache from which a worker is left out by default.
KV_USAGE_LIMIT: Final = 0.8

#: The beginning of metric names that shows which gateway it is. The first match counts.
KINDS: Final[tuple[tuple[str, Kind], ...]] = (
    ("vllm_router_", "vllm-router"),
    ("smg_tokio_", "smg"),
    ("smg_", "sglang-router"),
)

#: The beginning of the plugin's own series. One of SMG's many series has it, too.
SESSION_SERVER: Final = "smg_routing_"

#: How to make each kind of gateway route on a key.
POLICY_ADVICE: Final[Mapping[Kind | None, str]] = {
    "smg": "Launch the gateway with --policy manual or --policy consistent_hashing, or keep its "
    "policy and add --routing-key-override.",
    "sglang-router": "Launch sglang-router 0.3.1 or newer with --policy manual.",
    "vllm-router": "Launch vllm-router with --policy consistent_hash, and send the key as "
    'X-Session-ID: header = "X-Session-ID" in the plugin\'s config, or --header X-Session-ID of '
    "verify.",
    None: "SMG and sglang-router route on it under --policy manual; vllm-router routes on "
    "X-Session-ID under --policy consistent_hash (--header X-Session-ID).",
}
#: The calls without any key that ``verify`` makes before the turns.
PROBES: Final = 4
#: The policies that route on a key, as the options of prefill and decode workers take them.
POOL_POLICIES: Final[Mapping[Kind | None, str]] = {
    "smg": "manual or consistent_hashing",
    "sglang-router": "manual",
    "vllm-router": "consistent_hash",
    None: "manual",
}
#: How to keep pins with several gateways.
REPLICAS_ADVICE: Final[Mapping[Kind | None, str]] = {
    "smg": "Run one gateway, or --policy consistent_hashing, on which replicas agree, or a "
    "balancer that hashes the key",
    "sglang-router": "Run one gateway, or a balancer that hashes the key",
    "vllm-router": "Run one gateway, or a balancer that hashes the key",
    None: "Run one gateway, or a balancer that hashes the key",
}
