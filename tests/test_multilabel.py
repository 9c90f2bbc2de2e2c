"""Multi-label heads: exact, chosen on a holdout, measured on the test split."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from featcache.errors import TableError
from featcache.probes.label_heads import label_objective, label_totals, train_labels
from featcache.probes.multilabel import holdout_rows, label_measures, probe_labels
from featcache.probes.sweep import C_GRID

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


def side(x, targets, groups=None, weights=None, views=None):
    return SimpleNamespace(views=views or [x], labels=targets, groups=groups, weights=weights)


def drawn(n=600, dim=12, n_labels=5, seed=0, dtype=np.float32):
    """Correlated features far from the origin; labels from rare to common."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, dim)) @ generator.normal(size=(dim, dim)) + 5
    scores = (x - 5) @ generator.normal(size=(dim, n_labels)) / 2
    odds = np.linspace(-4, 1, n_labels)
    targets = generator.random((n, n_labels)) < 1 / (1 + np.exp(-scores - odds))
    return x.astype(dtype), targets.astype(np.int8)


def reference(x, y, C, weights=None):
    """scikit-learn's optimum of one label, as exactly as it can be had."""
    mean = x.mean(axis=0, dtype=np.float64)
    model = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky")
    model.fit(x.astype(np.float64) - mean, y, weights)
    return model.coef_, model.intercept_ - model.coef_ @ mean


@pytest.mark.parametrize("C", [1e-4, 1e-1, 100.0])
@pytest.mark.parametrize("case", ["plain", "missing and weights", "float16", "wide", "many rows"])
def test_every_label_reaches_scikit_learns_optimum(case, C):
    sizes = {"wide": {"n": 60, "dim": 150}, "many rows": {"n": 20_000, "dim": 8}}
    dtype = np.float16 if case == "float16" else np.float32
    x, targets = drawn(**sizes.get(case, {}), dtype=dtype)
    targets = targets[:, 1:] if case == "wide" else targets
    weights = None
    if case == "missing and weights":
        generator = np.random.default_rng(1)
        targets[generator.random(targets.shape) < 0.2] = -1
        weights = generator.uniform(0.5, 3, len(x))
    decay = 1 / (C * label_totals(targets, weights, 1))
    heads = train_labels([x], targets, decay, weights=weights)
    exact = x.astype(np.float64)
    for label in range(targets.shape[1]):
        known = targets[:, label] >= 0
        share = None if weights is None else weights[known]
        weight, bias = reference(x[known], targets[known, label], C, share)
        own = np.ascontiguousarray(targets[:, [label]].T), decay[[label]], weights
        best = label_objective(weight, bias, [exact], *own).value[0]
        mine = heads.weight[[label]], heads.bias[[label]]
        at = label_objective(*mine, [exact], *own).value[0]
        assert -1e-7 <= at - best <= 2e-6 * max(best, 1e-2)
        assert heads.objective[label] == pytest.approx(at, rel=1e-4, abs=1e-7)
    assert heads.converged.all() and heads.weight.dtype == np.float32


def test_a_label_is_the_same_alone_and_among_others():
    x, targets = drawn(3000)
    decay = 1 / label_totals(targets, None, 1)
    together = train_labels([x], targets, decay)
    alone = train_labels([x], targets[:, [3]], decay[[3]])
    np.testing.assert_allclose(together.weight[[3]], alone.weight, atol=1e-4)
    warm = train_labels([x], targets, decay, start=together)
    assert warm.passes < together.passes / 2


def test_views_are_further_rows_and_weight_2_is_two_images():
    x, targets = drawn(300)
    decay = np.full(5, 1e-3)
    views = train_labels([x, x + 1], targets, decay)
    stacked = train_labels([np.concatenate([x, x + 1])], np.tile(targets, (2, 1)), decay)
    np.testing.assert_allclose(views.objective, stacked.objective, rtol=1e-6)
    weights = np.where(np.arange(300) < 100, 2.0, 1.0)
    weighted = train_labels([x], targets, decay, weights=weights)
    rows = np.append(np.arange(300), np.arange(100))
    repeated = train_labels([x[rows]], targets[rows], decay)
    np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-6)


def test_separable_labels_end():
    x, _ = drawn(200)
    targets = (x[:, :2] > np.median(x[:, :2], axis=0)).astype(np.int8)
    heads = train_labels([x], targets, np.full(2, 1e-7))
    assert np.isfinite(heads.weight).all() and heads.objective.max() < 0.01


def test_an_early_stop_is_reported():
    x, targets = drawn(2000, dim=60)
    assert not train_labels([x], targets, np.full(5, 1e-6), max_passes=3).converged.all()


def test_the_holdout_has_a_share_of_every_label():
    generator = np.random.default_rng(0)
    targets = (generator.random((2000, 6)) < [0.001, 0.002, 0.01, 0.1, 0.5, 0.9]).astype(np.int8)
    targets[:, 0] = 0
    targets[:2, 0] = 1
    held = holdout_rows(targets, 0)
    assert len(held) == pytest.approx(400, abs=5)
    assert targets[held, 0].sum() == 1, "two positives: one on each side"
    share = targets[held].sum(axis=0) / targets.sum(axis=0)
    np.testing.assert_allclose(share[2:], 0.2, atol=0.08)
    assert np.array_equal(held, holdout_rows(targets, 0))
    assert not np.array_equal(held, holdout_rows(targets, 1))


