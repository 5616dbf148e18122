"""SMG treats keys as ``docs/gateways.md`` says. The calls have keys by hand, without the plugin."""

import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

import pytest
from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing.testing import Answer, Call, SmgGateway, StartSmgGateway, canned, failure
from harness.agents import CHAT, chat
from harness.processes import ROOT, finished

from ..smg import SMG, answer_when_all_are_there
from ..turns import answered, forget, served, turns_of
from ..waiting import until

KEY = "X-SMG-Routing-Key"
NAMES = [f"s-{number}" for number in range(16)]
Headers = Sequence[tuple[str, str]]


async def play(smg: SmgGateway, calls: Iterable[tuple[str, Headers]]) -> dict[str, set[URL]]:
    """Make calls, each with a name and headers; return the workers that served each name."""
    forget(*smg.workers)
    async with ClientSession(raise_for_status=True) as session:
        for name, headers in calls:
            url = smg.url / CHAT
            async with session.post(url, json=chat(name), headers=headers) as response:
                await response.read()
    return {name: set(workers) for name, workers in served(*smg.workers).items()}


def four_turns(headers: Headers) -> Iterable[tuple[str, Headers]]:
    """Return four calls for each name; fill in ``{name}`` and ``{turn}`` in the headers."""
    for turn, name in itertools.product(range(4), NAMES):
        yield name, [(header, value.format(name=name, turn=turn)) for header, value in headers]


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
@pytest.mark.parametrize("key", [b"caf\xe9", b"", b"   ", b"a\x01b", b"a\x7fb"])
async def test_keys_that_are_no_text(smg_gateway: StartSmgGateway, policy: str, key: bytes) -> None:
    smg = await smg_gateway(2, policy=policy)
    body = b'{"model":"stub","messages":[{"role":"user","content":"hello"}]}'
    reader, writer = await asyncio.open_connection(smg.url.host, smg.url.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n"
        b"X-SMG-Routing-Key: %s\r\n\r\n%s" % (len(body), key, body)
    )
    answered = await reader.read()
    writer.close()
    await writer.wait_closed()
    is_control = b"\x01" in key or b"\x7f" in key
    assert answered.startswith(b"HTTP/1.1 400 " if is_control else b"HTTP/1.1 200 ")
    dropped = {"manual": "no_routing_id", "consistent_hashing": "random_fallback"}[policy]
    assert +await smg.branches() == ({} if is_control else {dropped: 1})


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
async def test_of_two_headers_the_first_one_counts(
    smg_gateway: StartSmgGateway, policy: str
) -> None:
    smg = await smg_gateway(3, policy=policy)
    found = await play(smg, four_turns([(KEY, "{name}"), (KEY, "{turn}")]))
    assert {len(urls) for urls in found.values()} == {1}
    found = await play(smg, four_turns([(KEY, ""), (KEY, "{name}")]))
    assert {len(urls) for urls in found.values()} != {1}


@pytest.mark.parametrize("tail", ["_t{turn}", "_r{turn}"])
async def test_tail_of_a_turn_is_cut_off_under_the_override_alone(
    smg_gateway: StartSmgGateway, tail: str
) -> None:
    headers = [(KEY, "{name}" + tail)]
    overridden = await smg_gateway(3, policy="round_robin", args=["--routing-key-override"])
    found = await play(overridden, four_turns(headers))
    is_cut = SMG >= (1, 10)
    assert ({len(urls) for urls in found.values()} == {1}) is is_cut
    assert (await overridden.branches())["vacant"] == len(NAMES) * (1 if is_cut else 4)
    for policy in ("manual", "consistent_hashing"):
        found = await play(await smg_gateway(3, policy=policy), four_turns(headers))
        assert {len(urls) for urls in found.values()} != {1}


@pytest.mark.parametrize(
    ("header", "hashed_up_to"),
    [("Authorization", (1, 12)), ("X-Forwarded-For", SMG), ("Cookie", SMG), ("X-Request-ID", ())],
)
async def test_consistent_hashing_hashes_other_headers_where_there_is_no_key(
    smg_gateway: StartSmgGateway, header: str, hashed_up_to: tuple[int, ...]
) -> None:
    smg = await smg_gateway(3, policy="consistent_hashing")
    found = await play(smg, four_turns([(header, "one=forall")]))
    is_hashed = hashed_up_to >= SMG
    assert (len(set.union(*found.values())) == 1) is is_hashed
    hashed = "implicit_key_hit" if SMG >= (1, 13) else "routing_key_hit"
    assert +await smg.branches() == {hashed if is_hashed else "random_fallback": 4 * len(NAMES)}


