"""Whole runs: what they leave, where they may begin, what they refuse; and the cached equal."""

from __future__ import annotations

import filecmp
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import TRAINERS, write_gaussian_cache

from featcache import extract, finetune, fit, load, load_dataset, load_head, load_weights, probe
from featcache.backbones.architectures import draw_state, get_backbone
from featcache.backbones.choice import EngineChoice
from featcache.backbones.weights import save_weights
from featcache.errors import (
    CacheMismatchError,
    CacheMissError,
    DatasetError,
    EngineUnavailableError,
    OutputError,
    RecipeError,
    WeightsError,
)
from featcache.finetuning import framework as framework_module
from featcache.finetuning.batches import CachedSource, ImageSource
from featcache.finetuning.framework import get_framework
from featcache.finetuning.recipes import METHODS, FinetuneOptions, finetune_recipe
from featcache.finetuning.trainer import Trainer
from featcache.metrics import top1
from featcache.preprocess import Preprocess

STARTER = "tinyimagenet32"


@pytest.fixture(scope="module", params=TRAINERS)
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def small(engine):
    """What makes runs small, in each engine that trains."""
    return {"weights": STARTER, "size": 32, "engine": engine}


@pytest.mark.oneflow  # the tutorial's probe runs in OneFlow
@pytest.mark.parametrize("limit", [None, 24])
def test_a_head_on_the_cache_equals_the_frozen_run_end_to_end(image_folder, limit):
    """What the project rests on: caching the four views loses nothing."""
    limit = {"train_limit": limit, "seed": 7, "epochs": 2}
    small = {"weights": STARTER, "size": 32, "engine": "oneflow"}
    made = extract(image_folder, **small, views="flips")
    cached = probe(made.cache, recipe="tutorial", check=False, **limit)
    head = load_head(cached.head)
    ran = finetune(image_folder, "frozen", **small, **limit)
    trained = load_weights(ran.checkpoint).state
    np.testing.assert_allclose(head.weight, trained["fc.weight"], atol=1e-6)
    np.testing.assert_allclose(head.bias, trained["fc.bias"], atol=1e-6)
    assert cached.top1 == ran.top1


# --- from a cached cut


@pytest.fixture(scope="module")
def cut_cache(image_folder, small, tmp_path_factory):
    """Every flip view of the colours at three cuts, by the engine that trains."""
    folder = tmp_path_factory.mktemp("cuts")
    options = {"cut": "avgpool,layer3,layer4", "views": "flips"}
    return extract(image_folder, **small, **options, output=folder).cache


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {"freeze_until": "layer3"}),
        (
            "split",
            {"freeze_until": "layer3", "augment": "flip", "patience": 3, "val_fraction": 0.34}
            | {"epochs": 2},
        ),
        ("full", {"freeze_until": "layer4", "augment": "none", "bn": "eval"}),
        ("frozen", {}),
    ],
)
def test_a_run_on_a_cached_cut_equals_the_one_on_images(
    image_folder, cut_cache, method, options, small
):
    """The same order, views and mathematics: losses and weights agree to rounding."""
    options = {"epochs": 1, "batch_size": 6, "seed": 5, "train_limit": 18, **options}
    options["test_limit"] = 6
    uncached = finetune(image_folder, method, **small, **options)
    cached = finetune(None, method, cache=cut_cache, engine=small["engine"], **options)
    assert (cached.n_train, cached.n_val) == (uncached.n_train, uncached.n_val)
    for one, other in zip(cached.epochs, uncached.epochs, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
        assert one.top1 == other.top1
    theirs, ours = load_weights(uncached.checkpoint).state, load_weights(cached.checkpoint).state
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-5, rtol=1e-4, err_msg=name)
    record = json.loads((cached.run / "run.json").read_text())
    assert record["features_wall_s"] > 0 and record["cache"] == str(cut_cache)


