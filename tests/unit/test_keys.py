from typing import Any
from uuid import UUID

import pytest

from aiohttp_smg_routing import Routing, RoutingConfig, current_session_id, routing_key
from aiohttp_smg_routing import routing_session as block
from aiohttp_smg_routing.gateway import VALID_KEY
from aiohttp_smg_routing.keys import as_session_id
from fuzz.laws import CHAT_URL, ROUTING_HEADERS, Shared, sent

from ..fresh import python

VISIBLE_ASCII = "".join(map(chr, range(0x21, 0x7F)))


@pytest.mark.parametrize("session_id", ["s", "task_t1", VISIBLE_ASCII, "x" * 128])
def test_visible_ascii_up_to_128_bytes_is_its_own_key(session_id: str) -> None:
    assert routing_key(session_id) == session_id


@pytest.mark.parametrize(
    "session_id",
    [
        "x" * 129,
        "x" * 1_000_000,
        "a b",
        " a",
        "a\r\nX-Evil: 1",
        "\0",
        "\x7f",
        "é",
        "会話",
        "\udc80",
    ],
)
def test_any_other_id_has_a_digest_that_the_gateway_takes(session_id: str) -> None:
    key = routing_key(session_id)
    assert VALID_KEY.fullmatch(key)
    assert key.startswith("sha256-")
    assert routing_key(session_id) == key
    assert routing_key(session_id + "'") != key


@pytest.mark.parametrize("prefix", ["", "job-7/"])
@pytest.mark.parametrize("secret", [None, "k"])
def test_an_id_that_looks_like_a_digest_is_not_the_key_of_another_session(
    prefix: str, secret: str | None
) -> None:
    # A client that has seen the digest of a session must not get its key by using it as an id.
    key = routing_key("a b", secret=secret, prefix=prefix)
    copied = key.removeprefix(prefix)
    assert routing_key(copied, secret=secret, prefix=prefix) not in (key, prefix + copied)
    for near in (copied[:-1], copied + "0", copied.upper()):
        assert routing_key(near, secret=secret, prefix=prefix) == prefix + near


def test_digest_is_the_sha256_of_the_utf8_text() -> None:
    # printf 'task 7' | sha256sum
    assert routing_key("task 7") == (
        "sha256-a39087ee83d1f77b594dbe891c42977bea07d7415ae86119155aa1abec86aee1"
    )


def test_key_is_the_same_in_every_process() -> None:
    code = "import aiohttp_smg_routing as r; print(r.routing_key('Ω 1', key='digest', secret='k'))"
    printed = {python(code, env={"PYTHONHASHSEED": seed}).strip() for seed in ("1", "2")}
    assert printed == {routing_key("Ω 1", key="digest", secret="k")}


def test_digest_never_shows_the_id_and_depends_on_the_secret() -> None:
    keys = [
        routing_key("sk-12345", key="digest"),
        routing_key("sk-12345", key="digest", secret="one"),
        routing_key("sk-12345", key="digest", secret="two"),
        routing_key("sk-12346", key="digest", secret="two"),
    ]
    assert len(set(keys)) == 4
    assert all(VALID_KEY.fullmatch(key) and "sk-1234" not in key for key in keys)


def test_any_text_can_be_the_secret() -> None:
    keys = {routing_key("s", key="digest", secret=secret) for secret in ("é", "\udc80", "\udc81")}
    assert len(keys) == 3


def test_digest_loses_nothing_to_the_gateways_turn_suffix_rule() -> None:
    # --routing-key-override strips the suffixes `_t<digits>` and `_r<digits>` from a key.
    assert "_" not in routing_key("a b") + routing_key("a", key="digest", secret="k")


class Index:
    """An integer-like object, as numpy and torch have them."""

    def __index__(self) -> int:
        return 17


@pytest.mark.parametrize(
    ("session_id", "key"),
    [
        (17, "17"),
        (0, "0"),
        (-5, "-5"),
        (Index(), "17"),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
    ],
)
def test_integers_and_uuids_count_as_ids(session_id: int | UUID | Index, key: str) -> None:
    assert routing_key(session_id) == key


