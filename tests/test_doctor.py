"""What the doctor says about engines and cores."""

from __future__ import annotations

import pytest

from featcache import doctor
from featcache.doctor import examine, images_per_s
from featcache.engines import choose_engine
from featcache.errors import EngineUnavailableError


def by_topic(findings):
    return {finding.topic: finding for finding in findings}


def test_engines_and_cores_are_named(monkeypatch):
    monkeypatch.setenv("FEATCACHE_THREADS", "3")
    found = by_topic(examine(urls=()))
    assert {"cores", "oneflow", "openvino", "engine"} <= set(found)
    assert found["cores"].detail == "3 threads, as FEATCACHE_THREADS says"
    if found["openvino"].usable:
        assert "f32" in found["openvino"].detail


def test_a_wrong_override_is_a_finding_and_no_crash(monkeypatch):
    monkeypatch.setenv("FEATCACHE_THREADS", "many")
    found = by_topic(examine(urls=()))
    assert not found["cores"].usable and "found 'many'" in found["cores"].detail


def test_what_is_measured_is_what_runs(monkeypatch):
    monkeypatch.setattr(doctor, "openvino_precisions", lambda: ("f32", "bf16"))
    contenders = [" ".join(contender) for contender in doctor._contenders({"openvino"})]
    assert contenders == ["openvino cpu f32", "openvino cpu bf16"]
    contenders = [" ".join(contender) for contender in doctor._contenders({"oneflow", "gpu"})]
    assert contenders == ["oneflow cuda f32", "oneflow cuda f16", "oneflow cpu f32"]
    assert list(doctor._contenders({"gpu"})) == []


def test_a_rate():
    try:
        choice = choose_engine(device="cpu")
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    assert images_per_s(choice, seconds=0.05) > 1


def test_an_engine_that_fails_is_a_finding():
    finding = doctor._bench("openvino", "cuda", "f32")
    assert not finding.usable and "device cuda" in finding.detail


@pytest.mark.slow
def test_the_bench():
    findings = examine(urls=(), bench=True)
    rates = [finding for finding in findings if finding.topic == "bench"]
    usable = by_topic(findings)
    assert len(rates) >= usable["oneflow"].usable + usable["openvino"].usable
    assert all(finding.usable and "images/s" in finding.detail for finding in rates)
