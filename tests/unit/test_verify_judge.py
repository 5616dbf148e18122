"""Every verdict and every cause that ``verify`` draws from its measurements."""

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from random import Random
from typing import Literal, get_args

import pytest
from yarl import URL

from aiohttp_smg_routing.verify.cause import Cause
from aiohttp_smg_routing.verify.chance import beyond_chance
from aiohttp_smg_routing.verify.counting import Use
from aiohttp_smg_routing.verify.evidence import Evidence, Played, Stayed
from aiohttp_smg_routing.verify.judge import decide, judge
from aiohttp_smg_routing.verify.seen import (
    ARMS,
    Answer,
    Counters,
    Failure,
    GatewayLoad,
    Outcome,
    Plan,
    Seen,
    Turn,
)
from aiohttp_smg_routing.verify.summary import summarise
from harness.processes import ROOT

# ---- The rules, over every combination of evidence ----

# The rules of docs/verify.md in order: the evidence that each applies to, and its verdict.
RULES: list[tuple[Mapping[str, object], Answer]] = [
    ({"played": "nothing"}, "could not tell"),
    ({"played": "too little"}, "could not tell"),
    ({"one_worker": True}, "could not tell"),
    ({"key": "not used"}, "not pinned"),
    ({"stayed": "moved"}, "not pinned"),
    ({"stayed": "unclear"}, "could not tell"),
    ({"shared": True}, "could not tell"),
    ({"key": "used", "direct": True}, "pinned"),
    ({"better": True}, "pinned"),
    ({}, "could not tell"),
]
FLAG = (False, True)
EVERYTHING = [
    Evidence(*values)
    for values in product(get_args(Played), FLAG, get_args(Use), get_args(Stayed), FLAG, FLAG, FLAG)
]


def test_every_combination_of_evidence_has_the_verdict_of_the_first_rule_that_fits() -> None:
    assert len(EVERYTHING) == 432
    for evidence in EVERYTHING:
        [answer, *_] = [
            answer
            for rule, answer in RULES
            if all(getattr(evidence, name) == value for name, value in rule.items())
        ]
        assert decide(evidence) == answer, evidence


def test_pinned_needs_all_of_it() -> None:
    pinned = [evidence for evidence in EVERYTHING if decide(evidence) == "pinned"]
    for evidence in pinned:
        assert evidence.played == "enough"
        assert evidence.stayed == "kept"
        assert evidence.key != "not used"
        assert not evidence.one_worker
        assert not evidence.shared
        assert evidence.better or (evidence.key == "used" and evidence.direct)
    assert len(pinned) == 5


def test_docs_have_these_rules_in_this_order() -> None:
    page = (ROOT / "docs/verify.md").read_text("utf-8")
    rows = re.findall(r"(?m)^\| \d+ \| .* \| \*{0,2}([a-z ]+?)\*{0,2} \|$", page)
    # The page has one row for both rules about what was played.
    assert rows == [answer for _, answer in RULES[1:]]


# ---- From the measurements to the evidence ----

GATEWAY = URL("http://10.0.0.1:30000")
PLAN = Plan(GATEWAY, URL("http://10.0.0.1:29000/metrics"), model="m", run="r")
THROUGH = replace(PLAN, through="http://s/sessions/{session_id}/v1/chat/completions")
SESSIONS, TURNS = 24, 6
LATER = SESSIONS * (TURNS - 1)
CALLS = 2 * SESSIONS * TURNS


def counted(policy: str, pool: str = "regular", calls: int = CALLS, **branches: int) -> Counters:
    """Return the counters of one pool; the override's count as ``manual``."""
    series = policy if policy in ("consistent_hashing", "prefix_hash") else "manual"
    return Counters({pool: {policy: calls}}, {series: branches} if branches else {})


HOMES = [f"http://w{n}" for n in range(3)]
MANUAL = counted("manual", vacant=168, occupied_hit=120)
HASHING = counted("consistent_hashing", routing_key_hit=CALLS)
PREFIX = counted("prefix_hash", ring_hit=CALLS)
KEY_FOR_ALL = counted("manual", vacant=1, occupied_hit=287)
IGNORED = counted("round_robin")
NO_KEY = counted("manual", calls=4, no_routing_id=4)
HASHED = counted("consistent_hashing", calls=4, random_fallback=4)
PROBES: Mapping[str, Counters] = {
    "manual": NO_KEY,
    "consistent_hashing": HASHED,
    "prefix_hash": counted("prefix_hash", calls=4, ring_hit=4),
}
ANY_KEY = counted("consistent_hashing", calls=4, routing_key_hit=4)


def arm(
    name: str, kept: int, outcome: Outcome = "moved", *, named: bool = True, cached: int | None = 90
) -> list[Turn]:
    """Return 24 sessions of 6 turns; ``kept`` of the later turns stayed on their worker."""
    later: list[Outcome] = [outcome] * LATER
    later[:kept] = ["kept"] * kept
    Random(7).shuffle(later)
    turns = []
    for session in range(1, SESSIONS + 1):
        home = session % 3
        for number in range(1, TURNS + 1):
            became: Outcome = "first" if number == 1 else later.pop()
            home = (home + 1) % 3 if became == "moved" else home
            became = became if named or became == "failed" else "unknown"
            turn = Turn(
                "keyed" if name == "keyed" else "control",
                session,
                number,
                became,
                worker=f"http://w{home}" if named and became not in ("unknown", "failed") else None,
                prompt_tokens=100,
                cached_tokens=cached,
                first_token_seconds=0.1,
                failure=Failure("timeout", GATEWAY) if became == "failed" else None,
            )
            turns.append(turn)
    return turns


def seen(
    keyed: list[Turn] | None = None,
    control: list[Turn] | None = None,
    counters: Counters | None = MANUAL,
    plan: Plan = PLAN,
    probe: Counters | None = None,
) -> Seen:
    keyed = arm("keyed", LATER) if keyed is None else keyed
    control = arm("control", 40) if control is None else control
    turns = tuple(keyed + control)
    if counters and probe is None:
        policy = next((policy for pool in counters.pools.values() for policy in pool), "manual")
        probe = PROBES.get(policy, counted(policy, calls=4))
    workers = {"regular": 3}
    return Seen(plan, turns, len(turns), 0, ("m",), workers, counters, probe)


