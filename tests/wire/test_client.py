"""The outbound half's contract on the wire, checked on the raw lines that arrive at a socket."""

import io
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from copy import deepcopy
from typing import Any

import aiohttp
import pytest
from aiohttp import (
    ClientError,
    ClientResponse,
    ClientResponseError,
    ClientSession,
    FormData,
    TraceConfig,
    WSServerHandshakeError,
    web,
)
from multidict import CIMultiDict
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import (
    MissingSessionError,
    PinSummary,
    Routing,
    RoutingConfig,
    routing_session,
    setup,
)
from aiohttp_smg_routing.testing import Call, Recorder, answer, completion, failure, redirect
from harness.proxies import CLIENT, pinned_server

SMUGGLED = [
    ("x-smg-routing-key", ""),
    ("x-smg-routing-key", "evil"),
    ("X-Smg-Target-Worker", "1"),
]


def with_hook(config: RoutingConfig, *base_url: URL, **options: Any) -> ClientSession:
    """Return a ClientSession made with the hook."""
    return ClientSession(*base_url, trace_configs=[Routing(config).trace_config()], **options)


@pytest.fixture
async def hooked(gateway: Recorder) -> AsyncIterator[ClientSession]:
    async with with_hook(RoutingConfig(gateway.url)) as session:
        yield session


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"json": {"stream": True}},
        {"data": b"{}"},
        {"data": io.BytesIO(b"{}")},
        {"data": FormData({"a": "b"})},
        {"json": {}, "compress": "deflate"},
        {"json": {}, "params": {"a": "b"}},
        {"headers": {"x-smg-routing-key": "evil"}},
        {"headers": {"X-SMG-Routing-Key": ""}},
        {"headers": SMUGGLED},
        {"headers": CIMultiDict(SMUGGLED)},
        {"skip_auto_headers": ["User-Agent", "X-SMG-Routing-Key"]},
    ],
)
async def test_a_matching_call_carries_exactly_one_key(
    gateway: Recorder, hooked: ClientSession, arguments: dict[str, Any]
) -> None:
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, **deepcopy(arguments)):  # a call closes its file
            pass
    assert gateway.last.keys == [b"s-1"]
    assert gateway.last.values("X-SMG-Target-Worker") == []


async def test_a_method_in_lower_case_is_the_same_method(
    gateway: Recorder, hooked: ClientSession
) -> None:
    with routing_session("s-1"):
        async with hooked.request("post", gateway.chat, headers=SMUGGLED):
            pass
    assert gateway.last.keys == [b"s-1"]


async def test_session_wide_headers_do_not_survive(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url)
    async with with_hook(config, gateway.url, headers=SMUGGLED) as session:
        with routing_session("s-1"):
            async with session.post("/v1/chat/completions"):
                pass
    assert gateway.last.keys == [b"s-1"]
    assert gateway.last.values("X-SMG-Target-Worker") == []


async def test_every_call_of_a_session_carries_the_key(
    gateway: Recorder, hooked: ClientSession
) -> None:
    gateway.answer_with(*map(failure, (500, 200, 503, 200)))
    async with routing_session("s-1"):
        for _ in range(4):
            async with hooked.post(gateway.chat, json={}):
                pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"]] * 4


async def test_the_callers_headers_stay_as_they_were(
    gateway: Recorder, hooked: ClientSession
) -> None:
    headers = CIMultiDict(SMUGGLED)
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, headers=headers):
            pass
    assert list(headers.items()) == SMUGGLED


@pytest.mark.parametrize(
    ("named", "left"),
    [
        ("x-smg-ROUTING-key", []),
        ("keep-alive ,X-SMG-Routing-Key, x-a", [b"keep-alive, x-a"]),
        ("keep-alive ,x-a", [b"keep-alive ,x-a"]),
    ],
)
async def test_connection_does_not_name_the_key_for_a_proxy_to_drop(
    gateway: Recorder, hooked: ClientSession, named: str, left: list[bytes]
) -> None:
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, headers={"Connection": named}):
            pass
    assert (gateway.last.keys, gateway.last.values("Connection")) == ([b"s-1"], left)


async def test_connection_stays_where_it_was(gateway: Recorder, hooked: ClientSession) -> None:
    headers = {"Connection": "keep-alive", "X-Last": "1"}
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, headers=headers):
            pass
    names = [line.partition(b":")[0] for line in gateway.last.header_lines]
    assert names.index(b"Connection") < names.index(b"X-Last")


