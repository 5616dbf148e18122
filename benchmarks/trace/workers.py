"""Run workers, each with the model of an engine, in a few processes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from yarl import URL

from aiohttp_smg_routing.testing import free_ports
from harness.processes import answering, command, local_url, together
from harness.workers import models

from .engine import Speed
from .worker import main

PROCESSES = 2
CONTEXT = 10**6  # tokens; so large that only the engine refuses calls


@asynccontextmanager
async def model_workers(count: int, speed: Speed, scale: float) -> AsyncIterator[tuple[URL, ...]]:
    """Run workers with cold caches until the block ends; yield their URLs.

    ``scale`` is the number of the model's seconds in a second.
    """
    urls = tuple(map(local_url, free_ports(count)))
    told = {"speed": asdict(speed), "scale": scale, "models": _models()}
    shares = [urls[first::PROCESSES] for first in range(min(PROCESSES, count))]
    processes = (
        answering(
            share[-1] / "health",
            *command(main, ports=[url.port for url in share], **told),
        )
        for share in shares
    )
    async with together(processes):
        yield urls


def _models() -> dict[str, Any]:
    document: dict[str, Any] = models()
    document["data"][0]["max_model_len"] = CONTEXT
    return document