def failed(turns: list[Turn], number: int, sessions: int) -> list[Turn]:
    """Return ``turns``; the turns up to ``number`` of the first ``sessions`` have failed."""

    def became(turn: Turn) -> Turn:
        if turn.session > sessions or turn.number > number + 1:
            return turn
        if turn.number == number + 1:
            return replace(turn, outcome="first")
        failure = Failure("timeout", GATEWAY)
        return replace(turn, outcome="failed", worker=None, failure=failure)

    return [became(turn) for turn in turns]


def on_w0(name: str) -> list[Turn]:
    return [replace(turn, worker="http://w0") for turn in arm(name, LATER)]


def on_one_worker(counters: Counters | None) -> Seen:
    return seen(on_w0("keyed"), counters=counters)


def of_five(counters: Counters = MANUAL, probe: Counters | None = None) -> Seen:
    """Return a run on an SMG before 1.12 that reached three of five workers."""
    its = seen(counters=counters, probe=probe)
    return replace(its, workers={"regular": 5}, load=GatewayLoad("smg"))


def unnamed(
    counters: Counters | None,
    failed: int = 0,
    plan: Plan = PLAN,
    probe: Counters | None = None,
) -> Seen:
    return seen(
        arm("keyed", LATER - failed, "failed", named=False),
        arm("control", 40, named=False),
        counters,
        plan,
        probe,
    )


def pools(prefill: str, decode: str, branches: Mapping[str, Mapping[str, int]]) -> Seen:
    """Return what is seen when each call has two workers, and the answer names the decode one."""
    counters = Counters({"prefill": {prefill: CALLS}, "decode": {decode: CALLS}}, branches)
    probe = Counters({"prefill": {prefill: 4}, "decode": {decode: 4}}, {})
    return replace(seen(counters=counters, probe=probe), workers={"prefill": 3, "decode": 3})


