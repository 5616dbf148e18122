"""The ledger's counts, as Prometheus scrapes them."""

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, fields
from functools import partial
from importlib.machinery import BuiltinImporter
from itertools import count
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import (
    ROUTING,
    ConfigError,
    Move,
    PinLedger,
    PinSummary,
    Routing,
    RoutingConfig,
    setup,
)
from aiohttp_smg_routing.testing import Recorder, answer
from harness.proxies import CLIENT, naive_proxy, pinned_server

from ..fresh import python
from .ledgers import (
    W1,
    W2,
    A,
    answered,
    begun,
    by_worker,
    end_in_a_thread,
    interrupted,
    is_consistent,
    play,
    read_all,
    turn,
    watched,
)

ANSWERED = ("first", "kept", "moved")
NOT_SEEN = ("moved", "unknown", "untagged", "failed")
COUNTERS = (
    "smg_routing_missing_session_total",
    "smg_routing_late_total",
    "smg_routing_unmatched_total",
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def series(registry: Any) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples if "_created" not in name}


def sessions_of(registry: CollectorRegistry) -> dict[str, float]:
    """Return the sessions of each worker that has a series."""
    return {
        sample.labels["worker"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "smg_routing_sessions"
    }


def counting(registry: CollectorRegistry, **config: Any) -> Routing:
    return Routing(RoutingConfig(A, metrics="prometheus", metrics_registry=registry, **config))


def counted_server(gateway: URL, registry: Any, **config: Any) -> web.Application:
    return pinned_server(gateway, metrics="prometheus", metrics_registry=registry, **config)


async def test_metrics_say_what_the_ledger_says(
    gateway: Recorder, aiohttp_client: AiohttpClient, registry: CollectorRegistry
) -> None:
    app = counted_server(gateway.url, registry)

    async def near_miss(request: web.Request) -> web.Response:
        async with request.app[CLIENT].post(gateway.url / "v2/chat/completions"):
            return web.Response()

    app.router.add_post("/near/{session_id}", near_miss)
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1, W1, W1, W2, W2)
    for session_id in ("s-1", "s-2", "s-1", "s-1", "s-1"):
        assert await turn(client, session_id) == 200
    gateway.answer = lambda call: answer()
    async with client.post("/v1/chat/completions"):
        pass
    async with client.post("/near/s-1") as response:
        assert response.status == 200
    assert await turn(client, "s-3") == 200
    gateway.answer = lambda call: answer(status=400)
    assert await turn(client) == 400
    assert series(registry) == {
        'smg_routing_calls_total{outcome="first"}': 2,
        'smg_routing_calls_total{outcome="kept"}': 2,
        'smg_routing_calls_total{outcome="moved"}': 1,
        'smg_routing_calls_total{outcome="unknown"}': 1,
        'smg_routing_calls_total{outcome="untagged"}': 1,
        'smg_routing_calls_total{outcome="failed"}': 1,
        f'smg_routing_sessions{{worker="{W1}"}}': 1,
        f'smg_routing_sessions{{worker="{W2}"}}': 1,
        f'smg_routing_active_sessions{{worker="{W1}"}}': 1,
        f'smg_routing_active_sessions{{worker="{W2}"}}': 1,
        f'smg_routing_worker_calls_total{{worker="{W1}"}}': 3,
        f'smg_routing_worker_calls_total{{worker="{W2}"}}': 2,
        "smg_routing_missing_session_total": 1,
        "smg_routing_late_total": 0,
        "smg_routing_unmatched_total": 1,
    }
    summary = app[ROUTING].pins.summary()
    assert (summary.missing, summary.late, summary.unmatched) == (1, 0, 1)
    assert "s-1" not in generate_latest(registry).decode()


async def test_a_call_that_on_missing_stops_is_counted_as_missing(
    gateway: Recorder, aiohttp_client: AiohttpClient, registry: CollectorRegistry
) -> None:
    app = counted_server(gateway.url, registry, on_missing="raise")
    client = await aiohttp_client(app)
    async with client.post("/v1/chat/completions") as response:
        assert response.status == 500
    assert series(registry)["smg_routing_missing_session_total"] == 1
    assert app[ROUTING].pins.summary() == PinSummary(missing=1)


