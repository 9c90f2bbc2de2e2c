"""Few-shot and learning curves: the draws, the arithmetic, and what they say."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_gaussian_cache

from featcache import compare, load, probe
from featcache.errors import DatasetError, FeatcacheError, OutputError, RecipeError
from featcache.metrics import mean_interval, wilson_interval
from featcache.probes import curves as _fits
from featcache.probes.curves import few_shot, learning_curve
from featcache.probes.recipes import ExactRecipe
from featcache.runs import CURVES, load_runs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Five overlapping classes, 200 training images of each."""
    path = tmp_path_factory.mktemp("curves") / "g.h5"
    return load(
        write_gaussian_cache(path, n_classes=5, n_train=1000, n_test=500, dim=16, spread=3.0)
    )


@pytest.fixture
def fits(monkeypatch):
    """Listen to what is fitted: features and labels of every draw, and the recipe."""
    fits = []
    original = _fits.fit

    def listen(features, labels, n_classes, solver, recipe, weights):
        fits.append((features.copy(), labels.copy(), n_classes, recipe))
        return original(features, labels, n_classes, solver, recipe, weights)

    monkeypatch.setattr(_fits, "fit", listen)
    return fits


def relabelled(cache, counts):
    """Return a cache like this one whose classes have so many training images."""
    labels = np.repeat(np.arange(len(counts)), counts)
    features = cache.train.features[: len(labels)]
    cache.train = SimpleNamespace(labels=labels, view=lambda name: features, content_hashes=None)
    return cache


def test_a_draw_is_seeded_and_stratified():
    labels = np.random.default_rng(0).integers(4, size=400)
    counts = np.full(4, 10)
    rows = _fits.draw(labels, counts, seed=3)
    assert np.bincount(labels[rows]).tolist() == [10] * 4
    assert np.array_equal(rows, np.unique(rows))
    assert np.array_equal(rows, _fits.draw(labels, counts, seed=3))
    assert not np.array_equal(rows, _fits.draw(labels, counts, seed=4))


def test_the_draw_of_a_class_depends_on_nothing_else():
    labels = np.arange(400) % 4
    rows = _fits.draw(labels, np.array([10, 10, 10, 10]), seed=0)
    of_class_2 = rows[labels[rows] == 2]
    expected = np.random.default_rng((0, 10, 2)).choice(np.arange(2, 400, 4), 10, replace=False)
    assert np.array_equal(of_class_2, np.sort(expected))
    alone = _fits.draw(labels, np.array([0, 0, 10, 0]), seed=0)
    assert np.array_equal(of_class_2, alone)
    merged = np.where(labels == 2, 2, 0)
    others = _fits.draw(merged, np.array([7, 0, 10]), seed=0)
    assert np.array_equal(of_class_2, others[merged[others] == 2])


def test_sizes_are_not_nested():
    labels = np.arange(400) % 4
    five, ten = (_fits.draw(labels, np.full(4, count), seed=0) for count in (5, 10))
    assert not set(five) <= set(ten)


def test_what_is_trained_on_is_what_was_drawn(cache, fits):
    points = few_shot(cache, shots=(3, "full"), seeds=2, recipe=ExactRecipe(weight_decay=0.1))
    assert [point.n_train for point in points] == [15, 1000]
    assert len(fits) == 3
    for seed, (features, labels, n_classes, recipe) in enumerate(fits[:2]):
        rows = _fits.draw(cache.train.labels, np.full(5, 3), seed)
        assert np.array_equal(features, cache.train.features[rows])
        assert np.array_equal(labels, cache.train.labels[rows])
        assert (n_classes, recipe.weight_decay) == (5, 0.1)
    assert np.array_equal(fits[2][0], cache.train.features)


