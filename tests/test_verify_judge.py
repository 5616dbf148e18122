"""Every verdict and every cause, from what was seen."""

from dataclasses import replace
from random import Random

import pytest
from yarl import URL

from aiohttp_smg_routing.verify.causes import Cause
from aiohttp_smg_routing.verify.judge import judge
from aiohttp_smg_routing.verify.seen import (
    ARMS,
    Counters,
    Failure,
    Outcome,
    Plan,
    Seen,
    Turn,
    summarise,
)

GATEWAY = URL("http://10.0.0.1:30000")
PLAN = Plan(GATEWAY, URL("http://10.0.0.1:29000/metrics"), model="m", run="r")
SESSIONS, TURNS = 24, 6
LATER = SESSIONS * (TURNS - 1)
MANUAL = Counters({"vacant": 24, "occupied_hit": 120, "no_routing_id": 144}, {"manual": 288})
HASHING = Counters({"routing_key_hit": 144, "random_fallback": 144}, {"consistent_hashing": 288})
IGNORED = Counters({}, {"round_robin": 288})


def arm(
    name: str, kept: int, outcome: Outcome = "moved", *, named: bool = True, cached: int | None = 90
) -> list[Turn]:
    """Return 24 sessions of 6 turns; of the later ones ``kept`` were kept, the others not."""
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
                "keyed" if name == "keyed" else "unkeyed",
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
    unkeyed: list[Turn] | None = None,
    counters: Counters | None = MANUAL,
    plan: Plan = PLAN,
) -> Seen:
    keyed = arm("keyed", LATER) if keyed is None else keyed
    unkeyed = arm("unkeyed", 40) if unkeyed is None else unkeyed
    turns = tuple(keyed + unkeyed)
    return Seen(plan, turns, len(turns), models=("m",), workers=3, counters=counters)


def unnamed(counters: Counters | None, failed: int = 0) -> Seen:
    return seen(
        arm("keyed", LATER - failed, "failed", named=False),
        arm("unkeyed", 40, named=False),
        counters,
    )


CASES = {
    "pinned": (seen(), 0, []),
    "pinned by consistent_hashing": (seen(counters=HASHING), 0, []),
    "pinned, without counters": (seen(counters=None), 0, []),
    "pinned, one move below the bar": (seen(arm("keyed", LATER - 1)), 0, []),
    "pinned though one turn failed": (seen(arm("keyed", LATER - 1, "failed")), 0, ["timeout"]),
    "moved twice": (seen(arm("keyed", LATER - 2), counters=None), 1, ["pins_lost"]),
    "failed too often": (seen(arm("keyed", LATER - 2, "failed")), 2, ["timeout"]),
    "unknown too often": (seen(arm("keyed", LATER - 2, "unknown")), 2, []),
    "ignored": (seen(arm("keyed", 40), counters=IGNORED), 1, ["policy"]),
    "ignored, without counters": (seen(arm("keyed", 40), counters=None), 1, ["policy"]),
    "kept by another policy": (
        seen(unkeyed=arm("unkeyed", LATER), counters=IGNORED),
        1,
        ["policy"],
    ),
    "kept by who knows what": (
        seen(unkeyed=arm("unkeyed", LATER), counters=None),
        2,
        ["same_without_key"],
    ),
    "key at work although both are kept": (seen(unkeyed=arm("unkeyed", LATER)), 0, []),
    "no word from the arm without the key": (
        seen(unkeyed=arm("unkeyed", 0, named=False), counters=None),
        2,
        [],
    ),
    "some keys lost": (
        seen(
            arm("keyed", 80),
            counters=Counters({"occupied_hit": 50, "no_routing_id": 238}, {"manual": 288}),
        ),
        1,
        ["key_lost"],
    ),
    "some keys not counted, yet all kept": (
        seen(counters=Counters({"occupied_hit": 50, "no_routing_id": 238}, {"manual": 288})),
        0,
        [],
    ),
    "replicas": (
        seen(
            arm("keyed", 80),
            counters=Counters({"vacant": 24, "no_routing_id": 72}, {"manual": 144}),
        ),
        1,
        ["replicas"],
    ),
    "metrics of another gateway": (
        seen(arm("keyed", 40), counters=Counters({}, {})),
        1,
        ["other_gateway"],
    ),
    "pinned again and again": (
        seen(
            arm("keyed", 100),
            counters=replace(MANUAL, branches={"vacant": 44, "occupied_hit": 100}),
        ),
        1,
        ["pinned_again"],
    ),
    "a worker was lost": (
        seen(
            arm("keyed", 100),
            counters=replace(
                MANUAL, branches={"vacant": 24, "occupied_hit": 100, "occupied_miss": 20}
            ),
        ),
        1,
        ["worker_lost"],
    ),
    "one key for many sessions": (
        seen(
            arm("keyed", 100),
            counters=replace(
                MANUAL, branches={"vacant": 1, "occupied_hit": 100, "cap_respill": 43}
            ),
        ),
        1,
        ["shared_key"],
    ),
    "kept by who knows what, and others call it, too": (
        seen(
            unkeyed=arm("unkeyed", LATER),
            counters=Counters({"occupied_hit": 400}, {"cache_aware": 900}),
        ),
        2,
        ["other_calls", "same_without_key"],
    ),
    "pinned although others call it, too": (
        seen(counters=Counters({"vacant": 60, "occupied_hit": 400}, {"manual": 900})),
        0,
        [],
    ),
    "others call it, too": (
        seen(arm("keyed", 40), counters=Counters({}, {"random": 300})),
        1,
        ["policy", "other_calls"],
    ),
    "by counters": (unnamed(MANUAL), 0, ["no_worker_name"]),
    "by counters, with prefill and decode workers": (
        unnamed(
            Counters(
                {"vacant": 48, "occupied_hit": 240, "no_routing_id": 288}, {"manual": 576}, pools=2
            )
        ),
        0,
        ["no_worker_name"],
    ),
    "by counters, hashing": (unnamed(HASHING), 0, ["no_worker_name"]),
    "by counters, ignored": (unnamed(IGNORED), 1, ["policy", "no_worker_name"]),
    "by counters, pinned again": (
        unnamed(replace(MANUAL, branches={"vacant": 44, "occupied_hit": 100})),
        1,
        ["pinned_again", "no_worker_name"],
    ),
    "by counters, with failures": (
        unnamed(MANUAL, failed=30),
        2,
        ["timeout", "no_worker_name"],
    ),
    "by counters that others share": (
        unnamed(replace(MANUAL, selections={"manual": 300})),
        2,
        ["other_calls", "no_worker_name"],
    ),
    "no names, no counters": (unnamed(None), 2, ["no_worker_name"]),
    "one worker": (
        replace(
            seen(),
            workers=1,
            turns=tuple(replace(turn, worker=turn.worker and "http://w0") for turn in seen().turns),
        ),
        2,
        ["one_worker"],
    ),
    "no cached tokens": (seen(arm("keyed", LATER, cached=None)), 0, ["no_cached_tokens"]),
    "cold caches": (seen(arm("keyed", LATER, cached=10)), 0, ["cold_cache"]),
    "the session server hides the worker": (
        seen(
            arm("keyed", LATER, named=False),
            plan=replace(PLAN, through="http://s/sessions/{session_id}"),
        ),
        0,
        ["worker_hidden"],
    ),
    "the session server does not send the key": (
        seen(
            arm("keyed", 40),
            counters=Counters({"no_routing_id": 288}, {"manual": 288}),
            plan=replace(PLAN, through="http://s/sessions/{session_id}"),
        ),
        1,
        ["key_lost"],
    ),
    "long keys": (seen(plan=replace(PLAN, session_id="{n}" + "x" * 128)), 0, ["bad_key"]),
    "odd keys": (seen(plan=replace(PLAN, session_id="séance {n}")), 0, ["bad_key"]),
    "keys with a tail": (seen(plan=replace(PLAN, session_id="task-{n}_r2")), 0, ["key_tail"]),
    "nothing but first turns": (
        seen([turn for turn in arm("keyed", LATER) if turn.number == 1], counters=None),
        2,
        ["no_cached_tokens"],
    ),
    "too little": (
        seen(
            [turn for turn in arm("keyed", LATER) if turn.session < 2],
            [turn for turn in arm("unkeyed", 0) if turn.session < 2],
            None,
        ),
        2,
        ["too_few_turns"],
    ),
    "out of time": (replace(seen(), stopped="time_limit"), 0, ["time_limit"]),
    "all on one worker": (
        replace(
            seen(
                [replace(turn, worker="http://w0") for turn in arm("keyed", LATER)],
            ),
        ),
        0,
        ["one_sided"],
    ),
}


