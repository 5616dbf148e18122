from collections.abc import Iterator

import pytest

from aiohttp_smg_routing.testing import SmgGateway

from ..commands import gateway
from ..verify_servers import in_background


@pytest.fixture(scope="module")
def manual() -> Iterator[SmgGateway]:
    """Run a gateway that pins, for all tests that need no other: each run has new sessions."""
    with in_background(gateway("manual")) as smg:
        yield smg
