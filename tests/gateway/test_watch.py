"""``watch`` on the real gateway: real turns, killed workers and servers, and signals."""

import asyncio
import json
import os
import pty
import re
import signal
from asyncio.subprocess import PIPE
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from aiohttp_smg_routing.testing import free_port, smg_gateway
from harness.processes import CLI, ROOT, environment, local_url
from harness.servers import serve
from harness.workers import worker_processes

from ..commands import gateway, verify, watch_once
from ..metered import metered_server
from ..turns import play_sessions_at
from ..verify_servers import in_background
from ..waiting import soon
from .loaded import POLLS, loaded_workers, report

FAST = ("--interval", "0.2")


def causes(seen: dict[str, Any]) -> list[str]:
    return [cause["name"] for cause in seen["causes"]]


@dataclass
class Watching:
    """The running command, and the JSON documents that it prints."""

    process: asyncio.subprocess.Process

    async def until(
        self, *names: str, verdict: str | None = None, moved: int = 0
    ) -> dict[str, Any]:
        """Read documents up to one with these causes and this verdict; return it.

        The session server must have counted at least ``moved`` moves by then.
        """
        assert self.process.stdout is not None
        told: deque[Any] = deque(maxlen=3)

        async def read() -> dict[str, Any]:
            assert self.process.stdout is not None
            while line := await self.process.stdout.readline():
                seen: dict[str, Any] = json.loads(line)
                told.append((seen["sentence"], causes(seen)))
                has_moved = not moved or seen["server"]["total"]["moved"] >= moved
                if {*names} <= {*causes(seen)} and verdict in (None, seen["verdict"]) and has_moved:
                    return seen
            raise AssertionError(f"it ended: {told}")

        try:
            return await soon(read())
        except asyncio.TimeoutError:
            raise AssertionError(f"it still says {told}") from None


