"""Nearest features and the k-NN probe, against brute force in float64."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from conftest import write_gaussian_cache

from featcache import knn, load
from featcache.errors import RecipeError, ShapeMismatchError
from featcache.metrics import mean_interval, top1, topk_accuracy, wilson_interval
from featcache.probes import knn as knn_module
from featcache.probes.blocks import Rows
from featcache.probes.curves import draw
from featcache.probes.knn import Space, knn_probe, nearest, nearest_blocks
from featcache.runs import load_runs

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


def brute_force(train, labels, test, n_classes, k, temperature=0.07):
    """Say the same with loops: rank by (similarity, row), add up votes, take the first largest."""
    train, test = train.astype(np.float64), test.astype(np.float64)
    predicted = []
    for query in test:
        ranked = []
        for row, feature in enumerate(train):
            lengths = math.sqrt(feature @ feature) * math.sqrt(query @ query)
            ranked.append((-(feature @ query) / lengths if lengths else -0.0, row))
        votes = [0.0] * n_classes
        for negative, row in sorted(ranked)[:k]:
            votes[labels[row]] += math.exp(-negative / temperature)
        predicted.append(votes.index(max(votes)))
    return np.array(predicted)


def clouds(n, m, dim=12, n_classes=5, seed=0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(n_classes, dim)) + 1
    labels, test_labels = generator.integers(n_classes, size=n), np.arange(m) % n_classes
    train = (centres[labels] + generator.normal(size=(n, dim))).astype(np.float32)
    test = (centres[test_labels] + generator.normal(size=(m, dim))).astype(np.float32)
    return train, labels, test, test_labels


@pytest.fixture
def small_blocks(monkeypatch):
    """Make several blocks of training and of test images out of a few hundred."""
    monkeypatch.setattr(knn_module, "_LEAST_ROWS", 16)
    monkeypatch.setattr(knn_module, "_ROWS", 16)


@pytest.mark.parametrize("blocks", ["one block", "many blocks"])
@pytest.mark.parametrize("order", ["shuffled", "by class"])
def test_every_k_agrees_with_brute_force(blocks, order, request):
    if blocks == "many blocks":
        request.getfixturevalue("small_blocks")
    train, labels, test, test_labels = clouds(n=300, m=50)
    if order == "by class":
        rows = np.argsort(labels, kind="stable")
        train, labels = train[rows], labels[rows]
    ks = (1, 3, 10, 100, 300)
    result = knn_probe(train, labels, test, 5, ks)
    assert tuple(result) == ks
    for k in ks:
        assert result[k].dtype == np.int64 and result[k].shape == (50,)
        assert np.array_equal(result[k], brute_force(train, labels, test, 5, k)), k
        assert np.array_equal(result[k], knn_probe(train, labels, test, 5, [k])[k]), k
    assert top1(result[10], test_labels) > 0.7


@pytest.mark.parametrize("k", [1, 5, 20, 39, 40, 50])
def test_the_largest_are_those_of_a_stable_sort(k):
    generator = np.random.default_rng(k)
    for distinct in (2, 10, 1000):
        values = generator.integers(distinct, size=(50, 40)).astype(np.float32)
        expected = np.sort(np.argsort(-values, axis=1, kind="stable")[:, :k], axis=1)
        assert np.array_equal(knn_module._largest(values, k), expected)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_one_vote_each_is_scikit_learns_classifier(distance, small_blocks):
    from sklearn.neighbors import KNeighborsClassifier

    train, labels, test, _ = clouds(n=300, m=60)
    if distance == "euclidean":  # an offset that would cost float32 its precision
        train, test = train + 100, test + 100
    ks = (1, 2, 5, 50, 299)
    result = knn_probe(train, labels, test, 5, ks, math.inf, distance=distance)
    for k in ks:
        other = KNeighborsClassifier(k, metric=distance, algorithm="brute")
        expected = other.fit(train.astype(np.float64), labels).predict(test.astype(np.float64))
        assert np.array_equal(result[k], expected), k


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
def test_distances_weigh_votes_in_any_unit(unit):
    """exp(-(1 - 0) / 2 T) against two votes of exp(-4 / 2 T): equal where exp(1.5 / T) is 2."""
    train = np.array([[1, 0], [2, 0], [-2, 0]], np.float32) * np.float32(unit)
    labels, query, equal = np.array([0, 1, 1]), np.zeros((1, 2), np.float32), 1.5 / math.log(2)
    for temperature, expected in ((0.9 * equal, 0), (1.1 * equal, 1), (math.inf, 1)):
        heat = temperature * unit * unit
        result = knn_probe(train, labels, query, 2, [3], heat, distance="euclidean")
        assert result[3] == expected


def test_an_image_is_no_neighbour_of_its_group(small_blocks):
    train, labels, *_ = clouds(n=200, m=1)
    groups = np.random.default_rng(0).integers(60, size=200)
    everything = Space(train, train)
    found = [rows for _, _, rows in nearest_blocks(everything, 7, groups=groups)]
    for row, neighbours in enumerate(np.concatenate(found)):
        apart = np.flatnonzero(groups != groups[row])
        assert np.array_equal(neighbours, apart[nearest(train[[row]], train[apart], 7)[1][0]])
    alone = knn_probe(train, labels, train, 5, [3], groups=np.arange(200))[3]
    for row in range(0, 200, 20):
        others = np.delete(np.arange(200), row)
        assert knn_probe(train[others], labels[others], train[[row]], 5, [3])[3] == alone[row]
    with pytest.raises(RecipeError, match="from 1 to the 199 training images, found 200"):
        knn_probe(train, labels, train, 5, [200], groups=np.arange(200))


def test_tie_rules_by_hand():
    east, north = [1.0, 0.0], [0.0, 1.0]
    train = np.array([north, east, east, north], np.float32)
    labels = np.array([2, 1, 0, 0])
    query = np.array([east], np.float32)
    assert knn_probe(train, labels, query, 3, [1])[1] == 1  # rows 1 and 2 alike: the first
    assert knn_probe(train, labels, query, 3, [2])[2] == 0  # one vote each: the lower class
    assert knn_probe(train, labels, np.zeros((1, 2), np.float32), 3, [1])[1] == 2  # all alike


def test_length_means_nothing_and_half_precision_little():
    train, labels, test, _ = clouds(n=400, m=100)
    result = knn_probe(train, labels, test, 5, [20])[20]
    lengths = np.random.default_rng(1).choice([0.25, 1, 4096], size=(400, 1)).astype(np.float32)
    assert np.array_equal(result, knn_probe(train * lengths, labels, test / 64, 5, [20])[20])
    halved = knn_probe(train.astype(np.float16), labels, test.astype(np.float16), 5, [20])[20]
    assert top1(halved, result) >= 0.99


def test_the_smallest_temperature_is_the_nearest_neighbour():
    train, labels, test, _ = clouds(n=200, m=40)
    result = knn_probe(train, labels, test, 5, [1, 50], temperature=1e-6)
    assert np.array_equal(result[1], result[50])


def test_memory_stays_bounded():
    """A matrix of all similarities would be 320 MB here."""
    import tracemalloc

    generator = np.random.default_rng(0)
    train = generator.normal(size=(20_000, 64)).astype(np.float16)
    test = generator.normal(size=(4_000, 64)).astype(np.float16)
    tracemalloc.start()
    try:
        knn_probe(train, np.arange(20_000) % 10, test, 10)
        assert tracemalloc.get_traced_memory()[1] < 96 << 20
    finally:
        tracemalloc.stop()


def test_progress_counts_every_test_image(small_blocks):
    train, labels, test, _ = clouds(n=100, m=40)
    progress = []
    knn_probe(train, labels, test, 5, [5], on_progress=progress.append)
    assert [message.done for message in progress] == [0, 16, 32, 40]
    assert {message.total for message in progress} == {40}


@pytest.mark.parametrize(
    ("arguments", "excerpt"),
    [
        ({"test_features": np.ones((9, 5))}, r"expected \(M, 12\) as in training, found \(9, 5\)"),
        ({"ks": (10, 201)}, "from 1 to the 200 training images, found 10, 201"),
        ({"ks": (0,)}, "found 0"),
        ({"ks": ()}, "found none"),
        ({"temperature": 0.0}, "temperature: expected a positive number, found 0.0"),
        ({"temperature": math.nan}, "found nan"),
        ({"distance": "hamming"}, "distance: expected one of cosine, euclidean, found 'hamming'"),
    ],
)
def test_invalid_options(arguments, excerpt):
    train, labels, test, _ = clouds(n=200, m=10)
    arguments = {"test_features": test, "ks": (10,), **arguments}
    with pytest.raises((RecipeError, ShapeMismatchError), match=excerpt):
        knn_probe(train, labels, n_classes=5, **arguments)


def searched(queries, keys, k, exclude_self=False):
    """Return what `nearest` returns, from one float64 matrix sorted by (similarity, row)."""
    units = []
    for features in (queries, keys):
        features = np.asarray(features[:], np.float64)
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        units.append(features / np.where(lengths > 0, lengths, 1))
    similarity = units[0] @ units[1].T
    if exclude_self:
        np.fill_diagonal(similarity, -np.inf)
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, rows, axis=1), rows


@pytest.mark.parametrize("rows", [16, 64, 1024])
@pytest.mark.parametrize("order", ["shuffled", "by class"])
@pytest.mark.parametrize("k", [1, 10, 199])
def test_nearest_agrees_with_brute_force(rows, order, k, monkeypatch):
    monkeypatch.setattr(knn_module, "_LEAST_ROWS", rows)
    monkeypatch.setattr(knn_module, "_ROWS", rows)
    train, labels, test, _ = clouds(n=200, m=50)
    if order == "by class":
        train = train[np.argsort(labels, kind="stable")]
    other = train.copy()  # not the same object: every pair of blocks meets twice
    for queries, keys, alone in ((test, train, False), (train, train, True), (train, other, True)):
        values, neighbours = nearest(queries, keys, k, exclude_self=alone)
        expected, expected_rows = searched(queries, keys, k, alone)
        assert values.dtype == np.float32 and neighbours.dtype == np.int64
        assert np.array_equal(neighbours, expected_rows)
        assert np.allclose(values, expected, atol=1e-6)
    values, neighbours = nearest(train, train, k)
    assert np.array_equal(neighbours[:, 0], np.arange(200)) and values.max() <= 1


@pytest.mark.parametrize("block", [1024, 1000])  # the second does not divide 65,536
def test_nearest_of_more_keys_than_two_bytes_count(block, monkeypatch):
    monkeypatch.setattr(knn_module, "_ROWS", block)
    keys = np.random.default_rng(0).normal(size=(70_000, 8)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    chosen = np.r_[0:3, 65_500:65_600, 69_997:70_000]
    similarity, rows = nearest(keys[chosen], keys, 3)
    assert np.array_equal(rows[:, 0], chosen)
    expected = -np.sort(-(keys[chosen].astype(np.float64) @ keys.T.astype(np.float64)), axis=1)
    assert np.allclose(similarity, expected[:, :3], atol=1e-6)
    assert np.allclose(np.einsum("qkd,qd->qk", keys[rows], keys[chosen]), similarity, atol=1e-6)


@pytest.mark.parametrize("exclude_self", [True, False])
def test_nearest_of_copies_goes_by_the_row(small_blocks, exclude_self):
    """Few directions, with exact products: most neighbours are equally near."""
    generator = np.random.default_rng(0)
    features = np.eye(4, dtype=np.float32)[generator.integers(4, size=150)]
    features[::7] = 0
    for k, queries in itertools.product((1, 5, 60, 149), (features, features.copy())):
        values, rows = nearest(queries, features, k, exclude_self=exclude_self)
        expected, expected_rows = searched(features, features, k, exclude_self)
        assert np.array_equal(rows, expected_rows), k
        assert np.array_equal(values, expected), k


def test_nearest_reads_rows_halves_and_maps(tmp_path, small_blocks):
    train, _, test, _ = clouds(n=120, m=30)
    halved = train.astype(np.float16)
    np.save(tmp_path / "features.npy", halved)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    chosen = np.arange(0, 120, 3)
    for keys in (halved, mapped, Rows(mapped, chosen)):
        assert np.array_equal(nearest(test, keys, 7)[1], searched(test, keys, 7)[1])
    assert np.array_equal(
        nearest(mapped, mapped, 7, exclude_self=True)[1], searched(halved, halved, 7, True)[1]
    )


def test_nearest_never_returns_nan():
    """Lengths whose squares overflow or vanish in float32, and no length at all."""
    features = np.array([[1, 1], [1e30, 1e30], [1e-30, 1e-30], [0, 0]], np.float32)
    values, rows = nearest(features, features, 3, exclude_self=True)
    assert np.allclose(values[:3, :2], 1) and np.array_equal(values[3], [0, 0, 0])
    assert rows[3].tolist() == [0, 1, 2]


def test_nearest_does_not_depend_on_the_number_of_threads(monkeypatch, small_blocks):
    train, *_ = clouds(n=300, m=1)
    result = []
    for threads in ("1", "2", "7"):
        monkeypatch.setenv("FEATCACHE_THREADS", threads)
        result.append(nearest(train, train, 9, exclude_self=True))
    for values, rows in result[1:]:
        assert np.array_equal(values, result[0][0]) and np.array_equal(rows, result[0][1])


def test_nearest_without_queries_and_its_progress(small_blocks):
    train, _, test, _ = clouds(n=100, m=40)
    values, rows = nearest(test[:0], train, 3)
    assert values.shape == rows.shape == (0, 3)
    for queries, total in ((test, 3 * 7), (train, 7 * 8 // 2)):
        progress = []
        nearest(queries, train, 3, on_progress=progress.append)
        assert [message.done for message in progress] == list(range(total + 1))
        assert {message.total for message in progress} == {total}


@pytest.mark.parametrize(
    ("changes", "error", "excerpt"),
    [
        ({"k": 0}, RecipeError, "from 1 to 20, found 0"),
        ({"k": 21}, RecipeError, "from 1 to 20, found 21"),
        ({"k": 10**12}, RecipeError, "from 1 to 20"),
        ({"queries": np.ones((20, 12), np.float32), "k": 20}, RecipeError, "from 1 to 19"),
        ({"queries": np.ones((10, 12), np.float32)}, ShapeMismatchError, "found 10 and 20"),
        ({"queries": np.ones((20, 5), np.float32)}, ShapeMismatchError, r"\(M, 12\) as the keys"),
    ],
)
def test_invalid_arguments_of_nearest(changes, error, excerpt):
    keys = np.ones((20, 12), np.float32)
    alone = "queries" in changes
    arguments = {"queries": keys, "keys": keys, "k": 3, "exclude_self": alone, **changes}
    with pytest.raises(error, match=excerpt):
        nearest(**arguments)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Eight overlapping classes."""
    path = tmp_path_factory.mktemp("knn") / "g.h5"
    return load(write_gaussian_cache(path, n_classes=8, n_train=400, n_test=160, spread=3.0))


