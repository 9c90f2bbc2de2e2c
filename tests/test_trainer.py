"""What a step does: what moves, at which rate, in which mode; and the swapped convolution."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from featcache import load_dataset, load_weights
from featcache.datasets import ArrayImages, Split
from featcache.errors import RecipeError
from featcache.recipe import AUGMENTATIONS, FINETUNE_RECIPES, METHODS, finetune_recipe
from featcache.training import (
    CachedSource,
    Draw,
    ImageSource,
    Trainer,
    group_rates,
    rate_factor,
)

STARTER = "tinyimagenet32"
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
needs_oneflow = pytest.mark.oneflow


@pytest.fixture(scope="module")
def starter():
    """The starter weights at 32 pixels, where a step takes a tenth of a second."""
    weights = load_weights(STARTER)
    return replace(weights, preprocess=replace(weights.preprocess, size=32))


@pytest.fixture(scope="module")
def colours(image_folder, starter):
    return ImageSource(load_dataset(image_folder).train, starter.preprocess)


def trainer_of(method, weights, **changes):
    return Trainer(weights, 3, finetune_recipe(method, **{"batch_size": 16, **changes}))


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
        ({"freeze_until": "layer5"}, "one of layer1, layer2, layer3, layer4"),
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
    ],
)
def test_values_that_mean_nothing(changes, said):
    with pytest.raises(RecipeError, match=said):
        finetune_recipe(changes.pop("method", "full"), **changes)


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


@needs_oneflow
@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_every_augmentation_trains_on_every_image_once(starter, colours, augment):
    trainer = trainer_of("frozen", starter, augment=augment, batch_size=12)
    steps = train(trainer, colours)
    assert [step.n_seen for step in steps] == [12, 24, 36]
    assert all(math.isfinite(step.loss) for step in steps)


# --- what moves


@needs_oneflow
def test_frozen_means_frozen(starter, colours):
    """No parameter and no buffer of the backbone moves by a bit; the head does."""
    trainer = trainer_of("frozen", starter)
    before = trainer.network.state()
    train(trainer, colours)
    assert changed(before, trainer.network.state()) == {"fc.weight", "fc.bias"}
    assert all(parameter.grad is None for parameter in trainer.network.backbone.parameters())


@needs_oneflow
@pytest.mark.parametrize("method", ["full", "split", "scratch"])
def test_everything_else_trains_everything(starter, colours, method):
    trainer = trainer_of(method, starter)
    before = trainer.network.state()
    train(trainer, colours, n_steps=2)
    assert changed(before, trainer.network.state()) == set(before)


@needs_oneflow
@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3", "layer4"])
def test_freeze_until_freezes_that_stage_and_all_before_it(starter, colours, stage):
    trainer = trainer_of("full", starter, freeze_until=stage)
    before = trainer.network.state()
    train(trainer, colours, n_steps=2)
    frozen = STAGES[: STAGES.index(stage) + 1]
    moved = {name for name in before if stage_of(name) not in frozen}
    assert changed(before, trainer.network.state()) == moved
    for name, parameter in trainer.network.backbone.named_parameters():
        assert (parameter.grad is None) == (stage_of(name) in frozen), name


@needs_oneflow
@pytest.mark.parametrize("bn", ["train", "eval"])
def test_statistics_move_in_bn_train_alone(starter, colours, bn):
    trainer = trainer_of("full", starter, bn=bn)
    before = trainer.network.state()
    train(trainer, colours, n_steps=2)
    moved = changed(before, trainer.network.state())
    statistics = {name for name in before if is_statistic(name)}
    assert moved & statistics == (statistics if bn == "train" else set())
    assert moved >= set(before) - statistics, "weight and bias of the normalisation train"


@needs_oneflow
def test_every_epoch_trains_in_train_mode_and_evaluation_changes_nothing(starter, colours):
    """The tutorial's loop stays in eval mode after its first evaluation."""
    trainer = trainer_of("split", starter)
    for epoch in range(2):
        before = trainer.network.state()
        train(trainer, colours, epoch, n_steps=1)
        moved = changed(before, trainer.network.state())
        assert {name for name in before if is_statistic(name)} <= moved
        before = trainer.network.state()
        trainer.predict(colours)
        assert changed(before, trainer.network.state()) == set()