def test_what_a_cached_run_refuses(image_folder, cut_cache, tmp_path, small, engine):
    def refused(error, said, method="full", cache=cut_cache, **options):
        with pytest.raises(error, match=said):
            finetune(options.pop("dataset", None), method, cache=cache, engine=engine, **options)

    above = {"freeze_until": "layer3"}
    refused(RecipeError, "method full that trains all; use --freeze-until layer3")
    refused(RecipeError, "crop-flip, which has too many", augment="crop-flip", **above)
    command = f"featcache extract colours --weights {STARTER} --size 32 --cut layer2 --views flips"
    refused(CacheMissError, f"the cut 'layer2' .* make one with {command}", freeze_until="layer2")
    refused(CacheMismatchError, "preprocess size: cache 32, here 64; .*--size 64", size=64, **above)
    refused(CacheMismatchError, "expected features of digits", dataset="digits", **above)
    other = tmp_path / "other.safetensors"
    facts = {"backbone": "resnet18", "preprocess": Preprocess(32)}
    save_weights(other, draw_state(get_backbone("resnet18"), 0), **facts)
    refused(CacheMismatchError, "weights_sha256: cache 'bc5d", weights=other, **above)
    plain = extract(image_folder, **small, cut="layer3", output=tmp_path).cache
    refused(CacheMissError, "view 'hflip'.*--views flips", cache=plain, **above)
    unnamed = write_gaussian_cache(tmp_path / "unnamed.h5")
    refused(WeightsError, "name it with --weights", "frozen", cache=unnamed)


def test_a_cache_of_another_engine_is_allowed_and_said(image_folder, tmp_path, small):
    pytest.importorskip("openvino")
    options = {"cut": "layer4", "views": "flips", "engine": "openvino", "dtype": "float16"}
    made = extract(image_folder, **{**small, **options}, output=tmp_path)
    messages = []
    options = {"freeze_until": "layer4", "epochs": 1, "engine": small["engine"]}
    result = finetune(None, "full", cache=made.cache, on_note=messages.append, **options)
    _, note = messages
    assert "features by openvino" in note and "kept as float16" in note
    uncached = finetune(image_folder, "full", **{**small, **options})
    assert result.epochs[0].train_loss == pytest.approx(uncached.epochs[0].train_loss, abs=0.02)


# --- from a probe's head


def test_lp_ft_starts_at_the_probes_accuracy(image_folder, cut_cache, engine):
    probed = probe(cut_cache, scale="standardize", check=False)
    head = load_head(probed.head)
    weights = load_weights(STARTER, size=32)
    recipe = finetune_recipe("full")
    start = (head.weight, head.bias)
    trainer = Trainer(get_framework(engine), weights, 3, recipe, head=start)
    test = load_dataset(image_folder).test
    before = trainer.predict(ImageSource(test, weights.preprocess))
    np.testing.assert_array_equal(before, head.predict(load(cut_cache).test.features))
    assert top1(before, test.labels) == probed.top1
    on_cache = CachedSource({"identity": load(cut_cache).test.features}, test.labels, "avgpool")
    np.testing.assert_array_equal(trainer.predict(on_cache), before)


def test_a_run_from_a_head_begins_with_a_lower_loss(image_folder, cut_cache, small):
    head = probe(cut_cache, check=False).head
    options = {**small, "epochs": 1, "freeze_until": "layer4"}
    plain = finetune(image_folder, "full", **options)
    begun = finetune(image_folder, "full", init_head=head, **options)
    assert begun.epochs[0].train_loss < plain.epochs[0].train_loss
    assert begun.init_head == str(head)


def test_a_head_that_does_not_fit_is_refused(image_folder, cut_cache, small):
    probed = probe(cut_cache, check=False)

    def refused(said, method="full", head=probed.head, data=image_folder, **options):
        with pytest.raises(WeightsError, match=said):
            finetune(data, method, init_head=head, **{**small, **options})

    refused("preprocess size: head 32, here 64", size=64)
    refused("here random weights", "scratch")
    refused(r"classes: head 3 \('blue, green, red'\), here 10", data="digits")
    refused("scaling: head 'l2'", head=probe(cut_cache, scale="l2", check=False).head)
    refused("expected a head", head=image_folder / "nothing.safetensors")


# --- what a run leaves


