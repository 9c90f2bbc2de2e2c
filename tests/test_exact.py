"""The exact solvers and the sweep, against scikit-learn and the normal equations."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from featcache.errors import RecipeError
from featcache.probes.lbfgs import Shared, train_lbfgs
from featcache.probes.objective import objective
from featcache.probes.recipes import ExactRecipe
from featcache.probes.ridge import Ridge, ridge_objective, train_ridge
from featcache.probes.scaling import Scaling
from featcache.probes.sweep import C_GRID, _fit_lbfgs, divide, grid_of, sweep

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


def clouds(n=600, dim=12, n_classes=4, spread=1.0, shares=None, seed=0, dtype=np.float32):
    """Draw correlated features far from the origin, as a ReLU network's are."""
    generator = np.random.default_rng(seed)
    labels = np.sort(generator.choice(n_classes, n, p=shares))
    mixing = generator.normal(size=(dim, dim)) * np.geomspace(3, 0.05, dim)
    centres = generator.normal(size=(n_classes, dim))
    x = (centres[labels] + generator.normal(scale=spread, size=(n, dim))) @ mixing + 5
    return x.astype(dtype), labels.astype(np.int64)


def reference(x, labels, decay):
    """scikit-learn's optimum, as exactly as it can be had."""
    mean = x.mean(axis=0, dtype=np.float64)
    model = LogisticRegression(C=1 / (len(x) * decay), tol=1e-10, max_iter=20_000)
    model.fit(x.astype(np.float64) - mean, labels)
    return model.coef_, model.intercept_ - model.coef_ @ mean


CASES = {
    "plain": {},
    "separable": {"spread": 0.05},
    "overlapping": {"spread": 5.0},
    "imbalanced": {"shares": [0.9, 0.05, 0.03, 0.02]},
    "more dimensions than rows": {"n": 60, "dim": 150},
    "some more dimensions": {"n": 500, "dim": 600},
    "many more dimensions": {"n": 250, "dim": 700},
    "float16": {"dtype": np.float16},
    "many rows": {"n": 30_000, "dim": 8},
}


@pytest.mark.parametrize("decay", [1e-1, 5e-4, 1e-5])
@pytest.mark.parametrize("case", CASES)
def test_lbfgs_finds_scikit_learns_optimum(case, decay):
    x, labels = clouds(**CASES[case])
    recipe = ExactRecipe(decay)
    result = train_lbfgs([x], labels, 4, recipe)
    weight, bias = reference(x, labels, decay)
    best = objective(weight, bias, [x.astype(np.float64)], labels, recipe).value
    at = objective(result.weight, result.bias, [x.astype(np.float64)], labels, recipe).value
    # Heads are float32, and where classes are all but separated the optimum lies far out and
    # flat: there the estimate of the distance is good to a factor, and the precision may end
    # the search within a millionth of a nat.
    easy = decay > 1e-5 and case != "separable"
    assert result.converged or at - best < 1e-6
    assert -1e-7 <= at - best <= (2e-6 if easy else 2e-5) * max(best, 0.05)
    assert result.objective == pytest.approx(at, rel=1e-4, abs=1e-8)
    assert result.weight.dtype == np.float32