@pytest.mark.parametrize(("what", "status", "causes"), CASES.values(), ids=CASES)
def test_verdict_and_causes(what: Seen, status: int, causes: list[str]) -> None:
    verdict = judge(what, 0.99)
    assert (verdict.exit_status, [cause.name for cause in verdict.causes]) == (status, causes)
    assert verdict.sentence.endswith(".")
    assert all(cause.text and cause.advice for cause in verdict.causes)


@pytest.mark.parametrize(
    ("failure", "models", "name", "words"),
    [
        (Failure("refused", GATEWAY, text="no route"), None, "refused", "(no route)"),
        (Failure("timeout", GATEWAY), None, "timeout", "--timeout"),
        (Failure("broken", GATEWAY, text="[DONE]"), None, "broken", "no whole answer"),
        (Failure("status", GATEWAY, 401), None, "http_401", "SMG_API_KEY"),
        (Failure("status", GATEWAY, 403), None, "http_403", "SMG_API_KEY"),
        (Failure("status", GATEWAY, 404), ("m",), "http_404", "Check the URL"),
        (Failure("status", GATEWAY, 404), None, "http_404", "Check the URL"),
        (Failure("status", GATEWAY, 404, "no model m"), None, "unknown_model", "GET /workers"),
        (Failure("status", GATEWAY, 404), ("a", "b"), "unknown_model", "--model: a, b."),
        (Failure("status", GATEWAY, 400), ("a", "b"), "unknown_model", "--model: a, b."),
        (Failure("status", GATEWAY, 404), (), "unknown_model", "GET /workers"),
        (Failure("status", GATEWAY, 503), ("m",), "http_503", "GET /workers"),
        (Failure("status", GATEWAY, 307), ("m",), "http_307", "no redirect"),
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


@pytest.mark.parametrize(("min_kept", "status"), [(1.0, 1), (0.99, 0), (0.5, 0)])
def test_min_kept_sets_the_bar(min_kept: float, status: int) -> None:
    assert judge(seen(arm("keyed", LATER - 1)), min_kept).exit_status == status


def test_figures_of_an_arm_that_saw_nothing() -> None:
    for name in ARMS:
        summary = summarise((), name)
        assert (summary.answered, summary.later, summary.kept_share) == (0, 0, 0.0)
        assert summary.cached_share is summary.first_token_p50 is summary.first_token_p95 is None


def test_percentiles_are_of_the_later_turns() -> None:
    turns = [
        Turn("keyed", 1, number, "kept", first_token_seconds=float(number)) for number in range(12)
    ]
    summary = summarise(turns, "keyed")
    assert summary.first_token_p50 == 6.5
    assert summary.first_token_p95 == pytest.approx(10.55)
    assert summarise(turns[:3], "keyed").first_token_p95 == 2.0
