"""Every query of the dashboard and of the alerts has results in a real Prometheus.

It scrapes a run with the problems that the alerts report: sessions move, one worker has all
sessions, keys are lost, and calls have no session, are late or go to another gateway.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, web
from prometheus_client import CollectorRegistry
from yarl import URL

from aiohttp_smg_routing.testing import SmgGateway, free_port, smg_gateway
from harness.agents import CHAT, chat
from harness.processes import answering, local_url
from harness.proxies import CLIENT, pinned_server
from harness.servers import serve

from ..commands import watch_once
from ..metered import metrics_of
from ..monitoring import ALERTS, DASHBOARD, DOCS, OUTCOMES, expressions
from ..programs import program
from ..smg import names_workers
from ..turns import answered, play_sessions_at
from ..waiting import PATIENCE_SECONDS
from .loaded import POLLS, loaded_workers

SESSIONS = [f"s-{number}" for number in range(60)]

#: The alerts whose expression has no result here, and the reason.
SILENT = {
    "SmgRidOutranksKey": "SMG 1.12 and newer let the key outrank a rid",
    "SmgRoutingKeyIgnored": "keys that are lost on their way, as here, are SmgRoutingKeyDropped's",
}


@asynccontextmanager
async def faulty_server(
    gateway: URL, *, other: URL | None = None, **config: object
) -> AsyncIterator[URL]:
    """Run a session server with its own metrics that also calls an ``other`` gateway."""
    registry = CollectorRegistry()
    app = pinned_server(gateway, metrics="prometheus", metrics_registry=registry, **config)
    ended = asyncio.Event()
    tasks = []

    async def elsewhere(request: web.Request) -> web.Response:
        url = (other or gateway) / CHAT
        async with request.app[CLIENT].post(url, json=await request.json()) as answer:
            return web.Response(status=answer.status)

    async def late(request: web.Request) -> web.Response:
        async def work() -> None:
            await ended.wait()
            async with request.app[CLIENT].post(gateway / CHAT, json=chat("late")) as answer:
                await answer.read()

        tasks.append(asyncio.ensure_future(work()))
        return web.Response()

    async def wait_for_late(request: web.Request) -> web.Response:
        ended.set()
        await asyncio.gather(*tasks)
        return web.Response()

    app.router.add_get("/metrics", metrics_of(registry))
    app.router.add_post("/elsewhere/{session_id}", elsewhere)
    app.router.add_post("/late/{session_id}", late)
    app.router.add_post("/wait", wait_for_late)
    async with serve(app) as url:
        yield url


@asynccontextmanager
async def prometheus(folder: Path, jobs: Mapping[str, Sequence[URL]]) -> AsyncIterator[URL]:
    """Run Prometheus until the block ends, with the alert rules."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DOCS / "alerts.yml")],
        "scrape_configs": [
            {
                "job_name": job,
                "scrape_timeout": "1s",
                "static_configs": [{"targets": [f"{url.host}:{url.port}" for url in urls]}],
            }
            for job, urls in jobs.items()
        ],
    }
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(config))  # JSON is valid YAML
    url = local_url(free_port())
    argv = (
        program("prometheus", "prometheus"),
        *(f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address={url.host}:{url.port}", "--log.level=error"),
    )
    async with answering(url / "-/ready", *argv):
        yield url


class Asking:
    """A client of Prometheus."""

    def __init__(self, client: ClientSession, url: URL) -> None:
        self._client = client
        self._url = url

    async def get(self, path: str, **params: str) -> Any:
        url = self._url / "api/v1" / path
        async with self._client.get(url, params=params) as response:
            answer = await response.json()
        assert answer["status"] == "success", answer
        return answer["data"]

    async def query(self, expr: str) -> list[Any]:
        found: list[Any] = (await self.get("query", query=expr))["result"]
        return found

    async def silent(self, queries: Mapping[str, str]) -> list[str]:
        """Return the names of the queries that have no result even after the next scrapes."""
        loop = asyncio.get_running_loop()
        deadline, left = loop.time() + PATIENCE_SECONDS, dict(queries)
        while left and loop.time() < deadline:
            for name, expr in [*left.items()]:
                if await self.query(expr):
                    del left[name]
            await asyncio.sleep(0.2)
        return sorted(left)


def branch(name: str) -> str:
    return f'smg_manual_policy_branch_total{{branch="{name}"}} > 0'


def alert_expressions() -> dict[str, str]:
    """Return the PromQL of each alert by name; an expression may be one line or a block."""
    found = re.findall(r"- alert: (\w+)\n +expr: (?:\|\n((?: {10}.*\n)+)|(.+)\n)", ALERTS)
    return {name: block or line for name, block, line in found}


def variables() -> dict[str, str]:
    """Return a PromQL query for the values of each variable of the dashboard."""
    queries = {
        it["name"]: re.fullmatch(r"label_values\((.+), (\w+)\)", it["query"]["query"])
        for it in DASHBOARD["templating"]["list"]
    }
    asked = {name: f"count by ({it[2]}) ({it[1]})" for name, it in queries.items() if it}
    assert len(asked) == len(queries)
    return {name: re.sub(r"\$\w+", ".+", query) for name, query in asked.items()}


@names_workers
async def test_every_query_of_the_dashboard_and_the_alerts_finds_something(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        workers = await enter(loaded_workers(2))
        urls = [worker.recorder.url for worker in workers]
        args = (*POLLS, "--worker-overload-protection")
        manual, hashing, override = [
            await enter(smg_gateway(urls, policy="manual", args=args)),
            await enter(smg_gateway(2, policy="consistent_hashing")),
            await enter(smg_gateway(2, policy="cache_aware", args=("--routing-key-override",))),
        ]
        server = await enter(faulty_server(manual.url))
        wrong_header = await enter(faulty_server(manual.url, header="X-Lost"))
        unnamed = await enter(faulty_server(override.url, worker_header="X-Unnamed"))
        unmatched = await enter(faulty_server(URL("http://127.0.0.1:9"), other=manual.url))
        client = await enter(ClientSession())
        jobs = {
            "servers": [server],
            "wrong header": [wrong_header],
            "unnamed": [unnamed],
            "unmatched": [unmatched],
            "gateways": [smg.metrics_url for smg in (manual, hashing, override)],
        }
        asking = Asking(client, await enter(prometheus(tmp_path, jobs)))
        up = {job: f'sum(up{{job="{job}"}}) == {len(urls)}' for job, urls in jobs.items()}
        assert await asking.silent(up) == []  # rate() misses counts from before the first scrape

        await workers[0].report(kv_usage=0.95)
        for _ in range(3):  # all sessions go to the other worker
            await play_sessions_at(server, SESSIONS)
        # A branch's series begins with its first call, and rate() needs a later one.
        assert await asking.silent({"hits": branch("occupied_hit")}) == []
        await play_sessions_at(server, SESSIONS)
        await play_sessions_at(wrong_header, SESSIONS)
        await workers[0].report(kv_usage=0.1)
        await workers[1].report(kv_usage=0.95)
        await play_sessions_at(server, SESSIONS)  # now the sessions move
        await play_sessions_at(unnamed, SESSIONS[:20])
        await bad_calls(client, server, unmatched)
        for key in ({"X-SMG-Routing-Key": "k"}, {}):
            await answered(client, hashing.url / CHAT, json=chat("s-1"), headers=key)

        queries = {**dict(expressions()), **variables()}
        assert await asking.silent(queries) == []
        alerts = alert_expressions()
        assert (
            await asking.silent({name: alerts[name] for name in alerts if name not in SILENT}) == []
        )
        rules = [rule for group in (await asking.get("rules"))["groups"] for rule in group["rules"]]
        assert {rule["name"] for rule in rules} >= {*alerts}
        assert [rule for rule in rules if rule["health"] != "ok"] == []
        await assert_watch_says_the_same(asking, manual, server)
        # An alert may have a result briefly, between the scrapes of a server and its gateway.
        assert await asking.silent({name: f"absent({alerts[name]})" for name in SILENT}) == []


async def bad_calls(client: ClientSession, server: URL, unmatched: URL) -> None:
    """Make calls that have no session, are late, or go to a gateway that is not in the config."""
    for number in range(20):
        await answered(client, server / CHAT, json=chat("no session"))
        await answered(client, server / "late" / f"late-{number}")
        await answered(client, unmatched / "elsewhere" / f"s-{number}", json=chat("unmatched"))
    await answered(client, server / "wait")


async def assert_watch_says_the_same(asking: Asking, smg: SmgGateway, server: URL) -> None:
    _, seen = await asyncio.to_thread(watch_once, smg.metrics_url, server, program=True)
    of_gateway = f'instance="127.0.0.1:{smg.metrics_url.port}"'
    of_server = f'instance="127.0.0.1:{server.port}"'

    async def values(label: str, expr: str) -> dict[str, float]:
        found = await asking.query(f"sum by ({label}) ({expr})")
        return {it["metric"][label]: float(it["value"][1]) for it in found}

    gateway, counted = seen["gateway"], seen["server"]
    # No calls are made now, but a scrape may be a second old.
    total = sum(counted["total"][name] for name in OUTCOMES)
    branches_total = sum(gateway["total"]["branches"]["manual"].values())
    calls_total = sum(worker["calls"] for worker in gateway["workers"].values())
    scraped = {
        "outcomes": f"sum(smg_routing_calls_total{{{of_server}}}) == {total}",
        "branches": f"sum(smg_manual_policy_branch_total{{{of_gateway}}}) == {branches_total}",
        "calls": f"sum(smg_worker_cb_outcomes_total{{{of_gateway}}}) == {calls_total}",
    }
    assert await asking.silent(scraped) == []
    branches = await values("branch", f"smg_manual_policy_branch_total{{{of_gateway}}}")
    assert gateway["total"]["branches"]["manual"] == branches
    calls = await values("worker", f"smg_worker_cb_outcomes_total{{{of_gateway}}}")
    assert {name: worker["calls"] for name, worker in gateway["workers"].items()} == calls
    usage = await values("worker", f"smg_engine_token_usage{{{of_gateway}}}")
    assert {name: worker["token_usage"] for name, worker in gateway["workers"].items()} == usage
    outcomes = await values("outcome", f"smg_routing_calls_total{{{of_server}}}")
    assert {name: counted["total"][name] for name in outcomes} == outcomes
    active = await values("worker", f"smg_routing_active_sessions{{{of_server}}}")
    assert counted["active_sessions"] == active
    assert counted["total"]["moved"] == len(SESSIONS)
