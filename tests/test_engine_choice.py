"""Which engine is chosen, and what is said when none can be."""

from __future__ import annotations

import pytest

from featcache.backbones import choice as _choice
from featcache.backbones.choice import DEVICES, ENGINES, PRECISIONS, choose_engine
from featcache.errors import EngineUnavailableError, RecipeError


@pytest.fixture
def machine(monkeypatch):
    """Return a function that gives the machine what it names, and nothing else."""

    def have(
        *, oneflow=False, openvino=False, torch=False, gpu=False, new_gpu=None, precisions=("f32",)
    ):
        """A `gpu` is for OneFlow and PyTorch, a `new_gpu` (PyTorch's device) for PyTorch alone."""
        device = "cuda" if gpu else new_gpu
        missing = (None, "it is not installed; install it")
        monkeypatch.setattr(
            _choice, "oneflow_status", lambda: ("0.9.0", "here") if oneflow else missing
        )
        monkeypatch.setattr(
            _choice, "openvino_status", lambda: ("2026.4.1", "here") if openvino else missing
        )
        monkeypatch.setattr(
            _choice, "torch_status", lambda: ("2.13.0", "here") if torch else missing
        )
        no_kernels = "New GPU, 9.0: no kernels" if new_gpu else "no NVIDIA driver"
        monkeypatch.setattr(
            _choice, "cuda_status", lambda: (gpu, "Test GPU, 8.6" if gpu else no_kernels)
        )
        monkeypatch.setattr(_choice, "may_have_gpu", lambda: device is not None)
        monkeypatch.setattr(
            _choice,
            "torch_gpu_status",
            lambda: (device, f"{device} GPU") if torch and device else (None, "it sees no GPU"),
        )
        monkeypatch.setattr(_choice, "openvino_precisions", lambda: precisions)
        monkeypatch.setattr(
            _choice,
            "torch_precisions",
            lambda device: precisions if device == "cpu" else ("f32", "bf16", "f16"),
        )

    return have


@pytest.mark.parametrize(
    ("has", "asked", "expected"),
    [
        ({"oneflow", "openvino", "gpu"}, {}, "oneflow 0.9.0 cuda f32"),
        ({"oneflow", "openvino", "gpu"}, {"precision": "f16"}, "oneflow 0.9.0 cuda f16"),
        ({"oneflow", "openvino", "gpu"}, {"device": "cpu"}, "openvino 2026.4.1 cpu f32"),
        ({"oneflow", "openvino", "gpu"}, {"engine": "openvino"}, "openvino 2026.4.1 cpu f32"),
        ({"oneflow", "openvino"}, {}, "openvino 2026.4.1 cpu f32"),
        ({"oneflow", "openvino"}, {"engine": "oneflow"}, "oneflow 0.9.0 cpu f32"),
        ({"openvino"}, {"device": "cpu"}, "openvino 2026.4.1 cpu f32"),
        ({"oneflow"}, {}, "oneflow 0.9.0 cpu f32"),
        ({"oneflow", "openvino", "torch"}, {}, "openvino 2026.4.1 cpu f32"),
        ({"oneflow", "torch"}, {}, "torch 2.13.0 cpu f32"),
        ({"oneflow", "torch", "gpu"}, {}, "oneflow 0.9.0 cuda f32"),
        ({"oneflow", "torch", "gpu"}, {"engine": "torch"}, "torch 2.13.0 cuda f32"),
        ({"oneflow", "torch", "gpu"}, {"engine": "torch", "device": "cpu"}, "torch 2.13.0 cpu f32"),
        ({"torch", "gpu"}, {"engine": "torch", "precision": "bf16"}, "torch 2.13.0 cuda bf16"),
    ],
)
def test_what_is_chosen(machine, has, asked, expected):
    machine(**dict.fromkeys(has, True))
    choice = choose_engine(**asked)
    assert f"{choice.name} {choice.version} {choice.device} {choice.precision}" == expected
    spelt = {"oneflow": "OneFlow on", "openvino": "OpenVINO on", "torch": "PyTorch on"}
    assert choice.why.startswith(spelt[choice.name])
    assert choice.precision in choice.why and "\n" not in choice.why


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("asked", ["auto", "the device"])
def test_a_gpu_that_oneflow_cannot_use_is_pytorchs(machine, device, asked):
    machine(oneflow=True, openvino=True, torch=True, new_gpu=device)
    choice = choose_engine(device=device if asked == "the device" else "auto", precision="f16")
    assert (choice.name, choice.device) == ("torch", device)
    assert "a GPU that OneFlow cannot use: " in choice.why and f"{device} GPU" in choice.why


