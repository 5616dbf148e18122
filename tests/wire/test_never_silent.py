"""Never silent: every mistake in use logs a line that says what to do."""

import asyncio
import http.client
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import httpx
import pytest
from aiohttp import ClientError, ClientSession, TCPConnector, web
from aiohttp.abc import AbstractResolver
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import (
    ROUTING,
    ConfigError,
    MissingSessionError,
    PinSummary,
    Routing,
    RoutingConfig,
    routing_session,
    setup,
)
from aiohttp_smg_routing.testing import Recorder, completion, free_port, redirect
from harness.agents import CHAT_PATH
from harness.proxies import CLIENT, client_session, pinned_server

from ..crosstalk import anew
from ..turns import PATH, said

# At start-up


@asynccontextmanager
async def started(app: web.Application) -> AsyncIterator[None]:
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        yield
    finally:
        await runner.cleanup()


def other_source(request: web.Request) -> str | None:
    return None


CARRIES = (
    f"POST {CHAT_PATH} to http://gateway:30000 carries X-SMG-Routing-Key; the session id is "
    "read from match_info:session_id; "
)
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "named": (
        {"client_session": "client"},
        CARRIES + "the hook is on these ClientSessions: that of app['client']",
    ),
    "an AppKey": (
        {"client_session": CLIENT},
        CARRIES + f"the hook is on these ClientSessions: that of app['{CLIENT._name}']",
    ),
    "instrument": (
        {"instrument": True},
        CARRIES + "the hook is on these ClientSessions: every one that is made from now on, and "
        "every httpx client",
    ),
    "none": (
        {},
        CARRIES + "no ClientSession has the hook yet: name one in client_session, set "
        "instrument = true, or pass trace_configs=[routing.trace_config()]",
    ),
    "everything": (
        {
            "gateway": ["http://user:hush@gateway:30000/", "https://other"],
            "paths": [CHAT_PATH, "/generate"],
            "header": "X-Pin",
            "session_id": ["header:X-Session-Id", other_source],
            "key": "digest",
            "secret": "hush",
            "client_session": "client",
            "instrument": True,
        },
        f"POST {CHAT_PATH}, /generate to http://gateway:30000, https://other carries X-Pin; the "
        "session id is read from header:X-Session-Id, other_source; the hook is on these "
        "ClientSessions: that of app['client'], every one that is made from now on, and every "
        "httpx client",
    ),
    "disabled": (
        {"enabled": False, "client_session": "client"},
        "enabled is false: no call carries a key",
    ),
}


@pytest.mark.parametrize(("config", "line"), FORMS.values(), ids=FORMS)
async def test_one_line_says_what_will_happen(
    outgoing: ClientSession,
    caplog: pytest.LogCaptureFixture,
    config: dict[str, Any],
    line: str,
) -> None:
    caplog.set_level(logging.INFO)
    app = web.Application()
    app[CLIENT] = outgoing
    setup(app, {"gateway": "http://gateway:30000", **config})
    assert said(caplog, logging.INFO) == []
    async with started(app):
        assert said(caplog, logging.INFO) == [line]
    assert said(caplog, logging.INFO) == [line]


