"""End-to-end training: what moves, at which rate, in which mode; and the cached equal."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from featcache import extract, finetune, load_dataset, load_head, load_weights, probe
from featcache.errors import DatasetError, RecipeError
from featcache.recipe import FINETUNE_RECIPES, METHODS
from featcache.trainer import Trainer

pytestmark = pytest.mark.oneflow

STARTER = "tinyimagenet32"


@pytest.fixture(scope="module")
def starter():
    """The starter weights at 32 pixels, where a step takes a tenth of a second."""
    weights = load_weights(STARTER)
    return replace(weights, preprocess=replace(weights.preprocess, size=32))


def trainer_of(method, weights, **changes):
    recipe = replace(FINETUNE_RECIPES[method], **{"batch_size": 16, **changes})
    return Trainer(weights, 3, recipe)


def changed(before, after):
    """Return the names of the tensors that are not the same bytes."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def is_statistic(name):
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_frozen_means_frozen(starter, image_folder):
    """No parameter and no buffer of the backbone moves by a bit; the head does."""
    trainer = trainer_of("frozen", starter)
    before = trainer.state()
    trainer.train_epoch(load_dataset(image_folder).train, 0)
    assert changed(before, trainer.state()) == {"fc.weight", "fc.bias"}
    assert all(parameter.grad is None for parameter in trainer.backbone.parameters())


@pytest.mark.parametrize("method", ["full", "split", "scratch"])
def test_everything_else_trains_everything(starter, image_folder, method):
    trainer = trainer_of(method, starter)
    before = trainer.state()
    trainer.train_epoch(load_dataset(image_folder).train, 0)
    assert changed(before, trainer.state()) == set(before)


@pytest.mark.parametrize("method", METHODS)
def test_each_parameter_is_in_exactly_one_group_at_its_rate(starter, method):
    trainer = trainer_of(method, starter)
    recipe = FINETUNE_RECIPES[method]
    groups = trainer.optimizer.param_groups
    rate_of = {}
    for group in groups:
        for parameter in group.parameters:
            assert id(parameter) not in rate_of, "a parameter in two groups moves twice"
            rate_of[id(parameter)] = group["lr"]
            assert group["momentum"] == 0.9 and group["weight_decay"] == 5e-4
    heads = {id(parameter): recipe.head_lr for parameter in trainer.head.parameters()}
    bodies = {id(parameter): recipe.backbone_lr for parameter in trainer.backbone.parameters()}
    assert rate_of == (heads if method == "frozen" else {**heads, **bodies})


def test_a_split_step_moves_each_part_by_its_own_rate(starter, image_folder):
    """The first SGD step is rate x gradient, so that ten times the rate moves ten times as far."""
    split = load_dataset(image_folder).train.take(np.arange(0, 36, 3))

    def moves(recipe):
        trainer = Trainer(starter, 3, recipe)
        before = trainer.state()
        trainer.train_epoch(split, 0)
        after = trainer.state()
        return {name: after[name] - before[name] for name in ("conv1.weight", "fc.weight")}

    recipe = replace(FINETUNE_RECIPES["split"], batch_size=12, momentum=0.0)
    split_moves, full_moves = moves(recipe), moves(replace(recipe, backbone_lr=1e-3))
    np.testing.assert_allclose(split_moves["fc.weight"], full_moves["fc.weight"], rtol=1e-3)
    ratio = np.linalg.norm(full_moves["conv1.weight"]) / np.linalg.norm(split_moves["conv1.weight"])
    assert ratio == pytest.approx(10, rel=0.02)


def test_every_epoch_trains_in_train_mode_and_evaluation_changes_nothing(starter, image_folder):
    """The tutorial's loop stays in eval mode after its first evaluation."""
    data = load_dataset(image_folder)
    trainer = trainer_of("split", starter)
    for epoch in range(2):
        before = trainer.state()
        trainer.train_epoch(data.train, epoch)
        moved = changed(before, trainer.state())
        assert {name for name in before if is_statistic(name)} <= moved
        before = trainer.state()
        trainer.predict(data.test)
        assert changed(before, trainer.state()) == set()


