"""``watch``: how it reads a page of metrics, what it concludes, and how it says so."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from yarl import URL

from aiohttp_smg_routing.verify.ask import samples_of
from aiohttp_smg_routing.verify.call import Client
from aiohttp_smg_routing.verify.judge import Verdict
from aiohttp_smg_routing.verify.streams import terminal
from aiohttp_smg_routing.watch.document import document
from aiohttp_smg_routing.watch.endpoint import Endpoint, Look
from aiohttp_smg_routing.watch.judge import judge
from aiohttp_smg_routing.watch.page import (
    KEYED,
    Gateway,
    Server,
    gateway_shrank,
    read_gateway,
    read_server,
)
from aiohttp_smg_routing.watch.report import lines
from aiohttp_smg_routing.watch.show import Picture
from aiohttp_smg_routing.watch.view import View
from harness.processes import ROOT

from .metric_pages import IDLE, PINNED, SMG, SMG_1_13, W1, W2, W3, server_page, smg, vllm

GATEWAY = URL("http://10.0.0.1:29000/metrics")
SERVER = URL("http://10.0.0.9:8080/metrics")

PACKAGE = ROOT / "aiohttp_smg_routing" / "watch"

NO_PAGE: Any = None


class Anybody:
    """A ``Client`` without a secret that opens nothing."""

    printable = Client.printable
    _secrets: Sequence[str] = ()


CLIENT: Any = Anybody()


def gateway_of(text: str) -> Gateway:
    return read_gateway(samples_of(CLIENT, text))


def server_of(text: str) -> Server:
    return read_server(samples_of(CLIENT, text))


def view(
    before: str | None,
    after: str | None,
    server: tuple[str | None, str | None] | None = None,
    **look: Any,
) -> View:
    """Return the view of these pages, read 10 seconds apart."""
    gateway = Look(GATEWAY, page_of(after), page_of(before), seconds=10, **look)
    if server is None:
        return View(gateway)
    first, last = (None if text is None else server_of(text) for text in server)
    return View(gateway, Look(SERVER, last, first, seconds=10))


def page_of(text: str | None) -> Gateway | None:
    return None if text is None else gateway_of(text)


def names(verdict: Verdict) -> list[str]:
    return [cause.name for cause in verdict.causes]


VERDICT = Verdict("pinned", "Pinned.", ())


def hashed_to_one(**state: Any) -> str:
    """Return a page of a gateway that hashed all calls to one worker of two."""
    calls = {"routing_key_hit": 40}
    return smg(calls, policy="consistent_hashing", workers={W1: 40, W2: 0}, **state)


OTHER_MODEL = 'smg_worker_pool_size{worker_type="regular",model="judge"} 1\n'
TWO_MODELS = smg({"vacant": 5, "occupied_hit": 100}, workers={W1: 105, W2: 0}, more=OTHER_MODEL)
LONG = {"vacant": 500, "occupied_hit": 200_000}  # a gateway that has run for a long time

CASES: dict[str, tuple[View, str, list[str], str]] = {
    "pinned now": (
        view(IDLE, PINNED),
        "pinned",
        [],
        "100 of 100 later calls came to the worker of their key, in the last 10 s",
    ),
    "pinned by the session server, too": (
        view(IDLE, PINNED, (server_page(), server_page(first=5, kept=99, moved=1))),
        "pinned",
        [],
        "99 of 100 later calls came to the worker of their session",
    ),
    "idle, and pinned before that": (
        view(PINNED, PINNED),
        "pinned",
        ["idle"],
        "100 of 100 later calls came to the worker of their key, since the gateway started",
    ),
    "first look, and so nothing of now": (view(None, PINNED), "pinned", [], "since the gateway"),
    "long turns, and so no call that begins just now": (
        view(PINNED, PINNED + f'smg_worker_requests_active{{worker="{W1}"}} 9\n'),
        "pinned",
        [],
        "100 of 100 later calls",
    ),
    "no call yet": (view(IDLE, IDLE), "could not tell", ["no_calls"], "has routed no call"),
    "too few": (
        view(IDLE, smg({"vacant": 5, "occupied_hit": 4})),
        "could not tell",
        [],
        "4 of 4 later calls came to the worker of their key, since the gateway started, which are "
        "too few to tell",
    ),
    "no page yet": (view(None, None), "could not tell", [], "has not answered yet"),
    "no page": (
        view(None, None, error="it answers 404", since=datetime(2026, 1, 1, 12, 0, 0)),
        "could not tell",
        ["no_counters"],
        "could not be read",
    ),
    "no page any more": (
        view(IDLE, PINNED, error="no answer in time", since=datetime(2026, 1, 1, 12, 0, 0)),
        "could not tell",
        ["no_counters"],
        "can't be read any more",
    ),
    "one worker": (
        view(IDLE, smg({"vacant": 5, "occupied_hit": 100}, workers={W1: 105})),
        "could not tell",
        ["one_worker"],
        "only one worker is known, so every session stays on it.",
    ),
    "no worker": (
        view(None, smg(workers={})),
        "could not tell",
        ["no_healthy_workers", "no_calls"],
        "",
    ),
    "policy that ignores keys": (
        view(IDLE, smg(policy="round_robin", calls=100)),
        "not pinned",
        ["policy"],
        "the key chose the worker of 0 of 100 calls",
    ),
    "policy that ignores keys, of sglang-router": (
        view(None, smg(policy="round_robin", calls=100, kind="")),
        "not pinned",
        ["policy"],
        "the key chose the worker of 0 of 100 calls",
    ),
    "override": (
        view(IDLE, smg({"vacant": 5, "occupied_hit": 100}, policy="cache_aware")),
        "pinned",
        [],
        "100 of 100",
    ),
    "the calls without a key that verify made, of all so far": (
        view(None, smg({"vacant": 168, "occupied_hit": 120, "no_routing_id": 4})),
        "pinned",
        [],
        "120 of 120 later calls came to the worker of their key, since the gateway started",
    ),
    "more calls without a key than verify makes": (
        view(None, smg({"vacant": 168, "occupied_hit": 120, "no_routing_id": 8})),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 288 of 296 calls",
    ),
    "as many calls without a key as four runs of verify make": (
        view(None, smg({"vacant": 672, "occupied_hit": 480, "no_routing_id": 16})),
        "pinned",
        [],
        "480 of 480 later calls came to the worker of their key, since the gateway started",
    ),
    "as many calls without a key just now": (
        view(IDLE, smg({"vacant": 168, "occupied_hit": 120, "no_routing_id": 4})),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 288 of 292 calls, in the last 10 s",
    ),
    "as many calls without a key, of few": (
        view(None, smg({"vacant": 5, "occupied_hit": 50, "no_routing_id": 4})),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 55 of 59 calls",
    ),
    "keys lost": (
        view(IDLE, smg({"vacant": 5, "occupied_hit": 50, "no_routing_id": 50})),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 55 of 105 calls",
    ),
    "all keys lost, which the session server sends": (
        view(IDLE, smg({"no_routing_id": 50}), (server_page(), server_page(unknown=50))),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 0 of 50 calls",
    ),
    "keys lost just now, after many that were pinned": (
        view(smg(LONG), smg({**LONG, "no_routing_id": 1000})),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 0 of 1000 calls, in the last 10 s",
    ),
    "most keys lost just now, under the override": (
        view(
            smg(LONG, policy="random"),
            smg({**LONG, "occupied_hit": 200_005}, policy="random", calls=201_500),
        ),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 5 of 1000 calls, in the last 10 s",
    ),
    "all workers overloaded just now, after many calls that were pinned": (
        view(
            smg(LONG),
            smg({**LONG, "no_healthy_workers": 99}, more='smg_workers_overloaded{model="m"} 2\n'),
        ),
        "not pinned",
        ["overloaded"],
        "the key chose the worker of 0 of 99 calls, in the last 10 s",
    ),
    "all sessions move just now, as after a restart of the gateway": (
        view(
            smg({"vacant": 1}),
            smg({"vacant": 100}),
            (server_page(kept=10**6), server_page(kept=10**6, moved=60)),
        ),
        "not pinned",
        ["pins_lost"],
        "0 of 60 later calls came to the worker of their session, in the last 10 s",
    ),
    "each call has a key of its own": (
        view(IDLE, smg({"vacant": 100})),
        "could not tell",
        ["key_changes"],
        "0 of 0 later calls came to the worker of their key, since the gateway started; but see",
    ),
    "each call has a key of its own, after many calls that were pinned": (
        view(smg(LONG), smg({**LONG, "vacant": 600})),
        "could not tell",
        ["key_changes"],
        "200000 of 200000 later calls came to the worker of their key, since the gateway started; ",
    ),
    "each call has a key of its own, after turns that the session server kept": (
        view(
            smg({"vacant": 20, "occupied_hit": 100}),
            smg({"vacant": 420, "occupied_hit": 100}),
            (server_page(first=20, kept=100), server_page(first=420, kept=100)),
        ),
        "could not tell",
        ["key_changes"],
        "100 of 100 later calls came to the worker of their session, since the session server",
    ),
    "each call has a key of its own, and some are tried again": (
        view(IDLE, smg({"vacant": 1000, "occupied_hit": 49})),
        "could not tell",
        ["key_changes"],
        "49 of 49 later calls came to the worker of their key, in the last 10 s; but see below",
    ),
    "one session of twenty has had its second turn": (
        view(IDLE, smg({"vacant": 1000, "occupied_hit": 50})),
        "pinned",
        [],
        "50 of 50 later calls came to the worker of their key, in the last 10 s",
    ),
    "each call had a key of its own, until now": (
        view(smg({"vacant": 100}), smg({"vacant": 100})),
        "could not tell",
        ["idle", "key_changes"],
        "",
    ),
    "all keys lost just now, under the override": (
        view(smg(LONG, policy="random"), smg(LONG, policy="random", calls=201_500)),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 0 of 1000 calls, in the last 10 s",
    ),
    "each call has a key of its own, which is hashed": (
        view(
            IDLE,
            smg({"routing_key_hit": 100}, policy="consistent_hashing"),
            (server_page(), server_page(first=100)),
        ),
        "could not tell",
        ["key_changes"],
        "but see below",
    ),
    "one key for all, which is hashed": (
        view(
            None,
            hashed_to_one(),
        ),
        "could not tell",
        ["shared_key"],
        "but see below",
    ),
    "one key for many sessions, which is hashed": (
        view(
            None,
            hashed_to_one(),
            (None, server_page({W1: 2}, {W1: 20}, first=20, kept=20)),
        ),
        "could not tell",
        ["shared_key"],
        "but see below",
    ),
    "few sessions, which are hashed to one worker": (
        view(
            None,
            hashed_to_one(),
            (None, server_page({W1: 2}, {W1: 2}, first=2, kept=38)),
        ),
        "pinned",
        [],
        "38 of 38",
    ),
    "one key, or one worker that is not down": (
        view(
            None,
            hashed_to_one(health={W2: 0}),
        ),
        "could not tell",
        ["worker_down"],
        "but the gateway does not count the keys that come again",
    ),
    "one key, or one worker whose circuit is not open": (
        view(
            None,
            hashed_to_one(circuits={W2: 1}),
        ),
        "could not tell",
        ["circuit_open"],
        "but the gateway does not count the keys that come again",
    ),
    "turns end, and none begins": (
        view(PINNED, PINNED, (server_page(), server_page(kept=15))),
        "pinned",
        ["idle"],
        "15 of 15 later calls came to the worker of their session, in the last 10 s",
    ),
    "no healthy worker": (
        view(IDLE, smg({"no_healthy_workers": 50}, health={W1: 0, W2: 0})),
        "not pinned",
        ["worker_down", "no_healthy_workers"],
        "the key chose the worker of 0 of 50 calls",
    ),
    "no healthy worker just now, after many calls that were pinned": (
        view(
            smg(LONG),
            smg({**LONG, "occupied_hit": 200_050, "no_healthy_workers": 50}, health={W1: 0, W2: 0}),
        ),
        "not pinned",
        ["worker_down", "no_healthy_workers"],
        "the key chose the worker of 50 of 100 calls",
    ),
    "no healthy worker for half of the calls that no key routed": (
        view(IDLE, smg({"occupied_hit": 80, "no_healthy_workers": 10, "no_routing_id": 10})),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 80 of 100 calls",
    ),
    "turns end on the one worker that there is": (
        view(
            smg({"occupied_hit": 100}, workers={W1: 100}),
            smg({"occupied_hit": 100}, workers={W1: 100}),
            (server_page(), server_page(kept=15)),
        ),
        "could not tell",
        ["idle", "one_worker"],
        "only one worker is known",
    ),
    "worker lost, and healthy again": (
        view(IDLE, smg({"occupied_hit": 90, "occupied_miss": 10})),
        "not pinned",
        ["worker_lost"],
        "90 of 100 later calls",
    ),
    "worker down, which is why sessions move": (
        view(
            IDLE,
            smg({"vacant": 5, "occupied_hit": 100}, health={W1: 0}),
            (server_page(), server_page(first=5, kept=50, moved=50)),
        ),
        "not pinned",
        ["worker_down"],
        "50 of 100 later calls",
    ),
    "worker lost": (
        view(IDLE, smg({"occupied_hit": 90, "occupied_miss": 10}, health={W1: 0})),
        "not pinned",
        ["worker_down", "worker_lost"],
        "90 of 100 later calls came to the worker of their key",
    ),
    "circuit open": (
        view(IDLE, smg({"vacant": 2, "occupied_hit": 100}, circuits={W1: 1})),
        "pinned",
        ["circuit_open"],
        "",
    ),
    "circuit open, of sglang-router": (
        view(IDLE, smg({"vacant": 2, "occupied_hit": 100}, circuits={W1: 1}, kind="")),
        "pinned",
        ["circuit_open"],
        "",
    ),
    "overloaded": (
        view(IDLE, smg({"no_healthy_workers": 50}, more='smg_workers_overloaded{model="m"} 2\n')),
        "not pinned",
        ["overloaded"],
        "the key chose the worker of 0 of 50 calls",
    ),
    "one key in too many calls at once": (
        view(IDLE, smg({"vacant": 2, "occupied_hit": 80, "cap_respill": 20}, policy="random")),
        "not pinned",
        ["shared_key"],
        "80 of 100",
    ),
    "one key for all": (
        view(IDLE, smg({"vacant": 1, "occupied_hit": 30}, workers={W1: 31, W2: 0})),
        "could not tell",
        ["shared_key"],
        "30 of 30 later calls came to the worker of their key, in the last 10 s; but see below",
    ),
    "one key for all, of prefill and decode workers": (
        view(
            IDLE,
            smg(
                {"vacant": 2, "occupied_hit": 60},
                calls=0,
                more="".join(
                    f'smg_worker_selection_total{{worker_type="{pool}",policy="manual"}} 31\n'
                    f'smg_worker_pool_size{{worker_type="{pool}"}} 2\n'
                    for pool in ("prefill", "decode")
                ),
            ),
        ),
        "could not tell",
        ["shared_key"],
        "but see below",
    ),
    "one session": (
        view(
            IDLE,
            smg({"vacant": 1, "occupied_hit": 30}, workers={W1: 31, W2: 0}),
            (server_page(), server_page({W1: 1}, {W1: 1}, first=1, kept=30)),
        ),
        "pinned",
        [],
        "30 of 30",
    ),
    "sessions move, and nothing at the gateway says why": (
        view(IDLE, PINNED, (server_page(), server_page(first=5, kept=50, moved=50))),
        "not pinned",
        ["pins_lost"],
        "50 of 100 later calls came to the worker of their session",
    ),
    "another gateway has the rest": (
        view(IDLE, PINNED, (server_page(), server_page(unknown=210))),
        "could not tell",
        ["replicas"],
        "100 of 100 later calls came to the worker of their key, in the last 10 s; but see below",
    ),
    "another gateway, which hashes the keys too, has the rest": (
        view(
            IDLE,
            smg({"routing_key_hit": 100}, policy="consistent_hashing"),
            (server_page(), server_page(first=10, kept=200)),
        ),
        "pinned",
        ["replicas"],
        "200 of 200 later calls came to the worker of their session, in the last 10 s",
    ),
    "another gateway, which hashes the keys too, has the rest, and nobody saw where to": (
        view(
            IDLE,
            smg({"routing_key_hit": 100}, policy="consistent_hashing"),
            (server_page(), server_page(unknown=210)),
        ),
        "could not tell",
        ["replicas"],
        "but see below",
    ),
    "a few more turns than the gateway routed may be under way": (
        view(IDLE, PINNED, (server_page(), server_page(unknown=124))),
        "pinned",
        [],
        "",
    ),
    "a few more than that are another gateway's": (
        view(IDLE, PINNED, (server_page(), server_page(unknown=125))),
        "could not tell",
        ["replicas"],
        "but see below",
    ),
    "another gateway has all": (
        view(PINNED, PINNED, (server_page(), server_page(unknown=210))),
        "could not tell",
        ["idle", "other_gateway"],
        "but see below",
    ),
    "the session server is one of another gateway": (
        view(
            IDLE,
            smg({"vacant": 100}),
            (server_page(), server_page({W3: 9}, {W1: 0, W3: 9}, first=9, kept=91)),
        ),
        "could not tell",
        ["other_gateway"],
        "91 of 91 later calls came to the worker of their session, in the last 10 s; but see below",
    ),
    "a gateway that has just begun anew, and finds its workers only now": (
        view(
            None,
            smg(workers={}),
            (server_page({W1: 9}, {W1: 9}, kept=91), server_page({W1: 9}, {W1: 9}, kept=91)),
        ),
        "could not tell",
        ["no_healthy_workers", "no_calls"],
        "",
    ),
    "the workers are ranks, which the session server names": (
        view(
            IDLE,
            PINNED,
            (server_page(), server_page({f"{W1}@1": 5}, {f"{W1}@1": 5}, first=5, kept=100)),
        ),
        "pinned",
        [],
        "",
    ),
    "turns that were under way are no other gateway's": (
        view(
            PINNED + f'smg_worker_requests_active{{worker="{W1}"}} 200\n',
            PINNED,
            (server_page(), server_page(unknown=210)),
        ),
        "pinned",
        ["idle"],
        "",
    ),
    "hashed": (
        view(IDLE, smg({"routing_key_hit": 100}, policy="consistent_hashing")),
        "could not tell",
        [],
        "the key chose the worker of 100 of 100 calls, in the last 10 s, but the gateway does not "
        "count the keys that come again: give the metrics URL of a session server",
    ),
    "hashed, and the session server tells": (
        view(
            IDLE,
            smg({"routing_key_hit": 100}, policy="consistent_hashing"),
            (server_page(), server_page(first=10, kept=90)),
        ),
        "pinned",
        [],
        "90 of 90 later calls came to the worker of their session",
    ),
    "hashed, and the session server has few turns just now": (
        view(
            smg({"routing_key_hit": 100}, policy="consistent_hashing"),
            smg({"routing_key_hit": 1100}, policy="consistent_hashing"),
            (server_page(kept=500), server_page(kept=505)),
        ),
        "pinned",
        [],
        "505 of 505 later calls came to the worker of their session, since the session server",
    ),
    "hashed, and each call has a key of its own just now, after many that were pinned": (
        view(
            smg({"routing_key_hit": 100}, policy="consistent_hashing"),
            smg({"routing_key_hit": 200}, policy="consistent_hashing"),
            (server_page(kept=500), server_page(first=100, kept=500)),
        ),
        "could not tell",
        ["key_changes"],
        "but see below",
    ),
    "hashed, while a worker is down": (
        view(IDLE, smg({"routing_key_hit": 100}, policy="consistent_hashing", health={W1: 0})),
        "could not tell",
        ["worker_down"],
        "but the gateway does not count the keys that come again",
    ),
    "hashed, which SMG 1.12 does with an API key, too": (
        view(IDLE, smg({"routing_key_hit": 100}, policy="consistent_hashing", kind=SMG)),
        "could not tell",
        ["any_key"],
        "the gateway's counters do not tell",
    ),
    "the same, and the session server tells": (
        view(
            IDLE,
            smg({"routing_key_hit": 100}, policy="consistent_hashing", kind=SMG),
            (server_page(), server_page(first=10, kept=90)),
        ),
        "pinned",
        ["any_key"],
        "90 of 90 later calls came to the worker of their session",
    ),
    "hashed, without a key": (
        view(IDLE, smg({"routing_key_hit": 5, "random_fallback": 95}, policy="consistent_hashing")),
        "not pinned",
        ["key_lost"],
        "the key chose the worker of 5 of 100 calls",
    ),
    "prefix_hash": (
        view(IDLE, smg(policy="prefix_hash", calls=100)),
        "could not tell",
        ["prefix_hash"],
        "",
    ),
    "vllm-router": (view(vllm(calls=(0, 0)), vllm()), "could not tell", ["uncounted"], ""),
    "vllm-router, one worker for all": (
        view(vllm(calls=(0, 0)), vllm(calls=(0, 40))),
        "could not tell",
        ["wrong_header"],
        "do not tell",
    ),
    "vllm-router that ignores keys": (
        view(None, vllm("round_robin")),
        "not pinned",
        ["policy"],
        "the key chose the worker of 0 of 100 calls",
    ),
    "one side has the sessions": (
        view(
            IDLE,
            PINNED,
            (server_page(), server_page({W1: 20, W2: 0}, {W1: 20, W2: 9}, first=5, kept=100)),
        ),
        "pinned",
        ["one_sided"],
        "",
    ),
    "one side has the calls": (
        view(IDLE, smg({"vacant": 5, "occupied_hit": 100}, workers={W1: 105, W2: 0})),
        "pinned",
        ["one_sided"],
        "",
    ),
    "one side has the sessions, because only it is healthy": (
        view(
            IDLE,
            smg({"vacant": 5, "occupied_hit": 100}, health={W2: 0}),
            (server_page(), server_page({W1: 20}, {W1: 20, W2: 9}, first=5, kept=100)),
        ),
        "pinned",
        ["worker_down"],
        "",
    ),
    "one side has the sessions, while a worker of another kind is down": (
        view(
            IDLE,
            smg(
                {"vacant": 5, "occupied_hit": 100},
                more='smg_worker_pool_size{worker_type="prefill",model="m"} 1\n'
                'smg_worker_health{worker="http://10.0.0.9:8000"} 0\n',
            ),
            (server_page(), server_page({W1: 20}, {W1: 20}, first=5, kept=100)),
        ),
        "pinned",
        ["worker_down", "one_sided"],
        "",
    ),
    "one side has the sessions of its model": (
        view(
            IDLE,
            TWO_MODELS,
            (server_page(), server_page({W1: 20}, {W1: 20}, first=5, kept=100)),
        ),
        "pinned",
        [],
        "",
    ),
    "one side has the calls of its model": (view(IDLE, TWO_MODELS), "pinned", [], ""),
    "one side has the hashed calls of its model": (
        view(IDLE, hashed_to_one(more=OTHER_MODEL)),
        "could not tell",
        [],
        "but the gateway does not count the keys that come again",
    ),
    "each of two models has one worker": (
        view(IDLE, smg({"vacant": 5, "occupied_hit": 100}, workers={W1: 105}, more=OTHER_MODEL)),
        "could not tell",
        ["one_worker"],
        "only one worker is known",
    ),
    "calls of a session server that are wrong": (
        view(
            IDLE,
            PINNED,
            (server_page(late=1), server_page(kept=100, late=3, untagged=2, unmatched=1)),
        ),
        "pinned",
        ["untagged", "late", "unmatched"],
        "",
    ),
    "restarts": (
        view(None, PINNED, restarts=2, restarted=datetime(2026, 1, 1, 12, 0, 0)),
        "pinned",
        ["gateway_restarted"],
        "",
    ),
    "calls that came no further than an encode worker": (
        view(
            IDLE,
            smg(
                calls=0,
                more='smg_worker_selection_total{worker_type="encode",policy="manual"} 20\n',
            ),
        ),
        "could not tell",
        [],
        "no call came to a worker that keeps a cache, in the last 10 s",
    ),
    "two pools, one of which has a policy that ignores keys": (
        view(
            IDLE,
            smg(
                {"vacant": 5, "occupied_hit": 95},
                calls=0,
                more='smg_worker_selection_total{worker_type="prefill",policy="manual"} 100\n'
                'smg_worker_selection_total{worker_type="decode",policy="round_robin"} 100\n'
                'smg_worker_pool_size{worker_type="prefill"} 2\n',
            ),
        ),
        "not pinned",
        ["policy"],
        "the key chose the decode worker of 0 of 100 calls",
    ),
}


@pytest.mark.parametrize(
    ("case", "is_named"),
    [
        ("more calls without a key than verify makes", True),
        ("as many calls without a key just now", True),
        ("all keys lost just now, under the override", False),
    ],
)
def test_a_few_lost_keys_may_be_those_of_verify(case: str, is_named: bool) -> None:
    [cause] = judge(CASES[case][0], 0.99).causes
    assert cause.name == "key_lost"
    assert ("Each run of verify makes 4 calls without a key" in cause.advice) == is_named


@pytest.mark.parametrize("case", CASES)
def test_verdict_and_causes(case: str) -> None:
    seen, answer, causes, words = CASES[case]
    verdict = judge(seen, 0.99)
    assert (verdict.answer, names(verdict)) == (answer, causes), verdict.sentence
    assert words in verdict.sentence
    for cause in verdict.causes:
        assert cause.text.endswith(".")
        assert cause.advice.endswith((".", "?"))
    json.loads(document(seen, verdict))
    for width, height in ((80, None), (80, 24), (30, 10), (1, 1)):
        assert max(map(len, lines(seen, verdict, width, height))) <= width


def test_session_server_that_does_not_answer_or_was_restarted_changes_no_verdict() -> None:
    noon = datetime(2026, 1, 1, 12, 0, 0)
    gateway = view(IDLE, PINNED).gateway
    page = server_of(server_page(kept=1))
    silent = View(gateway, Look(SERVER, error="it answers 500", since=noon))
    verdict = judge(silent, 0.99)
    assert (verdict.answer, names(verdict)) == ("pinned", ["no_server_counters"])
    assert "could not be read at http://10.0.0.9:8080/metrics, since 12:00:00: it answers 500." in (
        verdict.causes[0].text
    )
    assert json.loads(document(silent, verdict))["server"]["error"] == "it answers 500"
    gone = View(gateway, Look(SERVER, page, page, 10, "no answer in time", noon, 1, noon))
    verdict = judge(gone, 0.99)
    assert (verdict.answer, names(verdict)) == (
        "pinned",
        ["no_server_counters", "server_restarted"],
    )
    assert "Its figures are from before that." in verdict.causes[0].text
    told = "\n".join(lines(gone, verdict))
    assert "kept                                                -" not in told
    assert json.loads(document(gone, verdict))["server"]["now"] is None


def test_session_server_that_saw_too_few_turns_now_leaves_the_verdict_to_the_gateway() -> None:
    server = server_page(kept=500, moved=500), server_page(kept=505, moved=500)
    verdict = judge(view(IDLE, PINNED, server), 0.99)
    assert verdict.sentence == (
        "Pinned: 100 of 100 later calls came to the worker of their key, in the last 10 s."
    )
    idle = judge(view(PINNED, PINNED, server), 0.99)
    assert idle.sentence == (
        "Not pinned: 505 of 1005 later calls came to the worker of their session, since the "
        "session server started."
    )


@pytest.mark.parametrize(("calls", "when"), [(9, "since the gateway"), (10, "in the last 10 s")])
def test_ten_later_calls_are_enough_for_a_verdict_on_now(calls: int, when: str) -> None:
    before, after = (smg({"vacant": 5, "occupied_hit": hits}) for hits in (500, 500 + calls))
    assert when in judge(view(before, after), 0.99).sentence


def test_old_turns_of_a_session_server_that_does_not_answer_tell_nothing_of_a_hash() -> None:
    idle, hashed = (smg({"routing_key_hit": n}, policy="consistent_hashing") for n in (0, 100))
    page, noon = server_of(server_page(kept=500)), datetime(2026, 1, 1, 12, 0, 0)
    gone = View(view(idle, hashed).gateway, Look(SERVER, page, page, 10, "no answer in time", noon))
    assert judge(gone, 0.99).answer == "could not tell"


@pytest.mark.parametrize(("seconds", "turns"), [(11.3, 1130), (16, 2000), (60, 6000)])
def test_page_of_the_session_server_that_comes_seldom_tells_of_no_other_gateway(
    seconds: float, turns: int
) -> None:
    gateway = view(smg({"vacant": 9}), smg({"vacant": 9, "occupied_hit": 1000})).gateway
    before, page = server_of(server_page()), server_of(server_page(kept=turns))
    verdict = judge(View(gateway, Look(SERVER, page, before, seconds)), 0.99)
    assert (verdict.answer, names(verdict)) == ("pinned", [])
    assert verdict.sentence.endswith(f"in the last {seconds:.0f} s.")


def test_turns_that_vllm_router_routed_before_are_no_other_gateway_s() -> None:
    """vllm-router doesn't say how many calls are in flight."""
    server = server_page(unknown=100), server_page(unknown=500)
    assert names(judge(view(vllm(), vllm(calls=(60, 60)), server), 0.99)) == ["uncounted"]


