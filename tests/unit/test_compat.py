"""The package relies on parts of aiohttp; each test fails when aiohttp changes one of them."""

import ast
import asyncio
import inspect
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock, create_autospec

import pytest
from aiohttp import ClientSession, TraceConfig, TraceRequestStartParams, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.test_utils import make_mocked_request
from aiohttp.typedefs import Handler
from pytest_aiohttp.plugin import AiohttpClient

import aiohttp_smg_routing
from aiohttp_smg_routing import compat
from aiohttp_smg_routing.testing import Recorder

from ..fresh import python

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # aiohttp discourages subclasses

    class Subclass(ClientSession):
        """A ClientSession subclass, as libraries write them, that overrides ``trace_configs``."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

        @property
        def trace_configs(self) -> list[TraceConfig]:
            return [TraceConfig()]


class Claiming:
    """An object that claims to be a ClientSession."""

    __class__ = ClientSession  # type: ignore[assignment]


def naming(seen: list[str], name: str) -> TraceConfig:
    """Return a hook that appends its name to ``seen`` at each call."""

    async def start(
        session: ClientSession, context: SimpleNamespace, params: TraceRequestStartParams
    ) -> None:
        seen.append(name)

    hook = TraceConfig()
    hook.on_request_start.append(start)
    return hook


async def test_a_session_is_told_from_what_claims_to_be_one() -> None:
    async with ClientSession() as session, Subclass() as other:
        assert compat.is_client_session(session)
        assert compat.is_client_session(other)
    for value in (
        *(Mock(spec=ClientSession), MagicMock(spec=ClientSession), Claiming(), ClientSession, None),
        *(create_autospec(ClientSession), create_autospec(ClientSession, instance=True)),
    ):
        assert not compat.is_client_session(value)


@pytest.mark.parametrize("kind", [ClientSession, Subclass])
@pytest.mark.parametrize("given", [list, tuple, None])
async def test_the_hooks_are_those_that_a_session_runs(
    gateway: Recorder, kind: type[ClientSession], given: Any
) -> None:
    seen: list[str] = []
    one, other, own = naming(seen, "one"), naming(seen, "other"), naming(seen, "own")
    passed = given and given([own])
    async with kind(trace_configs=passed) as session:
        before = [*compat.hooks(session)]
        assert before == ([own] if given else [])
        compat.add_hook(session, one)
        compat.add_hook(session, other)
        assert [*compat.hooks(session)] == [*before, one, other]
        await session.post(gateway.chat)
        assert seen == [*(["own"] if given else []), "one", "other"]
        compat.remove_hook(session, one)
        compat.remove_hook(session, TraceConfig())  # it was never added
        seen.clear()
        await session.post(gateway.chat)
        assert seen == [*(["own"] if given else []), "other"]
    assert passed is None or [*passed] == [own]  # other sessions may share the list


async def test_a_hook_that_is_added_can_not_be_changed_any_more() -> None:
    """A ClientSession freezes the hooks that it is made with; an unfrozen one can't run."""
    hook = TraceConfig()
    async with ClientSession() as session:
        compat.add_hook(session, hook)
        assert hook.on_request_start.frozen
        compat.add_hook(session, hook)  # although it is frozen


async def test_a_hook_that_is_added_during_a_call_runs_from_the_next_one(gateway: Recorder) -> None:
    seen: list[str] = []
    hook = naming(seen, "late")

    async def add(session: ClientSession, *_: object) -> None:
        compat.add_hook(session, hook)
        compat.remove_hook(session, adding)

    adding = TraceConfig()
    adding.on_request_start.append(add)
    async with ClientSession(trace_configs=[adding]) as session:
        await session.post(gateway.chat)
        assert seen == []
        await session.post(gateway.chat)
        assert seen == ["late"]


def test_hooks_come_and_go_without_a_warning_in_development_mode() -> None:
    """In development mode aiohttp warns when anything else is set on a ClientSession."""
    code = """
import asyncio
from aiohttp import ClientSession, TraceConfig
from aiohttp_smg_routing import compat

async def main():
    layer = compat.wrap_constructor(lambda session: None, None)
    async with ClientSession() as session:
        hook = TraceConfig()
        compat.add_hook(session, hook)
        compat.remove_hook(session, hook)
    assert compat.unwrap_constructor(layer)

asyncio.run(main())
"""
    python(code, "-X", "dev", "-W", "error")


@pytest.fixture
def constructor() -> Iterator[Any]:
    """Give aiohttp's constructor, and put it back."""
    own = vars(ClientSession)["__init__"]
    yield own
    setattr(ClientSession, "__init__", own)  # noqa: B010 - mypy minds the other form


async def test_each_session_that_is_made_is_seen_until_the_constructor_is_let_go(
    constructor: Any,
) -> None:
    made: list[ClientSession] = []
    layer = compat.wrap_constructor(made.append, None)
    assert vars(ClientSession)["__init__"] is layer
    assert inspect.signature(layer) == inspect.signature(constructor)
    async with ClientSession("http://gateway/") as session, Subclass(raise_for_status=True) as sub:
        assert made == [session, sub]
        assert session._base_url is not None
        assert sub._raise_for_status is True
    with pytest.raises(TypeError):
        ClientSession(no_such_argument=1)  # type: ignore[call-arg]
    assert len(made) == 2
    assert compat.unwrap_constructor(layer)
    assert vars(ClientSession)["__init__"] is constructor
    async with ClientSession():
        assert len(made) == 2