def test_scratch_does_not_start_from_the_weights(starter):
    scratch, full = trainer_of("scratch", starter).state(), trainer_of("full", starter).state()
    assert full["conv1.weight"].tobytes() == starter.state["conv1.weight"].tobytes()
    assert scratch["conv1.weight"].tobytes() != full["conv1.weight"].tobytes()
    again = trainer_of("scratch", starter).state()
    assert scratch["conv1.weight"].tobytes() == again["conv1.weight"].tobytes()


@pytest.mark.parametrize("limit", [None, 24])
def test_a_head_on_the_cache_equals_the_frozen_run_end_to_end(image_folder, limit):
    """What the project rests on: caching the four views loses nothing."""
    limit = {"train_limit": limit, "seed": 7, "epochs": 2}
    made = extract(image_folder, weights=STARTER, size=32, views="flips")
    cached = probe(made.cache, recipe="tutorial", check=False, **limit)
    head = load_head(cached.head)
    ran = finetune(image_folder, "frozen", weights=STARTER, size=32, **limit)
    trained = load_weights(ran.checkpoint).state
    np.testing.assert_allclose(head.weight, trained["fc.weight"], atol=1e-6)
    np.testing.assert_allclose(head.bias, trained["fc.bias"], atol=1e-6)
    assert cached.top1 == ran.top1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_and_what_it_leaves(image_folder, method):
    heard = []
    result = finetune(
        image_folder,
        method,
        weights=STARTER,
        size=32,
        epochs=2,
        batch_size=12,
        train_limit=24,
        test_limit=9,
        on_progress=heard.append,
    )
    assert (result.n_train, result.n_test, len(result.epochs)) == (24, 9, 2)
    assert result.top1 == result.epochs[-1].top1
    assert result.top1_interval[0] <= result.top1 <= result.top1_interval[1]
    assert [epoch.epoch for epoch in result.epochs] == [1, 2]
    assert all(np.isfinite(epoch.train_loss) and epoch.wall_s > 0 for epoch in result.epochs)
    assert {message.stage for message in heard} == {"epoch 1/2", "epoch 2/2", "test images"}
    saved = load_weights(result.checkpoint)
    assert saved.preprocess.size == 32 and saved.state["fc.weight"].shape == (3, 512)
    record = json.loads((result.run / "run.json").read_text())
    assert record["method"] == method and record["epochs"][1]["epoch"] == 2
    assert record["weights"] == ("none" if method == "scratch" else STARTER)


def test_the_same_seed_gives_the_same_network_bit_for_bit(image_folder):
    def run(seed):
        result = finetune(image_folder, weights=STARTER, size=32, epochs=1, seed=seed)
        return load_weights(result.checkpoint).sha256

    assert run(3) == run(3) != run(4)


def test_an_interrupted_run_names_the_last_whole_epoch(image_folder, home):
    def stop(message):
        if message.stage == "epoch 2/2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"epoch 1 of 2 is in .*model\.safetensors"):
        finetune(image_folder, weights=STARTER, size=32, epochs=2, on_progress=stop)
    (checkpoint,) = home.rglob("model.safetensors")
    assert load_weights(checkpoint).state
    assert not list(home.rglob("run.json")), "an unfinished run has no result to compare"


def test_a_loss_that_is_not_finite_stops_the_run(starter, image_folder):
    trainer = trainer_of("full", starter, head_lr=1e30, backbone_lr=1e30)
    with pytest.raises(RecipeError, match=r"epoch 1/3: expected a finite loss, found nan|inf"):
        trainer.train_epoch(load_dataset(image_folder).train, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"method": "half"}, RecipeError, "full, split, frozen, scratch, found 'half'"),
        ({"epochs": 0}, RecipeError, "epochs"),
        ({"train_limit": 0}, DatasetError, "draw 0 of 36 images"),
        ({"train_limit": 2}, DatasetError, "draw 2 of 36 images"),
        ({"size": 16}, RecipeError, "size"),
    ],
)
def test_wrong_arguments(image_folder, arguments, error, said):
    with pytest.raises(error, match=said):
        finetune(image_folder, **{"weights": STARTER, **arguments})
