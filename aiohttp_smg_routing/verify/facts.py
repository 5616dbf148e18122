"""Facts about the gateway that only ``verify`` needs: its metrics.

Measured on SMG 1.9.0, 1.10.1 and 1.13.0. ``docs/gateway.md`` has the whole table.
"""

from typing import Final

#: Where the gateway serves its Prometheus metrics unless ``--prometheus-port`` says otherwise.
METRICS_PORT: Final = 29000

#: What the two policies that know the key did with each call, in the label ``branch``. Under
#: ``--routing-key-override`` calls with a key count here too, as those of ``manual``.
POLICY_BRANCHES: Final = frozenset(
    ("smg_manual_policy_branch_total", "smg_consistent_hashing_policy_branch_total")
)

#: The branches in which the key chose the worker, and those of a call without a key that counts.
KEY_BRANCHES: Final = ("vacant", "occupied_hit", "occupied_miss", "cap_respill", "routing_key_hit")
NO_KEY_BRANCHES: Final = ("no_routing_id", "random_fallback", "implicit_key_hit")

#: Each choice of a worker; the label ``policy`` names the policy, ``worker_type`` the pool.
WORKER_SELECTIONS: Final = "smg_worker_selection_total"
