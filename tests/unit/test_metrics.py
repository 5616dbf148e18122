import subprocess
import sys
from importlib.machinery import BuiltinImporter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    PINS,
    ConfigError,
    PinLedger,
    PinSummary,
    RoutingConfig,
    routing_session,
    routing_trace_config,
    setup,
)
from aiohttp_smg_routing.ledger import Outcome
from aiohttp_smg_routing.testing import Recorder, answer

from ..conftest import session_server
from .test_ledger import W1, W2, by_worker, play, turn

REGISTRY = CollectorRegistry()
NOT_SEEN = ("moved", "unknown", "untagged", "failed")


def series(registry: Any) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples if "_created" not in name}


async def test_metrics_say_what_the_ledger_says(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    registry = CollectorRegistry()
    app = session_server(gateway.url, metrics="prometheus", metrics_registry=registry)
    client = await aiohttp_client(app)
    gateway.answer = by_worker(W1, W1, W1, W2)
    for session_id in ("s-1", "s-2", "s-1", "s-1"):
        assert await turn(client, session_id) == 200
    gateway.answer = lambda call: answer()
    async with client.post("/v1/chat/completions"):
        pass
    assert await turn(client, "s-3") == 200
    gateway.answer = lambda call: answer(status=500)
    assert await turn(client) == 500
    assert series(registry) == {
        'smg_routing_calls_total{outcome="first"}': 2,
        'smg_routing_calls_total{outcome="kept"}': 1,
        'smg_routing_calls_total{outcome="moved"}': 1,
        'smg_routing_calls_total{outcome="unknown"}': 1,
        'smg_routing_calls_total{outcome="untagged"}': 1,
        'smg_routing_calls_total{outcome="failed"}': 1,
        f'smg_routing_sessions{{worker="{W1}"}}': 1,
        f'smg_routing_sessions{{worker="{W2}"}}': 1,
        "smg_routing_moves_total": 1,
        "smg_routing_missing_session_total": 1,
    }
    assert "s-1" not in generate_latest(registry).decode()


async def test_a_call_that_on_missing_stops_is_counted_as_missing(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    registry = CollectorRegistry()
    app = session_server(
        gateway.url, metrics="prometheus", metrics_registry=registry, on_missing="raise"
    )
    client = await aiohttp_client(app)
    async with client.post("/v1/chat/completions") as response:
        assert response.status == 500
    assert series(registry)["smg_routing_missing_session_total"] == 1
    assert app[PINS].summary().untagged == 0


class Broken:
    """Metrics on a full disk, say: prometheus-client raises on every call."""

    def called(self, outcome: Outcome) -> None:
        raise OSError("no space left")

    def missing(self) -> None:
        raise OSError("no space left")

    def pinned(self, worker: str, change: int) -> None:
        raise OSError("no space left")


async def test_metrics_that_fail_fail_no_call_and_are_logged_once(
    gateway: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    config = RoutingConfig(gateway.url)
    pins = PinLedger(config, metrics=Broken())
    async with ClientSession(trace_configs=[routing_trace_config(config, pins)]) as session:
        gateway.answer = by_worker(W1, W1, W1)
        for session_id in ("s-1", "s-1", None):
            with routing_session(session_id):
                async with session.post(gateway.chat) as response:
                    assert response.status == 200
    assert pins.summary() == PinSummary(first=1, kept=1, untagged=1, sessions=1)
    assert caplog.text.count("further failures are not logged") == 1


def test_a_registry_that_has_other_metrics_of_these_names_is_a_fault_of_the_config(
    gateway: Recorder,
) -> None:
    registry = CollectorRegistry()
    taken = Counter("smg_routing_moves", "Not ours.", registry=registry)
    app = web.Application()
    config = {"gateway": "http://g", "metrics": "prometheus", "metrics_registry": registry}
    with pytest.raises(ConfigError, match=r"metrics_registry: .*smg_routing_moves"):
        setup(app, config)
    assert list(app) == []
    registry.unregister(taken)
    setup(app, config)


async def test_the_sessions_of_an_app_that_has_ended_are_no_longer_there(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    registry = CollectorRegistry()
    app = session_server(gateway.url, metrics="prometheus", metrics_registry=registry)
    client = await aiohttp_client(app)
    play(app[PINS], ("a", W1), ("b", W1), ("c", None))
    assert series(registry)[f'smg_routing_sessions{{worker="{W1}"}}'] == 2
    await client.close()
    assert series(registry)[f'smg_routing_sessions{{worker="{W1}"}}'] == 0
    assert app[PINS].summary() == PinSummary(first=2, unknown=1, sessions=3)
    assert app[PINS].workers() == {W1: 2}


def test_apps_that_share_a_registry_share_the_metrics(gateway: Recorder) -> None:
    apps = [
        session_server(
            gateway.url, metrics="prometheus", metrics_registry="tests.unit.test_metrics:REGISTRY"
        )
        for _ in range(2)
    ]
    for app in apps:
        play(app[PINS], ("s", W1))
    assert series(REGISTRY)[f'smg_routing_sessions{{worker="{W1}"}}'] == 2


def test_the_default_registry_is_that_of_prometheus_client(gateway: Recorder) -> None:
    from prometheus_client import REGISTRY as DEFAULT

    app = session_server(gateway.url, metrics="prometheus")
    play(app[PINS], ("s", W1))
    assert series(DEFAULT)['smg_routing_calls_total{outcome="first"}'] >= 1


def test_several_processes_add_up(tmp_path: Path) -> None:
    code = (
        "import sys; from aiohttp import web; from aiohttp_smg_routing import PINS, setup;"
        "app = web.Application(); setup(app, {'gateway': 'http://g', 'metrics': 'prometheus'});"
        "pins = app[PINS];"
        "[pins.answered(f's-{n}', 'w', pins.start()) for n in (1, 2, 2)];"
        "print('ready', flush=True); sys.stdin.read()"
    )
    processes = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", code],
            env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(tmp_path))  # type: ignore[no-untyped-call]
        assert series(registry) == {
            'smg_routing_calls_total{outcome="first"}': 6,
            'smg_routing_calls_total{outcome="kept"}': 3,
            **{f'smg_routing_calls_total{{outcome="{name}"}}': 0 for name in NOT_SEEN},
            'smg_routing_sessions{worker="w"}': 6,
            "smg_routing_moves_total": 0,
            "smg_routing_missing_session_total": 0,
        }
    finally:
        for process in processes:
            process.communicate()


def test_a_missing_prometheus_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])  # which finds no package
    monkeypatch.delitem(sys.modules, "prometheus_client")
    with pytest.raises(ConfigError, match=r"pip install 'aiohttp_smg_routing\[metrics\]'"):
        RoutingConfig("http://gateway", metrics="prometheus")
