import subprocess
import sys
from typing import Any
from uuid import UUID

import pytest

from aiohttp_smg_routing import routing_key
from aiohttp_smg_routing.gateway import VALID_KEY
from aiohttp_smg_routing.key import as_session_id

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
    # A client that chooses its id must not reach the session whose digest it has seen.
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
    printed = {
        subprocess.run(  # noqa: S603
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
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
    # --routing-key-override cuts `_t<digits>` and `_r<digits>` off a key.
    assert "_" not in routing_key("a b") + routing_key("a", key="digest", secret="k")


class Index:
    """What numpy's and torch's integers are to Python."""

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


@pytest.mark.parametrize("blank", ["", " ", "\t\n", "\u00a0"])
def test_empty_and_blank_ids_count_as_none(blank: str) -> None:
    assert as_session_id(blank) is None
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
    with pytest.raises(ValueError, match="is not a text of up to 52 visible ASCII characters"):
        routing_key("s-1", prefix=prefix)
