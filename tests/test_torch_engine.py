"""What is PyTorch's alone: its network, its passes, its memory, and its manners as a guest."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest
from engine_features import every_filter, noise, random_weights, stark

from featcache import frameworks as probe
from featcache import load_weights
from featcache.backbones.architectures import BACKBONES, CUTS, get_backbone
from featcache.backbones.choice import choose_engine
from featcache.backbones.engine import build_engine
from featcache.errors import EngineUnavailableError, RecipeError
from featcache.frameworks import torch_gpu_status, torch_precisions, torch_status
from featcache.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, apply_view, upscale

needs_torch = pytest.mark.torch


@pytest.fixture(scope="module")
def starter():
    return load_weights("tinyimagenet32")


@pytest.fixture(scope="module")
def engine(starter):
    return build_engine(choose_engine("torch", "cpu"), starter, CUTS)


def made(starter, cuts=CUTS, **more):
    from featcache.backbones.torch_engine import TorchEngine

    return TorchEngine(starter, cuts, **more)


@needs_torch
@pytest.mark.parametrize("name", BACKBONES)
def test_the_network_has_torchvisions_names_and_shapes(name):
    from featcache.backbones.torch_engine import build_backbone, load_backbone, state_arrays

    backbone = get_backbone(name)
    network = build_backbone(backbone)
    shapes = {key: array.shape for key, array in state_arrays(network).items()}
    assert list(shapes.items()) == list(backbone.shapes().items())
    weights = random_weights(name, 64)
    load_backbone(network, {**weights.state, "fc.bias": np.zeros(3, np.float32)})
    network.to(memory_format=__import__("torch").channels_last)
    arrays = state_arrays(network)
    for key, array in weights.state.items():
        assert np.array_equal(arrays[key], array) and arrays[key].flags.c_contiguous, key
    arrays["conv1.weight"][...] = 0  # a copy
    assert state_arrays(network)["conv1.weight"].any()


@needs_torch
def test_features_are_the_plain_networks(engine, starter):
    """Folded, joined and cast, the network is still the one that trains."""
    import torch

    from featcache.backbones.torch_engine import build_backbone, load_backbone
    from featcache.backbones.torch_input import to_input

    network = build_backbone(get_backbone("resnet18"))
    load_backbone(network, starter.state)
    with torch.inference_mode():
        expected = network.eval()(to_input(noise(5), starter.preprocess, "cpu")).numpy()
    np.testing.assert_allclose(engine.extract(noise(5))["avgpool"], expected, atol=2e-5)


@needs_torch
@pytest.mark.parametrize("size", [64, 100])
@pytest.mark.parametrize("side", [1, 31, 64])
def test_the_input_is_the_canonical_pixels_normalised(side, size):
    import torch

    from featcache.backbones.torch_input import to_input

    images = apply_view(noise(2, side), "hvflip")
    preprocess = Preprocess(size)
    x = to_input(images, preprocess, "cpu")
    expected = (upscale(images, preprocess) / 255 - np.array(IMAGENET_MEAN)) / np.array(
        IMAGENET_STD
    )
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)


@needs_torch
@pytest.mark.parametrize("side", [1, 2, 3, 31, 55])
def test_small_images_are_enlarged_exactly(side):
    from featcache.backbones.torch_input import to_input

    images = stark(2, side)
    for preprocess in every_filter(56):
        found = to_input(images, preprocess, "cpu").permute(0, 2, 3, 1).numpy()
        assert np.array_equal(found, upscale(images, preprocess)), preprocess


@needs_torch
def test_an_input_made_for_features_serves_training_too():
    """What is kept between calls bears no mark of the mode that it was made in."""
    import torch

    from featcache.backbones.torch_input import to_input

    preprocess = Preprocess(77)
    with torch.inference_mode():
        to_input(noise(2, 50), preprocess, "cpu")
    weight = torch.ones(1, 3, 1, 1, requires_grad=True)
    (to_input(noise(2, 50), preprocess, "cpu") * weight).sum().backward()
    assert weight.grad is not None


@needs_torch
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_the_number_of_threads_changes_no_bit(starter, monkeypatch, precision):
    if precision not in torch_precisions("cpu"):
        pytest.skip(f"this processor does not compute in {precision}")
    features = []
    for threads in ("1", "3"):
        monkeypatch.setenv("FEATCACHE_THREADS", threads)
        engine = made(starter, precision=precision)
        assert engine.batch_size == 32 * int(threads) * 4
        features.append(engine.extract(noise(70)))
    assert all(np.array_equal(features[0][cut], features[1][cut]) for cut in CUTS)


@needs_torch
def test_the_process_keeps_its_number_of_threads(starter):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        made(starter).extract(noise(3))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@needs_torch
def test_layers_one_by_one_give_the_same(engine, starter, monkeypatch):
    """Where this build of PyTorch has no joined convolution, it goes without."""
    from featcache.backbones import torch_engine as _torch_graph

    assert _torch_graph.joins_convolutions(__import__("torch").float32)
    monkeypatch.setattr(_torch_graph, "joins_convolutions", lambda dtype: False)
    expected = engine.extract(noise(3))
    for cut, array in made(starter).extract(noise(3)).items():
        np.testing.assert_allclose(array, expected[cut], atol=1e-4)


@needs_torch
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_the_joined_convolution_is_tried_before_it_is_trusted(monkeypatch, precision):
    import torch

    from featcache.backbones import torch_engine as _torch_graph

    dtype, trial = _torch_graph.dtype_of(precision), _torch_graph.joins_convolutions.__wrapped__
    assert trial(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(_torch_graph, "_joined", lambda x, conv, relu, shortcut: shortcut)
        assert not trial(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not trial(dtype)

    def gone(conv):
        raise AttributeError("no such operator")

    monkeypatch.setattr(_torch_graph, "_pack", gone)
    assert not trial(dtype)


@needs_torch
def test_an_interrupted_call_leaves_nothing_behind(starter, monkeypatch):
    engine = made(starter, ("avgpool",))
    expected = engine.extract(noise(100))["avgpool"]
    network, calls = engine._passes._network, []

    def interrupted(pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return network(pixels)

    monkeypatch.setattr(engine._passes, "_network", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.extract(noise(100))
    assert np.array_equal(engine.extract(noise(100))["avgpool"], expected)


@needs_torch
def test_passes_one_after_the_other_give_the_same_bytes(engine, starter):
    """As on a GPU, which has no thread for each core."""
    passes = made(starter)._passes
    passes._threads = None
    images = noise(70)
    expected = engine.extract(images)
    features = {cut: np.empty_like(array) for cut, array in expected.items()}
    passes.run(images, features)
    assert all(np.array_equal(features[cut], expected[cut]) for cut in CUTS)


@pytest.fixture
def little_memory(monkeypatch):
    """Let passes of more than so many images fail as CUDA's memory fails."""
    import torch

    from featcache.backbones import torch_engine as _torch

    class Forward(_torch.Forward):
        most = 8

        def __call__(self, pixels):
            if len(pixels) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return super().__call__(pixels)

    monkeypatch.setattr(_torch, "Forward", Forward)
    return Forward


