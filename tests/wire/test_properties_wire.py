"""The laws of outbound and inbound requests hold for any input, judged by what arrived."""

import asyncio
import logging
from collections import Counter, UserDict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from aiohttp import ClientResponse, ClientSession, web
from aiohttp.test_utils import TestServer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy, MultiDict, MultiDictProxy, istr
from yarl import URL

from aiohttp_smg_routing import routing_key
from aiohttp_smg_routing.testing import Recorder, recording_gateway, redirect
from harness.proxies import pinned_server

from ..inputs import LAW, VISIBLE
from ..origins import GatewayUrl, Origins, all_origins

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

pytestmark = pytest.mark.thorough


@pytest.fixture
def run() -> Iterator[Run[Any]]:
    """Run coroutines on one loop, which lasts as long as the test."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture(autouse=True)
def _debug() -> Iterator[None]:
    """Log at DEBUG why each call carries a key or not; this must not fail a call either."""
    logger, nobody = logging.getLogger("aiohttp_smg_routing"), logging.NullHandler()
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.DEBUG)
    logger.addHandler(nobody)
    yield
    logger.removeHandler(nobody)
    logger.setLevel(level)
    logger.propagate = True


@pytest.fixture
def origins(run: Run[Any]) -> Iterator[Origins]:
    context = all_origins()
    yield run(context.__aenter__())
    run(context.__aexit__(None, None, None))


GATEWAYS = st.sampled_from(
    [
        GatewayUrl("http://gw.example", "gw.example", 80),
        GatewayUrl("HTTP://GW.Example:80/", "gw.example", 80),
        GatewayUrl("http://user:pw@gw.example:8080", "gw.example", 8080),
        GatewayUrl("http://gw.example.:8080", "gw.example.", 8080),
        GatewayUrl("http://gw.example/base/", "gw.example", 80, "/base/v1/chat/completions"),
        GatewayUrl("http://gw.example/b c%2F", "gw.example", 80, "/b%20c%2F/v1/chat/completions"),
        GatewayUrl("http://bücher.example:8080", "xn--bcher-kva.example", 8080),
        GatewayUrl("http://GW.☃.example:8080", "gw.xn--n3h.example", 8080),
        GatewayUrl("http://[::1]:8080", "::1", 8080),
        GatewayUrl("http://127.0.0.1:8080", "127.0.0.1", 8080),
        GatewayUrl("https://gw.example", "gw.example", 443, scheme="https"),
        GatewayUrl("https://GW.example:80", "gw.example", 80, scheme="https"),
        GatewayUrl("https://user:pw@[::1]:8080", "::1", 8080, scheme="https"),
    ]
)
HOSTS = [
    *("GW.Example", "gw.example.", "gw.example..", "gw%2eexample", "gw.example.evil", "evil.gw"),
    *(
        "bücher.example",
        "BÜCHER.example",
        "xn--bcher-kva.example",
        "XN--BCHER-KVA.example",
        "gw.☃.example",
    ),
    *("[::1]", "[0:0::1]", "[::ffff:127.0.0.1]", "127.0.0.1", "127.1", "2130706433", "gw。example"),
]
PATHS = [
    *("/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions", "/v1/models", ""),
    *("/v1/chat%2Fcompletions", "/v1/chat%2fcompletions", "/v1/%63hat/completions", "/v1/chat"),
    *("/x/../v1/chat/completions", "/v1/./chat/completions", "/v1/chat/completions/../completions"),
    *("/V1/chat/completions", "/v1/chat/completions;x", "/v1/chat/completions%00", "/../v1/chat"),
    *("/base/v1/chat/completions", "/base/../v1/chat/completions", "/b c%2F/v1/chat/completions"),
    *("/b%20c%2f/v1/chat/completions", "/base%2Fv1/chat/completions", "/v1\\chat\\completions"),
    *("/base/%2e%2e/v1/chat/completions", "/v1/chat/completions%20", "/v1/chat/completions%3Fa"),
]


def mostly(own: str, *odd: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(*(st.just(own) for _ in range(4)), *odd)  # own counts four times


#: Most URLs have one or two odd parts; the others are the gateway's.
URLS = st.builds(
    "{}://{}{}{}{}{}".format,
    st.sampled_from(["<scheme>"] * 11 + ["http", "https", "HTTP", "HTTPS", "ws", "wss", "ftp", ""]),
    st.sampled_from([""] * 8 + ["user@", "user:pw@", "gw.example@", "gw.example:80@", ":@"]),
    mostly("<host>", st.sampled_from(HOSTS), st.text("gw.x:@[]%é-", max_size=9)),
    mostly("<port>", st.sampled_from(["", ":80", ":443", ":8080", ":080", ":", ":x"])),
    mostly(
        "<path>",
        st.sampled_from(PATHS),
        st.text("/.%2fFvV1chat;@é \\", max_size=24).map("/v1/{}".format),
    ),
    st.sampled_from(["", "", "", "?a=b", "#f", "?/v1/chat/completions", "?%2e#é"]),
)


def test_a_key_reaches_the_gateways_origin_and_path_or_nobody(
    run: Run[Any], origins: Origins
) -> None:
    count: Counter[str] = Counter()

    @settings(LAW, max_examples=1000)
    @given(GATEWAYS, URLS, st.booleans(), st.sampled_from(["POST"] * 6 + ["post", "GET", "PUT"]))
    def law(gateway: GatewayUrl, text: str, encoded: bool, method: str) -> None:
        host = f"[{gateway.host}]" if ":" in gateway.host else gateway.host
        for name, own in {
            "<scheme>": gateway.scheme,
            "<host>": host,
            "<port>": f":{gateway.port}",
            "<path>": gateway.path,
        }.items():
            text = text.replace(name, own)
        try:
            url = URL(text, encoded=encoded)
        except (ValueError, IndexError):
            assume(False)
        # An encoded URL should be ASCII. aiohttp 3.9 sends any other host unchanged, but encodes it
        # if the URL has a user, so that it may be another host than the writer meant.
        assume(not encoded or url.raw_authority.isascii())
        arrived = run(
            origins.assert_key_or_nothing(
                gateway,
                lambda session: session.request(method, url, data=b"{}", allow_redirects=False),
            )
        )
        for it in arrived:
            count[f"{gateway.scheme} tagged" if it.call.keys else "untagged"] += 1
            if (url.raw_host, url.port) == (gateway.host, gateway.port) and not it.at_gateway:
                count[f"{url.scheme}, not {gateway.scheme}"] += 1

    law()
    assert count["http tagged"] > 100
    assert count["https tagged"] > 30
    assert count["untagged"] > 300
    assert count["http, not https"] > 3
    assert count["https, not http"] > 3


LOCATIONS = st.builds(
    str.__add__,
    st.sampled_from(
        [
            *("http://gw.example/v1/chat/completions", "http://GW.example:80/v1/chat/completions"),
            *("http://elsewhere/v1/chat/completions", "http://gw.example:81/v1/chat/completions"),
            *(
                "https://gw.example/v1/chat/completions",
                "https://gw.example:80/v1/chat/completions",
            ),
            *("https://elsewhere/v1/chat/completions", "http://gw.example:443/v1/chat/completions"),
            *("http://user:pw@gw.example/v1/chat/completions", "//gw.example/v1/chat/completions"),
            *("//elsewhere/v1/chat/completions", "/v1/chat/completions", "completions", "./"),
            *("../chat/completions", "/other", "/v1/%63hat/completions", "/v1/chat%2Fcompletions"),
            *(
                "http:/v1/chat/completions",
                "https:/v1/chat/completions",
                "http://[",
                "http://[]@",
                "http://gw.example:x/v1/chat/completions",
            ),
            *("/v1/é/../chat/completions", "///v1/chat/completions", "/v1/x y/../chat/completions"),
        ]
    )
    | st.text("/.:@%2f[]gwé\\", min_size=1, max_size=12),
    st.sampled_from(["", "", "?q", "#f"]),
)
HOPS = st.lists(
    st.tuples(LOCATIONS, st.sampled_from([307, 308, 307, 308, 301, 302, 303])),
    min_size=1,
    max_size=12,
)


def test_every_hop_of_a_redirect_chain_is_judged_by_where_it_arrives(
    run: Run[Any], origins: Origins
) -> None:
    count: Counter[str] = Counter()

    @settings(LAW, max_examples=400)
    @given(
        st.sampled_from(
            [
                GatewayUrl("http://gw.example", "gw.example", 80),
                GatewayUrl("https://gw.example", "gw.example", 443, scheme="https"),
            ]
        ),
        HOPS,
        st.sampled_from(["gw.example", "elsewhere"]),
        st.booleans(),
    )
    def law(gateway: GatewayUrl, hops: list[tuple[str, int]], first: str, requote: bool) -> None:
        url = URL(f"{gateway.scheme}://{first}/v1/chat/completions")
        arrived = run(
            origins.assert_key_or_nothing(
                gateway,
                lambda session: session.post(url, data=b"{}"),
                answers=tuple(redirect(*hop) for hop in hops),
                requote_redirect_url=requote,
            )
        )
        for before, after in pairwise(arrived):
            if before.call.keys != after.call.keys:
                count["gained" if after.call.keys else "lost"] += 1

    law()
    assert count["gained"] > 5
    assert count["lost"] > 50


def in_any_case(name: str) -> st.SearchStrategy[str]:
    upper = st.lists(st.booleans(), min_size=len(name), max_size=len(name))
    return upper.map(
        lambda flags: "".join(
            c.upper() if up else c.lower() for c, up in zip(name, flags, strict=True)
        )
    )


NAMES = st.one_of(
    *map(in_any_case, ("X-SMG-Routing-Key", "X-SMG-Target-Worker")),
    st.sampled_from(["Authorization", "X-SMG-Routing-Key", "x-a", "X-SMG-Routing-Keys", "Host"]),
)
PAIRS = st.lists(
    st.tuples(
        NAMES | NAMES.map(istr),
        st.sampled_from(["", "s-1", "evil", "0", "99"]) | VISIBLE | st.text("é 会", min_size=1),
    )
    | st.tuples(
        in_any_case("Connection"),
        st.sampled_from(["close", "keep-alive, X-SMG-Routing-Key", " x-smg-routing-KEY ,x-a", ""])
        | in_any_case("X-SMG-Routing-Key"),
    ),
    max_size=6,
)
SHAPES: list[Callable[[Any], Any]] = [
    *(list, tuple, iter, dict, UserDict, MultiDict, CIMultiDict),
    lambda pairs: MultiDictProxy(MultiDict(pairs)),
    lambda pairs: CIMultiDictProxy(CIMultiDict(pairs)),
    lambda pairs: None,
]


def items(headers: Any) -> list[tuple[str, str]]:
    return [*(headers.items() if hasattr(headers, "items") else headers or ())]


def test_headers_of_every_shape_gain_one_key_or_nothing_and_stay_the_callers(
    run: Run[Any], origins: Origins
) -> None:
    gateway = GatewayUrl("http://gw.example", "gw.example", 80)
    tagged: Counter[Any] = Counter()

    @settings(LAW, max_examples=400)
    @given(
        PAIRS,
        st.sampled_from(SHAPES),
        PAIRS,
        st.sampled_from(SHAPES).filter(lambda shape: shape is not iter),
        st.sampled_from(["gw.example", "elsewhere"]),
    )
    def law(pairs: Any, shape: Any, default: Any, default_shape: Any, host: str) -> None:
        headers, session_wide = shape(pairs), default_shape(default)
        url = URL(f"http://{host}/v1/chat/completions")

        async def send(session: ClientSession) -> ClientResponse:
            given = iter(pairs) if shape is iter else headers  # an iterator can be read only once
            return await session.post(url, headers=given, data=b"{}")

        arrived = run(origins.assert_key_or_nothing(gateway, send, headers=session_wide))
        assert items(headers) == items(shape(pairs))
        assert items(session_wide) == items(default_shape(default))
        tagged[shape] += sum(it.is_chat(gateway) for it in arrived)

    law()
    assert (+tagged).keys() == {*SHAPES}


#: Segments of a path as bytes on the wire, percent-encoded or raw where HTTP allows it.
SEGMENTS = st.lists(
    st.sampled_from(
        [
            *(
                "%0d%0a",
                "%0D%0AX-SMG-Target-Worker:%200",
                "%00",
                "%2f",
                "%2F..%2f",
                "%25",
                "%20",
                "+",
            ),
            *(
                "%C3%A9",
                "%c3",
                "%ff",
                "%ed%a0%80",
                "%F0%9F%98%80",
                "%u00e9",
                "%",
                "%7f",
                "%09",
                ":",
            ),
            *("sha256-", "a" * 64, "x" * 129, "..", "%2e%2e", ";a=b", "@", "a,b", "%2c", '"', "\\"),
        ]
    )
    | st.binary(min_size=1, max_size=3).map(lambda raw: "".join(f"%{byte:02x}" for byte in raw))
    | st.text("abcXYZ019-._~!$&'()*=", min_size=1, max_size=6),
    min_size=1,
    max_size=5,
).map("".join)


def test_a_percent_encoded_id_in_the_path_gives_one_clean_key(run: Run[Any]) -> None:
    seen: list[str] = []

    async def send(port: int, segment: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /sessions/{segment}/v1/chat/completions HTTP/1.1\r\nHost: h\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: 0\r\n\r\n".encode())
        answered = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answered

    @web.middleware
    async def keep(request: web.Request, handler: Any) -> web.StreamResponse:
        seen.extend(request.match_info.values())
        return await handler(request)  # type: ignore[no-any-return]

    stack = AsyncExitStack()

    async def start() -> tuple[Recorder, TestServer]:
        wire = await stack.enter_async_context(recording_gateway())
        app = pinned_server(wire.url)
        app.middlewares.append(keep)
        server = TestServer(app)
        stack.push_async_callback(server.close)
        await server.start_server()
        return wire, server

    wire, server = run(start())

    @settings(LAW, max_examples=400)
    @given(SEGMENTS)
    def law(segment: str) -> None:
        wire.calls.clear()
        seen.clear()
        answered: bytes = run(send(server.port, segment))
        if not seen:  # the server rejects the path
            assert answered.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404"))
            assert wire.calls == []
            return
        assert answered.startswith(b"HTTP/1.1 200")
        [call] = wire.calls
        assert call.keys == ([routing_key(seen[0]).encode()] if seen[0].strip() else [])
        names = {line.partition(b":")[0] for line in call.header_lines} - {b"X-SMG-Routing-Key"}
        assert names <= {b"Host", b"User-Agent", b"Accept", b"Accept-Encoding"} | {
            *(b"Connection", b"Content-Type", b"Content-Length"),
        }

    try:
        law()
    finally:
        run(stack.aclose())
