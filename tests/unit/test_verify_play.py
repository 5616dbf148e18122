"""What is sent, and in which order; what a run does when calls fail or time is up."""

import asyncio
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from aiohttp_smg_routing.testing import free_port
from aiohttp_smg_routing.verify import ask
from aiohttp_smg_routing.verify.call import CallError, Client
from aiohttp_smg_routing.verify.play import Play
from aiohttp_smg_routing.verify.seen import ARMS, Counters, Plan, Turn, summarise

from ..verify_servers import Handler, engine, fake_gateway, models, server, stream

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
    async with server(fake_gateway(recorder(calls))) as url:
        plan = Plan(url, METRICS, sessions=10, turns=4, concurrency=1, run="r")
        seen = await Play(plan, api_key=None, played=played.append).run()
    assert seen.sent == len(calls) == 80
    assert seen.turns == tuple(played)
    # Turn by turn, in pairs of which one has the key: neither arm runs ahead of the other.
    for number in range(4):
        round_ = seen.turns[20 * number : 20 * (number + 1)]
        assert {turn.number for turn in round_} == {number + 1}
        assert all(a.session == b.session for a, b in zip(round_[::2], round_[1::2], strict=True))
    assert {key for key, _ in calls} == {None, *(f"verify-r-{n}" for n in range(1, 11))}
    assert {turn.arm for turn in seen.turns[::2]} == {"keyed", "unkeyed"}  # each is first at times
    orders = [tuple(turn.session for turn in seen.turns[i : i + 20 : 2]) for i in range(0, 80, 20)]
    assert len(set(orders)) == 4


async def test_transcripts_grow_and_no_two_sessions_begin_alike() -> None:
    calls: list[tuple[str | None, dict[str, Any]]] = []
    async with server(fake_gateway(recorder(calls))) as url:
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
    for transcripts in sessions.values():
        assert [len(messages) for messages in transcripts] == [1, 3, 5]
        assert all(later[: len(early)] == early for early, later in pairwise(transcripts))
        assert transcripts[-1][1] == {"role": "assistant", "content": "ok"}


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

    async with server(fake_gateway(handler)) as url:
        await Play(Plan(url, METRICS, sessions=6, turns=2, concurrency=3), api_key=None).run()
    assert now["most"] == 3


