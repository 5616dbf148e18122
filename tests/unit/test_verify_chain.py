"""How a turn finds its session at a session server, and whether ``verify`` deletes sessions."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from aiohttp_smg_routing.verify.call import CallError, Client
from aiohttp_smg_routing.verify.chain import Chain, endpoint
from aiohttp_smg_routing.verify.play import Play
from aiohttp_smg_routing.verify.seen import Plan
from harness.servers import serve

from ..verify_servers import engine, stream

METRICS = URL("http://127.0.0.1:1/metrics")
BODY = {"model": "m", "messages": [], "metadata": {"team": "a"}}


class Server:
    """A session server that remembers its calls, and answers ``POST /new`` with ``made``."""

    def __init__(self, made: object = None, *, deletes: bool = True) -> None:
        self.calls: list[tuple[str, str]] = []
        self.turns: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.app = web.Application()
        self.app.router.add_post("/new", self._answer(self._new))
        if deletes:
            self.app.router.add_delete("/new/{id}", self._answer(self._gone))
        self.app.router.add_post("/{path:.*}", self._answer(self._turn))
        self._made = made

    def _answer(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request) -> web.StreamResponse:
            self.calls.append((request.method, request.raw_path))
            return await handler(request)

        return answer

    async def _new(self, request: web.Request) -> web.Response:
        return web.json_response(self._made)

    async def _gone(self, request: web.Request) -> web.Response:
        return web.Response(status=204)

    async def _turn(self, request: web.Request) -> web.StreamResponse:
        self.turns.append((request.raw_path, dict(request.headers), await request.json()))
        return await stream(request, "ok", {})


@pytest.mark.parametrize(
    ("through", "completed"),
    [
        ("http://s/{session_id}", "http://s/{session_id}/v1/chat/completions"),
        ("http://s/{session_id}/", "http://s/{session_id}/v1/chat/completions"),
        ("http://s/{session_id}/v1", "http://s/{session_id}/v1/chat/completions"),
        ("http://s/v2/{session_id}/chat/completions", "http://s/v2/{session_id}/chat/completions"),
        ("http://s?s={session_id}", "http://s/v1/chat/completions?s={session_id}"),
    ],
)
def test_endpoint_is_added_unless_it_is_there(through: str, completed: str) -> None:
    assert endpoint(through) == completed


@pytest.mark.parametrize(
    ("options", "path", "header", "body"),
    [
        ({"through": "/s/{session_id}/v1/chat/completions"}, "/s/a%2Fb/v1/chat/completions", 0, 0),
        ({"through": "/chat/completions?s={session_id}"}, "/chat/completions?s=a%2Fb", 0, 0),
        ({"through": "/chat/completions", "session_header": "X-Sid"}, "/chat/completions", 1, 0),
        (
            {"through": "/chat/completions", "session_json": "metadata.session_id"},
            "/chat/completions",
            0,
            1,
        ),
    ],
)
async def test_server_is_told_of_the_session_where_it_looks(
    options: dict[str, str], path: str, header: int, body: int
) -> None:
    spy = Server()
    async with serve(spy.app) as url, Client(60, None) as client:
        through = str(url) + options.pop("through")
        plan = Plan(url, METRICS, through, **options)  # type: ignore[arg-type]
        await Chain(client, plan).send("a/b", BODY)
    [(seen, headers, sent)] = spy.turns
    assert seen == path
    assert headers.get("X-Sid") == ("a/b" if header else None)
    assert "X-SMG-Routing-Key" not in headers
    metadata = {"team": "a", "session_id": "a/b"} if body else {"team": "a"}
    assert sent == {**BODY, "metadata": metadata}


@pytest.mark.parametrize(
    "made",
    ["s 1", {"session_id": "s 1"}, {"id": "s 1"}, {"session": "s 1"}, {"session": {"id": "s 1"}}],
)
async def test_session_is_made_by_the_servers_own_call_and_deleted(made: object) -> None:
    spy = Server(made)
    async with serve(spy.app) as url, Client(60, None) as client:
        through = f"{url}/s/{{session_id}}/v1/chat/completions"
        chain = Chain(client, Plan(url, METRICS, through, create=url / "new"))
        for _ in range(2):
            await chain.send("mine", BODY)
        assert [*chain.open] == ["mine"]
        await chain.end("mine")
        assert not chain.open
    turn = ("POST", "/s/s%201/v1/chat/completions")
    assert spy.calls == [("POST", "/new"), turn, turn, ("DELETE", "/new/s%201")]
    assert chain.extra == 2


async def test_id_may_be_a_number() -> None:
    spy = Server({"id": 7})
    async with serve(spy.app) as url, Client(60, None) as client:
        plan = Plan(url, METRICS, f"{url}/chat", session_header="X-Sid", create=url / "new")
        await Chain(client, plan).send("mine", BODY)
    assert spy.turns[0][1]["X-Sid"] == "7"


@pytest.mark.parametrize("made", [None, {}, {"id": None}, {"id": True}, {"id": ""}, [1], "\ud800"])
async def test_answer_without_an_id_is_said_to_have_none(made: object) -> None:
    spy = Server(made)
    async with serve(spy.app) as url, Client(60, None) as client:
        plan = Plan(url, METRICS, f"{url}/{{session_id}}", create=url / "new")
        with pytest.raises(CallError) as caught:
            await Chain(client, plan).send("mine", BODY)
    assert caught.value.failure.url == url / "new"
    assert caught.value.failure.text == "its answer has no session id"
    assert spy.turns == []


async def test_404_is_no_reason_to_make_a_session_where_its_url_is_not_known() -> None:
    async with serve(web.Application()) as url, Client(60, None) as client:
        chain = Chain(client, Plan(url, METRICS, f"{url}/v1", session_header="X-Sid"))
        with pytest.raises(CallError) as caught:
            await chain.send("mine", BODY)
    assert (caught.value.failure.status, chain.extra) == (404, 0)


async def test_answer_that_is_no_json_leaves_the_id_as_it_is() -> None:
    known: set[str] = set()

    async def create(request: web.Request) -> web.Response:
        known.add("mine")
        return web.Response(text="made")

    async def turn(request: web.Request) -> web.StreamResponse:
        if request.match_info["id"] not in known:
            raise web.HTTPNotFound
        return await stream(request, "ok", {})

    app = web.Application()
    app.router.add_post("/s", create)
    app.router.add_post("/s/{id}/v1/chat/completions", turn)
    async with serve(app) as url, Client(60, None) as client:
        plan = Plan(url, METRICS, f"{url}/s/{{session_id}}/v1/chat/completions")
        assert (await Chain(client, plan).send("mine", BODY)).text == "ok"


async def test_server_that_deletes_nothing_is_let_be() -> None:
    spy = Server({"id": "s"}, deletes=False)
    async with serve(spy.app) as url, Client(60, None) as client:
        chain = Chain(client, Plan(url, METRICS, f"{url}/{{session_id}}/x", create=url / "new"))
        await chain.send("mine", BODY)
        await chain.end("mine")
        await chain.end("another")
    assert len(spy.calls) == 2  # DELETE has no route


async def test_every_session_of_a_run_is_deleted_at_its_end() -> None:
    spy = Server({"id": "s"})
    async with serve(engine()) as gateway, serve(spy.app) as url:
        through = f"{url}/{{session_id}}/v1/chat/completions"
        plan = Plan(gateway, METRICS, through, create=url / "new", sessions=3, turns=2)
        seen = await Play(plan, api_key=None).run()
    assert len(spy.turns) == seen.sent == 12
    assert spy.calls.count(("POST", "/new")) == spy.calls.count(("DELETE", "/new/s")) == 9


async def test_key_goes_in_the_header_that_the_gateway_reads() -> None:
    spy = Server()
    async with serve(spy.app) as url, Client(60, None) as client:
        await Chain(client, Plan(url, METRICS, header="X-Session-ID")).send("mine", BODY)
    [(path, headers, _)] = spy.turns
    assert path == "/v1/chat/completions"
    assert headers["X-Session-ID"] == "mine"
    assert "X-SMG-Routing-Key" not in headers


async def test_two_sessions_whose_first_turns_are_refused_at_once_are_both_made() -> None:
    made: set[str] = set()
    both_came, one_is_made, came = asyncio.Event(), asyncio.Event(), 0

    async def make(request: web.Request) -> web.Response:
        made.add((await request.json())["session_id"])
        return web.json_response({})

    async def turn(request: web.Request) -> web.StreamResponse:
        nonlocal came
        if request.match_info["id"] in made:
            one_is_made.set()
            return await stream(request, "ok", {})
        came += 1
        if came == 2:
            both_came.set()
            await one_is_made.wait()  # the second 404 comes once a session is made
        await both_came.wait()
        raise web.HTTPNotFound

    app = web.Application()
    app.router.add_post("/s", make)
    app.router.add_post("/s/{id}/v1/chat/completions", turn)
    async with serve(app) as url, Client(60, None) as client:
        plan = Plan(url, METRICS, f"{url}/s/{{session_id}}/v1/chat/completions")
        chain = Chain(client, plan)
        await asyncio.gather(chain.send("a", BODY), chain.send("b", BODY))
    assert made == {"a", "b"}
