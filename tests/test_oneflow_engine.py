"""What is OneFlow's alone: its own forward pass, its graph, and its manners as a guest."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from engine_features import every_filter, stark
from PIL import Image

from featcache import load_weights
from featcache.backbones.choice import choose_engine
from featcache.backbones.engine import build_engine
from featcache.preprocess import upscale

pytestmark = pytest.mark.oneflow


@pytest.fixture(scope="module")
def starter():
    return load_weights("tinyimagenet32")


@pytest.fixture(scope="module")
def engine(starter):
    return build_engine(choose_engine("oneflow", "cpu"), starter)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


def test_real_images_agree_closely_with_an_independent_framework(engine, starter, reference):
    """Ten times closer than the contract asks of others: this one is the reference."""
    files, expected = reference
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    pixels = starter.preprocess.batch(opened)
    assert abs(engine.extract(pixels)["avgpool"] - expected).max() <= 1e-5


@pytest.mark.parametrize("side", [1, 2, 3, 31, 55])
def test_small_images_are_enlarged_exactly(side):
    from featcache.backbones.oneflow_engine import to_input

    images = stark(2, side)
    for preprocess in every_filter(56):
        found = to_input(images, preprocess, "cpu").numpy().transpose(0, 2, 3, 1)
        expected = upscale(images, preprocess)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)  # divided by 255 and back


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_the_rest_of_the_family(name):
    """A checkpoint is judged by the shapes that the network really has."""
    from featcache.backbones.architectures import get_backbone
    from featcache.backbones.oneflow_engine import build_backbone, state_arrays

    backbone = get_backbone(name)
    built = {key: value.shape for key, value in state_arrays(build_backbone(backbone)).items()}
    assert built == backbone.shapes()
    assert list(built) == list(backbone.shapes())


def run_fresh(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_oneflow_is_quiet_and_leaves_the_process_alone():
    answer = run_fresh("""
import os, signal
before = dict(os.environ)
from featcache.frameworks import import_oneflow
import_oneflow()
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
import oneflow as flow
assert flow.ones(2).sum().item() == 2
try:
    os.kill(os.getpid(), signal.SIGINT)
    import time; time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
""")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "interrupted\n", "")


def test_a_failing_import_says_why(tmp_path):
    (tmp_path / "oneflow.py").write_text(
        "import os\nos.write(2, b'libcudnn.so.8: cannot open\\n')\nraise ImportError('broken')"
    )
    answer = run_fresh(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from featcache.errors import EngineUnavailableError
from featcache.frameworks import import_oneflow
try:
    import_oneflow()
except EngineUnavailableError as error:
    print(error)
""")
    assert "ImportError: broken | libcudnn.so.8: cannot open; run featcache doctor" in answer.stdout


def test_the_blas_kernels_are_chosen_before_the_import():
    answer = run_fresh("""
import builtins, os
from unittest import mock
seen = {}
real = builtins.__import__
def watch(name, *rest, **more):
    if name == "oneflow" and not seen:
        seen["core"] = os.environ.get("OPENBLAS_CORETYPE")
    return real(name, *rest, **more)
from featcache.frameworks import import_oneflow
from featcache.process import openblas_core_type
os.environ.pop("OPENBLAS_CORETYPE", None)
with mock.patch("builtins.__import__", watch):
    import_oneflow()
assert seen["core"] == openblas_core_type(), seen
assert "OPENBLAS_CORETYPE" not in os.environ
""")
    assert answer.returncode == 0, answer.stderr