CASES = {
    "pinned": (seen(), 0, []),
    "pinned by consistent_hashing": (seen(counters=HASHING), 0, []),
    "pinned, without counters": (seen(counters=None), 0, []),
    "pinned, as many as are enough": (seen(arm("keyed", LATER - 1)), 0, []),
    "pinned though one turn failed": (seen(arm("keyed", LATER - 1, "failed")), 0, ["timeout"]),
    "moved twice": (seen(arm("keyed", LATER - 2), counters=None), 1, ["pins_lost"]),
    "failed too often": (seen(arm("keyed", LATER - 2, "failed")), 2, ["timeout"]),
    "unknown too often": (seen(arm("keyed", LATER - 2, "unknown")), 2, []),
    "ignored": (seen(arm("keyed", 40), counters=IGNORED), 1, ["policy"]),
    "ignored, without counters": (seen(arm("keyed", 40), counters=None), 1, ["policy"]),
    "kept by another policy": (
        seen(control=arm("control", LATER), counters=IGNORED),
        1,
        ["policy"],
    ),
    "kept by who knows what": (
        seen(control=arm("control", LATER), counters=None),
        2,
        ["same_without_key"],
    ),
    "key at work although both are kept": (seen(control=arm("control", LATER)), 0, []),
    "key at work although both are kept, through a server": (
        seen(control=arm("control", LATER), plan=THROUGH),
        2,
        ["same_without_key"],
    ),
    "no word from the other arm": (
        seen(control=arm("control", 0, named=False), counters=None),
        2,
        [],
    ),
    "any call counts as one with a key": (
        seen(control=arm("control", LATER), counters=HASHING, probe=ANY_KEY),
        2,
        ["any_key", "same_without_key"],
    ),
    "any call counts as one with a key, yet only those of one session are kept": (
        seen(counters=HASHING, probe=ANY_KEY),
        0,
        [],
    ),
    "no probe, so the counters prove nothing": (
        seen(control=arm("control", LATER), counters=HASHING, probe=Counters()),
        2,
        ["same_without_key"],
    ),
    "no counters before the probe": (
        replace(seen(control=arm("control", LATER), counters=HASHING), probe=None),
        2,
        ["same_without_key"],
    ),
    "hashed, yet scattered": (seen(arm("keyed", 40), counters=HASHING), 1, ["worker_lost"]),
    "some keys hashed": (
        seen(
            arm("keyed", 80),
            counters=counted("consistent_hashing", routing_key_hit=50, random_fallback=238),
        ),
        1,
        ["key_lost"],
    ),
    "pinned by prefix_hash": (seen(counters=PREFIX), 0, []),
    "kept by prefix_hash, who knows by what": (
        seen(control=arm("control", LATER), counters=PREFIX),
        2,
        ["prefix_hash", "same_without_key"],
    ),
    "prefix_hash without the key": (seen(arm("keyed", 40), counters=PREFIX), 1, ["prefix_hash"]),
    "pinned by prefix_hash that honours the key": (
        seen(
            control=arm("control", LATER),
            counters=Counters(
                {"regular": {"prefix_hash": CALLS}},
                {"manual": {"vacant": 168, "occupied_hit": 120}},
            ),
            probe=counted("random", calls=4),
        ),
        0,
        [],
    ),
    "one key for all sessions": (on_one_worker(KEY_FOR_ALL), 2, ["shared_key", "one_sided"]),
    "one key for two sessions": (
        seen(counters=counted("manual", vacant=167, occupied_hit=121)),
        2,
        ["shared_key"],
    ),
    "ids that an earlier run has pinned": (
        seen(
            counters=counted("manual", occupied_hit=288),
            plan=replace(PLAN, session_id="task-{n}"),
        ),
        0,
        [],
    ),
    "ids that the override takes for one": (
        seen(
            counters=counted("random", occupied_hit=288), plan=replace(PLAN, session_id="task_t{n}")
        ),
        2,
        ["shared_key", "key_tail"],
    ),
    "one key for all sessions, hashed": (
        seen(on_w0("keyed"), on_w0("control"), HASHING),
        2,
        ["shared_key", "one_sided"],
    ),
    "hashed, and some workers get no session": (of_five(counters=HASHING), 0, ["left_out"]),
    "hashed, and one worker got none of few sessions": (
        replace(
            of_five(counters=counted("consistent_hashing", calls=24, routing_key_hit=24)),
            turns=tuple(
                turn for turn in arm("keyed", LATER) + arm("control", 0) if turn.session < 3
            ),
            sent=24,
            plan=replace(PLAN, sessions=2),
        ),
        0,
        [],
    ),
    "hashed, and the counters know of more workers than the answers": (
        of_five(counters=replace(HASHING, workers={f"http://w{n}": 9 for n in range(5)})),
        0,
        [],
    ),
    "hashed with an API key, and some workers get no session": (
        of_five(counters=HASHING, probe=ANY_KEY),
        0,
        ["left_out"],
    ),
    "hashed with an API key, through a session server that may lose the key": (
        replace(of_five(counters=HASHING, probe=ANY_KEY), plan=THROUGH),
        2,
        ["any_key", "keys_unseen"],
    ),
    "hashed by SMG 1.12, which loses no worker": (
        replace(of_five(counters=HASHING), load=GatewayLoad("smg", True, kv_usage={"w": 0.9})),
        0,
        [],
    ),
    "hashed to one of five workers by SMG 1.10": (
        replace(
            seen(on_w0("keyed"), on_w0("control"), HASHING),
            workers={"regular": 5},
            load=GatewayLoad("smg"),
        ),
        2,
        ["shared_key", "left_out"],
    ),
    "hashed, while others call the gateway": (
        of_five(counters=counted("consistent_hashing", calls=400, routing_key_hit=400)),
        0,
        ["other_calls"],
    ),
    "hashed, while workers came or went": (
        replace(of_five(counters=HASHING), has_changed=True),
        0,
        [],
    ),
    "hashed, while workers were overloaded": (
        replace(of_five(counters=HASHING), load=GatewayLoad("smg", overloaded=2)),
        0,
        ["overloaded"],
    ),
    "hashed, while a circuit is open": (
        replace(of_five(counters=HASHING), load=GatewayLoad("smg", circuits=2)),
        0,
        ["circuit_open"],
    ),
    "hashed, while workers failed": (of_five(counters=replace(HASHING, troubles=2)), 0, []),
    "pinned by manual, which may well give some workers no session": (of_five(), 0, []),
    "one key for all sessions, without counters": (
        seen(on_w0("keyed"), on_w0("control"), None),
        2,
        ["same_without_key", "one_sided"],
    ),
    "first turns that failed": (
        seen(failed(arm("keyed", LATER), 1, 2), counters=None),
        0,
        ["timeout"],
    ),
    "second turns that failed": (
        seen(
            [
                replace(turn, outcome="failed", worker=None, failure=Failure("timeout", GATEWAY))
                if turn.session < 3 and turn.number == 2
                else turn
                for turn in arm("keyed", LATER)
            ],
            counters=None,
        ),
        2,
        ["timeout"],
    ),
    "first turns whose worker nobody names": (
        seen(
            [
                replace(turn, outcome="unknown" if turn.number == 1 else "first", worker=None)
                if turn.session < 3 and turn.number < 3
                else turn
                for turn in arm("keyed", LATER)
            ],
            counters=None,
        ),
        2,
        [],
    ),
    "sessions that failed from beginning to end": (
        seen(failed(arm("keyed", LATER), TURNS, 1), counters=None),
        2,
        ["timeout"],
    ),
    "some keys lost": (
        seen(arm("keyed", 80), counters=counted("manual", occupied_hit=50, no_routing_id=238)),
        1,
        ["key_lost"],
    ),
    "some keys not counted, yet all kept": (
        seen(counters=counted("manual", occupied_hit=50, no_routing_id=238)),
        1,
        ["key_lost"],
    ),
    "named by who makes each key unique": (
        seen(counters=counted("manual", vacant=288)),
        1,
        ["pinned_again"],
    ),
    "by counters, and the workers have changed": (
        replace(unnamed(HASHING), has_changed=True),
        2,
        ["no_worker_name", "workers_changed"],
    ),
    "by counters, hashing, and a worker was in trouble": (
        unnamed(replace(HASHING, troubles=1)),
        2,
        ["no_worker_name", "workers_changed"],
    ),
    "by counters, pinned, and a call was tried again": (
        unnamed(replace(MANUAL, troubles=2)),
        2,
        ["no_worker_name", "workers_changed"],
    ),
    "named by another gateway than that of the metrics": (
        seen(counters=replace(counted("round_robin"), workers={"x": 288})),
        0,
        [],
    ),
    "through a server that sends one key in twenty calls": (
        seen(counters=counted("cache_aware", vacant=15), plan=THROUGH),
        1,
        ["key_lost"],
    ),
    "replicas": (
        seen(arm("keyed", 80), counters=counted("manual", calls=144, vacant=100, occupied_hit=44)),
        1,
        ["replicas"],
    ),
    "metrics of another gateway": (
        seen(arm("keyed", 40), counters=Counters(), probe=Counters()),
        1,
        ["other_gateway"],
    ),
    "pinned again and again": (
        seen(arm("keyed", 100), counters=counted("manual", vacant=188, occupied_hit=100)),
        1,
        ["pinned_again"],
    ),
    "a worker was lost": (
        seen(
            arm("keyed", 100),
            counters=counted("manual", vacant=168, occupied_hit=100, occupied_miss=20),
        ),
        1,
        ["worker_lost"],
    ),
    "a call that failed was tried again on another worker": (
        seen(
            arm("keyed", LATER - 2),
            counters=counted(
                "manual", calls=CALLS + 1, vacant=168, occupied_hit=120, occupied_miss=1
            ),
        ),
        1,
        ["worker_lost", "other_calls"],
    ),
    "one key for many sessions": (
        seen(
            arm("keyed", 100),
            counters=counted("manual", vacant=1, occupied_hit=100, cap_respill=187),
        ),
        1,
        ["shared_key"],
    ),
    "kept by who knows what, and others call it, too": (
        seen(
            control=arm("control", LATER),
            counters=counted("cache_aware", calls=900, occupied_hit=400),
        ),
        2,
        ["other_calls", "same_without_key"],
    ),
    "pinned, by the metrics of another gateway that is busy": (
        seen(counters=counted("random", calls=300), probe=Counters()),
        0,
        ["other_calls"],
    ),
    "pinned, by the metrics of another, busy gateway with the same workers": (
        seen(
            counters=replace(counted("random", calls=700), workers=dict.fromkeys(HOMES, 9)),
            probe=counted("random", calls=40),
        ),
        0,
        ["other_calls"],
    ),
    "pinned although others call it, too": (
        seen(counters=counted("manual", calls=900, vacant=60, occupied_hit=400)),
        0,
        ["other_calls"],
    ),
    "ignored, and others call it, too": (
        seen(arm("keyed", 40), counters=counted("random", calls=300)),
        1,
        ["policy", "other_calls"],
    ),
    # No answer names a worker, so the counters alone decide.
    "by counters": (unnamed(MANUAL), 0, ["no_worker_name"]),
    "by counters, hashing": (unnamed(HASHING), 0, ["no_worker_name"]),
    "by counters, ignored": (unnamed(IGNORED), 1, ["policy", "no_worker_name"]),
    "by counters, as many as are enough": (
        unnamed(counted("manual", vacant=169, occupied_hit=119)),
        0,
        ["no_worker_name"],
    ),
    "by counters, one short of enough": (
        unnamed(counted("manual", vacant=170, occupied_hit=118)),
        1,
        ["pinned_again", "no_worker_name"],
    ),
    "by counters, replicas": (
        unnamed(counted("manual", calls=144, vacant=84, occupied_hit=60)),
        2,
        ["replicas", "no_worker_name"],
    ),
    "by counters, a turn that failed may be one of those that were counted": (
        unnamed(counted("manual", vacant=169, occupied_hit=119), failed=1),
        2,
        ["timeout", "pinned_again", "no_worker_name"],
    ),
    "by counters, one call without its key": (
        unnamed(counted("consistent_hashing", routing_key_hit=287, random_fallback=1)),
        2,
        ["key_lost", "no_worker_name"],
    ),
    "by counters, no key hashed in either of the arms": (
        unnamed(counted("consistent_hashing", routing_key_hit=80, random_fallback=208)),
        1,
        ["key_lost", "no_worker_name"],
    ),
    "by counters in which any call counts": (
        unnamed(HASHING, probe=ANY_KEY),
        2,
        ["any_key", "no_worker_name"],
    ),
    "by counters, with ids that another run may have pinned": (
        unnamed(MANUAL, plan=replace(PLAN, session_id="task-{n}")),
        2,
        ["old_ids", "no_worker_name"],
    ),
    "by counters, a worker was lost": (
        unnamed(counted("manual", vacant=168, occupied_hit=100, occupied_miss=20)),
        1,
        ["worker_lost", "no_worker_name"],
    ),
    "by counters, one key for many sessions": (
        unnamed(counted("manual", vacant=168, occupied_hit=100, cap_respill=20)),
        1,
        ["shared_key", "no_worker_name"],
    ),
    "by counters, one key for all": (unnamed(KEY_FOR_ALL), 2, ["shared_key", "no_worker_name"]),
    "by counters, with failures": (unnamed(MANUAL, failed=30), 2, ["timeout", "no_worker_name"]),
    "by counters that others share": (
        unnamed(counted("manual", calls=300, vacant=180, occupied_hit=120)),
        2,
        ["other_calls", "no_worker_name"],
    ),
    "no names, no counters": (unnamed(None), 2, ["no_worker_name"]),
    "no names, no counters, no list of workers": (
        replace(unnamed(None), workers=None),
        2,
        ["workers_unknown", "no_worker_name"],
    ),
    "no counters, no list of workers": (
        replace(seen(counters=None), workers=None),
        2,
        ["workers_unknown"],
    ),
    "moved, with no counters and no list of workers": (
        replace(seen(arm("keyed", 40), counters=None), workers=None),
        1,
        ["policy", "workers_unknown"],
    ),
    "workers that are listed under another name": (replace(seen(), workers={"regular": 0}), 0, []),
    "one worker, which is listed under another name": (
        replace(seen(on_w0("keyed"), on_w0("control")), workers={"regular": 0}),
        2,
        ["one_worker"],
    ),
    "counters, but no list of workers": (replace(seen(), workers=None), 0, []),
    # A policy that routes by a key without counting it.
    "uncounted": (
        unnamed(replace(counted("consistent_hash"), workers={"a": 96, "b": 96, "c": 96})),
        2,
        ["uncounted", "no_worker_name"],
    ),
    "uncounted, all on one worker": (
        unnamed(replace(counted("consistent_hash"), workers={"a": 288})),
        1,
        ["wrong_header", "no_worker_name"],
    ),
    "uncounted, all on one worker, through a server": (
        unnamed(replace(counted("consistent_hash"), workers={"a": 288}), plan=THROUGH),
        1,
        ["wrong_header", "no_worker_name"],
    ),
    # Through a session server.
    "the server hides the worker": (
        unnamed(MANUAL, plan=THROUGH),
        2,
        ["whose_key", "no_worker_name"],
    ),
    "the server of an SMG hides the worker": (
        replace(unnamed(MANUAL, plan=THROUGH), load=GatewayLoad("smg")),
        2,
        ["whose_key", "worker_hidden"],
    ),
    "the server hides the worker, and changes the key": (
        unnamed(counted("manual", vacant=288), plan=THROUGH),
        1,
        ["key_changes", "no_worker_name"],
    ),
    "the server hides the worker, and has one key for all": (
        unnamed(KEY_FOR_ALL, plan=THROUGH),
        2,
        ["shared_key", "whose_key", "no_worker_name"],
    ),
    "the server hides the worker, and hashes": (
        unnamed(HASHING, plan=THROUGH),
        2,
        ["whose_key", "no_worker_name"],
    ),
    "the server does not send the key": (
        seen(arm("keyed", 40), counters=counted("manual", no_routing_id=288), plan=THROUGH),
        1,
        ["key_lost"],
    ),
    "the server calls another gateway": (
        seen(arm("keyed", 40), counters=Counters(), probe=NO_KEY, plan=THROUGH),
        1,
        ["key_lost"],
    ),
    "the server calls another gateway, and others this one": (
        seen(
            arm("keyed", 40),
            counters=counted("manual", calls=20, no_routing_id=20),
            plan=THROUGH,
        ),
        1,
        ["key_lost"],
    ),
    "the server calls another gateway, on which the key is at work": (
        seen(counters=Counters(), probe=NO_KEY, plan=THROUGH),
        2,
        ["other_gateway", "keys_unseen"],
    ),
    "the server calls another gateway, on which the key is at work, and others this one": (
        seen(counters=counted("manual", calls=20, no_routing_id=20), plan=THROUGH),
        2,
        ["replicas", "keys_unseen"],
    ),
    "the server hides the worker, and calls another gateway": (
        unnamed(Counters(), plan=THROUGH, probe=NO_KEY),
        1,
        ["key_lost", "no_worker_name"],
    ),
    "no key chose a worker, although only those of one session are kept": (
        seen(counters=IGNORED, plan=THROUGH),
        1,
        ["policy"],
    ),
    "through a server, by the metrics of another gateway": (
        seen(counters=Counters(), probe=Counters(), plan=THROUGH),
        2,
        ["other_gateway", "keys_unseen"],
    ),
    "through a server, without counters": (
        seen(counters=None, plan=THROUGH),
        2,
        ["keys_unseen"],
    ),
    "through a server": (seen(plan=THROUGH), 0, []),
    "through a server, one call at a time": (
        seen(plan=replace(THROUGH, concurrency=1)),
        0,
        ["one_connection"],
    ),
    "moved, through a server, one call at a time": (
        seen(arm("keyed", 40), plan=replace(THROUGH, concurrency=1), counters=IGNORED),
        1,
        ["policy"],
    ),
    "one call at a time, without a server": (seen(plan=replace(PLAN, concurrency=1)), 0, []),
    "through a server, and others call the gateway, too": (
        seen(counters=counted("manual", calls=900, vacant=60, occupied_hit=400), plan=THROUGH),
        2,
        ["other_calls", "keys_unseen"],
    ),
    "through a server, and others call the gateway with keys, even during the probe": (
        seen(
            counters=counted("manual", calls=900, vacant=60, occupied_hit=840),
            plan=THROUGH,
            probe=counted("manual", calls=40, occupied_hit=36, no_routing_id=4),
        ),
        2,
        ["other_calls", "keys_unseen"],
    ),
    "through a server, and others called the gateway with keys only during the probe": (
        seen(plan=THROUGH, probe=counted("manual", calls=40, occupied_hit=36, no_routing_id=4)),
        0,
        [],
    ),
    "hashed, and others called the gateway during the probe, perhaps without keys": (
        seen(
            plan=THROUGH,
            counters=HASHING,
            probe=counted("consistent_hashing", calls=40, routing_key_hit=40),
        ),
        2,
        ["any_key", "keys_unseen"],
    ),
    "any call has a key, which a proxy puts there": (
        seen(plan=THROUGH, probe=counted("manual", calls=4, occupied_hit=4)),
        2,
        ["any_key", "keys_unseen"],
    ),
    "through a server before two replicas": (
        seen(counters=counted("consistent_hashing", calls=144, routing_key_hit=144), plan=THROUGH),
        2,
        ["replicas", "keys_unseen"],
    ),
    "by counters, hashing, while a worker is left out": (
        replace(unnamed(HASHING), load=GatewayLoad("smg", True, 1, {"a": 0.95})),
        2,
        ["no_worker_name", "overloaded"],
    ),
    # Prefill and decode workers.
    "both kinds pinned": (
        pools("manual", "manual", {"manual": {"vacant": 336, "occupied_hit": 240}}),
        0,
        [],
    ),
    "both kinds pinned, by two policies": (
        pools(
            "consistent_hashing",
            "manual",
            {
                "manual": {"vacant": 168, "occupied_hit": 120},
                "consistent_hashing": {"routing_key_hit": 288},
            },
        ),
        0,
        [],
    ),
    "both kinds pinned, as many as are enough": (
        pools("manual", "manual", {"manual": {"vacant": 337, "occupied_hit": 239}}),
        0,
        [],
    ),
    "both kinds pinned, but one of them not enough": (
        pools("manual", "manual", {"manual": {"vacant": 338, "occupied_hit": 238}}),
        2,
        ["pinned_again"],
    ),
    "both kinds pinned, but one key for two sessions": (
        pools("manual", "manual", {"manual": {"vacant": 334, "occupied_hit": 242}}),
        2,
        ["shared_key"],
    ),
    "prefill not pinned": (
        pools("round_robin", "manual", {"manual": {"vacant": 168, "occupied_hit": 120}}),
        1,
        ["prefill_policy"],
    ),
    "decode not pinned": (
        pools("manual", "round_robin", {"manual": {"vacant": 168, "occupied_hit": 120}}),
        1,
        ["decode_policy"],
    ),
    "neither kind pinned": (pools("random", "round_robin", {}), 1, ["policy"]),
    "prefill workers that have no counters": (
        replace(
            pools("manual", "manual", {}),
            counters=None,
        ),
        2,
        ["prefill_unknown"],
    ),
    "prefill workers, and one decode worker": (
        replace(
            pools("manual", "random", {"manual": {"vacant": 168, "occupied_hit": 120}}),
            workers={"prefill": 3, "decode": 1},
        ),
        0,
        [],
    ),
    "one worker": (
        replace(
            seen(),
            workers={"regular": 1},
            turns=tuple(replace(turn, worker=turn.worker and "http://w0") for turn in seen().turns),
        ),
        2,
        ["one_worker"],
    ),
    # Overload protection.
    "overloaded": (
        replace(
            seen(arm("keyed", 40), counters=counted("manual", no_healthy_workers=288)),
            load=GatewayLoad("smg", True, 3, {"a": 0.95}),
        ),
        1,
        ["overloaded"],
    ),
    "overloaded, by a gateway told so": (
        replace(
            seen(arm("keyed", 40), counters=counted("manual", no_healthy_workers=288)),
            load=GatewayLoad("smg", False, 3, {"a": 0.95}),
        ),
        1,
        ["overloaded"],
    ),
    "one worker overloaded": (
        replace(seen(), load=GatewayLoad("smg", True, 1, {"a": 0.95, "b": 0.1})),
        0,
        ["overloaded"],
    ),
    "no healthy workers": (
        seen(arm("keyed", 40), counters=counted("manual", no_healthy_workers=288)),
        1,
        ["no_healthy_workers"],
    ),
    "who knows whether workers are protected": (
        replace(seen(), load=GatewayLoad("smg", True, 0, {"a": 0.1})),
        0,
        ["overload_protection"],
    ),
    "workers are not protected": (
        replace(seen(), load=GatewayLoad("smg", True, 0, {"a": 0.95})),
        0,
        [],
    ),
    "no cached tokens": (seen(arm("keyed", LATER, cached=None)), 0, ["no_cached_tokens"]),
    "cold caches": (seen(arm("keyed", LATER, cached=10)), 0, ["cold_cache"]),
    "long keys": (seen(plan=replace(PLAN, session_id="{n}-{run}" + "x" * 128)), 0, ["bad_key"]),
    "odd keys": (seen(plan=replace(PLAN, session_id="séance {n} {run}")), 0, ["bad_key"]),
    "keys with a tail": (
        seen(plan=replace(PLAN, session_id="task-{run}-{n}_r2")),
        0,
        ["key_tail"],
    ),
    # Too little evidence.
    "nothing but first turns": (
        seen([turn for turn in arm("keyed", LATER) if turn.number == 1], counters=None),
        2,
        ["too_few_turns", "no_cached_tokens"],
    ),
    "too few turns were asked for": (
        seen(
            [turn for turn in arm("keyed", LATER) if turn.session == 1 or turn.session == 2][:10],
            [turn for turn in arm("control", 0) if turn.session < 3],
            plan=replace(PLAN, sessions=2),
        ),
        2,
        ["too_few_turns"],
    ),
    "half of the turns": (
        seen([turn for turn in arm("keyed", LATER) if turn.session <= 12], counters=None),
        0,
        [],
    ),
    "less than half of the turns": (
        replace(
            seen([turn for turn in arm("keyed", LATER) if turn.session <= 11], counters=None),
            stopped="time_limit",
        ),
        2,
        ["time_limit"],
    ),
    "no difference to chance": (
        seen(
            [turn for turn in arm("keyed", LATER) if turn.session < 3],
            [turn for turn in arm("control", 3) if turn.session < 3],
            None,
            replace(PLAN, sessions=2, turns=6),
        ),
        0,
        [],
    ),
    "enough turns, but too few to rule out chance": (
        seen(
            [turn for turn in arm("keyed", LATER) if turn.session < 3],
            [
                replace(turn, outcome="kept") if turn.number in (2, 3) else turn
                for turn in arm("control", 0)
                if turn.session < 3
            ],
            None,
            replace(PLAN, sessions=2),
        ),
        2,
        ["too_few_turns"],
    ),
    "out of time": (replace(seen(), stopped="time_limit"), 0, ["time_limit"]),
    "all on one worker": (on_one_worker(MANUAL), 0, ["one_sided"]),
}


