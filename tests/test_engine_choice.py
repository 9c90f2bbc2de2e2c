"""Which engine is chosen, and what is said when none can be."""

from __future__ import annotations

import pytest

from featcache.engines import DEVICES, ENGINES, PRECISIONS, _choice, choose_engine
from featcache.errors import EngineUnavailableError, RecipeError


@pytest.fixture
def machine(monkeypatch):
    """Return a function that gives the machine what it names, and nothing else."""

    def have(*, oneflow=False, openvino=False, gpu=False, precisions=("f32",)):
        missing = (None, "it is not installed; install it")
        monkeypatch.setattr(
            _choice, "oneflow_status", lambda: ("0.9.0", "here") if oneflow else missing
        )
        monkeypatch.setattr(
            _choice, "openvino_status", lambda: ("2026.4.1", "here") if openvino else missing
        )
        monkeypatch.setattr(
            _choice, "cuda_status", lambda: (gpu, "Test GPU, 8.6" if gpu else "no NVIDIA driver")
        )
        monkeypatch.setattr(_choice, "openvino_precisions", lambda: precisions)

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
    ],
)
def test_what_is_chosen(machine, has, asked, expected):
    machine(**dict.fromkeys(has, True))
    choice = choose_engine(**asked)
    assert f"{choice.name} {choice.version} {choice.device} {choice.precision}" == expected
    assert choice.why.startswith("OneFlow on" if choice.name == "oneflow" else "OpenVINO on")
    assert choice.precision in choice.why and "\n" not in choice.why


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
        (set(), {}, r"found neither; run pip install 'featcache\[openvino\]'"),
        (set(), {"engine": "oneflow"}, "engine oneflow: not available: it is not installed"),
        (set(), {"engine": "openvino"}, "engine openvino: not available: it is not installed"),
        ({"oneflow", "openvino"}, {"device": "cuda"}, "found: no NVIDIA driver; use --device cpu"),
        (
            {"oneflow", "openvino", "gpu"},
            {"engine": "openvino", "device": "cuda"},
            "use --engine oneflow --device cuda",
        ),
        (
            {"oneflow"},
            {"engine": "oneflow", "precision": "bf16"},
            r"expected f32 with OneFlow .* on the CPU, found bf16; run pip install",
        ),
        ({"oneflow", "openvino"}, {"engine": "oneflow", "precision": "f16"}, "use --precision f32"),
        ({"oneflow", "gpu"}, {"precision": "bf16"}, "f32 or f16 with OneFlow .* on this GPU"),
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
        ({"engine": "torch"}, ENGINES),
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
