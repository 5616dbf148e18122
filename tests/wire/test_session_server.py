"""The example session server between a real agent's client and a scripted gateway.

No test waits for a fixed time: the gateway holds a turn until an event is set.
"""

import asyncio
import gzip
import io
import json
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import ClientSession, web
from multidict import CIMultiDict
from yarl import URL

from examples import session_server
from harness import servers
from harness.agents import Agent
from harness.proc import until_refused
from harness.servers import PROGRAM

from ..waiting import soon

if TYPE_CHECKING:
    from pytest_aiohttp.plugin import AiohttpServer  # since 1.1, which needs aiohttp 3.11

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
KEY = "X-SMG-Routing-Key"


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def event(*, finish_reason: str | None = None, **delta: object) -> bytes:
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def canned(
    status: int = 200, text: str = "reply", finish_reason: str = "stop", **headers: str
) -> Answer:
    """Answer with a completion, or an error, whose text is ``text``."""

    async def answer(request: web.Request) -> web.Response:
        message = {"index": 0, "message": assistant(text), "finish_reason": finish_reason}
        body: Json = {"choices": [message]} if status == 200 else {"error": {"message": text}}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response(body, status=status, headers=names)

    return answer


async def drops_the_connection(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def event_stream(request: web.Request, *chunks: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for chunk in chunks:
        await response.write(chunk)
    return response


def streamed(*chunks: bytes) -> Answer:
    """Answer with a stream of ``chunks`` that ends properly."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return await event_stream(request, *chunks)

    return answer


def broken_off(*chunks: bytes) -> Answer:
    """Answer with a stream of ``chunks``, then close the connection before its end."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await event_stream(request, *chunks)
        assert request.transport is not None
        request.transport.close()
        return response

    return answer


class Held:
    """Answer once ``release`` is set; ``gone`` is set if the caller hangs up before."""

    def __init__(self, *chunks: bytes, then: Answer | None = None) -> None:
        self.chunks, self.then = chunks, then or canned()
        self.arrived, self.release, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = await event_stream(request, *self.chunks) if self.chunks else None
        self.arrived.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.gone.set()
            raise
        return response or await self.then(request)


@dataclass
class Call:
    """A call that the gateway received."""

    url: URL
    headers: CIMultiDict[str]
    body: bytes


@dataclass
class Upstream:
    """A gateway that gives ``answers`` one by one, and then a good answer to every call."""

    url: URL = field(default_factory=URL)
    calls: list[Call] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.calls.append(Call(request.rel_url, CIMultiDict(request.headers), body))
        answer = self.answers.pop(0) if self.answers else canned()
        return await answer(request)

    @property
    def keys(self) -> list[list[str]]:
        """The values of the routing-key headers of each call."""
        return [call.headers.getall(KEY, []) for call in self.calls]


class Texts(Agent):
    """An agent whose turns a test writes, and whose answers it sees."""

    async def say(self, *texts: str, **more: object) -> tuple[int, Json]:
        """Play a turn whose conversation is ``texts``; return the answer's status and JSON."""
        async with self.post(*texts, **more) as response:
            return response.status, await response.json()

    def post(self, *texts: str, **more: object) -> Any:
        messages = [user(text) for text in texts]
        return self.client.post(self.chat_url, json={"model": "m", "messages": messages, **more})

    def start(self, *texts: str, **more: object) -> "asyncio.Task[tuple[int, Json]]":
        return asyncio.create_task(self.say(*texts, **more))

    async def until_transcript_is(self, turns: int, *messages: Json) -> None:
        async def poll() -> None:
            while await self.transcript() != (turns, list(messages)):
                pass

        await soon(poll())


@asynccontextmanager
async def hanging_up(agent: Texts, *texts: str) -> AsyncIterator[None]:
    """Start a turn of an agent that hangs up at the end of the block."""
    async with ClientSession() as http:
        turn = Texts(http, agent.url).start(*texts)
        yield
    with pytest.raises(aiohttp.ClientError):
        await soon(turn)


Start = Callable[..., Coroutine[Any, Any, Texts]]


@pytest.fixture
async def upstream(aiohttp_server: "AiohttpServer") -> Upstream:
    gateway = Upstream()
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/{path:.*}", gateway.handle)
    server = await aiohttp_server(app)
    gateway.url = server.make_url("/")
    return gateway


@pytest.fixture
def start(aiohttp_server: "AiohttpServer", client: ClientSession, upstream: Upstream) -> Start:
    """Start a session server in front of ``upstream``, with a session, and return its agent."""

    async def start(
        session_id: str = "s", *, smg_routing: Json | None = None, **gateway: object
    ) -> Texts:
        settings: Json = {"gateway": {"url": str(upstream.url), **gateway}}
        if smg_routing is not None:
            settings["smg_routing"] = smg_routing
        server = await aiohttp_server(session_server.make_app(settings))
        agent = Texts(client, server.make_url("/sessions") / session_id)
        await make_session(client, server.make_url("/sessions"), session_id)
        return agent

    return start


async def make_session(client: ClientSession, sessions: URL, session_id: str) -> None:
    async with client.post(sessions, json={"session_id": session_id}) as response:
        assert response.status == 201
        assert await response.json() == {"session_id": session_id}


# Sessions


async def test_a_session_gets_an_id_of_its_own(start: Start) -> None:
    agent = await start()
    ids = set()
    for body in (None, b"", b"{}"):
        async with agent.client.post(agent.url.parent, data=body) as response:
            assert response.status == 201
            ids.add((await response.json())["session_id"])
    assert len(ids) == 3
    for session_id in ids:
        assert await Texts(agent.client, agent.url.parent / session_id).transcript() == (0, [])


async def test_an_id_that_is_taken_is_refused(start: Start) -> None:
    agent = await start("mine")
    await agent.say("hi")
    async with agent.client.post(agent.url.parent, json={"session_id": "mine"}) as response:
        assert response.status == 409
        assert (await response.json())["error"]["code"] == "session_exists"
    assert (await agent.transcript())[0] == 1


async def test_a_deleted_session_is_gone(start: Start) -> None:
    agent = await start()
    async with agent.client.delete(agent.url) as response:
        assert response.status == 204
    for method, url in (("GET", agent.url), ("DELETE", agent.url), ("POST", agent.chat_url)):
        async with agent.client.request(method, url, json={"messages": [user("hi")]}) as response:
            assert response.status == 404
            error = (await response.json())["error"]
            assert error == {
                "message": "There is no session 's'.",
                "type": "invalid_request_error",
                "code": "session_not_found",
            }


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"null", b"[" * 200_000])
async def test_a_body_that_is_no_json_object_is_refused(
    start: Start, upstream: Upstream, body: bytes
) -> None:
    agent = await start()
    for url in (agent.url.parent, agent.chat_url):
        async with agent.client.post(url, data=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "invalid_json"
    assert not upstream.calls


@pytest.mark.parametrize("session_id", [7, None, "", " ", ["a"]])
async def test_a_session_id_that_is_no_text_is_refused(start: Start, session_id: object) -> None:
    agent = await start()
    async with agent.client.post(agent.url.parent, json={"session_id": session_id}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "invalid_session_id"


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": "hi"}, {"messages": ["hi"]}])
async def test_a_turn_without_messages_is_refused(
    start: Start, upstream: Upstream, body: Json
) -> None:
    agent = await start()
    async with agent.client.post(agent.chat_url, json=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "invalid_messages"
    assert not upstream.calls


async def test_health_answers(start: Start) -> None:
    agent = await start()
    async with agent.client.get(agent.url.join(URL("/health"))) as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})


# Turns


async def test_a_turn_is_kept_with_its_reply(start: Start, upstream: Upstream) -> None:
    agent = await start()
    upstream.answers = [canned(text="one"), canned(text="two")]
    status, answer = await agent.say("hi")
    assert (status, answer["choices"][0]["message"]) == (200, assistant("one"))
    assert await agent.transcript() == (1, [user("hi"), assistant("one")])
    await agent.say("hi", "and", "more")
    sent = [user("hi"), user("and"), user("more")]
    assert await agent.transcript() == (2, [*sent, assistant("two")])


async def test_the_gateway_gets_the_body_byte_for_byte(start: Start, upstream: Upstream) -> None:
    agent = await start()
    body = b'{ "messages":[{"role":"user","content":"\\u00e9"}] , "seed": 1.50 }'
    async with agent.client.post(agent.chat_url, data=body):
        pass
    assert [call.body for call in upstream.calls] == [body]


async def test_a_conversation_of_megabytes_passes(start: Start, upstream: Upstream) -> None:
    agent = await start()
    body = json.dumps({"messages": [user("x" * 3 * 2**20)]}).encode()
    async with agent.client.post(agent.chat_url, data=io.BytesIO(body)) as response:
        assert response.status == 200
    assert [call.body for call in upstream.calls] == [body]


@pytest.mark.parametrize("status", [400, 401, 404, 422, 501])
async def test_an_error_not_worth_retrying_is_passed_on_and_rolled_back(
    start: Start, upstream: Upstream, status: int
) -> None:
    agent = await start()
    await agent.say("hi")
    upstream.answers = [canned(status, "your fault")]
    assert await agent.say("hi", "no") == (status, {"error": {"message": "your fault"}})
    assert len(upstream.calls) == 2
    assert await agent.transcript() == (1, [user("hi"), assistant("reply")])


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_an_error_worth_retrying_is_retried(
    start: Start, upstream: Upstream, status: int
) -> None:
    agent = await start()
    upstream.answers = [canned(status, Retry_After="0")]
    assert (await agent.say("hi"))[0] == 200
    first, second = upstream.calls
    assert first.body == second.body
    assert await agent.transcript() == (1, [user("hi"), assistant("reply")])


async def test_the_last_try_speaks_for_itself(start: Start, upstream: Upstream) -> None:
    agent = await start(retries=2)
    await agent.say("hi")
    upstream.answers = [
        canned(503, "first", Retry_After="0"),
        drops_the_connection,
        canned(429, "third", Retry_After="0"),
    ]
    assert await agent.say("hi", "again") == (429, {"error": {"message": "third"}})
    assert len(upstream.calls) == 4
    assert await agent.transcript() == (1, [user("hi"), assistant("reply")])


async def test_without_retries_there_is_one_try(start: Start, upstream: Upstream) -> None:
    agent = await start(retries=0)
    upstream.answers = [canned(503, "busy")]
    assert await agent.say("hi") == (503, {"error": {"message": "busy"}})
    assert len(upstream.calls) == 1


async def test_a_dropped_connection_is_retried(start: Start, upstream: Upstream) -> None:
    agent = await start(retries=1)
    upstream.answers = [drops_the_connection]
    assert (await agent.say("hi"))[0] == 200
    assert len(upstream.calls) == 2
    assert (await agent.transcript())[0] == 1


async def test_no_connection_is_a_502(start: Start) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        agent = await start(url=f"http://127.0.0.1:{nobody.getsockname()[1]}", retries=1)
        status, answer = await agent.say("hi")
    assert status == 502
    error = {"message": "The gateway gave no answer.", "type": "gateway_error"}
    assert answer == {"error": {**error, "code": "no_answer"}}
    assert await agent.transcript() == (0, [])


async def test_a_silent_gateway_is_a_504(start: Start, upstream: Upstream) -> None:
    agent = await start(retries=1, timeout_seconds=0.1)
    upstream.answers = [Held(), Held()]
    status, answer = await agent.say("hi")
    assert status == 504
    error = {"message": "The gateway was silent for 0.1 seconds.", "type": "gateway_error"}
    assert answer == {"error": {**error, "code": "timeout"}}
    assert await agent.transcript() == (0, [])


async def test_an_answer_without_a_reply_is_no_turn(start: Start, upstream: Upstream) -> None:
    agent = await start()

    choices = [{"message": assistant("no")}]
    for status, text in (
        (200, "ok"),
        (200, "[]"),
        (200, '{"choices": []}'),
        (200, '{"choices": [{"message": "no"}]}'),
        (400, json.dumps({"choices": choices})),
    ):

        async def answer(request: web.Request) -> web.Response:
            return web.Response(text=text, status=status)  # noqa: B023

        upstream.answers = [answer]
        async with agent.post("hi") as response:
            assert (response.status, await response.text()) == (status, text)
        assert await agent.transcript() == (0, [])


async def test_a_turn_that_the_engine_aborts_is_retried(start: Start, upstream: Upstream) -> None:
    agent = await start(retries=1)
    await agent.say("hi")
    upstream.answers = [canned(text="rep", finish_reason="abort")]
    status, answer = await agent.say("hi", "more")
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "stop")
    _, aborted, again = upstream.calls
    assert aborted.body == again.body
    assert await agent.transcript() == (2, [user("hi"), user("more"), assistant("reply")])