async def test_min_group_evens_out_the_sessions_that_open_at_once(
    smg_gateway: StartSmgGateway,
) -> None:
    smg = await smg_gateway(3, policy="manual", args=["--assignment-mode", "min_group"])
    names = [f"s-{number}" for number in range(30)]
    answer_when_all_are_there(smg.workers, len(names))
    await asyncio.gather(*(play_one(smg, name) for name in names))
    counts = [len(turns_of(worker)) for worker in smg.workers]
    assert sum(counts) == len(names)
    assert max(counts) - min(counts) <= 2  # two threads may see the same counts


async def test_min_group_does_not_count_the_sessions_that_are_idle(
    smg_gateway: StartSmgGateway,
) -> None:
    smg = await smg_gateway(10, policy="manual", args=["--assignment-mode", "min_group"])
    found = await play(smg, [(f"s-{number}", [(KEY, f"s-{number}")]) for number in range(100)])
    counts = Counter(url for urls in found.values() for url in urls)
    assert max(counts.values()) - min(counts[worker.url] for worker in smg.workers) > 1


NO_DELEGATE = pytest.mark.skipif(SMG < (1, 10), reason="SMG has delegate from 1.10 on")


@pytest.mark.parametrize(
    ("mode", "counts_calls"),
    [("min_load", True), pytest.param("delegate", True, marks=NO_DELEGATE), ("min_group", False)],
)
async def test_new_sessions_go_where_the_fewest_calls_or_keys_are(
    smg_gateway: StartSmgGateway, mode: str, counts_calls: bool
) -> None:
    smg = await smg_gateway(3, policy="manual", args=["--assignment-mode", mode])
    names = ["busy"] * 9 + [f"s-{number}" for number in range(12)]
    answer_when_all_are_there(smg.workers, len(names))
    calls = []
    for name in names:
        calls.append(asyncio.create_task(play_one(smg, name)))
        # The next call finds all calls before it in flight.
        await until(lambda: len(turns_of(*smg.workers)) == len(calls))
    await asyncio.gather(*calls)
    found = served(*smg.workers)
    [busy] = found["busy"]
    new = Counter(url for name, urls in found.items() if name != "busy" for url in urls)
    assert new.total() == 12
    if counts_calls:
        assert sorted(new[worker.url] for worker in smg.workers) == [0, 6, 6]
    assert (busy in new) is not counts_calls


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
@pytest.mark.parametrize("status", [408, 429, 500, 503])
@pytest.mark.parametrize("args", [(), ("--disable-retries",)])
async def test_one_call_that_a_worker_refuses_is_tried_again_elsewhere_by_smg_1_13(
    smg_gateway: StartSmgGateway, policy: str, status: int, args: Sequence[str]
) -> None:
    smg = await smg_gateway(3, policy=policy, args=args)
    await play_one(smg, "s-1")
    [own] = [worker for worker in smg.workers if turns_of(worker)]
    own.answer = refuses_once(status)
    async with (
        ClientSession() as session,
        session.post(smg.url / CHAT, json=chat("s-1"), headers={KEY: "s-1"}) as response,
    ):
        assert response.status == (status if args else 200)
    for _ in range(3):
        await play_one(smg, "s-1")
    elsewhere = sum(len(turns_of(worker)) for worker in smg.workers if worker is not own)
    assert elsewhere == (SMG >= (1, 13) and not args)


def refuses_once(status: int) -> Callable[[Call], Answer]:
    """Return answers of which the first to a turn is an error with this status."""
    refused: list[Call] = []

    def answer(call: Call) -> Answer:
        if call.method == "POST" and not refused:
            refused.append(call)
            return failure(status)
        return canned(call)

    return answer


async def play_one(smg: SmgGateway, name: str) -> None:
    async with ClientSession() as session:
        await answered(session, smg.url / CHAT, json=chat(name), headers={KEY: name})


def test_a_pin_is_forgotten_after_four_hours_without_a_call() -> None:
    """The test reads the program's help instead of waiting."""
    argv = (sys.executable, "-m", "smg", "launch", "--help")
    told = finished(ROOT, *argv, check=True).stdout
    option = told.partition("\n  --max-idle-secs")[2].partition("\n  --")[0]
    assert "(default: 14400)" in option


async def test_the_answer_for_a_worker_that_hangs_up_has_its_address(
    smg_gateway: StartSmgGateway,
) -> None:
    """SECURITY.md warns of this: ``hide_worker_ids`` removes the header only."""

    async def hang_up() -> AsyncGenerator[bytes, None]:
        yield b"HTTP/1.1 "
        raise ConnectionResetError

    smg = await smg_gateway(1, policy="manual", args=("--disable-retries",))
    [worker] = smg.workers
    worker.answer = lambda call: hang_up() if call.method == "POST" else canned(call)
    async with (
        ClientSession() as session,
        session.post(smg.url / CHAT, json=chat("s")) as response,
    ):
        assert response.status >= 500
        assert str(worker.url.origin()) in await response.text()