def test_five_best_classes_and_a_mapped_cache(cache):
    plain, mapped = (knn(cache.path, ks=(1, 20), mmap=mmap) for mmap in (False, True))
    train, test = cache.train, cache.test
    counts = {}

    def keep(k, rows, votes):
        counts[k] = votes.copy()

    knn_probe(train.features, train.labels, test.features, 8, [1, 20], on_votes=keep)
    for one, other in zip(plain, mapped, strict=True):
        assert one.top5 == other.top5 == topk_accuracy(counts[one.k], test.labels, 5)
        assert one.top5 > one.top1 == other.top1 and one.scores == (one.top1,)
        assert one.top1_interval == wilson_interval(one.top1, 160)


def test_subsets_of_every_class(cache, tmp_path):
    """DINOv2's protocol: k up to the number of images of a class, which is one of the ks."""
    results = knn(cache, ks=(2, 10, 100), shots=(5, "full"), seeds=3, runs=tmp_path)
    assert [(one.shots, one.k, one.n_train) for one in results] == [
        (5, 2, 40), (5, 5, 40), (None, 2, 400), (None, 10, 400), (None, 100, 400),
    ]  # fmt: skip
    train, test = cache.train, cache.test
    for result in results[:2]:
        scores = []
        for seed in range(3):
            rows = draw(train.labels, np.full(8, 5), seed)
            drawn = train.features[rows], train.labels[rows]
            scores.append(top1(knn_probe(*drawn, test.features, 8, [2, 5])[result.k], test.labels))
        assert result.scores == tuple(scores) and result.top1 == pytest.approx(np.mean(scores))
        assert result.top1_interval == mean_interval(scores)
    records, problems = load_runs(tmp_path)
    assert len(records) == 5 and not problems
    assert {one["method"] for one in records} >= {"knn, k = 5, 5 of each class", "knn, k = 10"}


def test_without_test_images_every_image_is_left_out_once(tmp_path):
    path = write_gaussian_cache(tmp_path / "g.h5", n_classes=4, n_train=120, n_test=0, spread=3.0)
    (result,) = knn(path, ks=(5,), distance="euclidean", runs=tmp_path / "runs")
    train = load(path).train
    groups = np.arange(120)
    expected = knn_probe(
        train.features, train.labels, train.features, 4, [5], math.inf,
        distance="euclidean", groups=groups,
    )[5]  # fmt: skip
    assert result.top1 == top1(expected, train.labels) < 1 and result.n_test == 120
    (file,) = (tmp_path / "runs").glob("*/run.json")
    record = json.loads(file.read_text())
    assert (record["split"], record["temperature"]) == ("leave-one-out", None)
    with pytest.raises(RecipeError, match="shots: expected test images, found none"):
        knn(path, ks=(5,), shots=(3,))
