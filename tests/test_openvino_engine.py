"""What is OpenVINO's alone: its manners as a guest, its graphs, its threads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from engine_features import every_filter, stark

from featcache import load_weights
from featcache.backbones.choice import choose_engine
from featcache.backbones.engine import build_engine
from featcache.frameworks import import_openvino, openvino_status
from featcache.preprocess import Preprocess, upscale

pytestmark = pytest.mark.skipif(openvino_status()[0] is None, reason=openvino_status()[1])


@pytest.fixture(scope="module")
def starter():
    return load_weights("tinyimagenet32")


@pytest.fixture
def engine(starter):
    return build_engine(choose_engine("openvino"), starter)


def noise(n, side=64):
    return np.random.default_rng(side).integers(0, 256, (n, side, side, 3), np.uint8)


def run_fresh(code, home):
    """Run code in a process whose home folder is empty, and where a connection is an error."""
    import os

    guard = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise AssertionError(f"{event} {arguments}")
sys.addaudithook(watch)
"""
    return subprocess.run(
        [sys.executable, "-c", guard + code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(home), "CI": ""},
    )


def test_importing_openvino_is_quiet_and_leaves_the_process_alone(tmp_path):
    answer = run_fresh(
        """
import os, signal
before = dict(os.environ)
from featcache.frameworks import import_openvino
ov = import_openvino()
assert dict(os.environ) == before
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert "CPU" in ov.Core().available_devices
import openvino_telemetry  # still there for whoever wants it
""",
        tmp_path,
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_extraction_is_quiet_and_ends_on_ctrl_c(tmp_path):
    answer = run_fresh(
        """
import os, signal, threading, time
import numpy as np
from featcache import load_weights
from featcache.backbones.choice import choose_engine
from featcache.backbones.engine import build_engine
engine = build_engine(choose_engine("openvino"), load_weights("tinyimagenet32"))
images = np.zeros((640, 64, 64, 3), np.uint8)
engine.extract(images[:1])
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        engine.extract(images)
except KeyboardInterrupt:
    print("interrupted")
assert np.isfinite(engine.extract(images[:3])["avgpool"]).all()
""",
        tmp_path,
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "interrupted\n", "")


def test_an_interrupted_call_leaves_nothing_behind(engine, monkeypatch):
    images = noise(100)
    expected = engine.extract(images)["avgpool"]
    whole = type(engine)._filled_up

    def interrupted(self, chunk):
        if chunk[0].tobytes() == images[64].tobytes():
            raise KeyboardInterrupt
        return whole(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "_filled_up", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.extract(images)
    assert np.array_equal(engine.extract(images)["avgpool"], expected)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_the_number_of_threads_changes_no_bit(starter, monkeypatch, precision):
    from featcache.frameworks import openvino_precisions

    if precision not in openvino_precisions():
        pytest.skip(f"this processor does not compute in {precision}")
    features = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("FEATCACHE_THREADS", threads)
        engine = build_engine(choose_engine("openvino", precision=precision), starter)
        assert engine.batch_size % int(threads) == 0
        features.append(engine.extract(noise(50))["avgpool"])
    assert np.array_equal(features[0], features[1]) and np.array_equal(features[0], features[2])


@pytest.mark.parametrize("side", [1, 2, 3, 31, 55])
def test_the_graph_enlarges_exactly(side):
    from featcache.backbones.openvino_input import pixels_to_input

    ov = import_openvino()
    images = stark(2, side)
    for preprocess in every_filter(56):
        pixels = ov.opset8.parameter([2, side, side, 3], np.uint8)
        x = pixels_to_input(ov.opset8, pixels, side, 2, preprocess)
        # In f32: once this thread has used a processor's matrix unit (AMX), signals are too large
        # for the stack that pytest gives them, and a later test that raises one ends the process.
        graph, hint = ov.Model([ov.opset8.result(x)], [pixels]), {"INFERENCE_PRECISION_HINT": "f32"}
        found = ov.Core().compile_model(graph, "CPU", hint)([images])[0].transpose(0, 2, 3, 1)
        assert np.array_equal(found, upscale(images, preprocess)), preprocess


def test_batches_may_be_started_before_others_end(engine):
    batches = [noise(70), noise(3, 20), noise(33), noise(40, 20)]
    expected = [engine.extract(images)["avgpool"] for images in batches]
    ends = [engine.start(images) for images in batches]
    for end, features in reversed(list(zip(ends, expected, strict=True))):
        assert np.array_equal(end()["avgpool"], features)
    assert not engine._running


def test_many_sides_take_few_graphs(engine):
    for side in range(26, 32):
        small = noise(2, side)
        features = engine.extract(small)["avgpool"]
        assert np.array_equal(features, engine.extract(upscale(small, Preprocess(64)))["avgpool"])
    assert len(engine._free) == 4


def test_a_failing_import_says_why(tmp_path):
    (tmp_path / "openvino.py").write_text("raise ImportError('broken')")
    answer = run_fresh(
        f"""
sys.path.insert(0, {str(tmp_path)!r})
from featcache.errors import EngineUnavailableError
from featcache.frameworks import import_openvino
try:
    import_openvino()
except EngineUnavailableError as error:
    print(error)
""",
        tmp_path,
    )
    assert "ImportError: broken; run pip install openvino" in answer.stdout


def test_ctrl_c_is_answered_after_engines_have_come_and_gone():
    """Each core of OpenVINO brings a stack for signals; one that was freed must not stay."""
    script = """
import gc, signal
from featcache.backbones.choice import choose_engine
from featcache.backbones.engine import build_engine
from featcache.backbones.loading import load_weights
from featcache.frameworks import openvino_precisions
weights = load_weights("tinyimagenet32")
engines = [
    build_engine(choose_engine("openvino", "cpu", one), weights)
    for one in (*openvino_precisions(), "f32")
]
while engines:
    del engines[0]
    gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("answered")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("answered\n", 0), done.stderr
