"""Behaviour specific to vllm-router."""

import asyncio
import itertools
import secrets
from collections.abc import Mapping
from pathlib import Path

import pytest
from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing import ROUTING_KEY_HEADER
from harness.agents import CHAT

from ..commands import verify
from ..turns import answered
from .launch import HEADER, is_pinned, launched, play, random_turn, served_by_prompt

POLICIES = ["consistent_hash", "sticky_least_loaded"]
SESSIONS = [f"s-{number}" for number in range(24)]


@pytest.mark.parametrize("policy", POLICIES)
async def test_with_the_default_header_every_session_is_on_one_worker(
    tmp_path: Path, policy: str
) -> None:
    async with launched(policy) as gateway:
        await play(gateway, SESSIONS, 4, ROUTING_KEY_HEADER)
        workers = {url for urls in served_by_prompt(gateway.workers).values() for url in urls}
        options = ("--metrics", gateway.metrics_url)
        run = await asyncio.to_thread(verify, tmp_path, gateway.url, *options, program=True)
    assert len(workers) == 1
    assert run.status == 1
    assert "--header X-Session-ID" in run.said


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "name", ["X-User-ID", "X-Tenant-ID", "X-Request-ID", "X-Correlation-ID", "X-Trace-ID"]
)
async def test_without_its_header_others_choose_the_worker(policy: str, name: str) -> None:
    async with launched(policy) as gateway, ClientSession() as session:

        async def call(whose: str, headers: Mapping[str, str]) -> None:
            await answered(session, gateway.url / CHAT, json=random_turn(whose), headers=headers)

        for _, whose in itertools.product(range(2), SESSIONS):
            await call(whose, {name: whose})
        assert is_pinned(served_by_prompt(gateway.workers))
        # A call's X-Session-ID outranks them.
        for whose in ["a", "b", "c", "d"] * 4:
            await call(f"{whose}-beside", {name: secrets.token_hex(8), HEADER: whose})
        found = served_by_prompt(gateway.workers)
    assert all(len({*found[f"{whose}-beside"]}) == 1 for whose in "abcd")


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_session_id_in_the_body_does_not_outrank_the_header(policy: str) -> None:
    async with launched(policy) as gateway:
        await play(gateway, SESSIONS, 4, session_params={"session_id": "the same for all"})
        assert is_pinned(served_by_prompt(gateway.workers))


async def test_of_two_headers_the_last_one_counts() -> None:
    async with launched("consistent_hash") as gateway, ClientSession() as session:
        url = gateway.url / CHAT
        for number, name in itertools.product(range(4), SESSIONS):
            for headers in ([(HEADER, f"{number}"), (HEADER, name)],):
                await answered(session, url, json=random_turn(name), headers=headers)
        assert is_pinned(served_by_prompt(gateway.workers))


async def test_finish_session_frees_its_place() -> None:
    async with launched("sticky_least_loaded") as gateway, ClientSession() as session:

        async def worker_of(name: str) -> URL:
            body, headers = random_turn(name), {HEADER: name}
            await answered(session, gateway.url / CHAT, json=body, headers=headers)
            return served_by_prompt(gateway.workers)[name][-1]

        workers = {name: await worker_of(name) for name in ("a", "b", "c")}
        assert len({*workers.values()}) == 3
        url = gateway.url.with_path("/finish_session").with_query(session_id="b")
        await answered(session, url)
        assert await worker_of("d") == workers["b"]
