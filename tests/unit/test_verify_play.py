"""The calls and their order; a run whose calls fail, or whose time is up."""

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from prometheus_client.samples import Sample
from yarl import URL

from aiohttp_smg_routing.testing import free_port
from aiohttp_smg_routing.verify import ask, call
from aiohttp_smg_routing.verify.call import CallError, Client
from aiohttp_smg_routing.verify.judge import judge
from aiohttp_smg_routing.verify.play import Play
from aiohttp_smg_routing.verify.seen import ARMS, Counters, GatewayLoad, Plan, Turn
from aiohttp_smg_routing.verify.summary import summarise
from harness.processes import local_url
from harness.servers import serve

from ..clock import let_pass
from ..crosstalk import Handler
from ..verify_servers import engine, fake_gateway, models, stream
from ..waiting import PATIENCE_SECONDS

METRICS = URL("http://127.0.0.1:1/metrics")
USAGE: dict[str, object] = {"prompt_tokens": 1}


def recorder(calls: list[tuple[str | None, dict[str, Any]]]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        calls.append((request.headers.get("X-SMG-Routing-Key"), await request.json()))
        return await stream(request, "ok", USAGE)

    return handler


async def test_both_arms_play_the_same_load_in_one_schedule() -> None:
    calls: list[tuple[str | None, dict[str, Any]]] = []
    played: list[Turn] = []
    async with serve(fake_gateway(recorder(calls))) as url:
        plan = Plan(url, METRICS, sessions=10, turns=4, concurrency=1, run="r")
        seen = await Play(plan, api_key=None, played=played.append).run()
    assert seen.sent == len(calls) == 80
    assert seen.turns == tuple(played)
    # The turns go in pairs of one per arm, so that neither arm runs ahead of the other.
    for number in range(4):
        round_ = seen.turns[20 * number : 20 * (number + 1)]
        assert {turn.number for turn in round_} == {number + 1}
        assert all(a.session == b.session for a, b in zip(round_[::2], round_[1::2], strict=True))
    # One arm keeps its keys; each turn of the other has a new one. They differ in nothing else.
    counts = Counter(key for key, _ in calls)
    assert counts == {f"verify-r-{n}": 4 if n <= 10 else 1 for n in range(1, 51)}
    keyed = {f"verify-r-{n}" for n in range(1, 11)}
    assert {key in keyed for key, _ in calls[::2]} == {True, False}
    assert {turn.arm for turn in seen.turns[::2]} == {"keyed", "control"}  # each is sometimes first
    orders = [tuple(turn.session for turn in seen.turns[i : i + 20 : 2]) for i in range(0, 80, 20)]
    assert len(set(orders)) == 4


async def test_conversations_grow_and_no_two_sessions_begin_alike() -> None:
    calls: list[tuple[str | None, dict[str, Any]]] = []
    async with serve(fake_gateway(recorder(calls))) as url:
        plan = Plan(url, METRICS, sessions=5, turns=3, max_tokens=7)
        await Play(plan, api_key=None).run()
        await Play(plan, api_key=None).run()
    sessions: defaultdict[str, list[list[dict[str, str]]]] = defaultdict(list)
    for _, body in calls:
        assert body["stream"]
        assert body["stream_options"] == {"include_usage": True}
        assert body["max_tokens"] == 7
        sessions[body["messages"][0]["content"]].append(body["messages"])
    assert len({opening[:20] for opening in sessions}) == len(sessions) == 20
    for conversations in sessions.values():
        assert [len(messages) for messages in conversations] == [1, 3, 5]
        assert all(later[: len(early)] == early for early, later in pairwise(conversations))
        assert conversations[-1][1] == {"role": "assistant", "content": "ok"}


async def test_no_more_calls_at_a_time_than_allowed() -> None:
    now: Counter[str] = Counter()
    full = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        now["calls"] += 1
        now["most"] = max(now["most"], now["calls"])
        if now["calls"] == 3:
            full.set()
        await full.wait()
        response = await stream(request, "ok", USAGE)
        now["calls"] -= 1
        return response

    async with serve(fake_gateway(handler)) as url:
        await Play(Plan(url, METRICS, sessions=6, turns=2, concurrency=3), api_key=None).run()
    assert now["most"] == 3


async def test_failed_turn_leaves_no_trace_in_its_session() -> None:
    calls: list[list[str]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        calls.append([message["role"] for message in (await request.json())["messages"]])
        if len(calls) in (1, 2, 5):
            raise web.HTTPServiceUnavailable
        return await stream(request, "ok", USAGE)

    async with serve(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, sessions=1, turns=4, concurrency=2)
        seen = await Play(plan, api_key=None).run()
    assert sum(turn.outcome == "failed" for turn in seen.turns) == 3
    for roles in calls:
        assert roles == [*["user", "assistant"] * (len(roles) // 2), "user"]


async def test_worker_is_compared_with_the_one_before() -> None:
    workers = iter(["a", None, "a", "b", "b"])

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.Response(text="data: [DONE]\n\n")
        keyed = request.headers["X-SMG-Routing-Key"].endswith("-1")
        if keyed and (worker := next(workers)):
            response.headers["x-smg-routed-worker-id"] = worker
        return response

    async with serve(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, sessions=1, turns=5, concurrency=1)
        seen = await Play(plan, api_key=None).run()
    outcomes = [turn.outcome for turn in seen.turns if turn.arm == "keyed"]
    assert outcomes == ["first", "unknown", "kept", "moved", "kept"]


async def test_run_gives_up_when_every_call_fails() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise web.HTTPServiceUnavailable

    async with serve(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, sessions=100, turns=2, concurrency=4)
        seen = await Play(plan, api_key=None).run()
    assert seen.stopped == "failures"
    assert 8 <= len(seen.turns) < 16


async def test_run_ends_at_its_time_limit() -> None:
    called = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal called
        called += 1
        if called == 3:
            let_pass(60)
        await asyncio.Event().wait()
        raise AssertionError("it never answers")

    async with serve(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, concurrency=3, timeout=300, time_limit=60)
        before = asyncio.all_tasks()
        play = Play(plan, api_key=None)
        seen = await play.run()
        assert not [task for task in asyncio.all_tasks() - before if "Play" in repr(task)]
    assert (seen.stopped, seen.sent, seen.turns) == ("time_limit", 3, ())


async def test_time_limit_that_leaves_too_few_turns_is_no_proof() -> None:
    answered, called = recorder([]), 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal called
        called += 1
        if called == 60:  # the first turns, and a few later ones
            let_pass(60)
        if called >= 60:
            await asyncio.Event().wait()
        return await answered(request)

    async with serve(fake_gateway(handler)) as url:
        plan = Plan(url, url / "metrics", timeout=300, time_limit=60)
        seen = await Play(plan, api_key=None).run()
    verdict = judge(seen, min_kept=0.99)
    assert verdict.answer == "could not tell"
    assert "too few to tell" in verdict.sentence
    assert "time_limit" in [cause.name for cause in verdict.causes]


async def test_models_that_never_come_end_the_run_although_one_is_named() -> None:
    async def never(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError("it never answers")

    async with serve(fake_gateway(recorder([]), models=never)) as url:
        seen = await Play(Plan(url, METRICS, model="mine", timeout=0.3), api_key=None).run()
    assert seen.failure is not None
    assert (seen.failure.kind, seen.sent) == ("timeout", 0)


@pytest.mark.parametrize("silent", ["/v1/models", "/workers", "/metrics"])
async def test_time_limit_holds_for_what_is_asked_before_the_first_call(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ask, call):  # a lookup has a limit of its own, which must not come first
        monkeypatch.setattr(module, "BRIEF", 300)

    @web.middleware
    async def hang(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == silent:
            let_pass(60)
            await asyncio.Event().wait()
        return await handler(request)

    app = fake_gateway(recorder([]))
    app.middlewares.append(hang)
    async with serve(app) as url:
        plan = Plan(url, url / "metrics", timeout=300, time_limit=60)
        seen = await Play(plan, api_key=None).run()
    assert (seen.stopped, seen.sent) == ("time_limit", 0)
    assert bool(seen.no_counters) == (silent == "/metrics")


async def test_counters_are_read_after_the_time_limit_as_well() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        let_pass(60)
        await asyncio.Event().wait()
        raise AssertionError("it never answers")

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text='smg_worker_selection_total{policy="manual"} 1\n')

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with serve(fake_gateway(handler)) as url, serve(app) as other:
        plan = Plan(url, other / "metrics", concurrency=1, timeout=300, time_limit=60)
        seen = await Play(plan, api_key=None).run()
    assert (seen.stopped, seen.counters, seen.no_counters) == ("time_limit", Counters(), "")


async def test_figure_that_engines_leave_out_is_0_once_one_has_told_it() -> None:
    count = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        usages: dict[int, dict[str, object]] = {
            3: {"prompt_tokens": 30, "prompt_tokens_details": {"cached_tokens": 20}},
            4: {},
        }
        return await stream(request, "ok", usages.get(count, {"prompt_tokens": 10}))

    async with serve(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, sessions=1, turns=4, concurrency=1)
        seen = await Play(plan, api_key=None).run()
    assert [turn.cached_tokens for turn in seen.turns] == [0, 0, 20, None, 0, 0, 0, 0]
    assert {summarise(seen.turns, arm).cached_share for arm in ARMS} == {0, 20 / 50}


async def test_fault_of_the_program_is_not_passed_over() -> None:
    def played(turn: Turn) -> None:
        raise KeyError("a fault")

    async with serve(engine()) as url:
        with pytest.raises(KeyError):
            await Play(Plan(url, METRICS), api_key=None, played=played).run()


@pytest.mark.parametrize("model", [None, "stub"])
async def test_nothing_is_played_where_nobody_answers(model: str | None) -> None:
    url = local_url(free_port())
    seen = await Play(Plan(url, METRICS, model=model), api_key=None).run()
    assert seen.failure is not None
    assert (seen.failure.kind, seen.sent) == ("refused", 0)


async def test_models_need_not_be_listed_where_one_is_named() -> None:
    calls: list[tuple[str | None, dict[str, Any]]] = []

    async def none(request: web.Request) -> web.Response:
        raise web.HTTPNotFound

    async with serve(fake_gateway(recorder(calls), models=none)) as url:
        plan = Plan(url, METRICS, sessions=1, turns=2)
        unnamed = await Play(plan, api_key=None).run()
        named = await Play(replace(plan, model="mine"), api_key=None).run()
    assert unnamed.failure is not None
    assert (unnamed.failure.status, unnamed.sent) == (404, 0)
    assert (named.failure, named.models, named.sent) == (None, None, 4)
    assert {body["model"] for _, body in calls} == {"mine"}


@pytest.mark.parametrize(
    "listed",
    [
        {"data": []},
        {"object": "list"},
        ["odd"],
        {"data": [1]},
        {"data": [["id"]]},
        {"models": {}},
        {"data": [{"id": 1}]},
    ],
)
async def test_gateway_that_lists_no_model_is_said_to_do_so(listed: object) -> None:
    async def none(request: web.Request) -> web.Response:
        return web.json_response(listed)

    async with serve(fake_gateway(recorder([]), models=none)) as url:
        seen = await Play(Plan(url, METRICS), api_key=None).run()
    assert seen.failure is not None
    assert (seen.failure.kind, seen.failure.text) == ("broken", "it lists no model")


def fake_session_server(known: set[str], made: list[str] | None = None) -> web.Application:
    """Return a server whose sessions must be created first; without ``made`` it answers 405."""
    app = web.Application()

    async def create(request: web.Request) -> web.Response:
        session_id = (await request.json())["session_id"]
        known.add(session_id)
        assert made is not None
        made.append(session_id)
        return web.json_response({}, status=201)

    async def delete(request: web.Request) -> web.Response:
        known.remove(request.match_info["session_id"])
        return web.Response(status=204)

    async def chat(request: web.Request) -> web.StreamResponse:
        if request.match_info["session_id"] not in known:
            raise web.HTTPNotFound(text="no such session")
        return await stream(request, "ok", USAGE)

    if made is not None:
        app.router.add_post("/base/sessions", create)
        app.router.add_delete("/base/sessions/{session_id}", delete)
    app.router.add_post("/base/sessions/{session_id}/v1/chat/completions", chat)
    return app


async def test_session_is_made_at_the_session_server_that_wants_it_so() -> None:
    known: set[str] = set()
    made: list[str] = []
    async with (
        serve(engine()) as url,
        serve(fake_session_server(known, made)) as through,
    ):
        plan = Plan(
            url,
            METRICS,
            through=f"{through}/base/sessions/{{session_id}}/v1/chat/completions",
            sessions=3,
            turns=2,
            session_id="a/ü {n}?",
            concurrency=1,
        )
        seen = await Play(plan, api_key=None).run()
    made.sort()
    assert known == set()  # each is deleted again
    assert made == [f"a/ü {n}?" for n in range(1, 10)]
    assert summarise(seen.turns, "keyed").answered == 6
    assert summarise(seen.turns, "control").answered == 6
    # 9 sessions are created and deleted. One more call got the 404 that asks for that.
    assert (seen.sent, seen.sent_for_sessions) == (12, 9 + 9 + 1)


async def test_session_server_that_makes_none_is_answered_by_its_404() -> None:
    async with (
        serve(engine()) as url,
        serve(fake_session_server(set())) as through,
    ):
        link = f"{through}/base/sessions/{{session_id}}/v1/chat/completions"
        plan = Plan(url, METRICS, through=link, sessions=2, turns=2)
        seen = await Play(plan, api_key=None).run()
    failures = [turn.failure for turn in seen.turns if turn.failure]
    assert [failure.status for failure in failures] == [404] * 8
    assert {failure.text for failure in failures} == {"no such session"}


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        (
            {"workers": [{"is_healthy": True, "model_id": "m"}, {"is_healthy": True}]},
            {"regular": 2},
        ),
        (
            {
                "workers": [
                    {"is_healthy": True, "worker_type": "prefill"},
                    {"is_healthy": True, "worker_type": "decode", "model_id": "unknown"},
                ]
            },
            {"prefill": 1, "decode": 1},
        ),
        ({"workers": [{"is_healthy": False, "model_id": "m"}]}, {}),
        ({"workers": [{"is_healthy": True, "model_id": "other"}]}, {"regular": 0}),
        ({"workers": []}, None),
        ({"workers": "odd"}, None),
        ({"workers": [{"is_healthy": True}, "odd"]}, None),
        (["odd"], None),
    ],
)
async def test_workers_are_those_that_are_healthy_and_have_the_model(
    answer: object, count: dict[str, int] | None
) -> None:
    async def workers(request: web.Request) -> web.Response:
        return web.json_response(answer)

    app = web.Application()
    app.router.add_get("/workers", workers)
    async with serve(app) as url, Client(60, None) as client:
        assert await ask.healthy_workers(client, url, "m") == count
        assert await ask.healthy_workers(client, url / "no", "m") is None


async def test_run_tells_by_how_much_the_counters_grew() -> None:
    calls: list[tuple[str | None, dict[str, Any]]] = []

    async def metrics(request: web.Request) -> web.Response:
        count = f'smg_worker_selection_total{{policy="manual"}} {40 + len(calls)}\n'
        return web.Response(text=count)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with serve(fake_gateway(recorder(calls))) as url, serve(app) as other:
        plan = Plan(url, other / "metrics", sessions=2, turns=3)
        seen = await Play(plan, api_key=None).run()
    assert seen.probe == Counters({"regular": {"manual": 4}})
    assert seen.counters == Counters({"regular": {"manual": 12}})
    assert seen.no_counters == ""
    assert [key for key, _ in calls[:4]] == [None] * 4
    assert len(calls) == 16


async def test_workers_are_counted_again_at_the_end() -> None:
    """A worker may become healthy or disappear during the run."""
    listed = [[{"is_healthy": True}], 3 * [{"is_healthy": True}]]

    @web.middleware
    async def workers(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/workers":
            return web.json_response({"workers": listed.pop(0)})
        answer: web.StreamResponse = await handler(request)
        return answer

    app = fake_gateway(recorder([]))
    app.middlewares.append(workers)
    async with serve(app) as url:
        seen = await Play(Plan(url, METRICS, sessions=2, turns=2), api_key=None).run()
    assert (seen.workers, seen.has_changed) == ({"regular": 3}, True)


async def test_workers_that_are_left_out_for_a_while_are_seen() -> None:
    reads = 0
    has_been_read = asyncio.Event()

    async def metrics(request: web.Request) -> web.Response:
        nonlocal reads
        reads += 1
        # Two reads precede: before the turns, and after the probe. The next read begins when the
        # third page has been read whole.
        if reads == 4:
            has_been_read.set()
        overloaded = f"smg_workers_overloaded {int(reads == 3)}"
        circuit = f'smg_worker_cb_state{{worker="w"}} {int(reads == 3)}'
        return web.Response(text=f"smg_tokio_workers 2\n{overloaded}\n{circuit}\n")

    async def chat(request: web.Request) -> web.StreamResponse:
        if "X-SMG-Routing-Key" in request.headers:
            await has_been_read.wait()
        return await stream(request, "ok", USAGE)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with serve(fake_gateway(chat)) as url, serve(app) as other:
        plan = Plan(url, other / "metrics", sessions=2, turns=2)
        seen = await Play(plan, api_key=None).run()
    assert reads == 5
    assert (seen.load.overloaded, seen.load.circuits) == (1, 1)


async def test_counters_that_began_anew_tell_nothing() -> None:
    counts = [40, 44, 3]

    async def metrics(request: web.Request) -> web.Response:
        count = f'smg_worker_selection_total{{policy="manual"}} {counts.pop(0)}\n'
        return web.Response(text=count)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with serve(fake_gateway(recorder([]))) as url, serve(app) as other:
        plan = Plan(url, other / "metrics", sessions=2, turns=2)
        seen = await Play(plan, api_key=None).run()
    assert (seen.counters, seen.probe) == (None, Counters({"regular": {"manual": 4}}))
    assert seen.no_counters == "they began anew, as when the gateway is restarted"


@pytest.mark.parametrize(
    ("concurrency", "policy", "alone"),
    [(1, "p", True), (2, "p", False), (2, "consistent_hash", True)],
)
async def test_counters_name_the_worker_of_the_only_call(
    concurrency: int, policy: str, alone: bool
) -> None:
    counts: Counter[str] = Counter()

    async def chat(request: web.Request) -> web.StreamResponse:
        counts[request.headers.get("X-SMG-Routing-Key", "none")[-1]] += 1
        return await stream(request, "ok", USAGE)

    async def metrics(request: web.Request) -> web.Response:
        counts["read"] += 1
        name = "vllm_router_policy_decisions_total"
        lines = (
            f'{name}{{policy="{policy}",worker="{w}"}} {n}'
            for w, n in counts.items()
            if w != "read"
        )
        return web.Response(text="\n".join([*lines, "vllm_router_x 1", ""]))

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with serve(fake_gateway(chat)) as url, serve(app) as other:
        plan = Plan(url, other / "metrics", sessions=2, turns=3, concurrency=concurrency)
        seen = await Play(plan, api_key=None).run()
    workers = {turn.worker for turn in seen.turns if turn.arm == "keyed" and turn.session == 1}
    assert workers == ({"1"} if alone else {None})
    assert counts["read"] == (3 + 12 if alone else 3)


@pytest.mark.parametrize(
    ("named", "through", "concurrency"), [(False, False, 1), (True, False, 4), (False, True, 4)]
)
async def test_one_call_is_made_at_a_time_only_where_nothing_else_can_tell(
    named: bool, through: bool, concurrency: int
) -> None:
    count = 0

    async def chat(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        headers = {"x-smg-routed-worker-id": "http://w"} if named else {}
        return web.Response(text="data: [DONE]\n\n", headers=headers)

    async def metrics(request: web.Request) -> web.Response:
        labels = '{policy="consistent_hash",worker="http://w"}'
        return web.Response(text=f"vllm_router_policy_decisions_total{labels} {count}\n")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with serve(fake_gateway(chat)) as url, serve(app) as other:
        way = f"{url}/v1/chat/completions" if through else None
        plan = Plan(url, other / "metrics", way, concurrency=4, sessions=2, turns=2)
        seen = await Play(plan, api_key=None).run()
    assert seen.plan.concurrency == concurrency


async def test_counters_of_two_workers_or_of_none_name_no_worker() -> None:
    counts = Counter({"a": 1})

    async def metrics(request: web.Request) -> web.Response:
        lines = (f'smg_worker_cb_outcomes_total{{worker="{w}"}} {n}' for w, n in counts.items())
        return web.Response(text="\n".join([*lines, ""]))

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with serve(app) as url, Client(60, None) as client:
        before, _ = await ask.read_metrics(client, url / "metrics")
        follow = ask.Follower(client, url / "metrics", before)
        for grown, worker in ((["a"], "a"), (["a", "b"], None), (["a", "a"], None), ([], None)):
            counts.update(grown)
            assert await follow.worker() == worker
        lost = ask.Follower(client, url / "no", before)
        assert await lost.worker() is None


async def test_metrics_of_something_else_are_said_to_be_so() -> None:
    async with serve(fake_gateway(recorder([]))) as url:
        seen = await Play(Plan(url, url / "v1/models", sessions=1, turns=2), api_key=None).run()
    assert seen.counters is None
    assert seen.no_counters


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('smg_worker_selection_total{policy="manual"} +Inf\n', "smg_worker_selection_total is inf"),
        ('smg_worker_selection_total{policy="manual"} NaN\n', "smg_worker_selection_total is nan"),
        ('smg_worker_selection_total{a="b", ="d"} 1\n', "the answer is not a page of metrics"),
        ("smg_x sesame\n", "***"),
        ("smg_x{" + 'a="1",' * 2**14 + "} 1\n", "the page has a line of more than 64 KiB"),
        ("smg_x{" + 'a="1",\r' * 2**14 + "} 1\n", "the page has a line of more than 64 KiB"),
        ("# \n" * 2**21, "the page has more than 4 MiB"),
    ],
)
async def test_metrics_that_are_odd_are_said_to_be_so(text: str, words: str) -> None:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=text)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with serve(fake_gateway(recorder([]))) as url, serve(app) as other:
        plan = Plan(url, other / "metrics", sessions=1, turns=2)
        seen = await Play(plan, api_key="sesame").run()
    assert seen.counters is None
    assert words in seen.no_counters
    assert seen.no_counters.isprintable()
    assert "sesame" not in seen.no_counters


async def test_names_that_a_server_gives_are_printable_and_hold_no_key() -> None:
    async def listed(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "\x1b[31m sesame  x"}]})

    async def metrics(request: web.Request) -> web.Response:
        labels = '{policy="\x1bsesame"} 1\n'
        branch = '{branch="\x1bsesame"} 1\n'
        text = f"smg_worker_selection_total{labels}smg_manual_policy_branch_total{branch}"
        return web.Response(text=text)

    app = web.Application()
    app.router.add_get("/v1/models", listed)
    app.router.add_get("/metrics", metrics)
    async with serve(app) as url, Client(60, "sesame") as client:
        assert await ask.models(client, url) == (" [31m ***  x",)
        counters, _ = await ask.read_metrics(client, url / "metrics")
    assert counters == Counters({"regular": {" ***": 1}}, {"manual": {" ***": 1}})


