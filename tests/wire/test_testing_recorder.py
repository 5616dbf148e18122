import asyncio
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress

import pytest
from aiohttp import ClientError, ClientSession
from yarl import URL

from aiohttp_smg_routing.testing import (
    Answer,
    Call,
    Recorder,
    answer,
    completion,
    failure,
    recording_gateway,
    redirect,
    stream,
)


async def post(
    session: ClientSession, gateway: Recorder, *keys: str, path: str = "/v1/chat/completions"
) -> None:
    headers = [("X-SMG-Routing-Key", key) for key in keys]
    async with session.post(gateway.url.with_path(path), headers=headers) as response:
        await response.read()


async def test_it_keeps_the_raw_lines_and_the_body(
    recording_gateway: Recorder, client: ClientSession
) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b'{"a":'
        yield b" 1}"

    for data in (b'{"a": 1}', chunks()):
        headers = {"x-SMG-routing-KEY": "\x7e s"}
        async with client.post(recording_gateway.chat, data=data, headers=headers):
            pass
        call = recording_gateway.last
        assert call.start_line == b"POST /v1/chat/completions HTTP/1.1"
        assert (call.method, call.path) == ("POST", "/v1/chat/completions")
        assert b"x-SMG-routing-KEY: \x7e s" in call.header_lines
        assert call.keys == [b"\x7e s"]
        assert call.body == b'{"a": 1}'
        assert call.json() == {"a": 1}
    assert len(recording_gateway.calls) == 2


async def test_pinned_is_every_turn_with_the_key_and_that_key_alone(
    recording_gateway: Recorder, client: ClientSession
) -> None:
    for key in ("s-1", "s-2", "s-1"):
        await post(client, recording_gateway, key)
    recording_gateway.assert_pinned("s-1", turns=2)
    recording_gateway.assert_pinned("s-1")
    recording_gateway.assert_pinned("s-2", turns=1)
    recording_gateway.assert_pinned("s-3", turns=0)


async def test_pinned_goes_by_the_config(
    recording_gateway: Recorder, client: ClientSession
) -> None:
    async with client.post(recording_gateway.chat, headers={"X-Pin": "job-7/s-1"}):
        pass
    config = {"gateway": "http://gateway", "header": "X-Pin", "prefix": "job-7/"}
    recording_gateway.assert_pinned("s-1", turns=1, config=config)
    with pytest.raises(AssertionError):
        recording_gateway.assert_pinned("s-1", turns=1)


@pytest.mark.parametrize(
    ("calls", "turns", "problem"),
    [
        ([], None, "came on 0 calls, not on one or more. .*:\n  no call arrived"),
        ([()], 1, r"came on 0 calls, not on 1. .*:\n  1 x \(none\) at http://127"),
        ([("s-2",)], 1, "came on 0 calls, not on 1. .*:\n  1 x s-2 at http://127"),
        ([("s-1",), ("s-1",)], 1, "came on 2 calls, not on 1. .*:\n  2 x s-1 at http://127"),
        ([("s-1", "s-2")], 1, "came beside another key, .*:\n  1 x s-1, s-2 at"),
        ([("s-1", "s-1")], 1, "came beside another key, .*:\n  1 x s-1, s-1 at"),
        ([("s-1",)], 0, "came on 1 calls, not on 0"),
    ],
)
async def test_not_pinned_says_which_keys_arrived(
    recording_gateway: Recorder,
    client: ClientSession,
    calls: list[tuple[str, ...]],
    turns: int | None,
    problem: str,
) -> None:
    for keys in calls:
        await post(client, recording_gateway, *keys)
    with pytest.raises(
        AssertionError, match=f"session 's-1' is not pinned: its key 's-1' {problem}"
    ):
        recording_gateway.assert_pinned("s-1", turns=turns)


async def test_answers_come_in_order_and_then_as_ever(
    recording_gateway: Recorder, client: ClientSession
) -> None:
    recording_gateway.answer_with(failure(429), redirect("/elsewhere"), completion("first"))
    recording_gateway.answer = lambda call: answer({"then": call.path}, status=201)
    seen = []
    for _ in range(4):
        async with client.post(recording_gateway.chat, allow_redirects=False) as response:
            seen.append((response.status, await response.text()))
    assert [status for status, _ in seen] == [429, 307, 200, 201]
    assert "no worker is available" in seen[0][1]
    assert '"content": "first"' in seen[2][1]
    assert seen[3][1] == '{"then": "/v1/chat/completions"}'


async def test_an_answer_says_that_it_is_json_unless_its_body_is_bytes(
    recording_gateway: Recorder, client: ClientSession
) -> None:
    recording_gateway.answer_with(answer({}), answer(b"bytes"))
    kinds = []
    for _ in range(2):
        async with client.post(recording_gateway.chat) as response:
            kinds.append(response.headers.getall("Content-Type", []))
    assert kinds == [["application/json"], []]


def test_an_answer_may_have_any_status() -> None:
    assert answer(status=503).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert answer(status=599).startswith(b"HTTP/1.1 599 Unknown\r\n")


@pytest.mark.parametrize(
    "other", [("X-SMG-Target-Worker", "1"), ("x-smg-routing-key", "evil"), ("X-Pin", "evil")]
)
async def test_not_pinned_where_something_else_on_the_call_may_choose_the_worker(
    recording_gateway: Recorder, client: ClientSession, other: tuple[str, str]
) -> None:
    config = {"gateway": "http://gateway", "header": "X-Pin"}
    headers = [("X-Pin", "s-1"), other]
    async with client.post(recording_gateway.chat, headers=headers):
        pass
    with pytest.raises(AssertionError, match="came beside another key, or a worker's name"):
        recording_gateway.assert_pinned("s-1", turns=1, config=config)