def test_counters_that_begin_anew_again_and_again_may_be_those_of_several() -> None:
    """A balancer in front of several processes makes their counters look like restarts."""
    noon = datetime(2026, 1, 1, 12, 0, 0)
    for restarts, is_told in ((1, False), (2, True)):
        gateway = Look(GATEWAY, gateway_of(PINNED), restarts=restarts, restarted=noon)
        server = Look(SERVER, server_of(server_page()), restarts=restarts, restarted=noon)
        told = judge(View(gateway, server), 0.99).causes[:2]
        assert [cause.name for cause in told] == ["gateway_restarted", "server_restarted"]
        for cause in told:
            assert (" answer there in turn" in cause.text) is is_told
            assert ("give the URL of a single one" in cause.advice) is is_told


def test_remedy_of_a_policy_is_also_that_of_an_override_without_a_key() -> None:
    """The gateway doesn't say whether it was launched with the override."""
    [cause] = judge(view(None, smg(policy="cache_aware", calls=50)), 0.99).causes
    assert "unless it has --routing-key-override" in cause.text
    assert "If it has that already, no key reaches it. Check the session server" in cause.advice


def test_share_that_is_enough_is_exactly_so_much() -> None:
    exactly = view(IDLE, smg({"vacant": 5, "occupied_hit": 90, "occupied_miss": 10}))
    assert judge(exactly, 0.9).answer == "pinned"
    assert judge(exactly, 0.91).answer == "not pinned"
    seven = view(IDLE, smg({"vacant": 5, "occupied_hit": 7, "occupied_miss": 93}))
    assert judge(seven, 0.07).answer == "pinned"  # 0.07 * 100 > 7 in floats