@needs_oneflow
@pytest.mark.parametrize("method", METHODS)
def test_each_parameter_is_in_exactly_one_group_at_its_rate(starter, method):
    trainer = trainer_of(method, starter)
    recipe = FINETUNE_RECIPES[method]
    rate_of = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group.parameters:
            assert id(parameter) not in rate_of, "a parameter in two groups moves twice"
            rate_of[id(parameter)] = group["lr"]
            assert group["momentum"] == 0.9 and group["weight_decay"] == 5e-4
    network = trainer.network
    heads = {id(parameter): recipe.head_lr for parameter in network.head.parameters()}
    bodies = {id(parameter): recipe.backbone_lr for parameter in network.backbone.parameters()}
    assert rate_of == (heads if method == "frozen" else {**heads, **bodies})


@needs_oneflow
def test_the_optimizer_gets_the_rates_of_the_schedule(starter, colours):
    recipe = {"schedule": "cosine", "warmup": 2, "layer_decay": 0.5, "epochs": 2, "batch_size": 9}
    trainer = trainer_of("full", starter, **recipe)
    base = group_rates(finetune_recipe("full", **recipe))
    with closing(trainer.steps(colours, 1)) as steps:
        for step in steps:
            factor = rate_factor(finetune_recipe("full", **recipe), step.step - 1, 8)
            assert step.rates == {name: rate * factor for name, rate in base.items()}
            set_rates = [group["lr"] for group in trainer.optimizer.param_groups]
            assert set_rates == list(step.rates.values())
    assert step.step == 8


@needs_oneflow
def test_a_split_step_moves_each_part_by_its_own_rate(starter, colours):
    """The first SGD step is rate x gradient, so that ten times the rate moves ten times as far."""

    def moves(recipe):
        trainer = Trainer(starter, 3, recipe)
        before = trainer.network.state()
        train(trainer, colours, n_steps=1)
        after = trainer.network.state()
        return {name: after[name] - before[name] for name in ("conv1.weight", "fc.weight")}

    recipe = finetune_recipe("split", batch_size=12, momentum=0.0)
    split_moves, full_moves = moves(recipe), moves(replace(recipe, backbone_lr=1e-3))
    np.testing.assert_allclose(split_moves["fc.weight"], full_moves["fc.weight"], rtol=1e-3)
    ratio = np.linalg.norm(full_moves["conv1.weight"]) / np.linalg.norm(split_moves["conv1.weight"])
    assert ratio == pytest.approx(10, rel=0.02)


@needs_oneflow
def test_scratch_does_not_start_from_the_weights(starter):
    scratch = trainer_of("scratch", starter).network.state()
    full = trainer_of("full", starter).network.state()
    assert full["conv1.weight"].tobytes() == starter.state["conv1.weight"].tobytes()
    assert scratch["conv1.weight"].tobytes() != full["conv1.weight"].tobytes()
    again = trainer_of("scratch", starter).network.state()
    assert scratch["conv1.weight"].tobytes() == again["conv1.weight"].tobytes()


@needs_oneflow
def test_label_smoothing_is_the_mean_over_classes(starter, colours):
    share, rows = 0.3, np.arange(36)
    trainer = trainer_of("frozen", starter, label_smoothing=share, batch_size=36, augment="none")
    (pixels,) = colours.batches([Draw(rows)])
    scores = trainer.network.scores(pixels, None).numpy().astype(np.float64)
    logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    own, all_classes = -logs[rows, colours.labels].mean(), -logs.mean()
    (step,) = train(trainer, colours)
    assert step.loss == pytest.approx((1 - share) * own + share * all_classes, abs=1e-5)


@needs_oneflow
def test_a_loss_that_is_not_finite_stops_before_the_update(starter, colours):
    trainer = trainer_of("full", starter, lr=1e30, backbone_lr=1e30)
    said = r"epoch 1/3: expected a finite loss, found (nan|inf) at step 2 of 9 \(.*: head 1e\+30"
    with pytest.raises(RecipeError, match=said):
        train(trainer, colours)