@pytest.mark.parametrize("method", METHODS)
def test_a_run_and_what_it_leaves(image_folder, method, small):
    messages = []
    result = finetune(
        image_folder,
        method,
        **small,
        epochs=2,
        batch_size=12,
        train_limit=12,
        test_limit=9,
        on_progress=messages.append,
    )
    assert (result.n_train, result.n_test, len(result.epochs)) == (12, 9, 2)
    assert result.top1 == result.epochs[-1].top1
    assert result.top1_interval[0] <= result.top1 <= result.top1_interval[1]
    assert [epoch.epoch for epoch in result.epochs] == [1, 2]
    assert all(np.isfinite(epoch.train_loss) and epoch.wall_s > 0 for epoch in result.epochs)
    stages = {"hash images", "epoch 1/2", "epoch 2/2", "test images"}
    assert {message.stage for message in messages} == stages
    saved = load_weights(result.checkpoint)
    assert saved.preprocess.size == 32 and saved.state["fc.weight"].shape == (3, 512)
    record = json.loads((result.run / "run.json").read_text())
    assert record["method"] == method and record["epochs"][1]["epoch"] == 2
    assert record["weights"] == ("none" if method == "scratch" else STARTER)


def test_the_same_seed_gives_the_same_network_bit_for_bit(image_folder, small):
    def run(seed):
        options = {"epochs": 1, "seed": seed, "train_limit": 12, "batch_size": 6, "test_limit": 3}
        options["freeze_until"] = "layer2"
        result = finetune(image_folder, **small, **options)
        return load_weights(result.checkpoint).sha256

    assert run(3) == run(3) != run(4)


@pytest.mark.parametrize("cached", [False, True])
def test_the_network_is_saved_and_comes_back_as_weights(
    image_folder, cut_cache, tmp_path, cached, small
):
    saved = tmp_path / "mine" / "model.safetensors"
    options = {"freeze_until": "layer3", "epochs": 1, "save": saved, "batch_size": 12}
    if cached:
        result = finetune(None, "full", cache=cut_cache, engine=small["engine"], **options)
    else:
        result = finetune(image_folder, "full", **small, **options)
    weights = load_weights(saved)
    assert filecmp.cmp(saved, result.checkpoint, shallow=False)
    started = load_weights(STARTER).state
    for name in ("conv1.weight", "bn1.running_mean", "layer3.1.conv2.weight"):
        assert np.array_equal(weights.state[name], started[name])
    options = {"engine": small["engine"], "epochs": 1, "train_limit": 6}
    again = finetune(image_folder, "frozen", weights=saved, **options)
    assert again.recipe.backbone_lr is None and weights.preprocess.size == 32


