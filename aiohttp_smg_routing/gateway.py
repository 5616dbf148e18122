"""What an SMG gateway reads, and which keys it takes: the one file that knows it.

Measured on SMG 1.9.0, 1.10.1 and 1.13.0; ``docs/gateway.md`` has the whole table.
"""

import re
from typing import Final

from multidict import istr

#: The request header that the policies ``manual`` and ``consistent_hashing`` route on, and
#: ``prefix_hash`` of 1.10 and newer in place of the prompt. The other policies ignore it. Where it
#: comes twice, the first one wins.
ROUTING_KEY_HEADER: Final = istr("X-SMG-Routing-Key")

#: Names a worker by its index and outranks the key under ``consistent_hashing``.
#: An index that does not exist is answered 503.
TARGET_WORKER_HEADER: Final = istr("X-SMG-Target-Worker")

#: What an answer calls the worker that gave it: its address, internal to the cluster. HTTP workers
#: of 1.10 and newer; ``@rank`` stands behind it where a worker has data-parallel ranks.
ROUTED_WORKER_HEADER: Final = istr("X-SMG-Routed-Worker-Id")

#: A key that every version takes: 1 to 128 bytes of visible ASCII. The gateway drops any other
#: silently, and routes the call as if it had none.
VALID_KEY: Final = re.compile(r"[!-~]{1,128}")

#: The OpenAI chat completions call, below the gateway's base path.
CHAT_COMPLETIONS: Final = "/v1/chat/completions"

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
