"""promtool accepts the alert rules and the dashboard, and the pages document what they read."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import ROUTING
from aiohttp_smg_routing.testing import Recorder, completion
from harness.processes import ROOT, finished
from harness.proxies import pinned_server

from ..monitoring import (
    ALERT_TESTS,
    ALERTS,
    DASHBOARD,
    DOCS,
    GATEWAY_LOOKALIKE,
    OURS,
    OUTCOMES,
    PAGE,
    PAGES,
    expressions,
    label_values,
    queries,
    series,
)
from ..programs import program


def promtool(*args: str | Path) -> str:
    """Run promtool and return what it printed; it must succeed."""
    argv = (program("promtool", "prometheus"), *map(str, args))
    env = {"GOGC": "400"}  # it has memory to spare, and collects garbage less often
    done = finished(ROOT, *argv, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.thorough
def test_promtool_takes_every_alert_rule() -> None:
    promtool("check", "rules", DOCS / "alerts.yml")


@pytest.mark.thorough
def test_every_alert_fires_when_it_should_and_not_otherwise() -> None:
    promtool("test", "rules", DOCS / "alerts_test.yml")


@pytest.mark.thorough
def test_clusters_stay_apart_where_the_rules_have_a_cluster_label(tmp_path: Path) -> None:
    """The rules' comment says how. One cluster has no SMG gateway, another a wrong policy."""
    before, alerts = ALERTS.split("- record: job:")
    assert before.count("sum(") == 5
    (tmp_path / "alerts.yml").write_text(
        before.replace("sum(", "sum by (cluster) (") + "- record: job:" + alerts
    )
    sent = 'smg_routing_calls_total{job="servers",outcome="unknown",cluster="%s"}'
    routed = 'smg_worker_selection_total{job="gateway",policy="%s",cluster="%s"}'
    used = 'smg_manual_policy_branch_total{job="gateway",branch="occupied_hit",cluster="%s"}'
    series = [
        *(sent % each for each in ("good", "wrong", "vllm-router")),
        *(routed % each for each in (("manual", "good"), ("round_robin", "wrong"))),
        used % "good",
    ]
    firing = 'ALERTS{alertname="SmgRoutingKeyIgnored", alertstate="firing", cluster="wrong", '
    case = {
        "interval": "1m",
        "input_series": [{"series": each, "values": "0+100x40"} for each in series],
        "promql_expr_test": [
            {
                "expr": 'ALERTS{alertname=~"SmgRoutingKey.*"}',
                "eval_time": "30m",
                "exp_samples": [{"labels": firing + 'severity="critical"}', "value": 1}],
            }
        ],
    }
    file = tmp_path / "clusters_test.yml"
    document = {"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": [case]}
    file.write_text(json.dumps(document))
    promtool("test", "rules", file)


def test_every_alert_has_a_test_each_way_and_says_what_to_do() -> None:
    alerts = re.findall(r"- alert: (\w+)", ALERTS)
    assert len(alerts) == len(set(alerts)) == 11
    fires = set(re.findall(r'ALERTS\{alertname="(\w+)", alertstate="firing", ', ALERT_TESTS))
    silent = set(
        re.findall(r"- alertname: (\w+)\n +eval_time: \w+\n +exp_alerts: \[\]", ALERT_TESTS)
    )
    assert fires == silent == set(alerts)
    assert ALERTS.count("summary: ") == ALERTS.count("description: ") == len(alerts)
    assert [alert for alert in alerts if f"| `{alert}` | " not in PAGE] == []


@pytest.mark.thorough
def test_promtool_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": name, "expr": expr} for name, expr in expressions()]
    assert [rule for rule in rules if "$" in rule["expr"]] == []
    file = tmp_path / "dashboard.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"SUCCESS: {len(rules)} rules found" in promtool("check", "rules", file)


