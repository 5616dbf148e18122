from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which our code, aiohttp or asyncio logs an error or a traceback."""
    yield
    records = caplog.get_records("call")
    assert [r.getMessage() for r in records if r.exc_info or r.levelname == "ERROR"] == []