def newton(x, labels, decay):
    """Minimise by dense Newton steps in float64: the objective, by another road."""
    n, k = len(x), labels.max() + 1
    z = np.column_stack([x.astype(np.float64), np.ones(n)])
    penalty = np.tile(np.append(np.full(x.shape[1], decay), 1e-30), k)
    y = np.eye(k)[labels]

    def at(head):
        scores = z @ head.reshape(k, -1).T
        lead = scores - scores[np.arange(n), labels][:, None]
        top = lead.max(axis=1, keepdims=True)
        rest = (np.exp(lead - top) * (1 - y)).sum(axis=1) + np.exp(-top[:, 0]) - (top[:, 0] == 0)
        value = np.mean(np.log1p(rest) + top[:, 0]) + penalty @ head**2 / 2
        p = np.exp(lead - top)
        return value, p / p.sum(axis=1, keepdims=True)

    head = np.zeros(k * z.shape[1])
    value, p = at(head)
    for _ in range(200):
        off = p * (1 - y)
        residual = off - y * off.sum(axis=1, keepdims=True)
        gradient = (residual.T @ z / n).ravel() + penalty * head
        bend = np.einsum("ni,ij->nij", p, np.eye(k)) - np.einsum("ni,nj->nij", p, p)
        hessian = np.einsum("nij,na,nb->iajb", bend, z, z, optimize=True).reshape(len(head), -1) / n
        step = np.linalg.lstsq(hessian + np.diag(penalty), gradient, rcond=1e-15)[0]
        size = 1.0
        while size > 1e-3 and at(head - size * step)[0] > value:
            size /= 2
        if value - at(head - size * step)[0] <= 1e-12 * value:
            return value
        head = head - size * step
        value, p = at(head)
    raise AssertionError("the reference did not converge")


@pytest.mark.parametrize("C", [1e2, 1e6, 1e8, 1e10])
def test_converged_is_true_of_separable_classes_too(C):
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 3
    x = (generator.normal(size=(120, 5)) + 7 * np.eye(3, 5)[labels]).astype(np.float32)
    decay = 1 / (C * 120)
    result = train_lbfgs([x], labels, 3, ExactRecipe(decay))
    best = newton(x, labels, decay)
    assert result.converged and abs(result.objective / best - 1) < 3e-6


@pytest.mark.parametrize("size", [1e6, 1e25, 1e38, 1e-25])
def test_features_of_any_size(size, recwarn):
    x, labels = clouds(spread=5.0)
    plain = train_lbfgs([x], labels, 4, ExactRecipe(1e-3))
    large = (x * np.float32(size / abs(x).max())).astype(np.float32)
    unit = float(large.max() / x.max())
    result = train_lbfgs([large], labels, 4, ExactRecipe(1e-3 * unit**2))
    assert result.converged and result.objective == pytest.approx(plain.objective, rel=1e-5)
    np.testing.assert_allclose(result.weight * unit, plain.weight, atol=2e-3)
    ridge = train_ridge([large], labels, 4, 1e-3 * unit**2)
    np.testing.assert_allclose(
        ridge.weight * unit, train_ridge([x], labels, 4, 1e-3).weight, atol=1e-4
    )
    # With the penalty of ordinary features there is none to speak of: still no warning.
    train_lbfgs([large], labels, 4, ExactRecipe(1e-3))
    assert not [str(one.message) for one in recwarn]


def test_the_objective_is_that_of_the_head_in_float64():
    x, labels = clouds(4000, dim=80, spread=5.0)
    x *= np.float32(1e6)
    recipe = ExactRecipe(1 / 4000)
    result = train_lbfgs([x], labels, 4, recipe)
    exact = objective(
        result.weight.astype(np.float64), result.bias, [x.astype(np.float64)], labels, recipe
    )
    assert result.converged and result.steps < 100
    assert result.objective == pytest.approx(exact.value, rel=1e-12)


def test_a_long_sweep_asks_every_fourth_value_and_those_around_the_best():
    generator = np.random.default_rng(0)
    labels = np.arange(1600) % 800
    x = generator.normal(size=(800, 512))[labels] + generator.normal(scale=3, size=(1600, 512))
    swept, _ = sweep(divide([x.astype(np.float32)], labels), 800, None)
    tried = [round(math.log(point.C / C_GRID[0], C_GRID[1] / C_GRID[0])) for point in swept.points]
    assert len(tried) < 12 and tried == sorted(tried)
    assert set(range(2, 12, 4)) <= set(tried) and 14 not in tried  # 6 and 10 were no better than 2
    best = tried[[point.C for point in swept.points].index(swept.C)]
    assert {best - 1, best + 1} <= set(tried)
    assert swept.C == max(swept.points, key=lambda point: point.score).C