@pytest.mark.parametrize("blank", [None, "", " ", "\t\n", "\u00a0"])
def test_empty_and_blank_ids_count_as_none(blank: Any) -> None:
    assert as_session_id(blank) is None
    with block(blank):
        assert current_session_id() is None
    with pytest.raises(ValueError, match="empty or blank"):
        routing_key(blank)


@pytest.mark.parametrize("value", [True, 1.5, b"s", ["s"], object()])
def test_anything_else_is_no_session_id(value: object) -> None:
    with pytest.raises(TypeError, match="a str, an int or a UUID, not a"):
        as_session_id(value)


def test_a_text_with_a_type_of_its_own_gives_its_plain_text() -> None:
    from enum import Enum

    class Task(str, Enum):
        SEVEN = "task-7"

    assert routing_key(Task.SEVEN) == "task-7"
    assert type(as_session_id(Task.SEVEN)) is str


@pytest.mark.parametrize("session_id", ["s-1", "a b", "é", "x" * 128])
@pytest.mark.parametrize("key", ["session_id", "digest"])
@pytest.mark.parametrize("secret", ["k", None])
@pytest.mark.parametrize("prefix", ["job-7/", "~" * 52])
def test_a_prefix_begins_the_key_and_keeps_it_one_that_the_gateway_takes(
    session_id: str, key: Any, secret: str | None, prefix: str
) -> None:
    with_prefix = routing_key(session_id, key=key, secret=secret, prefix=prefix)
    assert with_prefix.startswith(prefix)
    assert VALID_KEY.fullmatch(with_prefix)
    assert with_prefix != routing_key(session_id, key=key, secret=secret)
    other = f"#{prefix[1:]}"
    assert with_prefix != routing_key(session_id, key=key, secret=secret, prefix=other)


@pytest.mark.parametrize("prefix", [" ", "a b", "é", "a\n", "~" * 53, 7, None])
def test_a_prefix_that_no_key_can_begin_with_is_refused(prefix: Any) -> None:
    with pytest.raises(ValueError, match="is not a string of up to 52 visible ASCII characters"):
        routing_key("s-1", prefix=prefix)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"key": "sha256"}, "key is 'session_id' or 'digest', not 'sha256'"),
        ({"key": "digest", "secret": ""}, "secret is not a string of one character or more"),
        ({"key": "digest", "secret": b"k"}, "secret is not a string of one character or more"),
    ],
)
def test_a_form_that_no_config_could_have_is_refused(wrong: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        routing_key("s-1", **wrong)


MODEL = "{session_id}/{json:model}"


def shared_key(pin_by: str, session_id: str, form: Any = (), **found: Any) -> str:
    """Return the key on a call; ``model="x"`` means that ``json:model`` found "x"."""
    parts = {f"json:{name}": value for name, value in found.items()}
    return Shared(pin_by, session_id, parts).key(dict(form))


def test_what_shares_a_worker_is_a_digest_of_the_template_and_of_parts_with_their_lengths() -> None:
    # printf '\xff25:{session_id}/{json:model}3:s-15:Qwen3' | sha256sum
    assert shared_key(MODEL, "s-1", model="Qwen3") == (
        "sha256-7e79048bf4a772c7252ec5bb5f084389a7171f26efda57fe85880e8a9d6138ad"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((MODEL, "a", "x"), (MODEL, "a/x", "")),
        ((MODEL, "a", "x"), (MODEL, "a", "y")),
        ((MODEL, "a", "x"), (MODEL, "b", "x")),
        ((MODEL, "a", "b/c"), (MODEL, "a/b", "c")),
        ((MODEL, "a", "1:x"), (MODEL, "a1:", "x")),
        ((MODEL, "a", "x"), ("{json:model}/{session_id}", "x", "a")),
        ((MODEL, "a", "x"), ("{session_id}:{json:model}", "a", "x")),
        ((MODEL, "é", "x"), (MODEL, "e\u0301", "x")),
        ((MODEL, "\udc80", "x"), (MODEL, "\udc81", "x")),
        (("{json:model}", "a", "x"), ("{json:model} ", "a", "x")),
        (("{json:model}{session_id}", "bc", "a"), ("{json:model}{session_id}", "c", "ab")),
        (("{session_id}", "a/x", ""), (MODEL, "a", "x")),
    ],
)
def test_no_two_combinations_share_a_key(one: Any, other: Any) -> None:
    keys = [
        shared_key(pin_by, sid or " ", model=found) for pin_by, sid, found in (one, other) if sid
    ]
    assert len({*keys}) == len(keys)


