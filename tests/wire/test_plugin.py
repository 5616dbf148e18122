from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession, web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import ROUTING_CONFIG, ConfigError, RoutingConfig, setup
from aiohttp_smg_routing.testing import Recorder

from ..conftest import CLIENT, naive_proxy, session_server

PATH = "/sessions/s-1/v1/chat/completions"


@pytest.fixture
async def outgoing() -> AsyncIterator[ClientSession]:
    async with ClientSession() as session:
        yield session


async def test_one_line_pins_a_session(gateway: Recorder, aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(session_server(gateway.url))
    for _ in range(3):
        async with client.post(PATH, json={}) as response:
            assert response.status == 200
    assert [call.keys for call in gateway.calls] == [[b"s-1"]] * 3


def test_setup_keeps_the_config_and_installs_the_middleware() -> None:
    app = web.Application()
    setup(app, {"gateway": "http://gateway"})
    assert app[ROUTING_CONFIG] == RoutingConfig("http://gateway")
    assert len(app.middlewares) == 1


async def test_not_enabled_installs_nothing(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = session_server(gateway.url, enabled="false")
    assert list(app.middlewares) == []
    assert app[ROUTING_CONFIG].enabled is False
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
    with pytest.raises(
        RuntimeError, match="set up already: one setup\\(\\) takes several gateways"
    ):
        setup(app, {"gateway": "http://two"})


def test_setup_comes_before_the_app_is_frozen() -> None:
    app, sub_app = web.Application(), web.Application()
    app.add_subapp("/sub", sub_app)
    with pytest.raises(RuntimeError, match="call setup\\(\\) before it is started or added"):
        setup(sub_app, {"gateway": "http://gateway"})


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


async def test_client_session_may_name_several(gateway: Recorder, outgoing: ClientSession) -> None:
    async with ClientSession() as other:
        app = web.Application()
        second = web.AppKey("second", ClientSession)
        app[CLIENT], app[second] = outgoing, other
        setup(app, RoutingConfig(gateway.url, client_session=[CLIENT, "second"]))
        runner = web.AppRunner(app)
        await runner.setup()
        await runner.cleanup()
        assert len(outgoing.trace_configs) == len(other.trace_configs) == 1


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
    assert repr(CLIENT) in str(caught.value)


async def test_client_session_that_names_two_stops_the_app_at_start(
    outgoing: ClientSession,
) -> None:
    app = web.Application()
    app[CLIENT] = outgoing
    app[web.AppKey("client", ClientSession)] = outgoing
    setup(app, {"gateway": "http://gateway", "client_session": "client"})
    runner = web.AppRunner(app)
    with pytest.raises(ConfigError, match="'client' does not name one ClientSession"):
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