def test_lbfgs_with_duplicated_and_constant_features():
    x, labels = clouds()
    x = np.column_stack([x, x, np.full(len(x), 7, np.float32)])
    result = train_lbfgs([x], labels, 4, ExactRecipe(1e-3))
    weight, bias = reference(x, labels, 1e-3)
    best = objective(weight, bias, [x], labels, ExactRecipe(1e-3)).value
    assert result.converged and result.objective / best - 1 < 2e-6
    assert abs(result.weight[:, -1]).max() < 1e-5, "a constant explains nothing"
    np.testing.assert_allclose(result.weight[:, :12], result.weight[:, 12:24], atol=1e-4)


def test_views_are_further_rows():
    x, labels = clouds(400)
    other = x + np.float32(0.3)
    views = train_lbfgs([x, other], labels, 4, ExactRecipe(1e-3))
    rows = np.concatenate([x, other])
    stacked = train_lbfgs([rows], np.tile(labels, 2), 4, ExactRecipe(1e-3))
    assert views.objective == pytest.approx(stacked.objective, rel=2e-6)


def test_labels_in_step_with_any_stride_do_no_harm():
    x, _ = clouds(3000, dim=6, n_classes=2)
    labels = np.arange(3000) % 2
    x[:, 0] += 3 * labels
    assert train_lbfgs([x], labels, 2, ExactRecipe(1e-3)).converged


def test_an_early_stop_is_reported():
    x, labels = clouds(spread=3.0)
    stopped = train_lbfgs([x], labels, 4, ExactRecipe(1e-6, max_iterations=3))
    assert stopped.converged is False and stopped.steps == 3


def test_a_start_spares_iterations():
    x, labels = clouds(2000, dim=30)
    cold = train_lbfgs([x], labels, 4, ExactRecipe(1e-3))
    warm = train_lbfgs([x], labels, 4, ExactRecipe(1e-3), start=cold)
    assert warm.steps < cold.steps / 2
    assert warm.objective == pytest.approx(cold.objective, rel=2e-6)


@pytest.mark.parametrize("decay", [1e-3, 1.0])
def test_ridge_solves_its_normal_equations(decay):
    x, labels = clouds()
    result = Ridge([x[:300], x[300:]], labels[:300], 4)  # two views of 300 images
    targets = np.eye(4)[np.tile(labels[:300], 2)]
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    gram = centred.T @ centred / len(x) + decay * np.eye(12)
    expected = np.linalg.solve(gram, centred.T @ (targets - targets.mean(axis=0)) / len(x)).T
    solution = result.solve(decay)
    np.testing.assert_allclose(solution.weight, expected, atol=1e-4 * abs(expected).max())
    value = ridge_objective(solution.weight, solution.bias, [x[:300], x[300:]], labels[:300], decay)
    assert solution.objective == pytest.approx(value, rel=1e-4)
    shifted = ridge_objective(
        solution.weight * 1.01, solution.bias, [x[:300], x[300:]], labels[:300], decay
    )
    assert value < shifted and solution.gradient_norm < 1e-8


def test_scaling_is_fitted_on_train_and_folded_into_the_head():
    x, labels = clouds()
    x[:, 3] = 2.5
    scaling = Scaling("standardize", [x])
    scaled = scaling.apply(x)
    assert abs(scaled.mean(axis=0)).max() < 1e-5
    np.testing.assert_allclose(np.delete(scaled.std(axis=0), 3), 1, atol=1e-4)
    assert abs(scaled[:, 3]).max() < 1e-5
    head = train_lbfgs([scaled], labels, 4, ExactRecipe(1e-3))
    weight, bias = scaling.fold(head.weight, head.bias)
    np.testing.assert_allclose(x @ weight.T + bias, scaled @ head.weight.T + head.bias, atol=2e-3)
    unit = Scaling("l2", [x]).apply(np.vstack([x, np.zeros((1, 12), np.float32)]))
    np.testing.assert_allclose(np.linalg.norm(unit[:-1], axis=1), 1, atol=1e-5)
    assert not unit[-1].any()
    assert Scaling("none", [x]).apply(x) is x
    with pytest.raises(RecipeError, match="none, standardize, l2, found 'minmax'"):
        Scaling("minmax", [x])


