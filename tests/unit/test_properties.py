"""The laws of the key and of the config, for whatever input."""

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiohttp_smg_routing import routing_key
from aiohttp_smg_routing.key import LONGEST_PREFIX
from fuzz import laws

from ..inputs import ANY_TEXT, LAW, VISIBLE

PLAIN_IDS = (ANY_TEXT | VISIBLE).filter(str.strip)
#: Ids of every form that a key has are ids as well.
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
        *(
            f"http://u:{laws.HIDDEN}@gw",
            f"http://u:{laws.HIDDEN},p@gw",
            f"ftp://u:{laws.HIDDEN}@gw",
        ),
        *(f"http://gw?{laws.HIDDEN}", f"http://gw/#{laws.HIDDEN},", [{"url": laws.HIDDEN}]),
    ],
    "enabled": [True, "off"],
    "session_id": ["header:X-Id", "json:a.b", "json:a..b", "call:no.such:x", "query:"],
    "ignore_ids": ["default", [7, "-"], " , "],
    "paths": ["/generate", ["/a,b"], "/a/..", "/.", "/\n", "/\udc80", "/%2e%2e", "/\t//x", "/%zz"],
    "header": ["X-Pin", "host", "x\n", "Ä"],
    "key": ["digest", "session_id", laws.HIDDEN],
    "secret": [laws.HIDDEN, ""],
    "prefix": ["job-7/", "a b", "~" * 53, {"secret": laws.HIDDEN}],
    "on_missing": ["warn", "raise"],
    "client_session": ["all", ["a", "b"]],
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
@example({"gateway": "http://gw", "paths": "/a/.."}, True)
@example({"gateway": "http://gw", "paths": "/\t//x"}, True)
@example({"gateway": "http://gw", "paths": "/\udc80"}, True)
@example({"gateway": f"http://gw/{laws.HIDDEN}@gw"}, False)
@example({"gateway": f"http://u@{laws.HIDDEN}/@gw"}, False)
@example({"gateway": f"http://u:{laws.HIDDEN}@gw"}, False)
def test_any_mapping_gives_a_config_or_a_config_error(mapping: Any, with_gateway: bool) -> None:
    if with_gateway:
        mapping = {"gateway": "http://gw", **mapping}
    laws.config(mapping)
