"""What a step does: what moves, at which rate, in which mode."""

from __future__ import annotations

import math
import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from conftest import TRAINERS
from PIL import Image

from featcache import load_dataset, load_weights
from featcache.backbones.architectures import draw_state, get_backbone
from featcache.datasets.dataset import Split
from featcache.datasets.images import ArrayImages
from featcache.errors import RecipeError
from featcache.finetuning.batches import CachedSource, Draw, ImageSource
from featcache.finetuning.framework import get_framework
from featcache.finetuning.recipes import (
    AUGMENTATIONS,
    FINETUNE_RECIPES,
    METHODS,
    FinetuneOptions,
    finetune_recipe,
    group_rates,
    rate_factor,
)
from featcache.finetuning.trainer import Trainer

STARTER = "tinyimagenet32"
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


@pytest.fixture(scope="module")
def starter():
    """The starter weights at 32 pixels, where a step takes a tenth of a second."""
    weights = load_weights(STARTER)
    return replace(weights, preprocess=replace(weights.preprocess, size=32))


@pytest.fixture(scope="module")
def colours(image_folder, starter):
    """Six images of each of three classes."""
    train = load_dataset(image_folder).train
    return ImageSource(train.take(np.arange(0, len(train), 2)), starter.preprocess)


@pytest.fixture(scope="module", params=TRAINERS)
def framework(request):
    return get_framework(request.param)


@pytest.fixture(scope="module")
def trainer_of(framework, starter):
    """Make a trainer of a method, with changes to its recipe, in each framework."""

    def make(method, options=None, **changes):
        recipe = finetune_recipe(method, **{"batch_size": 9, **changes})
        return Trainer(framework, starter, 3, recipe, **(options or {}))

    return make


def train(trainer, source, epoch=0, n_steps=None):
    """Train for an epoch, or so many steps of it; return the steps."""
    taken = []
    with closing(trainer.steps(source, epoch)) as steps:
        for step in steps:
            taken.append(step)
            if len(taken) == n_steps:
                break
    return taken