def test_figures_of_each_branch_worker_and_outcome() -> None:
    more = "".join(
        f'smg_{name}{{worker="{W1}",dp_rank="{rank}"}} {value}\n'
        for rank in (0, 1)
        for name, value in (
            ("engine_token_usage", 0.2 + rank / 5),
            ("engine_cache_hit_rate", 0.9),
            ("worker_routing_keys_active", 3),
        )
    )
    after = smg({"vacant": 5, "occupied_hit": 99, "occupied_miss": 1}, circuits={W2: 2}, more=more)
    server = server_page({W1: 2, W2: 1}, {W1: 4, W2: 5}, first=5, kept=97, moved=3)
    seen = view(PINNED.replace("100", "50"), after, (server_page(), server))
    told = "\n".join(lines(seen, judge(seen, 0.99)))
    for words in (
        "occupied_hit                                     4.9            49            99",
        "occupied_miss                                    0.1             1             1",
        "policy manual                                    0.0             0           105",
        "kept share                                                   98.0%         99.0%",
        "moved                                            0.3             3             3",
        "kept share                                                   97.0%         97.0%",
        "2 workers: 0 down, 0 with an open circuit, 0 overloaded",
        "active sessions of the fullest worker over the mean: 2 / 1.5 = 1.33",
        "10.0.0.2:8000           ok             0.0        52        4      2   30%   90%",
        "10.0.0.3:8000           half open      0.0        53        5      1     -     -",
    ):
        assert words in told
    alone = view(None, after)
    told = "\n".join(lines(alone, judge(alone, 0.99)))
    assert "ok               -        52        6          30%   90%" in told