async def test_a_turn_that_the_engine_aborts_each_time_is_a_503_and_rolled_back(
    start: Start, upstream: Upstream
) -> None:
    agent = await start(retries=1)
    await agent.say("hi")
    upstream.answers = [canned(text="rep", finish_reason="abort")] * 2
    status, answer = await agent.say("hi", "more")
    assert status == 503
    error = {"message": "The engine aborted the turn; try it again.", "type": "gateway_error"}
    assert answer == {"error": {**error, "code": "aborted"}}
    assert await agent.transcript() == (1, [user("hi"), assistant("reply")])


async def test_a_turn_of_several_choices_is_aborted_with_one_of_them(
    start: Start, upstream: Upstream
) -> None:
    agent = await start(retries=0)
    choices = [{"message": assistant(each), "finish_reason": each} for each in ("stop", "abort")]

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"choices": choices})

    upstream.answers = [answer]
    assert (await agent.say("hi", n=2))[0] == 503
    assert await agent.transcript() == (0, [])


async def test_a_turn_is_rolled_back_between_its_tries(start: Start, upstream: Upstream) -> None:
    agent = await start()
    held = Held(then=canned(503, Retry_After="10"))
    upstream.answers = [held]
    async with hanging_up(agent, "hi"):
        await soon(held.arrived.wait())
        assert await agent.transcript() == (0, [user("hi")])
        held.release.set()
        await agent.until_transcript_is(0)
        assert len(upstream.calls) == 1
    # The turn ended with its agent, so the next one doesn't wait for the pause between tries.
    assert (await soon(agent.say("hello")))[0] == 200
    assert await agent.transcript() == (1, [user("hello"), assistant("reply")])