def test_the_holdout_keeps_groups_together():
    _, targets = drawn(1000)
    groups = np.random.default_rng(0).integers(100, size=1000) * 7
    held = holdout_rows(targets, 0, groups)
    others = np.setdiff1d(np.arange(1000), held)
    assert not set(groups[held]) & set(groups[others])
    assert 100 < len(held) < 300
    assert len(holdout_rows(targets, 0, np.zeros(1000, int))) == 200, "one group has to be cut"


def test_a_probe_of_labels_from_choice_to_check():
    x, targets = drawn(1500, n_labels=4)
    targets[:, 0] = 0
    train = side(x[:1000], targets[:1000])
    scores, head = probe_labels(train, None, side(x[1000:], targets[1000:]), list("abcd"))
    assert head.task == "labels" and head.class_names == ("b", "c", "d")
    assert scores.notes[0].startswith("not trained, since all training images or none have it: 'a'")
    assert scores.labels[0].C is None and scores.labels[0].average_precision is None
    assert scores.check.objective_gap < 1e-5 and scores.check.converged
    assert scores.check.average_precision_difference < 1e-3
    logits = head.scores(x[1000:])
    for label, one in enumerate(scores.labels[1:]):
        own = targets[1000:, label + 1]
        expected = average_precision_score(own, logits[:, label])
        assert one.average_precision == pytest.approx(expected)
        low, high = one.average_precision_interval
        assert low < one.average_precision < high
        assert one.f1 == pytest.approx(f1_score(own, head.predict(x[1000:])[:, label]))
        assert (one.n_test, one.n_test_positive) == (500, own.sum())
    micro = average_precision_score(targets[1000:, 1:], logits, average="micro")
    assert scores.micro_ap == pytest.approx(micro)
    assert scores.micro_f1 == pytest.approx(
        f1_score(targets[1000:, 1:], head.predict(x[1000:]), average="micro")
    )
    assert (scores.n_train, scores.n_test, scores.n_holdout) == (1000, 500, 200)
    again, _ = probe_labels(train, None, side(x[1000:], targets[1000:]), list("abcd"), check=False)
    assert again.labels == scores.labels


def test_val_chooses_and_test_does_not():
    x, targets = drawn(1500, dim=60)
    train, test = side(x[:300], targets[:300]), side(x[1000:], targets[1000:])
    chosen, _ = probe_labels(
        train, side(x[300:1000], targets[300:1000]), test, list("abcde"), check=False
    )
    assert chosen.n_holdout == 700
    # The C of a label is the best of the grid on the val images, fitted to all training images.
    label = 4
    reached = []
    for C in C_GRID:
        heads = train_labels([x[:300]], targets[:300, [label]], np.array([1 / (300 * C)]))
        logits = x[300:1000] @ heads.weight[0]
        reached.append(average_precision_score(targets[300:1000, label], logits))
    mine = reached[int(np.argmin(np.abs(np.log(C_GRID) - np.log(chosen.labels[label].C))))]
    assert mine >= max(reached) - 2e-3
    other = side(x[1000:], 1 - targets[1000:])
    moved, _ = probe_labels(
        train, side(x[300:1000], targets[300:1000]), other, list("abcde"), check=False
    )
    assert [one.C for one in moved.labels] == [one.C for one in chosen.labels]
    assert [one.threshold for one in moved.labels] == [one.threshold for one in chosen.labels]


def test_rare_and_unheard_labels_are_said():
    x, targets = drawn(400, n_labels=3)
    targets[:, 0] = 0
    targets[:3, 0] = 1
    val = targets[300:].copy()
    val[:, 1] = -1
    train, test = side(x[:300], targets[:300]), side(x[300:], targets[300:])
    scores, _ = probe_labels(train, side(x[300:], val), test, list("abc"), check=False)
    text = "\n".join(scores.notes)
    assert "C of 'a' chosen by log loss: fewer than 5 positives" in text
    assert "not known for any holdout image: 'b'; the threshold is 0.5" in text
    assert scores.labels[1].threshold == 0.5 and scores.labels[0].average_precision is None


@pytest.mark.parametrize("given", [{"C": 0.1}, {"weight_decay": 1 / 80}])
def test_a_given_penalty_is_kept(given):
    x, targets = drawn(200)
    train = side(x[:100], targets[:100, 2:])
    scores, _ = probe_labels(train, None, side(x, targets[:, 2:]), list("cde"), **given)
    expected = given.get("C", 80 / 100)
    assert [one.C for one in scores.labels] == pytest.approx([expected] * 3)
    assert scores.check.objective_gap < 1e-5


@pytest.mark.parametrize("scale", ["standardize", "l2"])
def test_scaling_is_in_the_head_and_weights_and_views_are_checked(scale):
    x, targets = drawn(400)
    targets[::7, 3] = -1
    weights = np.random.default_rng(0).uniform(0.1, 2, 300)
    train = side(x[:300], targets[:300], weights=weights, views=[x[:300], x[:300] + 0.1])
    test = side(x[300:], targets[300:])
    scores, head = probe_labels(train, None, test, list("abcde"), scale=scale)
    assert scores.check.objective_gap < 1e-5
    kept = [number for number, one in enumerate(scores.labels) if one.C is not None]
    again = label_measures(head, x[300:], targets[300:][:, kept])
    assert again.ranked.macro == scores.macro_ap


def test_nothing_to_learn():
    x, targets = drawn(50)
    with pytest.raises(TableError, match="'a': expected a label that some training images have"):
        probe_labels(side(x, targets[:, :1] * 0 + 1), None, side(x, targets[:, :1]), ["a"])
