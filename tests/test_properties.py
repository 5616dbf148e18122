"""The laws of the key and of the config, for whatever input."""

from dataclasses import fields
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from yarl import URL

from aiohttp_smg_routing import ConfigError, RoutingConfig, routing_key
from aiohttp_smg_routing.key import LONGEST_PREFIX

from .laws import ANY_TEXT, LAW, VISIBLE

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


@settings(LAW, max_examples=2000)
@given(IDS, FORMS)
def test_a_key_is_1_to_128_bytes_of_visible_ascii_that_begin_with_the_prefix(
    session_id: str, form: Any
) -> None:
    key = routing_key(session_id, **form)
    assert 1 <= len(key.encode()) <= 128
    assert all("!" <= character <= "~" for character in key)
    assert key.startswith(form["prefix"])
    assert routing_key(session_id, **form) == key


@settings(LAW, max_examples=1000)
@given(IDS, IDS, FORMS)
@example("\udc80", "\udc81", {"prefix": ""})
@example("\ud800\udc00", "\U00010000", {"prefix": ""})
@example("s\u0301", "ś", {"prefix": ""})
def test_equal_ids_have_equal_keys_and_different_ids_different_ones(
    one: str, other: str, form: Any
) -> None:
    keys = routing_key(one, **form), routing_key(other, **form)
    assert (keys[0] == keys[1]) == (one == other)
    # Of all ids the key itself, as a client may have read it, is the nearest to a second one.
    key = keys[0].removeprefix(form["prefix"])
    if key != one:
        assert routing_key(key, **form) != keys[0]


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
    ],
    "enabled": [True, "off"],
    "session_id": ["header:X-Id", "json:a.b", "json:a..b", "call:no.such:x", "query:"],
    "ignore_ids": ["default", [7, "-"], " , "],
    "paths": ["/generate", ["/a,b"], "/a/..", "/.", "/\n", "/\udc80", "/%2e%2e", "/\t//x", "/%zz"],
    "header": ["X-Pin", "host", "x\n", "Ä"],
    "key": ["digest", "session_id"],
    "secret": ["k", ""],
    "prefix": ["job-7/", "a b", "~" * 53],
    "on_missing": ["warn", "raise"],
    "client_session": ["all", ["a", "b"]],
    "track_sessions": [0, "10", "9" * 18, 10**5000, -(10**5000)],
    "on_move": ["call:builtins:print", "call:..:x", "call:"],
    "metrics": ["prometheus"],
    "metrics_registry": ["prometheus_client:REGISTRY", "os:environ", ":"],
    "hide_worker_ids": ["yes", 1],
}
MAPPINGS = st.fixed_dictionaries(
    {},
    optional={name: st.sampled_from(nearly) | JSON for name, nearly in NEARLY.items()},
) | st.dictionaries(ANY_TEXT, JSON, max_size=3)


@settings(LAW, max_examples=500)
@given(MAPPINGS, st.booleans())
@example({"gateway": "http://gw", "paths": "/a/.."}, True)
@example({"gateway": "http://gw", "paths": "/\t//x"}, True)
@example({"gateway": "http://gw", "paths": "/\udc80"}, True)
def test_any_mapping_gives_a_config_or_a_config_error(mapping: Any, with_gateway: bool) -> None:
    if with_gateway:
        mapping = {"gateway": "http://gw", **mapping}
    try:
        config = RoutingConfig.from_mapping(mapping)
    except ConfigError as error:
        if not error.faults:
            raise AssertionError("it names no fault") from error
        return
    rebuilt = RoutingConfig(
        **{field.name: getattr(config, field.name) for field in fields(config) if field.init}
    )
    assert rebuilt == config == RoutingConfig.from_mapping(mapping)
    assert hash(rebuilt) == hash(config)
    assert not any(config.tags("POST", URL(f"http://gw{path}")) for path in ("", "/"))
