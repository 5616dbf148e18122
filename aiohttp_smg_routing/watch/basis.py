"""The counts behind a verdict: the current ones, or all so far if those say too little."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..verify.counting import keyed_calls, policy_of, sharing
from ..verify.evidence import FEWEST
from ..verify.facts import CACHE_KEEPERS, PROBES, UNCOUNTED_POLICIES
from ..verify.seen import Counters
from .view import Share, View, kept_by_gateway, kept_by_server

_MANY = 100  # calls; the probes of ``verify`` are a small share of so many
_A_RUN = 250  # calls; a run of ``verify`` with its default options makes 292


@dataclass(frozen=True, slots=True)
class Basis:
    """The counts that the verdict is about."""

    counters: Counters
    server: Mapping[str, int]
    when: str
    """The period of the gateway's counts, as the end of a sentence."""
    server_when: str
    """The period of the session server's counts, likewise."""
    is_all: bool = False
    """Whether the gateway's counts are all so far."""

    def without_probes(self, keyed: Share) -> Share:
        """Return the share of all calls so far less those that ``verify`` made without a key.

        Nobody says how often it ran.
        """
        runs = max(keyed.of // _A_RUN, keyed.of >= _MANY) if self.is_all else 0
        probes = PROBES * runs
        return Share(keyed.part, max(keyed.part, keyed.of - probes))

    @property
    def is_seen(self) -> bool:
        """Whether the session server saw enough later turns to tell."""
        return kept_by_server(self.server).of >= FEWEST

    @property
    def kept(self) -> Share:
        """How many later calls were kept: by the session server if it can tell."""
        return kept_by_server(self.server) if self.is_seen else kept_by_gateway(self.counters)


def basis_of(view: View) -> Basis:
    """Return the current counts, or all so far if the current ones tell too little of pins."""
    now, server_now = view.now, view.server_now or {}
    whens = ", since the gateway started", ", since the session server started"
    if now is None or max(telling(now), kept_by_server(server_now).of) < FEWEST:
        return Basis(view.totals, view.server_totals, *whens, is_all=True)
    server_when = f", in the {view.server.span}" if view.server else ""
    # Only manual counts keys that come again. For other policies, only the server knows them.
    is_mute = "manual" not in view.totals.branches and kept_by_server(server_now).of < FEWEST
    if is_mute and view.server and not view.server.error:
        server_now, server_when = view.server_totals, whens[1]
    return Basis(now, server_now, f", in the {view.gateway.span}", server_when)


def telling(counters: Counters) -> int:
    """Return how many calls tell of pins: those whose key came again, or chose no worker."""
    return counters.calls - new_keys(counters)


def new_keys(counters: Counters) -> int:
    """Return how many keys came for the first time. Each pool that pins them has counted them."""
    pools = max((sharing(counters, pool) for pool in pools_of(counters)), default=1)
    return counters.of("vacant") // max(1, pools)


def pools_of(counters: Counters) -> list[str]:
    """Return the pools of workers with a cache that calls were routed to."""
    return [name for name in CACHE_KEEPERS if counters.pools.get(name)]


def keyed_by(counters: Counters, pool: str) -> Share:
    """Return how many of a pool's calls went to the worker that the key chose."""
    return Share(keyed_calls(counters, pool), sum(counters.pools[pool].values()))


def tells(view: View, counters: Counters, pool: str) -> bool:
    """Tell whether the policy of a pool counts the calls that the key routed, and no others."""
    policy, page = policy_of(counters, pool), view.gateway.page
    if policy == "consistent_hashing":
        return page is not None and page.tells_keys
    return not (policy is None or policy == "prefix_hash" or policy in UNCOUNTED_POLICIES)


def hashes(counters: Counters) -> bool:
    """Tell whether ``consistent_hashing`` chose all workers, on which replicas agree."""
    return {policy for its in counters.pools.values() for policy in its} == {"consistent_hashing"}


def policies_of(counters: Counters, pool: str) -> str:
    """Return the policies of a pool, in words."""
    return " and ".join(sorted(counters.pools[pool]))


def is_below(share: Share, least: float) -> bool:
    """Tell whether a share that is worth judging is below ``least``. ``least`` itself is enough."""
    return share.of >= FEWEST and share.part < least * share.of - 1e-9
