"""Cross-validation against scikit-learn's, and what must not leak into a fold."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_exact import clouds

from featcache.errors import DatasetError, RecipeError
from featcache.metrics import score, wilson_interval
from featcache.probes.crossval import Fitted, group_interval, over_folds
from featcache.probes.crossval import cross_validate as validate
from featcache.probes.job import Job
from featcache.probes.recipes import ExactRecipe
from featcache.sampling import folds

pytestmark = pytest.mark.numpy1  # its draws may depend on NumPy


def cross_validate(
    views, labels, n_classes, *, solver="lbfgs", C=None, metric="top1", tolerance=1e-6, **given
):
    job = Job(solver, ExactRecipe(tolerance=tolerance), C, C is None, metric, "cpu", seed=5)
    return validate(views, labels, n_classes, job, **given)


def test_folds_are_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [60, 31, 5])
    numbers = folds(labels, 5, seed=3)
    counts = np.array([np.bincount(labels[numbers == fold], minlength=3) for fold in range(5)])
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all() and counts.sum() == 96
    assert np.array_equal(numbers, folds(labels, 5, seed=3))
    assert not np.array_equal(numbers, folds(labels, 5, seed=4))


def test_group_folds_keep_groups_whole_and_classes_even():
    generator = np.random.default_rng(0)
    groups = generator.integers(300, size=3000)
    labels = (groups % 10 == 0).astype(np.int64)  # a tenth of the patients is ill
    numbers = folds(labels, 5, 0, groups)
    of_group = [np.unique(numbers[groups == group]) for group in range(300)]
    assert all(len(fold) == 1 for fold in of_group)
    counts = np.array([np.bincount(labels[numbers == fold]) for fold in range(5)])
    assert (np.ptp(counts, axis=0) <= [30, 10]).all(), counts
    assert not np.array_equal(numbers, folds(labels, 5, 1, groups))


@pytest.mark.parametrize("shape", [(200,), (200, 3)])
def test_folds_of_numbers_ignore_their_values(shape):
    targets = np.random.default_rng(0).normal(size=shape)
    assert np.bincount(folds(targets, 4, 0)).tolist() == [50] * 4
    groups = np.repeat(np.arange(18), [30, *[10] * 17])
    assert np.ptp(np.bincount(folds(targets, 4, 0, groups))) <= 10


@pytest.mark.parametrize(
    ("labels", "n_folds", "groups", "message"),
    [
        (
            [0, 0, 0, 0, 1, 1],
            3,
            None,
            "folds: expected 3 images or more .* found 2 of class 1; ask",
        ),
        ([0.5, 1.5], 3, None, "expected 3 images or more .* found 2; ask for fewer"),
        ([0, 1, 0, 1], 3, [7, 7, 9, 9], "expected 3 groups or more, one for each fold, found 2"),
        ([], 2, None, "found 0"),
        ([], 2, [], "found 0"),
    ],
)
def test_more_folds_than_there_is_to_divide(labels, n_folds, groups, message):
    labels = np.array(labels, None if labels else np.int64)
    with pytest.raises(DatasetError, match=message):
        folds(labels, n_folds, 0, None if groups is None else np.array(groups))
    with pytest.raises(RecipeError, match="folds: expected 2 or more, found 1"):
        folds(labels, 1, 0)


@pytest.mark.parametrize("scale", ["none", "standardize"])
@pytest.mark.parametrize("weighted", [False, True])
def test_predictions_are_those_of_scikit_learn(scale, weighted):
    x, labels = clouds(400, dim=10, spread=4.0)
    weights = np.random.default_rng(1).lognormal(size=400) if weighted else None
    found = cross_validate(
        [x],
        labels,
        4,
        n_folds=4,
        repeats=2,
        C=0.1,
        scale=scale,
        weights=weights,
        class_weight="balanced" if weighted else None,
        tolerance=1e-9,
    )
    model = LogisticRegression(
        C=0.1, tol=1e-6, max_iter=20_000, class_weight="balanced" if weighted else None
    )
    name = "logisticregression__sample_weight"
    chain = make_pipeline(StandardScaler(with_std=scale == "standardize"), model)
    for repeat, numbers in enumerate(found.numbers):
        assert np.array_equal(numbers, folds(labels, 4, 5 + repeat))
        given = {"params": {name: weights}} if weighted else {}
        theirs = cross_val_predict(
            chain,
            x.astype(np.float64),
            labels,
            cv=PredefinedSplit(numbers),
            method="predict_proba",
            **given,
        )
        ours = found.predicted[repeat]
        assert np.mean(ours == theirs.argmax(axis=1)) > 0.995
        rows = np.arange(400)
        np.testing.assert_allclose(
            found.probabilities[repeat, :, 1], theirs[rows, labels], atol=1e-3
        )
        np.testing.assert_allclose(found.probabilities[repeat, :, 0], theirs[rows, ours], atol=1e-3)
    assert found.score == pytest.approx(np.mean(found.predicted == labels))
    assert found.interval == wilson_interval(found.score, 400)
    for fold in found.folds:
        test = found.numbers[fold.repeat] == fold.fold
        assert (fold.n_test, fold.n_train) == (test.sum(), 400 - test.sum())
        assert fold.score == np.mean(found.predicted[fold.repeat, test] == labels[test])
        assert fold.converged and pytest.approx(0.1) == fold.C


def test_ridge_is_that_of_scikit_learn():
    x, labels = clouds(300, dim=10, spread=3.0)
    found = cross_validate([x], labels, 4, n_folds=3, C=0.5, solver="ridge", metric="f1")
    theirs = cross_val_predict(
        SklearnRidge(alpha=2.0), x, np.eye(4)[labels], cv=PredefinedSplit(found.numbers[0])
    )
    assert np.mean(found.predicted[0] == theirs.argmax(axis=1)) > 0.99
    assert np.isnan(found.probabilities).all()
    assert found.score == score("f1", found.predicted[0], labels, 4)
    assert found.interval[0] < found.score < found.interval[1]


def told_by_group(n_groups=100, size=4):
    """Features that name the group alone; its label is a coin."""
    groups = np.arange(n_groups * size) % n_groups
    coin = np.random.default_rng(0).integers(2, size=n_groups)
    return np.eye(n_groups, dtype=np.float32)[groups] * 20, coin[groups], groups


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_nothing_of_a_group_reaches_the_head_that_predicts_it(solver):
    x, labels, groups = told_by_group()
    mixed = cross_validate([x], labels, 2, n_folds=4, solver=solver)
    apart = cross_validate([x], labels, 2, n_folds=4, solver=solver, groups=groups)
    assert mixed.score > 0.95 and apart.score < 0.75
    assert apart.n_groups == 100 and mixed.n_groups == apart.n_images == 400
    # 100 groups tell as much as 100 images, not 400.
    assert np.ptp(apart.interval) > 1.6 * np.ptp(wilson_interval(apart.score, 400))


@pytest.mark.parametrize("scale", ["none", "standardize"])
def test_a_fold_is_fitted_and_chosen_without_its_test_images(scale):
    x, labels = clouds(240, dim=40, spread=4.0)
    plain = cross_validate([x], labels, 4, n_folds=3, scale=scale)
    test = np.flatnonzero(plain.numbers[0] == 1)
    moved = x.copy()
    moved[test] = x[test[::-1]]
    moved[test[0]] *= 1e3  # would move a mean
    other = cross_validate([moved], labels, 4, n_folds=3, scale=scale)
    assert other.folds[1].C == plain.folds[1].C
    assert np.array_equal(other.predicted[0, test[1:]], plain.predicted[0, test[-2::-1]])


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_a_class_of_one_group_is_told_and_always_wrong(n_classes, solver):
    x, labels = clouds(240, n_classes=n_classes, spread=0.1)
    groups = np.where(labels == 1, 99, np.arange(240) % 12)
    found = cross_validate([x], labels, n_classes, n_folds=3, solver=solver, groups=groups)
    assert found.of_one_group == (1,)
    assert np.array_equal(found.predicted[0] == labels, labels != 1)


def test_views_of_an_image_stay_on_its_side():
    x, labels, _ = told_by_group(200, 1)
    views = cross_validate([x, x], labels, 2, n_folds=4)
    assert views.predicted.shape == (1, 200) and views.score < 0.7


def test_images_without_weight_are_in_no_fold():
    x, labels = clouds(300)
    weights = np.where(np.arange(300) % 4, 1.0, 0.0)
    found = cross_validate([x], labels, 4, n_folds=3, C=1.0, weights=weights)
    kept = weights > 0
    assert (found.numbers[:, ~kept] == -1).all() and (found.predicted[:, ~kept] == -1).all()
    assert np.isnan(found.probabilities[:, ~kept]).all() and found.n_images == kept.sum()
    alone = cross_validate([x[kept]], labels[kept], 4, n_folds=3, C=1.0)
    assert alone.score == found.score and np.array_equal(alone.predicted, found.predicted[:, kept])


def test_any_head_is_cross_validated():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), generator.integers(1, 9, size=60))
    targets = generator.normal(size=60)[groups]

    def fit_predict(train, test, on_progress):
        assert not np.intersect1d(groups[train], groups[test]).size
        return Fitted(np.full(len(test), targets[train].mean()))

    def error(predicted, rows):
        return float(np.mean(np.abs(targets[rows] - predicted)))

    found = over_folds(targets, fit_predict, error, n_folds=3, groups=groups)
    assert found.predicted.shape == (1, len(groups)) and found.probabilities is None
    assert found.score == error(found.predicted[0], np.arange(len(groups)))
    assert found.interval[0] < found.score < found.interval[1]
    assert [fold.C for fold in found.folds] == [None] * 3


def test_the_interval_covers_as_often_as_it_says_only_where_groups_are_drawn():
    """Means of groups of a known spread around 0, hardly any spread within."""
    covered = {True: 0, False: 0}
    for seed in range(50):
        generator = np.random.default_rng(seed)
        groups = np.repeat(np.arange(60), generator.integers(1, 9, size=60))
        targets = generator.normal(size=60)[groups]
        for whole in covered:
            low, high = group_interval(
                lambda rows, targets=targets: targets[rows].mean(),
                np.arange(len(groups)),
                groups if whole else None,
                resamples=200,
            )
            covered[whole] += low <= 0 <= high
    assert covered[True] >= 43 and covered[False] <= 35, covered


def test_an_interval_where_all_are_right_is_not_a_point():
    x, labels = clouds(200, n_classes=2, spread=0.01)
    groups = np.arange(200) // 10
    found = cross_validate([x], labels, 2, n_folds=2, C=1.0, groups=groups)
    assert found.score == 1 and found.interval == wilson_interval(1.0, 20)
    undefined = group_interval(lambda rows: float("nan"), np.arange(5), None, resamples=3)
    assert np.isnan(undefined).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": np.zeros(60)}, RecipeError, "found only zeros"),
        ({"n_folds": 90}, DatasetError, "expected 90 images or more of every class"),
    ],
)
def test_options_out_of_range(options, error, message):
    x, labels = clouds(60, n_classes=2)
    with pytest.raises(error, match=message):
        cross_validate([x], labels, 2, **{"n_folds": 3, "C": 1.0, **options})
