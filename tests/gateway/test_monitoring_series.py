"""The gateway has the series and branches that the alerts, the dashboard and the pages name."""

import asyncio
import re
from contextlib import AsyncExitStack

from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

from aiohttp_smg_routing.testing import smg_gateway
from harness.agents import CHAT, chat

from ..monitoring import OURS, PAGES, label_values, queries, series
from .loaded import POLLS, loaded_workers


async def metrics_of(policy: str, *args: str) -> str:
    """Return the metrics of the real gateway after calls with and without a key.

    One of its workers is overloaded.
    """
    async with AsyncExitStack() as stack:
        workers = await stack.enter_async_context(loaded_workers(2))
        urls = [worker.recorder.url for worker in workers]
        args = (*POLLS, "--worker-overload-protection", *args)
        gateway = await stack.enter_async_context(smg_gateway(urls, policy=policy, args=args))
        session = await stack.enter_async_context(ClientSession(raise_for_status=True))
        await workers[0].report(kv_usage=0.95)
        for key in ("s-1", "s-1", None):
            headers = {"X-SMG-Routing-Key": key} if key else {}
            url = gateway.url / CHAT
            async with session.post(url, json=chat(str(key)), headers=headers) as response:
                await response.read()
        async with session.get(gateway.metrics_url) as response:
            return await response.text()


async def test_the_real_gateway_serves_every_series_and_branch_that_is_named() -> None:
    pages = await asyncio.gather(
        metrics_of("manual"),
        metrics_of("consistent_hashing"),
        metrics_of("cache_aware", "--routing-key-override"),
    )
    families = [family for page in pages for family in text_string_to_metric_families(page)]
    names = {sample.name for family in families for sample in family.samples}
    assert series(queries() + PAGES) - OURS <= names
    # The gateway's help texts list all branches, even those that only a failure would count.
    branches = {
        branch
        for family in families
        if family.name.endswith("_policy_branch")
        for branch in re.findall(r"\w+", family.documentation)
    }
    assert label_values("branch") <= branches
