"""What pytest loads where this package is installed."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Bring the fixtures, where pytest-aiohttp 1.0 or newer is there to run them."""
    has = config.pluginmanager.has_plugin
    if has("aiohttp") and has("asyncio"):  # pragma: no branch - needs another pytest
        from . import fixtures

        config.pluginmanager.register(fixtures)