async def test_an_own_header_carries_the_key_and_the_gateways_does_not_survive(
    gateway: Recorder,
) -> None:
    config = RoutingConfig(gateway.url, header="X-Pin")
    async with with_hook(config) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat, headers=[*SMUGGLED, ("x-pin", "evil")]):
                pass
    assert gateway.last.values("X-Pin") == [b"s-1"]
    assert gateway.last.keys == []


async def test_keys_begin_with_the_prefix(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url, prefix="job-7/")
    async with with_hook(config) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
    assert gateway.last.keys == [b"job-7/s-1"]


async def test_an_ignored_id_gives_no_key_wherever_it_was_set(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url, ignore_ids="default", on_missing="raise")
    async with with_hook(config) as session:
        with routing_session("default"), pytest.raises(MissingSessionError):
            await session.post(gateway.chat)
    assert gateway.calls == []


async def test_an_id_that_the_gateway_would_drop_goes_out_as_a_digest(
    gateway: Recorder, hooked: ClientSession
) -> None:
    config = RoutingConfig(gateway.url)
    for session_id in ("a\r\nX-Evil: 1", "é" * 10, "x" * 10_000, "\0", "\udcff"):
        with routing_session(session_id):
            async with hooked.post(gateway.chat):
                pass
        assert gateway.last.keys == [config.routing_key(session_id).encode()]
        assert gateway.last.values("X-Evil") == []


Caller = Callable[[ClientSession, Recorder], Awaitable[object]]


async def _websocket(session: ClientSession, wire: Recorder) -> None:
    with pytest.raises(WSServerHandshakeError):
        await session.ws_connect(wire.chat, headers=SMUGGLED)


UNTAGGED: dict[str, Caller] = {
    "another method": lambda session, wire: session.get(wire.chat, headers=SMUGGLED),
    "another method with a body": lambda session, wire: session.put(wire.chat, json={}),
    "another path": lambda session, wire: session.post(wire.url / "v1/models", headers=SMUGGLED),
    "a path below": lambda session, wire: session.post(wire.chat / "x", headers=SMUGGLED),
    "a websocket": _websocket,
}


async def assert_unchanged(
    wire: Recorder, hooked: ClientSession, outgoing: ClientSession, call: Caller
) -> None:
    """Assert that the plugin changes no byte of a call."""
    seen = []
    for session in (outgoing, hooked):
        response = await call(session, wire)
        if response is not None:
            response.release()  # type: ignore[attr-defined]
        lines = wire.last.header_lines
        # This header is random.
        kept = [line for line in lines if not line.startswith(b"Sec-WebSocket-Key")]
        seen.append((wire.last.start_line, kept, wire.last.body))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("call", UNTAGGED.values(), ids=UNTAGGED)
async def test_other_calls_to_the_gateway_leave_byte_for_byte_as_without_the_plugin(
    gateway: Recorder, hooked: ClientSession, outgoing: ClientSession, call: Caller
) -> None:
    with routing_session("s-1"):
        await assert_unchanged(gateway, hooked, outgoing, call)


async def test_calls_to_other_hosts_leave_byte_for_byte_as_without_the_plugin(
    elsewhere: Recorder, hooked: ClientSession, outgoing: ClientSession
) -> None:
    with routing_session("s-1"):
        await assert_unchanged(
            elsewhere,
            hooked,
            outgoing,
            lambda session, wire: session.post(wire.chat, json={}, headers=SMUGGLED),
        )


async def test_calls_without_a_session_leave_byte_for_byte_as_without_the_plugin(
    gateway: Recorder, hooked: ClientSession, outgoing: ClientSession
) -> None:
    await assert_unchanged(
        gateway,
        hooked,
        outgoing,
        lambda session, wire: session.post(wire.chat, json={}, headers=SMUGGLED),
    )


@pytest.mark.parametrize("call", [*UNTAGGED.values(), lambda s, w: s.post(w.chat, json={})])
async def test_it_does_nothing_where_it_is_not_enabled(
    gateway: Recorder, outgoing: ClientSession, call: Caller
) -> None:
    config = RoutingConfig(gateway.url, enabled=False, on_missing="raise")
    async with with_hook(config) as session:
        Routing(config).attach(outgoing)
        assert outgoing.trace_configs == []
        with routing_session("s-1"):
            await assert_unchanged(gateway, session, outgoing, call)
        await assert_unchanged(gateway, session, outgoing, call)


