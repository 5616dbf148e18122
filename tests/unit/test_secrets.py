"""With ``key = "digest"`` no log, repr, error or metric shows an id or a secret."""

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, web
from prometheus_client import CollectorRegistry, generate_latest
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    ROUTING,
    ConfigError,
    MissingSessionError,
    Routing,
    RoutingConfig,
    SessionIdFilter,
    routing_key,
    routing_session,
    setup,
)
from aiohttp_smg_routing.context import current_scope
from aiohttp_smg_routing.testing import Recorder, answer, completion, failure
from harness.agents import CHAT_PATH
from harness.proxies import CLIENT, pinned_server

ID = "sk-agent-credential"
SECRET = "hmac-hush"


@contextmanager
def each_record(
    caplog: pytest.LogCaptureFixture, config: RoutingConfig | None = None
) -> Iterator[pytest.LogCaptureFixture]:
    """Keep each record of each logger, with its session."""
    handler, added, formatter = caplog.handler, SessionIdFilter(config), caplog.handler.formatter
    handler.addFilter(added)
    handler.setFormatter(
        logging.Formatter("%(name)s %(session_id)s %(message)s %(args)s", defaults={})
    )
    with caplog.at_level(logging.DEBUG):
        yield caplog
    handler.removeFilter(added)
    handler.setFormatter(formatter)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with each_record(caplog):
        yield caplog


