"""Each log record has the session, in the form that the gateway's log uses."""

import logging
import queue
import threading
from collections.abc import Iterator
from logging.handlers import QueueHandler, QueueListener
from typing import Any

import pytest
from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import ConfigError, RoutingConfig, SessionIdFilter, routing_session
from aiohttp_smg_routing.log import Once
from aiohttp_smg_routing.testing import Recorder
from harness.proxies import pinned_server

CONFIG = RoutingConfig("http://gateway", key="digest", secret="k")


def stamped(log_filter: SessionIdFilter) -> str:
    record = logging.LogRecord("name", logging.INFO, __file__, 1, "message", None, None)
    assert log_filter.filter(record)
    return logging.Formatter("%(session_id)s").format(record)


class Kept(logging.Handler):
    """A handler that keeps the session of each record."""

    def __init__(self, *filters: SessionIdFilter) -> None:
        super().__init__()
        self.said: list[tuple[str, str]] = []
        for each in filters:
            self.addFilter(each)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((getattr(record, "session_id", ""), threading.current_thread().name))


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.Logger("server")
    yield logger
    for handler in logger.handlers:
        handler.close()


def test_the_session_stands_on_the_record() -> None:
    assert stamped(SessionIdFilter()) == "-"
    with routing_session("s-1"):
        assert stamped(SessionIdFilter()) == "s-1"
        with routing_session(None):
            assert stamped(SessionIdFilter()) == "-"


def test_an_id_cannot_forge_a_line_of_the_log() -> None:
    with routing_session("s-1\nERROR forged"):
        assert "\n" not in stamped(SessionIdFilter())


@pytest.mark.parametrize(
    "config", [CONFIG, {"gateway": "http://g", "key": "digest", "secret": "k"}]
)
def test_digest_is_what_the_record_shows(config: Any) -> None:
    with routing_session("bearer-token"):
        assert stamped(SessionIdFilter(config)) == CONFIG.routing_key("bearer-token")


def test_a_wrong_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="config: is a str"):
        SessionIdFilter("http://gateway")  # type: ignore[arg-type]


def test_a_record_that_has_a_session_keeps_it_where_the_code_has_none_or_another(
    logger: logging.Logger,
) -> None:
    record = logging.LogRecord("name", logging.INFO, __file__, 1, "message", None, None)
    with routing_session("s-1"):
        assert SessionIdFilter().filter(record)
    assert SessionIdFilter().filter(record)
    with routing_session("s-2"):
        assert SessionIdFilter(CONFIG).filter(record)
    assert record.session_id == "s-1"  # type: ignore[attr-defined]


def test_extra_of_the_servers_own_wins(logger: logging.Logger) -> None:
    handler = Kept(SessionIdFilter())
    logger.addHandler(handler)
    with routing_session("s-1"):
        logger.info("turn", extra={"session_id": "own"})
        logger.info("turn")
    logger.info("turn", extra={"session_id": ""})
    assert [said for said, _ in handler.said] == ["own", "s-1", ""]


def test_a_record_that_goes_through_a_queue_keeps_its_session(logger: logging.Logger) -> None:
    records: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sending, writing = QueueHandler(records), Kept(SessionIdFilter())
    sending.addFilter(SessionIdFilter())
    logger.addHandler(sending)
    listener = QueueListener(records, writing)
    listener.start()
    for session_id in ("s-1", "s-2"):
        with routing_session(session_id):
            logger.info("turn %d", 1)
    logger.info("no turn")
    listener.stop()  # returns once all is written
    assert [said for said, _ in writing.said] == ["s-1", "s-2", "-"]
    assert {thread for _, thread in writing.said} != {threading.current_thread().name}


async def in_request(
    server: web.Application, aiohttp_client: AiohttpClient, block: str | None = None
) -> str:
    """Log in the handler of a request of session ``bearer-token``; return the record's session."""

    async def handler(request: web.Request) -> web.Response:
        if block is None:
            return web.Response(text=stamped(SessionIdFilter()))
        with routing_session(block):
            return web.Response(text=stamped(SessionIdFilter()))

    server.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(server)
    async with client.post("/bearer-token", json={"model": "judge"}) as response:
        return await response.text()


@pytest.mark.parametrize("block", [None, "bearer-token"])
async def test_a_request_and_a_block_in_it_show_the_key_of_the_app(
    gateway: Recorder, aiohttp_client: AiohttpClient, block: str | None
) -> None:
    server = pinned_server(gateway.url, key="digest", secret="k")
    assert await in_request(server, aiohttp_client, block) == CONFIG.routing_key("bearer-token")


@pytest.mark.parametrize("block", [None, "bearer-token"])
async def test_the_record_shows_the_session_and_not_what_shares_its_worker(
    gateway: Recorder, aiohttp_client: AiohttpClient, block: str | None
) -> None:
    server = pinned_server(gateway.url, pin_by="{session_id}/{json:model}")
    assert await in_request(server, aiohttp_client, block) == "bearer-token"


@pytest.mark.parametrize("block", [None, "bearer-token"])
async def test_no_credential_is_shown_with_pin_by(
    gateway: Recorder, aiohttp_client: AiohttpClient, block: str | None
) -> None:
    server = pinned_server(
        gateway.url, key="digest", secret="k", pin_by="{session_id}/{json:model}"
    )
    assert await in_request(server, aiohttp_client, block) == CONFIG.routing_key("bearer-token")


def test_what_is_said_once_is_not_remembered_without_end() -> None:
    once = Once()
    assert all(once.is_new(name) for name in range(1000))
    assert not any(once.is_new(name) for name in range(1001))