async def test_key_does_not_follow_a_redirect_off_the_gateway(
    gateway: Recorder, elsewhere: Recorder, hooked: ClientSession
) -> None:
    gateway.answer = lambda call: redirect(elsewhere.chat)
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, json={}):
            pass
    assert gateway.last.keys == [b"s-1"]
    assert elsewhere.last.keys == []


async def test_what_the_hook_took_off_does_not_follow_a_redirect_either(
    gateway: Recorder, elsewhere: Recorder, hooked: ClientSession
) -> None:
    gateway.answer = lambda call: redirect(elsewhere.chat)
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, json={}, headers=SMUGGLED):
            pass
    assert gateway.last.keys == [b"s-1"]
    assert elsewhere.last.keys == []
    assert elsewhere.last.values("X-SMG-Target-Worker") == []


async def test_key_does_not_follow_a_redirect_to_another_path(
    gateway: Recorder, hooked: ClientSession
) -> None:
    gateway.answer = lambda call: answer() if call.path == "/other" else redirect("/other")
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, json={}):
            pass
    assert [(call.path, call.keys) for call in gateway.calls] == [
        ("/v1/chat/completions", [b"s-1"]),
        ("/other", []),
    ]


async def test_a_key_in_an_own_header_does_not_follow_a_redirect_off_the_gateway(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    gateway.answer = lambda call: redirect(elsewhere.chat)
    config = RoutingConfig(gateway.url, header="X-Pin")
    async with with_hook(config) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat, json={}):
                pass
    assert gateway.last.values("X-Pin") == [b"s-1"]
    assert elsewhere.last.values("X-Pin") == []


async def test_key_does_not_follow_a_redirect_by_the_older_uri_header(
    gateway: Recorder, hooked: ClientSession
) -> None:
    gateway.answer = lambda call: (
        answer() if call.path == "/other" else redirect("/other").replace(b"Location", b"URI")
    )
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, json={}):
            pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"], []]


async def test_a_redirect_is_judged_by_the_path_that_goes_out(gateway: Recorder) -> None:
    gateway.answer = lambda call: (
        answer() if "%63" in call.path else redirect("/v1/chat/%63ompletions")
    )
    config = RoutingConfig(gateway.url)
    async with with_hook(config, requote_redirect_url=False) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat, json={}):
                pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"], []]


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_key_does_not_follow_a_redirect_that_turns_the_call_into_a_get(
    gateway: Recorder, hooked: ClientSession, status: int
) -> None:
    gateway.answer = lambda call: (
        answer() if call.start_line.startswith(b"GET") else redirect(gateway.chat, status)
    )
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, json={}):
            pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"], []]


@pytest.mark.parametrize("status", [307, 308])
async def test_key_is_there_again_when_a_redirect_comes_back(
    gateway: Recorder, elsewhere: Recorder, hooked: ClientSession, status: int
) -> None:
    def from_the_gateway(call: Call) -> bytes:
        return answer() if b"?" in call.start_line else redirect(elsewhere.url / "a", status)

    gateway.answer = from_the_gateway
    elsewhere.answer = lambda call: redirect(gateway.chat.with_query("again"), status)
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, json={}):
            pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-1"]]
    assert [call.keys for call in elsewhere.calls] == [[]]


@pytest.mark.parametrize("location", ["/v1/chat/completions?b", "completions?b", "?b", "//{host}"])
async def test_relative_redirects_are_judged_by_where_they_lead(
    gateway: Recorder, hooked: ClientSession, location: str
) -> None:
    location = location.format(host=f"{gateway.url.authority}/v1/chat/completions?b")
    gateway.answer = lambda call: answer() if b"?b" in call.start_line else redirect(location)
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, json={}):
            pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-1"]]


async def test_a_call_that_is_redirected_to_the_gateway_gets_the_key_there_only(
    gateway: Recorder, elsewhere: Recorder, hooked: ClientSession
) -> None:
    elsewhere.answer = lambda call: redirect(gateway.chat)
    with routing_session("s-1"):
        async with hooked.post(elsewhere.chat, json={}, headers=SMUGGLED):
            pass
    assert elsewhere.last.keys == [b"", b"evil"]
    assert gateway.last.keys == [b"s-1"]
    assert gateway.last.values("X-SMG-Target-Worker") == []


@pytest.mark.parametrize("location", ["http://[", "ftp://x/", "http://h:99999/"])
async def test_a_redirect_that_aiohttp_refuses_fails_as_without_the_plugin(
    gateway: Recorder, hooked: ClientSession, outgoing: ClientSession, location: str
) -> None:
    gateway.answer = lambda call: redirect(location)
    raised = []
    for session in (outgoing, hooked):
        with routing_session("s-1"), pytest.raises((ClientError, ValueError)) as caught:
            await session.post(gateway.chat, json={})
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]


