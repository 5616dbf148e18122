"""``verify --through`` on the real gateway never calls a server pinned that isn't."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from uuid import uuid4

import pytest
from aiohttp import web

from aiohttp_smg_routing.testing import SmgGateway
from harness.servers import serve, session_server

from ..commands import LOAD, Run, gateway, verify
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


@pytest.fixture(scope="module")
def hashing() -> Iterator[SmgGateway]:
    with in_background(gateway("consistent_hashing")) as smg:
        yield smg


@pytest.mark.parametrize("policy", ["manual", "hashing"])
@pytest.mark.parametrize(
    ("key", "named", "hidden"),
    [(changing, 1, None), (rotating, 1, 2), (one_for_all, 2, 2), (own, 0, 2)],
    ids=["changing", "rotating", "one for all", "own"],
)
def test_counters_never_say_whose_key_it_was(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    policy: str,
    key: Callable[[], Key],
    named: int,
    hidden: int | None,
) -> None:
    smg: SmgGateway = request.getfixturevalue(policy)
    with (
        in_background(serve(proxy(smg.url, key=key()))) as shows,
        in_background(serve(proxy(smg.url, key=key(), drop=HIDDEN))) as hides,
    ):
        options = (*LOAD, "--metrics", smg.metrics_url, "--through")
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
def test_server_that_calls_another_gateway_is_not_pinned(
    tmp_path: Path, manual: SmgGateway, policy: str
) -> None:
    with (
        in_background(gateway(policy)) as other,
        in_background(session_server(manual.url, calls=other.url)) as through,
    ):
        options = (*LOAD, "--metrics", manual.metrics_url, "--through", through.url)
        run = verify(tmp_path, manual.url, *options)
    assert (run.status, run.causes) == (1, ["key_lost"]), run.out
    assert "no call of the session server reached this gateway" in run.said
    assert "another host" in run.said


def test_server_whose_calls_a_replica_pins_is_not_said_to_move(
    tmp_path: Path, hashing: SmgGateway
) -> None:
    with in_background(gateway("consistent_hashing")) as replica:
        run = verify_apart(tmp_path, hashing, calls=replica, metrics=hashing)
    assert (run.status, run.causes) == (2, ["other_gateway", "keys_unseen"]), run.out


def test_metrics_of_another_gateway_are_no_proof_that_no_call_came(
    tmp_path: Path, manual: SmgGateway
) -> None:
    with in_background(gateway("manual")) as other:
        run = verify_apart(tmp_path, manual, calls=manual, metrics=other)
    assert (run.status, run.causes) == (2, ["other_gateway", "keys_unseen"]), run.out


def verify_apart(folder: Path, smg: SmgGateway, *, calls: SmgGateway, metrics: SmgGateway) -> Run:
    """Verify a gateway through a session server that calls one, with the metrics of another."""
    with in_background(session_server(calls.url)) as through:
        options = (*LOAD, "--metrics", metrics.metrics_url, "--through", through.url)
        return verify(folder, smg.url, *options)


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
        run = verify(tmp_path, smg.url, *LOAD, "--metrics", smg.metrics_url, "--through", through)
        blind = verify(tmp_path, smg.url, *LOAD, "--metrics", through, "--through", through)
    assert (run.status, run.causes) == (1, ["policy"]), run.out
    assert blind.status == 2, blind.out


def test_counters_name_the_worker_where_one_call_is_made_at_a_time(
    tmp_path: Path, manual: SmgGateway
) -> None:
    with (
        in_background(serve(proxy(manual.url, key=session_of, drop=HIDDEN))) as hides,
        in_background(serve(proxy(manual.url, key=rotating(), drop=HIDDEN))) as rotates,
    ):
        options = ("--metrics", manual.metrics_url, "--concurrency", "1", "--turns", "4")
        # 36 later turns, because the key at work must be more than chance; 15 show that some move.
        run = verify(tmp_path, manual.url, *options, "--sessions", "12", "--through", hides)
        other = verify(tmp_path, manual.url, *options, "--sessions", "5", "--through", rotates)
    assert run.status == 0, run.out
    assert run.json["arms"]["keyed"]["kept"] == 36
    assert other.status == 1, other.out
