"""``setup()`` adds the plugin to an app, and clean-up removes all of it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession, web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import ROUTING, ConfigError, PinSummary, Routing, RoutingConfig, setup
from aiohttp_smg_routing.testing import Recorder, completion
from benchmarks.counting import calls_into_plugin
from harness.proxies import CLIENT, naive_proxy, pinned_server

from ..turns import PATH, keys

MOST_FUNCTIONS_OF_A_TURN = 12

WORKER = "http://10.0.0.1:8000"


async def test_one_line_pins_a_session(gateway: Recorder, aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(pinned_server(gateway.url))
    for _ in range(3):
        async with client.post(PATH, json={}) as response:
            assert response.status == 200
    assert [call.keys for call in gateway.calls] == [[b"s-1"]] * 3


def test_setup_keeps_what_it_returns_and_installs_the_middleware() -> None:
    app = web.Application()
    routing = setup(app, {"gateway": "http://gateway"})
    assert isinstance(routing, Routing)
    assert app[ROUTING] is routing
    assert routing.config == RoutingConfig("http://gateway")
    assert list(app.middlewares) == [routing.middleware]


@pytest.mark.parametrize(
    ("config", "idle"),
    [
        ({"instrument": True}, ["instrument"]),
        (
            {"client_session": "client", "hide_worker_ids": True},
            ["client_session", "hide_worker_ids"],
        ),
        ({"instrument": True, "enabled": False}, []),
        ({"on_missing": "warn"}, []),
    ],
)
def test_what_only_an_app_can_do_is_said_to_be_idle_without_one(
    config: dict[str, Any], idle: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config["gateway"] = "http://gateway"
    setup(web.Application(), config)
    assert not caplog.messages
    Routing(config)
    assert [message.split(":")[0] for message in caplog.messages] == idle
    remedies = {message.partition("instead, ")[2] for message in caplog.messages}
    assert len(remedies - {""}) == len(idle), "each has its own"


async def test_the_routing_of_an_app_is_found_in_a_handler_of_an_inner_one(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    async def end(request: web.Request) -> web.Response:
        routing = request.config_dict[ROUTING]
        routing.end(request.match_info["session_id"])
        return web.Response(text=str(routing.pins.of("s-1")))

    inner = web.Application()
    inner.router.add_delete("/{session_id}", end)
    app = pinned_server(gateway.url)
    app.add_subapp("/inner", inner)
    client = await aiohttp_client(app)
    gateway.answer_with(completion(worker="http://10.0.0.1:8000"))
    async with client.post(PATH, json={}):
        pass
    assert [pin.session for pin in app[ROUTING].pins.sessions()] == ["s-1"]
    async with client.delete("/inner/s-1") as response:
        assert await response.text() == "[]"
    assert app[ROUTING].pins.summary() == PinSummary(first=1)


async def test_not_enabled_installs_nothing(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = pinned_server(gateway.url, enabled="false")
    assert list(app.middlewares) == []
    assert app[ROUTING].config.enabled is False
    client = await aiohttp_client(app)
    async with client.post(PATH, json={}) as response:
        assert response.status == 200
    assert gateway.last.keys == []
    assert app[CLIENT].trace_configs == []


def test_a_wrong_config_stops_the_app_at_setup_and_leaves_it_as_it_was() -> None:
    app = web.Application()
    with pytest.raises(ConfigError, match="gateway: 'localhost:30000' is not an absolute http"):
        setup(app, {"gateway": "localhost:30000"})
    assert list(app) == []
    assert list(app.middlewares) == []
    setup(app, {"gateway": "http://localhost:30000"})


def test_setup_is_called_once() -> None:
    app = web.Application()
    setup(app, {"gateway": "http://one"})
    with pytest.raises(RuntimeError, match=r"set up already: call setup\(\) once"):
        setup(app, {"gateway": "http://two"})


def test_setup_of_an_app_that_is_in_another_one_says_where_to_call_it() -> None:
    app, sub_app = web.Application(), web.Application()
    app.add_subapp("/sub", sub_app)
    with pytest.raises(RuntimeError, match=r"call setup\(\) where the app is made, .*another app"):
        setup(sub_app, {"gateway": "http://gateway"})
    assert list(sub_app) == []


@pytest.mark.parametrize("when", ["on_startup", "cleanup_ctx", "started"])
async def test_setup_of_an_app_that_starts_or_runs_says_where_to_call_it(when: str) -> None:
    def fail(app: web.Application) -> None:
        with pytest.raises(
            RuntimeError,
            match=r"frozen: call setup\(\) where the app is made, .*not in on_startup",
        ):
            setup(app, {"gateway": "http://gateway"})

    async def start(app: web.Application) -> None:
        fail(app)

    async def run(app: web.Application) -> AsyncIterator[None]:
        fail(app)
        yield

    app = web.Application()
    if when == "on_startup":
        app.on_startup.append(start)
    elif when == "cleanup_ctx":
        app.cleanup_ctx.append(run)
    runner = web.AppRunner(app)
    await runner.setup()
    fail(app)
    await runner.cleanup()
    assert list(app) == []
    assert list(app.middlewares) == []


@pytest.mark.parametrize(
    "app", [{"gateway": "http://gateway"}, RoutingConfig("http://gateway"), None]
)
def test_setup_with_swapped_arguments_says_what_comes_first(app: Any) -> None:
    config: Any = web.Application()
    with pytest.raises(TypeError, match=r"setup\(app, config\) takes the app first, not a"):
        setup(app, config)


NAME = CLIENT._name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (CLIENT, CLIENT),
        (CLIENT, "client"),
        (CLIENT, NAME),
        ("http", "http"),
        ("a.client", "a.client"),
        ("http", ["http"]),
    ],
)
@pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")
async def test_client_session_names_the_session_to_attach_to(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient, key: Any, name: Any
) -> None:
    app = web.Application()

    async def client_session(app: web.Application) -> None:
        app[key] = outgoing

    async def handler(request: web.Request) -> web.Response:
        async with outgoing.post(gateway.chat):
            return web.Response()

    app.on_startup.append(client_session)
    app.router.add_post("/{session_id}", handler)
    setup(app, RoutingConfig(gateway.url, client_session=name))
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 200
    assert gateway.last.keys == [b"s-1"]


async def test_client_session_may_name_several(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    async with ClientSession() as other:
        app = web.Application()
        second = web.AppKey("second", ClientSession)
        app[CLIENT], app[second] = outgoing, other
        setup(app, RoutingConfig(gateway.url, client_session=[CLIENT, "second"]))
        await aiohttp_client(app)
        for session in (outgoing, other):
            assert await keys(session, gateway) == [b"s-1"]


async def test_an_app_that_is_cleaned_up_leaves_no_hook(
    gateway: Recorder, outgoing: ClientSession
) -> None:
    """The next app on the ClientSession sends its own keys; after the last app there are none."""
    for number in range(50):
        app = web.Application()
        app[CLIENT] = outgoing
        config = RoutingConfig(
            gateway.url, client_session="client", prefix=f"{number}/", on_missing="raise"
        )
        setup(app, config)
        runner = web.AppRunner(app)
        await runner.setup()
        assert await keys(outgoing, gateway) == [f"{number}/s-1".encode()]
        await runner.cleanup()
        assert outgoing.trace_configs == []
    async with outgoing.post(gateway.chat):  # on_missing = "raise" no longer applies
        pass
    assert gateway.last.keys == []


async def test_an_app_may_start_again(gateway: Recorder, outgoing: ClientSession) -> None:
    app = web.Application()
    app[CLIENT] = outgoing
    setup(app, RoutingConfig(gateway.url, client_session="client"))
    for _ in range(2):
        runner = web.AppRunner(app)
        await runner.setup()
        assert len(outgoing.trace_configs) == 1
        assert await keys(outgoing, gateway) == [b"s-1"]
        await runner.cleanup()
        assert outgoing.trace_configs == []


async def test_apps_side_by_side_on_one_client_session_end_each_by_itself(
    gateway: Recorder, outgoing: ClientSession
) -> None:
    runners = []
    for prefix in ("a/", "b/"):
        app = web.Application()
        app[CLIENT] = outgoing
        setup(app, RoutingConfig(gateway.url, client_session="client", prefix=prefix))
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
    assert await keys(outgoing, gateway) == [b"a/s-1"]
    await runners[0].cleanup()
    assert await keys(outgoing, gateway) == [b"b/s-1"]
    await runners[1].cleanup()
    assert await keys(outgoing, gateway) == []


@pytest.mark.parametrize("config", [{"client_session": "client"}, {"instrument": True}])
async def test_a_call_that_is_under_way_at_the_clean_up_is_answered_and_counted(
    gateway: Recorder, outgoing: ClientSession, config: dict[str, Any]
) -> None:
    is_here, go_on = asyncio.Event(), asyncio.Event()

    async def answer() -> AsyncGenerator[bytes, None]:
        is_here.set()
        await go_on.wait()
        yield completion(worker=WORKER)

    app = web.Application()
    app[CLIENT] = outgoing
    routing = setup(app, RoutingConfig(gateway.url, **config))
    runner = web.AppRunner(app)
    await runner.setup()
    gateway.answer_with(answer())
    call = asyncio.create_task(keys(outgoing, gateway))
    await is_here.wait()
    await runner.cleanup()
    go_on.set()
    assert await call == [b"s-1"]
    assert routing.pins.summary() == PinSummary(first=1, sessions=1)
    assert await keys(outgoing, gateway) == []


async def test_calls_that_an_app_makes_at_its_clean_up_carry_the_key(gateway: Recorder) -> None:
    async def client_session(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as app[CLIENT]:
            yield
            assert await keys(app[CLIENT], gateway) == [b"s-1"]

    app = web.Application()
    app.cleanup_ctx.append(client_session)
    setup(app, RoutingConfig(gateway.url, client_session="client"))
    runner = web.AppRunner(app)
    await runner.setup()
    await runner.cleanup()
    assert gateway.last.keys == [b"s-1"]


@pytest.mark.parametrize("is_inner", [False, True])
@pytest.mark.parametrize("config", [{"client_session": "client"}, {"instrument": True}])
async def test_calls_that_apps_make_when_their_contexts_have_ended_carry_the_key(
    gateway: Recorder, outgoing: ClientSession, config: dict[str, Any], is_inner: bool
) -> None:
    """The handlers and the inner app are added after ``setup()``, and the app runs twice."""

    async def flush(_: web.Application) -> None:
        await keys(outgoing, gateway)

    async def drain(app: web.Application) -> AsyncIterator[None]:
        yield
        await flush(app)

    app, inner = web.Application(), web.Application()
    setup_app = inner if is_inner else app
    setup_app[CLIENT] = outgoing
    setup(setup_app, RoutingConfig(gateway.url, **config))
    inner.cleanup_ctx.append(drain)
    for each in (app, inner):
        each.on_cleanup.append(flush)
    app.add_subapp("/inner", inner)
    for _ in range(2):
        runner = web.AppRunner(app)
        await runner.setup()
        gateway.calls.clear()
        await runner.cleanup()
        assert [call.keys for call in gateway.calls] == [[b"s-1"]] * 3
        assert await keys(outgoing, gateway) == []


@pytest.mark.parametrize("where", ["cleanup_ctx", "on_cleanup"])
async def test_an_app_whose_own_clean_up_fails_leaves_no_hook(
    gateway: Recorder, outgoing: ClientSession, where: str
) -> None:
    async def fail(app: web.Application) -> None:
        raise ZeroDivisionError

    async def fail_later(app: web.Application) -> AsyncIterator[None]:
        yield
        raise ZeroDivisionError

    app = web.Application()
    app[CLIENT] = outgoing
    if where == "on_cleanup":
        app.on_cleanup.append(fail)
    else:
        app.cleanup_ctx.append(fail_later)
    setup(app, RoutingConfig(gateway.url, client_session="client"))
    runner = web.AppRunner(app)
    await runner.setup()
    with pytest.raises(ZeroDivisionError):
        await runner.cleanup()
    assert outgoing.trace_configs == []


@pytest.mark.parametrize("fault", ["a later start-up", "another name"])
async def test_an_app_that_fails_to_start_leaves_no_hook(
    gateway: Recorder, outgoing: ClientSession, fault: str
) -> None:
    async def fail(app: web.Application) -> None:
        raise ZeroDivisionError

    app = web.Application()
    app[CLIENT] = outgoing
    names = ["client", "missing"] if fault == "another name" else ["client"]
    setup(app, RoutingConfig(gateway.url, client_session=names))
    app.on_startup.append(fail)
    runner = web.AppRunner(app)
    with pytest.raises((ZeroDivisionError, ConfigError)):
        await runner.setup()
    await runner.cleanup()
    assert outgoing.trace_configs == []


async def test_clean_up_leaves_a_hook_that_the_user_put_there(
    gateway: Recorder, outgoing: ClientSession
) -> None:
    Routing(RoutingConfig(gateway.url, prefix="mine/")).attach(outgoing)
    app = web.Application()
    app[CLIENT] = outgoing
    setup(app, RoutingConfig(gateway.url, client_session="client"))
    runner = web.AppRunner(app)
    await runner.setup()
    await runner.cleanup()
    assert await keys(outgoing, gateway) == [b"mine/s-1"]


async def test_clean_up_takes_off_what_the_app_attached_while_it_ran(
    gateway: Recorder, outgoing: ClientSession
) -> None:
    async def attach(app: web.Application) -> None:
        app[ROUTING].attach(outgoing)

    for _ in range(50):
        app = web.Application()
        setup(app, RoutingConfig(gateway.url, on_missing="raise"))
        app.on_startup.append(attach)
        runner = web.AppRunner(app)
        await runner.setup()
        assert await keys(outgoing, gateway) == [b"s-1"]
        await runner.cleanup()
    assert outgoing.trace_configs == []
    async with outgoing.post(gateway.chat):
        pass


async def test_what_was_attached_has_the_hook_again_when_the_app_is_started_again(
    gateway: Recorder, outgoing: ClientSession
) -> None:
    app = web.Application()
    setup(app, RoutingConfig(gateway.url)).attach(outgoing)
    for _ in range(2):
        runner = web.AppRunner(app)
        await runner.setup()
        assert await keys(outgoing, gateway) == [b"s-1"]
        await runner.cleanup()
        assert await keys(outgoing, gateway) == []


async def test_clean_up_leaves_the_hook_that_a_session_was_made_with(gateway: Recorder) -> None:
    app = web.Application()
    routing = setup(app, RoutingConfig(gateway.url, client_session="client"))
    async with ClientSession(trace_configs=[routing.trace_config()]) as app[CLIENT]:
        runner = web.AppRunner(app)
        await runner.setup()
        assert await keys(app[CLIENT], gateway) == [b"s-1"]
        await runner.cleanup()
        assert await keys(app[CLIENT], gateway) == [b"s-1"]
    assert routing.pins.summary() == PinSummary(unknown=2, sessions=1)


@pytest.mark.parametrize(
    ("name", "got"), [("clinet", "'clinet' does not name one"), ("config", "'config' does not")]
)
async def test_client_session_that_is_not_there_stops_the_app_at_start(
    outgoing: ClientSession, name: str, got: str
) -> None:
    app = web.Application()
    app[CLIENT] = outgoing
    app[web.AppKey("config", dict)] = {}
    setup(app, {"gateway": "http://gateway", "client_session": name})
    runner = web.AppRunner(app)
    with pytest.raises(ConfigError) as caught:
        await runner.setup()
    await runner.cleanup()
    assert got in str(caught.value)
    assert "it has ['client']" in str(caught.value)


async def test_client_session_that_names_two_stops_the_app_at_start(
    outgoing: ClientSession,
) -> None:
    app = web.Application()
    app[CLIENT] = outgoing
    app[web.AppKey("client", ClientSession)] = outgoing
    setup(app, {"gateway": "http://gateway", "client_session": "client"})
    runner = web.AppRunner(app)
    two = r"'client' does not name one ClientSession .+; it has \['client', 'client'\]"
    with pytest.raises(ConfigError, match=two):
        await runner.setup()
    await runner.cleanup()


async def test_earlier_middlewares_can_store_the_id(
    gateway: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    @web.middleware
    async def store(request: web.Request, handler: Any) -> web.StreamResponse:
        request._state["tenant_session"] = "s-9"
        response: web.StreamResponse = await handler(request)
        return response

    app = web.Application(middlewares=[store])
    app[CLIENT] = outgoing
    app.router.add_post("/", naive_proxy(gateway.url))
    setup(
        app,
        {
            "gateway": str(gateway.url),
            "session_id": "request:tenant_session",
            "client_session": "client",
        },
    )
    client = await aiohttp_client(app)
    async with client.post("/") as response:
        assert response.status == 200
    assert gateway.last.keys == [b"s-9"]


def passing_all_on(upstream: Recorder) -> Any:
    """Return the handler of a naive proxy that passes on the gateway's answer."""

    async def handler(request: web.Request) -> web.StreamResponse:
        async with request.app[CLIENT].post(upstream.chat) as answer:
            head: Any = {"status": answer.status, "headers": answer.headers}
            body = await answer.read()
            if request.query_string == "raise":
                worker = {"x-smg-routed-worker-id": answer.headers["X-SMG-Routed-Worker-Id"]}
                raise web.HTTPOk(headers=worker, text=body.decode())
            if request.query_string != "stream":
                return web.Response(**head, body=body)
            response = web.StreamResponse(**head)
            await response.prepare(request)
            await response.write(body)
            return response

    return handler