async def test_a_redirect_without_a_location_is_the_callers_to_read(
    gateway: Recorder, hooked: ClientSession
) -> None:
    gateway.answer = lambda call: answer(status=307)
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, json={}) as response:
            assert response.status == 307


async def test_an_error_status_is_raised_as_without_the_plugin(
    gateway: Recorder, hooked: ClientSession
) -> None:
    gateway.answer = lambda call: answer(status=503)
    with routing_session("s-1"), pytest.raises(ClientResponseError):
        await hooked.post(gateway.chat, raise_for_status=True)


@pytest.mark.parametrize(("on_missing", "records"), [("pass", 0), ("warn", 1)])
async def test_on_missing_says_what_a_call_without_a_session_does(
    gateway: Recorder,
    caplog: pytest.LogCaptureFixture,
    on_missing: Any,
    records: int,
) -> None:
    config = RoutingConfig(gateway.url, on_missing=on_missing)
    async with with_hook(config) as session:
        url = gateway.chat.with_user("user").with_password("hush").with_query("a=b")
        async with session.post(url):
            pass
        async with session.post(gateway.url / "other"):
            pass
    assert gateway.calls[0].keys == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * records
    assert f"POST {gateway.chat} has no session" in caplog.text or not records
    assert "hush" not in caplog.text


async def test_on_missing_raise_fails_the_call_before_it_leaves(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url, on_missing="raise")
    async with with_hook(config) as session:
        with pytest.raises(MissingSessionError, match="has no session"):
            await session.post(gateway.chat)
        assert gateway.calls == []
        async with session.post(gateway.url / "other"):
            pass
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
    assert [call.keys for call in gateway.calls] == [[], [b"s-1"]]


async def test_attach_adds_the_hook_to_a_session_in_use_and_once_only(gateway: Recorder) -> None:
    routing = Routing({"gateway": str(gateway.url)})
    async with ClientSession() as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
            for _ in range(50):
                routing.attach(session)
            assert len(session.trace_configs) == 1
            async with session.post(gateway.chat):
                pass
    assert [call.keys for call in gateway.calls] == [[], [b"s-1"]]
    assert routing.pins.summary() == PinSummary(unknown=1, sessions=1)


