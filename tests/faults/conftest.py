from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No code of ours, of aiohttp or of asyncio may log a traceback, or an error, in a test."""
    yield
    records = caplog.get_records("call")
    assert [r.getMessage() for r in records if r.exc_info or r.levelname == "ERROR"] == []
