"""Every draw that training makes, and the recipes' values."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from featcache.errors import DatasetError, RecipeError
from featcache.finetuning.recipes import FINETUNE_RECIPES, FinetuneRecipe
from featcache.probes.recipes import PROBE_RECIPES, ProbeRecipe
from featcache.sampling import (
    drawn_sides,
    epoch_plan,
    initial_head,
    row_batches,
    stratified_rows,
    text_hashes,
    validation_rows,
)

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


def test_a_plan_is_a_seeded_permutation_with_uniform_views():
    rows, views = epoch_plan(4000, 4, seed=3, epoch=1)
    assert sorted(rows) == list(range(4000))
    assert np.bincount(views).min() > 900
    again = epoch_plan(4000, 4, seed=3, epoch=1)
    assert np.array_equal(rows, again[0]) and np.array_equal(views, again[1])
    assert not np.array_equal(rows, epoch_plan(4000, 4, seed=3, epoch=2)[0])
    assert not np.array_equal(rows, epoch_plan(4000, 4, seed=4, epoch=1)[0])


def test_the_order_does_not_depend_on_the_views():
    assert np.array_equal(epoch_plan(100, 1, 0, 0)[0], epoch_plan(100, 4, 0, 0)[0])


@pytest.mark.parametrize(("n", "size"), [(1, 64), (64, 64), (65, 64), (129, 64), (130, 64), (7, 2)])
def test_batches_cover_every_row_once_and_never_leave_one_alone(n, size):
    batches = list(row_batches(n, size))
    covered = [row for batch in batches for row in range(batch.start, batch.stop)]
    assert covered == list(range(n))
    assert n == 1 or all(batch.stop - batch.start > 1 for batch in batches)


def test_the_first_head_is_that_of_a_linear_layer():
    weight, bias = initial_head(10, 512, seed=0)
    assert weight.dtype == bias.dtype == np.float32
    assert abs(weight).max() <= 512**-0.5 and weight.std() == pytest.approx((3 * 512) ** -0.5, 0.02)


def test_a_draw_keeps_the_proportions_and_ignores_nothing():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    rows = stratified_rows(labels, 100, 0, "a split")
    assert np.bincount(labels[rows]).tolist() == [60, 30, 10]
    assert np.array_equal(rows, stratified_rows(labels, 100, 0, "a split"))
    assert np.array_equal(stratified_rows(labels, 5000, 0, "a split"), np.arange(1000))


def test_a_draw_is_scikit_learns():
    from sklearn.model_selection import train_test_split

    generator = np.random.default_rng(0)
    for seed in range(200):
        n_classes = int(generator.integers(2, 12))
        n = int(generator.integers(2 * n_classes, 300))
        labels = np.append(
            np.arange(2 * n_classes) % n_classes,
            generator.integers(n_classes, size=n - 2 * n_classes),
        )
        labels = 3 * generator.permutation(labels) - 1
        limit = int(generator.integers(n_classes, n - n_classes + 1))
        theirs, _ = train_test_split(
            np.arange(n), train_size=limit, stratify=labels, random_state=seed
        )
        assert np.array_equal(stratified_rows(labels, limit, seed, "a split"), np.sort(theirs))


@pytest.mark.parametrize("limit", [0, 2, 998, 999])
def test_a_draw_without_a_class_is_refused_with_the_valid_limits(limit):
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    with pytest.raises(DatasetError) as caught:
        stratified_rows(labels, limit, 0, "a split")
    assert str(caught.value) == (
        f"a split: expected to draw {limit} of 1,000 images, every class on both sides, found 3 "
        "classes; ask for 3 to 997, or all of them"
    )
    for allowed in (3, 997):
        assert len(stratified_rows(labels, allowed, 0, "a split")) == allowed


def test_validation_has_an_image_of_each_class_of_a_tiny_set():
    labels = np.repeat([0, 1, 2], 2)
    assert sorted(labels[validation_rows(labels, 0.1, seed=0)]) == [0, 1, 2]
    assert len(validation_rows(np.repeat([0, 1], 500), 0.1, seed=0)) == 100


def test_a_draw_names_the_class_of_a_single_image():
    with pytest.raises(DatasetError, match="single image of class 7; add one"):
        stratified_rows(np.array([3, 3, 3, 7]), 2, 0, "a split")


def test_the_tutorials_constants():
    full, split, frozen, scratch = FINETUNE_RECIPES.values()
    assert (full.head_lr, full.backbone_lr, full.pretrained) == (1e-3, 1e-3, True)
    assert (split.head_lr, split.backbone_lr) == (1e-3, 1e-4)
    assert frozen.backbone_lr is None
    assert not scratch.pretrained
    for recipe in (*FINETUNE_RECIPES.values(), PROBE_RECIPES["tutorial"]):
        assert (recipe.epochs, recipe.batch_size) == (3, 64)
        assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (ProbeRecipe, {"lr": 0.0}),
        (ProbeRecipe, {"lr": float("nan")}),
        (ProbeRecipe, {"weight_decay": 0.0}),
        (ProbeRecipe, {"weight_decay": float("inf")}),
        (ProbeRecipe, {"epochs": 0}),
        (FinetuneRecipe, {"batch_size": 0}),
        (FinetuneRecipe, {"momentum": 1.0}),
        (FinetuneRecipe, {"backbone_lr": -1e-4}),
    ],
)
def test_hyperparameters_out_of_range_are_refused(recipe, changes):
    (name,) = changes
    with pytest.raises(RecipeError, match=name.replace("_", " ")):
        recipe(**changes)


def test_the_side_of_an_image_is_a_fifth_of_its_hash():
    first = np.array([0, 0x33333333333333FF, 0x3333333333333400, 2**64 - 1], ">u8")
    hashes = np.zeros((4, 32), np.uint8)
    hashes[:, :8] = first.view(np.uint8).reshape(4, 8)
    hashes[2, 8:] = 255
    expected = [int(one) < 0.2 * 2**64 for one in first.tolist()]
    assert drawn_sides(hashes).tolist() == expected == [True, True, False, False]
    assert drawn_sides(hashes[:0]).tolist() == []


def test_a_fifth_of_many_texts_is_drawn_whatever_else_there_is():
    names = [f"patient {number}" for number in range(20_000)]
    sides = drawn_sides(text_hashes(names))
    assert 0.19 < sides.mean() < 0.21
    assert np.array_equal(drawn_sides(text_hashes(names[::-7])), sides[::-7])
    assert text_hashes(["кошка"]).tobytes() == hashlib.sha256("кошка".encode()).digest()