async def test_a_session_that_has_the_hook_of_a_routing_twice_is_tagged_and_counted_once(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    hooks = [routing.trace_config(), TraceConfig(), routing.trace_config()]
    async with ClientSession(trace_configs=hooks) as session:
        routing.attach(session)
        with routing_session("s-1"):
            for wire in (gateway, elsewhere):
                async with session.post(wire.chat):
                    pass
    assert gateway.last.keys == [b"s-1"]
    assert routing.pins.summary() == PinSummary(unknown=1, sessions=1, unmatched=1)


async def test_attach_of_a_routing_leaves_that_of_another_one(gateway: Recorder) -> None:
    async with ClientSession() as session:
        first = Routing(RoutingConfig(gateway.url, prefix="a/"))
        first.attach(session)
        hooks = list(session.trace_configs)
        for _ in range(3):
            other = Routing(RoutingConfig(gateway.url, prefix="b/"))
            other.attach(session)
            other.attach(session)
        assert session.trace_configs[:1] == hooks
        assert len(session.trace_configs) == 4
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
    assert gateway.last.keys == [b"a/s-1"]


async def test_the_hook_of_a_routing_may_be_on_several_sessions(gateway: Recorder) -> None:
    routing = Routing(RoutingConfig(gateway.url))
    async with (
        ClientSession(trace_configs=[routing.trace_config()]) as one,
        ClientSession(trace_configs=[routing.trace_config()]) as other,
    ):
        with routing_session("s-1"):
            for session in (one, other):
                async with session.post(gateway.chat):
                    pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-1"]]
    assert routing.pins.summary() == PinSummary(unknown=2, sessions=1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_call_that_two_routings_have_is_tagged_and_counted_by_the_first(
    gateway: Recorder, order: tuple[int, int]
) -> None:
    routings = [
        Routing(RoutingConfig(gateway.url)),
        Routing(RoutingConfig([gateway.url, "http://other"], header="X-Pin", prefix="b/")),
    ]
    async with ClientSession() as session:
        for number in order:
            routings[number].attach(session)
        with routing_session("s-1"):
            async with session.post(gateway.chat):
                pass
    first, second = (routings[number] for number in order)
    counts = (first.pins.summary(), second.pins.summary())
    assert counts == (PinSummary(unknown=1, sessions=1), PinSummary())
    carried = (gateway.last.keys, gateway.last.values("X-Pin"))
    assert carried == (([b"s-1"], []) if first is routings[0] else ([], [b"b/s-1"]))


async def test_attach_leaves_a_list_alone_that_the_caller_shares_with_another_session(
    gateway: Recorder,
) -> None:
    shared = [TraceConfig()]
    async with (
        ClientSession(trace_configs=shared) as one,
        ClientSession(trace_configs=shared) as other,
    ):
        Routing(RoutingConfig(gateway.url)).attach(one)
        assert len(shared) == 1
        with routing_session("s-1"):
            for session in (one, other):
                async with session.post(gateway.chat):
                    pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"], []]


async def test_attached_hook_is_frozen(gateway: Recorder) -> None:
    async with ClientSession() as session:
        Routing(RoutingConfig(gateway.url)).attach(session)
        assert session.trace_configs[0].on_request_start.frozen
        assert session.trace_configs[0].on_request_redirect.frozen


async def test_hooks_of_two_gateways_on_one_session_stay_apart(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    async with ClientSession() as session:
        Routing(RoutingConfig(gateway.url)).attach(session)
        Routing(RoutingConfig(elsewhere.url, key="digest", header="X-Pin")).attach(session)
        with routing_session("s-1"):
            for wire in (gateway, elsewhere):
                async with session.post(wire.chat):
                    pass
    assert gateway.last.keys == [b"s-1"]
    assert gateway.last.values("X-Pin") == []
    assert elsewhere.last.keys == []
    [pin] = elsewhere.last.values("X-Pin")
    assert pin.startswith(b"sha256-")


@pytest.mark.parametrize("header", ["x-smg-routing-key", "X-Pin"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_redirect_from_one_gateway_to_another_carries_the_key_of_each(
    gateway: Recorder,
    elsewhere: Recorder,
    order: tuple[int, int],
    header: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    routings = [
        Routing(RoutingConfig(gateway.url)),
        Routing(RoutingConfig(elsewhere.url, header=header)),
    ]
    async with ClientSession() as session:
        for number in order:
            routings[number].attach(session)
        with routing_session("s-1"):
            for wire, other in ((elsewhere, gateway), (gateway, elsewhere)):
                wire.answer = lambda call, to=other.chat: redirect(to)  # type: ignore[misc]
                other.answer = lambda call: completion()
                async with session.post(wire.chat):
                    pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"]] * 2
    assert [call.values("X-Pin") for call in gateway.calls] == [[]] * 2
    assert [call.values(header) for call in elsewhere.calls] == [[b"s-1"]] * 2
    assert [it.pins.summary() for it in routings] == [PinSummary(unknown=1, sessions=1)] * 2
    assert "does not follow" not in caplog.text


async def test_a_redirect_after_the_end_of_the_app_that_has_the_hook_fails_nothing(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    hooked = Routing(RoutingConfig(gateway.url)).instrument()

    def ends_it(call: Call) -> bytes:
        hooked.close()
        return redirect(elsewhere.url / "elsewhere")

    gateway.answer = ends_it
    async with ClientSession() as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat) as response:
                assert response.status == 200
    assert elsewhere.last.keys == []


class ComparedResponse(ClientResponse):
    """A response that has no hash, as a dataclass has none."""

    def __eq__(self, other: object) -> bool:
        return self is other


async def test_a_redirect_that_answers_with_a_response_of_ones_own_class_fails_nothing(
    gateway: Recorder,
) -> None:
    gateway.answer_with(redirect(gateway.chat.with_query(again=1)), completion())
    hook = Routing(RoutingConfig(gateway.url)).trace_config()
    async with ClientSession(trace_configs=[hook], response_class=ComparedResponse) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat) as response:
                assert response.status == 200
    assert [call.keys for call in gateway.calls] == [[b"s-1"]] * 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_an_apps_key_does_not_follow_a_redirect_to_the_gateway_of_another_hook(
    gateway: Recorder, elsewhere: Recorder, order: tuple[int, int], aiohttp_client: AiohttpClient
) -> None:
    elsewhere.answer = lambda call: redirect(gateway.chat)
    async with ClientSession() as session:

        async def handler(request: web.Request) -> web.Response:
            async with session.post(elsewhere.chat):
                return web.Response()

        app = web.Application()
        app.router.add_post("/{session_id}", handler)
        routings = [Routing(RoutingConfig(gateway.url)), setup(app, {"gateway": elsewhere.url})]
        for number in order:
            routings[number].attach(session)
        client = await aiohttp_client(app)
        async with client.post("/s-1"):
            pass
    assert (elsewhere.last.keys, gateway.last.keys) == ([b"s-1"], [])


async def test_a_base_path_in_the_gateways_url_is_respected(gateway: Recorder) -> None:
    config = RoutingConfig(gateway.url / "base/")
    async with with_hook(config) as session:
        with routing_session("s-1"):
            for path in ("base/v1/chat/completions", "v1/chat/completions"):
                async with session.post(URL(f"{gateway.url}/{path}")):
                    pass
    assert [call.keys for call in gateway.calls] == [[b"s-1"], []]


needs_client_middlewares = pytest.mark.skipif(
    not hasattr(aiohttp, "ClientMiddlewareType"), reason="aiohttp has them from 3.12 on"
)


@needs_client_middlewares
async def test_each_attempt_of_a_retrying_client_middleware_carries_the_key(
    gateway: Recorder,
) -> None:
    gateway.answer_with(*map(failure, (503, 200)))

    async def retry(request: Any, handler: Any) -> Any:
        response = await handler(request)
        return response if response.ok else await handler(request)

    config = RoutingConfig(gateway.url)
    async with with_hook(config, middlewares=[retry]) as session:
        with routing_session("s-1"):
            async with session.post(gateway.chat) as response:
                assert response.status == 200
    assert [call.keys for call in gateway.calls] == [[b"s-1"], [b"s-1"]]


@needs_client_middlewares
async def test_client_middlewares_of_one_call_do_not_switch_the_hook_off(
    gateway: Recorder, hooked: ClientSession
) -> None:
    none: Any = {"middlewares": ()}
    with routing_session("s-1"):
        async with hooked.post(gateway.chat, **none):
            pass
    assert gateway.last.keys == [b"s-1"]


def pinning(workers: list[str]) -> Callable[[Call], bytes]:
    """Return the answers of a gateway that pins each new key to the next worker."""
    pins: dict[bytes, str] = {}

    def to(call: Call) -> bytes:
        [key] = call.keys
        worker = pins.setdefault(key, workers[len(pins) % len(workers)])
        return completion(worker=worker)

    return to


async def play_on_both(
    gateway: Recorder, elsewhere: Recorder, on_gateway: list[str], on_elsewhere: list[str]
) -> PinSummary:
    """Play sessions whose calls alternate between two gateways that each pin by the key."""
    gateway.answer, elsewhere.answer = pinning(on_gateway), pinning(on_elsewhere)
    routing = Routing(RoutingConfig([gateway.url, elsewhere.url]))
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:
        for _ in range(4):
            for number in range(6):
                with routing_session(f"s-{number}"):
                    for wire in (gateway, elsewhere):
                        async with session.post(wire.chat):
                            pass
    return routing.pins.summary()


async def test_gateways_that_have_no_worker_in_common_pin_a_session_each(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    summary = await play_on_both(gateway, elsewhere, ["http://w:1", "http://w:2"], ["http://w:3"])
    assert summary == PinSummary(first=12, kept=36, sessions=6)


async def test_gateways_before_the_same_workers_that_split_a_session_show_it(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    workers = ["http://w:1", "http://w:2"]
    summary = await play_on_both(gateway, elsewhere, workers, workers[::-1])
    # Each gateway pins each session, but to different workers. Calls from before the ledger knew
    # that the gateways share workers count as first.
    assert summary.moved > 30
    assert summary.first + summary.kept + summary.moved == 48


async def test_gateways_before_the_same_workers_that_agree_show_no_move(
    gateway: Recorder, elsewhere: Recorder
) -> None:
    workers = ["http://w:1", "http://w:2"]
    summary = await play_on_both(gateway, elsewhere, workers, workers)
    assert summary.moved == 0
    assert summary.kept + summary.first == 48


async def test_an_ignored_id_gives_no_key_in_a_block_within_a_request(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    async def handler(request: web.Request) -> web.Response:
        with routing_session("default"):
            async with request.app[CLIENT].post(gateway.chat):
                return web.Response()

    app = pinned_server(gateway.url, ignore_ids="default")
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1"):
        pass
    assert gateway.last.keys == []