def test_early_stopping_never_looks_at_the_test_split(image_folder, monkeypatch, small):
    from featcache.finetuning import run as _run

    data = load_dataset(image_folder)
    scores = iter([0.5, 0.75, 0.75, 0.5, 0.75])
    monkeypatch.setattr(_run, "top1", lambda predicted, labels: next(scores))
    messages = []
    options = {**small, "epochs": 9, "patience": 1, "val_fraction": 0.25, "batch_size": 16}
    options["freeze_until"] = "layer4"  # the steps are as quick as they get
    result = finetune(data, "full", **options, on_progress=messages.append)
    assert [epoch.top1 for epoch in result.epochs] == [0.5, 0.75, 0.75]
    assert (result.curve_split, result.best_epoch) == ("val", 2)
    assert (result.n_train, result.n_val, result.n_test) == (27, 9, 18)
    tests = [place for place, message in enumerate(messages) if message.stage == "test images"]
    epochs = [place for place, message in enumerate(messages) if message.stage.startswith("epoch")]
    assert min(tests) > max(epochs), "test is read once, at the end"
    two = finetune(data, "full", **{**options, "epochs": 2})
    best, theirs = load_weights(result.checkpoint).state, load_weights(two.checkpoint).state
    assert all(best[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_the_log_has_every_step_and_epoch(image_folder, small):
    options = {"epochs": 2, "batch_size": 6, "train_limit": 12, "schedule": "cosine"}
    result = finetune(image_folder, "split", **small, **options, freeze_until="layer4")
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[2]["lr"]["head"] == pytest.approx(5e-4)
    epochs = [line for line in lines if "test_top1" in line]
    assert [line["test_top1"] for line in epochs] == [epoch.top1 for epoch in result.epochs]
    config = json.loads((result.run / "config.json").read_text())
    assert config["identity"]["recipe schedule"] == "cosine"
    environment = json.loads((result.run / "environment.json").read_text())
    assert environment[small["engine"]] and environment["cores"] >= 1
    asked = {name: config["identity"][name] for name in ("engine", "device", "precision")}
    assert asked == {"engine": small["engine"], "device": "cpu", "precision": "f32"}
    assert config["engine_version"] == environment[small["engine"]]
    assert not list(result.run.glob("checkpoint*")), "a finished run needs none"


def test_tensorboard_without_its_package_is_an_error_at_once(image_folder, home, small):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(EngineUnavailableError, match="pip install tensorboard"):
            finetune(image_folder, "frozen", **small, tensorboard=True)
        assert not list(home.rglob("*-frozen-*"))
    else:
        result = finetune(image_folder, "frozen", **small, epochs=1, tensorboard=True)
        assert list(result.run.glob("events.out.tfevents.*"))


# --- which engine


def machine(monkeypatch, *, oneflow=None, torch=None, gpu=None):
    """Make a machine up: what is installed, and which engine can use its GPU."""

    def choose(engine, device="auto", precision="f32"):
        on_gpu = gpu == engine and device != "cpu"
        if device == "cuda" and not on_gpu:
            raise EngineUnavailableError(f"device cuda: {engine} has no GPU")
        here = "cuda" if on_gpu else "cpu"
        return EngineChoice(engine, "1", here, precision, f"{engine} on {here}, as asked for")

    monkeypatch.setattr(framework_module, "oneflow_status", lambda: (oneflow, "not installed"))
    monkeypatch.setattr(framework_module, "torch_status", lambda: (torch, "not installed"))
    monkeypatch.setattr(
        framework_module, "cuda_status", lambda: (gpu == "oneflow", "H100: no kernels")
    )
    monkeypatch.setattr(framework_module, "choose_engine", choose)


@pytest.mark.parametrize(
    ("there", "asked", "chosen", "why"),
    [
        ({"oneflow": "1", "torch": "1"}, (), ("torch", "cpu"), "trains faster than OneFlow"),
        ({"oneflow": "1", "torch": "1", "gpu": "oneflow"}, (), ("oneflow", "cuda"), "oneflow"),
        (
            {"oneflow": "1", "torch": "1", "gpu": "torch"},
            (),
            ("torch", "cuda"),
            "torch on cuda: it is installed",
        ),
        ({"oneflow": "1", "torch": "1", "gpu": "oneflow"}, ("auto", "cpu"), ("torch", "cpu"), ""),
        (
            {"oneflow": "1", "torch": "1", "gpu": "torch"},
            ("auto", "cuda"),
            ("torch", "cuda"),
            "torch on cuda: it is installed",
        ),
        ({"oneflow": "1", "torch": "1"}, ("auto", "cpu", "bf16"), ("torch", "cpu"), ""),
        ({"torch": "1"}, (), ("torch", "cpu"), "OneFlow is not available: not installed"),
        (
            {"oneflow": "1"},
            (),
            ("oneflow", "cpu"),
            "PyTorch trains several times faster on a CPU: pip install 'featcache[torch]'",
        ),
        ({"oneflow": "1", "torch": "1"}, ("oneflow",), ("oneflow", "cpu"), "use --engine torch"),
        ({"oneflow": "1", "gpu": "oneflow"}, (), ("oneflow", "cuda"), "oneflow on cuda"),
        ({"torch": "1"}, ("torch",), ("torch", "cpu"), "as asked for"),
    ],
)
def test_the_engine_that_trains(monkeypatch, there, asked, chosen, why):
    machine(monkeypatch, **there)
    choice = framework_module.choose_trainer(*asked)
    assert (choice.name, choice.device) == chosen and why in choice.why


@pytest.mark.parametrize(
    ("there", "asked", "error", "said"),
    [
        ({}, (), EngineUnavailableError, r"found neither .*pip install 'featcache\[torch\]'"),
        (
            {"oneflow": "1"},
            ("oneflow", "cpu", "bf16"),
            EngineUnavailableError,
            "f32 to train with oneflow .*, found bf16; use --engine torch, or --precision f32",
        ),
        (
            {"torch": "1"},
            ("torch", "cpu", "f16"),
            EngineUnavailableError,
            "expected f32 or bf16 .*, found f16; use --precision bf16",
        ),
        ({"torch": "1"}, ("auto", "cuda"), EngineUnavailableError, "torch has no GPU"),
    ],
)
def test_what_cannot_train_is_said(monkeypatch, there, asked, error, said):
    machine(monkeypatch, **there)
    with pytest.raises(error, match=said):
        framework_module.choose_trainer(*asked)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"engine": "openvino"}, RecipeError, "expected one of auto, oneflow, torch, found"),
        ({"method": "half"}, RecipeError, "full, split, frozen, scratch, found 'half'"),
        ({"epochs": 0}, RecipeError, "epochs"),
        ({"lr": 0}, RecipeError, "expected a positive number, found 0"),
        ({"batch_size": 1}, RecipeError, "at least 2, found 1"),
        ({"train_limit": 0}, DatasetError, "draw 0 of 36 images"),
        ({"train_limit": 2}, DatasetError, "draw 2 of 36 images"),
        ({"patience": 1, "val_fraction": 0.99}, DatasetError, "validation split: .* draw 35 of 36"),
        ({"size": 16}, RecipeError, "size"),
        ({"save": "model.pth"}, OutputError, "ends in .safetensors"),
    ],
)
def test_wrong_arguments(image_folder, arguments, error, said, home, small):
    with pytest.raises(error, match=said):
        finetune(image_folder, **{**small, **arguments})
    assert not list(home.rglob("*-split-*")), "found out before the work begins"


