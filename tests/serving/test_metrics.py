import re
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from pipeline.serving.metrics import VLLM_LORA_INFO, Metrics
from pipeline.serving.traffic import Request
from tests.conftest import ROOT

ALERTS = ROOT / "deploy/prometheus/alerts.yml"


@pytest.fixture
def registry():
    return CollectorRegistry()


def shown(registry):
    return generate_latest(registry).decode()


def test_every_metric_that_an_alert_names_is_there(registry):
    metrics = Metrics(registry)
    metrics.finished("catalog", "1", "stop", 1, 1)
    metrics.slot_waits.labels("catalog", "1").inc()
    for gauge in (metrics.wanted_version, metrics.live_version, metrics.disabled):
        gauge.labels("catalog").set(1)
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    named = {name for rule in rules for name in re.findall(r"tuneserve_\w+", rule["expr"])}
    assert len(rules) >= 5 and named and named <= set(re.findall(r"^(tuneserve_\w+)[{ ]", shown(registry), re.MULTILINE))


def test_a_forgotten_version_leaves_no_series(registry):
    metrics, vllms = Metrics(registry), Gauge(VLLM_LORA_INFO, "vLLM's own", ["running"], registry=registry)
    before = len(shown(registry))
    for version in ("1", "2"):
        metrics.used(int(version), "catalog", version)
        metrics.finished("catalog", version, "stop", 3, 4)
        metrics.slot_misses.labels("catalog", version).inc()
        metrics.http_error(Request(lora_id=int(version), served="catalog", version=version), 500)
        for timing in (metrics.first_token, metrics.engine_first_token, metrics.per_token, metrics.request):
            timing.labels("catalog", version).observe(0.1)
        vllms.labels(f"catalog/{version}").set(1)
    resident = SimpleNamespace(digest=f"{0:016x}" + "0" * 48)  # lora id 1
    metrics.forgotten(resident)
    assert 'version="1"' not in shown(registry) and 'version="2"' in shown(registry) and "catalog/" not in shown(registry)
    metrics.forgotten(SimpleNamespace(digest=f"{1:016x}" + "0" * 48))
    assert len(shown(registry)) == before


def test_an_http_error_is_its_versions_and_goes_with_it_though_nothing_was_generated(registry):
    metrics = Metrics(registry)
    before = len(shown(registry))
    metrics.http_error(Request(lora_id=1, served="catalog", version="1"), 503)
    assert 'tuneserve_http_errors_total{served="catalog",status_class="5xx",version="1"} 1.0' in shown(registry)
    metrics.forgotten(SimpleNamespace(digest=f"{0:016x}" + "0" * 48))  # lora id 1
    assert len(shown(registry)) == before
    metrics.http_error(Request(served="catalog"), 403)  # switched off: no version was chosen
    metrics.http_error(Request(), 404)
    assert 'served="catalog",status_class="4xx",version="-"' in shown(registry) and 'served="-",status_class="4xx",version="-"' in shown(registry)


def test_names_from_elsewhere_are_no_label_values(registry):
    metrics = Metrics(registry, known=lambda name: len(name) < 65)
    metrics.refused("x" * 300, "bad-name")
    metrics.state(SimpleNamespace(name="x" * 300))
    assert "xxx" not in shown(registry) and 'tuneserve_refusals_total{code="bad-name",served="-"} 1.0' in shown(registry)


def test_sync_age_is_looked_at_when_asked(registry):
    metrics, age = Metrics(registry), [None]
    metrics.watch(lambda: age[0], lambda: 3)
    assert "tuneserve_last_sync_age_seconds NaN" in shown(registry) and "tuneserve_resident_adapters 3.0" in shown(registry)
    age[0] = 1.5
    assert "tuneserve_last_sync_age_seconds 1.5" in shown(registry)