def test_figures_of_now_are_those_of_a_second() -> None:
    text = lines(view(IDLE, PINNED), VERDICT)
    rates = {row.split()[0]: row.split()[2] for row in text if row.startswith("10.0.0.")}
    assert rates == {W1.removeprefix("http://"): "5.2", W2.removeprefix("http://"): "5.3"}


def test_kept_share_of_the_gateway_is_that_of_manual() -> None:
    """Under ``consistent_hashing`` a branch shows that a call had a key, not that it was kept."""
    for policy, rows in (("manual", 1), ("consistent_hashing", 0)):
        text = lines(view(IDLE, smg({"occupied_hit": 9}, policy=policy)), VERDICT)
        assert len([line for line in text if line.startswith("kept share")]) == rows


def test_gateway_without_a_page_has_no_figures() -> None:
    text = lines(view(None, None, error="nobody is there"), VERDICT)
    assert [line for line in text if "per second" in line or "worker" in line] == []


def test_workers_are_those_that_the_gateway_tells_the_health_of() -> None:
    threads = 'smg_tokio_worker_polls{worker="3"} 1\n'
    health = f'smg_worker_health{{worker="{W2}"}} 1\n'
    page = gateway_of(SMG + smg({"vacant": 1}, workers={W1: 1}) + threads + health)
    assert {*page.workers} == {W1, W2}


