"""Weights of images: scikit-learn's objective, solvers and meaning of a weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from test_exact import clouds

from featcache.errors import DatasetError, RecipeError
from featcache.metrics import score, top1
from featcache.probes.blocks import Rows
from featcache.probes.cross_check import check_with_sklearn
from featcache.probes.lbfgs import train_lbfgs
from featcache.probes.objective import objective
from featcache.probes.recipes import PROBE_RECIPES, ExactRecipe
from featcache.probes.ridge import Ridge, ridge_objective, train_ridge
from featcache.probes.sweep import divide, sweep
from featcache.probes.weights import sample_weights, total_weight

pytestmark = pytest.mark.numpy1  # its draws may depend on NumPy


def uneven(n, seed=1):
    """Weights over four orders of magnitude."""
    return np.random.default_rng(seed).lognormal(sigma=2, size=n)


def test_the_gradient_is_the_slope_of_the_weighted_value():
    x, labels = clouds(300, dim=5)
    views, weights, recipe = [x.astype(np.float64), x + 0.3], uneven(300), ExactRecipe(1e-2)
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(4, 5)) / 5, generator.normal(size=4)
    at = objective(weight, bias, views, labels, recipe, weights)
    losses = []
    for rows in views:
        scores = rows @ weight.T + bias
        losses.append(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(300), labels])
    expected = np.average(np.mean(losses, axis=0), weights=weights) + 0.005 * (weight**2).sum()
    assert at.value == pytest.approx(expected, rel=1e-6)
    moved, step = weight.copy(), 1e-5
    moved[2, 3] += step
    up = objective(moved, bias, views, labels, recipe, weights).value
    moved[2, 3] -= 2 * step
    down = objective(moved, bias, views, labels, recipe, weights).value
    assert at.weight_gradient[2, 3] == pytest.approx((up - down) / (2 * step), rel=1e-4)


@pytest.mark.parametrize(
    "case", [{}, {"spread": 5.0}, {"n": 30_000, "dim": 8}, {"n": 90, "dim": 150}]
)
@pytest.mark.parametrize("decay", [1e-1, 1e-3])
def test_lbfgs_finds_the_optimum_of_scikit_learn(case, decay):
    x, labels = clouds(**case)
    weights, recipe = uneven(len(x)), ExactRecipe(decay)
    ours = train_lbfgs([x], labels, 4, recipe, weights=weights)
    wide, mean = x.astype(np.float64), x.mean(axis=0, dtype=np.float64)
    C = 1 / (decay * total_weight([x], weights))
    model = LogisticRegression(C=C, tol=1e-10, max_iter=20_000).fit(wide - mean, labels, weights)
    bias = model.intercept_ - model.coef_ @ mean
    best = objective(model.coef_, bias, [wide], labels, recipe, weights).value
    reached = objective(ours.weight, ours.bias, [wide], labels, recipe, weights).value
    assert ours.converged and -1e-7 <= reached - best <= 2e-6 * max(best, 0.05)
    predicted = (wide @ ours.weight.T + ours.bias).argmax(axis=1)
    assert np.mean(predicted == model.predict(wide - mean)) > 0.999


@pytest.mark.parametrize("decay", [1e-3, 1.0])
def test_ridge_is_that_of_scikit_learn(decay):
    x, labels = clouds(600)
    weights = uneven(300)
    views, labels = [x[:300], x[300:]], labels[:300]
    ours = train_ridge(views, labels, 4, decay, weights)
    alpha = decay * total_weight(views, weights)
    model = SklearnRidge(alpha=alpha).fit(
        x.astype(np.float64), np.eye(4)[np.tile(labels, 2)], np.tile(weights, 2)
    )
    np.testing.assert_allclose(ours.weight, model.coef_, atol=1e-4 * abs(model.coef_).max())
    np.testing.assert_allclose(ours.bias, model.intercept_, atol=1e-3)
    best = ridge_objective(model.coef_, model.intercept_, views, labels, decay, weights)
    assert ours.objective == pytest.approx(best, rel=1e-5)
    solved = Ridge(views, labels, 4, weights).solve(decay)
    assert solved.objective == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("ridge", [False, True])
def test_the_cross_check_takes_the_same_weights(ridge, weighted):
    x, labels = clouds(400)
    labels = labels % 2  # two classes: scikit-learn halves the penalty
    weights = np.where(np.arange(400) % 5, uneven(400), 0) if weighted else None
    recipe = ExactRecipe(1e-2)
    if ridge:
        ours = train_ridge([x], labels, 2, 1e-2, weights)
    else:
        ours = train_lbfgs([x], labels, 2, recipe, weights=weights)
    predicted = (x @ ours.weight.T + ours.bias).argmax(axis=1)
    found = check_with_sklearn(
        [x],
        labels,
        2,
        x,
        labels,
        recipe,
        head_objective=ours.objective,
        head_predicted=predicted,
        weights=weights,
        ridge=ridge,
    )
    assert abs(found.objective_gap) < 1e-4 and found.agreement > 0.99
    half = 1 if ridge else 2
    assert pytest.approx(half / (1e-2 * total_weight([x], weights))) == found.C


def test_weight_2_is_two_images_and_weight_0_none():
    x, labels = clouds(400, n_classes=3)
    weights = np.arange(400) % 3.0  # 0, 1 and 2
    x[0] = 1e6  # an image without weight, far out
    repeated = np.repeat(np.arange(400), weights.astype(int))
    for solve in (
        lambda *given, w=None: train_lbfgs(*given, ExactRecipe(1e-2, 1e-10), weights=w),
        lambda *given, w=None: train_ridge(*given, 1e-2, w),
    ):
        ours = solve([x], labels, 3, w=weights)
        kept = solve([x[weights > 0]], labels[weights > 0], 3, w=weights[weights > 0])
        copies = solve([x[repeated]], labels[repeated], 3)
        assert np.array_equal(ours.weight, kept.weight)
        assert ours.objective == pytest.approx(kept.objective, rel=1e-6)
        assert ours.objective == pytest.approx(copies.objective, rel=1e-6)
        np.testing.assert_allclose(ours.weight, copies.weight, atol=2e-4 * abs(copies.weight).max())


def test_equal_weights_of_any_size_change_nothing_but_c():
    x, labels = clouds(400)
    plain = train_lbfgs([x], labels, 4, ExactRecipe(1e-3))
    for size in (1e-200, 3.0, 1e200):
        same = train_lbfgs([x], labels, 4, ExactRecipe(1e-3), weights=np.full(400, size))
        assert same.objective == pytest.approx(plain.objective, rel=2e-6)
        assert total_weight([x, x], np.full(400, size)) == pytest.approx(800 * size)


def test_balanced_classes_are_those_of_scikit_learn():
    labels = np.repeat([0, 1, 3], [60, 30, 10])
    balanced = sample_weights(labels, 4, "balanced", None)
    np.testing.assert_allclose(np.bincount(labels, balanced), [100 / 3, 100 / 3, 0, 100 / 3])
    given = np.random.default_rng(0).random(100)
    both = sample_weights(labels, 4, "balanced", given)
    np.testing.assert_allclose(np.bincount(labels, both)[[0, 1, 3]], given.sum() / 3)
    np.testing.assert_allclose(both[:60] / both[0], given[:60] / given[0])
    mapped = sample_weights(labels, 4, {1: 5, 3: 0}, given)
    np.testing.assert_allclose(mapped, given * np.repeat([1, 5, 0], [60, 30, 10]))
    named = sample_weights(labels, 4, {"b": 5, "d": 0}, given, class_names="abcd")
    np.testing.assert_array_equal(named, mapped)
    assert sample_weights(labels, 4, None, None) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": [1, -1, 1]}, "0 or positive numbers, found -1.0 at image 1 .1 such images"),
        ({"weights": [1, np.nan, np.inf]}, "found nan at image 1 .2 such images"),
        ({"weights": [0, 0, 0]}, "at least one above zero, found only zeros"),
        ({"weights": [1, 1]}, "one for each of 3 images, found shape .2,"),
        ({"weights": ["a", "b", "c"]}, "expected numbers"),
        ({"class_weight": "even"}, "balanced or a weight for each class, found 'even'"),
        ({"class_weight": {2: 1.0}}, "expected a class of 0, 1, found 2"),
        ({"class_weight": {0: "much"}}, "class weight of 0: expected a number, found 'much'"),
        ({"class_weight": {0: -1}}, "0 or positive numbers, found -1.0 at image 0"),
        ({"class_weight": {0: 0, 1: 0}}, "at least one above zero"),
    ],
)
def test_weights_that_no_objective_can_use_are_refused(given, message):
    given = {"class_weight": None, "weights": None, **given}
    with pytest.raises(RecipeError, match=message):
        sample_weights(np.array([0, 1, 1]), 2, **given)


@pytest.mark.parametrize("recipe", [ExactRecipe(), None], ids=["lbfgs", "ridge"])
class TestSweep:
    GRID = tuple(np.logspace(-5, 3, 5))

    def sweep(self, recipe, views, labels, grid=GRID, score=top1, **given):
        return sweep(divide(views, labels, **given), 4, recipe, grid=grid, score=score)[0]

    def test_images_without_weight_are_as_if_absent(self, recipe):
        x, labels = clouds(500, dim=60, spread=3.0)
        weights = np.where(np.random.default_rng(0).random(500) < 0.3, 0, uneven(500))
        kept = weights > 0
        ours = self.sweep(recipe, [x], labels, weights=weights)
        assert ours == self.sweep(recipe, [x[kept]], labels[kept], weights=weights[kept])
        assert ours.n_holdout == kept.sum()

    def test_weights_count_in_the_fits_and_c_in_units_of_their_sum(self, recipe):
        x, labels = clouds(500, dim=60, spread=3.0)
        plain = self.sweep(recipe, [x], labels)
        tenfold = self.sweep(
            recipe, [x], labels, weights=np.full(500, 10.0), grid=[C / 10 for C in self.GRID]
        )
        assert [p.score for p in tenfold.points] == [p.score for p in plain.points]
        assert pytest.approx(plain.C / 10) == tenfold.C
        favoured = self.sweep(recipe, [x], labels, weights=np.where(labels == 0, 1e6, 1.0))
        assert [p.score for p in favoured.points] != [p.score for p in plain.points]

    def test_a_given_holdout_chooses_and_all_images_are_fitted(self, recipe):
        x, labels = clouds(500, dim=60, spread=3.0)
        fitted, val = np.arange(500) % 3 > 0, np.arange(500) % 3 == 0
        seen = []

        def listen(predicted, expected):
            seen.append(expected)
            return top1(predicted, expected)

        ours = self.sweep(
            recipe, [x[fitted]], labels[fitted], holdout=(x[val], labels[val]), score=listen
        )
        assert (ours.n_fit, ours.n_holdout) == (333, 167)
        assert all(np.array_equal(labels[val], expected) for expected in seen)
        rows = Rows(x, np.flatnonzero(val))
        assert ours == self.sweep(recipe, [x[fitted]], labels[fitted], holdout=(rows, labels[val]))

    def test_a_class_that_only_the_holdout_has_is_an_error_of_the_score(self, recipe):
        x, labels = clouds(500)
        fitted = (labels != 3) & (np.arange(500) % 2 == 0)
        val = np.arange(500) % 2 == 1
        swept = self.sweep(recipe, [x[fitted]], labels[fitted], holdout=(x[val], labels[val]))
        assert max(point.score for point in swept.points) <= np.mean(labels[val] != 3)
        with pytest.raises(DatasetError, match="expected labelled images in the holdout"):
            self.sweep(recipe, [x], labels, holdout=(x[:0], labels[:0]))

    def test_a_group_is_fitted_or_held_out_as_a_whole(self, recipe):
        x, labels = clouds(400)
        groups = np.arange(400) // 4
        # The label of a group is a coin: only an image of the same group tells it.
        coin = np.random.default_rng(0).integers(2, size=100)[groups]
        told = np.eye(100, dtype=np.float32)[groups] * 20
        apart = self.sweep(recipe, [told], coin, groups=groups)
        mixed = self.sweep(recipe, [told], coin)
        assert max(p.score for p in mixed.points) > 0.95 > 0.7 > max(p.score for p in apart.points)
        assert apart.n_holdout == 400 and apart.n_folds == 5
        with pytest.raises(DatasetError, match="training images of 2 groups or more"):
            self.sweep(recipe, [x], labels, groups=np.zeros(400))


def test_weights_turn_the_head_to_the_rare_class():
    x, labels = clouds(3000, dim=6, n_classes=2, spread=4.0, shares=[0.95, 0.05])
    plain = train_lbfgs([x], labels, 2, ExactRecipe(1e-3))
    weights = sample_weights(labels, 2, "balanced", None)
    balanced = train_lbfgs([x], labels, 2, ExactRecipe(1e-3), weights=weights)
    reached = [
        score("balanced", (x @ head.weight.T + head.bias).argmax(axis=1), labels, 2)
        for head in (plain, balanced)
    ]
    assert reached[1] > reached[0] + 0.05


@pytest.mark.oneflow
@pytest.mark.parametrize("whiten", [True, False])
def test_sgd_reaches_the_same_optimum(whiten):
    from featcache.frameworks import import_oneflow
    from featcache.probes.sgd import train_sgd

    x, labels = clouds(600, dim=6, n_classes=3, spread=2.0)
    x = (x - x.mean(axis=0)) / x.std(axis=0)  # plain steps are for features of one scale
    weights = np.where(np.arange(600) % 4, sample_weights(labels, 3, {0: 8.0}, None), 0)
    recipe = replace(
        PROBE_RECIPES["default"],
        weight_decay=1e-2,
        min_steps=1000,
        batch_size=128,
        whiten=whiten,
        lr=1.0 if whiten else 0.02,
    )
    ours = train_sgd([x], labels, 3, recipe, framework=import_oneflow(), weights=weights)
    best = train_lbfgs([x], labels, 3, ExactRecipe(1e-2), weights=weights)
    assert ours.objective <= best.objective * 1.01
    plain = train_lbfgs([x], labels, 3, ExactRecipe(1e-2))
    unweighted = objective(plain.weight, plain.bias, [x], labels, recipe, weights).value
    assert unweighted > best.objective * 1.1, "the weights matter"