@pytest.mark.parametrize("way", ["trace_config", "attach"])
async def test_it_knows_of_a_hook_that_the_users_own_code_puts_on(
    outgoing: ClientSession, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    caplog.set_level(logging.INFO)

    async def client_session(app: web.Application) -> AsyncIterator[None]:
        if way == "attach":
            routing.attach(outgoing)
            yield
        else:
            async with ClientSession(trace_configs=[routing.trace_config()]):
                yield

    app = web.Application()
    app.cleanup_ctx.append(client_session)
    routing = setup(app, {"gateway": "http://gateway:30000"})
    async with started(app):
        [line] = said(caplog, logging.INFO)
    assert line.endswith(
        "the hook is on these ClientSessions: those with routing.trace_config(), attach() or "
        "httpx_hooks()"
    )


async def test_each_app_within_another_says_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app, inner = web.Application(), web.Application()
    setup(inner, {"gateway": "http://inner"})
    setup(app, {"gateway": "http://outer"})
    app.add_subapp("/inner", inner)
    async with started(app):
        lines = said(caplog, logging.INFO)
    assert sorted(line.partition(" carries")[0] for line in lines) == [
        f"POST {CHAT_PATH} to http://inner",
        f"POST {CHAT_PATH} to http://outer",
    ]


async def test_an_app_that_does_not_start_says_only_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = web.Application()
    setup(app, {"gateway": "http://gateway", "client_session": "missing"})
    with pytest.raises(ConfigError):
        async with started(app):
            pass
    assert said(caplog, logging.INFO) == []


# Configs that are errors


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"gateway": "http://h:30000/v1"}, "write 'http://h:30000'"),
        ({"gateway": "http://h:30000/v1/"}, "write 'http://h:30000'"),
        ({"gateway": f"http://h:30000{CHAT_PATH}"}, "write 'http://h:30000'"),
        ({"gateway": "http://h:30000/base/v1"}, "write 'http://h:30000/base'"),
        ({"gateway": "http://h:30000/*"}, "name each gateway"),
        ({"gateway": "http://h:30000", "client_session": "All"}, "write instrument = true"),
        ({"gateway": "h:30000"}, "such as 'http://10.0.0.1:30000'"),
    ],
)
def test_a_config_that_could_only_be_silent_is_an_error(
    config: dict[str, Any], advice: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        setup(web.Application(), config)
    assert advice in str(caught.value)


async def test_the_base_url_of_an_openai_client_is_right_where_the_paths_begin_below_it(
    gateway: Recorder,
) -> None:
    routing = Routing({"gateway": f"{gateway.url}/v1", "paths": "/chat/completions"})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
    assert gateway.last.keys == [b"s-1"]


# Near misses


class Everywhere(AbstractResolver):
    """Resolves every name to this machine."""

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[Any]:
        address = {"hostname": host, "host": "127.0.0.1", "port": port}
        return [{**address, "family": 2, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        pass


def calling(*urls: URL | str) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return a handler that calls each URL, and ignores those that it can't reach."""

    async def handler(request: web.Request) -> web.Response:
        for url in urls:
            try:
                async with request.app[CLIENT].post(url, data=b"{}") as response:
                    await response.read()
            except (ClientError, ssl.SSLError, MissingSessionError):
                pass
        return web.Response()

    return handler


@asynccontextmanager
async def playing(
    config: dict[str, Any], *urls: URL | str, **options: Any
) -> AsyncIterator[tuple[Routing, Callable[..., Awaitable[None]]]]:
    """Run a server that calls each URL in a turn; yield its routing and a function for turns."""
    app = web.Application()
    app.router.add_route("*", "/{session_id}", calling(*urls))

    async def client_session(app: web.Application) -> AsyncIterator[None]:
        options.setdefault("connector", TCPConnector(resolver=Everywhere()))
        async with ClientSession(**options) as app[CLIENT]:
            yield

    app.cleanup_ctx.append(client_session)
    routing = setup(app, {"client_session": "client", **config})
    async with TestClient(TestServer(app)) as client:

        async def play(turns: int, session_id: str = "s-1", method: str = "POST") -> None:
            for _ in range(turns):
                async with client.request(method, f"/{session_id}") as response:
                    assert response.status == 200

        yield routing, play


NEAR: dict[str, tuple[str, str, str]] = {
    "localhost for 127.0.0.1": (
        "http://127.0.0.1:{port}",
        "http://localhost:{port}/v1/chat/completions",
        "its host is localhost, and the gateway is 127.0.0.1; if that is a gateway, add "
        "http://localhost:{port} to gateway",
    ),
    "127.0.0.1 for localhost": (
        "http://localhost:{port}/base",
        "http://127.0.0.1:{port}/base/v1/chat/completions",
        "its host is 127.0.0.1, and the gateway is localhost; if that is a gateway, add "
        "http://127.0.0.1:{port}/base to gateway",
    ),
    "http for https": (
        "https://127.0.0.1:{port}",
        "http://127.0.0.1:{port}/v1/chat/completions",
        "its scheme is http, and the gateway's is https; if that is a gateway, add "
        "http://127.0.0.1:{port} to gateway",
    ),
    "https for http": (
        "http://127.0.0.1:{port}",
        "https://127.0.0.1:{port}/v1/chat/completions",
        "its scheme is https, and the gateway's is http; if that is a gateway, add "
        "https://127.0.0.1:{port} to gateway",
    ),
    "a config without the port": (
        "http://gateway.example",
        "http://gateway.example:{port}/v1/chat/completions",
        "its port is {port}, and the gateway's is 80; if that is a gateway, add "
        "http://gateway.example:{port} to gateway",
    ),
    "another port and scheme": (
        "https://gateway.example",
        "http://gateway.example:{port}/v1/chat/completions",
        "its scheme is http, and the gateway's is https; its port is {port}, and the gateway's is "
        "443; if that is a gateway, add http://gateway.example:{port} to gateway",
    ),
    "a path that is not among ours": (
        "http://127.0.0.1:{port}",
        "http://127.0.0.1:{port}/v1/completions",
        "its path is /v1/completions, and the gateway's is /v1/chat/completions; if it is to be "
        "pinned, add /v1/completions to paths",
    ),
    "a path below the base path": (
        "http://127.0.0.1:{port}/base",
        "http://127.0.0.1:{port}/base/generate",
        "its path is /base/generate, and the gateway's is /base/v1/chat/completions; if it is to "
        "be pinned, add /generate to paths",
    ),
    "a slash at the end": (
        "http://127.0.0.1:{port}",
        "http://127.0.0.1:{port}/v1/chat/completions/",
        "its path is /v1/chat/completions/, and the gateway's is /v1/chat/completions; if it is to "
        "be pinned, add /v1/chat/completions/ to paths",
    ),
    "a base path that the config has not": (
        "http://127.0.0.1:{port}/base",
        "http://127.0.0.1:{port}/v1/chat/completions",
        "its path is /v1/chat/completions, and the gateway's is /base/v1/chat/completions; if that "
        "is a gateway, add http://127.0.0.1:{port} to gateway",
    ),
    "a base path that only begins like the config's": (
        "http://127.0.0.1:{port}/base",
        "http://127.0.0.1:{port}/based/v1/chat/completions",
        "its path is /based/v1/chat/completions, and the gateway's is /base/v1/chat/completions; "
        "if that is a gateway, add http://127.0.0.1:{port}/based to gateway",
    ),
    "a judge model elsewhere": (
        "http://127.0.0.1:{port}",
        "http://judge.example:{port}/v1/chat/completions",
        "its host is judge.example, and the gateway is 127.0.0.1",
    ),
    "a judge model elsewhere, of another base path": (
        "http://gateway.example:{port}",
        "http://judge.example:{port}/openai/deployments/x/chat/completions",
        "its host is judge.example, and the gateway is gateway.example; its path is "
        "/openai/deployments/x/chat/completions, and the gateway's is /v1/chat/completions",
    ),
    "a judge model that is here, and a gateway elsewhere": (
        "http://gateway.example:{port}",
        "http://127.0.0.1:{port}/v1/chat/completions",
        "its host is 127.0.0.1, and the gateway is gateway.example",
    ),
    "a gateway that is here, and a judge model elsewhere at another port": (
        "http://localhost",
        "http://judge.example:{port}/v1/chat/completions",
        "its host is judge.example, and the gateway is localhost; its port is {port}, and the "
        "gateway's is 80",
    ),
    "a name that only begins like a loopback address": (
        "http://127.0.0.1:{port}",
        "http://127.judge.example:{port}/v1/chat/completions",
        "its host is 127.judge.example, and the gateway is 127.0.0.1",
    ),
}


@pytest.mark.parametrize(("config", "url", "problem"), NEAR.values(), ids=NEAR)
async def test_a_near_miss_is_counted_and_said_after_twenty(
    gateway: Recorder,
    caplog: pytest.LogCaptureFixture,
    config: str,
    url: str,
    problem: str,
) -> None:
    # Nothing answers TLS here: the call fails, but is still a near miss.
    port = free_port() if url.startswith("https") else gateway.url.port
    config, url, problem = (text.format(port=port) for text in (config, url, problem))
    line = f"POST {url} goes out without a key: {problem}"
    async with playing({"gateway": config}, url) as (routing, play):
        await play(19)
        assert said(caplog) == []
        assert routing.pins.summary() == PinSummary(unmatched=19)
        await play(1)
        assert said(caplog) == [line]
        await play(100)
        assert said(caplog) == [line]
        assert routing.pins.summary() == PinSummary(unmatched=120)
        assert routing.explain("POST", url) == line
    assert not any(call.keys for call in gateway.calls)


@pytest.mark.parametrize(
    ("config", "url"),
    [
        ("http://127.0.0.1:{port}", "http://localhost/v1/chat/completions"),
        ("http://127.0.0.1:{port}", "http://127.0.0.1/v1/chat/completions"),
        ("http://127.0.0.1:{port}", "http://[::1]:{port}/v1/chat/completions"),
        ("http://[::1]:{port}", "http://127.0.0.1:{port}/v1/chat/completions"),
        ("http://0.0.0.0:{port}", "http://127.0.0.1:{port}/v1/chat/completions"),
        ("http://127.0.0.2:{port}", "http://127.0.0.1:{port}/v1/chat/completions"),
    ],
)
def test_advice_that_is_followed_helps(config: str, url: str) -> None:
    """A config with the additions that ``explain()`` advises makes the call carry the key."""
    config, url = config.format(port=30000), url.format(port=30000)
    sentence = Routing({"gateway": config}).explain("POST", url)
    advised = sentence.partition("; if that is a gateway, add ")[2].removesuffix(" to gateway")
    routing = Routing({"gateway": [config, advised]})
    assert routing.explain("POST", url) == (
        f"POST {url} carries X-SMG-Routing-Key, if it has a session"
    )


@pytest.mark.parametrize(
    ("gateway", "paths", "url"),
    [
        ("http://gateway", CHAT_PATH, "http://gateway/"),
        ("http://gateway", CHAT_PATH, "http://gateway/v1/models/a*b"),
        ("http://gateway/v1", "/chat/completions", "http://gateway/v1/v1/chat/completions"),
        ("http://gateway/llm", CHAT_PATH, "http://gateway/v1/v1/chat/completions"),
        ("http://gateway", CHAT_PATH, "http://gateway/v1/./responses"),
    ],
)
def test_no_config_is_advised_that_is_refused_or_does_not_help(
    gateway: str, paths: str, url: str
) -> None:
    routing = Routing({"gateway": gateway, "paths": paths})
    sentence = routing.explain("POST", URL(url, encoded=True))
    assert sentence.endswith(f"and the gateway's is {URL(gateway).path.rstrip('/')}{paths}")


@pytest.mark.parametrize(
    ("config", "method", "problem"),
    [
        ({}, "GET", "only a POST carries one"),
        ({"enabled": False}, "POST", "enabled is false"),
    ],
)
def test_explain_knows_the_other_reasons(config: Any, method: str, problem: str) -> None:
    routing = Routing({"gateway": "http://gateway", **config})
    url = f"http://gateway{CHAT_PATH}"
    assert routing.explain(method, url) == f"{method} {url} goes out without a key: {problem}"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (URL(f"http://gateway:x{CHAT_PATH}", encoded=True), "its host or port cannot be read"),
        (
            URL(f"http://gateway/{CHAT_PATH}"),
            f"its path is /{CHAT_PATH}, and the gateway's is {CHAT_PATH}; write one slash",
        ),
    ],
)
def test_explain_knows_urls_that_are_odd(url: URL, problem: str) -> None:
    routing = Routing({"gateway": "http://gateway"})
    assert routing.explain("POST", url).endswith(f" goes out without a key: {problem}")


def test_explain_names_the_gateway_and_the_path_that_are_nearest() -> None:
    routing = Routing(
        {
            "gateway": ["https://other:1/base", "http://10.0.0.1:30000"],
            "paths": ["/generate", CHAT_PATH],
        }
    )
    assert routing.explain("POST", f"http://10.0.0.1:30001{CHAT_PATH}") == (
        f"POST http://10.0.0.1:30001{CHAT_PATH} goes out without a key: its port is 30001, and the "
        "gateway's is 30000; if that is a gateway, add http://10.0.0.1:30001 to gateway"
    )


@pytest.mark.parametrize("base", ["/maX", "/maX/"])
def test_explain_knows_the_path_of_the_gateway(base: str) -> None:
    routing = Routing({"gateway": f"http://gateway{base}"})
    said = routing.explain("POST", f"http://gateway:81/maX{CHAT_PATH}")
    assert said.endswith(
        "its port is 81, and the gateway's is 80; if that is a gateway, add http://gateway:81/maX "
        "to gateway"
    )


def test_no_sentence_shows_what_is_secret_in_a_url() -> None:
    routing = Routing({"gateway": "http://user:hush@gateway"})
    for url in (
        f"http://user:hush@gateway{CHAT_PATH}?api_key=hush",
        "http://user:hush@judge/?k=hush",
    ):
        assert "hush" not in routing.explain("POST", url)


@pytest.mark.parametrize(
    ("base", "session_id", "given"),
    [
        ("", "sk-credential", "/sessions/sk-credential"),
        ("/llm", "sk-credential", "/sessions/sk-credential"),
        ("", "sk/cre dential", "/sessions/sk%2Fcre%20dential"),
    ],
)
async def test_a_session_id_in_the_path_of_a_call_is_not_shown_and_not_advised(
    gateway: Recorder,
    caplog: pytest.LogCaptureFixture,
    base: str,
    session_id: str,
    given: str,
) -> None:
    """The server passes the path of the request on. One path for each session is no remedy."""
    caplog.set_level(logging.DEBUG, "aiohttp_smg_routing")
    config = RoutingConfig(f"{gateway.url}{base}", key="digest", secret="k" * 32)
    routing = Routing(config)
    url = URL(f"{gateway.url}{given}{CHAT_PATH}", encoded=True)
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        with routing_session(session_id):
            for _ in range(20):
                async with session.post(url):
                    pass
    assert gateway.last.path == url.raw_path
    path = "/sessions/{session_id}/v1/chat/completions"
    assert said(caplog) == [
        f"POST {gateway.url}{path} goes out without a key: its path is {path}, and the gateway's "
        f"is {base}{CHAT_PATH}; leave the session id out of the path"
    ]
    assert "credential" not in caplog.text
    assert "cre%20dential" not in caplog.text


async def test_an_agent_can_not_spoil_a_line_by_an_id_that_every_path_has(
    gateway: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    routing = Routing(RoutingConfig(gateway.url.with_port(1)))
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        with routing_session("v1"):
            for _ in range(20):
                async with session.post(gateway.chat):
                    pass
    [line] = said(caplog)
    assert line.endswith(
        f"its port is {gateway.url.port}, and the gateway's is 1; if that is a "
        f"gateway, add {gateway.url} to gateway"
    )


async def test_what_is_not_near_is_not_counted(
    gateway: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [
        f"http://tools.example:{gateway.url.port}{path}"
        for path in ("/", "/run", "/v1/embeddings", "/v1/chat", "/completions/x", "/v1/models")
    ]
    async with playing({"gateway": str(gateway.url)}, *urls) as (routing, play):
        await play(25)
        assert routing.pins.summary() == PinSummary()
    assert said(caplog) == []


async def test_a_get_is_no_near_miss(gateway: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    routing = Routing({"gateway": str(gateway.url)})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        with routing_session("s-1"):
            for _ in range(25):
                async with session.get(gateway.chat), session.get(gateway.url / "v1/models"):
                    pass
    assert routing.pins.summary() == PinSummary()
    assert said(caplog) == []


async def test_near_misses_outside_a_session_are_said_once_and_not_counted(
    gateway: Recorder, elsewhere: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Both the host and the source are wrong, and the line says so."""
    routing = Routing({"gateway": str(gateway.url)})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        for call in range(1, 50):
            async with session.post(elsewhere.chat):
                pass
            assert len(said(caplog)) == (call >= 20)
    assert routing.pins.summary() == PinSummary()
    [line] = said(caplog)
    assert line.startswith(f"POST {elsewhere.chat} goes out without a key: its port is ")
    assert line.endswith(" It has no session either: see session_id.")


async def test_near_misses_are_said_once_for_each_origin_and_path(
    gateway: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that is rightly not pinned does not hide a wrong path on the same origin."""
    hosts = ("127.0.0.1", "localhost", "judge.example")
    urls = [
        f"http://{host}:{gateway.url.port}{path}{CHAT_PATH}"
        for host in hosts
        for path in ("/x", "/y")
    ]
    async with playing({"gateway": str(gateway.url)}, *urls) as (routing, play):
        await play(40)
        assert routing.pins.summary() == PinSummary(unmatched=240)
    where = [line.partition(" goes out without a key: ")[0] for line in said(caplog)]
    assert sorted(where) == sorted(f"POST {url}" for url in urls)


async def test_more_near_misses_than_are_remembered_neither_flood_the_log_nor_silence_it(
    gateway: Recorder, elsewhere: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    port = gateway.url.port
    urls = [f"http://customer-{number}.example:{port}{CHAT_PATH}" for number in range(1100)]
    async with playing({"gateway": str(gateway.url)}, *urls) as (routing, play):
        await play(1)
        assert routing.pins.summary() == PinSummary(unmatched=1100)
        lines = said(caplog)
        assert sum(" goes out without a key: " in line for line in lines) == 60
        hint = "gateway or paths may be wrong, or other services are called"
        assert f"20 URLs that resemble the gateway's: {hint}" in lines
        assert len(lines) == 61
        gateway.answer = lambda call: redirect(elsewhere.chat)
        async with ClientSession(trace_configs=[routing.trace_config()]) as session:
            with routing_session("s-1"):
                async with session.post(gateway.chat):
                    pass
        [line] = said(caplog)[61:]
        assert " is redirected, " in line
    assert said(caplog)[62:] == [
        "940 more URLs that resemble the gateway's: at most 60 a minute are logged one by one"
    ]


@pytest.mark.parametrize("before", [0, 19])
async def test_near_misses_are_not_said_where_a_call_was_tagged(
    gateway: Recorder, elsewhere: Recorder, caplog: pytest.LogCaptureFixture, before: int
) -> None:
    """A server may rightly call both the gateway and a judge model elsewhere."""
    routing = Routing({"gateway": str(gateway.url)})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        with routing_session("s-1"):
            for _ in range(before):
                async with session.post(elsewhere.chat):
                    pass
            async with session.post(gateway.chat):
                pass
            for _ in range(100):
                async with session.post(elsewhere.chat):
                    pass
    assert said(caplog) == []
    counts = PinSummary(unknown=1, sessions=1, unmatched=before + 100)
    assert routing.pins.summary() == counts


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_call_that_another_routing_tags_is_no_near_miss(
    gateway: Recorder,
    elsewhere: Recorder,
    caplog: pytest.LogCaptureFixture,
    order: tuple[int, int],
) -> None:
    """Of two routings on one ClientSession, each ignores calls to the other's gateway."""
    caplog.set_level(logging.DEBUG, "aiohttp_smg_routing")
    routings = [Routing({"gateway": str(wire.url)}) for wire in (gateway, elsewhere)]
    async with ClientSession() as session:
        for number in order:
            routings[number].attach(session)
        with routing_session("s-1"):
            for _ in range(25):
                async with session.post(elsewhere.chat):
                    pass
    assert routings[0].pins.summary() == PinSummary()
    assert routings[1].pins.summary() == PinSummary(unknown=25, sessions=1)
    assert (
        said(caplog, logging.DEBUG)
        == [
            f"POST {elsewhere.chat} carries the key of s-1",
        ]
        * 25
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_near_miss_of_two_routings_counts_once(
    gateway: Recorder, order: tuple[int, int]
) -> None:
    port = gateway.url.port
    routings = [Routing({"gateway": f"http://{host}:{port}"}) for host in ("a.example", "b")]
    async with ClientSession() as session:
        for number in order:
            routings[number].attach(session)
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
    counts = [routings[number].pins.summary().unmatched for number in order]
    assert counts == [1, 0]


async def test_a_near_miss_within_a_request_counts_for_the_app_of_the_request(
    gateway: Recorder, elsewhere: Recorder, outgoing: ClientSession, aiohttp_client: AiohttpClient
) -> None:
    apps = []
    for name in ("a.example", "b.example"):
        app = web.Application()
        app[CLIENT] = outgoing
        app.router.add_post("/{session_id}", calling(elsewhere.chat))
        setup(app, {"gateway": f"http://{name}", "client_session": "client"})
        apps.append(app)
    clients = [await aiohttp_client(app) for app in apps]
    async with clients[1].post("/s-1"):
        pass
    counts = [app[ROUTING].pins.summary() for app in apps]
    assert counts == [PinSummary(), PinSummary(unmatched=1)]


NO_HOOK = (
    "its client has no hook of this app: name a ClientSession in client_session, pass "
    "httpx_hooks() to an httpx client, or set instrument = true"
)


async def test_a_call_to_the_apps_gateway_by_a_session_that_has_only_anothers_hook_is_said(
    gateway: Recorder,
    elsewhere: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = without_hook(gateway.chat)
    routing = setup(app, {"gateway": str(gateway.url)})
    other = Routing({"gateway": str(elsewhere.url)})
    client = await aiohttp_client(app)
    other.attach(app[CLIENT])
    for _ in range(60):
        async with client.post("/s-1") as response:
            assert response.status == 200
    assert not any(call.keys for call in gateway.calls)
    counts = (routing.pins.summary(), other.pins.summary())
    assert counts == (PinSummary(unmatched=60), PinSummary())
    [line] = said(caplog)
    assert line == f"POST {gateway.chat} goes out without a key: {NO_HOOK}"


async def test_an_httpx_client_that_has_only_anothers_hook_is_told_what_httpx_takes(
    gateway: Recorder, elsewhere: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = Routing({"gateway": str(elsewhere.url)}).httpx_hooks()

    async def handler(request: web.Request) -> web.Response:
        async with httpx.AsyncClient(event_hooks=hooks) as client:
            await client.post(str(gateway.chat))
        return web.Response()

    app = web.Application()
    app.router.add_post("/{session_id}", handler)
    setup(app, {"gateway": str(gateway.url)})
    async with TestClient(TestServer(app)) as client:
        for _ in range(20):
            async with client.post("/s-1") as response:
                assert response.status == 200
    [line] = said(caplog)
    assert line == f"POST {gateway.chat} goes out without a key: {NO_HOOK}"


async def test_a_hook_of_apps_that_have_ended_does_not_keep_near_misses_from_being_counted(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    ended, routing = (Routing({"gateway": str(gateway.url)}) for _ in range(2))
    with ended.instrument():
        session = ClientSession()
    async with session:
        routing.attach(session)
        with routing_session("s-1"):
            async with session.post(elsewhere.chat):
                pass
    assert routing.pins.summary() == PinSummary(unmatched=1)
    assert ended.pins.summary() == PinSummary()


async def test_near_misses_are_in_the_metrics(gateway: Recorder) -> None:
    registry = CollectorRegistry()
    config = {
        "gateway": f"http://127.0.0.2:{gateway.url.port}",
        "metrics": "prometheus",
        "metrics_registry": registry,
    }
    async with playing(config, gateway.chat) as (_, play):
        await play(3)
        assert registry.get_sample_value("smg_routing_unmatched_total") == 3


async def test_a_redirect_to_what_is_near_counts_too(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    """A redirect that leaves the gateway for a similar path is counted."""
    gateway.answer = lambda call: redirect(elsewhere.chat)
    routing = Routing({"gateway": str(gateway.url)})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
    assert gateway.last.keys == [b"s-1"]
    assert routing.pins.summary().unmatched == 1


# No calls at all


NOTHING = (
    "50 POST requests in a row had a session, and ended before a call to the gateway was seen."
)


def without_hook(url: URL) -> web.Application:
    """Return a server whose own ClientSession has no hook."""
    app = web.Application()
    app.router.add_route("*", "/{session_id}", calling(url))

    app.cleanup_ctx.append(client_session)
    return app


@pytest.mark.parametrize("path", ["", "/streamed"])
async def test_a_client_session_that_was_forgotten_is_said_after_fifty_requests(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    async def streamed(request: web.Request) -> web.Response:
        async def chunks() -> AsyncIterator[bytes]:
            await calling(gateway.chat)(request)
            yield b"chunk"

        return web.Response(body=chunks())

    app = without_hook(gateway.chat)
    app.router.add_post("/{session_id}/streamed", streamed)
    setup(app, {"gateway": str(gateway.url)})
    client = await aiohttp_client(app)
    for number in range(49):
        async with client.post(f"/s-{number}{path}") as response:
            await response.read()
    assert said(caplog) == []
    for _ in range(100):
        async with client.post(f"/s-1{path}") as response:
            await response.read()
    [line] = said(caplog)
    assert line.startswith(NOTHING)
    reasons = (
        "has no hook (name its app key in client_session",
        "httpx",
        "instrument = true",
        "neither aiohttp nor httpx",
    )
    places = [line.index(reason) for reason in reasons]
    assert places == sorted(places)
    assert not any(call.keys for call in gateway.calls)


async def test_a_client_session_that_is_made_anew_at_run_time_is_said(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The ClientSession that the app had at start-up has the hook, but makes no calls."""
    app = without_hook(gateway.chat)
    app.router.add_post("/anew/{session_id}", anew(gateway.chat))
    setup(app, {"gateway": str(gateway.url), "client_session": "client"})
    client = await aiohttp_client(app)
    for _ in range(50):
        async with client.post("/anew/s-1") as response:
            assert response.status == 200
    [line] = said(caplog)
    assert line.startswith(NOTHING)
    assert "it was made later" in line
    assert "(set instrument = true)" in line


async def test_calls_to_a_url_that_resembles_no_gateway_are_said_to_be_a_reason(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither host nor path is similar, so the calls could be to any other service."""
    app = without_hook(gateway.url / "generate")
    setup(app, {"gateway": "http://192.0.2.1", "client_session": "client"})
    client = await aiohttp_client(app)
    for _ in range(60):
        async with client.post("/s-1") as response:
            assert response.status == 200
    [line] = said(caplog)
    assert "or gateway and paths name another URL (see routing.explain())" in line


async def test_calls_by_neither_aiohttp_nor_httpx_are_said(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    def call() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.url.port or 0)
        connection.request("POST", CHAT_PATH, b"{}")
        connection.getresponse().read()
        connection.close()

    async def handler(request: web.Request) -> web.Response:
        await asyncio.to_thread(call)
        return web.Response()

    app = web.Application()
    app.router.add_post("/{session_id}", handler)
    setup(app, {"gateway": str(gateway.url), "instrument": True})
    client = await aiohttp_client(app)
    for _ in range(50):
        async with client.post("/s-1") as response:
            assert response.status == 200
    assert len(gateway.calls) == 50
    [line] = said(caplog)
    assert line.startswith(NOTHING)
    assert "neither aiohttp nor httpx calls" in line


@pytest.mark.parametrize(
    ("path", "method"), [("/s-1", "GET"), ("/default", "POST"), ("/%20", "POST")]
)
async def test_requests_that_are_no_turns_of_a_session_say_nothing(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    path: str,
    method: str,
) -> None:
    app = without_hook(gateway.url / "elsewhere")
    setup(app, {"gateway": str(gateway.url), "ignore_ids": "default"})
    client = await aiohttp_client(app)
    for _ in range(60):
        async with client.request(method, path) as response:
            assert response.status == 200
    assert said(caplog) == []


async def test_near_misses_are_not_nothing_at_all(
    gateway: Recorder, elsewhere: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    async with playing({"gateway": str(gateway.url)}, elsewhere.chat) as (_, play):
        await play(120)
    [line] = said(caplog)
    assert line.startswith(f"POST {elsewhere.chat} goes out without a key")


def sometimes_calling(url: URL) -> web.Application:
    """Return a server that calls the gateway in some requests only."""

    async def reward(request: web.Request) -> web.Response:
        return web.Response()

    app = without_hook(url)
    app.router.add_post("/{session_id}/reward", reward)
    app.router.add_post("/{session_id}/anew", anew(url))
    return app


async def test_where_a_call_was_tagged_other_requests_are_not_said(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    app = sometimes_calling(gateway.chat)
    setup(app, {"gateway": str(gateway.url), "client_session": "client"})
    client = await aiohttp_client(app)
    for _ in range(3):
        async with client.post("/s-1"):
            pass
        for _ in range(400):
            async with client.post("/s-1/reward") as response:
                assert response.status == 200
    assert said(caplog) == []


@pytest.mark.thorough
async def test_a_client_session_that_is_made_anew_after_calls_that_were_tagged_is_said(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    app = sometimes_calling(gateway.chat)
    setup(app, {"gateway": str(gateway.url), "client_session": "client"})
    client = await aiohttp_client(app)
    async with client.post("/s-1"):
        pass
    for _ in range(999):
        async with client.post("/s-1/anew"):
            pass
    assert said(caplog) == []
    for _ in range(100):
        async with client.post("/s-1/anew"):
            pass
    [line] = said(caplog)
    assert line.startswith("1000 POST requests in a row had a session, and ended before a call to")


RUNS = {
    "idle": "POST requests in a row had a session",
    "missing": "calls to the gateway, and none had a session",
    "near": "goes out without a key",
}


def idle_and_missing(gateway: Recorder) -> web.Application:
    """Return an app with a route that makes no call, and one that calls without a session."""

    async def missing(request: web.Request) -> web.Response:
        with routing_session(None):
            return await calling(gateway.chat)(request)

    app = sometimes_calling(gateway.chat)
    app.router.add_post("/{session_id}/idle", calling())
    app.router.add_post("/{session_id}/missing", missing)
    return app


@pytest.mark.thorough
@pytest.mark.parametrize(("what", "phrase"), RUNS.items(), ids=RUNS)
async def test_a_run_is_said_once_before_the_first_call_that_is_tagged_and_once_after_it(
    gateway: Recorder,
    elsewhere: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    what: str,
    phrase: str,
) -> None:
    """A later run is another mistake, such as a new ClientSession without the hook."""
    app = idle_and_missing(gateway)
    app.router.add_post("/{session_id}/near", calling(elsewhere.chat))
    setup(app, {"gateway": str(gateway.url), "client_session": "client"})
    client = await aiohttp_client(app)

    async def play(path: str, turns: int) -> list[str]:
        for _ in range(turns):
            async with client.post(path) as response:
                assert response.status == 200
        return [line for line in said(caplog) if phrase in line]

    assert len(await play(f"/s-1/{what}", 60)) == 1
    assert len(said(caplog)) == 1  # and no other line
    assert len(await play("/s-1", 1)) == 1
    assert len(await play(f"/s-1/{what}", 999)) == 1
    assert len(await play(f"/s-1/{what}", 100)) == 2


async def test_a_call_without_a_session_is_a_call_that_was_seen(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    app = idle_and_missing(gateway)
    setup(app, {"gateway": str(gateway.url), "client_session": "client"})
    client = await aiohttp_client(app)
    for what in [*["missing"] * 60, *["idle"] * 60]:
        async with client.post(f"/s-1/{what}") as response:
            assert response.status == 200
    [line] = said(caplog)
    assert RUNS["missing"] in line


async def test_a_call_in_a_block_within_the_request_is_a_call_that_was_seen(
    gateway: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: web.Request) -> web.Response:
        with routing_session("rollout-1"):
            return await calling(gateway.chat)(request)

    app = without_hook(gateway.chat)
    app.router.add_post("/block/{session_id}", handler)
    setup(app, {"gateway": str(gateway.url), "client_session": "client"})
    async with TestClient(TestServer(app)) as client:
        for _ in range(60):
            async with client.post("/block/s-1") as response:
                assert response.status == 200
    assert said(caplog) == []
    assert gateway.last.keys == [b"rollout-1"]


# Calls without a session


@pytest.mark.parametrize("on_missing", ["pass", "warn", "raise"])
async def test_after_twenty_calls_without_a_session_route_and_sources_are_said(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    on_missing: str,
) -> None:
    """The route has ``{sid}``, and the source is ``match_info:session_id``."""
    app = without_hook(gateway.chat)
    app.router.add_post("/sessions/{sid}/chat", calling(gateway.chat))
    config = {"on_missing": on_missing, "session_id": ["match_info:session_id", "cookie:sid"]}
    setup(app, {"gateway": str(gateway.url), "client_session": "client", **config})
    client = await aiohttp_client(app)
    problem = (
        f"POST {gateway.chat} has no session: match_info:session_id, cookie:sid found none in "
        "route /sessions/{sid}/chat"
    )
    line = f"20 calls to the gateway, and none had a session. {problem}. Correct session_id."
    for turn in range(1, 50):
        async with client.post("/sessions/s-1/chat") as response:
            assert response.status == 200
        assert said(caplog).count(line) == (turn >= 20)
    summary = app[ROUTING].pins.summary()
    assert summary.missing == 49
    assert summary.untagged == (0 if on_missing == "raise" else 49)
    if on_missing == "pass":
        assert said(caplog) == [line]


async def test_calls_whose_id_is_ignored_are_not_said_to_have_none(
    gateway: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    app = without_hook(gateway.chat)
    config = {"gateway": str(gateway.url), "client_session": "client", "ignore_ids": "default"}
    setup(app, config)
    async with TestClient(TestServer(app)) as client:
        for _ in range(20):
            async with client.post("/default") as response:
                assert response.status == 200
    [line] = said(caplog)
    sought = "match_info:session_id found none, or one of ignore_ids, in route /{session_id}"
    assert f"{sought}. Correct session_id." in line


@pytest.mark.parametrize("session_id", [None, "default"])
async def test_calls_in_a_block_without_an_id_are_not_said_to_be_outside_a_request(
    gateway: Recorder, caplog: pytest.LogCaptureFixture, session_id: str | None
) -> None:
    routing = Routing({"gateway": str(gateway.url), "ignore_ids": "default"})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        with routing_session(session_id):
            for _ in range(20):
                async with session.post(gateway.chat):
                    pass
    [line] = said(caplog)
    assert line.endswith(": its routing_session() has none, or an ignored one. Pass it the id.")


@pytest.mark.parametrize("before", [0, 19])
async def test_calls_without_a_session_beside_ones_with_it_are_not_said(
    gateway: Recorder, caplog: pytest.LogCaptureFixture, before: int
) -> None:
    routing = Routing({"gateway": str(gateway.url)})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        for _ in range(before):
            async with session.post(gateway.chat):
                pass
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
        for _ in range(40):
            async with session.post(gateway.chat):
                pass
    assert said(caplog) == []
    assert routing.pins.summary().missing == before + 40


async def test_calls_without_a_session_outside_a_request_name_the_code(
    gateway: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    routing = Routing({"gateway": str(gateway.url)})

    async def refresh() -> None:
        async with ClientSession(trace_configs=[routing.trace_config()]) as session:
            for _ in range(20):
                async with session.post(gateway.chat):
                    pass

    await asyncio.create_task(refresh())
    [line] = said(caplog)
    name = "test_calls_without_a_session_outside_a_request_name_the_code.<locals>.refresh"
    assert f"it is made by {name}, outside the requests of the app" in line
    remedies = (
        "Make it within routing_session(...) or with in_session(...)",
        "run a thread in copy_context()",
        "call setup() on the app that serves sessions",
    )
    places = [line.index(remedy) for remedy in remedies]
    assert places == sorted(places)


async def test_on_missing_warn_says_route_and_sources_and_is_capped(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    app = pinned_server(gateway.url, on_missing="warn", session_id="header:X-Session-Id")
    client = await aiohttp_client(app)
    for _ in range(90):
        async with client.post(PATH) as response:
            assert response.status == 200
    problem = (
        f"POST {gateway.chat} has no session: header:X-Session-Id found none in route "
        "/sessions/{session_id}/v1/chat/completions"
    )
    lines = said(caplog)
    assert lines.count(f"{problem}; the gateway may route it to any worker") == 60
    # One more line says that none of twenty had a session, and one says what a run means.
    assert len(lines) == 62
    hint = "no source of session_id finds one, or the calls are made outside a request"
    assert f"20 calls without a session: {hint}" in lines
    await client.close()
    assert said(caplog)[62:] == [
        "30 more calls without a session: at most 60 a minute are logged one by one"
    ]


# Healthy servers log nothing


def waiting_for_all(
    url: URL, everybody: int, *, block: bool = False, streamed: bool = False
) -> web.Application:
    """Return a server that calls the gateway only once ``everybody`` requests have arrived."""
    here = 0
    are_here = asyncio.Event()

    async def chunks(request: web.Request) -> AsyncIterator[bytes]:
        nonlocal here
        here += 1
        if here == everybody:
            are_here.set()
        await are_here.wait()
        with routing_session("own") if block else nullcontext():
            async with request.config_dict[CLIENT].post(url):
                pass
        yield b"chunk"

    async def handler(request: web.Request) -> web.Response:
        body = chunks(request)
        return web.Response(body=body if streamed else await body.__anext__())

    app = web.Application()
    app.router.add_post("/sessions/{session_id}/turn", handler)
    return app


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("nested", [False, True])
async def test_many_requests_that_wait_before_their_calls_are_no_reason_to_speak(
    gateway: Recorder,
    outgoing: ClientSession,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    nested: bool,
    block: bool,
    streamed: bool,
) -> None:
    """This happens at the start of a job. With nested apps, the inner one makes the calls."""
    app = inner = waiting_for_all(gateway.chat, 60, block=block, streamed=streamed)
    config = {"gateway": str(gateway.url)}
    if nested:
        app = web.Application()
        setup(inner, {**config, "client_session": CLIENT})
        inner[CLIENT] = outgoing
        setup(app, config)
        app.add_subapp("/sub", inner)
    else:
        app[CLIENT] = outgoing
        setup(app, {**config, "client_session": CLIENT})
    client = await aiohttp_client(app, connector=TCPConnector(limit=0))
    path = f"{'/sub' * nested}/sessions/{{}}/turn"
    responses = await asyncio.gather(*(client.post(path.format(turn)) for turn in range(60)))
    assert {await response.read() for response in responses} == {b"chunk"}
    assert [line for line in said(caplog) if "POST requests" in line] == []
    assert inner[ROUTING].pins.summary().unknown == 60


@pytest.mark.parametrize("is_gateway", [False, True])
async def test_a_gateway_that_redirects_elsewhere_is_said_at_once_and_once(
    gateway: Recorder, elsewhere: Recorder, caplog: pytest.LogCaptureFixture, is_gateway: bool
) -> None:
    """The line says what differs: the target may be the gateway, with another path."""
    there = URL(f"{gateway.chat}/") if is_gateway else elsewhere.chat
    for _ in range(3):
        gateway.answer_with(redirect(there, 308), *[completion()] * is_gateway)
    routing = Routing({"gateway": str(gateway.url)})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        for _ in range(3):
            with routing_session("s-1"):
                async with session.post(gateway.chat):
                    pass
    assert (gateway if is_gateway else elsewhere).last.keys == []
    why = routing.explain("POST", there)
    assert said(caplog) == [
        f"POST {gateway.chat} is redirected, and the key does not follow: {why}"
    ]


async def test_a_redirect_within_a_request_is_explained_by_the_config_of_its_app(
    gateway: Recorder,
    elsewhere: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gateway.answer = lambda call: redirect(elsewhere.chat, 308)
    other = Routing({"gateway": "http://other.example"})
    app = without_hook(gateway.chat)
    routing = setup(app, {"gateway": str(gateway.url), "instrument": True})
    with other.instrument():
        client = await aiohttp_client(app)
        async with client.post("/s-1") as response:
            assert response.status == 200
    why = routing.explain("POST", elsewhere.chat)
    assert said(caplog) == [
        f"POST {gateway.chat} is redirected, and the key does not follow: {why}"
    ]


async def test_calls_that_miss_after_one_that_was_right_are_said_when_there_are_many(
    gateway: Recorder, elsewhere: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    routing = Routing({"gateway": str(gateway.url)})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        with routing_session("s-1"):
            for url in [gateway.chat, *[elsewhere.chat] * 1000]:
                assert said(caplog) == []
                async with session.post(url):
                    pass
    [line] = said(caplog)
    assert line.startswith(f"POST {elsewhere.chat} goes out without a key: its port is ")


@pytest.mark.parametrize("path", ["/x%0AWARNING:root:forged", "/session/sk-credential/turn"])
async def test_a_path_that_an_agent_made_up_is_not_logged(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """It may forge a line, or hold an id that is a credential."""

    @web.middleware
    async def proxy(request: web.Request, handler: Handler) -> web.StreamResponse:
        async with request.app[CLIENT].post(gateway.chat):
            return web.Response()

    app = pinned_server(gateway.url, on_missing="warn")
    app.middlewares.append(proxy)
    client = await aiohttp_client(app)
    async with client.post(URL(path, encoded=True)):
        pass
    [line] = said(caplog)
    assert "found none in route (no route);" in line


# Two mistakes at once


async def test_requests_none_of_which_has_a_session_are_said_where_no_call_is_seen(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The source is wrong, and the calls are not made with aiohttp."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/sessions/{sid}/turn", handler)
    setup(app, {"gateway": "http://gateway:30000", "instrument": True})
    client = await aiohttp_client(app)
    for turn in range(1, 1010):
        async with client.post("/sessions/s-1/turn"):
            pass
        assert len(said(caplog)) == (turn >= 1000)
    assert said(caplog) == [
        "1000 POST requests, and no session: match_info:session_id found none in route "
        "/sessions/{sid}/turn. Correct session_id."
    ]


async def test_requests_that_have_no_session_beside_turns_that_are_tagged_say_nothing(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A server also gets requests that are not turns."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response()

    app = pinned_server(gateway.url)
    app.router.add_post("/metrics", handler)
    client = await aiohttp_client(app)
    async with client.post(PATH, json={}) as response:
        assert response.status == 200
    for _ in range(1010):
        async with client.post("/metrics"):
            pass
    assert said(caplog) == []


async def test_with_instrument_the_advice_is_not_to_set_it(
    gateway: Recorder, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    async with ClientSession() as made_before:

        async def handler(request: web.Request) -> web.Response:
            async with made_before.post(gateway.chat):
                return web.Response()

        app = web.Application()
        app.router.add_post("/sessions/{session_id}/turn", handler)
        setup(app, {"gateway": str(gateway.url), "instrument": True})
        client = await aiohttp_client(app)
        for _ in range(50):
            async with client.post("/sessions/s-1/turn"):
                pass
    [line] = said(caplog)
    assert "was made before the app started (use routing.attach(session))" in line
    assert "set instrument = true" not in line


async def test_the_start_up_line_knows_of_instrument_around_the_app_and_of_pin_by(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    app = web.Application()
    config = {"gateway": "http://gateway:30000", "pin_by": "{header:X-Group-Id}"}
    with setup(app, config).instrument():
        async with started(app):
            [line] = said(caplog, logging.INFO)
    assert "read from match_info:session_id, pinned by {header:X-Group-Id}; the hook is on" in line


# At DEBUG


async def test_at_debug_each_post_in_a_session_says_whether_it_carries_a_key_and_why_not(
    gateway: Recorder, elsewhere: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aiohttp_smg_routing")
    routing = Routing({"gateway": str(gateway.url)})
    tool = elsewhere.url / "run"
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        async with session.post(tool):
            pass
        with routing_session("s-1"):
            for method, url in (
                ("POST", gateway.chat.with_query("token=hush")),
                ("POST", tool.with_user("user").with_password("hush")),
                ("GET", tool),
                ("POST", gateway.chat),
            ):
                async with session.request(method, url):
                    pass
    assert said(caplog, logging.DEBUG) == [
        f"POST {gateway.chat} carries the key of s-1",
        routing.explain("POST", tool),
        f"POST {gateway.chat} carries the key of s-1",
    ]
    assert " goes out without a key: its port is " in routing.explain("POST", tool)


async def test_at_debug_an_id_that_is_a_credential_is_not_shown(
    gateway: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aiohttp_smg_routing")
    config = RoutingConfig(gateway.url, key="digest", secret="k")
    routing = Routing(config)
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        with routing_session("sk-credential"):
            for url in (gateway.chat, gateway.url / "other"):
                async with session.post(url):
                    pass
    assert len(said(caplog, logging.DEBUG)) == 2
    assert config.routing_key("sk-credential") in caplog.text
    assert "sk-credential" not in caplog.text