@pytest.mark.parametrize(("rates", "shown"), [((0, 0), [None, None]), ((0, 0.5), [0, 0.5])])
def test_hit_rate_of_0_is_none_at_all_if_every_worker_has_it(
    rates: Sequence[float], shown: Sequence[float | None]
) -> None:
    """SMG writes a 0 for an engine that has no figure."""
    pairs = zip((W1, W2), rates, strict=True)
    more = "".join(f'smg_engine_cache_hit_rate{{worker="{w}"}} {rate}\n' for w, rate in pairs)
    page = gateway_of(smg({"vacant": 2}, more=more))
    assert [worker.cache_hit_rate for worker in page.workers.values()] == shown


def test_what_the_gateway_does_not_say_of_a_worker_is_unknown() -> None:
    page = gateway_of(SMG_1_13 + f'smg_worker_cb_outcomes_total{{worker="{W1}"}} 5\n')
    [worker] = page.workers.values()
    assert (worker.calls, worker.healthy, worker.circuit) == (5, None, None)


@pytest.mark.parametrize("outcome", KEYED)
def test_key_that_the_session_server_sends_is_looked_for_on_its_way(outcome: str) -> None:
    advice = []
    for name in (outcome, "untagged"):
        server = server_page(), server_page(None, None, **{name: 50})
        verdict = judge(view(IDLE, smg({"no_routing_id": 50}), server), 0.99)
        advice += [cause.advice for cause in verdict.causes if cause.name == "key_lost"]
    sent, unsent = advice
    assert ("The session server sends keys" in sent, unsent != sent) == (True, True)