async def test_it_speaks_http_as_clients_do(recording_gateway: Recorder) -> None:
    """Informational answers, HEAD, trailers, a connection that is to be closed."""
    assert recording_gateway.url.host
    reader, writer = await asyncio.open_connection(
        recording_gateway.url.host, recording_gateway.url.port
    )
    writer.write(b"POST /1 HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"{}HEAD /v1/models HTTP/1.1\r\n\r\n")
    writer.write(b"POST /2 HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n")
    writer.write(b"2;ext=1\r\n{}\r\n0\r\nX-Trailer: 1\r\n\r\n")
    writer.write(b"POST /3 HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\nConnection: Close\r\n\r\n")
    answers = await reader.read()
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 4
    assert b"stub" not in answers
    writer.close()
    assert [call.body for call in recording_gateway.calls] == [b"{}", b"", b"{}", b""]


async def test_an_answer_that_never_comes_or_is_not_read_ends_with_the_block() -> None:
    async def never() -> AsyncGenerator[bytes, None]:
        await asyncio.Event().wait()
        yield b""

    answers: Iterator[Answer] = iter((never(), answer(b"x" * 50_000_000)))
    asked = asyncio.Semaphore(0)

    def next_answer(call: Call) -> Answer:
        asked.release()
        return next(answers)

    writers = []
    async with recording_gateway() as gateway:
        gateway.answer = next_answer
        assert gateway.url.host
        for _ in range(2):
            _, writer = await asyncio.open_connection(gateway.url.host, gateway.url.port)
            writer.write(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
            await asked.acquire()
            writers.append(writer)
    for writer in writers:
        writer.close()


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"stream": "yes"}', b'{"model": 5}'])
async def test_any_call_is_answered(
    recording_gateway: Recorder, client: ClientSession, body: bytes
) -> None:
    async with client.post(recording_gateway.chat, data=body) as response:
        assert (await response.json())["object"] == "chat.completion"
    async with client.put(recording_gateway.url / "elsewhere", data=body) as response:
        assert response.status == 200


async def test_a_stream_goes_out_piece_by_piece(
    recording_gateway: Recorder, client: ClientSession
) -> None:
    seen = asyncio.Event()

    async def held() -> AsyncGenerator[bytes, None]:
        pieces = [piece async for piece in stream("a", "b")]
        yield pieces[0] + pieces[1]
        await seen.wait()
        for piece in pieces[2:]:
            yield piece

    recording_gateway.answer_with(held())
    async with client.post(recording_gateway.chat) as response:
        assert b"assistant" in await response.content.readline()
        seen.set()
        assert b"[DONE]" in await response.read()


async def half() -> AsyncGenerator[bytes, None]:
    yield b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
    yield b""
    raise AssertionError("the connection is closed")


@pytest.mark.parametrize("broken", [lambda: b"", half])
async def test_an_empty_piece_closes_the_connection(
    recording_gateway: Recorder, client: ClientSession, broken: object
) -> None:
    broken_answer: Answer = broken()  # type: ignore[operator]
    recording_gateway.answer_with(broken_answer)
    with pytest.raises(ClientError):
        await post(client, recording_gateway, "s-1")
    await post(client, recording_gateway, "s-1")
    recording_gateway.assert_pinned("s-1", turns=2)


async def reset_in_the_midst() -> AsyncGenerator[bytes, None]:
    yield b"HTTP/1.1 200 OK\r\n"
    raise ConnectionResetError


def reset_at_once(call: Call) -> Answer:
    raise ConnectionResetError


@pytest.mark.parametrize("answer", [reset_at_once, lambda call: reset_in_the_midst()])
async def test_a_connection_is_reset_where_the_answer_says_so(
    recording_gateway: Recorder, answer: Callable[[Call], Answer]
) -> None:
    recording_gateway.answer = answer
    url = recording_gateway.url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with suppress(ConnectionResetError):
        await writer.wait_closed()


async def test_a_caller_that_resets_its_connection_is_no_error(client: ClientSession) -> None:
    async with recording_gateway() as gateway:
        for _ in range(10):
            _, writer = await asyncio.open_connection(gateway.url.host, gateway.url.port)
            writer.write(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
            await post(client, gateway)  # by now the gateway waits for the body
            at_once = struct.pack("ii", True, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            writer.transport.abort()
            await post(client, gateway)  # by now the gateway has seen the reset


async def test_an_error_in_an_answer_is_raised_at_the_end(client: ClientSession) -> None:
    def wrong(call: Call) -> Answer:
        raise ZeroDivisionError

    async def block() -> None:
        async with recording_gateway() as gateway:
            gateway.answer = wrong
            with pytest.raises(ClientError):
                await post(client, gateway)

    with pytest.raises(ZeroDivisionError):
        await block()


async def test_a_caller_that_hangs_up_or_stays_is_no_error() -> None:
    async with recording_gateway() as gateway:
        assert gateway.url.host
        assert gateway.url.port
        connections = [
            await asyncio.open_connection(gateway.url.host, gateway.url.port) for _ in range(2)
        ]
        for _, writer in connections:
            writer.write(b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nhalf")
            await writer.drain()
        connections[0][1].close()
    connections[1][1].close()
    assert gateway.calls == []
    assert isinstance(gateway.url, URL)
