"""Every verdict and every cause, from what was seen."""

import re
from dataclasses import replace
from pathlib import Path
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
ANY_KEY = Counters({"routing_key_hit": 288}, {"consistent_hashing": 288})
KEY_FOR_ALL = Counters({"vacant": 1, "occupied_hit": 143, "no_routing_id": 144}, {"manual": 288})
PREFIX = Counters({}, {"prefix_hash": 288})
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


def failed(turns: list[Turn], number: int, sessions: int) -> list[Turn]:
    """Return ``turns``, those of the first ``sessions`` up to ``number`` as failures."""

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
    "any call counts as one with a key": (
        seen(unkeyed=arm("unkeyed", LATER), counters=ANY_KEY),
        2,
        ["any_key", "same_without_key"],
    ),
    "any call counts as one with a key, yet only ours are kept": (seen(counters=ANY_KEY), 0, []),
    "any call counts as one with a key, and those without ours share a worker": (
        seen(unkeyed=on_w0("unkeyed"), counters=ANY_KEY),
        0,
        [],
    ),
    "any call counts as one with a key, and a session server has another one": (
        seen(
            unkeyed=on_w0("unkeyed"),
            counters=ANY_KEY,
            plan=replace(PLAN, through="http://s/sessions/{session_id}"),
        ),
        2,
        ["any_key", "same_without_key"],
    ),
    "any call counts as one with a key, and all share a worker": (
        seen(on_w0("keyed"), on_w0("unkeyed"), ANY_KEY),
        2,
        ["any_key", "same_without_key", "one_sided"],
    ),
    "those without the key share a worker, and no counters say why": (
        seen(unkeyed=on_w0("unkeyed"), counters=None),
        2,
        ["same_without_key"],
    ),
    "hashed, yet scattered": (seen(arm("keyed", 40), counters=HASHING), 1, ["worker_lost"]),
    "some keys hashed": (
        seen(
            arm("keyed", 80),
            counters=Counters(
                {"routing_key_hit": 50, "random_fallback": 238}, {"consistent_hashing": 288}
            ),
        ),
        1,
        ["key_lost"],
    ),
    "by counters in which any call counts": (unnamed(ANY_KEY), 2, ["any_key", "no_worker_name"]),
    "pinned by prefix_hash": (seen(counters=PREFIX), 0, []),
    "kept by prefix_hash, who knows by what": (
        seen(unkeyed=arm("unkeyed", LATER), counters=PREFIX),
        2,
        ["prefix_hash", "same_without_key"],
    ),
    "prefix_hash without the key": (seen(arm("keyed", 40), counters=PREFIX), 1, ["prefix_hash"]),
    "by counters that prefix_hash has none of": (
        unnamed(PREFIX),
        2,
        ["prefix_hash", "no_worker_name"],
    ),
    "pinned by prefix_hash that honours the key": (
        seen(
            unkeyed=arm("unkeyed", LATER),
            counters=Counters({"vacant": 24, "occupied_hit": 120}, {"prefix_hash": 288}),
        ),
        0,
        [],
    ),
    "one key for all sessions": (on_one_worker(KEY_FOR_ALL), 2, ["shared_key", "one_sided"]),
    "one key for all sessions, kept without it as well": (
        seen(unkeyed=arm("unkeyed", LATER), counters=KEY_FOR_ALL),
        2,
        ["shared_key", "same_without_key"],
    ),
    "one key for two sessions": (
        seen(counters=replace(MANUAL, branches={"vacant": 23, "occupied_hit": 121})),
        2,
        ["shared_key"],
    ),
    "ids that an earlier run has pinned": (
        seen(counters=KEY_FOR_ALL, plan=replace(PLAN, session_id="task-{n}")),
        0,
        [],
    ),
    "one key for all sessions, hashed": (on_one_worker(HASHING), 2, ["shared_key", "one_sided"]),
    "few sessions, hashed to one worker": (
        seen(
            [turn for turn in arm("keyed", LATER) if turn.session in (3, 6)],
            [turn for turn in arm("unkeyed", 40) if turn.session < 3],
            Counters({"routing_key_hit": 12, "random_fallback": 12}, {"consistent_hashing": 24}),
        ),
        0,
        [],
    ),
    "one key for all sessions, without counters": (on_one_worker(None), 0, ["one_sided"]),
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
    "by counters, first turns that failed": (
        seen(failed(arm("keyed", LATER, named=False), 1, 2), arm("unkeyed", 40, named=False)),
        0,
        ["timeout", "no_worker_name"],
    ),
    "by counters, sessions that only failed and were pinned": (
        seen(
            [
                replace(turn, outcome="failed", failure=Failure("timeout", GATEWAY))
                if turn.session > 21
                else turn
                for turn in arm("keyed", LATER, named=False)
            ],
            arm("unkeyed", 40, named=False),
        ),
        2,
        ["timeout", "no_worker_name"],
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
    "a worker was lost, and the gateway tried again": (
        seen(
            arm("keyed", 100),
            counters=Counters(
                {"routing_key_hit": 150, "random_fallback": 148}, {"consistent_hashing": 298}
            ),
        ),
        1,
        ["other_calls", "worker_lost"],
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
    "pinned, by the metrics of another gateway that is busy": (
        seen(counters=Counters({}, {"random": 300})),
        0,
        ["other_calls"],
    ),
    "kept by who knows what, by the metrics of another gateway": (
        seen(unkeyed=arm("unkeyed", LATER), counters=Counters({}, {"random": 300})),
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
    "by counters, a worker was lost": (
        unnamed(replace(MANUAL, branches={"vacant": 24, "occupied_hit": 100, "occupied_miss": 20})),
        1,
        ["worker_lost", "no_worker_name"],
    ),
    "by counters, one key for many sessions": (
        unnamed(replace(MANUAL, branches={"vacant": 24, "occupied_hit": 100, "cap_respill": 20})),
        1,
        ["shared_key", "no_worker_name"],
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
    "all on one worker": (on_one_worker(MANUAL), 0, ["one_sided"]),
}


@pytest.mark.parametrize(("what", "status", "causes"), CASES.values(), ids=CASES)
def test_verdict_and_causes(what: Seen, status: int, causes: list[str]) -> None:
    verdict = judge(what, 0.99)
    assert (verdict.exit_status, [cause.name for cause in verdict.causes]) == (status, causes)
    assert verdict.sentence.endswith(".")
    assert all(cause.text and cause.advice for cause in verdict.causes)


@pytest.mark.parametrize(
    ("what", "name", "words"),
    [
        ("kept by who knows what", "same_without_key", "--metrics URL"),
        ("kept by who knows what, and others call it, too", "same_without_key", "nothing else"),
        ("any call counts as one with a key", "same_without_key", "see the cause before"),
        ("a worker was lost, and the gateway tried again", "other_calls", "its own retries"),
        ("one key for all sessions", "shared_key", "only 1 of 24 sessions apart"),
        ("one key for two sessions", "shared_key", "only 23 of 24 sessions apart"),
        ("one key for all sessions, hashed", "shared_key", "only 1 of 24 sessions apart"),
    ],
)
def test_advice_fits_what_was_seen(what: str, name: str, words: str) -> None:
    causes = {cause.name: cause for cause in judge(CASES[what][0], 0.99).causes}
    assert words in causes[name].text + causes[name].advice


def test_every_cause_is_in_the_docs() -> None:
    root = Path(__file__).parents[2]
    source = (root / "aiohttp_smg_routing/verify/causes.py").read_text("utf-8")
    names = set(re.findall(r'Cause\(\s*"(\w+)"', source))
    rows = re.findall(r"(?m)^\| (`.*?) \|", (root / "docs/verify.md").read_text("utf-8"))
    assert len(names) > 20
    assert names <= set(re.findall(r"`(\w+)`", " ".join(rows)))


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