@pytest.mark.parametrize(("sent", "is_whole"), [(47, False), (48, True), (52, True), (53, False)])
def test_calls_beside_keys_that_all_arrive_are_made_without_the_hook(
    sent: int, is_whole: bool
) -> None:
    half = smg({"vacant": 10, "occupied_hit": 40, "no_routing_id": 50})
    for before in (IDLE, half):  # in the last interval, and since the start
        server = server_page(unknown=sent if before == half else 0), server_page(unknown=sent)
        [cause] = [it for it in judge(view(before, half, server), 0.99).causes if it.name != "idle"]
        assert cause.name == "key_lost"
        assert ("a client without the hook" in cause.advice) is is_whole


def test_figures_that_are_old_are_said_to_be_so() -> None:
    old = server_of(server_page(kept=9))
    for page in (old, None):
        server = Look(SERVER, page, error="it answers 500", since=datetime.now())
        verdict = judge(View(Look(GATEWAY, page_of(PINNED)), server), 0.99)
        [cause] = [it for it in verdict.causes if it.name == "no_server_counters"]
        assert ("Its figures are from before that" in cause.text) is (page is old)


def test_workers_that_are_too_many_for_the_terminal_are_those_that_tell_least() -> None:
    workers = {f"http://10.0.{n // 250}.{n % 250}:8000": n for n in range(500)}
    health = {"http://10.0.0.7:8000": 0}
    seen = view(None, smg({"vacant": 2, "occupied_hit": 50}, workers=workers, health=health))
    told = lines(seen, judge(seen, 0.99), 80, 30)
    assert len(told) == 30
    rows = [line.split()[0] for line in told if line.startswith("10.0.")]
    assert rows[0] == "10.0.0.7:8000"  # the one that is down, although it had few calls
    assert set(rows[1:]) == {f"10.0.1.{n}:8000" for n in range(249, 249 - len(rows) + 1, -1)}
    assert told[-1] == f".. and {500 - len(rows)} more workers"
    assert len(lines(seen, judge(seen, 0.99))) > 500  # a log has all