async def test_failed_turn_leaves_no_trace_in_its_session() -> None:
    calls: list[list[str]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        calls.append([message["role"] for message in (await request.json())["messages"]])
        if len(calls) in (1, 2, 5):
            raise web.HTTPServiceUnavailable
        return await stream(request, "ok", USAGE)

    async with server(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, sessions=1, turns=4, concurrency=2)
        seen = await Play(plan, api_key=None).run()
    assert sum(turn.outcome == "failed" for turn in seen.turns) == 3
    for roles in calls:
        assert roles == [*["user", "assistant"] * (len(roles) // 2), "user"]


async def test_worker_is_compared_with_the_one_before() -> None:
    workers = iter(["a", None, "a", "b", "b"])

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.Response(text="data: [DONE]\n\n")
        if "X-SMG-Routing-Key" in request.headers and (worker := next(workers)):
            response.headers["x-smg-routed-worker-id"] = worker
        return response

    async with server(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, sessions=1, turns=5, concurrency=1)
        seen = await Play(plan, api_key=None).run()
    outcomes = [turn.outcome for turn in seen.turns if turn.arm == "keyed"]
    assert outcomes == ["first", "unknown", "kept", "moved", "kept"]


async def test_run_gives_up_when_every_call_fails() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise web.HTTPServiceUnavailable

    async with server(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, sessions=100, turns=2, concurrency=4)
        seen = await Play(plan, api_key=None).run()
    assert seen.stopped == "failures"
    assert 8 <= len(seen.turns) < 16


async def test_run_ends_at_its_time_limit() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError("it never answers")

    async with server(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, concurrency=3, time_limit=0.3)
        before = asyncio.all_tasks()
        play = Play(plan, api_key=None)
        seen = await play.run()
        assert not [task for task in asyncio.all_tasks() - before if "Play" in repr(task)]
    assert (seen.stopped, seen.sent, seen.turns) == ("time_limit", 3, ())


@pytest.mark.parametrize("silent", ["/v1/models", "/workers", "/metrics"])
async def test_time_limit_holds_for_what_is_asked_before_the_first_call(silent: str) -> None:
    @web.middleware
    async def hang(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == silent:
            await asyncio.Event().wait()
        return await handler(request)

    app = fake_gateway(recorder([]))
    app.middlewares.append(hang)
    async with server(app) as url:
        seen = await Play(Plan(url, url / "metrics", time_limit=0.3), api_key=None).run()
    assert (seen.stopped, seen.sent) == ("time_limit", 0)
    assert 0.3 <= seen.seconds < 2
    assert bool(seen.no_counters) == (silent == "/metrics")


async def test_counters_are_read_after_the_time_limit_as_well() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError("it never answers")

    async def metrics(request: web.Request) -> web.Response:
        await asyncio.sleep(0.1)
        return web.Response(text='smg_worker_selection_total{policy="manual"} 1\n')

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with server(fake_gateway(handler)) as url, server(app) as other:
        seen = await Play(Plan(url, other / "metrics", time_limit=0.3), api_key=None).run()
    assert (seen.stopped, seen.counters, seen.no_counters) == ("time_limit", Counters({}, {}), "")


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

    async with server(fake_gateway(handler)) as url:
        plan = Plan(url, METRICS, sessions=1, turns=4, concurrency=1)
        seen = await Play(plan, api_key=None).run()
    assert [turn.cached_tokens for turn in seen.turns] == [0, 0, 20, None, 0, 0, 0, 0]
    assert {summarise(seen.turns, arm).cached_share for arm in ARMS} == {0, 20 / 50}


async def test_fault_of_the_program_is_not_passed_over() -> None:
    def played(turn: Turn) -> None:
        raise KeyError("a fault")

    async with server(engine()) as url:
        with pytest.raises(KeyError):
            await Play(Plan(url, METRICS), api_key=None, played=played).run()


@pytest.mark.parametrize("model", [None, "stub"])
async def test_nothing_is_played_where_nobody_answers(model: str | None) -> None:
    url = URL(f"http://127.0.0.1:{free_port()}")
    seen = await Play(Plan(url, METRICS, model=model), api_key=None).run()
    assert seen.failure is not None
    assert (seen.failure.kind, seen.sent) == ("refused", 0)


async def test_models_need_not_be_listed_where_one_is_named() -> None:
    calls: list[tuple[str | None, dict[str, Any]]] = []

    async def none(request: web.Request) -> web.Response:
        raise web.HTTPNotFound

    async with server(fake_gateway(recorder(calls), models=none)) as url:
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
        {"data": ["id-x"]},
        {"data": [{"id": 1}]},
    ],
)
async def test_gateway_that_lists_no_model_is_said_to_do_so(listed: object) -> None:
    async def none(request: web.Request) -> web.Response:
        return web.json_response(listed)

    async with server(fake_gateway(recorder([]), models=none)) as url:
        seen = await Play(Plan(url, METRICS), api_key=None).run()
    assert seen.failure is not None
    assert (seen.failure.kind, seen.failure.text) == ("broken", "it lists no model")


def session_server(known: set[str], *, creates: bool) -> web.Application:
    """Return a server of sessions that must be made first; where not, a POST is answered 405."""
    app = web.Application()

    async def create(request: web.Request) -> web.Response:
        known.add((await request.json())["session_id"])
        return web.json_response({}, status=201)

    async def chat(request: web.Request) -> web.StreamResponse:
        if request.match_info["session_id"] not in known:
            raise web.HTTPNotFound(text="no such session")
        return await stream(request, "ok", USAGE)

    if creates:
        app.router.add_post("/base/sessions", create)
    app.router.add_post("/base/sessions/{session_id}/v1/chat/completions", chat)
    return app


async def test_session_is_made_at_the_session_server_that_wants_it_so() -> None:
    known: set[str] = set()
    async with (
        server(engine()) as url,
        server(session_server(known, creates=True)) as through,
    ):
        plan = Plan(
            url,
            METRICS,
            through=f"{through}/base/sessions/{{session_id}}",
            sessions=3,
            turns=2,
            session_id="a/ü {n}?",
        )
        seen = await Play(plan, api_key=None).run()
    assert known == {"a/ü 1?", "a/ü 2?", "a/ü 3?"}
    assert summarise(seen.turns, "keyed").answered == 6
    assert summarise(seen.turns, "unkeyed").answered == 6
    assert (seen.sent, seen.sent_for_sessions) == (12, 6)


async def test_session_server_that_makes_none_is_answered_by_its_404() -> None:
    async with (
        server(engine()) as url,
        server(session_server(set(), creates=False)) as through,
    ):
        link = f"{through}/base/sessions/{{session_id}}"
        plan = Plan(url, METRICS, through=link, sessions=2, turns=2)
        seen = await Play(plan, api_key=None).run()
    failures = [turn.failure for turn in seen.turns if turn.failure]
    assert [failure.status for failure in failures] == [404] * 4
    assert {failure.text for failure in failures} == {"no such session"}


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ({"workers": [{"is_healthy": True, "model_id": "m"}, {"is_healthy": True}]}, 2),
        ({"workers": [{"is_healthy": False, "model_id": "m"}]}, 0),
        ({"workers": [{"is_healthy": True, "model_id": "other"}]}, 0),
        ({"workers": []}, None),
        ({"workers": "odd"}, None),
        ({"workers": [{"is_healthy": True}, "odd"]}, None),
        (["odd"], None),
    ],
)
async def test_workers_are_those_that_are_healthy_and_have_the_model(
    answer: object, count: int | None
) -> None:
    async def workers(request: web.Request) -> web.Response:
        return web.json_response(answer)

    app = web.Application()
    app.router.add_get("/workers", workers)
    async with server(app) as url, Client(5, None) as client:
        assert await ask.healthy_workers(client, url, "m") == count
        assert await ask.healthy_workers(client, url / "no", "m") is None


