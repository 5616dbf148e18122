"""``watch`` on the gateway of this environment tells what ``docs/gateways.md`` says it can."""

import asyncio

import pytest

from ..commands import watch_once
from ..verify_servers import in_background
from .launch import FACTS, PACKAGE, launched, play

SESSIONS = [f"s-{number}" for number in range(12)]
[PINNING] = FACTS["launch it with"]
PINNED, NOT_PINNED = "`watch`, pinning policy", "`watch`, other policy"


@pytest.mark.parametrize(
    ("launch", "expected"), [(PINNING, FACTS[PINNED]), ("round_robin", FACTS[NOT_PINNED])]
)
def test_what_watch_says(launch: str, expected: list[str]) -> None:
    with in_background(launched(launch)) as gateway:
        status, seen = watch_once(gateway.metrics_url)
        assert (status, seen["sentence"]) == (2, "Could not tell: the gateway has routed no call.")
        assert seen["gateway"]["kind"] == PACKAGE
        asyncio.run(play(gateway, SESSIONS, 5))
        status, seen = watch_once(gateway.metrics_url)
    assert [str(status)] == expected, seen
    policy = launch.split()[0]
    assert seen["gateway"]["total"]["pools"] == {"regular": {policy: 60}}
    workers = seen["gateway"]["workers"]
    assert {*workers} == {str(worker.url.origin()) for worker in gateway.workers}
    assert sum(worker["calls"] for worker in workers.values()) == 60
    assert {worker["healthy"] for worker in workers.values()} == {True}
    assert {worker["circuit"] for worker in workers.values()} == {"closed"}
