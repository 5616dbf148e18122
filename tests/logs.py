"""What the plugin has logged."""

import logging

import pytest


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """Return the messages that the plugin has logged, from ``level`` up."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("aiohttp_smg_routing.") and record.levelno >= level
    ]