def test_a_gpu_that_only_pytorch_could_use_is_told_where_pytorch_is_missing(machine):
    machine(oneflow=True, openvino=True, new_gpu="cuda")
    choice = choose_engine()
    assert (choice.name, choice.device) == ("openvino", "cpu")
    assert "OneFlow: New GPU, 9.0: no kernels; PyTorch: it sees no GPU" in choice.why


def test_half_precision_where_the_processor_has_it(machine):
    machine(openvino=True, precisions=("f32", "bf16"))
    assert choose_engine(precision="bf16").precision == "bf16"
    with pytest.raises(
        EngineUnavailableError, match=r"\(f32, bf16 with OpenVINO .*use --precision bf16"
    ):
        choose_engine(precision="f16")


@pytest.mark.parametrize(
    ("has", "asked", "said"),
    [
        (set(), {}, r"found none of them; run .*openvino or .*featcache\[torch\]'"),
        (set(), {"engine": "torch"}, "engine torch: not available: it is not installed"),
        (
            {"torch"},
            {"engine": "torch", "device": "cuda"},
            "found: it sees no GPU; use --device cpu",
        ),
        ({"torch", "gpu"}, {"engine": "torch", "device": "mps"}, "use --device cuda"),
        ({"torch"}, {"precision": "bf16"}, r"\(f32 with PyTorch 2.13.0\), found bf16"),
        ({"oneflow", "torch"}, {"device": "cuda"}, "OneFlow: no NVIDIA driver; with PyTorch: it"),
        ({"oneflow", "gpu"}, {"device": "mps"}, "device mps: expected a GPU that OneFlow or"),
        ({"oneflow", "gpu"}, {"engine": "oneflow", "device": "mps"}, "use --engine torch"),
        (set(), {"engine": "oneflow"}, "engine oneflow: not available: it is not installed"),
        (set(), {"engine": "openvino"}, "engine openvino: not available: it is not installed"),
        ({"oneflow", "openvino"}, {"device": "cuda"}, "OneFlow: no NVIDIA .*; use --device cpu"),
        (
            {"oneflow", "openvino", "gpu"},
            {"engine": "openvino", "device": "cuda"},
            "use --engine auto --device cuda",
        ),
        (
            {"oneflow"},
            {"engine": "oneflow", "precision": "bf16"},
            r"expected f32 with OneFlow .* on the CPU, found bf16; run pip install",
        ),
        ({"oneflow", "openvino"}, {"engine": "oneflow", "precision": "f16"}, "use --precision f32"),
        ({"oneflow", "gpu"}, {"precision": "bf16"}, "f32 or f16 with OneFlow .* on this GPU"),
        ({"oneflow", "torch", "gpu"}, {"precision": "bf16"}, "use --engine torch --precision bf16"),
    ],
)
def test_what_cannot_be_chosen(machine, has, asked, said):
    machine(**dict.fromkeys(has, True))
    with pytest.raises(EngineUnavailableError, match=said):
        choose_engine(**asked)


def test_oneflow_names_the_engine_that_has_the_precision(machine):
    machine(oneflow=True, openvino=True, precisions=("f32", "bf16"))
    with pytest.raises(EngineUnavailableError, match="use --engine openvino --precision bf16"):
        choose_engine("oneflow", precision="bf16")


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        ({"engine": "tensorflow"}, ENGINES),
        ({"device": "tpu"}, DEVICES),
        ({"precision": "float32"}, PRECISIONS),
    ],
)
def test_words_that_mean_nothing_are_refused(asked, known):
    ((what, word),) = asked.items()
    with pytest.raises(RecipeError, match=f"{what}: .*{', '.join(known)}, found '{word}'"):
        choose_engine(**asked)


def test_this_machine():
    """Whatever it has: an engine, or an error that says what to install."""
    try:
        choice = choose_engine()
    except EngineUnavailableError as error:
        assert "pip install" in str(error)
    else:
        assert choice.name in ENGINES and choice.why