async def test_calls_go_on_while_a_page_of_metrics_is_read() -> None:
    loop, reading, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def read(samples: Sequence[Sample]) -> bool:
        loop.call_soon_threadsafe(reading.set)
        return may_end.wait(PATIENCE_SECONDS)

    async with serve(fake_gateway(recorder([]))) as url, Client(60, None) as client:
        task = asyncio.create_task(ask.read_page(client, url / "metrics", read))
        await reading.wait()
        may_end.set()
        assert await task


async def metrics_of(text: str) -> tuple[Counters, GatewayLoad]:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=text)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with serve(app) as url, Client(60, None) as client:
        return await ask.read_metrics(client, url / "metrics")


async def test_counters_are_those_of_the_policies_and_kinds_of_workers() -> None:
    counters, _ = await metrics_of(
        """
smg_manual_policy_branch_total{branch="vacant"} 3
smg_prefix_hash_policy_branch_total{branch="ring_hit"} 5
smg_cache_aware_policy_branch_total{branch="tree_match"} 9
smg_worker_selection_total{worker_type="prefill",policy="manual"} 5
smg_worker_selection_total{worker_type="decode",policy="prefix_hash"} 5
smg_worker_cb_outcomes_total{worker="http://w",outcome="success"} 7
smg_worker_cb_outcomes_total{worker="http://w",outcome="failure"} 1
smg_worker_cb_transitions_total{from="closed",to="open"} 2
smg_worker_health_checks_total{result="failure"} 4
smg_worker_health_checks_total{result="success"} 8
other 1
"""
    )
    assert counters == Counters(
        {"prefill": {"manual": 5}, "decode": {"prefix_hash": 5}},
        {"manual": {"vacant": 3}, "prefix_hash": {"ring_hit": 5}},
        {"http://w": 8},
        troubles=7,
    )
    assert counters.calls == 5
    with pytest.raises(ValueError, match="not an SMG gateway's metrics"):
        await metrics_of("other 1\n")
    async with serve(fake_gateway(recorder([]))) as url, Client(60, None) as client:
        with pytest.raises(CallError):
            await ask.read_metrics(client, url / "no/such")


