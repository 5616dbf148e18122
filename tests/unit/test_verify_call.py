"""One call to a real server: how ``verify`` reads the answer, and what counts as no answer."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import FrozenInstanceError

import pytest
from aiohttp import web
from yarl import URL

from aiohttp_smg_routing.testing import free_port
from aiohttp_smg_routing.verify import ask, call
from aiohttp_smg_routing.verify.call import CallError, Client, Reply
from aiohttp_smg_routing.verify.seen import Counters, Failure, GatewayLoad, Plan, Seen, Turn
from harness.agents import CHAT
from harness.processes import local_url
from harness.servers import serve

from ..clock import let_pass
from ..verify_servers import fake_gateway

SECRET = "sesame"


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with Client(60, SECRET) as client:
        yield client


async def chat(client: Client, answer: web.Response) -> Reply | Failure:
    """Send a turn to a server that gives ``answer``."""

    async def handler(request: web.Request) -> web.Response:
        return answer

    async with serve(fake_gateway(handler)) as url:
        try:
            return await client.chat(url / CHAT, {}, {})
        except CallError as error:
            return error.failure


def sse(*events: object, worker: str | None = "http://w:1") -> web.Response:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return web.Response(
        text=": a comment\n\n" + "".join(f"data: {line}\n\n" for line in lines),
        headers={"x-smg-routed-worker-id": worker} if worker else {},
    )


def delta(**fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields}]}


async def test_reply_is_read_to_its_end(client: Client) -> None:
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    reply = await chat(
        client,
        sse(
            {"choices": []},
            delta(role="assistant", content=""),
            delta(content="Hel"),
            delta(content="lo"),
            {"choices": [{"index": 0, "delta": None}], "usage": None},
            {"choices": [], "usage": usage, "error": None},
            "[DONE]",
        ),
    )
    assert isinstance(reply, Reply)
    assert (reply.text, reply.worker) == ("Hello", "http://w:1")
    assert (reply.prompt_tokens, reply.cached_tokens) == (9, 4)
    assert reply.first_token_seconds is not None
    assert reply.first_token_seconds > 0


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens_details": None},
        "odd",
        {"prompt_tokens": -1},
        {"prompt_tokens": 10**400},
    ],
)
async def test_what_is_not_told_is_none(client: Client, usage: object) -> None:
    reply = await chat(client, sse({"usage": usage}, "[DONE]", worker=None))
    assert reply == Reply("", None, None, None, None)


@pytest.mark.parametrize(
    "it",
    [
        Reply("", None, None, None, None),
        *(Failure("refused", URL()), Turn("keyed", 1, 1, "first"), Seen(Plan(URL(), URL()))),
        *(Plan(URL(), URL()), Counters(), GatewayLoad()),
    ],
    ids=lambda it: type(it).__name__,
)
def test_what_was_seen_stays_as_it_came(it: object) -> None:
    [name, *_] = it.__slots__  # type: ignore[attr-defined]
    with pytest.raises(FrozenInstanceError):
        setattr(it, name, "another")


async def test_reasoning_counts_as_the_first_token(client: Client) -> None:
    reply = await chat(client, sse(delta(reasoning_content="hm", content=None), "[DONE]"))
    assert isinstance(reply, Reply)
    assert reply.text == ""
    assert reply.first_token_seconds is not None


# Python's own error messages
DEEP = "maximum recursion depth exceeded" if sys.version_info < (3, 14) else "Stack overflow"


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ((delta(content="Hel"),), "the answer is not a stream that ends in [DONE]"),
        (({"error": {"message": "boom"}},), 'the stream says {"error": {"message": "boom"}}'),
        (("[1]",), "the stream says [1]"),
        (("{",), "Expecting property name"),
        ((100_000 * "[",), DEEP),
        ((f'{{"x": "{600_000 * "x"}"}}',), ""),
        (20 * (f'{{"x": "{60_000 * "x"}"}}',), "the answer has more than"),
    ],
)
async def test_stream_that_is_not_whole_is_no_answer(
    client: Client, events: tuple[object, ...], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "_LARGEST", 2**20)
    failure = await chat(client, sse(*events))
    assert isinstance(failure, Failure)
    assert failure.kind == "broken"
    assert failure.text.startswith(text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"error": {"message": "no such model"}}', "no such model"),
        ('{"message": "not today"}', "not today"),
        ('{"error": "plain"}', '{"error": "plain"}'),
        ("<h1>\x1b[31m Bad\r\n  Gateway</h1>", "<h1> [31m Bad Gateway</h1>"),
        (f"your key {SECRET} is wrong", "your key *** is wrong"),
        (300 * "x", 200 * "x"),
        (60_000 * "[", 200 * "["),
        (100_000 * "x", 200 * "x"),
        ("", ""),
    ],
)
async def test_error_shows_what_the_server_says_and_no_secret(
    client: Client, body: str, text: str
) -> None:
    failure = await chat(client, web.Response(status=502, text=body))
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.status, failure.text) == ("status", 502, text)


@pytest.mark.parametrize("repeated", ['a"b/c\\d', 'a\\"b/c\\\\d', 'a\\"b\\/c\\\\d'])
async def test_key_is_not_shown_in_the_spellings_of_json(repeated: str) -> None:
    async with Client(60, 'a"b/c\\d') as client:
        failure = await chat(client, web.Response(status=401, text=f'"{repeated}" is wrong'))
    assert isinstance(failure, Failure)
    assert failure.text == '"***" is wrong'


async def test_body_without_an_end_is_broken(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(4096 * b" ")

    monkeypatch.setattr(call, "_LARGEST", 2**20)
    async with serve(fake_gateway(endless, models=endless)) as url:
        for read in (client.json, client.text):
            with pytest.raises(CallError) as caught:
                await read(url / "v1/models")
            assert caught.value.failure.kind == "broken"
            assert caught.value.failure.text.startswith("the answer has more than")


async def test_models_may_take_as_long_as_a_turn() -> None:
    async def slow(request: web.Request) -> web.Response:
        let_pass(call.BRIEF + 1)
        for _ in range(10):  # so that a limit that is over ends the call first
            await asyncio.sleep(0)
        workers = [{"url": "http://w", "is_healthy": True, "model_id": "m"}]
        return web.json_response({"data": [{"id": "m"}], "workers": workers})

    app = fake_gateway(slow, models=slow)
    app.router.add_get("/slow/workers", slow)
    async with serve(app) as url, Client(60, None) as client:
        assert await ask.models(client, url) == ("m",)
        assert await ask.healthy_workers(client, url / "slow", "m") is None


async def test_no_proxy_is_taken_from_the_environment(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, str(local_url(free_port())))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(await chat(client, sse("[DONE]")), Reply)


async def test_redirect_is_not_followed(client: Client) -> None:
    called = []

    async def elsewhere(request: web.Request) -> web.Response:
        called.append(request.path)
        return web.Response()

    async with serve(fake_gateway(elsewhere)) as other:
        there = str(other / CHAT)
        failure = await chat(client, web.Response(status=307, headers={"Location": there}))
    assert isinstance(failure, Failure)
    assert failure.status == 307
    assert called == []


async def test_no_connection_is_refused(client: Client) -> None:
    url = local_url(free_port())
    with pytest.raises(CallError) as caught:
        await client.json(url)
    assert caught.value.failure.kind == "refused"


async def test_name_that_does_not_exist_is_refused(client: Client) -> None:
    with pytest.raises(CallError) as caught:
        await client.json(URL("http://gateway.invalid"))
    assert caught.value.failure.kind == "refused"


@pytest.mark.parametrize(
    "said",
    [
        b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80",  # HTTP/2, gRPC
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",  # a TLS alert
    ],
)
async def test_port_of_another_protocol_is_named_in_plain_words(
    client: Client, said: bytes
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(said)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        with pytest.raises(CallError) as caught:
            await client.json(URL(f"http://{host}:{port}/v1/models"))
    failure = caught.value.failure
    assert failure.kind == "broken"
    assert failure.text == (
        "the server does not speak HTTP/1.1; is it a port of TLS (https://), gRPC or HTTP/2?"
    )


async def test_https_url_of_an_http_port_is_named_in_plain_words(client: Client) -> None:
    async def handler(request: web.Request) -> web.Response:
        raise AssertionError("nothing gets there")

    async with serve(fake_gateway(handler, models=handler)) as url:
        with pytest.raises(CallError) as caught:
            await client.json(url.with_scheme("https") / "v1/models")
    failure = caught.value.failure
    assert failure.kind == "refused"
    assert "for plain HTTP write http://" in failure.text


async def test_no_answer_in_time_is_a_timeout() -> None:
    async def silent(request: web.Request) -> web.Response:
        let_pass(60)
        await asyncio.Event().wait()
        raise AssertionError("it is gone")

    async with serve(fake_gateway(silent)) as url, Client(60, None) as client:
        with pytest.raises(CallError) as caught:
            await client.chat(url / CHAT, {}, {})
    assert caught.value.failure.kind == "timeout"


async def test_json_that_is_none_is_broken(client: Client) -> None:
    async def html(request: web.Request) -> web.Response:
        return web.Response(text="<h1>")

    async with serve(fake_gateway(html, models=html)) as url:
        with pytest.raises(CallError) as caught:
            await client.json(url / "v1/models")
    assert caught.value.failure.kind == "broken"


async def test_key_goes_with_every_call_but_the_one_for_the_metrics(client: Client) -> None:
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return sse("[DONE]") if request.method == "POST" else web.json_response({})

    async with serve(fake_gateway(handler, models=handler)) as url:
        await client.chat(url / CHAT, {}, {})
        await client.post(url / CHAT, {})
        await client.json(url / "v1/models")
        await client.text(url / "v1/models")
    assert seen == [f"Bearer {SECRET}"] * 3 + [None]


async def test_no_cookie_is_kept() -> None:
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(dict(request.cookies))
        response = web.json_response({})
        response.set_cookie("lb", "replica-1")
        return response

    async with serve(fake_gateway(handler, models=handler)) as url, Client(60, None) as client:
        for _ in range(2):
            await client.json(url.with_host("localhost") / "v1/models")
    assert seen == [{}, {}]
