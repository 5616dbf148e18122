"""``verify --through`` on the real gateway never calls a server pinned that isn't."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from uuid import uuid4

import pytest
from aiohttp import web

from harness.servers import serve, session_server

from ..commands import gateway, verify
from ..verify_servers import in_background, proxy

NAME = "x-smg-routed-worker-id"
HIDDEN = frozenset({NAME})

Key = Callable[[web.Request], str]


def session_of(request: web.Request) -> str:
    return request.path.split("/")[2]


def changing() -> Key:
    """Return a function that gives each turn a new key."""
    return lambda request: f"request-{uuid4()}"


def rotating() -> Key:
    """Return a function that rotates through 24 keys, regardless of the session."""
    numbers = count()
    return lambda request: f"slot-{next(numbers) % 24}"


def one_for_all() -> Key:
    return lambda request: "server-1"


def own() -> Key:
    return session_of


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
@pytest.mark.parametrize(
    ("key", "named", "hidden"),
    [(changing, 1, None), (rotating, 1, 2), (one_for_all, 2, 2), (own, 0, 2)],
    ids=["changing", "rotating", "one for all", "own"],
)
def test_counters_never_say_whose_key_it_was(
    tmp_path: Path, policy: str, key: Callable[[], Key], named: int, hidden: int | None
) -> None:
    with (
        in_background(gateway(policy)) as smg,
        in_background(serve(proxy(smg.url, key=key()))) as shows,
        in_background(serve(proxy(smg.url, key=key(), drop=HIDDEN))) as hides,
    ):
        options = ("--metrics", smg.metrics_url, "--through")
        seen = verify(tmp_path, smg.url, *options, shows)
        blind = verify(tmp_path, smg.url, *options, hides)
    assert seen.status == named, seen.out
    # A new key for each turn shows under manual, which pins each of them.
    expected = hidden or (1 if policy == "manual" else 2)
    assert blind.status == expected, blind.out
    assert "stayed" not in blind.out
    assert blind.json["arms"]["keyed"]["kept"] is None
    if key is changing and policy == "manual":
        assert "key_changes" in seen.causes
        assert "key_changes" in blind.causes
    if expected == 2:
        assert "whose_key" in blind.causes


@pytest.mark.parametrize("policy", ["cache_aware", "manual"])
def test_server_that_calls_another_gateway_is_not_pinned(tmp_path: Path, policy: str) -> None:
    with (
        in_background(gateway("manual")) as smg,
        in_background(gateway(policy)) as other,
        in_background(session_server(smg.url, calls=other.url)) as through,
    ):
        run = verify(tmp_path, smg.url, "--metrics", smg.metrics_url, "--through", through.url)
    assert (run.status, run.causes) == (1, ["key_lost"]), run.out
    assert "no call of the session server reached this gateway" in run.said
    assert "another host" in run.said


def test_metrics_of_another_gateway_are_no_proof_that_no_call_came(tmp_path: Path) -> None:
    with (
        in_background(gateway("manual")) as smg,
        in_background(gateway("manual")) as other,
        in_background(session_server(smg.url)) as through,
    ):
        run = verify(tmp_path, smg.url, "--metrics", other.metrics_url, "--through", through.url)
    assert (run.status, run.causes) == (2, ["other_gateway", "keys_unseen"]), run.out


def test_session_id_in_the_prompt_is_not_the_key_at_work(tmp_path: Path) -> None:
    """cache_aware follows the prompt, so it keeps sessions whose prompts have the id."""

    def prompted(body: bytes, request: web.Request) -> bytes:
        said = json.loads(body)
        first = {"role": "user", "content": 50 * f"session {session_of(request)} "}
        return json.dumps({**said, "messages": [first, *said["messages"]]}).encode()

    with (
        in_background(gateway("cache_aware")) as smg,
        in_background(serve(proxy(smg.url, key=lambda request: "", body=prompted))) as through,
    ):
        run = verify(tmp_path, smg.url, "--metrics", smg.metrics_url, "--through", through)
        blind = verify(tmp_path, smg.url, "--metrics", through, "--through", through)
    assert (run.status, run.causes) == (1, ["policy"]), run.out
    assert blind.status == 2, blind.out


def test_counters_name_the_worker_where_one_call_is_made_at_a_time(tmp_path: Path) -> None:
    load = ("--concurrency", "1", "--sessions", "8", "--turns", "4")
    with (
        in_background(gateway("manual")) as smg,
        in_background(serve(proxy(smg.url, key=session_of, drop=HIDDEN))) as hides,
        in_background(serve(proxy(smg.url, key=rotating(), drop=HIDDEN))) as rotates,
    ):
        options = (*load, "--metrics", str(smg.metrics_url), "--through")
        run = verify(tmp_path, smg.url, *options, hides)
        other = verify(tmp_path, smg.url, *options, rotates)
    assert run.status == 0, run.out
    assert run.json["arms"]["keyed"]["kept"] == 24
    assert other.status == 1, other.out
