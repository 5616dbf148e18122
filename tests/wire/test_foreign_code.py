"""No call and no start fails, whatever other code or mocks do to aiohttp or to logging."""

import asyncio
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any
from unittest import mock

import pytest
import wrapt
from aiohttp import ClientSession, TraceConfig, web
from aiohttp.test_utils import TestClient, TestServer
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    ROUTING,
    ConfigError,
    PinSummary,
    Routing,
    RoutingConfig,
    routing_session,
    setup,
)
from aiohttp_smg_routing.testing import Recorder, completion, redirect
from harness.processes import ROOT, finished
from harness.proxies import CLIENT, pinned_server

from ..crosstalk import anew
from ..turns import PATH, keys, said

PLAIN: Any = ClientSession.__init__


# Constructors that other code has replaced


def constructor() -> Any:
    return vars(ClientSession)["__init__"]


def set_constructor(value: Any) -> None:
    ClientSession.__init__ = value  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _pristine() -> Iterator[None]:
    assert constructor() is PLAIN
    yield
    assert constructor() is PLAIN


class Wrapper:
    """A callable object that binds itself, instead of a function."""

    def __init__(self, wrapped: Any, seen: Callable[[], object]) -> None:
        self._wrapped, self._seen = wrapped, seen

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, instance: Any, *args: Any, **kwargs: Any) -> None:
        self._seen()
        self._wrapped.__get__(instance, type(instance))(*args, **kwargs)


def by_function(seen: Callable[[], object]) -> Any:
    wrapped = constructor()

    def constructor_of_theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        seen()
        wrapped.__get__(self, type(self))(*args, **kwargs)

    return constructor_of_theirs


def by_wraps(seen: Callable[[], object]) -> Any:
    return functools.wraps(PLAIN)(by_function(seen))


def by_wrapt(seen: Callable[[], object]) -> Any:
    """Wrap the constructor as ddtrace, New Relic and OpenTelemetry do."""

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        seen()
        return wrapped(*args, **kwargs)

    return wrapt.FunctionWrapper(constructor(), wrapper)


def by_partialmethod(seen: Callable[[], object]) -> Any:
    def constructor_of_theirs(self: Any, first: str, *args: Any, **kwargs: Any) -> None:
        assert first == "first"
        seen()
        wrapped.__get__(self, type(self))(*args, **kwargs)

    wrapped = constructor()
    return functools.partialmethod(constructor_of_theirs, "first")


def by_object(seen: Callable[[], object]) -> Any:
    return Wrapper(constructor(), seen)


WRAPPERS = [by_function, by_wraps, by_wrapt, by_partialmethod, by_object]


@pytest.mark.parametrize("wrap", WRAPPERS)
async def test_a_constructor_that_others_have_wrapped_is_bound_as_python_binds_it(
    gateway: Recorder, wrap: Any
) -> None:
    made = mock.Mock()
    theirs = wrap(made)
    set_constructor(theirs)
    try:
        with Routing(RoutingConfig(gateway.url)).instrument():
            async with ClientSession(gateway.url, headers={"X-Own": "1"}) as session:
                with routing_session("s-1"):
                    async with session.post(gateway.chat.path):
                        pass
                assert gateway.last.keys == [b"s-1"]
                assert gateway.last.values("X-Own") == [b"1"]
            assert made.call_count == 1
            with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
                ClientSession(nonsense=True)  # type: ignore[call-arg]
        assert constructor() is theirs
        async with ClientSession() as session:
            assert session.trace_configs == []
    finally:
        set_constructor(PLAIN)


@pytest.mark.parametrize("wrap", WRAPPERS)
async def test_a_wrapper_of_others_may_come_later_and_go_first_or_last(
    gateway: Recorder, wrap: Any
) -> None:
    made = mock.Mock()
    routing = Routing(RoutingConfig(gateway.url))
    with routing.instrument():
        ours = constructor()
        set_constructor(wrap(made))
        async with ClientSession() as session:
            assert await keys(session, gateway) == [b"s-1"]
            assert len(session.trace_configs) == 1
        with routing.instrument():
            async with ClientSession() as session:
                assert len(session.trace_configs) == 1
        assert made.call_count == 2
        set_constructor(ours)
    with routing.instrument():
        set_constructor(wrap(made))
    try:  # their wrapper still calls ours, which does nothing
        async with ClientSession() as session:
            assert await keys(session, gateway) == []
            assert session.trace_configs == []
        with routing.instrument():
            async with ClientSession() as session:
                assert await keys(session, gateway) == [b"s-1"]
                assert len(session.trace_configs) == 1
    finally:
        set_constructor(PLAIN)
    with routing.instrument():
        async with ClientSession() as session:
            assert await keys(session, gateway) == [b"s-1"]


