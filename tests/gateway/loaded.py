"""Workers that report a load set by the test, for the real gateway to poll."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from aiohttp_smg_routing.testing import Answer, Call, Recorder, answer, canned
from harness.workers import models, recorders

POLLS = ("--load-monitor-interval", "1")
"""Makes the gateway poll every second instead of every 10."""

Kind = Literal["vllm", "sglang", "sglang --enable-metrics"]
# Each engine's names for KV usage, waiting calls, and the hit rate of the prefix cache. SGLang
# serves its page of loads even without metrics, and the gateway asks for that page first.
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
    """A worker that answers every call, whatever load it reports."""

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
        if path == "/v1/models":  # the gateway learns the engine from this
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
        """Report this load from now on; return once the gateway uses it."""
        self.kv_usage, self.waiting = kv_usage, waiting
        for _ in range(2):  # asking again shows that it has read the answer before
            self._polled.clear()
            await asyncio.wait_for(self._polled.wait(), 30)


async def report(
    workers: Iterable[LoadedWorker], *, kv_usage: float = 0.1, waiting: int = 0
) -> None:
    """Have all ``workers`` report this load; see ``LoadedWorker.report()``."""
    await asyncio.gather(*(each.report(kv_usage=kv_usage, waiting=waiting) for each in workers))


@asynccontextmanager
async def loaded_workers(count: int, kind: Kind = "vllm") -> AsyncIterator[list[LoadedWorker]]:
    """Run workers that report a load until the block ends."""
    async with recorders(count) as workers:
        yield [LoadedWorker(worker, kind) for worker in workers]