def changed(before, after):
    """Return the names of the tensors that are not the same bytes."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def stage_of(name):
    first = name.partition(".")[0]
    return {"fc": "head", "conv1": "stem", "bn1": "stem"}.get(first, first)


def is_statistic(name):
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


# --- the schedule, against closed forms


@pytest.mark.parametrize("warmup", [0, 7, 0.25])
def test_rates_per_step_are_the_closed_forms(warmup):
    n = 40
    rise = {0: 0, 7: 7, 0.25: 10}[warmup]
    for schedule, formula in (
        ("constant", lambda t: 1.0),
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        ("step", lambda t: 0.1 ** ((t >= 0.5) + (t >= 0.75))),
    ):
        recipe = finetune_recipe("full", schedule=schedule, warmup=warmup)
        expected = [
            (step + 1) / rise if step < rise else formula((step - rise) / (n - rise))
            for step in range(n)
        ]
        found = [rate_factor(recipe, step, n) for step in range(n)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert max(found) == 1.0


def test_a_warm_up_longer_than_the_run_rises_to_its_end():
    recipe = finetune_recipe("full", warmup=100)
    assert [rate_factor(recipe, step, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_layer_decay_multiplies_per_stage_below_the_head():
    rates = group_rates(finetune_recipe("full", lr=0.1, layer_decay=0.5))
    assert list(rates) == ["head", "layer4", "layer3", "layer2", "layer1", "stem"]
    np.testing.assert_allclose(list(rates.values()), [0.1 * 0.5**k for k in range(6)])


def test_lr_keeps_the_proportion_of_the_method():
    assert finetune_recipe("split", lr=0.1).backbone_lr == pytest.approx(0.01)
    assert finetune_recipe("full", lr=0.1).backbone_lr == pytest.approx(0.1)
    assert finetune_recipe("split", lr=0.1, backbone_lr=0.5).backbone_lr == 0.5
    assert finetune_recipe("frozen", lr=0.1).backbone_lr is None
    assert [finetune_recipe(method) for method in METHODS] == list(FINETUNE_RECIPES.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.0}, "head lr: expected a positive number, found 0"),
        ({"lr": float("nan")}, "head lr"),
        ({"backbone_lr": -1.0}, "backbone lr"),
        ({"batch_size": 1}, "batch size: expected at least 2, found 1"),
        ({"epochs": 0}, "epochs"),
        ({"schedule": "linear"}, "one of constant, cosine, step, found 'linear'"),
        ({"augment": "mixup"}, "one of tutorial, flip, none, crop-flip"),
        ({"bn": "frozen"}, "one of train, eval"),
        ({"lora": 0}, "lora: expected a rank of at least 1, found 0"),
        ({"layer_decay": 0.0}, "layer decay"),
        ({"warmup": 2.5}, "whole number of steps"),
        ({"warmup": -1}, "whole number of steps"),
        ({"label_smoothing": 1.0}, "label smoothing"),
        ({"patience": 0}, "patience"),
        ({"val_fraction": 1.0}, "val fraction"),
        ({"colour": 1}, "found 'colour'"),
        ({"method": "frozen", "freeze_until": "layer1"}, "frozen as a whole"),
        ({"method": "frozen", "backbone_lr": 1.0}, "use --method split"),
        ({"method": "scratch", "freeze_until": "layer1"}, "a random draw"),
        ({"method": "frozen", "lora": 4}, "lora: expected a pretrained backbone"),
    ],
)
def test_values_that_mean_nothing(changes, said):
    with pytest.raises(RecipeError, match=said):
        finetune_recipe(changes.pop("method", "full"), **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"freeze_until": "layer5"},
            "freeze until: .* layer1, layer2, layer3, layer4",
        ),
        ({"lora": 4}, "lora: expected a library's model with linear layers, found resnet18"),
    ],
)
def test_what_a_resnet_does_not_have(changes, said):
    with pytest.raises(RecipeError, match=said):
        FinetuneOptions("full", finetune_recipe("full", **changes))


# --- sources and augmentations


def numbered_images(n=5, side=8):
    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    labels = np.arange(n, dtype=np.int64) % 2
    return pixels, Split(ArrayImages(pixels), labels, ("a", "b"), tuple(map(str, range(n))))


def test_an_image_source_flips_and_shifts_as_drawn(starter):
    pixels, split = numbered_images()
    source = ImageSource(split, starter.preprocess)
    rows = np.array([3, 0, 1, 2])
    views = np.array([0, 1, 2, 3])
    (flipped,) = source.batches([Draw(rows, views)], "tutorial")
    expected = [pixels[3], pixels[0][:, ::-1], pixels[1][::-1], pixels[2][::-1, ::-1]]
    np.testing.assert_array_equal(flipped, expected)
    shifts = np.array([[1.0, 0.0], [0.0, -1.0], [0.2, -0.2], [-1.0, 1.0]])
    (moved,) = source.batches([Draw(rows, np.zeros(4, np.int64), shifts)], "crop-flip")
    np.testing.assert_array_equal(moved[0][1:], pixels[3][:-1])  # an eighth of 8 is one pixel
    assert not moved[0][0].any(), "what comes in is black"
    np.testing.assert_array_equal(moved[1][:, :-1], pixels[0][:, 1:])
    np.testing.assert_array_equal(moved[2], pixels[1])
    np.testing.assert_array_equal(moved[3][:-1, 1:], pixels[2][1:, :-1])


def test_a_cached_source_takes_each_row_from_its_view():
    rows = np.arange(6, dtype=np.float16)[:, None] * [[10, 10]]
    views = {"identity": rows, "hflip": rows + 1}
    source = CachedSource(views, np.arange(6), "avgpool", np.array([5, 3, 1]))
    assert len(source) == 3 and source.labels.tolist() == [5, 3, 1]
    (batch,) = source.batches([Draw(np.array([2, 0]), np.array([1, 0]))], "flip")
    assert batch.dtype == np.float32 and batch[:, 0].tolist() == [11.0, 50.0]
    (batch,) = source.batches([Draw(np.array([1]))])
    assert batch[0, 0] == 30.0


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_every_augmentation_trains_on_every_image_once(trainer_of, colours, augment):
    trainer = trainer_of("frozen", augment=augment, batch_size=6)
    steps = train(trainer, colours)
    assert [step.n_seen for step in steps] == [6, 12, 18]
    assert all(math.isfinite(step.loss) for step in steps)


# --- what moves


def test_frozen_means_frozen(trainer_of, colours):
    """No parameter and no buffer of the backbone moves by a bit; the head does."""
    trainer = trainer_of("frozen")
    before = trainer.network.state()
    train(trainer, colours)
    assert changed(before, trainer.network.state()) == {"fc.weight", "fc.bias"}
    assert all(parameter.grad is None for parameter in trainer.network.backbone.parameters())


@pytest.mark.parametrize("method", ["split", "scratch"])
def test_everything_else_trains_everything(trainer_of, colours, method):
    trainer = trainer_of(method)
    before = trainer.network.state()
    train(trainer, colours, n_steps=2)
    assert changed(before, trainer.network.state()) == set(before)


@pytest.mark.parametrize("stage", ["layer1", "layer4"])
def test_freeze_until_freezes_that_stage_and_all_before_it(trainer_of, colours, stage):
    trainer = trainer_of("full", freeze_until=stage)
    before = trainer.network.state()
    train(trainer, colours, n_steps=2)
    frozen = STAGES[: STAGES.index(stage) + 1]
    moved = {name for name in before if stage_of(name) not in frozen}
    assert changed(before, trainer.network.state()) == moved
    for name, parameter in trainer.network.backbone.named_parameters():
        assert parameter.requires_grad == (stage_of(name) not in frozen), name
        assert parameter.grad is None or parameter.requires_grad, name


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_statistics_move_in_bn_train_alone(trainer_of, colours, bn):
    trainer = trainer_of("full", bn=bn)
    before = trainer.network.state()
    train(trainer, colours, n_steps=2)
    moved = changed(before, trainer.network.state())
    statistics = {name for name in before if is_statistic(name)}
    assert moved & statistics == (statistics if bn == "train" else set())
    assert moved >= set(before) - statistics, "weight and bias of the normalisation train"


def test_every_epoch_trains_in_train_mode_and_evaluation_changes_nothing(trainer_of, colours):
    """The tutorial's loop stays in eval mode after its first evaluation."""
    trainer = trainer_of("split")
    for epoch in range(2):
        before = trainer.network.state()
        train(trainer, colours, epoch, n_steps=1)
        moved = changed(before, trainer.network.state())
        assert {name for name in before if is_statistic(name)} <= moved
        before = trainer.network.state()
        trainer.predict(colours)
        assert changed(before, trainer.network.state()) == set()