@asynccontextmanager
async def watching(*args: str | URL) -> AsyncIterator[Watching]:
    """Run the command until the block ends, then stop it with SIGTERM."""
    argv = [*CLI, "watch", *map(str, args), "--json", *FAST]
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=PIPE, stderr=PIPE, env=environment()
    )
    try:
        yield Watching(process)
        process.terminate()
        _, err = await soon(process.communicate())
        assert (process.returncode, err) == (143, b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@asynccontextmanager
async def job(policy: str, *args: str) -> AsyncIterator[tuple[URL, URL]]:
    """Run a gateway and a session server; yield the URLs of their metrics."""
    async with loaded_workers(3) as workers:
        urls = [worker.recorder.url for worker in workers]
        async with (
            smg_gateway(urls, policy=policy, args=args) as smg,
            metered_server(smg.url) as server,
        ):
            yield smg.metrics_url, server.url


def test_verdict_on_a_job_that_is_pinned_and_one_that_is_not() -> None:
    sessions = [f"s-{number}" for number in range(12)]
    with in_background(job("manual", "--assignment-mode", "min_group")) as (metrics, server):
        status, seen = watch_once(metrics, server)
        assert (status, causes(seen)) == (2, ["no_calls"])
        asyncio.run(play_sessions_at(server, sessions, turns=5))
        status, seen = watch_once(metrics, server)
        assert (status, seen["verdict"], causes(seen)) == (0, "pinned", ["idle"])
        manual = seen["gateway"]["total"]["branches"]["manual"]
        assert manual == {"vacant": 12, "occupied_hit": 48}
        assert seen["server"]["total"]["kept"] == 48
        assert sum(seen["server"]["active_sessions"].values()) == 12
        assert sum(worker["calls"] for worker in seen["gateway"]["workers"].values()) == 60
        status, alone = watch_once(metrics)
        assert (status, alone["server"]) == (0, None)
    with in_background(job("consistent_hashing")) as (metrics, server):
        asyncio.run(play_sessions_at(server, sessions, turns=5))
        status, seen = watch_once(metrics, server)
        assert (status, seen["verdict"]) == (0, "pinned")
        # A new key for each call would look the same to the gateway.
        status, alone = watch_once(metrics)
        assert (status, alone["verdict"]) == (2, "could not tell")
        assert "the key chose the worker of 60 of 60 calls" in alone["sentence"]
        assert "give the metrics URL of a session server" in alone["sentence"]
    with in_background(job("random")) as (metrics, server):
        asyncio.run(play_sessions_at(server, sessions, turns=5))
        status, seen = watch_once(metrics, server)
        assert (status, seen["verdict"]) == (1, "not pinned")
        assert "policy" in causes(seen)


async def test_gateway_that_the_session_server_does_not_call_is_said_to_be_another_one() -> None:
    async with (
        smg_gateway(2, policy="manual") as called,
        smg_gateway(2, policy="manual") as other,
        metered_server(called.url) as server,
        watching(other.metrics_url, server.url) as watch,
    ):
        await watch.until("no_calls")
        await play_sessions_at(server.url, [f"s-{number}" for number in range(12)], turns=5)
        seen = await watch.until("other_gateway")
    assert seen["verdict"] == "could not tell"
    assert "sessions are on workers that this gateway does not have" in str(seen["causes"])


async def test_worker_that_is_killed_is_said_while_it_is_down(tmp_path: Path) -> None:
    sessions = [f"s-{number}" for number in range(12)]
    args = ["--assignment-mode", "min_group"]
    args += ["--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
    async with worker_processes(tmp_path, 3) as workers:
        urls = [worker.url for worker in workers]
        async with (
            smg_gateway(urls, policy="manual", args=args) as smg,
            metered_server(smg.url) as server,
            watching(smg.metrics_url, server.url) as watch,
        ):
            await play_sessions_at(server.url, sessions, turns=3)
            await watch.until(verdict="pinned")
            await workers[0].kill()
            seen = await watch.until("worker_down")
            assert seen["gateway"]["workers"][str(workers[0].url.origin())]["healthy"] is False
            await play_sessions_at(server.url, sessions)
            await watch.until("worker_lost", moved=1)  # the first look may come during the turns


async def test_gateway_and_server_that_are_killed_and_come_back_are_said_to_be_so() -> None:
    sessions = [f"s-{number}" for number in range(12)]
    port = free_port()
    async with loaded_workers(2) as workers:
        urls = [worker.recorder.url for worker in workers]
        metrics = free_port()
        args = ("--prometheus-port", str(metrics))  # the last occurrence of an option wins
        url = local_url(metrics) / "metrics"
        async with metered_server(local_url(port)) as server:
            async with (
                smg_gateway(urls, policy="manual", args=args, port=port),
                watching(url, server.url) as watch,
            ):
                await play_sessions_at(server.url, sessions, turns=3)
                await watch.until(verdict="pinned")
                await server.kill()
                seen = await watch.until("no_server_counters")
                assert seen["server"]["total"]["first"] == 12  # the old counts stay
                assert seen["server"]["now"] is None
                await server.start()
                await watch.until("server_restarted")
            async with watching(url, server.url) as watch:
                await watch.until("no_counters", verdict="could not tell")
                async with smg_gateway(urls, policy="manual", args=args, port=port) as smg:
                    await watch.until("no_calls")
                    await play_sessions_at(server.url, sessions, turns=3)
                    await watch.until(verdict="pinned")
                    smg.process.kill()
                    seen = await watch.until("no_counters", verdict="could not tell")
                async with smg_gateway(urls, policy="manual", args=args, port=port) as smg:
                    seen = await watch.until("gateway_restarted", "no_calls")
                    assert seen["gateway"]["restarts"] == 1


def shape(block: str) -> list[str]:
    """Return a block's words with its figures replaced, and equal lines of workers only once."""
    head, _, rows = block.partition("\ngateway ")
    words = " ".join(re.sub(r"\d[\d.:]*", "0", head).split())
    lines = [re.sub(r"\d[\d.:]*", "0", " ".join(line.split())) for line in rows.splitlines()]
    return [words, *dict.fromkeys(line for line in lines if line)]


async def test_block_on_the_page_is_one_that_the_command_prints() -> None:
    page = (ROOT / "docs" / "watch.md").read_text("utf-8")
    block = re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0]
    assert max(map(len, block.splitlines())) <= 80
    async with loaded_workers(4, "sglang --enable-metrics") as workers:
        for worker in workers:
            worker.cache_hit_rate = 0.9
        urls = [worker.recorder.url for worker in workers]
        args = (*POLLS, "--assignment-mode", "min_group")
        async with (
            smg_gateway(urls, policy="manual", args=args) as smg,
            metered_server(smg.url) as server,
        ):
            await report(workers)
            sessions = [f"s-{number}" for number in range(20)]
            await play_sessions_at(server.url, sessions, turns=2)
            process = await asyncio.create_subprocess_exec(
                *(*CLI, "watch", str(smg.metrics_url), str(server.url)),
                *("--once", "--interval", "1"),
                stdout=PIPE,
                env=environment(),
            )
            ended = asyncio.ensure_future(soon(process.communicate()))
            while not ended.done():
                await play_sessions_at(server.url, sessions)
                await asyncio.wait({ended}, timeout=0.1)
            out, _ = await ended
    assert process.returncode == 0
    assert shape(out.decode()) == shape(block)


async def test_overloaded_workers_and_the_engines_own_figures_are_shown() -> None:
    args = (*POLLS, "--worker-overload-protection")
    async with loaded_workers(2, "sglang --enable-metrics") as workers:
        for worker in workers:
            worker.cache_hit_rate = 0.75
        urls = [worker.recorder.url for worker in workers]
        async with (
            smg_gateway(urls, policy="manual", args=args) as smg,
            metered_server(smg.url) as server,
        ):
            await workers[0].report(kv_usage=0.95)
            await play_sessions_at(server.url, [f"s-{number}" for number in range(12)], turns=2)
            _, seen = await asyncio.to_thread(watch_once, smg.metrics_url, program=True)
    assert "overloaded" in causes(seen)
    one, other = (seen["gateway"]["workers"][str(url.origin())] for url in urls)
    assert (one["token_usage"], other["token_usage"]) == (0.95, 0.1)
    assert one["cache_hit_rate"] == 0.75


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_endpoint_that_hangs_holds_up_neither_the_picture_nor_a_signal(
    number: signal.Signals, status: int
) -> None:
    hanging, asked = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.Response:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"smg_")  # a page that never ends
        asked.set()
        await hanging.wait()
        return web.Response()

    app = web.Application()
    app.router.add_get("/metrics", hang)
    master, slave = pty.openpty()
    async with serve(app) as url:
        process = await asyncio.create_subprocess_exec(
            *(*CLI, "watch", str(url), *FAST),
            stdin=slave,
            stdout=slave,
            stderr=PIPE,
            env=environment(TERM="xterm", COLUMNS="80", LINES="24"),
        )
        os.close(slave)
        loop = asyncio.get_running_loop()
        read = bytearray()
        await soon(asked.wait())
        while read.count(b"has not answered yet") < 3:  # the screen is redrawn
            read += await soon(loop.run_in_executor(None, os.read, master, 65536))
        process.send_signal(number)
        ended = asyncio.ensure_future(soon(process.communicate()))
        try:
            while True:
                read += await soon(loop.run_in_executor(None, os.read, master, 65536))
        except OSError:  # the other end is closed
            pass
        _, err = await ended
        hanging.set()
    os.close(master)
    assert (process.returncode, err) == (status, b"")
    left = bytes(read).rpartition(b"\x1b[?1049l")[2]  # what remains on the terminal
    assert b": the gateway has not answered yet." in left


def test_a_gateway_is_pinned_after_verify_has_proven_it(tmp_path: Path) -> None:
    with in_background(gateway("manual")) as smg:
        run = verify(tmp_path, smg.url, "--metrics", smg.metrics_url)
        assert run.status == 0, run.out
        status, seen = watch_once(smg.metrics_url)
    assert (status, causes(seen)) == (0, ["idle"]), seen["sentence"]