async def test_pauses_double(
    start: Start, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []

    def no_pause(response: web.Response, pause: float) -> float:
        pauses.append(pause)
        return 0

    monkeypatch.setattr(session_server, "seconds_to_wait", no_pause)
    agent = await start(retries=9)
    upstream.answers = [canned(500)] * 9
    assert (await agent.say("hi"))[0] == 200
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [("0", 0), ("3", 3), ("0.5", 0.5), ("3600", 10), ("inf", 10), ("nan", 0), ("-1", 0)],
)
def test_a_numeric_retry_after_is_honoured_up_to_a_cap(retry_after: str, seconds: float) -> None:
    response = web.Response(headers={"Retry-After": retry_after})
    assert session_server.seconds_to_wait(response, 0.1) == seconds


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}])
def test_other_pauses_are_spread(headers: dict[str, str]) -> None:
    pauses = {session_server.seconds_to_wait(web.Response(headers=headers), 4) for _ in range(100)}
    assert len(pauses) > 1
    assert all(2 <= pause <= 4 for pause in pauses)


# Several turns at once


class WatchedLock(asyncio.Lock):
    """A lock that sets an event when a task has to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.contended = asyncio.Event()

    async def acquire(self) -> Any:
        if self.locked():
            self.contended.set()
        return await super().acquire()


@pytest.fixture
def watched_lock(monkeypatch: pytest.MonkeyPatch) -> WatchedLock:
    """Return the lock of the test's only session."""
    lock = WatchedLock()
    make = session_server.Session
    monkeypatch.setattr(session_server, "Session", lambda session_id: make(session_id, lock=lock))
    return lock


