"""What the doctor says about engines and cores."""

from __future__ import annotations

import subprocess

import pytest

from featcache import doctor
from featcache.backbones.choice import choose_engine
from featcache.doctor import examine, images_per_s
from featcache.errors import EngineUnavailableError


def by_topic(findings):
    return {finding.topic: finding for finding in findings}


def test_engines_and_cores_are_named(monkeypatch):
    monkeypatch.setenv("FEATCACHE_THREADS", "3")
    found = by_topic(examine(urls=()))
    assert {"cores", "oneflow", "openvino", "torch", "gpu", "engine"} <= set(found)
    assert found["cores"].detail == "3 threads, as FEATCACHE_THREADS says"
    if found["openvino"].usable:
        assert "f32" in found["openvino"].detail
    if found["torch"].usable:
        assert "this processor computes in f32" in found["torch"].detail
    assert ("torch gpu" in found) == found["torch"].usable


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


def test_pytorch_is_measured_on_its_gpu_and_on_the_cpu(monkeypatch):
    precisions = {"cpu": ("f32",), "cuda": ("f32", "f16")}
    monkeypatch.setattr(doctor, "torch_precisions", precisions.get)
    for device, expected in ((None, []), ("cuda", ["torch cuda f32", "torch cuda f16"])):
        monkeypatch.setattr(doctor, "torch_gpu_status", lambda device=device: (device, "a GPU"))
        contenders = [" ".join(contender) for contender in doctor._contenders({"torch"})]
        assert contenders == [*expected, "torch cpu f32"]


def test_pytorchs_gpu_is_named_with_what_it_computes_in(monkeypatch):
    monkeypatch.setattr(doctor, "torch_status", lambda: ("2.13.0", "here"))
    monkeypatch.setattr(doctor, "cuda_status", lambda: (False, "no kernels for it"))
    monkeypatch.setattr(doctor, "torch_gpu_status", lambda: ("cuda", "NVIDIA H100, 9.0"))
    monkeypatch.setattr(doctor, "torch_precisions", lambda device: ("f32", "bf16"))
    oneflow, torch = doctor._gpus()
    assert not oneflow.usable and oneflow.detail == "no kernels for it"
    assert torch.usable
    assert torch.detail == "NVIDIA H100, 9.0, as cuda, computes in f32, bf16"


@pytest.mark.torch
def test_pytorch_that_fails_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_TORCH_TRIAL", "raise SystemExit('libtorch.so: not found')")
    found = doctor._torch()
    assert not found.usable and "failed with exit code 1: libtorch.so: not found" in found.detail


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
    engines = ("oneflow", "openvino", "torch")
    assert len(rates) >= sum(usable[engine].usable for engine in engines)
    assert all(finding.usable and "images/s" in finding.detail for finding in rates)


@pytest.mark.parametrize(("alone", "warned"), [("slow\n", True), ("\n", False)])
def test_a_program_that_imports_numpy_first_is_told_what_it_loses(monkeypatch, alone, warned):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(doctor, "openblas_core_type", lambda: "Haswell")
    monkeypatch.setattr(doctor, "old_openblas", lambda: True)
    child = subprocess.CompletedProcess([], 0, alone, "")
    monkeypatch.setattr(doctor, "run_in_child", lambda code, timeout_s: child)
    detail = doctor._blas().detail
    assert "Haswell kernels are chosen for the OpenBLAS of OneFlow and of NumPy" in detail
    assert ("unless OPENBLAS_CORETYPE=Haswell is set" in detail) == warned


def test_what_numpy_computes_with_by_itself_is_looked_up():
    answer = doctor.run_in_child(doctor._BLAS_TRIAL, timeout_s=60)
    assert answer is not None and answer.stderr == ""
    assert answer.stdout in ("slow\n", "\n")
