"""deploy/: what Prometheus and Grafana are given names only what the router has."""

import json
import re
import subprocess
from typing import Any

import pytest
import yaml

from gateway.metrics import Metrics
from tests.e2e.router import ROOT
from tests.programs import program

DEPLOY = ROOT / "deploy"
OURS = {name: set(filter(None, labels.split(","))) for name, labels in Metrics().series()}
OTHERS = {"up", "process_cpu_seconds_total", "process_resident_memory_bytes"}
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text("utf-8"))
DASHBOARD = json.loads((DEPLOY / "grafana" / "gateway.json").read_text("utf-8"))


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    return found


def expressions() -> list[str]:
    shown = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [rule["expr"] for rule in rules()] + shown


def names_in(expression: str) -> set[str]:
    found = re.findall(r"\b(?:gateway|process)_[a-z_]+|\bup(?=\{)", expression)
    return {re.sub("_bucket$", "", name) for name in found}


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_series_and_labels_that_there_are(expression: str) -> None:
    names = names_in(expression)
    assert names, "it watches something"
    assert names <= {*OURS, *OTHERS}
    labels = {"le", "instance", "job"}.union(*(OURS.get(name, set()) for name in names))
    reported = re.findall(r"by \(([^)]*)\)", expression) + re.findall(r"([a-z_]+)=\"", expression)
    assert {one.strip() for part in reported for one in part.split(",")} <= labels


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_outcomes_that_there_are(rule: dict[str, Any]) -> None:
    """And each is there before it is counted: Prometheus sees no increase of what begins with 1."""
    shown = Metrics().text().decode()
    for asked in re.findall(r"gateway_[a-z_]+\{[a-z]+=\"[a-z_]+\"\}", rule["expr"]):
        assert f"\n{asked} 0.0\n" in shown, asked


def test_every_series_is_watched_by_a_rule_or_shown() -> None:
    assert set(OURS) - set().union(*map(names_in, expressions())) == set()


def test_every_rule_says_what_is_wrong_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
        reported = " ".join(rule["annotations"].values())
        own = set().union(*(OURS.get(name, set()) for name in names_in(rule["expr"])))
        for label in re.findall(r"\$labels\.([a-z]+)", reported):
            assert label in own | {"instance"}, rule["alert"]


def test_the_scrape_uses_the_admin_key_and_the_rules() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
    assert scrape["rule_files"] == ["alerts.yml"]
    (job,) = scrape["scrape_configs"]
    assert job["job_name"] == "gateway"
    # Old and new ones load it; http_headers is of Prometheus 3 alone.
    assert job["authorization"] == {"credentials_file": "/etc/prometheus/admin_api_key"}


def test_the_dashboards_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_prometheus_own_tool_finds_nothing_wrong_with_the_rules() -> None:
    command = [program("promtool"), "check", "rules", str(DEPLOY / "alerts.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alarms_fire_when_they_should_and_only_then() -> None:
    command = [program("promtool"), "test", "rules", str(ROOT / "tests" / "alerts.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