@pytest.mark.usefixtures("constructor")
async def test_a_wrapper_in_force_is_used_again_and_stays_under_that_of_somebody_else() -> None:
    made: list[ClientSession] = []
    layer = compat.wrap_constructor(made.append, None)
    assert compat.wrap_constructor(made.append, layer) is layer
    calls = []

    def theirs(self: ClientSession, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        layer(self, *args, **kwargs)

    theirs.__wrapped__ = layer  # type: ignore[attr-defined]
    setattr(ClientSession, "__init__", theirs)  # noqa: B010
    assert compat.wrap_constructor(made.append, layer) is layer
    assert not compat.unwrap_constructor(layer)
    async with ClientSession() as session:
        assert made == calls == [session]
    setattr(ClientSession, "__init__", lambda self: None)  # noqa: B010 - takes ours off
    assert compat.wrap_constructor(made.append, layer) is not layer


class Descriptor:
    """A constructor that is a descriptor, and must be bound before it is called."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __get__(self, instance: object, owner: type) -> Callable[..., None]:
        return lambda *args, **kwargs: self.function(instance, *args, **kwargs)

    def __call__(self, *args: object) -> None:
        raise AssertionError("it has to be bound")


class NoDescriptor:
    """A constructor that doesn't bind: Python calls it without the ClientSession."""

    def __call__(self, *args: object) -> None:
        assert args == ()


async def test_a_constructor_that_somebody_has_replaced_binds_as_python_does(
    constructor: Any,
) -> None:
    made: list[ClientSession] = []
    setattr(ClientSession, "__init__", Descriptor(constructor))  # noqa: B010
    layer = compat.wrap_constructor(made.append, None)
    async with ClientSession() as session:
        assert made == [session]
    assert compat.unwrap_constructor(layer)
    setattr(ClientSession, "__init__", NoDescriptor())  # noqa: B010
    compat.wrap_constructor(made.append, None)
    ClientSession()
    assert made == [session]  # no constructor ran, so it has no hooks


async def test_what_is_unread_is_read_again_and_nothing_warns(
    aiohttp_client: AiohttpClient,
) -> None:
    compat.unreader.cache_clear()  # a test without coverage may have filled it

    async def handler(request: web.Request) -> web.Response:
        content, unread = request.content, compat.unreader()
        unread(content, b"")
        beginning = await content.readexactly(3)
        unread(content, beginning)
        line = await content.readline()
        rest = await content.read()
        assert content.at_eof()
        unread(content, line + rest)
        assert not content.at_eof()
        return web.Response(body=await request.read())

    app = web.Application()
    app.router.add_post("/", handler)
    client = await aiohttp_client(app)
    body = b"a line\nand more" * 10_000
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        async with client.post("/", data=body) as response:
            assert await response.read() == body
    assert [it for it in warned if "unread" in str(it.message)] == []


async def its_own(request: web.Request) -> None:
    """Handle ``Expect: 100-continue``."""


async def test_a_route_with_an_expect_handler_of_its_own_is_told_from_the_others(
    aiohttp_client: AiohttpClient,
) -> None:
    found = {}

    @web.middleware
    async def look(request: web.Request, handler: Any) -> web.StreamResponse:
        found[f"{request.method} {request.path}"] = compat.has_own_expect_handler(request)
        return web.Response()

    async def handler(request: web.Request) -> web.Response:
        raise AssertionError("the middleware has answered")

    app, sub = web.Application(middlewares=[look]), web.Application()
    app.router.add_post("/plain", handler)
    app.router.add_post("/own", handler, expect_handler=its_own)
    app.router.add_put("/own", handler)
    app.router.add_static("/static", Path(__file__).parent, expect_handler=its_own)
    sub.router.add_post("/plain", handler)
    sub.router.add_post("/own", handler, expect_handler=its_own)
    app.add_subapp("/sub", sub)
    client = await aiohttp_client(app)
    for method, path in (
        *(("POST", "/plain"), ("POST", "/own"), ("PUT", "/own"), ("POST", "/none")),
        *(("GET", "/static/x"), ("POST", "/sub/plain"), ("POST", "/sub/own"), ("PUT", "/sub/own")),
    ):
        await client.request(method, path)
    own = {name for name, is_own in found.items() if is_own}
    assert own == {"POST /own", "GET /static/x", "POST /sub/own"}
    assert len(found) == 8


CLIENT = web.AppKey("client", ClientSession)


def test_a_key_of_a_storage_has_its_module_in_its_name() -> None:
    assert compat.storage_name("client") == "client"
    assert compat.storage_name(CLIENT) == f"{__name__}.client"
    assert compat.storage_name(object()) == ""
    if hasattr(web, "RequestKey"):
        assert compat.storage_name(web.RequestKey("sid", str)).endswith(".sid")


def test_nothing_private_of_another_package_is_used_elsewhere() -> None:
    """Only compat.py may: its tests fail when aiohttp changes. This covers the core only."""
    used, own = {}, set()
    for path in Path(aiohttp_smg_routing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "compat.py" else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Attribute):
                used[node.attr] = f"{path.name}:{node.lineno}"
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert {name: used[name] for name in private - own} == {}


@pytest.mark.parametrize("fails", [False, True])
async def test_an_app_is_cleaned_up_when_all_have_been_that_were_added_later(fails: bool) -> None:
    order: list[str] = []

    def note(what: str, error: type[Exception] | None = None) -> Any:
        async def handler(_: web.Application) -> None:
            order.append(what)
            if error:
                raise error

        return handler

    app, inner = web.Application(), web.Application()
    app.on_cleanup.append(note("before"))
    compat.when_cleaned_up(app, partial(order.append, "all"))
    compat.when_cleaned_up(inner, partial(order.append, "all of the inner one"))
    app.on_cleanup.append(note("after"))
    inner.on_cleanup.append(note("inner", ZeroDivisionError if fails else None))
    app.add_subapp("/inner", inner)
    app.on_cleanup.append(note("last"))
    runner = web.AppRunner(app)
    await runner.setup()
    with suppress(ZeroDivisionError):
        await runner.cleanup()
    last = [] if fails else ["last"]
    assert order == ["before", "after", "inner", "all of the inner one", *last, "all"]


async def test_an_answer_is_sent_with_its_end_and_the_end_of_the_middlewares(
    aiohttp_client: AiohttpClient,
) -> None:
    writers: list[AbstractStreamWriter] = []

    @web.middleware
    async def above(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        assert not compat.is_answered(request.writer)
        return response

    async def handler(request: web.Request) -> web.StreamResponse:
        assert not compat.is_answered(request.writer)
        assert all(map(compat.is_answered, writers))
        writers.append(request.writer)
        if request.query_string:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write_eof(b"chunk")
            return response

        async def body() -> AsyncIterator[bytes]:
            assert not compat.is_answered(request.writer)
            yield b"chunk"

        return web.Response(body=body())

    app = web.Application(middlewares=[above])
    app.router.add_get("/", handler)
    client = await aiohttp_client(app)
    for path in ("/", "/?ended", "/"):  # on one connection
        async with client.get(path) as response:
            assert await response.read() == b"chunk"
    assert len({id(writer) for writer in writers}) == 3


async def test_an_answer_is_over_where_the_client_has_hung_up(
    aiohttp_client: AiohttpClient,
) -> None:
    writers: list[AbstractStreamWriter] = []
    is_over = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        writers.append(request.writer)
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"chunk")
                await asyncio.sleep(0)
        finally:
            is_over.set()

    app = web.Application()
    app.router.add_get("/", handler)
    client = await aiohttp_client(app)
    response = await client.get("/")
    response.close()
    await is_over.wait()
    assert compat.is_answered(writers[0])


async def test_a_body_is_sent_piece_by_piece_where_aiohttp_calls_the_write_that_it_has(
    aiohttp_client: AiohttpClient,
) -> None:
    """It must pass the writer of the request."""
    writers = []

    async def handler(request: web.Request) -> web.Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"chunk"

        response = web.Response(body=chunks())
        body = compat.body_to_send(response)
        assert body is not None
        write = body.write

        async def watched(writer: AbstractStreamWriter) -> None:
            writers.append(writer is request.writer)
            await write(writer)

        vars(body)["write"] = watched
        return response

    for other in (web.Response(body=b"whole"), web.Response(), web.StreamResponse(), None):
        assert compat.body_to_send(other) is None
    app = web.Application()
    app.router.add_get("/", handler)
    client = await aiohttp_client(app)
    async with client.get("/") as response:
        assert await response.read() == b"chunk"
    assert writers == [True]


@pytest.mark.parametrize("writer", [None, object(), SimpleNamespace(), Mock()])
def test_whatever_stands_for_a_writer_in_a_test_fails_nothing(writer: Any) -> None:
    reference = compat.writer_of(make_mocked_request("GET", "/", writer=writer))
    assert (reference is not None and reference() is writer) == isinstance(writer, Mock)


def test_a_writer_that_knows_nothing_has_sent_its_answer() -> None:
    class Writer(AbstractStreamWriter):
        write = write_eof = drain = write_headers = enable_compression = enable_chunking = None  # type: ignore[assignment]

    assert compat.is_answered(Writer())


def test_the_class_that_sends_is_found_below_those_that_others_put_in_its_place() -> None:
    class Client:
        def _send_single_request(self, request: object) -> object:
            return request

    class Instrumented(Client):
        pass

    class Retrying(Instrumented):
        def _send_single_request(self, request: object) -> object:
            return super()._send_single_request(request)

    assert compat.sender(Client) is Client
    assert compat.sender(Instrumented) is Client
    assert compat.sender(Retrying) is Client
    assert compat.sender(int) is int  # neither it nor a base class has the method