@pytest.mark.parametrize("how", ["plain", "stream", "raise"])
@pytest.mark.parametrize("hide", [True, False])
async def test_hide_worker_ids_takes_the_header_off_and_leaves_the_body(
    gateway: Recorder, aiohttp_client: AiohttpClient, how: str, hide: bool
) -> None:
    """The option covers the header only."""
    gateway.answer = lambda call: completion(f"from {WORKER}", worker=WORKER)
    app = pinned_server(gateway.url, hide_worker_ids=hide)
    app.router.add_post("/all/{session_id}", passing_all_on(gateway))
    client = await aiohttp_client(app)
    async with client.post(f"/all/s-1?{how}") as response:
        assert response.status == 200
        assert response.headers.getall("X-SMG-Routed-Worker-Id", []) == ([] if hide else [WORKER])
        assert WORKER in await response.text()
    [pin] = app[ROUTING].pins.of("s-1")
    assert pin.worker == WORKER


async def test_a_turn_starts_few_functions_of_the_core(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    """Agent, server and gateway run in this process; the agent's ClientSession has no hook."""
    gateway.answer = lambda call: completion(worker=WORKER)
    client = await aiohttp_client(pinned_server(gateway.url))

    async def turn() -> None:
        async with client.post(PATH, json={}) as response:
            assert response.status == 200

    for _ in range(2):  # the first turn makes the ledger's entry
        await turn()
    assert 0 < await calls_into_plugin(turn) <= MOST_FUNCTIONS_OF_A_TURN


async def test_a_plugin_that_is_off_starts_no_function(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(pinned_server(gateway.url, enabled=False))

    async def turn() -> None:
        async with client.post(PATH, json={}) as response:
            assert response.status == 200

    await turn()
    assert await calls_into_plugin(turn) == 0
