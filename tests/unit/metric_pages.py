"""Pages of metrics, as gateways and session servers write them."""

from collections.abc import Mapping, Sequence

W1, W2, W3 = (f"http://10.0.0.{number}:8000" for number in (2, 3, 4))
SMG = "smg_tokio_workers 2\n"
SMG_1_13 = SMG + "smg_worker_requests_total 0\n"


def smg(
    branches: Mapping[str, int] | None = None,
    *,
    policy: str = "manual",
    calls: int | None = None,
    workers: Mapping[str, int] | None = None,
    health: Mapping[str, int] | None = None,
    circuits: Mapping[str, int] | None = None,
    kind: str = SMG_1_13,
    more: str = "",
) -> str:
    """Return a page as SMG writes it, or as sglang-router does if ``kind`` is empty."""
    branches = {} if branches is None else branches
    calls = sum(branches.values()) if calls is None else calls
    workers = {W1: calls // 2, W2: calls - calls // 2} if workers is None else workers
    series = "consistent_hashing" if policy == "consistent_hashing" else "manual"
    page = [
        *(f'smg_{series}_policy_branch_total{{branch="{b}"}} {n}' for b, n in branches.items()),
        *(f'smg_worker_cb_outcomes_total{{worker="{w}"}} {n}' for w, n in workers.items()),
        *(f'smg_worker_health{{worker="{w}"}} {(health or {}).get(w, 1)}' for w in workers),
        *(f'smg_worker_cb_state{{worker="{w}"}} {(circuits or {}).get(w, 0)}' for w in workers),
        f'smg_worker_pool_size{{worker_type="regular",model="m"}} {len(workers)}',
    ]
    if calls:
        page.append(f'smg_worker_selection_total{{policy="{policy}"}} {calls}')
    return kind + "\n".join(page) + "\n" + more


def vllm(policy: str = "consistent_hash", calls: Sequence[int] = (50, 50)) -> str:
    """Return a page as vllm-router 0.1.17 writes it."""
    labels = [f'policy="{policy}",worker="http://10.0.0.{n}:8000"' for n in range(len(calls))]
    pairs = zip(labels, calls, strict=True)
    page = [f"vllm_router_policy_decisions_total{{{label}}} {n}" for label, n in pairs]
    page += [f'vllm_router_worker_health{{worker="http://10.0.0.{n}:8000"}} 1' for n in (0, 1)]
    return "\n".join(page) + "\n"


def server_page(
    active: Mapping[str, int] | None = None,
    sessions: Mapping[str, int] | None = None,
    **counts: int,
) -> str:
    """Return a page of the plugin's series."""
    outcomes = ("first", "kept", "moved", "unknown", "untagged", "failed")
    page = [f'smg_routing_calls_total{{outcome="{o}"}} {counts.get(o, 0)}' for o in outcomes]
    page += [f"smg_routing_{name}_total {counts.get(name, 0)}" for name in ("late", "unmatched")]
    page += [f'smg_routing_active_sessions{{worker="{w}"}} {n}' for w, n in (active or {}).items()]
    page += [f'smg_routing_sessions{{worker="{w}"}} {n}' for w, n in (sessions or {}).items()]
    return "\n".join(page) + "\n"


IDLE = smg()
PINNED = smg({"vacant": 5, "occupied_hit": 100})