def test_workers_that_the_gateway_no_longer_has_are_not_said_to_be_ok() -> None:
    sessions = {W1: 5, W2: 3}
    server = server_page(), server_page(sessions, sessions, first=8, kept=100)
    removed = smg({"vacant": 8, "occupied_hit": 99}, health={W2: -1}, circuits={W2: -1}, kind="")
    seen = view(None, removed, server)
    assert [*gateway_of(removed).workers] == [W1]
    told = "\n".join(lines(seen, judge(seen, 0.99)))
    assert "10.0.0.2:8000           ok " in told
    assert "10.0.0.3:8000           -  " in told


def test_outcomes_that_never_were_are_left_out_of_a_small_terminal() -> None:
    seen = view(IDLE, PINNED, (server_page(), server_page(first=5, kept=95, late=1)))
    assert [line.split()[0] for line in lines(seen, VERDICT, 80, 24) if line][7:12] == (
        ["session", "first", "kept", "late", "kept"]
    )
    assert "moved" in {line.split()[0] for line in lines(seen, VERDICT, 80, 40) if line}
    assert len(lines(seen, VERDICT, 80, 24)) <= 24


def test_long_names_keep_both_their_ends() -> None:
    names = [f"http://engine-{n}.engines.default.svc.cluster.local:8000" for n in (1, 2)]
    seen = view(None, smg({"vacant": 20}, workers=dict.fromkeys(names, 10)))
    told = lines(seen, judge(seen, 0.99))
    assert [line.split()[0] for line in told[-2:]] == [
        "engine-1.en..local:8000",
        "engine-2.en..local:8000",
    ]