@pytest.mark.parametrize(("what", "status", "causes"), CASES.values(), ids=CASES)
def test_verdict_and_causes(what: Seen, status: int, causes: list[str]) -> None:
    verdict = judge(what, 0.99)
    assert (verdict.exit_status, [cause.name for cause in verdict.causes]) == (status, causes)
    assert verdict.sentence.endswith(".")
    assert all(cause.text and cause.advice for cause in verdict.causes)


@pytest.mark.parametrize(
    "what",
    [
        *("kept by who knows what", "any call counts as one with a key"),
        "key at work although both are kept, through a server",
    ],
)
def test_turns_that_stayed_without_a_proof_are_said_to_have_none(what: str) -> None:
    sentence = judge(CASES[what][0], 0.99).sentence
    assert sentence.endswith("; but nothing shows that the key did it.")


@pytest.mark.parametrize("what", [what for what, (_, status, _) in CASES.items() if status == 0])
def test_pinned_has_no_but(what: str) -> None:
    assert "; but" not in judge(CASES[what][0], 0.99).sentence


@pytest.mark.parametrize(
    ("reached", "workers", "keys"), [(15, 16, 168), (11, 16, 48), (1, 3, 8), (513, 1030, 2000)]
)
def test_few_workers_for_many_keys_are_no_accident(reached: int, workers: int, keys: int) -> None:
    assert beyond_chance(reached, workers, keys)
    assert not beyond_chance(reached, workers, keys // 2)


@pytest.mark.parametrize(("reached", "workers"), [(0, 3), (3, 3), (1, 1), (4, 3), (0, 0)])
def test_it_is_no_finding_if_all_workers_or_none_are_reached(reached: int, workers: int) -> None:
    assert not beyond_chance(reached, workers, 10_000)


def test_any_number_of_keys_is_judged() -> None:
    assert beyond_chance(1, 2, 10**400)


def test_keys_that_are_spread_by_chance_seldom_look_as_if_they_were_not() -> None:
    random = Random(1)
    found = sum(
        beyond_chance(len({random.randrange(16) for _ in range(48)}), 16, 48) for _ in range(1000)
    )
    assert found < 5  # one of them in a thousand


@pytest.mark.parametrize(
    ("what", "name", "words"),
    [
        ("kept by who knows what", "same_without_key", "--metrics URL"),
        ("kept by who knows what, and others call it, too", "same_without_key", "nothing else"),
        ("any call counts as one with a key", "same_without_key", "see the cause before"),
        ("key at work although both are kept, through a server", "same_without_key", "--through"),
        ("one key for all sessions", "shared_key", "only 1 of 168 sessions apart"),
        ("one key for two sessions", "shared_key", "only 167 of 168 sessions apart"),
        ("one key for all sessions, hashed", "shared_key", "only 1 of 168 sessions apart"),
        ("one key for all sessions, hashed", "shared_key", "apart: they share a key"),
        ("hashed to one of five workers by SMG 1.10", "shared_key", "unless its hash ring lacks"),
        ("hashed, and some workers get no session", "left_out", "168 sessions came to 3 of 5"),
        ("ids that the override takes for one", "shared_key", "no new key"),
        ("the server calls another gateway", "key_lost", "does it call another host"),
        ("through a server, without counters", "keys_unseen", "--metrics URL"),
        (
            *("through a server, and others call the gateway, too", "keys_unseen"),
            "Run it when nothing else calls the gateway",
        ),
        ("through a server before two replicas", "keys_unseen", "without --through first"),
        (
            *("the server calls another gateway, on which the key is at work", "other_gateway"),
            "that the session server calls with --metrics URL",
        ),
        ("the server does not send the key", "key_lost", "does it call another host"),
        ("some keys lost", "key_lost", "--header NAME"),
        ("overloaded", "overloaded", "--disable-worker-overload-protection"),
        ("overloaded, by a gateway told so", "overloaded", "without the options that limit"),
        ("prefill not pinned", "prefill_policy", "--prefill-policy manual"),
        ("decode not pinned", "decode_policy", "--decode-policy manual"),
    ],
)
def test_advice_fits_what_was_seen(what: str, name: str, words: str) -> None:
    causes = {cause.name: cause for cause in judge(CASES[what][0], 0.99).causes}
    assert words in causes[name].text + causes[name].advice


@pytest.mark.parametrize(
    ("kind", "policies"),
    [
        ("smg", "manual or consistent_hashing"),
        ("sglang-router", "manual"),
        ("vllm-router", "consistent_hash"),
        (None, "manual"),
    ],
)
def test_a_pool_that_is_not_pinned_is_told_the_policies_of_its_gateway(
    kind: Literal["smg", "sglang-router", "vllm-router"] | None, policies: str
) -> None:
    causes = judge(replace(CASES["prefill not pinned"][0], load=GatewayLoad(kind)), 0.99).causes
    [cause] = [cause for cause in causes if cause.name == "prefill_policy"]
    assert cause.advice.endswith(f"--prefill-policy {policies}.")


SMG_ONLY = (
    *("consistent_hashing", "--routing-key-override", "--disable-worker-overload-protection"),
    "SMG 1.13",
)


@pytest.mark.parametrize(
    ("what", "is_told"), [("replicas", True), ("through a server before two replicas", False)]
)
def test_only_replicas_that_do_not_hash_the_keys_are_told_to(what: str, is_told: bool) -> None:
    cause = judge(replace(CASES[what][0], load=GatewayLoad("smg")), 0.99).causes[0]
    assert cause.name == "replicas"
    assert ("--policy consistent_hashing" in cause.advice) == is_told


@pytest.mark.parametrize("kind", ["sglang-router", "vllm-router"])
@pytest.mark.parametrize("what", CASES)
def test_advice_names_no_flag_that_the_gateway_rejects(
    what: str, kind: Literal["sglang-router", "vllm-router"]
) -> None:
    only_there = ("hash", "prefix", "override", "overload", "protected", "tail")
    if any(word in what for word in only_there) or "policies" in what or "any call" in what:
        return  # these gateways have no such state
    seen_there = replace(CASES[what][0], load=GatewayLoad(kind))
    rejected = [*SMG_ONLY, *(["policy manual"] if kind == "vllm-router" else [])]
    for cause in judge(seen_there, 0.99).causes:
        assert not any(flag in cause.advice for flag in rejected), cause


@pytest.mark.parametrize("what", CASES)
def test_nothing_is_said_of_where_turns_went_where_nobody_names_a_worker(what: str) -> None:
    run = CASES[what][0]
    if any(turn.worker for turn in run.turns):
        return
    verdict = judge(run, 0.99)
    assert "stayed" not in verdict.sentence
    assert "moved" not in verdict.sentence
    assert "kept" not in verdict.sentence


@pytest.mark.parametrize(("size", "said"), [(128, []), (129, ["129 bytes long"])])
def test_key_of_128_bytes_is_the_longest(size: int, said: list[str]) -> None:
    verdict = judge(
        seen(plan=replace(PLAN, sessions=9, session_id="{run}" + "x" * (size - 3) + "{n}")), 0.99
    )
    texts = [cause.text for cause in verdict.causes if cause.name == "bad_key"]
    assert [phrase for phrase in said if phrase in " ".join(texts)] == said
    assert len(texts) == len(said)


def test_every_cause_is_in_the_docs() -> None:
    files = (ROOT / "aiohttp_smg_routing/verify").glob("*.py")
    source = "".join(file.read_text("utf-8") for file in files)
    names = set(re.findall(r'Cause\(\s*"(\w+)"', source)) | {"prefill_policy", "decode_policy"}
    rows = re.findall(r"(?m)^\| (`.*?) \|", (ROOT / "docs/verify.md").read_text("utf-8"))
    assert len(names) > 20
    assert names <= set(re.findall(r"`(\w+)`", " ".join(rows)))


@pytest.mark.parametrize(
    ("failure", "models", "name", "words"),
    [
        (Failure("refused", GATEWAY, text="no route"), None, "refused", "(no route)"),
        (Failure("timeout", GATEWAY), None, "timeout", "--timeout"),
        (Failure("broken", GATEWAY, text="[DONE]"), None, "broken", "no complete answer"),
        (Failure("status", GATEWAY, 401), None, "http_401", "SMG_API_KEY"),
        (Failure("status", GATEWAY, 403), None, "http_403", "SMG_API_KEY"),
        (Failure("status", GATEWAY, 404), ("m",), "http_404", "Check the URL"),
        (Failure("status", GATEWAY, 404), None, "http_404", "Check the URL"),
        (Failure("status", GATEWAY, 404, "no model m"), None, "unknown_model", "GET /workers"),
        (Failure("status", GATEWAY, 404), ("a", "b"), "unknown_model", "--model: a, b."),
        (Failure("status", GATEWAY, 400), ("a", "b"), "unknown_model", "--model: a, b."),
        (Failure("status", GATEWAY, 404), (), "unknown_model", "GET /workers"),
        (Failure("status", GATEWAY / "v1/v1/x", 404), ("m",), "http_404", "Leave /v1 out"),
        (Failure("status", GATEWAY, 405), ("m",), "http_405", "Check the URL"),
        (Failure("status", GATEWAY, 503), ("m",), "http_503", "GET /workers"),
        *(
            (Failure("status", GATEWAY, status), ("m",), f"http_{status}", "no redirect")
            for status in (300, 301, 302, 303, 307, 308)
        ),
        (Failure("status", GATEWAY, 304), ("m",), "http_304", "log of the gateway"),
        (Failure("status", GATEWAY, 500), ("m",), "http_500", "log of the gateway"),
    ],
)
def test_failure_is_explained(
    failure: Failure, models: tuple[str, ...] | None, name: str, words: str
) -> None:
    turn = Turn("keyed", 1, 1, "failed", failure=failure)
    verdict = judge(Seen(PLAN, (turn, turn), 2, models=models, stopped="failures"), 0.99)
    assert verdict.exit_status == 2
    assert [cause.name for cause in verdict.causes] == [name, "gave_up"]
    assert words in verdict.causes[0].text + verdict.causes[0].advice
    assert ("(" in verdict.causes[0].text) == bool(failure.text)  # what the server said


@pytest.mark.parametrize(
    ("status", "shown"), [(404, "/a/b answers"), (405, "/a/b answers"), (406, "answers")]
)
def test_a_status_that_may_be_of_a_wrong_path_shows_the_path(status: int, shown: str) -> None:
    turn = Turn("keyed", 1, 1, "failed", failure=Failure("status", GATEWAY / "a/b", status))
    [cause] = judge(Seen(PLAN, (turn,), 1, models=("m",)), 0.99).causes
    assert shown in cause.text
    assert ("/a/b" in cause.text) == ("/a/b" in shown)


def test_gateway_that_calls_its_model_unknown_wants_its_name() -> None:
    turn = Turn("keyed", 1, 1, "failed", failure=Failure("status", GATEWAY, 404))
    run = Seen(replace(PLAN, model="unknown"), (turn,), 1, models=("unknown",))
    [cause] = judge(run, 0.99).causes
    assert cause.name == "unknown_model"
    assert "--model" in cause.advice
    [cause] = judge(replace(run, plan=replace(THROUGH, model="unknown")), 0.99).causes
    assert cause.name == "http_404"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("smg", "--assignment-mode min_group."),
        ("sglang-router", "min_group (0.3.2 and newer)"),
        ("vllm-router", "whether the gateway routes on this header"),
    ],
)
def test_sessions_are_spread_by_what_the_gateway_has(
    kind: Literal["smg", "sglang-router", "vllm-router"], words: str
) -> None:
    verdict = judge(replace(on_one_worker(MANUAL), load=GatewayLoad(kind)), 0.99)
    [cause] = [cause for cause in verdict.causes if cause.name == "one_sided"]
    assert words in cause.advice


