import logging

from aiohttp import web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import RoutingConfig, SessionIdFilter, routing_session
from aiohttp_smg_routing.testing import Recorder

from ..conftest import session_server

CONFIG = RoutingConfig("http://gateway", key="digest", secret="k")


def stamped(log_filter: SessionIdFilter) -> str:
    record = logging.LogRecord("name", logging.INFO, __file__, 1, "message", None, None)
    assert log_filter.filter(record)
    return logging.Formatter("%(session_id)s").format(record)


def test_the_session_stands_on_the_record() -> None:
    assert stamped(SessionIdFilter()) == "-"
    with routing_session("s-1"):
        assert stamped(SessionIdFilter()) == "s-1"
        with routing_session(None):
            assert stamped(SessionIdFilter()) == "-"


def test_an_id_cannot_forge_a_line_of_the_log() -> None:
    with routing_session("s-1\nERROR forged"):
        assert "\n" not in stamped(SessionIdFilter())


def test_digest_is_what_the_record_shows() -> None:
    with routing_session("bearer-token"):
        assert stamped(SessionIdFilter(CONFIG)) == CONFIG.routing_key("bearer-token")


async def test_a_block_within_a_request_shows_the_key_of_its_app(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = session_server(gateway.url, key="digest")

    async def handler(request: web.Request) -> web.Response:
        with routing_session("bearer-token"):
            return web.Response(text=stamped(SessionIdFilter()))

    app.router.add_post("/", handler)
    client = await aiohttp_client(app)
    async with client.post("/") as response:
        assert (await response.text()).startswith("sha256-")


async def test_a_request_shows_the_key_of_its_app(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    app = session_server(gateway.url, key="digest")

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=stamped(SessionIdFilter()))

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert (await response.text()).startswith("sha256-")
