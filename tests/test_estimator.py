"""LinearProbe against scikit-learn: its contract, its optimum, its tools."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.errors import RecipeError
from featcache.probes.estimator import LinearProbe
from featcache.probes.scaling import SCALINGS

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


def clouds(n_classes, n=240, dim=6, spread=1.0, seed=0):
    """Return Gaussian classes around centres that are not centred themselves."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(n_classes, dim)) * 3 / np.sqrt(dim) + 1
    labels = np.arange(n) % n_classes
    return centres[labels] + generator.normal(scale=spread, size=(n, dim)), labels


def imbalanced(n_classes):
    """Keep every row of class 0, and 8 of each other class."""
    features, labels = clouds(n_classes, n=900)
    kept = (labels == 0) | (np.arange(len(labels)) < 8 * n_classes)
    return features[kept], labels[kept]


def rank_deficient(n_classes):
    """Repeat half of the columns, and add a constant one."""
    features, labels = clouds(n_classes)
    return np.column_stack([features, features[:, :3], np.ones(len(features))]), labels


DATA = {
    "2 classes": clouds(2),
    "3 classes": clouds(3),
    "7 classes": clouds(7, spread=2.0),
    "2 separable": clouds(2, spread=0.05),
    "3 separable": clouds(3, spread=0.05),
    "2 imbalanced": imbalanced(2),
    "3 imbalanced": imbalanced(3),
    "2 rank-deficient": rank_deficient(2),
    "4 rank-deficient": rank_deficient(4),
    "2, more dimensions than rows": clouds(2, n=50, dim=120),
    "3, more dimensions than rows": clouds(3, n=50, dim=120),
}


def value(model, features, labels):
    """Return scikit-learn's objective divided by C * N, from the formula."""
    scores = features.astype(np.float64) @ model.coef_.T.astype(np.float64) + model.intercept_
    if scores.shape[1] == 1:
        scores = np.column_stack([np.zeros(len(scores)), scores])
    top = scores.max(axis=1)
    losses = np.log(np.exp(scores - top[:, None]).sum(axis=1)) + top
    losses -= scores[np.arange(len(labels)), labels]
    penalty = np.square(model.coef_, dtype=np.float64).sum() / 2
    return losses.mean() + penalty / (model.C * len(labels))


# scikit-learn hands pytest a generator, of which pytest 9 warns: made a list here. Its comparison
# of weights with repeated rows wants seven digits of the scores, which needs luck of any solver
# that iterates: test_a_row_of_weight_2_is_two_rows stands in for it.
_lazy = parametrize_with_checks([LinearProbe(scale=scale) for scale in SCALINGS])
_checks = [pair for pair in _lazy.args[1] if "weight_equivalence" not in str(pair)]


