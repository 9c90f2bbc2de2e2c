"""Metrics and intervals, against values worked out by hand, published, or scikit-learn's."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from featcache.metrics import (
    METRICS,
    ReliabilityBin,
    average_precision,
    average_precisions,
    balanced_accuracy,
    confusion_matrix,
    expected_calibration_error,
    f1_threshold,
    macro_f1,
    mean_interval,
    number_scores,
    paired_test,
    per_class_accuracy,
    score,
    score_interval,
    sigmoid,
    softmax,
    top1,
    topk_accuracy,
    wilson_interval,
)

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


@pytest.fixture(params=range(4))
def imbalanced(request):
    """Predictions, labels and number of classes; some classes never labelled or predicted."""
    generator = np.random.default_rng(request.param)
    n_classes = 7
    labels = generator.choice([0, 1, 2, 4, 6], p=[0.6, 0.2, 0.1, 0.06, 0.04], size=400)
    noise = generator.choice([0, 1, 2, 3, 6], size=400)
    return np.where(generator.random(400) < 0.7, labels, noise), labels, n_classes


def test_top1_is_a_fraction():
    predicted, labels = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    assert top1(predicted, labels) == 0.75


def test_by_hand():
    """Class 0: 3 of 4 found, one of them taken for 1. Class 1: 1 of 2. Class 2: none there."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    predicted = np.array([0, 0, 0, 1, 1, 2])
    matrix = confusion_matrix(predicted, labels, 4)
    assert matrix.tolist() == [[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    result = per_class_accuracy(predicted, labels, 4)
    np.testing.assert_array_equal(result, [0.75, 0.5, np.nan, np.nan])
    assert result.dtype == np.float64
    assert balanced_accuracy(predicted, labels, 4) == 0.625
    # F1: 6 / (4 + 3), 2 / (2 + 2), 0 / (0 + 1), and class 3 does not exist.
    assert macro_f1(predicted, labels, 4) == pytest.approx((6 / 7 + 1 / 2 + 0) / 3)


def test_the_examples_of_scikit_learns_documentation():
    matrix = confusion_matrix(np.array([0, 0, 2, 2, 0, 2]), np.array([2, 0, 2, 2, 0, 1]), 3)
    assert matrix.tolist() == [[2, 0, 0], [0, 0, 1], [1, 0, 2]]
    predicted, labels = np.array([0, 1, 0, 0, 0, 1]), np.array([0, 1, 0, 0, 1, 0])
    assert balanced_accuracy(predicted, labels, 2) == 0.625
    predicted, labels = np.array([0, 2, 1, 0, 0, 1]), np.array([0, 1, 2, 0, 1, 2])
    assert macro_f1(predicted, labels, 3) == pytest.approx(0.2667, abs=5e-5)
    scores = np.array([[0.5, 0.2, 0.2], [0.3, 0.4, 0.2], [0.2, 0.4, 0.3], [0.7, 0.2, 0.1]])
    assert topk_accuracy(scores, np.array([0, 1, 2, 2]), 2) == 0.75


def test_against_scikit_learn(imbalanced):
    predicted, labels, n_classes = imbalanced
    matrix = sklearn_metrics.confusion_matrix(labels, predicted, labels=range(n_classes))
    assert np.array_equal(confusion_matrix(predicted, labels, n_classes), matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that some predicted classes have no labels
        expected = {
            "top1": sklearn_metrics.accuracy_score(labels, predicted),
            "balanced": sklearn_metrics.balanced_accuracy_score(labels, predicted),
            "f1": sklearn_metrics.f1_score(labels, predicted, average="macro"),
        }
    assert tuple(expected) == METRICS
    for metric, value in expected.items():
        assert score(metric, predicted, labels, n_classes) == pytest.approx(value, abs=1e-12)
    recall = per_class_accuracy(predicted, labels, n_classes)
    assert np.flatnonzero(np.isnan(recall)).tolist() == [3, 5]
    present = [0, 1, 2, 4, 6]
    assert recall[present] == pytest.approx(matrix.diagonal()[present] / matrix.sum(1)[present])


def test_always_the_large_class_is_good_at_top1_alone():
    labels = np.repeat([0, 1], [90, 10])
    predicted = np.zeros(100, np.int64)
    assert score("top1", predicted, labels, 2) == 0.9
    assert score("balanced", predicted, labels, 2) == 0.5
    assert score("f1", predicted, labels, 2) == pytest.approx((180 / 190 + 0) / 2)


def test_topk_against_scikit_learn_and_argmax():
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(300, 8)), generator.integers(8, size=300)
    for k in range(1, 8):
        expected = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k)
        assert topk_accuracy(scores, labels, k) == pytest.approx(expected)
    assert topk_accuracy(scores, labels, 8) == 1
    ties = generator.integers(3, size=(300, 8)).astype(np.float32)
    assert topk_accuracy(ties, labels, 1) == top1(ties.argmax(axis=1), labels)
    equal = np.zeros((3, 4))
    assert topk_accuracy(equal, np.array([0, 1, 3]), 2) == pytest.approx(2 / 3)


def test_a_broken_head_is_not_right_everywhere():
    labels = np.array([0, 1, 2])
    for k in (1, 2, 3):
        assert topk_accuracy(np.full((3, 3), np.nan), labels, k) == 0
    assert topk_accuracy(np.array([[0.5, np.nan, 0.1]]), labels[:1], 1) == 0
    with pytest.raises(ValueError, match="expected rows in"):
        expected_calibration_error(np.full((3, 3), np.nan), labels)


@pytest.mark.parametrize("k", [0, 4])
def test_topk_where_classes_do_not_allow_it(k):
    with pytest.raises(ValueError, match=f"from 1 to 3 classes, found {k}"):
        topk_accuracy(np.zeros((2, 3)), np.array([0, 1]), k)


def test_calibration_by_hand():
    """Four bins; confidences 0.75 (the edge belongs below), 0.6, 0.9, 0.9 and 1."""
    probabilities = np.array(
        [[0.75, 0.25, 0], [0.4, 0.6, 0], [0.9, 0.1, 0], [0, 0.1, 0.9], [0, 0, 1]]
    )
    labels = np.array([0, 0, 0, 0, 2])
    error, bins = expected_calibration_error(probabilities, labels, n_bins=4)
    # (0.5, 0.75]: 1 of 2 right, confidence 0.675. (0.75, 1]: 2 of 3 right, confidence 2.8 / 3.
    assert error == pytest.approx(2 / 5 * (0.675 - 0.5) + 3 / 5 * (2.8 / 3 - 2 / 3))
    assert bins[0] == ReliabilityBin(0.0, 0.25, 0, None, None)
    assert [one.n for one in bins] == [0, 0, 2, 3]
    assert (bins[2].confidence, bins[2].accuracy) == (pytest.approx(0.675), 0.5)
    assert (bins[3].low, bins[3].high, bins[3].accuracy) == (0.75, 1.0, pytest.approx(2 / 3))


def test_calibration_of_coins_that_keep_their_word():
    """Labels drawn from the stated probabilities: the error is sampling noise; doubled logits
    claim too much."""
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=1.5, size=(20_000, 4))
    probabilities = softmax(logits)
    drawn = (generator.random((20_000, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    labels = np.minimum(drawn, 3)
    error, bins = expected_calibration_error(probabilities, labels)
    assert len(bins) == 15 and sum(one.n for one in bins) == 20_000
    assert error < 0.02
    assert expected_calibration_error(softmax(2 * logits), labels)[0] > 0.1
    half = probabilities.astype(np.float16)
    assert expected_calibration_error(half, labels)[0] == pytest.approx(error, abs=2e-3)
    with pytest.raises(ValueError, match="use softmax on logits"):
        expected_calibration_error(logits, labels)
    with pytest.raises(ValueError, match="n_bins: expected 1 or more, found 0"):
        expected_calibration_error(probabilities, labels, n_bins=0)


def test_softmax_by_hand_and_far_out():
    np.testing.assert_allclose(softmax(np.log([[1.0, 2.0, 5.0]])), [[0.125, 0.25, 0.625]])
    np.testing.assert_array_equal(softmax(np.array([[3e4, 0], [-3e4, 0]], np.float16)), np.eye(2))


@pytest.mark.parametrize(
    ("predicted", "labels", "excerpt"),
    [
        ([0, 3], [0, 1], "predicted: expected classes from 0 to 2, found 0 to 3"),
        ([0, 1], [0, -1], "labels: expected classes from 0 to 2, found -1 to 0"),
        ([0, 1, 2], [0, 1], r"found shapes \(3,\) and \(2,\)"),
        ([], [], "1 or more"),
    ],
)
def test_arrays_that_would_be_miscounted(predicted, labels, excerpt):
    predicted, labels = np.array(predicted, np.int64), np.array(labels, np.int64)
    for measure in (confusion_matrix, per_class_accuracy, balanced_accuracy, macro_f1):
        with pytest.raises(ValueError, match=excerpt):
            measure(predicted, labels, 3)
    with pytest.raises(ValueError, match=excerpt):
        score("top1", predicted, labels, 3)


def test_a_metric_that_does_not_exist():
    with pytest.raises(ValueError, match="expected one of top1, balanced, f1, found 'auc'"):
        score("auc", np.array([0]), np.array([0]), 1)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in
        # Medicine 17 (1998), Table I, method 3 (score).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_against_published_values(hits, n, low, high):
    assert wilson_interval(hits / n, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("scores", "half"),
    [
        # t at 97.5 %, from Student's table: 12.706 (1 degree of freedom), 4.303 (2), 2.776 (4).
        ((0.4, 0.6), 12.706 * math.sqrt(0.02) / math.sqrt(2)),
        ((0.5, 0.6, 0.7), 4.303 * 0.1 / math.sqrt(3)),
        ((0.3, 0.4, 0.5, 0.6, 0.7), 2.776 * math.sqrt(0.025) / math.sqrt(5)),
    ],
)
def test_the_interval_of_a_mean_by_hand(scores, half):
    mean = sum(scores) / len(scores)
    expected = max(0.0, mean - half), min(1.0, mean + half)
    assert mean_interval(scores) == pytest.approx(expected, abs=1e-4)


def test_the_interval_of_a_mean_needs_two_scores():
    assert mean_interval([0.8, 0.8]) == (0.8, 0.8)
    with pytest.raises(ValueError, match="expected 2 or more, found 1"):
        mean_interval([0.8])


def test_the_interval_of_a_score(imbalanced):
    predicted, labels, n_classes = imbalanced
    hits = top1(predicted, labels)
    assert score_interval("top1", predicted, labels, n_classes) == wilson_interval(hits, 400)
    for metric in ("balanced", "f1"):
        low, high = score_interval(metric, predicted, labels, n_classes)
        assert 0 < low < score(metric, predicted, labels, n_classes) < high < 1
        shuffled = np.random.default_rng(0).permutation(400)
        again = score_interval(metric, predicted[shuffled], labels[shuffled], n_classes)
        assert again == pytest.approx((low, high), abs=0.02)


def test_the_bootstrap_is_as_wide_as_the_binomial_interval():
    """Of balanced accuracy the variance is known: sum of p (1 - p) / n over classes, by K^2."""
    labels = np.repeat([0, 1], [400, 100])
    predicted = labels.copy()
    predicted[:80] = 1
    predicted[400:440] = 0
    low, high = score_interval("balanced", predicted, labels, 2)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400 + 0.6 * 0.4 / 100) / 2
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.006)


# Several labels an image.


def test_average_precision_is_scikit_learns_also_with_ties():
    generator = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        for _ in range(20):
            scores = generator.integers(levels, size=60).astype(np.float32)
            labels = (generator.random(60) < 0.3).astype(np.int8)
            expected = sklearn_metrics.average_precision_score(labels, scores)
            assert average_precision(scores, labels) == pytest.approx(expected, abs=1e-12)
    assert average_precision(np.zeros(3), np.array([0, 1, 0])) == pytest.approx(1 / 3)
    assert math.isnan(average_precision(np.zeros(3), np.zeros(3, int)))
    assert math.isnan(average_precision(np.zeros(0), np.zeros(0, int)))


def labelled(n=400, n_labels=6, seed=0):
    generator = np.random.default_rng(seed)
    targets = (generator.random((n, n_labels)) < [0.02, 0.1, 0.2, 0.5, 0.9, 0]).astype(np.int8)
    return (generator.normal(size=targets.shape) + targets).round(1), targets


def test_macro_and_micro_leave_out_what_is_not_known():
    scores, targets = labelled()
    targets[::5, 2] = -1
    result = average_precisions(scores, targets)
    expected = [
        sklearn_metrics.average_precision_score(targets[rows, label], scores[rows, label])
        for label, rows in enumerate((targets >= 0).T[:5])
    ]
    assert result.per_label == pytest.approx((*expected, None))
    assert result.macro == pytest.approx(np.mean(expected))
    known = targets >= 0
    micro = sklearn_metrics.average_precision_score(targets[known], scores[known])
    assert result.micro == pytest.approx(micro)
    nothing = average_precisions(scores, targets * 0)
    assert (
        nothing.macro is nothing.micro is nothing.macro_interval is nothing.micro_interval is None
    )


def test_intervals_are_those_of_a_bootstrap_written_out():
    scores, targets = labelled()
    result = average_precisions(scores, targets)
    generator = np.random.default_rng(1)
    draws = []
    for _ in range(500):
        rows = generator.integers(400, size=400)
        own = [average_precision(scores[rows, label], targets[rows, label]) for label in (1, 2, 3)]
        draws.append([*own, np.mean(own)])
    low, high = np.percentile(draws, (2.5, 97.5), axis=0)
    for label in range(1, 4):
        expected = low[label - 1], high[label - 1]
        assert result.per_label_interval[label] == pytest.approx(expected, abs=0.03)
    assert result.per_label_interval[5] is None
    some = average_precisions(scores[:, 1:4], targets[:, 1:4])
    assert some.macro_interval == pytest.approx((low[3], high[3]), abs=0.02)


def test_intervals_respect_groups():
    scores, targets = labelled(100)
    repeated = np.repeat(scores, 9, axis=0), np.repeat(targets, 9, axis=0)
    groups = np.repeat(np.arange(100) * 3, 9)
    width = {
        name: np.subtract(*reversed(average_precisions(*repeated, of).macro_interval))
        for name, of in (("groups", groups), ("images", None))
    }
    assert width["images"] < width["groups"] / 2
    single = average_precisions(scores, targets)
    assert average_precisions(*repeated, groups).macro_interval == pytest.approx(
        single.macro_interval, abs=1e-9
    )


def test_the_threshold_has_the_highest_f1():
    generator = np.random.default_rng(0)
    for levels in (3, 50):
        labels = generator.random(80) < 0.3
        shares = np.round((generator.random(80) + labels) / 2 * levels) / levels
        best = max(
            sklearn_metrics.f1_score(labels, shares >= threshold) for threshold in np.unique(shares)
        )
        reached = sklearn_metrics.f1_score(labels, shares >= f1_threshold(shares, labels))
        assert reached == pytest.approx(best)
    assert f1_threshold(np.array([0.2, 0.8]), np.zeros(2, int)) == 0.5
    assert f1_threshold(np.array([0.2, 0.8]), np.array([0, 1])) == 0.5
    assert f1_threshold(np.array([0.2, 0.8]), np.array([1, 1])) == pytest.approx(0.1)


def test_sigmoid_never_overflows():
    assert sigmoid(np.array([-1e4, 0, 1e4])).tolist() == [0, 0.5, 1]


# Numbers.


def test_number_scores_are_those_of_scikit_learn_and_scipy():
    generator = np.random.default_rng(0)
    targets = generator.normal(size=(300, 2)).round(1) + 1000
    predicted = targets + generator.normal(size=(300, 2)).round(1)
    targets[::4, 1] = np.nan
    scored, r2, interval = number_scores(predicted, targets)
    for column, one in enumerate(scored):
        rows = ~np.isnan(targets[:, column])
        own = targets[rows, column], predicted[rows, column]
        assert one.n_test == rows.sum()
        assert one.r2 == pytest.approx(sklearn_metrics.r2_score(*own))
        assert one.mae == pytest.approx(sklearn_metrics.mean_absolute_error(*own))
        assert one.rmse == pytest.approx(math.sqrt(sklearn_metrics.mean_squared_error(*own)))
        assert one.spearman == pytest.approx(stats.spearmanr(*own).statistic)
        draws = generator.integers(len(own[0]), size=(300, len(own[0])))
        for name, measure in (
            ("r2", sklearn_metrics.r2_score),
            ("spearman", lambda *of: stats.spearmanr(*of).statistic),
        ):
            expected = np.percentile(
                [measure(*(x[row] for x in own)) for row in draws], (2.5, 97.5)
            )
            assert getattr(one, f"{name}_interval") == pytest.approx(tuple(expected), abs=0.04)
    assert r2 == pytest.approx(np.mean([one.r2 for one in scored]))
    assert interval[0] < r2 < interval[1]


def test_numbers_that_cannot_be_measured():
    (one,), r2, interval = number_scores(np.arange(3.0)[:, None], np.full((3, 1), 0.1))
    assert one.r2 is one.spearman is one.r2_interval is r2 is interval is None
    assert one.mae == pytest.approx(2.9 / 3, abs=0.1)
    (none,), _, _ = number_scores(np.zeros((2, 1)), np.full((2, 1), np.nan))
    assert (none.n_test, none.r2, none.mae, none.rmse, none.spearman) == (0, None, None, None, None)


def hits(both, only_first, only_second, neither):
    """Two classifiers' hits, with so many images of each kind."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return np.array(first), np.array(second)


def test_paired_differences_are_those_of_fagerland_lydersen_and_laake():
    """Their Table I: airway hyper-responsiveness before and after transplantation, 21 children."""
    tested = paired_test(*hits(1, 1, 7, 12))
    assert tested.difference == pytest.approx(-6 / 21)
    assert tested.p_value == pytest.approx(0.0391, abs=5e-5)
    assert tested.interval == pytest.approx((-0.508, -0.0134), abs=5e-4)
    assert (tested.n, tested.n_only_first, tested.n_only_second) == (21, 1, 7)


@pytest.mark.parametrize("counts", [(0, 9), (3, 5), (40, 60), (700, 812)])
def test_mid_p_is_half_the_probability_of_what_was_found_less_than_the_exact_p(counts):
    few, many = counts
    exact = stats.binomtest(few, few + many).pvalue
    mid = exact - stats.binom.pmf(few, few + many, 0.5)
    assert paired_test(*hits(5, few, many, 2)).p_value == pytest.approx(mid, rel=1e-9)
    mirrored = paired_test(*hits(5, many, few, 2))
    assert mirrored.p_value == pytest.approx(mid, rel=1e-9) and mirrored.difference > 0


def test_equal_hits_are_no_difference():
    assert paired_test(*hits(8, 0, 0, 2)).p_value == 1
    assert paired_test(*hits(8, 4, 4, 2)).p_value == pytest.approx(1)


def test_one_in_twenty_equal_pairs_is_called_different():
    """Two classifiers of one accuracy, independent errors: the test keeps its level."""
    generator = np.random.default_rng(0)
    draws = generator.random((2000, 2, 300)) < 0.8
    share = np.mean([paired_test(*pair).p_value < 0.05 for pair in draws])
    assert 0.035 < share < 0.06