async def test_turns_of_a_session_are_kept_apart(
    start: Start, upstream: Upstream, watched_lock: WatchedLock
) -> None:
    agent = await start()
    held = Held(then=canned(503, Retry_After="0"))
    upstream.answers = [held, canned(text="one"), canned(text="two")]
    first = agent.start("first")
    await soon(held.arrived.wait())
    second = agent.start("second")
    await soon(watched_lock.contended.wait())
    assert await agent.transcript() == (0, [user("first")])
    held.release.set()
    assert (await soon(first))[1]["choices"][0]["message"] == assistant("one")
    assert (await soon(second))[1]["choices"][0]["message"] == assistant("two")
    sent = [json.loads(call.body)["messages"] for call in upstream.calls]
    assert sent == [[user("first")], [user("first")], [user("second")]]
    assert await agent.transcript() == (2, [user("second"), assistant("two")])


async def test_a_turn_that_waited_finds_its_session_deleted(
    start: Start, upstream: Upstream, watched_lock: WatchedLock
) -> None:
    agent = await start()
    held = Held()
    upstream.answers = [held]
    first = agent.start("first")
    await soon(held.arrived.wait())
    second = agent.start("second")
    await soon(watched_lock.contended.wait())
    async with agent.client.delete(agent.url) as response:
        assert response.status == 204
    held.release.set()
    assert (await soon(first))[0] == 200
    assert (await soon(second))[0] == 404
    assert len(upstream.calls) == 1


async def test_no_session_waits_for_another(start: Start, upstream: Upstream) -> None:
    agent = await start()
    everyone = [Held() for _ in range(120)]  # more than a ClientSession has connections by default
    upstream.answers = [*everyone]
    async with ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        turns = []
        for number in range(len(everyone)):
            await make_session(http, agent.url.parent, f"s{number}")
            turns.append(Texts(http, agent.url.parent / f"s{number}").start("hi"))
        await soon(asyncio.gather(*(held.arrived.wait() for held in everyone)))
        for held in everyone:
            held.release.set()
        assert [status for status, _ in await soon(asyncio.gather(*turns))] == [200] * 120


# Streams


async def test_a_stream_passes_as_it_arrives(start: Start, upstream: Upstream) -> None:
    agent = await start()
    first, second = event(role="assistant", content="Hel"), event(content="lo")
    seen, done = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await event_stream(request, first)
        await soon(seen.wait())
        await response.write(second + DONE)
        await soon(done.wait())
        await response.write(DONE)
        return response

    upstream.answers = [answer]
    async with agent.post("hi", stream=True) as response:
        assert response.content_type == "text/event-stream"
        assert await soon(response.content.readexactly(len(first))) == first
        assert await agent.transcript() == (0, [user("hi")])
        seen.set()
        assert await soon(response.content.readexactly(len(second + DONE))) == second + DONE
        done.set()
        assert await soon(response.read()) == DONE
    assert await agent.transcript() == (1, [user("hi"), assistant("Hello")])