@pytest.mark.parametrize(_lazy.args[0], _checks, **_lazy.kwargs)
def test_scikit_learns_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("inverse_penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("name", DATA)
def test_the_optimum_is_scikit_learns(name, inverse_penalty):
    features, labels = DATA[name]
    ours = LinearProbe(C=inverse_penalty, tolerance=1e-11, max_iterations=5000)
    theirs = LogisticRegression(C=inverse_penalty, tol=1e-8, max_iter=10_000)
    ours.fit(features, labels)
    theirs.fit(features, labels)
    assert ours.converged_
    assert ours.coef_.shape == theirs.coef_.shape
    assert ours.intercept_.shape == theirs.intercept_.shape
    assert value(ours, features, labels) == pytest.approx(value(theirs, features, labels), rel=1e-7)
    largest = abs(theirs.coef_).max()
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=3e-4 * largest)
    np.testing.assert_allclose(
        ours.predict_proba(features), theirs.predict_proba(features), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", DATA)
def test_the_default_tolerance_is_kept(name, dtype):
    features, labels = DATA[name]
    ours = LinearProbe().fit(features.astype(dtype), labels)
    theirs = LogisticRegression(tol=1e-8, max_iter=10_000).fit(features, labels)
    reached = value(ours, features, labels)
    assert ours.converged_ and 0 < ours.n_iter_ < 100
    assert ours.objective_ == pytest.approx(reached, rel=1e-6)
    assert reached <= value(theirs, features, labels) * (1 + 1e-6)
    assert ours.coef_.dtype == ours.intercept_.dtype == dtype
    assert ours.predict_proba(features.astype(dtype)).dtype == dtype


@pytest.mark.parametrize("n_classes", [2, 3])
def test_scores_have_scikit_learns_shapes_and_agree_with_each_other(n_classes):
    features, labels = clouds(n_classes, spread=2.0)
    names = np.array(["ash", "birch", "cedar"])[labels]
    probe = LinearProbe().fit(features, names)
    other = LogisticRegression(max_iter=1000).fit(features, names)
    scores, chances = probe.decision_function(features), probe.predict_proba(features)
    assert scores.shape == ((240,) if n_classes == 2 else (240, 3))
    assert chances.shape == (240, n_classes)
    np.testing.assert_array_equal(probe.classes_, other.classes_)
    np.testing.assert_allclose(scores, other.decision_function(features), atol=1e-2)
    np.testing.assert_allclose(chances.sum(axis=1), 1)
    np.testing.assert_allclose(probe.predict_log_proba(features), np.log(chances), atol=1e-12)
    np.testing.assert_array_equal(probe.predict(features), probe.classes_[chances.argmax(axis=1)])
    assert probe.score(features, names) == np.mean(probe.predict(features) == names) > 0.6


@pytest.mark.parametrize("n_classes", [2, 3])
def test_log_probabilities_stay_finite_where_probabilities_round_to_0(n_classes):
    features, labels = clouds(n_classes)
    probe = LinearProbe(C=100).fit(features, labels)
    far = features[:3] * 1e4
    assert (probe.predict_proba(far) == 0).any()
    assert np.isfinite(probe.predict_log_proba(far)).all()


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(
    ("scale", "step"), [("standardize", StandardScaler()), ("l2", Normalizer())]
)
def test_a_scale_is_what_a_pipeline_would_do(scale, step, n_classes):
    """New rows are scaled by what was learned of the training rows, a zero row by nothing."""
    features, labels = clouds(n_classes)
    features = np.column_stack([features * [1, 1, 50, 1, 1, 0.02], np.full(240, 0.1)])
    features[7] = 0 if scale == "l2" else features[7]
    fresh = np.concatenate([clouds(n_classes, seed=1)[0][:, [0, 1, 2, 3, 4, 5, 0]], [[0] * 7]])
    probe = LinearProbe(scale=scale, tolerance=1e-11).fit(features, labels)
    chain = make_pipeline(step, LinearProbe(tolerance=1e-11)).fit(features, labels)
    np.testing.assert_allclose(
        probe.predict_proba(fresh), chain.predict_proba(fresh), rtol=0, atol=1e-7
    )
    if scale == "standardize":
        by_hand = fresh @ probe.coef_.T + probe.intercept_
        np.testing.assert_allclose(probe.decision_function(fresh), np.squeeze(by_hand))


def test_it_works_in_a_pipeline_a_cross_validation_and_a_search():
    features, labels = clouds(3, spread=2.0)
    chain = make_pipeline(StandardScaler(), LinearProbe())
    reference = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=1000))
    scores = cross_val_score(chain, features, labels, cv=4)
    np.testing.assert_array_equal(scores, cross_val_score(reference, features, labels, cv=4))

    grid = [1e-4, 1e-2, 1.0, 100.0]
    result = []
    for model, name in ((chain, "linearprobe__C"), (reference, "logisticregression__C")):
        search = GridSearchCV(model, {name: grid}, scoring="neg_log_loss", cv=4)
        search.fit(features, labels)
        result.append((search.best_params_[name], search.cv_results_["mean_test_score"]))
    assert result[0][0] == result[1][0]
    np.testing.assert_allclose(result[0][1], result[1][1], atol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_iterations": 2}, "max_iterations ended the search after 2 iterations"),
        ({"tolerance": 1e-30}, "precision of floating point ended .* short of tolerance=1e-30"),
    ],
)
def test_an_early_stop_warns(parameters, message):
    features, labels = clouds(3)
    with pytest.warns(ConvergenceWarning, match=message):
        probe = LinearProbe(**parameters).fit(features, labels)
    assert not probe.converged_ and probe.n_iter_ <= parameters.get("max_iterations", 100)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"C": 0}, "C: expected a positive number, found 0"),
        ({"C": float("inf")}, "C: expected a positive number, found inf"),
        ({"scale": "minmax"}, "scale: expected one of none, standardize, l2, found 'minmax'"),
        ({"tolerance": 0}, "tolerance: expected"),
        ({"max_iterations": 0}, "max iterations: expected at least 1, found 0"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    features, labels = clouds(3)
    with pytest.raises(RecipeError, match=message):
        LinearProbe(**parameters).fit(features, labels)


def test_data_it_cannot_learn_from_are_refused():
    features, labels = clouds(3)
    with pytest.raises(ValueError, match="expected two classes or more, found one class: 0"):
        LinearProbe().fit(features, np.zeros_like(labels))
    with pytest.raises(
        TypeError, match="X: expected dense features, found a sparse csr_array; use"
    ):
        LinearProbe().fit(csr_array(features), labels)
    with pytest.raises(ValueError, match="Unknown label type"):
        LinearProbe().fit(features, features[:, 0])


@pytest.mark.parametrize("class_weight", [None, "balanced", {"ash": 4.0, "birch": 0.5}])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_weights_are_those_of_scikit_learn(n_classes, class_weight):
    features, labels = imbalanced(n_classes)
    names = np.array(["ash", "birch", "cedar"])[labels]
    weights = np.random.default_rng(0).lognormal(sigma=2, size=len(names))
    weights[::7] = 0
    ours = LinearProbe(C=0.3, class_weight=class_weight, tolerance=1e-11)
    theirs = LogisticRegression(C=0.3, class_weight=class_weight, tol=1e-8, max_iter=10_000)
    ours.fit(features, names, sample_weight=weights)
    theirs.fit(features, names, sample_weight=weights)
    np.testing.assert_allclose(
        ours.predict_proba(features), theirs.predict_proba(features), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("scale", SCALINGS)
def test_a_row_of_weight_2_is_two_rows(scale):
    features, labels = clouds(3)
    weights = np.arange(len(labels)) % 3
    probe = LinearProbe(scale=scale, tolerance=1e-11)
    weighted = clone(probe).fit(features, labels, weights)
    repeated = clone(probe).fit(np.repeat(features, weights, axis=0), np.repeat(labels, weights))
    np.testing.assert_allclose(
        weighted.decision_function(features), repeated.decision_function(features), atol=5e-5
    )
    assert weighted.objective_ == pytest.approx(repeated.objective_, rel=1e-9)


def test_rows_are_scaled_by_their_own_weight_and_not_by_that_of_their_class():
    features, labels = imbalanced(3)
    repeats = np.arange(len(labels)) % 3
    copies = np.repeat(features, repeats, axis=0), np.repeat(labels, repeats)
    options = {"scale": "standardize", "class_weight": {0: 0.1}, "tolerance": 1e-11}
    ours = LinearProbe(**options).fit(features, labels, repeats)
    chain = make_pipeline(StandardScaler(), LogisticRegression(class_weight={0: 0.1}, tol=1e-8))
    chain.fit(*copies)
    np.testing.assert_allclose(
        ours.predict_proba(features), chain.predict_proba(features), rtol=0, atol=2e-5
    )


def test_weights_that_it_cannot_use_are_refused():
    features, labels = clouds(3)
    with pytest.raises(RecipeError, match=r"found -1\.0 at image 0"):
        LinearProbe().fit(features, labels, -np.ones(240))
    with pytest.raises(RecipeError, match="class weight: expected a class of 0, 1, 2, found 'ash'"):
        LinearProbe(class_weight={"ash": 2}).fit(features, labels)
    with pytest.raises(ValueError, match="expected two classes or more, found one class: 0"):
        LinearProbe().fit(features, labels, labels == 0)
    with pytest.raises(TypeError, match="found a sparse csr_array"):
        LinearProbe().fit(features, labels).predict(csr_array(features))