@pytest.mark.parametrize("wrap", WRAPPERS)
async def test_an_app_starts_serves_and_ends_beside_a_tracer(gateway: Recorder, wrap: Any) -> None:
    app = web.Application()
    app.router.add_post("/{session_id}", anew(gateway.chat))
    setup(app, RoutingConfig(gateway.url, instrument=True))
    set_constructor(wrap(lambda: None))
    try:
        async with TestClient(TestServer(app)) as client:
            for number in range(3):
                async with client.post(f"/s-{number}") as response:
                    assert response.status == 200
                assert gateway.last.keys == [f"s-{number}".encode()]
    finally:
        set_constructor(PLAIN)


async def test_a_constructor_that_a_test_has_mocked_is_one_that_makes_nothing(
    gateway: Recorder,
) -> None:
    """``ClientSession()`` returns an empty object, as it does without the plugin."""
    with mock.patch.object(ClientSession, "__init__", return_value=None) as mocked:
        with Routing(RoutingConfig(gateway.url)).instrument():
            session = ClientSession("anything")
        mocked.assert_called_once_with("anything")
    session._connector = None  # aiohttp's finalizer reads it


class BrokenError(Exception):
    pass


async def test_what_another_wrapper_raises_is_raised(gateway: Recorder) -> None:
    def fail() -> None:
        raise BrokenError

    set_constructor(by_wrapt(fail))
    try:
        with Routing(RoutingConfig(gateway.url)).instrument():
            session = ClientSession.__new__(ClientSession)
            session._connector = None
            with pytest.raises(BrokenError):
                session.__init__()  # type: ignore[misc]
    finally:
        set_constructor(PLAIN)


REPLACED = """
import asyncio, sys, warnings
import aiohttp, aiohttp.client

warnings.simplefilter("ignore", DeprecationWarning)  # aiohttp's, of a class that inherits
gateway, how = sys.argv[1:]
Plain = aiohttp.ClientSession


class Sub(Plain):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, headers={"X-Own": "1"}, **kwargs)


def function(*args, **kwargs):
    return Plain(*args, headers={"X-Own": "1"}, **kwargs)


aiohttp.ClientSession = Sub if how == "subclass" else function

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp_smg_routing import Routing, setup


async def call(request):
    session = aiohttp.ClientSession() if "anew" in request.path else request.app["client"]
    async with session.post(gateway + "/v1/chat/completions"):
        pass
    if "anew" in request.path:
        await session.close()
    return web.Response()


async def client_session(app):
    app["client"] = aiohttp.ClientSession()
    yield
    await app["client"].close()


async def main():
    for config in ({"client_session": "client"}, {"instrument": True}):
        app = web.Application()
        app.cleanup_ctx.append(client_session)
        app.router.add_post("/{session_id}", call)
        app.router.add_post("/{session_id}/anew", call)
        setup(app, {"gateway": gateway, **config})
        async with TestClient(TestServer(app)) as client:
            async with client.post("/kept") as response:
                assert response.status == 200
            async with client.post("/s-1/anew") as response:
                assert response.status == 200
    async with aiohttp.ClientSession() as session:
        Routing({"gateway": gateway}).attach(session)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["subclass", "function"])
async def test_a_client_session_that_was_replaced_before_the_import_is_no_other(
    gateway: Recorder, how: str
) -> None:
    argv = (sys.executable, "-W", "ignore", "-c", REPLACED, str(gateway.url), how)
    done = await asyncio.to_thread(finished, ROOT, *argv)
    assert done.returncode == 0, done.stderr
    assert [call.values("X-Own") for call in gateway.calls] == [[b"1"]] * 4
    assert [call.keys for call in gateway.calls] == [[b"kept"], [], [b"kept"], [b"s-1"]]


# Mocks


class OwnMock(mock.MagicMock):
    """A subclass of the user's."""


MOCKS: dict[str, Callable[[], Any]] = {
    "Mock(spec)": lambda: mock.Mock(spec=ClientSession),
    "Mock(spec_set)": lambda: mock.Mock(spec_set=ClientSession),
    "MagicMock(spec)": lambda: mock.MagicMock(spec=ClientSession),
    "AsyncMock(spec)": lambda: mock.AsyncMock(spec=ClientSession),
    "NonCallableMock(spec)": lambda: mock.NonCallableMock(spec=ClientSession),
    "create_autospec": lambda: mock.create_autospec(ClientSession, instance=True),
    "Mock": lambda: mock.Mock(),
    "MagicMock": lambda: mock.MagicMock(),
    "AsyncMock": lambda: mock.AsyncMock(),
    "OwnMock": lambda: OwnMock(),
    "OwnMock(spec)": lambda: OwnMock(spec=ClientSession),
}


