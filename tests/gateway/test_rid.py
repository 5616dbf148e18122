"""``rid``, SGLang's request id in the body, outranks the key in some versions of SMG."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing.testing import SmgGateway, StartSmgGateway
from harness.proxies import pinned_server

from ..series import samples_of
from ..smg import SMG
from ..turns import assert_keys, forget, served, turn, turns_of

if TYPE_CHECKING:
    from ..turns import Client

SESSIONS = [f"s-{number}" for number in range(11)]  # 11, so that round robin would move them
TURNS = 4
OVERRIDE = ["--routing-key-override"]

# The first version whose override prefers the rid; 1.12 stopped. A relapse fails the test.
OUTRANKED_FROM = {"manual": (1, 11), "consistent_hashing": (1, 11), "round_robin": (1, 10)}


async def play(client: "Client", rid: Callable[[str, int], str]) -> None:
    """Play the sessions of agents that put a ``rid`` into each body.

    It makes one call at a time, because the override spreads concurrent calls with one key.
    """
    for number, session_id in itertools.product(range(TURNS), SESSIONS):
        await turn(client, session_id, rid=rid(session_id, number))


async def key_sources(smg: SmgGateway) -> dict[str, int]:
    """Return how often the gateway took the key from each source, by its counters."""
    return {
        sample.labels["source"]: int(sample.value)
        for sample in await samples_of(smg.metrics_url)
        if sample.name == "smg_routing_key_source_total"
    }


def came_to(smg: SmgGateway) -> dict[str, set[URL]]:
    """Return each session's workers since the last time; check the key of each call."""
    assert_keys(turns_of(*smg.workers))
    found = {session_id: set(workers) for session_id, workers in served(*smg.workers).items()}
    forget(*smg.workers)
    return found


@pytest.mark.parametrize(
    ("policy", "args"),
    [
        ("manual", []),
        ("consistent_hashing", []),
        ("manual", OVERRIDE),
        ("consistent_hashing", OVERRIDE),
        ("round_robin", OVERRIDE),
    ],
)
async def test_a_rid_outranks_the_key_under_the_override_of_1_10_and_1_11_alone(
    smg_gateway: StartSmgGateway, aiohttp_client: AiohttpClient, policy: str, args: list[str]
) -> None:
    smg = await smg_gateway(3, policy=policy, args=args)
    client = await aiohttp_client(pinned_server(smg.url))
    outranks = bool(args) and OUTRANKED_FROM[policy] <= SMG < (1, 12)

    await play(client, lambda session_id, turn: "mine")  # the agents choose one rid for all
    together = came_to(smg)
    assert (len(set().union(*together.values())) == 1) is outranks
    await play(client, lambda session_id, turn: f"{session_id}-{turn}")  # a new rid for each call
    alone = came_to(smg)
    moved = [session_id for session_id in SESSIONS if len(alone[session_id]) > 1]
    assert bool(moved) is outranks
    if not outranks:
        assert alone == together

    # No version counts the sources under ``manual`` or ``consistent_hashing``.
    says = policy == "round_robin" and SMG >= (1, 10)
    source = "rid" if outranks else "header"
    assert await key_sources(smg) == ({source: 2 * len(SESSIONS) * TURNS} if says else {})
