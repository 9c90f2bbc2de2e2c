"""Ridge on numeric targets, against its definition and scikit-learn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score

from featcache.errors import TableError
from featcache.probes.regression import Spectrum, number_sums, probe_numbers

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


def side(x, targets, groups=None, weights=None, views=None):
    return SimpleNamespace(views=views or [x], labels=targets, groups=groups, weights=weights)


def drawn(n=500, dim=20, n_targets=2, noise=1.0, seed=0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(dim, dim)) * np.geomspace(3, 0.05, dim)
    x = (generator.normal(size=(n, dim)) @ mixing + 5).astype(np.float32)
    y = x @ generator.normal(size=(dim, n_targets)) + 100
    return x, y + noise * generator.normal(size=y.shape)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(300, 20), (60, 150)])
def test_the_head_is_scikit_learns_ridge(shape, weighted):
    x, y = drawn(*shape)
    y[::9, 0] = np.nan
    weights = np.random.default_rng(1).uniform(0.2, 3, len(x)) if weighted else None
    if weighted:
        weights[:5] = 0
    scores, head = probe_numbers(side(x, y, weights=weights), None, side(x, y), ["a", "b"])
    for column, one in enumerate(scores.targets):
        known = ~np.isnan(y[:, column])
        share = None if weights is None else weights[known]
        model = Ridge(alpha=one.alpha).fit(x[known].astype(float), y[known, column], share)
        np.testing.assert_allclose(head.weight[column], model.coef_, atol=1e-4)
        np.testing.assert_allclose(head.scores(x)[:, column], model.predict(x), rtol=1e-4)
        assert one.n_train == known.sum()
    assert abs(scores.check.objective_gap) < 1e-5 and scores.check.r2_difference < 1e-5


@pytest.mark.parametrize("shape", [(300, 20), (60, 150)])
def test_the_penalty_minimises_gcv(shape):
    x, y = drawn(*shape, n_targets=1, noise=4.0)
    scores, _ = probe_numbers(side(x, y), None, side(x, y), ["a"], check=False)
    n, (one,) = len(x), scores.targets
    centred = x.astype(float) - x.mean(axis=0, dtype=float)
    # By singular values, as sums without cancellation: where the fit reaches every y, it is 0 / 0
    # in the limit, and rounding, which depends on the threads of BLAS, would look like a minimum.
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    kept = singular > 1e-6 * singular[0]
    known = y[:, 0] - y[:, 0].mean()
    along = left[:, kept].T @ known
    free = n - 1 - kept.sum()  # directions that no feature reaches
    beyond = known @ known - along @ along if free else 0.0

    def gcv(alpha):
        """As Golub, Heath and Wahba define it, from the residuals and the trace of the fit."""
        shrunk = alpha / (singular[kept] ** 2 + alpha)
        residual = (shrunk * along) @ (shrunk * along) + beyond
        unused = shrunk.sum() + free
        return residual / n / (unused / n) ** 2, n - unused

    sums = number_sums([x], y, np.arange(n), None)
    loss, trace = gcv(one.alpha)
    assert Spectrum(sums, n).gcv(0)(one.weight_decay) == pytest.approx(loss, rel=1e-6)
    assert one.degrees_of_freedom == pytest.approx(trace, rel=1e-6)
    grid = one.alpha * np.logspace(-3, 3, 61)
    assert loss <= min(gcv(alpha)[0] for alpha in grid) * (1 + 1e-4)
    # scikit-learn's RidgeCV leaves one out exactly, of which GCV is the rotation-invariant form.
    theirs = RidgeCV(alphas=grid).fit(x.astype(float), y[:, 0])
    model = Ridge(alpha=one.alpha).fit(x.astype(float), y[:, 0])
    np.testing.assert_allclose(model.predict(x), theirs.predict(x), atol=0.5 * y.std())


def test_val_chooses_where_there_is_one():
    x, y = drawn(700, dim=80, noise=8.0)
    parts = side(x[:120], y[:120]), side(x[120:400], y[120:400]), side(x[400:], y[400:])
    scores, _ = probe_numbers(*parts, ["a", "b"], check=False)
    assert scores.chosen_by == "val"
    for column, one in enumerate(scores.targets):

        def error(alpha, column=column):
            model = Ridge(alpha=alpha).fit(x[:120].astype(float), y[:120, column])
            return np.mean((model.predict(x[120:400]) - y[120:400, column]) ** 2)

        around = one.alpha * np.logspace(-2, 2, 21)
        assert error(one.alpha) <= min(map(error, around)) * (1 + 1e-5)


def test_measures_on_test_and_notes():
    x, y = drawn(600)
    y[400:, 1] = y[400:, 1].mean() * 3  # constant on test
    scores, head = probe_numbers(
        side(x[:400], y[:400]), None, side(x[400:], y[400:]), ["a", "b"], check=False
    )
    one, constant = scores.targets
    predicted = head.predict(x[400:])
    assert head.task == "numbers" and predicted.dtype == np.float32
    assert one.r2 == pytest.approx(r2_score(y[400:, 0], predicted[:, 0]))
    assert one.mae == pytest.approx(mean_absolute_error(y[400:, 0], predicted[:, 0]))
    assert one.spearman == pytest.approx(spearmanr(predicted[:, 0], y[400:, 0]).statistic)
    assert one.r2_interval[0] < one.r2 < one.r2_interval[1]
    assert constant.r2 is None and constant.spearman is None and constant.rmse > 0
    assert scores.r2 == one.r2
    shuffled = np.random.default_rng(0).permutation(y[:400])
    useless, _ = probe_numbers(side(x[:400], shuffled), None, side(x[400:], -y[400:]), ["a", "b"])
    assert any("R2 is below 0" in note for note in useless.notes)


def test_views_add_no_images_to_gcv():
    x, y = drawn(100, dim=60)
    single, _ = probe_numbers(side(x, y), None, side(x, y), ["a", "b"], check=False)
    twice, _ = probe_numbers(side(x, y, views=[x, x]), None, side(x, y), ["a", "b"], check=False)
    for one, other in zip(single.targets, twice.targets, strict=True):
        assert other.weight_decay == pytest.approx(one.weight_decay, rel=1e-3)
        assert other.alpha == pytest.approx(2 * one.alpha, rel=1e-3)


@pytest.mark.parametrize("given", [{"C": 0.5}, {"weight_decay": 1 / 50}])
@pytest.mark.parametrize("scale", ["none", "standardize", "l2"])
def test_a_given_penalty_and_scaling(given, scale):
    x, y = drawn(100)
    scores, _ = probe_numbers(side(x, y), None, side(x, y), ["a", "b"], scale=scale, **given)
    assert [one.alpha for one in scores.targets] == pytest.approx([2.0, 2.0])
    assert scores.chosen_by == "given" and abs(scores.check.objective_gap) < 1e-5
    assert scores.check.r2_difference < 1e-4


@pytest.mark.parametrize(
    ("values", "excerpt"),
    [
        (np.full(30, 2.5), "'a': expected different numbers, found 2.5 in all training images"),
        (np.full(30, np.nan), "'a': expected 3 training images with a number or more, found 0"),
        (np.append(np.arange(29.0), np.inf), "'a': expected finite numbers, found infinity in 1"),
        (np.arange(30) * 1e300, "'a': expected numbers that float32 can hold"),
    ],
)
def test_targets_from_which_nothing_can_be_learned(values, excerpt):
    x, _ = drawn(30)
    values = values[:, None]
    with pytest.raises(TableError, match=excerpt), np.errstate(over="ignore", invalid="ignore"):
        probe_numbers(side(x, values), None, side(x, values), ["a"])


def test_features_that_do_not_vary():
    x = np.ones((30, 4), np.float32)
    y = np.arange(30.0)[:, None]
    scores, _ = probe_numbers(side(x, y), None, side(x, y), ["a"], check=False)
    assert scores.targets[0].degrees_of_freedom == 1 and scores.r2 == pytest.approx(0, abs=1e-9)