@pytest.mark.parametrize("make", MOCKS.values(), ids=MOCKS)
@pytest.mark.parametrize("instrument", [False, True])
async def test_a_mock_under_the_app_key_is_skipped_with_a_line(
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[], Any],
    instrument: bool,
) -> None:
    caplog.set_level(logging.INFO, "aiohttp_smg_routing")
    mocked = make()

    async def handler(request: web.Request) -> web.Response:
        assert request.app[CLIENT] is mocked
        return web.Response()

    app = web.Application()
    app[CLIENT] = mocked
    app.router.add_post("/{session_id}", handler)
    setup(app, RoutingConfig("http://gateway", client_session="client", instrument=instrument))
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 200
    skipped, start = said(caplog, logging.INFO)
    assert skipped == f"client_session 'client': a {type(mocked).__name__} takes no hook"
    assert "that of app['client']" not in start
    assert ("no ClientSession has the hook yet" in start) is not instrument


@pytest.mark.parametrize("make", MOCKS.values(), ids=MOCKS)
def test_a_mock_in_attach_is_skipped_with_a_line(
    caplog: pytest.LogCaptureFixture, make: Callable[[], Any]
) -> None:
    mocked = make()
    Routing(RoutingConfig("http://gateway")).attach(mocked)
    assert said(caplog) == [f"attach(): a {type(mocked).__name__} takes no hook"]


