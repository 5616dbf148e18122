"""What pytest loads where this package is installed."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Bring the fixtures, where pytest-aiohttp is there to run them."""
    if config.pluginmanager.has_plugin("aiohttp"):  # pragma: no branch - needs another pytest
        from . import fixtures

        config.pluginmanager.register(fixtures)
