"""Workers that report the load that a test gives them, which the real gateway asks them for."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from aiohttp_smg_routing.testing import Answer, Call, Recorder, answer, canned
from harness.workers import models, recorders

POLLS = ("--load-monitor-interval", "1")
"""Has the gateway ask every second; by default it asks every 10."""

Kind = Literal["vllm", "sglang", "sglang --enable-metrics"]
# Each engine's names for its KV usage, for the calls that wait, and for the hit rate of its prefix
# cache. SGLang's own page of loads is there without its metrics, and the gateway asks for it first.
_LOADS = "/v1/loads"
_SERIES = {
    "vllm": ("vllm:kv_cache_usage_perc", "vllm:num_requests_waiting"),
    "sglang --enable-metrics": (
        "sglang:token_usage",
        "sglang:num_queue_reqs",
        "sglang:cache_hit_rate",
    ),
}


@dataclass(eq=False)
class LoadedWorker:
    """A worker that takes every call, whatever load it reports."""

    recorder: Recorder
    kind: Kind
    kv_usage: float = 0.1
    waiting: int = 0
    cache_hit_rate: float = 0
    _polled: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.recorder.answer = self._answer

    def _answer(self, call: Call) -> Answer:
        path = call.path.partition("?")[0]
        if path == "/v1/models":  # here the gateway reads which engine it is
            return answer(models(owned_by=self.kind.split()[0]))
        if path not in {_LOADS, "/metrics"}:
            return canned(call)
        if (path == _LOADS) is not (self.kind == "sglang"):
            return answer(status=404)
        self._polled.set()
        if path == _LOADS:
            load = {"dp_rank": 0, "token_usage": self.kv_usage, "num_waiting_reqs": self.waiting}
            return answer({"loads": [{**load, "num_running_reqs": 0}]})
        values = (self.kv_usage, self.waiting, self.cache_hit_rate)
        pairs = zip(_SERIES[self.kind], values, strict=False)
        return answer("".join(f"{name} {value}\n" for name, value in pairs).encode())

    async def report(self, *, kv_usage: float = 0.1, waiting: int = 0) -> None:
        """Report this load from now on, and return when the gateway goes by it."""
        self.kv_usage, self.waiting = kv_usage, waiting
        for _ in range(2):  # when it asks again, it has done with the answer before
            self._polled.clear()
            await asyncio.wait_for(self._polled.wait(), 30)


async def report(
    workers: Iterable[LoadedWorker], *, kv_usage: float = 0.1, waiting: int = 0
) -> None:
    """Have all of these report this load, as ``LoadedWorker.report()``."""
    await asyncio.gather(*(each.report(kv_usage=kv_usage, waiting=waiting) for each in workers))


@asynccontextmanager
async def loaded_workers(count: int, kind: Kind = "vllm") -> AsyncIterator[list[LoadedWorker]]:
    """Run such workers until the block ends."""
    async with recorders(count) as workers:
        yield [LoadedWorker(worker, kind) for worker in workers]