async def test_a_stream_passes_byte_for_byte(start: Start, upstream: Upstream) -> None:
    agent = await start()
    chunks = (b": hello\r\n\r\n", b"event: x\r\nid: 1\r\ndata:  {}\r", b"\n\r\n", DONE, b"tail")
    upstream.answers = [streamed(*chunks)]
    async with agent.post("hi", stream=True) as response:
        assert await response.read() == b"".join(chunks)


@pytest.mark.parametrize(
    "chunks",
    [
        (event(content="Hel"),),
        (event(content="Hel"), b'data: {"error": {"message": "no memory"}}\n\n', DONE),
        (event(content="Hel"), b"data: {oops\n\n", DONE),
        (event(content="Hel"), event(content=["lo"], tool_calls=[{"index": 1}]), DONE),
    ],
    ids=["no end", "error event", "no JSON", "no delta"],
)
@pytest.mark.parametrize("answer", [broken_off, streamed])
async def test_a_stream_without_its_reply_is_cut_and_rolled_back(
    start: Start, upstream: Upstream, chunks: tuple[bytes, ...], answer: Callable[..., Answer]
) -> None:
    agent = await start(retries=2)
    await agent.say("hi")
    upstream.answers = [answer(*chunks)]
    async with agent.post("hi", "more", stream=True) as response:
        assert await soon(response.content.readexactly(len(chunks[0]))) == chunks[0]
        with pytest.raises(aiohttp.ClientPayloadError):
            await soon(response.read())
    assert len(upstream.calls) == 2
    assert await agent.transcript() == (1, [user("hi"), assistant("reply")])


async def test_a_stream_that_the_engine_aborts_is_cut_before_its_end_and_rolled_back(
    start: Start, upstream: Upstream
) -> None:
    agent = await start()
    await agent.say("hi")
    first, seen = event(content="Hel"), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await event_stream(request, first)
        await soon(seen.wait())
        await response.write(event(content="l") + event(finish_reason="abort") + DONE)
        return response

    upstream.answers = [answer]
    async with agent.post("hi", "more", stream=True) as response:
        assert await soon(response.content.readexactly(len(first))) == first
        seen.set()
        with pytest.raises(aiohttp.ClientPayloadError):  # a [DONE] would look complete
            await soon(response.content.readany())
    assert await agent.transcript() == (1, [user("hi"), assistant("reply")])
    async with agent.post("hi", "more", stream=True) as response:  # the agent retries
        await response.read()
    assert (await agent.transcript())[0] == 2


async def test_a_stream_that_the_engine_aborts_before_its_first_piece_is_retried(
    start: Start, upstream: Upstream
) -> None:
    agent = await start(retries=1)
    whole = event(content="Hello") + DONE
    aborted = streamed(event(finish_reason="abort") + DONE)
    upstream.answers = [aborted, streamed(whole)]
    async with agent.post("hi", stream=True) as response:
        assert (response.status, await response.read()) == (200, whole)
    assert await agent.transcript() == (1, [user("hi"), assistant("Hello")])
    upstream.answers = [aborted] * 2
    status, answer = await agent.say("hi", "more", stream=True)
    assert (status, answer["error"]["code"]) == (503, "aborted")
    assert (await agent.transcript())[0] == 1


async def test_a_stream_that_falls_silent_is_cut(start: Start, upstream: Upstream) -> None:
    agent = await start(timeout_seconds=2)
    held = Held(event(content="Hel"))
    upstream.answers = [held]
    async with agent.post("hi", stream=True) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await soon(response.read())
    await soon(held.gone.wait())
    assert await agent.transcript() == (0, [])


async def test_a_stream_that_breaks_before_its_first_byte_is_retried(
    start: Start, upstream: Upstream
) -> None:
    agent = await start()
    whole = event(content="Hello") + DONE
    upstream.answers = [broken_off(), streamed(), streamed(whole)]
    async with agent.post("hi", stream=True) as response:
        assert (response.status, await response.read()) == (200, whole)
    assert len(upstream.calls) == 3
    assert await agent.transcript() == (1, [user("hi"), assistant("Hello")])


async def test_an_error_in_place_of_a_stream_is_retried(start: Start, upstream: Upstream) -> None:
    agent = await start()
    upstream.answers = [canned(503, Retry_After="0"), streamed(event(content="Hello") + DONE)]
    async with agent.post("hi", stream=True) as response:
        assert response.status == 200
        await response.read()
    assert await agent.transcript() == (1, [user("hi"), assistant("Hello")])