@pytest.mark.parametrize("method", METHODS)
def test_each_parameter_is_in_exactly_one_group_at_its_rate(trainer_of, method):
    trainer = trainer_of(method)
    recipe = FINETUNE_RECIPES[method]
    rate_of = {}
    for group in trainer.optimizer.param_groups:
        parameters = getattr(group, "parameters", None) or group["params"]  # OneFlow's, PyTorch's
        for parameter in parameters:
            assert id(parameter) not in rate_of, "a parameter in two groups moves twice"
            rate_of[id(parameter)] = group["lr"]
            assert group["momentum"] == 0.9 and group["weight_decay"] == 5e-4
    network = trainer.network
    heads = {id(parameter): recipe.head_lr for parameter in network.head.parameters()}
    bodies = {id(parameter): recipe.backbone_lr for parameter in network.backbone.parameters()}
    assert rate_of == (heads if method == "frozen" else {**heads, **bodies})


def test_the_optimizer_gets_the_rates_of_the_schedule(trainer_of, colours):
    recipe = {"schedule": "cosine", "warmup": 2, "layer_decay": 0.5, "epochs": 2, "batch_size": 9}
    trainer = trainer_of("full", **recipe)
    base = group_rates(finetune_recipe("full", **recipe))
    with closing(trainer.steps(colours, 1)) as steps:
        for step in steps:
            factor = rate_factor(finetune_recipe("full", **recipe), step.step - 1, 4)
            assert step.rates == {name: rate * factor for name, rate in base.items()}
            set_rates = [group["lr"] for group in trainer.optimizer.param_groups]
            assert set_rates == list(step.rates.values())
    assert step.step == 4


def test_a_split_step_moves_each_part_by_its_own_rate(trainer_of, colours):
    """The first SGD step is rate x gradient, so that ten times the rate moves ten times as far."""

    def moves(**rates):
        trainer = trainer_of("split", momentum=0.0, **rates)
        before = trainer.network.state()
        train(trainer, colours, n_steps=1)
        after = trainer.network.state()
        return {name: after[name] - before[name] for name in ("conv1.weight", "fc.weight")}

    split_moves, full_moves = moves(), moves(backbone_lr=1e-3)
    np.testing.assert_allclose(split_moves["fc.weight"], full_moves["fc.weight"], rtol=1e-3)
    ratio = np.linalg.norm(full_moves["conv1.weight"]) / np.linalg.norm(split_moves["conv1.weight"])
    assert ratio == pytest.approx(10, rel=0.02)


def test_where_a_network_starts(trainer_of, starter):
    """Scratch from a draw that is the same everywhere, all else from the weights: to the bit."""
    for method, start in (
        ("scratch", draw_state(get_backbone("resnet18"), 0)),
        ("full", starter.state),
    ):
        state = trainer_of(method).network.state()
        head = {name: state[name] for name in ("fc.weight", "fc.bias")}
        assert not changed(state, {**start, **head})


def test_a_random_backbone_is_he_inits():
    shapes = get_backbone("resnet50").shapes()
    state = draw_state(get_backbone("resnet50"), 3)
    assert {name: array.shape for name, array in state.items()} == shapes
    for name in ("conv1.weight", "layer4.1.conv2.weight", "layer2.0.downsample.0.weight"):
        outputs, _, kernel, _ = shapes[name]
        assert state[name].std() == pytest.approx((2 / (outputs * kernel**2)) ** 0.5, rel=0.03)
        assert abs(state[name].mean()) < 0.05 * state[name].std()
    assert state["bn1.weight"].all() and state["bn1.running_var"].all()
    assert not state["bn1.bias"].any() and state["bn1.num_batches_tracked"].shape == ()
    other = draw_state(get_backbone("resnet50"), 4)
    assert not np.array_equal(other["conv1.weight"], state["conv1.weight"])