def test_each_kind_of_failure_is_explained_once() -> None:
    texts = ("one", "two", "two")
    turns = tuple(
        Turn("keyed", 1, number, "failed", failure=Failure("status", GATEWAY, 500, text))
        for number, text in enumerate(texts, 1)
    )
    causes = judge(Seen(PLAN, turns, 3), 0.99).causes
    assert [cause.text for cause in causes] == ["http://10.0.0.1:30000 answers 500 (two)."]


def test_counters_that_could_not_be_read_are_said_to_be_so() -> None:
    verdict = judge(replace(seen(counters=None), no_counters="refused"), 0.99)
    assert verdict.exit_status == 0
    assert verdict.causes == (
        Cause(
            "no_counters",
            "The gateway's counters could not be read at http://10.0.0.1:29000/metrics: refused.",
            "Give the address of its metrics with --metrics URL (the gateway's --prometheus-port).",
        ),
    )


@pytest.mark.parametrize(("min_kept", "status"), [(1.0, 1), (119 / 120, 0), (0.99, 0), (0.5, 0)])
def test_min_kept_sets_the_bar(min_kept: float, status: int) -> None:
    assert judge(seen(arm("keyed", LATER - 1)), min_kept).exit_status == status
    assert judge(seen(arm("keyed", 66)), 0.55).exit_status == 0  # 0.55 * 120 > 66 in floats


def test_figures_of_an_arm_that_saw_nothing() -> None:
    for name in ARMS:
        summary = summarise((), name)
        assert (summary.answered, summary.later, summary.kept_share) == (0, 0, None)
        assert summary.cached_share is summary.first_token_p50 is summary.first_token_p95 is None


def test_percentiles_are_of_the_later_turns() -> None:
    turns = [
        Turn("keyed", 1, number, "kept" if number > 1 else "first", first_token_seconds=number)
        for number in range(1, 13)
    ]
    summary = summarise(turns, "keyed")
    assert summary.first_token_p50 == 7
    assert summary.first_token_p95 == pytest.approx(11.5)
    assert summarise(turns[:2], "keyed").first_token_p95 == 2


def test_later_turns_are_those_after_the_first_answer_of_their_session() -> None:
    outcomes: dict[int, tuple[Outcome, ...]] = {
        1: ("first", "kept", "failed"),
        2: ("failed", "first", "kept"),
        3: ("failed", "failed", "failed"),
    }
    turns = [
        Turn("keyed", session, number, outcome)
        for session, row in outcomes.items()
        for number, outcome in enumerate(row, 1)
    ]
    assert summarise(turns, "keyed").later == 2 + 1 + 2