@pytest.mark.thorough
def test_figures_about_pins_say_that_workers_are_not_named_in_place_of_a_figure(
    tmp_path: Path,
) -> None:
    """When the gateway names no worker, the ledger can't tell a move from a kept session."""
    exprs = dict(expressions())
    stats = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] == "stat"}
    figures = {"Kept share": 0.9, "Sessions pinned": 40, "Workers with a session": 1, "Moves": 50}

    def case(values: Mapping[str, str], expected: Mapping[str, float | None]) -> dict[str, object]:
        series = 'smg_routing_calls_total{job="j",instance="i",outcome="%s"}'
        inputs = [{"series": series % each, "values": values.get(each, "0x9")} for each in OUTCOMES]
        if "kept" in values:
            pinned = 'smg_routing_sessions{job="j",instance="i",worker="w"}'
            inputs.append({"series": pinned, "values": "40x9"})
        tests = [
            {
                "expr": exprs[f"panel_{stats[title]['id']}_A"],
                "eval_time": "9m",
                "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
            }
            for title, value in expected.items()
        ]
        return {"interval": "1m", "input_series": inputs, "promql_expr_test": tests}

    named = {"kept": "0+90x9", "moved": "0+10x9"}
    cases = [
        case({"unknown": "0+100x9"}, dict.fromkeys(figures, -1)),
        case(named, figures),
        case({**named, "unknown": "0+100x9"}, figures),  # only some gateways name workers
        case({}, {"Kept share": None, "Moves": 0}),
    ]
    file = tmp_path / "dashboard_test.yml"
    file.write_text(json.dumps({"evaluation_interval": "1m", "tests": cases}))
    promtool("test", "rules", file)
    for title in figures:
        [mapping] = stats[title]["fieldConfig"]["defaults"]["mappings"]
        assert mapping["options"]["-1"]["text"] == "workers not named"


def test_the_dashboard_imports_anywhere() -> None:
    assert [entry["name"] for entry in DASHBOARD["__inputs"]] == ["DS_PROMETHEUS"]
    assert DASHBOARD["id"] is None
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    used = {panel["type"] for panel in panels} - {"row"}
    assert used == {need["id"] for need in DASHBOARD["__requires"] if need["type"] == "panel"}
    charts = [panel for panel in panels if panel["type"] != "row"]
    asking = [target for chart in charts for target in chart["targets"]]
    asking += DASHBOARD["templating"]["list"]
    for part in [*charts, *asking]:
        assert part["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    assert [chart["title"] for chart in charts if not chart["description"]] == []


def test_no_panel_lies_over_another() -> None:
    cells = [
        (place["x"] + column, place["y"] + line)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for column in range(place["w"])
        for line in range(place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) == 23


def test_alerts_dashboard_and_docs_name_the_series_of_the_plugin_and_no_other() -> None:
    named = re.findall(r"\bsmg_routing_\w+", queries() + PAGES)
    assert set(named) - {GATEWAY_LOOKALIKE} == OURS
    on_dashboard = "\n".join(expr for _, expr in expressions())
    assert series(on_dashboard) >= OURS
    assert label_values("outcome") <= OUTCOMES


async def test_the_plugin_serves_the_series_that_the_page_names_in_the_way_that_it_shows(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    app = pinned_server(gateway.url, metrics="prometheus")
    exec(snippet, {"app": app, "web": web})  # noqa: S102 - it is our own page
    client = await aiohttp_client(app)
    gateway.answer = lambda call: completion(worker="http://w")
    async with client.post("/sessions/s-1/v1/chat/completions", json={}) as response:
        assert response.status == 200
    async with client.get("/metrics") as response:
        assert response.status == 200
        assert response.content_type == "text/plain"
        served = list(text_string_to_metric_families(await response.text()))
    samples = {sample.name: sample for family in served for sample in family.samples}
    ours = {name for name in samples if name.startswith("smg_routing_")}
    assert {name for name in ours if not name.endswith("_created")} == OURS
    assert samples["smg_routing_sessions"].labels == {"worker": "http://w"}
    outcomes = [
        sample.labels["outcome"]
        for family in served
        for sample in family.samples
        if sample.name == "smg_routing_calls_total"
    ]
    assert set(outcomes) == OUTCOMES
    app[ROUTING].end("s-1")  # the whole process shares the registry


def test_the_page_tells_what_each_series_and_outcome_counts() -> None:
    rows = re.findall(r"^\| `(\w+)(?:\{\w+\})?` \| ", PAGE, re.MULTILINE)
    alerts = re.findall(r"- alert: (\w+)", ALERTS)
    assert set(rows) == OURS | OUTCOMES | set(alerts)