@needs_torch
def test_little_memory_halves_the_pass_and_says_so_once(engine, starter, little_memory):
    notes = []
    small = made(starter, on_note=notes.append)
    for _ in range(2):
        features = small.extract(noise(50))
        expected = engine.extract(noise(50))
        for cut in CUTS:
            np.testing.assert_allclose(features[cut], expected[cut], atol=1e-4)
    assert notes == [
        "cpu: too little memory for 32 images at once; going on with half as many, or fewer"
    ]
    assert small._per_pass == 8


@needs_torch
def test_no_memory_for_one_image_is_an_error(starter, little_memory):
    little_memory.most = 0
    with pytest.raises(
        EngineUnavailableError, match=r"found OutOfMemoryError: CUDA out of .*--dev"
    ):
        made(starter).extract(noise(3))


@needs_torch
def test_a_device_that_fails_is_an_error_of_ours(starter, monkeypatch):
    engine = made(starter)

    def fail(images, features):
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_…")

    monkeypatch.setattr(engine._passes, "run", fail)
    with pytest.raises(RuntimeError, match="launch failure"):
        engine.extract(noise(3))  # on the CPU that is a bug
    engine._device = "cuda"
    with pytest.raises(
        EngineUnavailableError,
        match="expected cuda to compute, found RuntimeError: CUDA error: unspecified launch "
        "failure; run featcache doctor, or use --device cpu",
    ):
        engine.extract(noise(3))


