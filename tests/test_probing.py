"""From a cache to a head: the result, the saved file, the record, the refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_gaussian_cache

from featcache import few_shot, learning_curve, load, load_head, probe
from featcache.errors import CacheMissError, DatasetError, RecipeError, WeightsError
from featcache.metrics import wilson_interval
from featcache.probes.recipes import PROBE_RECIPES


@pytest.mark.oneflow
def test_sgd_reaches_the_check(small_cache, home):
    recipe = replace(PROBE_RECIPES["default"], weight_decay=0.02, min_steps=200)
    result = probe(small_cache, recipe=recipe)
    assert result.check is not None
    assert abs(result.top1 - result.check.top1) <= 0.003
    assert result.check.agreement >= 0.98
    assert result.top1_interval == wilson_interval(result.top1, 60)
    assert (result.n_train, result.n_test, result.solver) == (120, 60, "sgd")
    record = json.loads((result.run / "run.json").read_text())
    assert record["method"] == "probe sgd" and record["top1"] == result.top1
    assert record["dataset"] == "gaussian" and record["recipe"]["weight_decay"] == 0.02


def test_the_newest_cache_is_the_default(home):
    write_gaussian_cache(home / "cache" / "only.h5")
    assert probe(check=False).cache == home / "cache" / "only.h5"
    assert probe(load(home / "cache" / "only.h5"), check=False).check is None


@pytest.mark.oneflow
def test_the_tutorials_recipe_is_reported_as_far_from_the_optimum(small_cache):
    result = probe(small_cache, recipe="tutorial")
    assert (result.epochs, result.steps) == (3, 6)
    assert result.check.objective_gap > 0.1 and result.check.under_trained
    assert result.top1 < result.check.top1


def test_the_head_is_saved_and_predicts_the_same(small_cache, tmp_path):
    path = tmp_path / "heads" / "mine.safetensors"
    result = probe(small_cache, save_head_to=path)
    assert result.head == path
    cache = load(small_cache)
    for saved in (path, result.run / "head.safetensors"):
        head = load_head(saved)
        accuracy = (head.predict(cache.test.features) == cache.test.labels).mean()
        assert accuracy == result.top1
        assert head.class_names == cache.class_names and head.fingerprint == cache.fingerprint
    with pytest.raises(ValueError, match=r"expected \(N, 8\), found \(1, 5\)"):
        head.predict(np.zeros((1, 5), np.float32))
    with pytest.raises(WeightsError, match="expected a head"):
        load_head(small_cache)
    with pytest.raises(WeightsError, match="expected a head"):
        load_head(tmp_path / "none")


@pytest.mark.oneflow
def test_the_same_seed_gives_the_same_head_bit_for_bit(small_cache):
    one, two, other = (
        load_head(probe(small_cache, seed=seed, epochs=2, check=False).head) for seed in (1, 1, 2)
    )
    assert np.array_equal(one.weight, two.weight) and np.array_equal(one.bias, two.bias)
    assert not np.array_equal(one.weight, other.weight)


@pytest.mark.oneflow
def test_named_values_replace_the_recipes(small_cache):
    result = probe(small_cache, epochs=7, lr=0.5, weight_decay=1e-2, check=False)
    assert (result.epochs, result.recipe.lr, result.recipe.weight_decay) == (7, 0.5, 1e-2)


@pytest.mark.parametrize(
    ("arguments", "excerpt"),
    [
        ({"recipe": "secret"}, "default, tutorial, found 'secret'"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr: expected a positive"),
        ({"lr": math.inf}, "lr: expected a positive"),
        ({"weight_decay": 0.0}, "weight decay"),
        ({"momentum": 1.0}, "momentum: expected a number from 0 to below 1"),
        ({"batch_size": 0}, "batch size: expected at least 1"),
        ({"schedule": "step"}, "schedule: expected one of constant, cosine, found 'step'"),
        ({"epochs": 1, "device": "tpu"}, "device: expected one of auto, cpu, cuda, found 'tpu'"),
        ({"device": "cuda"}, "expected auto or cpu with lbfgs, found 'cuda'; use --solver sgd"),
        ({"solver": "newton"}, "lbfgs, ridge, sgd, found 'newton'"),
        ({"metric": "auc"}, "top1, balanced, f1, found 'auc'"),
        ({"scale": "minmax"}, "none, standardize, l2"),
        ({"solver": "ridge", "epochs": 3}, "no epochs, an option of SGD; leave it out"),
        ({"C": 1.0, "weight_decay": 1.0}, "found both"),
        ({"C": 1.0, "sweep": True}, "a given penalty"),
        ({"solver": "sgd", "sweep": True}, "SGD"),
        ({"C": 0.0}, "C: expected a positive number"),
    ],
)
def test_wrong_arguments(small_cache, arguments, excerpt):
    with pytest.raises(RecipeError, match=excerpt):
        probe(small_cache, **arguments)


@pytest.mark.parametrize("verb", [probe, few_shot, learning_curve])
def test_no_cache_one_class_and_no_test_images(home, verb):
    with pytest.raises(CacheMissError, match="make one with featcache extract"):
        verb()
    write_gaussian_cache(home / "cache" / "one.h5", n_classes=1)
    expected = "one.h5: expected at least 2 classes with training images, found 1; extract a"
    with pytest.raises(DatasetError, match=expected):
        verb()
    empty = write_gaussian_cache(home / "empty.h5", n_test=0)
    with pytest.raises(DatasetError, match="expected labelled test images, found none"):
        verb(empty)


def test_the_default_is_the_exact_optimum_at_a_swept_penalty(small_cache):
    result = probe(small_cache)
    assert result.solver == "lbfgs" and result.converged
    assert abs(result.check.objective_gap) < 1e-4 and not result.check.under_trained
    assert pytest.approx(result.C) == result.check.C
    assert result.sweep.C in [point.C for point in result.sweep.points]
    assert pytest.approx(result.sweep.C) == result.C
    assert result.weight_decay == pytest.approx(1 / (result.C * 4 * 120))
    assert result.evaluation.top1 == result.top1
    assert np.sum(result.evaluation.confusion) == 60


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
@pytest.mark.parametrize("scale", ["none", "standardize", "l2"])
def test_every_scaling_leaves_a_head_for_plain_features(small_cache, solver, scale):
    result = probe(small_cache, solver=solver, scale=scale, C=1.0)
    cache, head = load(small_cache), load_head(result.head)
    predicted = head.predict(cache.test.features)
    assert (predicted == cache.test.labels).mean() == result.top1 == result.check.top1
    assert result.sweep is None and pytest.approx(1.0) == result.C
    assert (result.evaluation.calibration_error is None) == (solver == "ridge")


def test_a_budget_ends_with_a_head_and_its_gap(tmp_path, home):
    cache = write_gaussian_cache(tmp_path / "c.h5", n_train=3000, dim=12, spread=2.0)
    hurried = probe(cache, budget_s=1e-3)
    best = probe(cache, check=False, C=hurried.C)
    assert hurried.converged is False and hurried.check is None
    assert "not checked: scikit-learn has no budget" in hurried.notes
    assert hurried.sweep is not None and hurried.sweep.n_fit + hurried.sweep.n_holdout == 240
    assert 0 <= hurried.objective - best.objective <= hurried.gap <= hurried.objective
    assert hurried.top1 > 0.5
    record = json.loads((hurried.run / "run.json").read_text())
    assert record["gap"] == hurried.gap and record["converged"] is False
    patient = probe(cache, budget_s=100)
    assert patient.converged and patient.gap <= 1e-6 * patient.objective
    for wrong in ({"budget_s": 0}, {"budget_s": 1, "solver": "ridge"}, {"budget_s": 1, "cv": 3}):
        with pytest.raises(RecipeError, match="budget"):
            probe(cache, **wrong)