def test_label_smoothing_is_the_mean_over_classes(trainer_of, colours):
    share, rows = 0.3, np.arange(len(colours))
    trainer = trainer_of("frozen", label_smoothing=share, batch_size=18, augment="none")
    (pixels,) = colours.batches([Draw(rows)])
    x = trainer.network.to_device(pixels, None)
    scores = trainer.network.scores(x, None).detach().numpy().astype(np.float64)
    logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    own, all_classes = -logs[rows, colours.labels].mean(), -logs.mean()
    (step,) = train(trainer, colours)
    assert step.loss == pytest.approx((1 - share) * own + share * all_classes, abs=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_update(trainer_of, colours):
    trainer = trainer_of("full", lr=1e30, backbone_lr=1e30)
    said = r"epoch 1/3: expected a finite loss, found (nan|inf) at step 2 of 6 \(.*: head 1e\+30"
    with pytest.raises(RecipeError, match=said):
        train(trainer, colours)


def test_the_state_of_a_trainer_goes_to_another_one_bit_for_bit(trainer_of, colours):
    def steps_of(trainer, first, count):
        with closing(trainer.steps(colours, 0, first)) as steps:
            return [next(steps).loss for _ in range(count)]

    one, other = trainer_of("full"), trainer_of("full")
    steps_of(one, 0, 1)
    kept = one.arrays()
    copies = {name: array.copy() for name, array in kept.items()}
    other.load_arrays(kept)
    assert steps_of(one, 1, 1) == steps_of(other, 1, 1)
    assert not changed(kept, copies), "what was loaded is the caller's own"
    assert not changed(one.arrays(), other.arrays())
    assert any(name.startswith("optimizer.") for name in one.arrays())


def test_a_trainer_without_momentum_has_no_state_of_its_optimizer(trainer_of, colours):
    trainer = trainer_of("frozen", momentum=0.0)
    train(trainer, colours, n_steps=1)
    assert not any(name.startswith("optimizer.") for name in trainer.arrays())
    trainer.load_arrays(trainer.arrays())


@pytest.mark.torch
def test_bfloat16_trains_close_to_float32_and_keeps_float32(starter, colours):
    framework = get_framework("torch")
    losses = []
    for precision in ("f32", "bf16"):
        recipe = finetune_recipe("split", batch_size=9, freeze_until="layer3")
        trainer = Trainer(framework, starter, 3, recipe, precision=precision)
        losses.append([step.loss for step in train(trainer, colours)])
        assert {array.dtype.name for array in trainer.arrays().values()} == {"float32", "int64"}
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], atol=0.05)


def test_compact_pixels_stand_for_canonical_ones(starter):
    """Flips commute with enlarging, so that small pixels may travel."""
    pixels, split = numbered_images(side=16)
    source = ImageSource(split, starter.preprocess)
    (batch,) = source.batches([Draw(np.arange(5), np.full(5, 3))], "tutorial")
    assert batch.shape == (5, 16, 16, 3)
    small = Image.fromarray(pixels[0][::-1, ::-1])
    from featcache.preprocess import upscale

    (large,) = upscale(batch[:1], starter.preprocess)
    np.testing.assert_array_equal(large, starter.preprocess.pixels(small))


def test_training_in_two_threads_leaves_the_threads_of_blas_alone(trainer_of, colours):
    """Limits that overlapped once put back what the other had set: one thread for good."""
    from threadpoolctl import threadpool_info, threadpool_limits

    def blas():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    trainers = [trainer_of("frozen", batch_size=6) for _ in range(2)]
    with threadpool_limits(2, user_api="blas"):
        before = blas()
        threads = [threading.Thread(target=train, args=(one, colours)) for one in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert blas() == before


@pytest.mark.oneflow
def test_oneflow_never_shares_memory_with_numpy():
    """It lets go of a shared array in a thread that needs Python's lock: at exit, too late."""
    from pathlib import Path

    import featcache
    from featcache.backbones.oneflow_engine import to_device

    numbers = np.arange(6, dtype=np.int64).reshape(2, 3).T
    tensor = to_device(numbers, "cpu")
    assert not np.shares_memory(tensor.numpy(), numbers)
    np.testing.assert_array_equal(tensor.numpy(), numbers)
    for path in Path(featcache.__file__).parent.rglob("*.py"):
        assert "flow.from_numpy(" not in path.read_text("utf-8"), path
