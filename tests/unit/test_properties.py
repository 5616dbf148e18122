"""The laws of the key and of the config hold for any input."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from yarl import URL

from aiohttp_smg_routing import RoutingConfig, routing_key
from aiohttp_smg_routing.keys import LONGEST_PREFIX
from fuzz import laws

from ..inputs import ANY_TEXT, LAW, VISIBLE

pytestmark = pytest.mark.thorough

PLAIN_IDS = (ANY_TEXT | VISIBLE).filter(str.strip)
#: Ids include texts that look like keys of any form.
IDS = PLAIN_IDS | PLAIN_IDS.map(lambda text: routing_key(text, key="digest"))
FORMS = st.fixed_dictionaries(
    {
        "key": st.sampled_from(["session_id", "digest"]),
        "secret": st.none() | ANY_TEXT.filter(bool),
        "prefix": VISIBLE.map(lambda text: text[:LONGEST_PREFIX]),
    }
)


@settings(LAW, max_examples=1000)
@given(IDS, IDS, FORMS)
@example("x" * 128, "x" * 129, {"prefix": ""})
@example("x" * 76, "x" * 77, {"prefix": "~" * LONGEST_PREFIX})
@example("\udc80", "\udc81", {"prefix": ""})
@example("\ud800\udc00", "\U00010000", {"prefix": ""})
@example("s\u0301", "ś", {"prefix": ""})
@example("x" * 1_000_000 + "1", "x" * 1_000_000 + "2", {"key": "digest"})
@example("x" * 1_000_000 + "1", "x" * 1_000_000 + "2", {"key": "digest", "secret": "hush"})
def test_a_key_is_visible_ascii_of_128_bytes_at_most_and_that_of_one_id_alone(
    one: str, other: str, form: Any
) -> None:
    laws.key(one, other, form)


@settings(LAW, max_examples=300)
@given(IDS, FORMS)
def test_equal_ids_have_equal_keys(session_id: str, form: Any) -> None:
    laws.key(session_id, "".join(list(session_id)), form)


#: The sources in a pin_by, and the text between them.
NAMES = st.lists(st.sampled_from(["session_id", "json:a", "header:b", "json:a.b"]), max_size=3)
LITERALS = st.sampled_from(["", "/", " ", "1:", "a", "json:a", "\ud800", "\xff"])
FOUND = st.none() | st.sampled_from(["", " ", "a", "b", "ab", "1:a", "/"]) | ANY_TEXT
SESSIONS = st.sampled_from(["a", "b", "ab"]) | IDS


@st.composite
def combinations(draw: st.DrawFn) -> tuple[laws.Shared, list[str]]:
    names = draw(NAMES) or ["session_id"]
    pin_by = draw(LITERALS) + "".join(f"{{{name}}}{draw(LITERALS)}" for name in names)
    parts = {name: draw(FOUND) for name in names if name != "session_id"}
    return laws.Shared(pin_by, draw(SESSIONS), parts), names


@settings(LAW, max_examples=500)
@given(combinations(), combinations(), FORMS)
def test_no_two_combinations_share_a_key_and_none_has_that_of_an_id(
    one: Any, other: Any, form: Any
) -> None:
    laws.shared(one[0], other[0], [one[1], other[1]], {**form, "key": "digest"})


@settings(LAW, max_examples=300)
@given(combinations(), IDS, st.data(), FORMS)
def test_combinations_that_are_near_to_each_other_have_keys_of_their_own(
    one: Any, text: str, data: Any, form: Any
) -> None:
    """The two differ in one thing: the session id, or the value that one source found."""
    shared, names = one
    found = dict(shared.found)
    changed = data.draw(st.sampled_from(["session_id", *found]))
    session_id = text if changed == "session_id" else shared.session_id
    found |= {changed: text} if changed in found else {}
    other = laws.Shared(shared.pin_by, session_id, found)
    laws.shared(shared, other, [names, names], {**form, "key": "digest"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
NEARLY: dict[str, list[Any]] = {
    "gateway": [
        "http://gw",
        "http://[]@",
        "https://u:p@bücher:443/base/",
        ["http://[::1]:1", "http://gw."],
        *("http://gw/v1", "http://gw/a/v1/chat/", "http://*", "http://{gw}:1"),
        *(
            f"http://u:{laws.HIDDEN}@gw",
            f"http://u:{laws.HIDDEN},p@gw",
            f"http://u:{laws.HIDDEN}*@gw/v1",
            f"ftp://u:{laws.HIDDEN}@gw",
        ),
        *(f"http://gw?{laws.HIDDEN}", f"http://gw/#{laws.HIDDEN},", [{"url": laws.HIDDEN}]),
    ],
    "enabled": [True, "off"],
    "session_id": ["header:X-Id", "json:a.b", "json:a..b", "call:no.such:x", "query:"],
    "ignore_ids": ["default", [7, "-"], " , "],
    "pin_by": ["{json:model}", "{session_id} {header:X}", "{", "}{", "{}", "{{a}}", "{query:{}"],
    "paths": [
        *("/generate", ["/a,b"], "/a/..", "/.", "/\n", "/\udc80", "/%2e%2e", "/\t//x", "/%zz"),
        *("/*", "/{a}", "/chat/completions", "/v1/x"),
    ],
    "header": ["X-Pin", "host", "x\n", "Ä"],
    "worker_header": ["X-Worker", "x y"],
    "key": ["digest", "session_id", laws.HIDDEN],
    "secret": [laws.HIDDEN, ""],
    "prefix": ["job-7/", "a b", "~" * 53, {"secret": laws.HIDDEN}],
    "on_missing": ["warn", "raise"],
    "on_late": ["raise", "", 7],
    "client_session": ["All", ["a", "b"]],
    "instrument": ["true", 1],
    "json_max_size": [0, "1000", 10**5000],
    "track_sessions": [0, "10", "9" * 18, 10**5000, -(10**5000)],
    "on_move": ["call:builtins:print", {laws.HIDDEN: 1}, "call:..:x", "call:"],
    "metrics": ["prometheus"],
    "metrics_registry": ["prometheus_client:REGISTRY", "os:environ", ":"],
    "hide_worker_ids": ["yes", 1],
}
MAPPINGS = st.fixed_dictionaries(
    {},
    optional={name: st.sampled_from(nearly) | JSON for name, nearly in NEARLY.items()},
) | st.dictionaries(ANY_TEXT, JSON, max_size=3)


@settings(LAW, max_examples=400)
@given(MAPPINGS, st.booleans())
@example({"gateway": "http://gw/v1"}, True)
@example({"tool": {"smg_routing": {"gateway": laws.HIDDEN}}}, False)
@example({"gateway": "http://gw", "paths": "/a/.."}, True)
@example({"gateway": "http://gw", "paths": "/\t//x"}, True)
@example({"gateway": "http://gw", "paths": "/\udc80"}, True)
@example({"gateway": "http://GW.☃.example"}, False)
@example({"gateway": f"http://gw/{laws.HIDDEN}@gw"}, False)
@example({"gateway": f"http://u@{laws.HIDDEN}/@gw"}, False)
@example({"gateway": f"http://u:{laws.HIDDEN}@gw"}, False)
def test_any_mapping_gives_a_config_or_a_config_error(mapping: Any, with_gateway: bool) -> None:
    if with_gateway:
        mapping = {"gateway": "http://gw", **mapping}
    laws.config(mapping)


def test_the_mappings_that_are_tried_have_every_option() -> None:
    assert NEARLY.keys() == {it.name for it in fields(RoutingConfig)}


AUTHORITIES = [
    "gw.example",
    "GW.example:80",
    "u:p@gw.example",
    "gw.example:x",
    ":::80",
    "gw.example:0",
]
URLS = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(["http"] * 4 + ["https", "HTTP", "ws", ""]),
    st.sampled_from(AUTHORITIES * 3 + ["[::1]", "", "[", "gw.example:99999999"])
    | st.text(max_size=9),
    st.sampled_from(["/base/v1/chat/completions"] * 3 + ["/v1/chat/completions", "", "/base/"]),
    st.sampled_from(["", "", "?a=b", "#f", "/", "%2f", "/.."]) | st.text(max_size=3),
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["X-SMG-Routing-Key", "x-smg-target-worker", "x-smg-routing-KEY", "X-A"]),
        st.sampled_from(["", "0", "evil"]),
    ),
    max_size=4,
)


@settings(LAW, max_examples=1000)
@given(st.sampled_from(["POST", "POST", "post", "GET"]), URLS, st.booleans(), IDS, HEADERS)
@example("POST", "http://gw.example/base/v1/chat/completions", True, "s-1", [])
@example("POST", "http://gw.example:x/base/v1/chat/completions", True, "s-1", [])
@example("POST", "/base/v1/chat/completions", False, "s-1", [])
def test_a_call_has_one_key_or_is_left_as_it_is_and_explain_says_which(
    method: str, text: str, encoded: bool, session_id: str, headers: Any
) -> None:
    try:
        url = URL(text, encoded=encoded)
    except (ValueError, IndexError):
        assume(False)
    laws.matcher(method, url, session_id, headers)
