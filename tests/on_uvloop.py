"""Run every test on uvloop: ``python -m pytest -p tests.on_uvloop``."""

import asyncio

import uvloop


def pytest_configure() -> None:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
