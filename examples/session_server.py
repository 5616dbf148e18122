"""A session server: agents play multi-turn sessions through it, an LLM gateway answers them.

    python examples/session_server.py examples/session_server.toml

``POST /sessions`` makes a session; its agent points any OpenAI client at the base URL
``http://HOST:PORT/sessions/SESSION_ID/v1``. Transcripts are kept in memory. A turn that the engine
aborts, as for new weights, is rolled back and tried again.
"""

import argparse
import asyncio
import io
import json
import logging
import math
import random
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import ClientSession, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from aiohttp_smg_routing import setup

Message = dict[str, Any]

WORTH_RETRYING = {408, 429, 500, 502, 503, 504}
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between two tries of a turn
LARGEST_BODY = 64 * 2**20  # bytes: an agent sends its whole conversation every turn
# Headers about one connection, or about a compression that aiohttp has undone.
NOT_COPIED = {
    "accept-encoding", "connection", "content-encoding", "content-length", "expect", "host",
    "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
# Texts that a stream sends whole, perhaps again and again. All others grow piece by piece.
IN_ONE_PIECE = {"id", "name", "role", "type"}

log = logging.getLogger("session_server")
routes = web.RouteTableDef()


@dataclass(frozen=True, slots=True)
class Gateway:
    """The gateway: how long it may be silent, and how often a failed turn is tried again."""

    url: str
    timeout_seconds: float
    retries: int

    def __post_init__(self) -> None:
        if URL(self.url).scheme not in {"http", "https"} or not URL(self.url).host:
            raise ValueError(f"[gateway] url: {self.url!r} is not an absolute http(s) URL")
        if not 0 < self.timeout_seconds < math.inf:
            raise ValueError(f"[gateway] timeout_seconds: {self.timeout_seconds} is not above 0")
        if self.retries < 0:
            raise ValueError(f"[gateway] retries: {self.retries} is less than 0")


@dataclass(slots=True)
class Session:
    """One agent's conversation. A turn holds ``lock`` from its first try to its last."""

    session_id: str
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @contextmanager
    def turn(self, messages: list[Message]) -> Iterator[None]:
        """Try a turn: the end of the block rolls it back, unless it was completed by then."""
        messages_before, turns_before = self.messages, self.turns
        self.messages = messages
        try:
            yield
        finally:
            if self.turns == turns_before:
                self.messages = messages_before

    def complete(self, reply: Message) -> None:
        """Keep the turn, now that the assistant's reply is whole."""
        self.messages.append(reply)
        self.turns += 1


CLIENT = web.AppKey("client_session", ClientSession)
GATEWAY = web.AppKey("gateway", Gateway)
SESSIONS = web.AppKey("sessions", dict[str, Session])


class Aborted(aiohttp.ClientPayloadError):
    """The engine gave up a turn before its reply was whole, as it does when it gets new weights."""


class StreamedReply:
    """The assistant's message, put together from the SSE stream that carries it."""

    def __init__(self) -> None:
        self.message: Message = {"role": "assistant", "content": None}
        self.done = False
        self._failed = False
        self._line = b""

    def feed(self, chunk: bytes) -> None:
        """Take in what has arrived; a chunk may begin and end anywhere. May raise ``Aborted``."""
        *lines, self._line = (self._line + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line.removeprefix(b"data:").strip())

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = not self._failed
            return
        try:
            document = json.loads(data)
            check_not_aborted(document)
            match document:
                case {"error": error} if error:
                    self._failed = True
                case {"choices": [{"delta": delta, **choice}, *_]} if not choice.get("index"):
                    merge(self.message, delta)
        except (AttributeError, LookupError, TypeError, ValueError):
            self._failed = True  # What cannot be read cannot be kept.


def merge(message: Message, delta: Message) -> None:
    """Add a streamed ``delta`` to ``message``, in place."""
    for name, value in delta.items():
        known = message.get(name)
        if name == "tool_calls":
            for call in value or ():
                calls = message.setdefault(name, [])
                if (index := call.pop("index")) == len(calls):
                    calls.append({})
                merge(calls[index], call)
        elif known is None:
            message[name] = value
        elif isinstance(value, dict):
            merge(known, value)
        elif isinstance(value, str) and name not in IN_ONE_PIECE:
            message[name] = known + value
        elif value:
            message[name] = value


def read_reply(content: bytes) -> Message | None:
    """Return the assistant's message in an answer that is not streamed, if it has one.

    Raises ``Aborted`` if the message is not whole.
    """
    with suppress(ValueError):
        document = json.loads(content)
        check_not_aborted(document)
        match document:
            case {"choices": [{"message": dict() as message}, *_]}:
                return message
    return None


def check_not_aborted(document: object) -> None:
    """Raise ``Aborted`` if an answer, or an event of a stream, has a choice that was aborted."""
    match document:
        case {"choices": [*choices]}:
            for choice in choices:
                match choice:
                    case {"finish_reason": "abort"}:
                        raise Aborted("the engine aborted the turn")


def openai_error(code: str, message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return the arguments of a response that holds an error as OpenAI clients expect it."""
    error = {"message": message, "type": kind, "code": code}
    return {"text": json.dumps({"error": error}), "content_type": "application/json"}


def find_session(request: web.Request) -> Session:
    """Return the session that the URL names, or raise a 404."""
    session_id = request.match_info["session_id"]
    if session_id not in request.app[SESSIONS]:
        message = f"There is no session {session_id!r}."
        raise web.HTTPNotFound(**openai_error("session_not_found", message))
    return request.app[SESSIONS][session_id]


async def read_object(request: web.Request) -> dict[str, Any]:
    """Return the JSON object in the body, ``{}`` for no body, or raise a 400."""
    try:
        value = json.loads(await request.read() or b"{}")
    except (RecursionError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise web.HTTPBadRequest(**openai_error("invalid_json", "The body must be a JSON object."))
    return value


def end_to_end(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return the headers that a proxy copies (RFC 9110, section 7.6.1)."""
    named = ",".join(headers.getall("Connection", ())).lower().split(",")
    dropped = NOT_COPIED.union(name.strip() for name in named)
    return CIMultiDict(
        (name, text) for name, text in headers.items() if name.lower() not in dropped
    )


@routes.get("/health")
async def health(_: web.Request) -> web.Response:
    """Tell that the server runs."""
    return web.json_response({"status": "ok"})


@routes.post("/sessions")
async def create_session(request: web.Request) -> web.Response:
    """Make a session, under the id in the body or a new one."""
    session_id = (await read_object(request)).get("session_id", uuid.uuid4().hex)
    if not isinstance(session_id, str) or not session_id.strip():
        message = "session_id must be a string that is not blank."
        raise web.HTTPBadRequest(**openai_error("invalid_session_id", message))
    if session_id in request.app[SESSIONS]:
        message = f"There is a session {session_id!r} already."
        raise web.HTTPConflict(**openai_error("session_exists", message))
    request.app[SESSIONS][session_id] = Session(session_id)
    return web.json_response({"session_id": session_id}, status=201)


@routes.get("/sessions/{session_id}")
async def read_session(request: web.Request) -> web.Response:
    """Show a session as it is at this moment, even in the middle of a turn."""
    session = find_session(request)
    return web.json_response(
        {"session_id": session.session_id, "turns": session.turns, "messages": session.messages}
    )


@routes.delete("/sessions/{session_id}")
async def delete_session(request: web.Request) -> web.Response:
    """Forget a session; a turn that is under way still gets its answer."""
    del request.app[SESSIONS][find_session(request).session_id]
    return web.Response(status=204)


@routes.post("/sessions/{session_id}/v1/chat/completions")
async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Play a turn: add the gateway's reply to the conversation, or leave it as it was."""
    session = find_session(request)
    messages = (await read_object(request)).get("messages")
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        message = "messages must be a list of one or more objects."
        raise web.HTTPBadRequest(**openai_error("invalid_messages", message))
    retries, pause = request.app[GATEWAY].retries, FIRST_PAUSE
    async with session.lock:
        find_session(request)  # It may have been deleted while this turn waited.
        while True:
            turns = session.turns
            with session.turn(messages):
                response = await call_gateway(request, session)
            if response.prepared and session.turns == turns and request.transport is not None:
                request.transport.close()  # A broken stream must not get a clean end.
            if response.status not in WORTH_RETRYING or retries == 0:
                return response
            await asyncio.sleep(seconds_to_wait(response, pause))
            retries, pause = retries - 1, min(2 * pause, LONGEST_PAUSE)


def seconds_to_wait(response: web.StreamResponse, pause: float) -> float:
    """Return what a numeric ``Retry-After`` asks for, else about ``pause``."""
    try:
        asked = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return pause * random.uniform(0.5, 1)  # Turns that failed together try again apart.
    return min(max(0.0, asked), LONGEST_PAUSE)


async def call_gateway(request: web.Request, session: Session) -> web.StreamResponse:
    """Try the turn once; return the gateway's answer, or the error that stands in for it."""
    gateway = request.app[GATEWAY]
    try:
        async with request.app[CLIENT].post(
            (URL(gateway.url) / "v1/chat/completions").with_query(request.query),
            data=io.BytesIO(await request.read()),
            headers=end_to_end(request.headers),
            allow_redirects=False,
        ) as answer:
            if answer.status == 200 and answer.content_type == "text/event-stream":
                return await relay(request, session, answer)
            content = await answer.read()
            reply = read_reply(content) if answer.status == 200 else None
    except Aborted:
        message = "The engine aborted the turn; try it again."
        return web.Response(status=503, **openai_error("aborted", message, "gateway_error"))
    except asyncio.TimeoutError:
        message = f"The gateway was silent for {gateway.timeout_seconds:g} seconds."
        return web.Response(status=504, **openai_error("timeout", message, "gateway_error"))
    except aiohttp.ClientError as error:
        log.warning("session %s: %r", session.session_id, error)
        message = "The gateway gave no answer."
        return web.Response(status=502, **openai_error("no_answer", message, "gateway_error"))
    if reply:
        session.complete(reply)
    headers = end_to_end(answer.headers)
    return web.Response(status=answer.status, reason=answer.reason, headers=headers, body=content)


async def relay(
    request: web.Request, session: Session, answer: aiohttp.ClientResponse
) -> web.StreamResponse:
    """Pass a stream on as it arrives, and complete the turn when the end arrives."""
    response = web.StreamResponse(reason=answer.reason, headers=end_to_end(answer.headers))
    reply, completed = StreamedReply(), False
    try:
        async for chunk in answer.content.iter_any():
            reply.feed(chunk)  # If the reply was aborted, the agent must not see its end.
            if reply.done and not completed:
                # Before the agent sees the end, as it may hang up or come back at once.
                session.complete(reply.message)
                completed = True
            await response.prepare(request)  # Only the first call has an effect.
            await response.write(chunk)
        if not completed:
            raise aiohttp.ClientPayloadError("the stream ended before its reply was whole")
    except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
        if not response.prepared:
            raise  # The agent has seen nothing of it: the turn can be tried again.
        log.warning("session %s: %r", session.session_id, error)
    return response


async def client_session(app: web.Application) -> AsyncIterator[None]:
    """Keep one ``ClientSession`` for as long as the app runs."""
    timeout = app[GATEWAY].timeout_seconds
    async with ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # No turn waits for one of another session.
        cookie_jar=aiohttp.DummyCookieJar(),  # No session sends the cookies of another.
        timeout=aiohttp.ClientTimeout(sock_connect=timeout, sock_read=timeout),
    ) as app[CLIENT]:
        yield


def make_app(settings: Mapping[str, Any]) -> web.Application:
    """Return the server; ``ValueError`` says what is wrong with its settings."""
    app = web.Application(client_max_size=LARGEST_BODY)
    gateway = read_table(settings, "gateway", url="", timeout_seconds=600.0, retries=2)
    app[GATEWAY] = Gateway(**gateway)
    app[SESSIONS] = {}
    app.cleanup_ctx.append(client_session)
    app.add_routes(routes)
    if "smg_routing" in settings:
        setup(app, settings["smg_routing"])
    return app


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a TOML file says; ``OSError`` or ``ValueError`` tells why it cannot be read."""
    try:
        toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install tomli") from error
    settings: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    return settings


def read_table(settings: Mapping[str, Any], name: str, **defaults: object) -> dict[str, Any]:
    """Return one table, whose keys and types are those of ``defaults``, or raise ``ValueError``."""
    table = settings.get(name, {})
    if not isinstance(table, Mapping):
        raise ValueError(f"{name}: {table!r} is not a table")
    for key, value in table.items():
        if key not in defaults:
            raise ValueError(f"[{name}] {key}: unknown, the keys are {', '.join(defaults)}")
        kind = type(defaults[key])
        if type(value) not in ({int, float} if kind is float else {kind}):
            raise ValueError(f"[{name}] {key}: {value!r} is not of type {kind.__name__}")
    return {**defaults, **table}


async def serve(app: web.Application, host: str, port: int) -> None:
    """Listen until SIGINT or SIGTERM, then let the running turns finish."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    # Without handler_cancellation the server would not notice an agent that has gone.
    drain = app[GATEWAY].timeout_seconds
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=drain)
    try:
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            raise ValueError(f"[server] cannot listen on {host}:{port}: {error}") from error
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopping.set)
        host, port = runner.addresses[0][:2]
        print(f"listening on {URL.build(scheme='http', host=host, port=port)}", flush=True)
        await stopping.wait()
    finally:
        await runner.cleanup()


def main() -> int:
    """Run the server that the command line asks for; return its exit status."""
    parser = argparse.ArgumentParser(description="Sessions in front of an LLM gateway.")
    parser.add_argument("settings", type=Path, help="a TOML file like session_server.toml")
    path: Path = parser.parse_args().settings
    logging.basicConfig(level=logging.INFO)
    try:
        settings = read_settings(path)
        server = read_table(settings, "server", host="127.0.0.1", port=8080)
        asyncio.run(serve(make_app(settings), **server))
    except (OSError, ValueError) as error:
        print(f"{path}: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
