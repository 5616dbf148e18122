"""The player of recorded sessions: each of its parts, and a whole run."""

import asyncio
import json
import lzma
import os
import re
import signal
import socket
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from aiohttp_smg_routing.testing import free_ports
from benchmarks.trace.arms import CACHE_AWARE, GROUPED, MAIN, PINNED, RANDOM, arms, times
from benchmarks.trace.cache import BLOCK, PrefixCache, chain, tokens_in
from benchmarks.trace.check import Row, verdict
from benchmarks.trace.command import main
from benchmarks.trace.engine import Engine, Job, Speed, TooLongError
from benchmarks.trace.grow import grow, sample
from benchmarks.trace.limit import shared_cache
from benchmarks.trace.measure import (
    OF_LIMIT,
    Plan,
    Room,
    called,
    first_token,
    fullest,
    moves,
    notes,
    of_machine,
    set_limits,
)
from benchmarks.trace.play import Call, Played, Settings, chat, pause, play, reason
from benchmarks.trace.read import Session, TraceError, Turn, read
from benchmarks.trace.workers import model_workers
from harness.agents import CHAT
from harness.proc import HAS_PROC, processes_in
from harness.processes import running
from harness.workers import MODEL

from ..stopping import assert_stopped, until_it_says
from ..waiting import until

SECOND = 10**6


def write(file: Path, *lines: object) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


def call(session_id: str, at: float, prompt: str, output: str = "ok") -> dict[str, object]:
    return {
        "session_id": session_id,
        "timestamp": round(at * SECOND),
        "input": prompt,
        "output": output,
    }


def said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


# The reader


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.xz"])
def test_calls_become_sessions_with_the_recorded_gaps(name: str, tmp_path: Path) -> None:
    lines = [call("b", 8, "b1"), call("a", 5, "a2", ""), call("a", 3.5, "a1")]
    plain = write(tmp_path / "trace.jsonl", *lines)
    (tmp_path / "trace.jsonl.xz").write_bytes(lzma.compress(plain.read_bytes()))
    b, a = read(tmp_path / name)
    assert (b.id, b.group, b.turns) == ("b", "", (Turn("b1", "ok", None),))
    assert a.turns == (Turn("a1", "ok", None), Turn("a2", "", 1.5))


def test_each_message_of_the_assistant_is_a_call_with_all_before_it(tmp_path: Path) -> None:
    tools = [{"function": {"name": "look"}}]
    messages = [
        said("system", "be kind"),
        said("user", [{"type": "text", "text": "hi"}, {"type": "image_url"}]),
        said("assistant", None, tool_calls=tools),
        said("tool", "a door"),
        said("assistant", "it is a door"),
    ]
    line = {"session_id": "s", "group": "g", "messages": messages}
    [session] = read(write(tmp_path / "t.jsonl", line))
    first, second = session.turns
    assert (session.id, session.group, first.pause, second.pause) == ("s", "g", None, None)
    assert [word in first.prompt for word in ("be kind", "hi", "door")] == [True, True, False]
    assert json.loads(first.output) == tools
    assert second.prompt.startswith(first.prompt + first.output)
    assert second.prompt.index("a door") > len(first.prompt)
    assert second.output == "it is a door"


GOOD = call("a", 1, "prompt")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: it is not JSON"),
        ([], "line 2: it must be a JSON object, not list"),
        ({"session_id": "a"}, "line 2: neither a call, which has 'session_id', 'timestamp'"),
        ({**GOOD, "input": ""}, "line 2: 'input' must be a text, not empty"),
        ({**GOOD, "output": None}, "line 2: 'output' must be a text"),
        ({**GOOD, "session_id": 7}, "line 2: 'session_id' must be a text"),
        ({**GOOD, "timestamp": True}, "line 2: 'timestamp' must be a number of microseconds"),
        ({"session_id": "b", "messages": {}}, "line 2: 'messages' must be a list"),
        ({"session_id": "b", "messages": [said("user", 7)]}, "message 1: 'content' must be"),
        ({"session_id": "b", "messages": [{"content": "x"}]}, "message 1: 'role' must be"),
        (
            {"session_id": "b", "messages": [said("user", "x"), said("assistant", "y")]},
            "has both calls and transcripts",
        ),
    ],
)
def test_a_bad_line_is_named_with_what_would_be_right(
    line: object, complaint: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "t.jsonl", GOOD, line)
    if isinstance(line, str):
        file.write_text(json.dumps(GOOD) + "\n" + line, "utf-8")
    with pytest.raises(TraceError, match=r"t\.jsonl") as raised:
        read(file)
    assert complaint in str(raised.value)