@needs_oneflow
def test_the_state_of_a_trainer_goes_to_another_one_bit_for_bit(starter, colours):
    def steps_of(trainer, first, count):
        with closing(trainer.steps(colours, 0, first)) as steps:
            return [next(steps).loss for _ in range(count)]

    one, other = trainer_of("full", starter), trainer_of("full", starter)
    steps_of(one, 0, 1)
    other.load_arrays(one.arrays())
    assert steps_of(one, 1, 1) == steps_of(other, 1, 1)
    assert not changed(one.arrays(), other.arrays())
    assert any(name.startswith("optimizer.") for name in one.arrays())


# --- the convolution


@needs_oneflow
@pytest.mark.parametrize(
    ("channels", "filters", "side", "kernel", "stride", "padding"),
    [
        (3, 8, 32, 7, 2, 3),  # the stem
        (8, 8, 9, 3, 1, 1),  # odd sides
        (8, 16, 8, 3, 2, 1),
        (8, 16, 8, 1, 2, 0),  # a shortcut
        (16, 16, 2, 3, 1, 1),
        (16, 16, 1, 3, 1, 1),
        (16, 8, 4, 1, 1, 0),
    ],
)
@pytest.mark.parametrize("n", [1, 5])
def test_the_swapped_convolution_equals_oneflows(
    n, channels, filters, side, kernel, stride, padding
):
    from featcache.frameworks import import_oneflow
    from featcache.training._convolution import swap_convolutions

    flow = import_oneflow()
    flow.manual_seed(0)
    layer = flow.nn.Conv2d(channels, filters, kernel, stride, padding, bias=False)
    numbers = np.random.default_rng(0).normal(size=(n, channels, side, side)).astype(np.float32)
    found = []
    for swap in (False, True):
        if swap:
            swap_convolutions(flow.nn.Sequential(layer), flow)
        x = flow.tensor(numbers, requires_grad=True)
        y = layer(x)
        layer.weight.grad = None
        waves = np.cos(np.arange(y.numel())).astype(np.float32).reshape(*y.shape)
        (y * flow.tensor(waves)).sum().backward()
        found.append((y.numpy(), x.grad.numpy(), layer.weight.grad.numpy()))
    for theirs, ours in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, np.abs(theirs).max()))


def test_the_swapped_convolutions_gradient_is_the_derivative():
    """In float64 arithmetic by hand: a central difference of the forward pass."""
    from featcache.training._convolution import Geometry, convolve, convolve_back

    generator = np.random.default_rng(1)
    g = Geometry(2, 3, 6, 5, 4, 3, 2, 1)
    x = generator.normal(size=(2, 3, 6, 5)).astype(np.float32)
    weight = generator.normal(size=(4, 3, 3, 3)).astype(np.float32)
    dy = generator.normal(size=(2, 4, g.out_height, g.out_width)).astype(np.float32)
    dx, dweight = convolve_back(x, weight, dy, g, with_input=True)

    def value(x, weight):
        return float((convolve(x, weight, g).astype(np.float64) * dy).sum())

    for array, gradient in ((x, dx), (weight, dweight)):
        for _ in range(10):
            place = tuple(generator.integers(length) for length in array.shape)
            up, down = array.copy(), array.copy()
            up[place] += 0.5
            down[place] -= 0.5
            pairs = [(up, weight), (down, weight)] if array is x else [(x, up), (x, down)]
            slope = value(*pairs[0]) - value(*pairs[1])  # linear: no error but rounding
            assert gradient[place] == pytest.approx(slope, abs=1e-3)


@needs_oneflow
def test_training_computes_the_same_as_oneflows_own_convolutions(starter, colours, monkeypatch):
    from featcache.training import _framework

    losses = []
    for swap in (True, False):
        if not swap:
            monkeypatch.setattr(_framework, "swap_convolutions", lambda network, flow: None)
        trainer = trainer_of("full", starter, batch_size=12)
        losses.append([step.loss for epoch in range(2) for step in train(trainer, colours, epoch)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_compact_pixels_stand_for_canonical_ones(starter):
    """Flips commute with enlarging, so that small pixels may travel."""
    pixels, split = numbered_images(side=16)
    source = ImageSource(split, starter.preprocess)
    (batch,) = source.batches([Draw(np.arange(5), np.full(5, 3))], "tutorial")
    assert batch.shape == (5, 16, 16, 3)
    small = Image.fromarray(pixels[0][::-1, ::-1])
    from featcache.preprocess import upscale

    np.testing.assert_array_equal(upscale(batch[:1], 32)[0], starter.preprocess.pixels(small))