@pytest.fixture
def digested(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Pass the config to the filter, because no app tells it how to show ids."""
    with each_record(caplog, RoutingConfig("http://gateway", key="digest", secret=SECRET)):
        yield caplog


def assert_hidden(*shown: object) -> None:
    """Assert that no part of the id or of the secret is shown."""
    text = "\n".join(f"{it}\n{it!r}" for it in shown)
    assert "credential" not in text
    assert "hush" not in text


def source_that_quotes_the_id(request: web.Request) -> str:
    given = request.headers["X-Agent"]
    try:
        return str(int(given))
    except ValueError as error:
        raise LookupError(f"no session of {given}") from error


async def source_that_quotes_it_later(request: web.Request) -> str:
    return source_that_quotes_the_id(request)


@pytest.mark.parametrize(
    "source", [source_that_quotes_the_id, source_that_quotes_it_later, "header:Authorization"]
)
@pytest.mark.parametrize("on_missing", ["warn", "raise"])
async def test_real_calls_show_neither_id_nor_secret_whatever_becomes_of_them(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    logged: pytest.LogCaptureFixture,
    source: Any,
    on_missing: str,
) -> None:
    registry, moves, reprs = CollectorRegistry(), [], []

    def on_move(move: object) -> None:
        moves.append(move)
        raise RuntimeError(f"{move} is not to our liking")

    @web.middleware
    async def look(request: web.Request, handler: Any) -> Any:
        reprs.extend([repr(current_scope()), repr(list(request.items())), repr(request)])
        return await handler(request)

    app = pinned_server(
        gateway.url,
        session_id=[source, "header:X-Agent"] if callable(source) else source,
        key="digest",
        secret=SECRET,
        on_missing=on_missing,
        on_move=on_move,
        metrics="prometheus",
        metrics_registry=registry,
    )
    app.middlewares.append(look)
    client = await aiohttp_client(app)
    for worker in ("http://w1", "http://w1", "http://w2"):
        gateway.answer_with(completion(worker=worker))
    gateway.answer_with(failure(500), answer(status=307, headers={"Location": "http://["}), reset())
    agent = {"Authorization": f"Bearer {ID}", "X-Agent": ID}
    statuses = []
    for headers in [*[agent] * 6, {}]:
        async with client.post(CHAT_PATH, json={}, headers=headers) as response:
            assert_hidden(await response.text(), dict(response.headers))
            statuses.append(response.status)
    assert statuses == [200, 200, 200, 500, 500, 500, 500 if on_missing == "raise" else 200]
    key = routing_key(ID, key="digest", secret=SECRET)
    assert {*map(tuple, (call.keys for call in gateway.calls[:6]))} == {(key.encode(),)}
    pins = app[ROUTING].pins
    assert [pin.session for pin in pins.sessions()] == [key]
    assert [pin.session for pin in pins.of(ID)] == [key]
    assert len(moves) == 1
    assert "moved from http://w1 to http://w2" in logged.text
    assert "has no session" in logged.text
    assert ("failed: it counts as no session" in logged.text) == callable(source)
    assert (f"{source_that_quotes_the_id.__name__}\n" in logged.text) == callable(source)
    assert_hidden(logged.text, *logged.records, *(record.__dict__ for record in logged.records))
    assert_hidden(*reprs, moves, pins, pins.summary(), pins.sessions(), pins.of(ID))
    assert_hidden(app[ROUTING], app[ROUTING].config, app[ROUTING].explain("POST", gateway.chat))
    assert_hidden(pins.workers(), generate_latest(registry).decode(), app[CLIENT].trace_configs)


async def reset() -> AsyncGenerator[bytes, None]:
    """Close the connection instead of answering."""
    yield b""


async def test_what_fails_outside_a_request_shows_neither_id_nor_secret(
    gateway: Recorder, digested: pytest.LogCaptureFixture
) -> None:
    config = RoutingConfig(gateway.url, key="digest", secret=SECRET, on_missing="raise")
    shown: list[object] = []
    async with ClientSession(trace_configs=[Routing(config).trace_config()]) as session:
        with routing_session(ID):
            for broken in (reset(), answer(status=307, headers={"Location": "http://["})):
                gateway.answer_with(broken)
                with pytest.raises((ClientError, ValueError)) as caught:
                    await session.post(gateway.chat)
                shown.append("".join(traceback.format_exception(caught.value)))
            shown.append(repr(current_scope()))
        with pytest.raises(MissingSessionError) as missing:
            await session.post(
                gateway.chat.with_user("u").with_password(SECRET) % {"token": SECRET}
            )
        shown.append(missing.value)
        block = routing_session(ID)
        with block, pytest.raises(RuntimeError) as twice:
            block.__enter__()
        shown.extend([twice.value, block])
    assert_hidden(*shown, digested.text)


async def test_calls_that_are_late_or_go_elsewhere_show_neither_id_nor_secret(
    gateway: Recorder,
    elsewhere: Recorder,
    aiohttp_client: AiohttpClient,
    logged: pytest.LogCaptureFixture,
) -> None:
    app, ended, tasks = web.Application(), asyncio.Event(), []
    routing = setup(
        app,
        {
            "gateway": str(gateway.url),
            "session_id": "header:Authorization",
            "pin_by": "{session_id}/{header:X-Agent}",
            "key": "digest",
            "secret": SECRET,
        },
    )
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:

        async def call_later() -> None:
            await ended.wait()
            await session.post(gateway.chat)

        async def handler(request: web.Request) -> web.Response:
            tasks.append(asyncio.create_task(call_later()))
            near = elsewhere.chat.with_user("agent").with_password(SECRET) % {"token": SECRET}
            for _ in range(25):
                await session.post(near)
            return web.Response()

        app.router.add_post("/", handler)
        client = await aiohttp_client(app)
        agent = {"Authorization": f"Bearer {ID}", "X-Agent": ID}
        async with client.post("/", headers=agent) as response:
            assert response.status == 200
        await client.close()  # waits until the request has ended
        ended.set()
        await tasks[0]
    summary = routing.pins.summary()
    assert (summary.unmatched, summary.late, summary.first + summary.unknown) == (25, 1, 1)
    assert "goes out without a key" in logged.text
    assert "call_later" in logged.text
    [pin] = routing.pins.sessions()
    assert gateway.last.keys == [pin.key.encode()]
    assert pin.key.startswith("hmac-sha256-")
    assert_hidden(logged.text, *(record.__dict__ for record in logged.records))
    assert_hidden(pin, summary, routing.pins.of(ID))


@pytest.mark.parametrize(
    "mapping",
    [
        {"secret": SECRET},
        {"secret": [SECRET], "key": "digest"},
        {"secret": {SECRET: 1}, "key": "digest"},
        {"secret": SECRET, "key": "digests"},
        {"secret": SECRET, "pin_by": "{session_id"},
        {"smg_routing": {"gateway": "http://gateway", "secret": SECRET}},
        {"secret": SECRET, "prefix": "a b", "key": "digest", "header": "", "paths": "x"},
        {"secert": SECRET, "key": "digest"},
        {"key": SECRET},
        {"gateway": f"ftp://user:{SECRET}@gateway"},
        {"gateway": f"http://user:pa{SECRET},ss@gateway"},
        {"gateway": f"http://user:{SECRET}@gateway/v1"},
        {"gateway": f"http://user:{SECRET}@*.gateway"},
        {"gateway": f"http://one, http://user:x,{SECRET},/@two"},
        {"gateway": f"http://user/{SECRET}/@gateway//v1"},
        {"gateway": f"http://gateway/?token={SECRET}"},
        {"gateway": f"http://gateway/?a={SECRET},b"},
        {"gateway": f"http://gateway/#{SECRET}"},
        {"gateway": [f"http://user:{SECRET}@", f"http://user:{SECRET}"]},
    ],
)
def test_a_bad_config_does_not_show_its_secret(mapping: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_mapping(
            mapping if "smg_routing" in mapping else {"gateway": "http://gateway", **mapping}
        )
    assert_hidden(caught.value, caught.value.faults)
    env = {f"SMG_ROUTING_{name.upper()}": str(value) for name, value in mapping.items()}
    with pytest.raises(ConfigError) as from_env:
        RoutingConfig.from_env(environ=env)
    assert_hidden(from_env.value)


@pytest.mark.parametrize("name", [field.name for field in fields(RoutingConfig)])
def test_a_table_in_place_of_a_value_is_not_shown(name: str) -> None:
    for table in ({"secret": SECRET}, [{SECRET: "x"}], {SECRET}):
        with pytest.raises(ConfigError) as caught:
            RoutingConfig.from_mapping({"gateway": "http://gateway", name: table})
        assert {named for named, _ in caught.value.faults} == {name}
        assert_hidden(caught.value)


@pytest.mark.parametrize("config", [[("secret", SECRET)], f"secret = {SECRET}", {SECRET}])
def test_a_config_of_another_type_does_not_show_its_secret(config: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Routing(config)
    assert_hidden(caught.value)