def test_the_default_grid_goes_on_beyond_its_ends_while_the_score_rises():
    x, labels = clouds(400, dim=200, spread=8.0)
    for features, beyond in ((x / np.float32(1e4), "above"), (x, "below")):
        swept, _ = sweep(divide([features], labels), 4, None)
        tried = [point.C for point in swept.points]
        assert C_GRID[-1] < swept.C if beyond == "above" else C_GRID[0] > swept.C
        assert tried[0] < swept.C < tried[-1] and swept.at_edge == ""
        assert len(tried) < 15  # every fourth, then those around the best


def test_a_fit_of_a_sweep_does_not_start_from_a_larger_value():
    # Its large weights would remain where the objective hardly sees them, and change the ranking.
    x, labels = clouds(500, dim=60, spread=3.0)
    (parts,) = divide([x], labels)
    fits = [_fit_lbfgs(parts, 4, ExactRecipe()) for _ in range(2)]
    fits[0](100.0)
    assert np.array_equal(fits[0](1e-4).weight, fits[1](1e-4).weight)


def test_a_grid_as_text():
    assert grid_of("1e-6:1e5:45") == pytest.approx(tuple(np.logspace(-6, 5, 45)))
    assert grid_of([10, 1]) == (1.0, 10.0)
    for wrong in ("1:2", "a:b:c", "0:1:3", "1:1:3", "1:inf:3", "1:2:9999", [1], [1, "x"], [1, -1]):
        with pytest.raises(RecipeError, match="expected start:stop:count"):
            grid_of(wrong)


@pytest.mark.parametrize("recipe", [ExactRecipe(), None])
def test_a_sweep_finds_the_better_penalty_and_names_an_edge(recipe):
    x, labels = clouds(400, dim=200, spread=8.0)

    def run(grid):
        return sweep(divide([x], labels), 4, recipe, grid=grid)[0]

    swept = run(tuple(np.logspace(-8, 4, 9)))
    best = max(swept.points, key=lambda point: point.score)
    assert swept.C == best.C and swept.at_edge == ""
    assert (swept.n_fit, swept.n_holdout, len(swept.points)) == (320, 400, 9)
    assert swept.n_folds == 5  # 80 images are too few to tell values apart
    assert run((swept.C * 100, swept.C * 1000)).at_edge in ("lowest", "highest")
    assert run((swept.C, swept.C * 1e4)).at_edge == "lowest"
    assert run(tuple(np.logspace(-8, 4, 9))) == swept, "the same holdout again"


def test_a_sweep_never_sees_the_test_split():
    """It is given training features alone, and holds out a stratified part of them."""
    x, labels = clouds(1000, shares=[0.7, 0.1, 0.1, 0.1])
    seen = []

    def score(predicted, expected_labels):
        seen.append(expected_labels)
        return float(np.mean(predicted == expected_labels))

    sweep(divide([x], labels), 4, None, grid=(1.0, 2.0), score=score)
    shares = np.bincount(seen[0]) / len(seen[0])
    np.testing.assert_allclose(shares, np.bincount(labels) / len(labels), atol=0.01)
    assert np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.0},
        {"tolerance": 0.0},
        {"tolerance": 2.0},
        {"max_iterations": 0},
        {"weight_decay": math.nan},
    ],
)
def test_recipes_out_of_range(changes):
    with pytest.raises(RecipeError, match=next(iter(changes)).replace("_", " ")):
        ExactRecipe(**changes)