def test_a_file_without_a_call_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    for name, content, complaint in (
        ("empty.jsonl", b"\n", "has no call"),
        ("latin.jsonl", b"\xff\n", "is not JSONL in UTF-8"),
        ("plain.jsonl.xz", b"{}\n", "is not xz-compressed JSONL"),
        ("cut.jsonl.xz", lzma.compress(b"\n" * 9999)[:-20], "is not xz-compressed JSONL"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TraceError, match=complaint):
            read(tmp_path / name)
    twice = {"session_id": "s", "messages": [said("user", "x"), said("assistant", "y")]}
    with pytest.raises(TraceError, match="'s' has a line already"):
        read(write(tmp_path / "twice.jsonl", twice, twice))


# Growth


def session(name: str, *prompts: str, group: str = "", output: str = "ok") -> Session:
    return Session(name, group, tuple(Turn(prompt, output) for prompt in prompts))


def test_copies_share_what_all_sessions_share_and_differ_from_there_on() -> None:
    recorded = [session("a", "system; task A", "system; task A, more"), session("b", "system; B")]
    grown = grow(recorded, 5)
    assert [each.id for each in grown] == ["a", "b", "a-copy-1", "b-copy-1", "a-copy-2"]
    assert grown[:2] == recorded
    copy, other, again = grown[2:]
    assert other.prompt(0) == "system; <copy-1>B"
    assert copy.prompt(0) == "system; <copy-1>task A"
    assert copy.prompt(1) == "system; <copy-1>task A, more"
    assert again.prompt(0) == "system; <copy-2>task A"
    assert copy.length == len(copy.prompt(1)) + len("ok")
    prompts = [each.prompt(number) for each in grown for number in range(len(each.turns))]
    assert len(set(prompts)) == len(prompts)


def test_the_samples_of_a_group_still_share_their_prompt_in_a_copy() -> None:
    recorded = [
        session("a1", "system; task A: one", group="A"),
        session("b1", "system; B", group="B"),
        session("a2", "system; task A: two", group="A"),
    ]
    *_, first, other, second = grow(recorded, 6)
    assert first.group == second.group == "A-copy-1"
    assert other.group == "B-copy-1"
    assert first.prompt(0) == "system; <copy-1>task A: one"
    assert second.prompt(0) == "system; <copy-1>task A: two"


def common(one: str, other: str) -> str:
    return os.path.commonprefix([one, other])  # noqa: RUF071


def test_samples_share_exactly_the_first_prompt() -> None:
    turns = ("system; task A", "system; task A; ok; door", "system; in short")
    recorded, second, third = sample([session("a", *turns)], 3)
    assert [recorded.prompt(number) for number in range(3)] == list(turns)
    assert [each.id for each in (recorded, second, third)] == ["a", "a-sample-1", "a-sample-2"]
    assert {each.group for each in (recorded, second, third)} == {"a"}
    for one, other in ((recorded, second), (second, third)):
        assert one.prompt(0) == other.prompt(0) == turns[0]
        assert common(one.output(0), other.output(0)) == ""
        assert common(one.prompt(1), other.prompt(1)) == turns[0]
    # A sample's next prompt repeats its output as recorded.
    assert second.output(0) == "1: ok"
    assert second.prompt(1) == second.prompt(0) + "1: ; ok; door"
    assert (second.output(1), second.prompt(2)) == ("ok", "system; 1: in short")
    assert second.length == len(second.prompt(1)) + len("ok")


def test_samples_of_a_copy_share_its_first_prompt_and_those_of_a_group_stay_in_it() -> None:
    sampled = sample([session("a", "x; A", "x; A, more"), session("b", "x; B", group="g")], 2)
    assert [each.group for each in sampled] == ["a", "a", "g", "g"]
    *_, first, second, third, _ = grow(sampled, 8)
    assert first.prompt(0) == second.prompt(0) == "x; <copy-1>A"
    assert second.prompt(1) == "x; <copy-1>A1: , more"
    assert (first.group, second.group, third.group) == ("a-copy-1", "a-copy-1", "g-copy-1")


def test_the_limit_computes_the_first_prompt_of_samples_once() -> None:
    prompt, output, more = "p" * 8 * BLOCK, "o" * 2 * BLOCK, "m" * 4 * BLOCK
    sessions = sample([session("a", prompt, prompt + output + more, output=output)], 2)
    settings = Settings(1, Speed(per_token=1))
    plan = Plan("t", sessions, [GROUPED], (1,), settings)
    calls = [
        answered(place, number, "w", begun=place + 2 * number)
        for place in range(2)
        for number in range(2)
    ]
    room = Room(1, 1600)
    set_limits(plan, room, Played(calls))
    lengths = [len(each.prompt(number)) for each in sessions for number in range(2)]
    # The second sample reuses the prompt except the block of its last token. Each later turn
    # reuses what its own session left.
    assert room.limit == pytest.approx((7 + 10 + 10) * BLOCK / sum(lengths))
    each_alone = sum(len(chain(each.prompt(1) + each.output(1), 1)) for each in sessions)
    assert room.distinct == BLOCK * each_alone - len(prompt)


def test_fewer_sessions_are_the_first_ones() -> None:
    recorded = [session(name, name) for name in "abc"]
    assert grow(recorded, 2) == recorded[:2]


# The cache


@dataclass
class SlowCache:
    """A plain model of ``PrefixCache``: whole texts, and when each was last used."""

    blocks: int
    used: dict[str, tuple[int, int]] = field(default_factory=dict)
    time: int = 0

    def take(self, text: str, size: int) -> int:
        """Run a single call; return how many of its blocks were cached."""
        prefixes = [text[:end] for end in range(size, len(text) + 1, size)]
        found = 0
        for prefix in prefixes:
            if prefix not in self.used:
                break
            found += 1
        self.time += 1
        for prefix in prefixes:
            # Among the blocks that one call used last, the end of its text goes first.
            self.used[prefix] = (self.time, -len(prefix))
        while len(self.used) > self.blocks:
            del self.used[min(self.used, key=lambda prefix: self.used[prefix])]
        return found


TEXTS = st.lists(
    st.lists(st.sampled_from(["aa", "bb", "cc"]), min_size=1, max_size=4).map("".join),
    min_size=1,
    max_size=30,
)


@given(texts=TEXTS, blocks=st.integers(4, 12))
@settings(max_examples=200, deadline=None)
def test_the_cache_displaces_as_the_plainest_lru_does(texts: list[str], blocks: int) -> None:
    fast, slow = PrefixCache(blocks), SlowCache(blocks)
    per_token = 2 / BLOCK  # a block is two characters
    for text in texts:
        names = chain(text, per_token)
        held = fast.begin(names, len(names))
        assert held is not None
        assert held.cached == slow.take(text, 2)
        fast.end(held, names)


@given(texts=TEXTS)
@settings(max_examples=100, deadline=None)
def test_the_limit_is_what_the_longest_common_prefix_with_any_call_before_gives(
    texts: list[str],
) -> None:
    per_token = 2 / BLOCK
    calls = [(chain(text + "!!", per_token), len(text), len(text) + 2) for text in texts]
    allowed = prompts = 0
    for place, text in enumerate(texts):
        before = [other + "!!" for other in texts[:place]]
        common = max((len(os.path.commonprefix([text, other])) for other in before), default=0)  # noqa: RUF071
        tokens = tokens_in(len(text), per_token)
        allowed += BLOCK * min(common // 2, (tokens - 1) // BLOCK)
        prompts += tokens
    assert shared_cache(calls, float("inf"), per_token) == pytest.approx(allowed / prompts)


def test_a_smaller_shared_cache_gives_less_and_one_that_is_too_small_says_so() -> None:
    texts = ["a" * 640, "b" * 640] * 3
    calls = [(chain(text, 4), len(text), len(text)) for text in texts]
    large, small = (shared_cache(calls, tokens, 4) for tokens in (10_000, 160))
    assert (large > 0.5, small) == (True, 0)
    with pytest.raises(ValueError, match="cache has 100 tokens, and a call of 640"):
        shared_cache(calls, 100, 4)


def test_an_output_that_is_said_again_was_used_last() -> None:
    cache = PrefixCache(4)

    def take(prompt: str, output: str = "") -> int:
        names = chain(prompt + output, 1)
        held = cache.begin(names[: len(prompt) // BLOCK], len(names))
        assert held is not None
        cache.end(held, names)
        return held.cached

    a, x = "a" * BLOCK, "x" * BLOCK
    for prompt, output in ((a, x), ("b" * BLOCK, ""), (a, x)):
        take(prompt, output)
    assert take("c" * 2 * BLOCK) == 0  # displaces "b"
    assert take(a + x) == 2


def test_a_running_call_keeps_its_blocks_whatever_else_comes() -> None:
    cache = PrefixCache(4)
    names = chain("a" * 32, 1)
    running = cache.begin(names, 3)
    assert running is not None
    assert cache.held == 3
    assert cache.begin(chain("b" * 32, 1), 2) is None  # no room without displacing a held block
    short = cache.begin(chain("b" * 16, 1), 1)
    assert short is not None
    cache.end(short, chain("b" * 16, 1))
    again = cache.begin(names, 3)  # shares the text's two blocks and adds one
    assert again is not None
    assert (again.cached, cache.held) == (2, 4)
    cache.end(running, names)
    assert cache.held == 3
    cache.end(again, names)
    assert cache.held == 0


# The engine

SPEED = Speed(prefill=100, step=0.1, step_per_call=0.1, running=2, tokens=160, per_token=1)


def run(engine: Engine, jobs: Sequence[Job]) -> list[Job]:
    """Give the engine each job at its time; return the jobs in the order in which they finish."""
    done: list[Job] = []
    for job in jobs:
        done += engine.until(job.at)
        engine.take(job)
    done += engine.until(1e6)
    return done


def test_an_engine_prefills_what_is_not_cached_and_decodes_together() -> None:
    engine = Engine(SPEED)
    first, second = Job("a" * 48, "x" * 2, 0), Job("b" * 32, "y" * 3, 0)
    assert run(engine, [first, second]) == [first, second]
    assert [first.begun, first.first_token] == pytest.approx([0, 0.48])
    # Prefill is serial: the second job's begins when the first one's ends.
    assert [second.begun, second.first_token] == pytest.approx([0.48, 0.80])
    # A job that decodes alone takes 0.2 s for each token after the first.
    assert first.done == pytest.approx(0.48 + 0.2)
    assert second.done == pytest.approx(0.80 + 2 * 0.2)
    again = Job("a" * 48 + "x" * 2 + "z" * 14, "", 5)
    run(engine, [again])
    assert (again.prompt_tokens, again.cached_tokens) == (64, 48)
    assert again.first_token == pytest.approx(5 + 0.16)
    whole = Job("a" * 48, "", 9)
    run(engine, [whole])
    assert whole.cached_tokens == 32  # the last token is always computed


def test_a_prefill_brings_decoding_to_a_stand_if_asked() -> None:
    first, second = Job("a" * 48, "x" * 2, 0), Job("b" * 32, "y" * 3, 0)
    run(Engine(replace(SPEED, stalls=True)), [first, second])
    assert [first.first_token, second.first_token] == pytest.approx([0.48, 0.80])
    # A step of both jobs takes 0.3 s, a step of the second alone 0.2 s.
    assert [first.done, second.done] == pytest.approx([0.80 + 0.3, 0.80 + 0.3 + 0.2])


def test_more_calls_make_a_decode_step_longer() -> None:
    engine = Engine(Speed(prefill=1e9, step=0.1, step_per_call=0.1, running=4, per_token=1))
    jobs = [Job(letter * 16, "x" * 11, 0) for letter in "abc"]
    run(engine, jobs)
    assert [job.done for job in jobs] == [pytest.approx(10 * 0.4)] * 3


def test_calls_wait_while_too_many_run_or_the_cache_has_no_room() -> None:
    engine = Engine(SPEED)
    jobs = [Job(letter * 16, "x" * 11, 0) for letter in "abc"]
    for job in jobs:
        engine.take(job)
    list(engine.until(1))
    assert (engine.running, len(engine.waiting)) == (2, 1)
    list(engine.until(1e6))
    assert jobs[2].begun == pytest.approx(jobs[0].done)
    full = Engine(SPEED)
    large, next_one = Job("a" * 120, "x" * 30, 0), Job("b" * 16, "x", 0)
    full.take(large)
    full.take(next_one)
    list(full.until(1.5))
    assert (full.running, len(full.waiting), full.usage) == (1, 1, 1)
    list(full.until(1e6))
    assert next_one.begun == pytest.approx(large.done)
    with pytest.raises(TooLongError, match="170 characters, and the cache has 160 tokens"):
        full.take(Job("a" * 160, "x" * 10, 0))


def test_calls_are_admitted_before_their_prefill_while_the_budget_has_room_for_more() -> None:
    engine = Engine(replace(SPEED, budget=64, running=9, tokens=800))
    jobs = [Job(letter * 48, "x", 0) for letter in "abcd"]
    for job in jobs:
        engine.take(job)
    # Two jobs have 96 tokens, more than the budget.
    assert (engine.running, len(engine.waiting)) == (2, 2)
    assert engine.usage == pytest.approx(2 * 64 / 800)
    list(engine.until(0.31))
    assert (engine.running, len(engine.waiting)) == (2, 2)
    list(engine.until(0.33))  # 64 of the 96 are left after 0.32 s
    assert (engine.running, len(engine.waiting)) == (3, 1)
    list(engine.until(1e6))
    # Prefill is still serial.
    assert [job.begun for job in jobs] == pytest.approx([0, 0.48, 0.96, 1.44])
    assert [job.first_token for job in jobs] == pytest.approx([0.48, 0.96, 1.44, 1.92])


def test_many_short_prefills_are_no_queue_to_the_gateway() -> None:
    engine = Engine(Speed())
    for number in range(30):
        engine.take(Job(f"{number:03d}" + "a" * 1000, "x", 0))
    assert (engine.running, len(engine.waiting)) == (30, 0)


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=20
    ),
    st.booleans(),
    st.sampled_from([(SPEED.budget, 2), (0, 8), (50, 8)]),
)
@settings(max_examples=150, deadline=None)
def test_an_engine_does_the_same_however_often_it_is_looked_at(
    calls: list[tuple[float, int, int]], stalls: bool, limits: tuple[int, int]
) -> None:
    budget, running = limits
    speed = replace(SPEED, stalls=stalls, budget=budget, running=running)

    def jobs() -> list[Job]:
        ordered = sorted(calls)
        return [Job("ab"[size % 2] * size, "x" * output, at) for at, size, output in ordered]

    seldom, often = jobs(), jobs()
    run(Engine(speed), seldom)
    engine = Engine(speed)
    done: list[Job] = []
    for job in often:
        for step in range(7):
            done += engine.until(job.at * step / 7)
        done += engine.until(job.at)
        engine.take(job)
    done += engine.until(1e6)
    assert [job.done for job in often] == pytest.approx([job.done for job in seldom])
    assert [job.cached_tokens for job in often] == [job.cached_tokens for job in seldom]
    assert len(done) == len(calls)
    assert (engine.running, engine.cache.held) == (0, 0)


# The worker, on the wire


async def test_a_worker_says_what_it_had_cached_and_what_the_gateway_polls() -> None:
    speed = Speed(prefill=1000, step=0.01, running=1, tokens=1600, per_token=1)
    async with (
        model_workers(1, speed, scale=100) as [url],
        aiohttp.ClientSession() as client,
    ):

        async def ask(body: bytes) -> tuple[int, dict[str, Any]]:
            async with client.post(url / CHAT, data=body) as response:
                return response.status, await response.json()

        async def polled() -> dict[str, float]:
            async with client.get(url / "metrics") as response:
                lines = (await response.text()).splitlines()
            return {name.partition("{")[0]: float(value) for name, value in map(str.split, lines)}

        prompt = "é" * 100
        status, first = await ask(chat(prompt, "x" * 30))
        assert (status, first["choices"][0]["message"]["content"]) == (200, "x" * 30)
        assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        _, second = await ask(chat(prompt + "x" * 30 + "y", "z"))
        assert second["usage"] == {
            "prompt_tokens": 131,
            "completion_tokens": 1,
            "total_tokens": 132,
            "prompt_tokens_details": {"cached_tokens": 128},
        }
        timings = second["timings"]
        assert timings["first_token"] - timings["begun"] == pytest.approx(0.003)
        idle = await polled()
        assert (idle["vllm:num_requests_running"], idle["vllm:kv_cache_usage_perc"]) == (0, 0)
        assert idle["vllm:prefix_cache_hits_total"] == 128

        # One call runs and one waits; the first is long enough for the poll to see this.
        calls = [asyncio.create_task(ask(chat(letter * 64, "x" * 500))) for letter in "ab"]
        while (busy := await polled())["vllm:num_requests_waiting"] != 1:
            assert not all(each.done() for each in calls)
        assert busy["vllm:num_requests_running"] == 1
        assert busy["vllm:kv_cache_usage_perc"] == pytest.approx(36 * BLOCK / 1600)
        (_, one), (_, other) = await asyncio.gather(*calls)
        ends = sorted((each["timings"]["begun"], each["timings"]["done"]) for each in (one, other))
        assert ends[1][0] == pytest.approx(ends[0][1])

        for body, complaint in (
            (chat("a" * 1600, "x"), "the cache has 1600 tokens"),
            (b"{", "no call of a trace"),
            (b'{"messages": []}', "no call of a trace"),
        ):
            status, refused = await ask(body)
            assert status == 400
            assert complaint in refused["error"]["message"]
        async with client.get(url / "v1/models") as response:
            assert (await response.json())["data"][0]["id"] == MODEL
        async with client.get(url / "nothing") as response:
            assert response.status == 404


# Arms, and their tables


def test_group_arms_play_only_where_there_are_groups() -> None:
    alone, grouped = [session("a", "x")], [session("a", "x", group="g")]
    assert list(arms(alone, every=False)) == list(MAIN)
    assert GROUPED in list(arms(grouped, every=False))
    every = list(arms(grouped, every=True))
    assert len({arm.name for arm in every}) == len(every) > len(MAIN) + 1


def test_each_assignment_mode_of_the_gateway_is_an_arm() -> None:
    parser = ArgumentParser()
    import_module("smg.router_args").RouterArgs.add_cli_args(parser)
    [known] = [it.choices for it in parser._actions if "--assignment-mode" in it.option_strings]
    names = {arm.name for arm in arms([session("a", "x")], every=True)}
    assert known
    assert {f"manual {mode}" for mode in known} <= names


def test_the_times_of_the_gateway_are_scaled_to_whole_seconds() -> None:
    defaults = import_module("smg.router_args").RouterArgs
    for place, option in enumerate(("--load-monitor-interval", "--eviction-interval-secs")):
        default = getattr(defaults, option[2:].replace("-", "_"))
        for scale, seconds in ((1, default), (10, default // 10), (1000, 1)):
            assert times(scale)[2 * place : 2 * place + 2] == (option, str(seconds))


async def test_the_gateway_takes_its_times_scaled() -> None:
    played = await play(CACHE_AWARE, [session("s", "a")], Settings(1, Speed(), 100), lambda: None)
    assert len(played.calls) == 1


def test_the_cache_of_a_worker_is_its_part_of_the_room_or_the_longest_call() -> None:
    sessions = [session(str(size), "x" * size, output="") for size in (400, 800, 1200)]
    plan = Plan("t", sessions, MAIN, (1,), Settings(2, Speed(per_token=1)))
    assert (plan.tokens(1), plan.tokens(2)) == (1200, 2400)
    assert plan.tokens(0.5) == 1200  # the longest call
    few = Plan("t", sessions, MAIN, (1,), Settings(2, Speed(per_token=1), at_once=1))
    assert few.tokens(4) == 1600
    assert (called(0.5), called(0.3)) == ("half of the sessions", "30 % of the sessions")


def test_the_pause_is_that_of_the_option_or_as_recorded_or_a_second() -> None:
    recorded, given = Settings(1, Speed()), Settings(1, Speed(), pause=60)
    assert [pause(each, recorded) for each in (None, 0.0, 2.5)] == [1, 0, 2.5]
    assert [pause(each, given) for each in (None, 0.0, 2.5)] == [60, 60, 60]
    assert pause(2.5, Settings(1, Speed(), pause=0)) == 0


def answered(session: int, number: int, worker: str, **values: float) -> Call:
    """Return a call of 100 tokens that took a second in the worker and no time outside."""
    known = {"begun": number, "first_token": 0.5, "inside": 1, "outside": 0}
    tokens = {"prompt_tokens": 100, "cached_tokens": 0}
    return Call(session, number, worker, **{**known, **tokens, **values})  # type: ignore[arg-type]


def test_a_call_moved_if_the_one_before_in_its_session_was_elsewhere() -> None:
    later, first = answered(0, 1, "b"), answered(0, 0, "a")
    calls = [later, answered(1, 0, "b"), first, answered(0, 2, "b"), answered(1, 1, "b")]
    assert moves(Played(calls)) == 1


def test_the_fullest_worker_is_the_one_with_most_tokens_beside_the_mean_of_all_workers() -> None:
    calls = [answered(0, 0, "a", prompt_tokens=300), answered(1, 0, "b"), answered(2, 0, "b")]
    assert fullest(4)(Played(calls)) == pytest.approx(300 / 125)


def test_the_first_token_has_the_real_time_of_the_gateway_unscaled() -> None:
    calls = [answered(number, 0, "a", first_token=number, outside=0.25) for number in range(3)]
    assert first_token(50)(Played(calls)) == pytest.approx(1.25)


def test_the_share_of_the_machine_is_told_and_complained_of_above_a_limit() -> None:
    sessions = [session("a", "x" * 100)]
    plan = Plan("t", sessions, [PINNED], (1,), Settings(1, Speed(), scale=10))
    for outside, share, word in ((0.01, 0.1 / 1.1, "not the model's"), (0.05, 1 / 3, "--scale")):
        played = Played([answered(0, 0, "a", outside=outside)])
        assert of_machine(played, 10) == pytest.approx(share)
        room = Room(1, 160)
        room.rounds[PINNED.name].append(played)
        *_, said = notes(plan, [room])
        assert f"{share:.0%}".replace("%", " %") in said
        assert word in said


async def test_a_call_that_is_refused_is_counted_and_its_session_goes_on() -> None:
    long = session("s", "a" * 100, "a" * 2000, "a" * 120)
    speed = Speed(tokens=800, per_token=1)
    steps: list[None] = []
    played = await play(PINNED, [long], Settings(1, speed, 100), lambda: steps.append(None))
    assert [answered.number for answered in played.calls] == [0, 2]
    assert len(steps) == 3
    [(failure, count)] = played.failures.items()
    assert (failure.startswith("status 400"), count) == (True, 1)


async def test_an_arm_starts_again_where_another_program_has_taken_a_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        given: list[list[int]] = []

        def ports(count: int) -> list[int]:
            given.append(free_ports(count) if given else [other.getsockname()[1]])
            return given[-1]

        monkeypatch.setattr("benchmarks.trace.workers.free_ports", ports)
        one = Settings(1, Speed(), 100)
        played = await play(PINNED, [session("s", "a")], one, lambda: None)
    assert (len(played.calls), len(given)) == (1, 2)


@pytest.mark.parametrize(
    ("content", "counted"),
    [
        (b'{"error": {"code": "no_workers"}}', "status 503, no_workers"),
        (b'{"error": "no"}', "status 503"),
        (b"no", "status 503"),
    ],
)
def test_a_refusal_is_counted_by_its_status_and_the_code_of_the_gateway(
    content: bytes, counted: str
) -> None:
    assert reason(503, content) == counted


def test_the_check_fails_where_the_model_is_off_or_arms_change_places() -> None:
    near = [Row("a", 0.9, 0.91, 0.92), Row("b", 0.4, 0.41, 0.2)]
    assert "at most 1.0 points off" in verdict(near)
    with pytest.raises(RuntimeError, match=r"3\.0 points off real engines"):
        verdict([Row("a", 0.9, 0.93, 0.9)])
    with pytest.raises(RuntimeError, match="a and b change places"):
        verdict([Row("a", 0.9, 0.9, 0.2), Row("b", 0.4, 0.4, 0.9)])


# A whole run


def small_trace(file: Path, *, groups: int = 4, samples: int = 2, turns: int = 5) -> Path:
    """Write transcripts with a long prompt for each task, and texts for each sample."""
    random = Random(5)

    def text(size: int) -> str:
        return "".join(random.choices("abcdefgh ", k=size))

    system = said("system", text(400))
    lines = []
    for group in range(groups):
        task = said("user", text(4000))
        for trial in range(samples):
            messages = [system, task]
            for _ in range(turns):
                messages += [said("assistant", text(60)), said("tool", text(200))]
            name = f"task-{group}-{trial}"
            lines.append({"session_id": name, "group": f"task-{group}", "messages": messages})
    return write(file, *lines)


async def test_a_run_shows_that_pins_take_more_from_the_cache_and_writes_all_of_it(
    folder: Path,
) -> None:
    small_trace(folder / "t.jsonl")
    argv = (
        "--sessions",
        "12",
        "--workers",
        "4",
        "--scale",
        "20",
        "--room",
        "4",
        "--prefill-stalls",
        "--json",
        "t.json",
    )
    names = (PINNED.name, RANDOM.name)
    options = [word for name in names for word in ("--arm", name)]
    files = ("--picture", "t.svg", "--markdown", "t.md")
    env = {"TRACE_FOLDER": str(folder)}
    (folder / "elsewhere").mkdir()
    async with running(
        folder / "elsewhere", "-m", "benchmarks", "trace", "t.jsonl", *argv, *options, *files, **env
    ) as process:
        out, err = (text.decode() for text in await process.communicate())
    assert (process.returncode, err) == (0, "")
    assert sorted(os.listdir(folder / "elsewhere")) == ["t.json", "t.md", "t.svg"]
    document = json.loads((folder / "elsewhere/t.json").read_text("utf-8"))
    [part] = document["parts"]
    [table] = part["tables"]
    rows = {
        name: dict(zip(table["columns"][1:], cells, strict=True)) for name, *cells in table["rows"]
    }
    keyed, keyless = (rows[name] for name in names)
    assert keyed["moved"]["median"] == 0 < keyless["moved"]["median"]
    assert keyless[OF_LIMIT]["median"] < 0.8 < keyed[OF_LIMIT]["median"] <= 1
    assert "No call failed." in part["notes"]
    assert re.search(
        r"together \d{3} % of all distinct tokens; 12 sessions in 6 groups, 60 calls$",
        table["title"],
    )
    assert "and stands still during a prefill" in part["notes"][0]
    assert "## Agent trace t\n" in (folder / "elsewhere/t.md").read_text("utf-8")
    assert (folder / "elsewhere/t.svg").read_text("utf-8").startswith("<?xml")
    assert PINNED.name in out


async def test_samples_of_a_session_without_a_group_are_pinned_together_by_a_group_key(
    folder: Path,
) -> None:
    prompt, output = "p" * 4000, "q" * 2000
    lines = call("a", 0, prompt, output), call("a", 0.1, prompt + output + "r" * 2000)
    write(folder / "t.jsonl", *lines)
    argv = ("--samples", "4", "--sessions", "4", "--workers", "2", "--scale", "20", "--room", "4")
    async with running(
        *(folder, "-m", "benchmarks", "trace", "t.jsonl", *argv),
        *("--arm", GROUPED.name, "--arm", PINNED.name, "--json", "t.json"),
    ) as process:
        _, err = (text.decode() for text in await process.communicate())
    assert (process.returncode, err) == (0, "")
    [part] = json.loads((folder / "t.json").read_text("utf-8"))["parts"]
    [table] = part["tables"]
    assert table["title"].endswith("; 4 sessions in 1 group, 8 calls")
    rows = {row[0]: dict(zip(table["columns"][1:], row[1:], strict=True)) for row in table["rows"]}
    grouped, alone = (rows[arm.name] for arm in (GROUPED, PINNED))
    assert grouped["fullest / mean"]["median"] == 2 > alone["fullest / mean"]["median"]
    assert grouped[OF_LIMIT]["median"] == 1 > alone[OF_LIMIT]["median"]
    assert any(note.startswith("The first prompts come to 50 % of") for note in part["notes"])
    assert "No call failed." in part["notes"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "name the files of a trace, or --check"),
        (["nowhere.jsonl"], "'nowhere.jsonl' can't be read: No such file or directory"),
        (["bad.jsonl"], "bad.jsonl, line 1: it is not JSON"),
        (["t.jsonl", "t.jsonl"], "two files have one name"),
        (["t.jsonl", "--workers", "0"], "'--workers'"),
        (["t.jsonl", "--samples", "1"], "'--samples'"),
        (["t.jsonl", "--room", "nan"], "'--room'"),
        (["t.jsonl", "--arm", "frobnicate"], "'--arm'"),
        (["t.jsonl", "--arm", GROUPED.name], "t.jsonl has no groups, which the chosen arms need"),
        (["t.jsonl", "--picture", "t.gif"], "ends neither in .svg nor in .png"),
        (["t.jsonl", "--json", "nowhere/t.json"], "'nowhere/t.json' can't be written"),
    ],
)
def test_a_wrong_option_is_said_before_anything_starts(
    words: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRACE_FOLDER", raising=False)
    (tmp_path / "bad.jsonl").write_text("{\n", "utf-8")
    write(tmp_path / "t.jsonl", GOOD)
    outcome = CliRunner().invoke(main, words)
    assert outcome.exit_code == 2, outcome.output
    assert complaint in outcome.stderr
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "t.jsonl"]


@pytest.mark.parametrize(
    ("installed", "complaint"),
    [("1.11.4", "need smg 1.12 or newer, and this is 1.11.4"), (None, "--group bench")],
)
def test_a_gateway_that_is_too_old_or_missing_is_said(
    installed: str | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if installed is None:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.setattr("benchmarks.trace.command.version", version)
    outcome = CliRunner().invoke(main, [str(write(tmp_path / "t.jsonl", GOOD))])
    assert outcome.exit_code == 2
    assert complaint in outcome.stderr


async def test_an_interrupt_stops_the_player_and_all_that_it_started(folder: Path) -> None:
    small_trace(folder / "t.jsonl")
    argv = ("-m", "benchmarks", "trace", "t.jsonl", "--sessions", "400", "--scale", "1")
    async with running(folder, *argv) as process:
        await until_it_says(process, b"room for all sessions")
        if HAS_PROC:
            # The benchmark, two processes of workers, and the gateway.
            await until(lambda: len(processes_in(folder)) >= 4)
        await assert_stopped(process, signal.SIGINT, 130)
    assert os.listdir(folder) == ["t.jsonl"]


async def test_the_model_takes_as_much_from_its_cache_as_real_engines_do(folder: Path) -> None:
    async with running(
        folder, "-m", "benchmarks", "trace", "--check", "--quick", "--json", "c.json"
    ) as process:
        _, err = (text.decode() for text in await process.communicate())
    assert (process.returncode, err) == (0, "")
    [part] = json.loads((folder / "c.json").read_text("utf-8"))["parts"]
    for _, real, same, _ in part["tables"][0]["rows"]:
        assert abs(real["median"] - same["median"]) <= 0.02
