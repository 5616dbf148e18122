"""Gateways that share a worker count as one."""

from yarl import URL

from aiohttp_smg_routing.gateway import Gateways

A, B = URL("http://a"), URL("http://b")


def worker(number: int) -> str:
    return f"http://worker-{number}:8000"


def test_the_workers_that_a_gateway_named_last_are_known() -> None:
    """Older ones are forgotten, because workers come and go for weeks."""
    gateways, count = Gateways([A, B]), 10_000
    for number in range(count):
        assert not gateways.named(str(A), worker(number))
    assert not gateways.named(str(B), worker(0))
    assert gateways.group[str(A)] != gateways.group[str(B)]
    assert gateways.named(str(B), worker(count - 1))
    assert gateways.group[str(A)] == gateways.group[str(B)]