@needs_torch
def test_many_images_on_a_gpu_are_worth_compiling_for(monkeypatch):
    from featcache.backbones.torch_engine import _is_to_compile

    many = 2_000_000 * 224 * 224
    assert _is_to_compile("cuda", many)
    assert not _is_to_compile("cuda", 60_000 * 224 * 224)
    assert not _is_to_compile("cpu", many) and not _is_to_compile("mps", many)
    monkeypatch.setenv("FEATCACHE_COMPILE", "1")
    assert _is_to_compile("cuda", 1) and _is_to_compile("mps", 1) and not _is_to_compile("cpu", 1)
    monkeypatch.setenv("FEATCACHE_COMPILE", "0")
    assert not _is_to_compile("cuda", many)
    monkeypatch.setenv("FEATCACHE_COMPILE", "yes")
    with pytest.raises(RecipeError, match="FEATCACHE_COMPILE: expected 0 or 1, found 'yes'"):
        _is_to_compile("cpu", 0)


@needs_torch
def test_what_cannot_be_compiled_runs_layer_by_layer(engine, starter, monkeypatch):
    from featcache.backbones import torch_engine as _torch

    class Forward(_torch.Forward):
        def __init__(self, *facts, compiled):
            super().__init__(*facts, compiled=False)
            self.fails = compiled

        def __call__(self, pixels):
            if self.fails:
                raise ValueError("no C compiler\nand more")
            return super().__call__(pixels)

    monkeypatch.setattr(_torch, "Forward", Forward)
    monkeypatch.setattr(_torch, "_is_to_compile", lambda device, n_pixels: True)
    notes = []
    slow = made(starter, on_note=notes.append)
    assert "compiles the network" in notes[0]
    assert notes[1].endswith("the network, and runs it layer by layer: no C compiler")
    assert np.array_equal(slow.extract(noise(3))["layer3"], engine.extract(noise(3))["layer3"])


@pytest.mark.slow
@needs_torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its compiler's own, of its JIT
def test_the_network_compiles_as_a_whole(engine, starter):
    """For the CPU; what a GPU gains by it has never been tried."""
    import torch

    from featcache.backbones.torch_engine import Forward

    torch.compiler.reset()
    forward = Forward(starter, CUTS, "cpu", "f32", compiled=True)
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            images = noise(4, seed=seed)
            expected = engine.extract(images)
            for cut, result in zip(CUTS, forward(torch.from_numpy(images)), strict=True):
                np.testing.assert_allclose(result.numpy(), expected[cut], atol=1e-4)
    assert torch._dynamo.utils.counters["graph_break"] == {}


def run_fresh(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@needs_torch
def test_importing_torch_is_quiet_and_leaves_the_process_alone():
    answer = run_fresh("""
import os, signal, threading
before = dict(os.environ)
from featcache.frameworks import import_torch
torch = import_torch()
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert threading.active_count() == 1
assert torch.ones(2).sum().item() == 2
""")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


@needs_torch
def test_extraction_is_quiet_and_ends_on_ctrl_c():
    answer = run_fresh("""
import os, signal, threading
import numpy as np
from featcache import load_weights
from featcache.backbones.choice import choose_engine
from featcache.backbones.engine import build_engine
engine = build_engine(choose_engine("torch", "cpu"), load_weights("tinyimagenet32"))
images = np.zeros((640, 64, 64, 3), np.uint8)
engine.extract(images[:1])
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        engine.extract(images)
except KeyboardInterrupt:
    print("interrupted")
assert np.isfinite(engine.extract(images[:3])["avgpool"]).all()
""")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "interrupted\n", "")