@pytest.mark.parametrize("form", [{}, {"key": "digest"}, {"prefix": "job-7/"}, {"secret": "k"}])
def test_no_combination_has_the_key_of_an_id(form: dict[str, Any]) -> None:
    key = shared_key(MODEL, "a", form, model="x")
    prefix = form.get("prefix", "")
    for near in ("a/x", "a", "x", MODEL, "{a}/{x}", key, key.removeprefix(prefix), "a\0x", "ÿ"):
        assert shared_key("{session_id}", near, {"key": "digest", **form}) != key
        assert routing_key(near, **form) != key


def test_sessions_of_one_group_share_a_key_whatever_their_ids_are() -> None:
    keys = {shared_key("{json:group}", session_id, group="prompt-7") for session_id in "abc"}
    assert len(keys) == 1


@pytest.mark.parametrize("found", [{}, {"model": None}, {"model": ""}, {"model": " "}, {"m": "x"}])
@pytest.mark.parametrize("pin_by", [MODEL, "{json:model}", "{json:m2}{json:model}"])
def test_a_part_that_finds_nothing_leaves_the_session_id_alone_to_pin(
    found: dict[str, Any], pin_by: str
) -> None:
    assert shared_key(pin_by, "s-1", **found) == "s-1"
    assert shared_key(pin_by, "s 1", {"prefix": "job-7/"}, **found) == routing_key(
        "s 1", prefix="job-7/"
    )


@pytest.mark.parametrize("value", [17, UUID(int=17), Index()])
def test_a_part_may_be_whatever_an_id_may_be(value: Any) -> None:
    assert shared_key(MODEL, "s-1", model=value) == shared_key(
        MODEL, "s-1", model=routing_key(value)
    )
    with pytest.raises(TypeError, match="a str, an int or a UUID, not a list"):
        block("s-1", {"json:model": ["x"]})  # type: ignore[dict-item]


def test_parts_are_those_that_were_given_though_their_mapping_changes() -> None:
    routing, parts = (
        Routing(RoutingConfig(CHAT_URL.origin(), pin_by="{json:model}")),
        {"json:model": "x"},
    )
    url = CHAT_URL.with_path("/v1/chat/completions")
    with block("s-1", parts):
        keys = {sent(routing, "POST", url)[ROUTING_HEADERS[0]]}
        parts["json:model"] = "y"
        keys.add(sent(routing, "POST", url)[ROUTING_HEADERS[0]])
    assert len(keys) == 1


def test_with_a_secret_what_shares_a_worker_is_an_hmac() -> None:
    keys = [shared_key(MODEL, "s-1", {"secret": secret}, model="x") for secret in ("k", "l")]
    assert all(key.startswith("hmac-sha256-") for key in keys)
    assert len({*keys, shared_key(MODEL, "s-1", model="x")}) == 3
    # A pin_by of the id alone shows the id, unless key = "digest".
    assert shared_key(MODEL, "s-1", {"secret": "k"}) == "s-1"
    alone = shared_key(MODEL, "s-1", {"secret": "k", "key": "digest"})
    assert alone == routing_key("s-1", key="digest", secret="k")


@pytest.mark.parametrize("prefix", ["", "job-7/", "~" * 52])
@pytest.mark.parametrize("secret", [None, "k"])
@pytest.mark.parametrize("part", ["x", "x" * 1_000_000, "a\r\nX-Evil: 1", "会話", "\udc80"])
def test_what_shares_a_worker_has_a_key_that_the_gateway_takes(
    prefix: str, secret: str | None, part: str
) -> None:
    key = shared_key(MODEL, part, {"prefix": prefix, "secret": secret}, model=part)
    assert VALID_KEY.fullmatch(key)
    assert key.startswith(f"{prefix}{'hmac-' if secret else ''}sha256-")