async def test_run_tells_by_how_much_the_counters_grew() -> None:
    calls: list[tuple[str | None, dict[str, Any]]] = []

    async def metrics(request: web.Request) -> web.Response:
        count = f'smg_worker_selection_total{{policy="manual"}} {40 + len(calls)}\n'
        return web.Response(text=count)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with server(fake_gateway(recorder(calls))) as url, server(app) as other:
        plan = Plan(url, other / "metrics", sessions=2, turns=3)
        seen = await Play(plan, api_key=None).run()
    assert seen.counters == Counters({}, {"manual": 12})
    assert seen.no_counters == ""


async def test_metrics_of_something_else_are_said_to_be_so() -> None:
    async with server(fake_gateway(recorder([]))) as url:
        seen = await Play(Plan(url, url / "v1/models", sessions=1, turns=2), api_key=None).run()
    assert seen.counters is None
    assert seen.no_counters


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('smg_worker_selection_total{policy="manual"} +Inf\n', "smg_worker_selection_total is inf"),
        ('smg_worker_selection_total{policy="manual"} NaN\n', "smg_worker_selection_total is nan"),
        ('smg_worker_selection_total{a="b", ="d"} 1\n', "string index out of range"),
        ("smg_x sesame\n", "***"),
    ],
)
async def test_metrics_that_are_odd_are_said_to_be_so(text: str, words: str) -> None:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=text)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with server(fake_gateway(recorder([]))) as url, server(app) as other:
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
    async with server(app) as url, Client(5, "sesame") as client:
        assert await ask.models(client, url) == (" [31m ***  x",)
        counters = await ask.read_counters(client, url / "metrics")
    assert counters == Counters({" ***": 1}, {" ***": 1})


async def test_counters_are_those_of_the_policies() -> None:
    text = """
smg_manual_policy_branch_total{branch="vacant"} 3
smg_cache_aware_policy_branch_total{branch="tree_match"} 9
smg_worker_selection_total{worker_type="prefill",policy="manual"} 5
smg_worker_selection_total{worker_type="decode",policy="manual"} 5
other 1
"""

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=text if request.path == "/metrics" else "other 1\n")

    app = web.Application()
    app.router.add_get("/{name}", metrics)
    async with server(app) as url, Client(5, None) as client:
        assert await ask.read_counters(client, url / "metrics") == Counters(
            {"vacant": 3}, {"manual": 10}, pools=2
        )
        with pytest.raises(ValueError, match="no SMG gateway's metrics"):
            await ask.read_counters(client, url / "another")
        with pytest.raises(CallError):
            await ask.read_counters(client, url / "no/such")


def test_growth_is_what_came_in_between() -> None:
    before = Counters({"vacant": 3, "occupied_hit": 1}, {"manual": 4})
    after = Counters({"vacant": 5, "occupied_hit": 1}, {"manual": 6, "random": 1})
    assert ask.growth(before, after) == Counters({"vacant": 2}, {"manual": 2, "random": 1})
    assert ask.growth(before, None) is ask.growth(None, after) is None


async def test_models_are_listed_by_name() -> None:
    async with server(fake_gateway(recorder([]), models=models)) as url, Client(5, None) as client:
        assert await ask.models(client, url) == ("stub",)