@pytest.mark.parametrize(
    ("n", "dim", "C"), [(24, 60, 1.0), (24, 60, 1e6), (90, 50, 1e-4), (90, 50, 1.0), (90, 50, 1e4)]
)
def test_few_rows_are_solved_from_their_inner_products_and_proven(n, dim, C):
    generator = np.random.default_rng(1)
    labels = np.arange(n) % 3
    x = generator.normal(size=(3, dim))[labels] + generator.normal(0, 2, (n, dim)) + 3
    x = x.astype(np.float32)
    recipe = ExactRecipe(1 / (C * n))
    shared = Shared([x])
    assert shared.gram is not None
    found = train_lbfgs([x], labels, 3, recipe, shared=shared)
    # The optimum by passes over the features alone.
    shared.gram = None
    best = train_lbfgs([x], labels, 3, replace(recipe, tolerance=1e-9), shared=shared)
    assert found.converged and found.gap <= 1e-6 * found.objective
    assert found.objective - best.objective <= found.gap + 1e-9 * best.objective
    assert np.abs(found.weight - best.weight).max() < 1e-2 * np.abs(best.weight).max()


def test_weights_and_views_of_few_rows_count_as_repeated_rows():
    generator = np.random.default_rng(2)
    labels = np.arange(40) % 4
    x = (generator.normal(size=(4, 90))[labels] + generator.normal(size=(40, 90))).astype(
        np.float32
    )
    times = 1 + np.arange(40) % 3
    recipe = ExactRecipe(1e-2, 1e-9)
    weighted = train_lbfgs([x], labels, 4, recipe, weights=times.astype(float))
    repeated = train_lbfgs([np.repeat(x, times, axis=0)], np.repeat(labels, times), 4, recipe)
    np.testing.assert_allclose(weighted.weight, repeated.weight, atol=1e-4)
    views = train_lbfgs([x, x + 1], labels, 4, recipe)
    stacked = train_lbfgs([np.concatenate([x, x + 1])], np.tile(labels, 2), 4, recipe)
    np.testing.assert_allclose(views.weight, stacked.weight, atol=1e-4)


@pytest.mark.parametrize("n", [100, 3000])
def test_the_gap_bounds_the_distance_to_the_optimum(n):
    x, labels = clouds(n, dim=60, spread=4.0)
    recipe = ExactRecipe(1e-2)
    best = train_lbfgs([x], labels, 4, recipe)
    for iterations in (1, 3, 6):
        stopped = train_lbfgs([x], labels, 4, replace(recipe, max_iterations=iterations))
        assert 0 <= stopped.objective - best.objective <= stopped.gap
    assert best.gap <= 1e-6 * best.objective


def test_a_search_ends_with_its_time_and_says_how_good_it_is():
    x, labels = clouds(6000, dim=40, spread=4.0)
    none = np.zeros((4, 40), np.float32), np.zeros(4, np.float32)
    start = objective(*none, [x], labels, ExactRecipe(1e-3)).value
    late = train_lbfgs([x], labels, 4, ExactRecipe(1e-3), until=0.0)
    assert not late.converged and late.steps < 5 and late.objective <= start
    best = train_lbfgs([x], labels, 4, ExactRecipe(1e-3), until=time.perf_counter() + 1e3)
    assert best.converged and late.objective - best.objective <= late.gap <= late.objective


def test_a_sweep_that_is_late_has_tried_the_middle_of_the_grid():
    x, labels = clouds(3000, dim=40, spread=4.0)
    messages = []
    parts, report = divide([x], labels), messages.append
    swept, _ = sweep(parts, 4, ExactRecipe(), until=0.0, on_progress=report)
    assert [point.C for point in swept.points] == [C_GRID[10]] and swept.points[0].score > 0.5
    assert swept.at_edge == ""  # nothing was tried beside it
    sweep(parts, 4, ExactRecipe(), grid=(0.1, 1.0), on_progress=report)
    assert any(message.note.endswith("% of held-out images so far") for message in messages)