@pytest.mark.parametrize(
    ("text", "load"),
    [
        ("smg_tokio_workers 2\n", GatewayLoad("smg")),
        ("smg_tokio_workers 2\nsmg_engine_load_polls_total 2\n", GatewayLoad("smg", True)),
        (
            "smg_tokio_workers 2\nsmg_engine_load_polls_total 2\n"
            'smg_workers_overloaded{model="a"} 1\nsmg_workers_overloaded{model="b"} 1\n'
            'smg_engine_token_usage{worker="w",dp_rank="0"} 0.9\n'
            'smg_engine_token_usage{worker="w",dp_rank="1"} 0.5\n',
            GatewayLoad("smg", True, 2, {"w": 0.9}),
        ),
        (
            "smg_tokio_workers 2\n"
            'smg_worker_cb_state{worker="a"} 1\nsmg_worker_cb_state{worker="b"} 1\n'
            'smg_worker_cb_state{worker="c"} 2\nsmg_worker_cb_state{worker="d"} 0\n',
            GatewayLoad("smg", circuits=2),
        ),
        ("smg_worker_selection_total 1\n", GatewayLoad("sglang-router")),
        ("vllm_router_requests_total 1\n", GatewayLoad("vllm-router")),
    ],
)
async def test_metrics_tell_which_gateway_it_is_and_its_load(text: str, load: GatewayLoad) -> None:
    assert (await metrics_of(text))[1] == load