def test_more_classes_than_images(image_folder, small):
    data = load_dataset(image_folder)
    train = data.train.take(np.array([0, 12]))
    with pytest.raises(DatasetError, match="one for each of 3 classes, found 2"):
        finetune(replace(data, train=train), **small)


def test_one_class_is_an_error_of_the_data_set(image_folder, small):
    """It was an error of the recipe, and of the cache in `fit`."""
    data = load_dataset(image_folder)
    one = replace(data, train=data.train.take(np.arange(12)))
    said = "colours: expected at least 2 classes with training images, found 1"
    with pytest.raises(DatasetError, match=said):
        finetune(one, **small)
    with pytest.raises(DatasetError, match=said):
        fit(one, weights=STARTER, size=32)


def test_options_are_a_dataclass_or_keywords(image_folder, monkeypatch):
    """Each says the same; a method and changes of its recipe may stand beside the dataclass."""
    from featcache.finetuning import finetune as finetune_module

    monkeypatch.setattr(
        finetune_module, "_train", lambda processes, dataset, options, *_: (dataset, options)
    )
    options = FinetuneOptions("full", finetune_recipe("full", lr=0.1, epochs=2), seed=3)
    assert finetune("digits", "full", seed=3, lr=0.1, epochs=2) == ("digits", options)
    assert finetune("digits", options=options) == ("digits", options)
    _, longer = finetune("digits", options=options, epochs=5)
    assert longer == replace(options, recipe=replace(options.recipe, epochs=5))
    _, frozen = finetune("digits", "frozen", options=options)
    assert frozen.recipe == finetune_recipe("frozen") and frozen.seed == 3
    assert FinetuneOptions().recipe == finetune_recipe("split")
    with pytest.raises(RecipeError, match="found 'epoch'"):
        finetune("digits", epoch=3)
    with pytest.raises(TypeError, match="found both"):
        finetune("digits", options=options, seed=3)


def test_a_stopped_run_resumes_to_the_same_bytes(image_folder, small):
    """In each framework, in the middle of an epoch; test_durable_runs.py has the other ways."""

    def stop(message):
        if message.stage == "epoch 1/2" and message.done == 12:
            raise KeyboardInterrupt

    options = {"epochs": 2, "batch_size": 6, "train_limit": 18, "test_limit": 6}
    options |= {**small, "freeze_until": "layer4", "augment": "crop-flip"}
    whole = finetune(image_folder, "full", **options)
    with pytest.raises(KeyboardInterrupt, match=r"step 2 of 6: .* add --resume"):
        finetune(image_folder, "full", **options, on_progress=stop)
    resumed = finetune(image_folder, "full", **options, resume=True)
    assert resumed.resumed and resumed.epochs[1].train_loss == whole.epochs[1].train_loss
    assert load_weights(resumed.checkpoint).sha256 == load_weights(whole.checkpoint).sha256


@pytest.mark.slow
@pytest.mark.torch
def test_a_short_run_learns_digits(home):
    small = {"weights": STARTER, "size": 32, "engine": "torch"}
    made = finetune("digits", "full", **small, epochs=2, lr=0.02, augment="none", schedule="cosine")
    assert made.top1 >= 0.95