@needs_torch
def test_a_failing_import_says_why(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")
    answer = run_fresh(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from featcache.errors import EngineUnavailableError
from featcache.frameworks import import_torch
try:
    import_torch()
except EngineUnavailableError as error:
    print(error)
""")
    assert "ImportError: broken; run pip install 'featcache[torch]'" in answer.stdout


# What follows needs no PyTorch: it is about machines that this one is not.


@pytest.fixture
def child(monkeypatch):
    """Return a function that sets what the trial on the GPU ends with."""
    monkeypatch.setattr(probe, "torch_status", lambda: ("2.13.0", "here"))
    monkeypatch.setattr(probe, "may_have_gpu", lambda: True)
    probe._torch_trial.cache_clear()

    def ends(answer):
        monkeypatch.setattr(probe, "run_in_child", lambda code, timeout_s: answer)

    yield ends
    probe._torch_trial.cache_clear()


def printed(**facts):
    nothing = {"build": "CUDA 12.8", "device": None, "gpus": [], "precisions": [], "problem": ""}
    said = f"a warning\nfound {json.dumps({**nothing, **facts})}\n"
    return subprocess.CompletedProcess([], 0, said, "")


def test_a_gpu_is_named_with_what_it_computes_in(child):
    gpus = ["NVIDIA H100 80GB HBM3, 9.0", "NVIDIA H100 80GB HBM3, 9.0"]
    child(printed(device="cuda", gpus=gpus, precisions=["f32", "bf16", "f16"]))
    assert torch_gpu_status() == ("cuda", "; ".join(gpus))
    assert torch_precisions("cuda") == ("f32", "bf16", "f16")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (printed(build="no CUDA and no ROCm"), r"torch 2.13.0 \(no CUDA and no ROCm\): it sees no"),
        (printed(problem="driver too old"), r"\(CUDA 12.8\): driver too old"),
        (
            printed(device="cuda", gpus=["Old GPU, 3.5"], problem="no kernel image"),
            r"Old GPU, 3.5: torch 2.13.0 \(CUDA 12.8\): no kernel image",
        ),
        (subprocess.CompletedProcess([], -6, "", "Aborted\n"), "failed with exit code -6: Aborted"),
        (None, "no answer within 120 s"),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why(child, answer, said):
    import re

    child(answer)
    device, why = torch_gpu_status()
    assert device is None and re.search(said, why) and "\n" not in why


@needs_torch
def test_the_trial_runs_on_this_machine():
    """Whatever it has."""
    from featcache.process import run_in_child

    answer = run_in_child(probe._TRIAL, timeout_s=120)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.rpartition("found ")[2])
    assert found["device"] in (None, "cuda", "mps")
    assert bool(found["precisions"]) == bool(found["device"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"avx512_bf16"}, ("f32", "bf16")), ({"amx_bf16"}, ("f32", "bf16")), ({"avx2"}, ("f32",))],
)
def test_the_processor_says_what_it_computes_in(monkeypatch, flags, expected):
    monkeypatch.setattr(probe, "processor_flags", lambda: frozenset(flags))
    assert torch_precisions("cpu") == expected


@pytest.mark.parametrize(
    ("version", "usable"),
    [("2.13.0+cu128", True), ("2.4.0", True), ("2.3.1", False), ("1.13.1", False)],
)
def test_a_release_that_is_too_old_is_refused(monkeypatch, version, usable):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    found, why = torch_status()
    assert found == (version if usable else None)
    assert usable or why == (
        f"expected torch 2.4 or newer, found {version}; run pip install 'featcache[torch]'"
    )


def test_a_machine_without_torch_names_the_extra(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(EngineUnavailableError, match=r"run pip install 'featcache\[torch\]'"):
        probe.import_torch.__wrapped__()
    with pytest.raises(EngineUnavailableError, match=r"run pip install 'featcache\[torch\]'"):
        choose_engine("torch")