async def test_tool_calls_are_assembled(start: Start, upstream: Upstream) -> None:
    def call(index: int, **function: str) -> bytes:
        return event(tool_calls=[{"index": index, "function": function}])

    def opening(index: int, name: str) -> bytes:
        function = {"name": name, "arguments": ""}
        head = {"index": index, "id": f"call_{index}", "type": "function", "function": function}
        return event(role="assistant", content=None, tool_calls=[head])

    agent = await start()
    upstream.answers = [
        streamed(
            event(role="assistant", content=None, tool_calls=None),
            event(reasoning_content="Hm"),
            event(reasoning_content="m."),
            *(opening(0, "look"), call(0, arguments='{"x":'), call(0, name="", arguments=" 1}")),
            *(opening(1, "go"), call(1, arguments="{}")),
            b'data: {"choices": [{"index": 1, "delta": {"content": "another choice"}}]}\n\n',
            b'data: {"choices": [], "usage": {"prompt_tokens": 1}}\n\n',
            DONE,
        )
    ]
    async with agent.post("hi", stream=True) as response:
        await response.read()

    def whole(index: int, name: str, arguments: str) -> Json:
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{index}", "type": "function", "function": function}

    reply = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hmm.",
        "tool_calls": [whole(0, "look", '{"x": 1}'), whole(1, "go", "{}")],
    }
    assert await agent.transcript() == (1, [user("hi"), reply])


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_chunk_may_end_anywhere(newline: bytes) -> None:
    delta = '{"choices": [{"delta": {"content": "naïve ✓"}}]}'.encode()
    stream = (b"data: %b\n\n" % delta).replace(b"\n", newline)
    reply = session_server.StreamedReply()
    for byte in stream + stream + b"data:[DONE]" + newline:
        assert not reply.done
        reply.feed(bytes([byte]))
    assert reply.done
    assert reply.message == assistant("naïve ✓naïve ✓")


# Agents that hang up


async def test_an_agent_that_leaves_takes_its_turn_back(start: Start, upstream: Upstream) -> None:
    agent = await start()
    await agent.say("hi")
    held = Held()
    upstream.answers = [held]
    async with hanging_up(agent, "hi", "bye"):
        await soon(held.arrived.wait())
    await agent.until_transcript_is(1, user("hi"), assistant("reply"))
    assert (await soon(agent.say("hello")))[0] == 200
    assert len(upstream.calls) == 3


async def test_an_agent_that_leaves_a_stream_takes_its_turn_back(
    start: Start, upstream: Upstream
) -> None:
    agent = await start()
    held = Held(event(content="Hel"))
    upstream.answers = [held]
    async with agent.post("hi", stream=True) as response:
        await soon(response.content.readany())
        response.close()
    await soon(held.gone.wait())
    await agent.until_transcript_is(0)
    assert (await soon(agent.say("hello")))[0] == 200


async def test_an_agent_that_leaves_with_its_reply_keeps_its_turn(
    start: Start, upstream: Upstream
) -> None:
    agent = await start()
    whole = event(content="Hello") + DONE
    held = Held(whole)
    upstream.answers = [held]
    async with agent.post("hi", stream=True) as response:
        assert await soon(response.content.readexactly(len(whole))) == whole
        assert await agent.transcript() == (1, [user("hi"), assistant("Hello")])
        response.close()
    await soon(held.gone.wait())
    assert (await soon(agent.say("hi", "more")))[0] == 200
    assert (await agent.transcript())[0] == 2


# A proxy


async def test_end_to_end_headers_of_the_agent_are_copied(start: Start, upstream: Upstream) -> None:
    agent = await start(url=f"{upstream.url}base")
    copied = [
        ("Authorization", "Bearer key"),
        ("Cookie", "a=b"),
        ("User-Texts", "agent/1"),
        ("X-Twice", "1"),
        ("X-Twice", "2"),
    ]
    dropped = {"Connection": "X-Hop, close", "X-Hop": "1", "TE": "trailers", "Keep-Alive": "9"}
    headers = CIMultiDict([*copied, *dropped.items(), ("Accept-Encoding", "x-own")])
    body = json.dumps({"messages": [user("hi")]}).encode()
    headers.update({"Content-Encoding": "gzip", "Content-Type": "application/json; v=1"})
    url = agent.chat_url.with_query({"q": "a b&c"})
    async with agent.client.post(url, data=gzip.compress(body), headers=headers) as response:
        assert response.status == 200
    (call,) = upstream.calls
    assert call.url == URL("/base/v1/chat/completions").with_query({"q": "a b&c"})
    assert call.body == body
    assert call.headers.getall("X-Twice") == ["1", "2"]
    assert call.headers.getall("Content-Type") == ["application/json; v=1"]
    assert call.headers.getall("Content-Length") == [str(len(body))]
    assert call.headers.getall("Host") == [upstream.url.authority]
    assert copied == [pair for pair in call.headers.items() if pair in copied]
    assert not {"Content-Encoding", "Keep-Alive", "TE", "X-Hop"} & set(call.headers)
    assert "x-own" not in call.headers["Accept-Encoding"]


