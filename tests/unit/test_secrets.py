"""Where ``key = "digest"`` no id and no secret shows in a log, a repr, an error or a metric."""

import logging
import traceback
from collections.abc import AsyncGenerator, Mapping
from dataclasses import fields
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, web
from prometheus_client import CollectorRegistry, generate_latest
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    PINS,
    ConfigError,
    MissingSessionError,
    RoutingConfig,
    SessionIdFilter,
    routing_key,
    routing_session,
    routing_trace_config,
)
from aiohttp_smg_routing.context import current_scope
from aiohttp_smg_routing.testing import Recorder, answer, completion, failure

from ..conftest import CLIENT, session_server

ID = "sk-agent-credential"
SECRET = "hmac-hush"
PATH = "/v1/chat/completions"


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Keep each record of each logger, with the session on it."""
    caplog.set_level(logging.DEBUG)
    caplog.handler.addFilter(SessionIdFilter())
    caplog.handler.setFormatter(
        logging.Formatter("%(name)s %(session_id)s %(message)s %(args)s", defaults={})
    )
    return caplog


def assert_hidden(*shown: object) -> None:
    """Assert that neither the id nor the secret can be read anywhere, nor parts of them."""
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

    app = session_server(
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
        async with client.post(PATH, json={}, headers=headers) as response:
            assert_hidden(await response.text(), dict(response.headers))
            statuses.append(response.status)
    assert statuses == [200, 200, 200, 500, 500, 500, 500 if on_missing == "raise" else 200]
    key = routing_key(ID, key="digest", secret=SECRET)
    assert {*map(tuple, (call.keys for call in gateway.calls[:6]))} == {(key.encode(),)}
    pins = app[PINS]
    assert [*pins.sessions()] == [key]
    assert len(moves) == 1
    assert "moved from http://w1 to http://w2" in logged.text
    assert "has no session" in logged.text
    assert ("failed: it counts as no session" in logged.text) == callable(source)
    assert (f"{source_that_quotes_the_id.__name__}\n" in logged.text) == callable(source)
    assert_hidden(logged.text, *logged.records, *(record.__dict__ for record in logged.records))
    assert_hidden(*reprs, moves, pins, pins.summary(), pins.config, dict(pins.sessions()))
    assert_hidden(pins.workers(), generate_latest(registry).decode(), app[CLIENT].trace_configs)


async def reset() -> AsyncGenerator[bytes, None]:
    """Close the connection in place of an answer."""
    yield b""


async def test_what_fails_outside_a_request_shows_neither_id_nor_secret(
    gateway: Recorder, logged: pytest.LogCaptureFixture
) -> None:
    config = RoutingConfig(gateway.url, key="digest", secret=SECRET, on_missing="raise")
    shown: list[object] = []
    async with ClientSession(trace_configs=[routing_trace_config(config)]) as session:
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
    assert_hidden(*shown, logged.text)


@pytest.mark.parametrize(
    "mapping",
    [
        {"secret": SECRET},
        {"secret": [SECRET], "key": "digest"},
        {"secret": {SECRET: 1}, "key": "digest"},
        {"secret": SECRET, "key": "digests"},
        {"secret": SECRET, "prefix": "a b", "key": "digest", "header": "", "paths": "x"},
        {"secert": SECRET, "key": "digest"},
        {"key": SECRET},
        {"gateway": f"ftp://user:{SECRET}@gateway"},
        {"gateway": f"http://user:pa{SECRET},ss@gateway"},
        {"gateway": f"http://one, http://user:x,{SECRET},/@two"},
        {"gateway": f"http://gateway/?token={SECRET}"},
        {"gateway": f"http://gateway/?a={SECRET},b"},
        {"gateway": f"http://gateway/#{SECRET}"},
        {"gateway": [f"http://user:{SECRET}@", f"http://user:{SECRET}"]},
    ],
)
def test_a_bad_config_does_not_show_its_secret(mapping: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_mapping({"gateway": "http://gateway", **mapping})
    assert_hidden(caught.value, caught.value.faults)
    env = {f"SMG_ROUTING_{name.upper()}": str(value) for name, value in mapping.items()}
    with pytest.raises(ConfigError) as from_env:
        RoutingConfig.from_env(environ=env)
    assert_hidden(from_env.value)


@pytest.mark.parametrize("name", [field.name for field in fields(RoutingConfig) if field.init])
def test_a_table_in_place_of_a_value_is_not_shown(name: str) -> None:
    for table in ({"secret": SECRET}, [{SECRET: "x"}], {SECRET}):
        with pytest.raises(ConfigError) as caught:
            RoutingConfig.from_mapping({"gateway": "http://gateway", name: table})
        assert {named for named, _ in caught.value.faults} == {name}
        assert_hidden(caught.value)


@pytest.mark.parametrize("config", [[("secret", SECRET)], f"secret = {SECRET}", {SECRET}])
def test_a_config_of_another_type_does_not_show_its_secret(config: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        routing_trace_config(config)
    assert_hidden(caught.value)