@pytest.mark.parametrize("value", [None, {}, "session", ClientSession, object(), web.Application])
async def test_what_is_no_client_session_and_no_mock_is_an_error_that_says_what_to_do(
    caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    remedy = r"trace_configs=\[routing\.trace_config\(\)\]"
    with pytest.raises(TypeError, match=rf"attach\(\) takes an aiohttp\.ClientSession.*{remedy}"):
        Routing(RoutingConfig("http://gateway")).attach(value)
    app = web.Application()
    app[web.AppKey("client", object)] = value
    setup(app, RoutingConfig("http://gateway", client_session="client"))
    runner = web.AppRunner(app)
    with pytest.raises(ConfigError, match="'client' does not name one ClientSession of this app"):
        await runner.setup()
    await runner.cleanup()
    assert said(caplog) == []


# Other hooks


def emptying(where: str, how: str) -> TraceConfig:
    """Return a hook that removes all hooks of its ClientSession during a call."""
    config = TraceConfig()

    async def empty(session: Any, context: Any, params: Any) -> None:
        if how == "in place":
            session._trace_configs.clear()
        else:
            session._trace_configs = []

    getattr(config, where).append(empty)
    return config


@pytest.mark.parametrize("how", ["in place", "anew"])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("where", ["on_request_start", "on_request_end", "on_request_redirect"])
async def test_another_hook_that_empties_the_list_during_a_call_fails_no_call(
    gateway: Recorder, elsewhere: Recorder, where: str, is_first: bool, how: str
) -> None:
    for url in (gateway.chat, elsewhere.chat):
        gateway.calls.clear()
        gateway.answer_with(redirect("?again"))
        routing = Routing(RoutingConfig(gateway.url))
        theirs = emptying(where, how)
        ours = routing.trace_config()
        hooks = [theirs, ours] if is_first else [ours, theirs]
        async with ClientSession(trace_configs=hooks) as session:
            with routing_session("s-1"):
                for _ in range(3):
                    async with session.post(url) as response:
                        assert response.status == 200
        if url == gateway.chat and not (is_first and where == "on_request_start"):
            assert gateway.calls[0].keys == [b"s-1"]


async def test_another_hook_that_raises_raises_as_without_the_plugin(gateway: Recorder) -> None:
    async def fail(session: Any, context: Any, params: Any) -> None:
        raise BrokenError

    for place in (0, 1):
        theirs = TraceConfig()
        theirs.on_request_start.append(fail)
        hooks = [Routing(RoutingConfig(gateway.url)).trace_config()]
        hooks.insert(place, theirs)
        async with ClientSession(trace_configs=hooks) as session:
            with pytest.raises(BrokenError):
                await keys(session, gateway)


async def test_an_on_move_that_raises_fails_no_turn(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    def on_move(move: object) -> None:
        raise BrokenError

    answers = iter([completion(worker=f"http://10.0.0.{turn}:1") for turn in range(4)])
    gateway.answer = lambda call: next(answers)
    app = pinned_server(gateway.url, on_move=on_move)
    client = await aiohttp_client(app)
    for _ in range(4):
        async with client.post(PATH) as response:
            assert response.status == 200
    assert app[ROUTING].pins.summary() == PinSummary(first=1, moved=3, sessions=1)


# Logging


class FailingHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        raise BrokenError


class FailingFilter(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.records.append(record)
        raise BrokenError


class FilteringHandler(logging.NullHandler):
    """A null handler that runs its filters, which ``logging.NullHandler`` doesn't."""

    def handle(self, record: logging.LogRecord) -> bool:
        return bool(self.filter(record))


@pytest.fixture(params=["handler", "filter of a handler", "filter of a logger"])
def records(request: pytest.FixtureRequest) -> Iterator[list[logging.LogRecord]]:
    """Make every record of the plugin raise, and yield the records that did."""
    package = logging.getLogger("aiohttp_smg_routing")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(package.name)]
    filtered = FilteringHandler()
    failing: Any = FailingHandler() if request.param == "handler" else FailingFilter()
    places: dict[str, tuple[list[Any], str]] = {
        "handler": ([package], "Handler"),
        "filter of a handler": ([filtered], "Filter"),
        "filter of a logger": ([logging.getLogger(name) for name in names], "Filter"),
    }
    given, kind = places[request.param]
    level = package.level
    package.setLevel(logging.DEBUG)
    package.addHandler(filtered)
    for place in given:
        getattr(place, f"add{kind}")(failing)
    yield failing.records
    for place in given:
        getattr(place, f"remove{kind}")(failing)
    package.removeHandler(filtered)
    package.setLevel(level)


class HeldWrong:
    """The handlers of a server that makes every mistake which the plugin logs."""

    def __init__(self, gateway: Recorder, elsewhere: Recorder) -> None:
        self.go_on = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self._gateway, self._elsewhere = gateway, elsewhere

    async def call(self, request: web.Request) -> web.Response:
        async with request.app[CLIENT].post(self._gateway.chat):
            return web.Response()

    async def near(self, request: web.Request) -> web.Response:
        async with request.app[CLIENT].post(self._elsewhere.chat):
            return web.Response()

    async def nothing(self, request: web.Request) -> web.Response:
        return web.Response()

    async def late(self, request: web.Request) -> web.Response:
        async def straggler() -> None:
            await self.go_on.wait()
            await self.call(request)

        self.tasks.append(asyncio.create_task(straggler()))
        return web.Response()


def failing_source(request: web.Request) -> str | None:
    raise BrokenError


async def test_logging_that_raises_fails_no_start_and_no_turn(
    gateway: Recorder,
    elsewhere: Recorder,
    records: list[logging.LogRecord],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server makes every mistake, so the plugin logs every line that it has."""
    workers = iter(range(1_000))
    gateway.answer = lambda call: completion(worker=f"http://10.0.0.1:{next(workers)}")
    held, app = HeldWrong(gateway, elsewhere), web.Application()
    for name in ("near", "nothing", "call", "late"):
        app.router.add_post(f"/{{session_id}}/{name}", getattr(held, name))
    app.router.add_post("/missing", held.call)
    config = RoutingConfig(
        gateway.url,
        client_session=["client", "mocked"],
        session_id=[failing_source, "match_info:session_id"],
        on_missing="warn",
    )
    setup(app, config)
    app[web.AppKey("mocked", object)] = mock.Mock(spec=ClientSession)
    async with ClientSession() as app[CLIENT], TestClient(TestServer(app)) as client:
        for path in ("/s/near", "/s/nothing", "/missing", "/s/call", "/s/late"):
            for _ in range(70):
                async with client.post(path) as response:
                    assert response.status == 200, await response.text()
        held.go_on.set()
        await asyncio.gather(*held.tasks)
    lines = {record.getMessage() for record in records}
    for words in (
        *("takes no hook", "the hook is on these", "session id source", "goes out without a key"),
        *("POST requests in a row", "has no session", "calls without a session", "none had a"),
        *("carries the key of", "moved from", "20 moves", "in the session of a request that"),
    ):
        assert any(words in line for line in lines), words
    assert "BrokenError" in capsys.readouterr().err
    assert len(gateway.calls) == 70 * 3


async def test_requests_that_no_route_takes_are_answered_as_without_the_plugin(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(pinned_server(gateway.url, on_missing="raise"))
    for method, path, status in (("POST", "/nowhere", 404), ("GET", PATH, 405)):
        async with client.request(method, path) as response:
            assert response.status == status