async def test_an_upload_in_chunks_is_sent_on_in_one_piece(
    start: Start, upstream: Upstream
) -> None:
    agent = await start()
    body = json.dumps({"messages": [user("hi")]}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for byte in body:
            yield bytes([byte])

    async with agent.client.post(agent.chat_url, data=chunks(), expect100=True) as response:
        assert response.status == 200
    (call,) = upstream.calls
    assert call.body == body
    assert call.headers.getall("Content-Length") == [str(len(body))]
    assert not {"Expect", "Transfer-Encoding"} & set(call.headers)


@pytest.mark.parametrize("stream", [True, False])
async def test_end_to_end_headers_of_the_gateway_are_copied(
    start: Start, upstream: Upstream, stream: bool
) -> None:
    whole = event(content="Hello") + DONE

    async def answer(request: web.Request) -> web.Response:
        response = web.Response(status=200 if stream else 418, reason="Fine", body=whole)
        response.headers["Content-Type"] = "text/event-stream" if stream else "text/plain"
        response.headers["X-Request-Id"] = "r1"
        response.headers.extend([("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])
        response.headers.update({"Connection": "X-Hop", "X-Hop": "1"})
        response.enable_compression(web.ContentCoding.gzip)
        return response

    agent = await start()
    upstream.answers = [answer]
    async with agent.post("hi", stream=stream) as response:
        assert await response.read() == whole
    assert response.reason == "Fine"
    assert response.headers["X-Request-Id"] == "r1"
    assert response.headers.getall("Set-Cookie") == ["a=1", "b=2"]
    assert response.headers.getall("Content-Type") == [
        "text/event-stream" if stream else "text/plain"
    ]
    assert not {"Content-Encoding", "X-Hop"} & set(response.headers)


async def test_cookies_of_one_session_stay_out_of_others(start: Start, upstream: Upstream) -> None:
    agent = await start(url=str(upstream.url.with_host("localhost")))
    upstream.answers = [canned(Set_Cookie="a=1")]
    await agent.say("hi")
    await agent.say("hi")
    assert [call.headers.get("Cookie") for call in upstream.calls] == [None, None]


async def test_a_redirect_is_the_agents_to_follow(start: Start, upstream: Upstream) -> None:
    agent = await start()
    upstream.answers = [canned(307, Location="/elsewhere")]
    async with agent.client.post(
        agent.chat_url, json={"messages": [user("hi")]}, allow_redirects=False
    ) as response:
        assert (response.status, response.headers["Location"]) == (307, "/elsewhere")
    assert len(upstream.calls) == 1


# The plugin


def routing(upstream: Upstream, **config: object) -> Json:
    return {"gateway": str(upstream.url), "client_session": "client_session", **config}


async def test_every_try_of_every_turn_carries_the_session_id(
    start: Start, upstream: Upstream
) -> None:
    agent = await start("episode-7", smg_routing=routing(upstream, enabled=True))
    upstream.answers = [canned(503, Retry_After="0"), drops_the_connection]
    assert (await agent.say("hi"))[0] == 200
    upstream.answers = [canned(500, Retry_After="0"), streamed(event(content="Hello") + DONE)]
    async with agent.post("hi", "more", stream=True) as response:
        await response.read()
    assert (await agent.transcript())[0] == 2
    assert upstream.keys == [["episode-7"]] * 5


async def test_the_plugin_can_be_switched_off(start: Start, upstream: Upstream) -> None:
    agent = await start(smg_routing=routing(upstream, enabled=False))
    upstream.answers = [canned(503, Retry_After="0")]
    assert (await agent.say("hi"))[0] == 200
    assert upstream.keys == [[], []]


async def test_without_its_table_there_is_no_plugin(start: Start, upstream: Upstream) -> None:
    agent = await start()
    await agent.say("hi")
    async with agent.client.post(
        agent.chat_url, json={"messages": [user("hi")]}, headers={KEY: "copied as any other"}
    ):
        pass
    assert upstream.keys == [[], ["copied as any other"]]


# The command line


def settings_file(folder: Path, text: str) -> Path:
    file = folder / "settings.toml"
    file.write_text(text)
    return file


def run(monkeypatch: pytest.MonkeyPatch, file: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["session_server.py", str(file)])
    status: int = session_server.main()
    return status


GATEWAY = '[gateway]\nurl = "http://127.0.0.1:9"\n'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[gateway", "Expected ']'"),
        ("", "[gateway] url: '' is not an absolute http(s) URL"),
        ('[gateway]\nurl = "localhost:30000"', "url: 'localhost:30000' is not an absolute"),
        ('[gateway]\nurl = "http:///v1"', "url: 'http:///v1' is not an absolute"),
        ("[gateway]\nurl = 7", "[gateway] url: 7 is not of type str"),
        (GATEWAY + "retrys = 2", "retrys: unknown, the keys are url, timeout_seconds, retries"),
        (GATEWAY + "retries = -1", "[gateway] retries: -1 is less than 0"),
        (GATEWAY + "retries = true", "[gateway] retries: True is not of type int"),
        (GATEWAY + "timeout_seconds = 0", "[gateway] timeout_seconds: 0 is not above 0"),
        (GATEWAY + "timeout_seconds = nan", "[gateway] timeout_seconds: nan is not above 0"),
        ("gateway = 7", "gateway: 7 is not a table"),
        (GATEWAY + '[server]\nport = "80"', "[server] port: '80' is not of type int"),
        (GATEWAY + "[server]\nport = 65536", "[server] cannot listen on 127.0.0.1:65536: "),
        (GATEWAY + '[server]\nhost = "no host"', "[server] cannot listen on no host:8080: "),
        (GATEWAY + "[smg_routing]\ngatewai = 1\nkey = 2", "gatewai"),
        (
            GATEWAY + '[smg_routing]\ngateway = "http://127.0.0.1:9"\nclient_session = "other"',
            "'other'",
        ),
    ],
)
def test_a_fault_in_the_settings_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: str,
    fault: str,
) -> None:
    file = settings_file(tmp_path, text)
    assert run(monkeypatch, file) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"{file}: ")
    assert fault in line


def test_a_port_that_is_taken_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file = settings_file(tmp_path, f"{GATEWAY}[server]\nport = {port}")
        assert run(monkeypatch, file) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"[server] cannot listen on 127.0.0.1:{port}: " in line


def test_a_missing_toml_reader_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    monkeypatch.setitem(sys.modules, name, None)
    assert run(monkeypatch, settings_file(tmp_path, GATEWAY)) == 2
    assert "pip install tomli" in capsys.readouterr().err


async def test_a_missing_file_ends_the_program_with_status_2(tmp_path: Path) -> None:
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, str(PROGRAM), str(tmp_path / "none.toml")), stdout=PIPE, stderr=PIPE
    )
    out, err = await soon(program.communicate())
    assert (program.returncode, out) == (2, b"")
    assert len(err.splitlines()) == 1
    assert b"none.toml" in err


