"""Gateways that share a worker count as one; a host has one spelling."""

import pytest
from yarl import URL

from aiohttp_smg_routing.gateway import Gateways, host_of

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


@pytest.mark.parametrize(
    ("authority", "host"),
    [("[0:0::0:1]:80", "::1"), ("[FE80::1%25A]", "fe80::1%25a"), ("[v1.A:b]", "v1.a:b")],
)
def test_an_address_has_one_spelling(authority: str, host: str) -> None:
    assert host_of(URL(f"http://{authority}/", encoded=True)) == host
