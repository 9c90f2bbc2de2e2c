"""The head's mathematics, against finite differences and scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import write_gaussian_cache
from scipy.optimize import minimize

from featcache import load
from featcache.probes.cross_check import check_with_sklearn
from featcache.probes.objective import objective
from featcache.probes.recipes import PROBE_RECIPES, ProbeRecipe
from featcache.probes.sgd import CURVATURE_BOUND, _Whitening

RECIPES = [
    ProbeRecipe(weight_decay=1e-2),
    ProbeRecipe(weight_decay=1e-2, whiten=False, decay_bias=True),
]


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    path = write_gaussian_cache(tmp_path_factory.mktemp("gauss") / "g.h5", n_train=300, dim=6)
    cache = load(path)
    return [cache.train.features, cache.train.view("hflip")], cache.train.labels, cache.test


def random_head(seed=0, n_classes=3, dim=6):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n_classes, dim)), generator.normal(size=n_classes)


@pytest.mark.parametrize("recipe", RECIPES, ids=["free bias", "penalised bias"])
def test_the_gradient_is_the_slope_of_the_value(gaussian, recipe):
    views, labels, _ = gaussian
    views = [features.astype(np.float64) for features in views]
    weight, bias = random_head()
    at = objective(weight, bias, views, labels, recipe)
    step = 1e-5
    for index in ((0, 0), (2, 5), (1, 3)):
        moved = weight.copy()
        moved[index] += step
        up = objective(moved, bias, views, labels, recipe).value
        moved[index] -= 2 * step
        down = objective(moved, bias, views, labels, recipe).value
        assert at.weight_gradient[index] == pytest.approx((up - down) / (2 * step), abs=1e-7)
    moved = bias.copy()
    moved[1] += step
    up = objective(weight, moved, views, labels, recipe).value
    moved[1] -= 2 * step
    down = objective(weight, moved, views, labels, recipe).value
    assert at.bias_gradient[1] == pytest.approx((up - down) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("recipe", RECIPES, ids=["free bias", "penalised bias"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_scikit_learn_minimises_this_very_objective(tmp_path, recipe, n_classes):
    """Its solution is a stationary point here, with two classes as with more."""
    cache = load(write_gaussian_cache(tmp_path / "g.h5", n_classes=n_classes, n_train=400))
    views, labels = [cache.train.features, cache.train.view("vflip")], cache.train.labels
    outcome = {}

    def spy(weight, bias, *rest):
        outcome["at"] = objective(weight, bias, *rest)
        outcome["moved"] = min(objective(weight * by, bias, *rest).value for by in (0.97, 1.03))
        return outcome["at"]

    from featcache.probes import cross_check as check

    original, check.objective = check.objective, spy
    try:
        result = check_with_sklearn(
            views,
            labels,
            n_classes,
            cache.test.features,
            cache.test.labels,
            recipe,
            head_objective=1.0,
            head_predicted=cache.test.labels,
        )
    finally:
        check.objective = original
    assert result.converged and result.iterations > 0
    assert outcome["at"].gradient_norm < 2e-3
    assert result.objective == outcome["at"].value < outcome["moved"]
    assert pytest.approx((2 if n_classes == 2 else 1) / (800 * recipe.weight_decay)) == result.C
    assert result.agreement == result.top1 > 0.8
    assert result.objective_gap == pytest.approx((1 - result.objective) / result.objective)


@pytest.mark.parametrize("missing", [1, 2], ids=["a middle class", "the last class"])
@pytest.mark.parametrize("recipe", RECIPES, ids=["free bias", "penalised bias"])
def test_the_check_finds_the_optimum_where_a_class_has_no_training_image(recipe, missing):
    generator = np.random.default_rng(0)
    labels = np.setdiff1d(np.arange(3), missing)[np.arange(300) % 2]
    centres = generator.normal(size=(3, 6))
    x = (centres[labels] + generator.normal(scale=0.5, size=(300, 6))).astype(np.float32)

    def value_and_slope(head):
        head = head.reshape(3, -1)
        at = objective(head[:, :-1], head[:, -1], [x.astype(np.float64)], labels, recipe)
        return at.value, np.column_stack([at.weight_gradient, at.bias_gradient]).ravel()

    best = minimize(value_and_slope, np.zeros(21), jac=True, method="L-BFGS-B").fun
    check = check_with_sklearn(
        [x], labels, 3, x, labels, recipe, head_objective=best, head_predicted=labels
    )
    assert check.objective == pytest.approx(best, rel=1e-3) and not check.under_trained


def test_whitening_changes_the_coordinates_and_not_the_function(gaussian):
    views, _, _ = gaussian
    recipe = ProbeRecipe(weight_decay=1e-3)
    whitening = _Whitening(views, recipe.weight_decay)
    inputs = [whitening.apply(features) for features in views]
    weight, bias = (part.astype(np.float32) for part in random_head())
    plain_weight, plain_bias = whitening.fold(weight, bias)
    for features, z in zip(views, inputs, strict=True):
        np.testing.assert_allclose(
            features @ plain_weight.T + plain_bias, z @ weight.T + bias, rtol=1e-3, atol=1e-3
        )
    stacked = np.concatenate(inputs)
    spread = np.cov(stacked.T, bias=True)
    assert abs(stacked.mean(axis=0)).max() < 1e-4
    assert np.linalg.eigvalsh(spread).max() <= 1 + 1e-4
    # Boehning's bound and the penalty together, on the worst direction there is.
    penalty = (
        recipe.weight_decay * np.linalg.eigvalsh(whitening.matrix.astype(float) ** 1).max() ** 2
    )
    assert 0.5 * np.linalg.eigvalsh(spread).min() + penalty <= CURVATURE_BOUND + 1e-3


# A larger penalty needs fewer steps: seconds in place of minutes.
SGD_RECIPES = [
    pytest.param(replace(PROBE_RECIPES["default"], weight_decay=5e-3, min_steps=400), id="short"),
    pytest.param(PROBE_RECIPES["default"], id="default", marks=pytest.mark.long),
]


@pytest.mark.oneflow
@pytest.mark.parametrize("recipe", SGD_RECIPES)
@pytest.mark.parametrize(
    ("n_train", "spread", "dim"),
    [(60, 0.1, 8), (300, 1.0, 8), (300, 4.0, 8), (90, 1.0, 200)],
    ids=["separable", "easy", "hard", "more dimensions than images"],
)
def test_sgd_reaches_scikit_learns_optimum(tmp_path, n_train, spread, dim, recipe):
    from featcache.frameworks import import_oneflow
    from featcache.probes.sgd import train_sgd

    cache = load(
        write_gaussian_cache(tmp_path / "g.h5", n_train=n_train, spread=spread, dim=dim, n_test=999)
    )
    views, labels = [cache.train.features], cache.train.labels
    solution = train_sgd(views, labels, 3, recipe, framework=import_oneflow())
    predicted = (cache.test.features @ solution.weight.T + solution.bias).argmax(axis=1)
    check = check_with_sklearn(
        views,
        labels,
        3,
        cache.test.features,
        cache.test.labels,
        recipe,
        head_objective=solution.objective,
        head_predicted=predicted,
    )
    gap = check.objective_gap * check.objective
    assert -1e-4 < gap < max(0.01 * check.objective, 2e-3)
    assert abs(check.top1 - (predicted == cache.test.labels).mean()) <= 0.004
    assert check.agreement >= 0.99


@pytest.mark.oneflow
def test_one_epoch_of_plain_sgd_is_the_update_rule(tmp_path):
    """Momentum, weight decay and views, step by step in NumPy."""
    from featcache.frameworks import import_oneflow
    from featcache.probes.sgd import train_sgd
    from featcache.sampling import epoch_plan, initial_head, row_batches

    cache = load(write_gaussian_cache(tmp_path / "g.h5", n_train=100))
    views = [cache.train.view(name).astype(np.float64) for name in cache.views]
    labels = cache.train.labels
    recipe = replace(PROBE_RECIPES["tutorial"], epochs=2, lr=0.1, batch_size=32)
    solution = train_sgd(
        [cache.train.view(name) for name in cache.views],
        labels,
        3,
        recipe,
        framework=import_oneflow(),
        seed=5,
    )
    head = np.column_stack([*initial_head(3, 8, 5)]).astype(np.float64)
    velocity = np.zeros_like(head)
    for epoch in range(2):
        rows, drawn = epoch_plan(100, 4, 5, epoch)
        for batch in row_batches(100, 32):
            x = np.stack([views[v][r] for r, v in zip(rows[batch], drawn[batch], strict=True)])
            x = np.column_stack([x, np.ones(len(x))])
            scores = np.exp(x @ head.T)
            scores /= scores.sum(axis=1, keepdims=True)
            scores[np.arange(len(x)), labels[rows[batch]]] -= 1
            gradient = scores.T @ x / len(x) + recipe.weight_decay * head
            velocity = recipe.momentum * velocity + gradient
            head -= recipe.lr * velocity
    np.testing.assert_allclose(solution.weight, head[:, :-1], atol=2e-5)
    np.testing.assert_allclose(solution.bias, head[:, -1], atol=2e-5)
    assert solution.converged is None and (solution.epochs, solution.steps) == (2, 8)