def test_the_example_settings_are_good() -> None:
    settings = session_server.read_settings(PROGRAM.with_suffix(".toml"))
    assert set(settings) == {"server", "gateway", "smg_routing"}
    app = session_server.make_app(settings)
    assert app[session_server.GATEWAY].url == settings["smg_routing"]["gateway"]
    assert len(app.middlewares) == 1


# Its output goes to a pipe, as it does under a supervisor, and a warning is an error.
PIPED = {"PYTHONUNBUFFERED": "", "PYTHONWARNINGS": "error"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_program_ends_well_after_its_running_turns(
    client: ClientSession, upstream: Upstream, tmp_path: Path, number: signal.Signals
) -> None:
    async with servers.session_server(upstream.url, folder=tmp_path, env=PIPED) as server:
        program, sessions = server.process, server.url / "sessions"
        await make_session(client, sessions, "s")
        held = Held()
        upstream.answers = [held]
        turn = Texts(client, sessions / "s").start("hi")
        await soon(held.arrived.wait())
        program.send_signal(number)
        await soon(until_refused(sessions))
        held.release.set()
        assert (await soon(turn))[0] == 200
        out, _ = await soon(program.communicate())
        assert (program.returncode, out) == (0, b"")
    assert upstream.keys == [["s"]]


async def test_the_program_takes_broken_connections_calmly(
    client: ClientSession, upstream: Upstream, tmp_path: Path
) -> None:
    async with servers.session_server(upstream.url, folder=tmp_path, env=PIPED) as server:
        program, sessions = server.process, server.url / "sessions"
        await make_session(client, sessions, "s")
        agent = Texts(client, sessions / "s")
        held = Held()
        upstream.answers = [held, broken_off(event(content="Hel"))]
        async with hanging_up(agent, "hi"):
            await soon(held.arrived.wait())
        await agent.until_transcript_is(0)
        async with agent.post("hi", stream=True) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await soon(response.read())
        assert await agent.transcript() == (0, [])
        program.terminate()
        await soon(program.communicate())
        log = server.log.read_text("utf-8")
        assert program.returncode == 0
        assert "Traceback" not in log
        assert "session s: ClientPayloadError" in log