def sample(n, dim, n_classes=4, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    centres = generator.normal(size=(n_classes, dim))
    features = centres[labels] + generator.normal(0, 2, (n, dim)) * generator.uniform(0, 2, dim) + 3
    return features.astype(np.float32), labels


@pytest.mark.parametrize(("n", "dim"), [(40, 12), (20, 60)])
def test_the_penalty_minimises_generalized_cross_validation(n, dim):
    features, labels = sample(n, dim)
    decay = _fits.fit(features, labels, 4, "ridge")[1]
    centred = (features - features.mean(axis=0)).astype(np.float64)
    targets = np.eye(4)[labels] - 1 / 4

    def gcv(value):
        hat = centred @ np.linalg.solve(centred.T @ centred + n * value * np.eye(dim), centred.T)
        left = 1 - (1 + np.trace(hat)) / n
        return np.square(targets - hat @ targets).sum() / n / left**2

    grid = centred.var(axis=0).sum() * 2.0 ** np.arange(-14, 4, 0.5)
    assert gcv(decay) <= min(map(gcv, grid)) * (1 + 1e-4)
    assert _fits.fit(features, labels, 4, "lbfgs")[1] == pytest.approx(decay / 2)


def test_the_penalty_of_one_shot_goes_with_the_variance(cache):
    features, labels = sample(4, 60)
    variance = features.var(axis=0).sum()
    assert _fits.fit(features, labels, 4)[1] == pytest.approx(variance / 8, rel=1e-4)
    assert _fits.fit(features, labels, 4, "ridge")[1] == pytest.approx(variance / 2, rel=1e-4)
    same = np.ones((8, 3), np.float32)  # of no variance
    assert _fits.fit(same, np.arange(8) % 4, 4)[1] > 0


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_the_unit_of_the_features_changes_no_prediction(solver):
    for n, unit in itertools.product((8, 40), (1024, 2.0**60)):
        features, labels = sample(n, 20)
        heads = [_fits.fit(values, labels, 4, solver) for values in (features, features * unit)]
        (one, decay), (other, larger) = heads
        assert larger == pytest.approx(decay * unit**2, rel=1e-3)
        scores = [features @ one.weight.T + one.bias, features * unit @ other.weight.T + other.bias]
        assert np.allclose(*scores, atol=1e-2)


def test_a_chosen_penalty_is_better_than_one_for_every_size(tmp_path):
    path = write_gaussian_cache(
        tmp_path / "g.h5", n_classes=4, n_train=400, n_test=800, dim=64, spread=6.0
    )
    chosen, fixed, ridge = (
        few_shot(path, shots=(10, 25), **options)
        for options in ({}, {"recipe": ExactRecipe()}, {"solver": "ridge"})
    )
    for one, other, third in zip(chosen, fixed, ridge, strict=True):
        assert min(one.mean, third.mean) > other.mean + 0.01
        assert len(set(one.weight_decays)) > 1 and set(other.weight_decays) == {5e-4}


def test_a_draw_does_not_depend_on_other_sizes(cache):
    together = few_shot(cache, shots=np.array([1, 5, 10]), seeds=3)
    alone = few_shot(cache.path, shots=(5,), seeds=3)
    fewer = few_shot(cache, shots=(10, 5), seeds=2)
    assert together[1].scores == alone[0].scores
    assert fewer[0].scores == together[2].scores[:2] and fewer[1].scores == alone[0].scores[:2]


def test_more_shots_score_higher(cache):
    points = few_shot(cache, shots=(1, 5, 25, "full"))
    means = [point.mean for point in points]
    assert means == sorted(means) and means[-1] > means[0] + 0.2
    assert [point.shots for point in points] == [1, 5, 25, None]
    assert [len(point.scores) for point in points] == [5, 5, 5, 1]
    assert all(point.converged and point.wall_s > 0 for point in points)


def test_more_of_every_class_scores_higher(cache):
    points = learning_curve(cache, fractions=(0.01, 0.1, 1.0), seeds=3)
    assert [point.n_train for point in points] == [10, 100, 1000]
    means = [point.mean for point in points]
    assert means == sorted(means) and means[-1] > means[0] + 0.1
    assert [point.shots for point in points] == [None] * 3
    assert points[2].scores == few_shot(cache, shots=("full",))[0].scores


def test_mean_and_interval(cache):
    drawn, full = few_shot(cache, shots=(2, "full"), seeds=4)
    assert drawn.mean == pytest.approx(sum(drawn.scores) / 4)
    assert drawn.interval == mean_interval(drawn.scores)
    half = 3.1824 * np.std(drawn.scores, ddof=1) / 2  # t at 97.5 %, 3 degrees of freedom
    assert drawn.interval == pytest.approx((drawn.mean - half, drawn.mean + half), abs=1e-4)
    assert full.scores == (full.mean,)
    assert full.interval == wilson_interval(full.mean, 500)
    (single,) = few_shot(cache, shots=(2,), seeds=1)
    assert single.scores == drawn.scores[:1]
    assert single.interval == wilson_interval(single.mean, 500)


def test_shots_full_and_fraction_1_are_the_same(cache):
    """200 shots of 200: there is one draw, and so no spread of draws."""
    every, full = few_shot(cache, shots=(200, "full"), seeds=3)
    assert (every.shots, full.shots) == (200, None)
    assert every.scores == full.scores and every.interval == full.interval


def test_a_fraction_keeps_the_proportions_and_loses_no_class(tmp_path, fits):
    path = write_gaussian_cache(tmp_path / "g.h5", n_classes=4, n_train=600)
    cache = relabelled(load(path), [500, 95, 5, 0])
    points = learning_curve(cache, fractions=(0.1, 0.01), seeds=1, metric="balanced")
    counts = [np.bincount(labels, minlength=4).tolist() for _, labels, *_ in fits]
    assert counts == [[50, 10, 1, 0], [5, 1, 1, 0]]
    assert [point.n_train for point in points] == [61, 7]


@pytest.mark.parametrize("metric", ["balanced", "f1"])
def test_other_metrics_have_intervals_of_their_own(cache, metric):
    (point,) = few_shot(cache, shots=("full",), metric=metric)
    assert point.interval[0] < point.mean < point.interval[1]
    assert point.interval != wilson_interval(point.mean, 500)


def test_a_class_with_too_few_images(tmp_path, fits):
    path = write_gaussian_cache(tmp_path / "g.h5", n_classes=3, n_train=120)
    scarce = relabelled(load(path), [60, 4, 56])
    excerpt = (
        "expected 5 training images of every class, found 4 of 'class 1'; ask for at most 4, or"
    )
    with pytest.raises(DatasetError, match=excerpt):
        few_shot(scarce, shots=(1, 5))
    assert not fits, "refused before anything was trained"
    assert few_shot(scarce, shots=(4,), seeds=2)[0].n_train == 12
    missing = relabelled(load(path), [60, 0, 60])
    with pytest.raises(DatasetError, match="found 0 of 'class 1'; extract a data set with more"):
        few_shot(missing, shots=(1,))


def test_a_solver_that_stopped_early_is_reported(cache):
    short = ExactRecipe(max_iterations=1)
    assert not any(point.converged for point in few_shot(cache, shots=(5, "full"), recipe=short))


def test_a_curve_leaves_a_record_that_a_comparison_leaves_out(cache, tmp_path):
    points = few_shot(cache, shots=(1, "full"), seeds=2, metric="balanced", runs=tmp_path)
    learning_curve(cache, fractions=(0.1,), seeds=1, runs=tmp_path)
    records, problems = load_runs(tmp_path)
    assert problems == [] and [record["kind"] for record in records] == list(CURVES)
    shots = records[0]
    assert shots["points"] == json.loads(json.dumps([asdict(point) for point in points]))
    assert (shots["metric"], shots["seeds"], shots["n_train"], shots["n_test"]) == (
        "balanced", 2, 1000, 500,
    )  # fmt: skip
    assert shots["dataset"] == "gaussian" and shots["cache"] == str(cache.path)
    assert (shots["solver"], shots["recipe"]) == ("lbfgs", None) and shots["wall_s"] > 0
    with pytest.raises(FeatcacheError, match="found only runs of few-shot"):
        compare(runs=tmp_path)
    probe(cache, check=False, runs=tmp_path)
    assert [record["kind"] for record in compare(runs=tmp_path)] == ["probe"]


@pytest.mark.parametrize(
    "change",
    [
        {"points": []},
        {"points": 3},
        {"points": [{"n_train": 3}]},
        {"points": [{"n_train": 3, "mean": 0.5, "scores": ["a"], "interval": [0.4, 0.6]}]},
        {"points": [{"n_train": 3, "mean": 0.5, "scores": [0.5], "interval": [0.4]}]},
        {"metric": None},
    ],
)
def test_a_damaged_record_of_a_curve_is_reported(cache, tmp_path, change):
    few_shot(cache, shots=(1,), seeds=1, runs=tmp_path)
    (file,) = tmp_path.glob("*/run.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    records, (problem,) = load_runs(tmp_path)
    assert not records and f"no usable {next(iter(change))}" in problem and str(file) in problem


def test_where_no_record_can_be_written_nothing_is_trained(cache, tmp_path, fits):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        few_shot(cache, shots=(1,), runs=tmp_path / "file")
    assert not fits


def test_progress_counts_fits(cache):
    messages = []
    few_shot(cache, shots=(1, 2, "full"), seeds=2, on_progress=messages.append)
    assert [message.done for message in messages] == [0, 1, 2, 3, 4, 5]
    assert {(message.total, message.unit) for message in messages} == {(5, "fit")}


@pytest.mark.parametrize(
    ("arguments", "excerpt"),
    [
        ({"shots": (0,)}, "shots: expected numbers from 1 or 'full', found 0"),
        ({"shots": ("all",)}, "found 'all'"),
        ({"shots": (2.5,)}, r"found 2\.5"),
        ({"shots": ()}, "shots: expected at least one number, found none"),
        ({"seeds": 0}, "seeds: expected at least 1, found 0"),
        ({"metric": "auc"}, "expected one of top1, balanced, f1, found 'auc'"),
        ({"solver": "sgd"}, "solver: expected one of lbfgs, ridge, found 'sgd'"),
    ],
)
def test_invalid_options(cache, arguments, excerpt):
    with pytest.raises(RecipeError, match=excerpt):
        few_shot(cache, **arguments)


@pytest.mark.parametrize("fraction", [0, 1.01, -0.5, float("nan")])
def test_fractions_out_of_range(cache, fraction):
    with pytest.raises(RecipeError, match="fractions: expected above 0 and at most 1"):
        learning_curve(cache, fractions=(fraction,))