def test_the_page_lists_the_causes_that_verify_does_not_have() -> None:
    code = "".join((PACKAGE / name).read_text("utf-8") for name in ("states.py", "judge.py"))
    found = set(re.findall(r'(?:Cause\(\s*|^    )"(\w+)"[,:]', code, re.MULTILINE))
    page = (ROOT / "docs/watch.md").read_text("utf-8")
    rows = re.findall(r"(?m)^\| (`.*?) \| ", page.partition("| cause |")[2].partition("\n\n")[0])
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == found - {"no_healthy_workers", "wrong_header"}  # verify's page lists these


def test_figures_that_are_no_numbers_are_left_out() -> None:
    more = f'smg_engine_token_usage{{worker="{W1}"}} NaN\n'
    assert gateway_of(smg(calls=10, more=more)).workers[W1].token_usage is None
    assert gateway_of(smg(calls=10, more=more)).load.kv_usage == {}
    with pytest.raises(ValueError, match="not a page of metrics"):
        gateway_of(smg(calls=10, more=more.replace("NaN", 400 * "9")))
    odd = server_page({W1: 3}, kept=5) + 'smg_routing_sessions{worker="w"} NaN\n'
    assert server_of(odd).sessions == {"w": 0}


@pytest.mark.parametrize("text", ["", "node_load1 0.5\n", "<html>\n", "smg_routing_calls 1\n"])
def test_pages_of_something_else_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"the answer|could not|invalid"):
        server_of(text)
    with pytest.raises(ValueError, match=r"the answer|could not|invalid"):
        gateway_of(text.replace("smg_routing", "x"))


def test_a_server_that_exports_no_active_sessions_is_shown_without_them() -> None:
    """prometheus-client's multi-process mode exports none."""
    page = server_page(sessions={W1: 5}, kept=9)
    seen = view(None, PINNED, (None, page))
    assert server_of(page).active is None
    told = "\n".join(lines(seen, judge(seen, 0.99)))
    assert "ok               -        52        5      -     -     -" in told


def test_figures_of_now_are_of_the_last_ten_seconds_or_of_one_interval() -> None:
    endpoint = Endpoint(CLIENT, GATEWAY, read_gateway, gateway_shrank)
    seconds = []
    for at in (0, 4, 8, 12, 16, 60):
        endpoint.add(at, gateway_of(PINNED))
        seconds.append(endpoint.seen.seconds)
    assert seconds == [0, 4, 8, 12, 12, 44]
    at_their_end = Endpoint(CLIENT, GATEWAY, read_gateway, gateway_shrank)
    for at in (0, 5, 15):
        at_their_end.add(at, gateway_of(PINNED))
    assert at_their_end.seen.seconds == 10
    assert [Look(GATEWAY, seconds=it).span for it in (44.4, 0.3)] == ["last 44 s", "last 0.3 s"]


def test_endpoint_says_since_when_there_is_no_page() -> None:
    endpoint = Endpoint(CLIENT, GATEWAY, read_gateway, gateway_shrank)
    endpoint.failed("it answers 500")
    since = endpoint.seen.since
    endpoint.failed("it answers 503")
    assert (endpoint.seen.error, endpoint.seen.since) == ("it answers 503", since)
    endpoint.add(1, gateway_of(PINNED))
    assert (endpoint.seen.error, endpoint.seen.since) == ("", None)


def test_picture_follows_a_terminal_that_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    out = StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    seen = view(None, PINNED)
    with Picture(terminal(out)) as redraw:
        for columns, width in ((200, 80), (40, 40), (1, 1), (100, 80), (0, 80)):
            monkeypatch.setenv("COLUMNS", str(columns))
            out.truncate(out.seek(0))
            redraw(seen, judge(seen, 0.99))
            drawn = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue()).splitlines()
            assert max(map(len, drawn)) == width


def test_wide_letters_take_no_second_line_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = StringIO()
    monkeypatch.setenv("COLUMNS", "30")
    seen = view(None, smg({"vacant": 20}, workers={"a" + 40 * "漢": 10, W2: 10}))
    with Picture(Console(file=out, force_terminal=True, height=40)) as redraw:
        redraw(seen, judge(seen, 0.99))
        drawn = out.getvalue().splitlines()
    [row] = [number for number, line in enumerate(drawn) if "漢" in line]
    assert drawn[row + 1].startswith("10.0..")


def test_picture_that_was_never_drawn_leaves_nothing() -> None:
    out = StringIO()
    with Picture(Console(file=out, force_terminal=True)):
        pass
    assert re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue()) == ""