@pytest.mark.parametrize(("on_late", "called"), [("warn", 1), ("pass", 1), ("raise", 0)])
async def test_a_call_after_its_request_has_ended_is_counted_as_late_beside_its_outcome(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    registry: CollectorRegistry,
    on_late: str,
    called: int,
) -> None:
    app, ended, jobs = counted_server(gateway.url, registry, on_late=on_late), asyncio.Event(), []

    async def job() -> None:
        await ended.wait()
        async with app[CLIENT].post(gateway.chat):
            pass

    async def handler(request: web.Request) -> web.Response:
        jobs.append(asyncio.create_task(job()))
        return web.Response(status=202)

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1)
    async with client.post("/s-1"):
        pass
    ended.set()
    await asyncio.wait(jobs)
    assert (jobs[0].exception() is None) == bool(called)
    assert series(registry)["smg_routing_late_total"] == 1
    assert series(registry)['smg_routing_calls_total{outcome="first"}'] == called
    assert app[ROUTING].pins.summary() == PinSummary(late=1, first=called, sessions=called)


async def test_metrics_that_fail_fail_no_call_and_are_logged_once(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left")  # as on a full disk, in multi-process mode

    app = counted_server(gateway.url, registry)
    client = await aiohttp_client(app)
    for metric, method in ((Counter, "inc"), (prometheus_client.Gauge, "set")):
        monkeypatch.setattr(metric, method, broken)
    gateway.answer = by_worker(W1, W1, W1)
    for session_id in ("s-1", "s-1"):
        assert await turn(client, session_id) == 200
    async with client.post("/v1/chat/completions") as response:
        assert response.status == 200
    assert app[ROUTING].pins.summary() == PinSummary(
        first=1, kept=1, untagged=1, missing=1, sessions=1
    )
    assert len([record for record in caplog.records if record.exc_info]) == 1


@pytest.mark.parametrize("name", ["smg_routing_calls", "smg_routing_late"])
def test_a_registry_that_has_other_metrics_of_these_names_is_a_fault_of_the_config(
    registry: CollectorRegistry, name: str
) -> None:
    taken = Counter(name, "Not ours.", registry=registry)
    app = web.Application()
    config = {"gateway": A, "metrics": "prometheus", "metrics_registry": registry}
    with pytest.raises(ConfigError, match=f"metrics_registry: .*{name}"):
        setup(app, config)
    assert list(app) == []
    registry.unregister(taken)
    setup(app, config)


# Apps that end, start again, and share a registry.


async def test_the_sessions_of_an_app_that_has_ended_are_no_longer_there(
    aiohttp_client: AiohttpClient, registry: CollectorRegistry
) -> None:
    app = counted_server(URL(A), registry)
    client = await aiohttp_client(app)
    pins = app[ROUTING].pins
    play(pins, ("a", W1), ("b", W1), ("c", None))
    assert sessions_of(registry) == {W1: 2}
    await client.close()
    assert [name for name in series(registry) if "worker=" in name] == []
    assert pins.summary() == PinSummary(first=2, unknown=1, sessions=3)
    assert pins.workers() == {W1: 2}


async def test_an_app_that_is_started_twice_shows_its_sessions_again(
    gateway: Recorder, outgoing: ClientSession, registry: CollectorRegistry
) -> None:
    app = web.Application()
    app[CLIENT] = outgoing
    app.router.add_post("/sessions/{session_id}/v1/chat/completions", naive_proxy(gateway.url))
    metrics = {"metrics": "prometheus", "metrics_registry": registry}
    setup(app, {"gateway": str(gateway.url), "client_session": CLIENT, **metrics})
    gateway.answer = by_worker(W1, W1, W1, W1)
    for started in (1, 2):
        async with TestClient(TestServer(app)) as client:
            assert sessions_of(registry) == ({W1: 1} if started == 2 else {})
            for _ in range(2):
                assert await turn(client) == 200
            assert sessions_of(registry) == {W1: 1}
        assert sessions_of(registry) == {}
    assert series(registry)['smg_routing_calls_total{outcome="kept"}'] == 3


async def test_active_sessions_are_those_of_the_apps_that_run(
    monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    one, two = counting(registry), counting(registry)
    play(one.pins, ("a", W1), ("b", W2))
    play(two.pins, ("a", W1))
    active = 'smg_routing_active_sessions{worker="%s"}'
    assert {series(registry)[active % W1], series(registry)[active % W2]} == {2, 1}
    now += 599
    play(one.pins, ("a", W1))
    now += 2  # without a call "b" ceases to be active
    assert {name: series(registry)[active % name] for name in (W1, W2)} == {W1: 1, W2: 0}
    one.pins.show(False)
    assert series(registry)[active % W1] == 0
    two.pins.show(False)
    assert not [name for name in series(registry) if "active" in name]


def test_apps_that_share_a_registry_share_the_metrics(registry: CollectorRegistry) -> None:
    routings = [counting(registry) for _ in range(3)]
    for number, routing in enumerate(routings):
        play(routing.pins, ("s", W1), ("s", (W1, W2, W2)[number]))
    assert sessions_of(registry) == {W1: 1, W2: 2}
    assert series(registry)['smg_routing_calls_total{outcome="moved"}'] == 2
    routings[0].end("s")
    play(routings[0].pins, ("t", W2))
    assert sessions_of(registry) == {W2: 3}


def unregister(registry: Any) -> None:
    for collector in list(registry._collector_to_names):
        registry.unregister(collector)


def clear(registry: Any) -> None:
    """Empty a registry as many test suites do between their tests."""
    registry._collector_to_names.clear()
    registry._names_to_collectors.clear()


@pytest.mark.parametrize("empty", [unregister, clear])
async def test_metrics_are_back_on_a_registry_that_was_emptied(
    registry: CollectorRegistry, empty: Callable[[Any], None]
) -> None:
    app = counted_server(URL(A), registry)
    play(app[ROUTING].pins, ("a", W1))
    empty(registry)
    assert series(registry) == {}
    play(app[ROUTING].pins, ("a", W1))  # it has no series any more, and nothing fails
    async with TestClient(TestServer(app)):
        assert series(registry)['smg_routing_calls_total{outcome="kept"}'] == 1
        empty(registry)
        play(counting(registry).pins, ("b", W1))
        assert sessions_of(registry) == {W1: 2}


def test_the_default_registry_is_that_of_prometheus_client() -> None:
    default = prometheus_client.REGISTRY
    before = series(default).get('smg_routing_calls_total{outcome="first"}', 0)
    pins = Routing({"gateway": A, "metrics": "prometheus"}).pins
    play(pins, ("s", W1))
    assert series(default)['smg_routing_calls_total{outcome="first"}'] == before + 1
    pins.end("s")


# The workers.


async def test_a_worker_id_that_is_not_utf_8_fails_neither_a_turn_nor_a_scrape(
    gateway: Recorder, aiohttp_client: AiohttpClient, registry: CollectorRegistry
) -> None:
    app = counted_server(gateway.url, registry)
    client = await aiohttp_client(app)
    ids = [b"w\xff\xfe", b"w\xff", "wörker".encode(), b'a"quoted\\one']
    for number, worker in enumerate(ids):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-SMG-Routed-Worker-Id: "
        gateway.answer_with(*[head + worker + b"\r\n\r\n"] * 2)
        for _ in range(2):
            assert await turn(client, f"s-{number}") == 200
    assert app[ROUTING].pins.summary() == PinSummary(first=4, kept=4, sessions=4)
    assert sessions_of(registry) == app[ROUTING].pins.workers()
    assert len(sessions_of(registry)) == len(ids)
    assert "wörker" in sessions_of(registry)


@pytest.mark.thorough
def test_workers_that_come_and_go_leave_no_series(registry: CollectorRegistry) -> None:
    pins = counting(registry, track_sessions=3).pins
    for number in range(5_000):
        play(pins, ("moves", f"http://w-{number}"), (f"pushed-out-{number}", f"http://x-{number}"))
        play(pins, ("ends", f"http://y-{number}"))
        pins.end("ends")
    assert sessions_of(registry) == pins.workers()
    assert len(pins.workers()) == 2
    assert len([name for name in series(registry) if "worker=" in name]) == 2 * 3


def test_a_late_answer_of_a_worker_that_has_no_session_any_more_leaves_no_series(
    registry: CollectorRegistry,
) -> None:
    pins = counting(registry).pins
    play(pins, ("a", W1))
    slow = begun(pins, "a")
    play(pins, ("a", W2))
    pins.answered(slow, 200, {"X-SMG-Routed-Worker-Id": W1})
    assert pins.summary() == PinSummary(first=1, kept=1, moved=1, sessions=1)
    assert [name for name in series(registry) if W1 in name] == []


def test_a_worker_of_two_apps_has_series_until_the_last_session_left_it(
    registry: CollectorRegistry,
) -> None:
    one, two = counting(registry).pins, counting(registry).pins
    for pins in (one, two):
        play(pins, ("s", W1), ("s", W1))
    one.show(False)
    assert series(registry)[f'smg_routing_worker_calls_total{{worker="{W1}"}}'] == 4
    assert sessions_of(registry) == {W1: 1}
    two.end("s")
    play(two, ("s", W2))
    assert sessions_of(registry) == {W2: 1}


def test_calls_of_each_worker_show_a_skew_that_its_sessions_do_not(
    registry: CollectorRegistry,
) -> None:
    pins = counting(registry).pins
    play(pins, *[("busy", W1)] * 90, *[("quiet", W2)] * 10, ("quiet", None))
    assert sessions_of(registry) == {W1: 1, W2: 1}
    values = series(registry)
    assert values[f'smg_routing_worker_calls_total{{worker="{W1}"}}'] == 90
    assert values[f'smg_routing_worker_calls_total{{worker="{W2}"}}'] == 10


# A scrape at any moment.


def test_a_session_that_ended_unseen_is_gone_at_the_next_call(registry: CollectorRegistry) -> None:
    """An ``end()`` from a finalizer may take effect only then."""
    pins = counting(registry).pins
    play(pins, ("a", W1), ("b", W2))
    pins.end("a")
    play(pins, ("b", W2))
    assert sessions_of(registry) == {W2: 1}


def scraping(pins: PinLedger, registry: CollectorRegistry) -> Callable[[], object]:
    play(pins, ("a", W1), ("b", W2))
    return lambda: list(registry.collect())


def moving(pins: PinLedger, registry: CollectorRegistry) -> Callable[[], object]:
    play(pins, ("a", W1))
    return partial(answered, begun(pins, "a"), W2)


def stopping(pins: PinLedger, registry: CollectorRegistry) -> Callable[[], object]:
    play(pins, ("a", W1), ("b", W2))
    return partial(pins.show, False)


@pytest.mark.thorough
@pytest.mark.parametrize("prepare", [scraping, moving, stopping])
@pytest.mark.parametrize("enter", [lambda pins: pins.end("a"), end_in_a_thread, read_all])
def test_the_ledger_may_be_entered_again_while_metrics_are_written_and_scraped(
    prepare: Callable[[PinLedger, CollectorRegistry], Callable[[], object]],
    enter: Callable[[PinLedger], object],
) -> None:
    def check() -> None:
        # -1 interrupts nothing, because Python 3.12 traces code from the second run.
        for at in count(-1, 7):  # one point in seven, because prometheus-client has many
            registry = CollectorRegistry()
            pins = counting(registry).pins
            if not interrupted(prepare(pins, registry), at, partial(enter, pins)):
                break
            pins.show(True)
            play(pins, ("b", W2))
            assert is_consistent(pins)
            assert sessions_of(registry) == pins.workers()
        assert at > 10

    watched(check)


def test_scrapes_in_another_thread_see_whole_numbers(registry: CollectorRegistry) -> None:
    pins, done = counting(registry).pins, threading.Event()

    def scrape() -> None:
        while not done.is_set():
            assert set(sessions_of(registry)) <= {W1, W2}

    def work(number: int) -> None:
        for place in range(500):
            play(pins, (f"s-{number}-{place % 3}", (W1, W2)[place % 2]))
            pins.end(f"s-{number}-{place % 5}")

    with ThreadPoolExecutor(4) as pool:
        scraping = pool.submit(scrape)
        try:
            list(pool.map(work, range(3)))
        finally:
            done.set()
        scraping.result()
    values = series(registry)
    outcomes = [values[f'smg_routing_calls_total{{outcome="{name}"}}'] for name in ANSWERED]
    assert sum(outcomes) == 1_500
    assert sessions_of(registry) == pins.workers()


# Processes.

STRICT = ("-W", "error")


SERVE = """
    import asyncio, sys
    from aiohttp import ClientSession, web
    from aiohttp.test_utils import TestClient, TestServer
    from aiohttp_smg_routing import ROUTING, setup
    from aiohttp_smg_routing.testing import completion, recording_gateway

    async def main():
        async with recording_gateway() as gateway, ClientSession() as session:
            gateway.answer = lambda call: completion(worker="w")
            async def handler(request):
                async with session.post(gateway.chat) as answer:
                    return web.Response(body=await answer.read())
            app = web.Application()
            app[web.AppKey("client", ClientSession)] = session
            app.router.add_post("/{session_id}", handler)
            setup(app, {"gateway": str(gateway.url), "client_session": "client"})
            async with TestClient(TestServer(app)) as client:
                for _ in range(2):
                    async with client.post("/s-1") as response:
                        assert response.status == 200
            assert app[ROUTING].pins.summary().kept == 1

    asyncio.run(main())
"""


def test_without_metrics_nothing_is_registered_and_prometheus_client_is_not_imported() -> None:
    look = """
        print(sorted(name for name in sys.modules if "prometheus" in name))
        import prometheus_client
        print("smg_routing" in prometheus_client.generate_latest().decode())
    """
    assert python(textwrap.dedent(SERVE) + textwrap.dedent(look), *STRICT) == "[]\nFalse\n"


def test_without_metrics_no_extra_is_needed() -> None:
    block = """
        import sys
        sys.modules["prometheus_client"] = None  # to import it is an ImportError
    """
    assert python(textwrap.dedent(block) + textwrap.dedent(SERVE), *STRICT) == ""


def test_a_disabled_config_registers_nothing(registry: CollectorRegistry) -> None:
    counting(registry, enabled=False)
    assert series(registry) == {}


def test_several_processes_add_up(tmp_path: Path) -> None:
    code = """
        import sys
        from aiohttp_smg_routing import Routing
        from aiohttp_smg_routing.ledger import PendingCall
        pins = Routing({"gateway": "http://g", "metrics": "prometheus"}).pins
        for name in ("s-1", "s-2", "s-2"):
            call = PendingCall(pins, "X-SMG-Routing-Key", name, "http://g", name)
            pins.answered(call, 200, {"X-SMG-Routed-Worker-Id": "w"})
        print("ready", flush=True)
        sys.stdin.read()
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    processes = [
        subprocess.Popen(  # noqa: S603
            argv,
            env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(tmp_path))  # type: ignore[no-untyped-call]
        assert series(registry) == {
            'smg_routing_calls_total{outcome="first"}': 4,
            'smg_routing_calls_total{outcome="kept"}': 2,
            **{f'smg_routing_calls_total{{outcome="{name}"}}': 0 for name in NOT_SEEN},
            'smg_routing_sessions{worker="w"}': 4,
            'smg_routing_worker_calls_total{worker="w"}': 6,
            **dict.fromkeys(COUNTERS, 0),
        }
    finally:
        for process in processes:
            process.communicate()


def test_where_prometheus_client_can_remove_no_series_a_worker_that_is_gone_has_no_sessions(
    tmp_path: Path,
) -> None:
    """This is multi-process mode, as in docs/monitoring.md. prometheus-client must not warn."""
    code = """
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector
        from aiohttp_smg_routing import Routing
        from aiohttp_smg_routing.ledger import PendingCall
        pins = Routing({"gateway": "http://g", "metrics": "prometheus"}).pins
        for worker in ("w-1", "w-1", "w-2"):
            call = PendingCall(pins, "X-SMG-Routing-Key", "s", "http://g", "s")
            pins.answered(call, 200, {"X-SMG-Routed-Worker-Id": worker})
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        print(generate_latest(registry).decode())
    """
    printed = python(code, *STRICT, env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
    lines = [line for line in printed.splitlines() if "worker=" in line]
    assert sorted(lines) == [
        'smg_routing_sessions{worker="w-1"} 0.0',
        'smg_routing_sessions{worker="w-2"} 1.0',
        'smg_routing_worker_calls_total{worker="w-1"} 2.0',
        'smg_routing_worker_calls_total{worker="w-2"} 1.0',
    ]


def test_no_series_is_removed_in_multi_process_mode(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each attempt would warn, and warnings are errors here."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    pins = counting(registry).pins
    play(pins, ("s", W1), ("s", W2))
    pins.show(False)
    assert sessions_of(registry) == {W1: 0, W2: 0}


def test_a_missing_prometheus_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])  # finds no installed package
    monkeypatch.delitem(sys.modules, "prometheus_client")
    with pytest.raises(ConfigError, match=r"pip install 'aiohttp_smg_routing\[metrics\]'"):
        RoutingConfig("http://gateway", metrics="prometheus")


@pytest.mark.parametrize(
    "shown", [Move("s-1", W1, W2, 3), PinSummary()], ids=["Move", "PinSummary"]
)
def test_what_the_ledger_shows_can_not_be_changed(shown: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(shown, fields(shown)[0].name, 4)
    assert not hasattr(shown, "__dict__")