def test_growth_is_what_came_in_between() -> None:
    before = Counters({"regular": {"manual": 4}}, {"manual": {"vacant": 3, "occupied_hit": 1}})
    after = Counters(
        {"regular": {"manual": 6, "random": 1}},
        {"manual": {"vacant": 5, "occupied_hit": 1}},
        {"http://w": 3},
    )
    grown = Counters(
        {"regular": {"manual": 2, "random": 1}}, {"manual": {"vacant": 2}}, {"http://w": 3}
    )
    assert ask.growth(before, after) == grown
    assert ask.growth(before, None) is ask.growth(None, after) is None
    assert ask.growth(after, after) == Counters()
    assert ask.growth(after, before) is ask.growth(after, Counters(after.pools)) is None
    assert ask.growth(before, replace(before, troubles=2)) == Counters(troubles=2)


@pytest.mark.parametrize(
    "listed",
    [
        {"models": ["a", "b"]},
        {"models": [{"name": "a"}, {"model_path": "b"}]},
        {"data": [{"id": "a"}, {"model": "b"}]},
    ],
)
async def test_models_are_read_in_other_shapes_as_well(listed: object) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(listed)

    async with serve(fake_gateway(handler, models=handler)) as url, Client(60, None) as client:
        assert await ask.models(client, url) == ("a", "b")


async def test_models_are_listed_by_name() -> None:
    async with serve(fake_gateway(recorder([]), models=models)) as url, Client(60, None) as client:
        assert await ask.models(client, url) == ("stub",)
