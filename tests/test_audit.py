"""The audit: what was planted in a data set is found in it, and nothing else is said."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from caches import RICH, SplitArrays, ingredients, rows_of, write_cache, write_shards
from conftest import write_gaussian_cache

import featcache
from featcache.auditing.findings import TABLES, as_csv
from featcache.auditing.labels import doubts, fold_numbers, reference_of, with_neighbours
from featcache.cli import main
from featcache.errors import CacheCorruptError, CacheMismatchError, OutputError, RecipeError
from featcache.store.writer import Source, pack

HOSTILE = (
    "=cmd|' /C calc'!A0",
    '<script>alert("x")</script>',
    "[red]not markup[/red]",
    "bell\x07 escape\x1b[31m tab\t",
    "two\nlines\r\nof it",
    'a,"b"',
    "emoji 🦊 עברית",
    "x" * 300,
)


def write(path, train, labels, test, test_labels, *, names=None, ids=None, **facts):
    """Write a cache of such features and labels, and return its path."""
    names = names or [f"class {n}" for n in range(max([0, *labels, *test_labels]) + 1)]
    splits = {}
    for role, features, given in (("train", train, labels), ("test", test, test_labels)):
        given = np.asarray(given, np.int64)
        called = ids or [f"{role}/{row}" for row in range(len(given))]
        features = np.asarray(features, np.float32).reshape(len(given), np.shape(train)[1])
        splits[role] = SplitArrays(features, given, tuple(called[: len(given)]))
    write_cache(path, splits, ingredients(class_names=names, **facts))
    return path


def clouds(n=90, m=30, dim=16, n_classes=3, seed=0, spread=1.0):
    """Return features of classes that a head can tell, none of them near another."""
    generator = np.random.default_rng(seed)
    centres = 2 * generator.normal(size=(n_classes, dim))
    labels, test_labels = np.arange(n) % n_classes, np.arange(m) % n_classes
    train = centres[labels] + spread * generator.normal(size=(n, dim))
    test = centres[test_labels] + spread * generator.normal(size=(m, dim))
    return train, labels, test, test_labels


def nodes(pair):
    return (pair.first.split, pair.first.row), (pair.second.split, pair.second.row)


def torn_cache(path):
    """Write a cache in which two images have exact copies in another split, one relabelled."""
    meta = ingredients()
    arrays = {
        role: rows_of(role, n, meta=meta) for role, n in (("train", 30), ("val", 9), ("test", 12))
    }
    arrays["test"]["content_hashes"][3] = arrays["train"]["content_hashes"][6]  # both of class 0
    arrays["test"]["content_hashes"][4] = arrays["val"]["content_hashes"][2]  # of 1 and of 2
    arrays["train"]["content_hashes"][9] = arrays["train"]["content_hashes"][8]  # no leak
    sources = {
        f"{role}/{name}": Source.of(array)
        for role, named in arrays.items()
        for name, array in named.items()
    }
    pack(path, sources, meta)
    return path


def test_copies_in_several_splits_are_named(tmp_path, capsys):
    path = torn_cache(tmp_path / "torn.h5")
    result = featcache.audit(path)
    found = [[(image.split, image.row) for image in one.images] for one in result.straddling_copies]
    assert found == [[("train", 6), ("test", 3)], [("val", 2), ("test", 4)]]
    assert [one.same_label for one in result.straddling_copies] == [True, False]
    assert result.n_val == 9 and result.group is None
    assert main(["audit", str(path), "--csv", str(tmp_path / "health")]) == 0
    said = capsys.readouterr().out
    assert "Exact copies: 2 images in several splits, 1 with different labels" in said
    assert "train: train/00006.png, test: test/00003.png" in said
    lines = (tmp_path / "health/straddling_copies.csv").read_text().splitlines()
    assert lines[1] == "1,yes,train,6,train/00006.png,blue" and len(lines) == 5


def test_groups_in_several_splits_are_named(tmp_path, capsys):
    path = torn_cache(tmp_path / "torn.h5")
    assert main(["audit", str(path), "--group", "patient"]) == 1
    assert "expected an attached table with the column 'patient'" in capsys.readouterr().err
    cache = featcache.load(path)
    ids = [name for _, split in cache.splits() for name in split.ids]
    patients = [None, *(f"p{row // 4}" for row in range(1, len(ids)))]
    featcache.label(cache, {"id": ids, "patient": patients})
    result = featcache.audit(cache, group="patient")
    # Train ends within p7 (rows 28 to 31), val within p9 (36 to 39).
    counts = [(one.name, one.n_train, one.n_val, one.n_test) for one in result.straddling_groups]
    assert counts == [("p7", 2, 2, 0), ("p9", 0, 3, 1)] and result.n_groups == 13
    assert main(["audit", str(path), "--group", "patient"]) == 0
    said = capsys.readouterr().out
    assert "Groups: 2 of 13 of patient stand in several splits." in said and "p7" in said
    assert main(["audit", str(path), "--group", "nobody"]) == 2
    assert "expected a column 'nobody'" in capsys.readouterr().err


def test_planted_duplicates_are_found_and_grouped(tmp_path):
    train, labels, test, test_labels = clouds()
    generator = np.random.default_rng(1)

    def near(feature):
        return feature * 3 + 0.01 * generator.normal(size=feature.shape)

    test[4] = near(train[10])  # across, with another label: 10 % 3 = 1, 4 % 3 = 1, so relabel
    test_labels = test_labels.copy()
    test_labels[4] = 2
    test[5] = near(train[20])
    train[40:52] = [near(train[40]) for _ in range(12)]  # more copies than neighbours are looked at
    test[7] = near(test[6])
    test_labels[7] = -1
    result = featcache.audit(
        write(tmp_path / "planted.h5", train, labels, test, test_labels), duplicates=0.999
    )
    assert {nodes(pair) for pair in result.duplicates[:2]} == {
        (("test", 4), ("train", 10)),
        (("test", 5), ("train", 20)),
    }
    assert result.n_test_with_duplicate == 2 and result.n_test_without_duplicates == 27
    copies = result.duplicates[2:13]
    members = {node for pair in copies for node in nodes(pair)}
    assert members == {("train", row) for row in range(40, 52)}
    assert nodes(result.duplicates[13]) == (("test", 6), ("test", 7))
    assert len(result.duplicates) == 14
    by_pair = {nodes(pair)[0]: pair.same_label for pair in result.duplicates}
    assert by_pair["test", 4] is False and by_pair["test", 6] is None
    assert by_pair["test", 5] is bool(test_labels[5] == labels[20])
    sizes = [(group.n_train, group.n_test) for group in result.groups]
    assert sizes == [(1, 1), (1, 1), (12, 0), (0, 2)]
    assert [group.number for group in result.groups] == [1, 2, 3, 4]
    assert {pair.group for pair in copies} == {3}
    assert result.groups[2].same_label is False and result.groups[3].same_label is None
    assert result.n_label_conflicts == sum(p.same_label is False for p in result.duplicates)
    assert all(pair.similarity >= 0.999 for pair in result.duplicates)


def test_a_group_across_the_splits_is_one(tmp_path):
    """Two test images, each near the same training image only by way of it."""
    train, labels, test, test_labels = clouds(dim=40)
    step = np.zeros(40)
    step[0] = 0.2 * np.linalg.norm(train[0])
    train[0, 0] = 0
    test[0], test[1] = train[0] + step, train[0] - step  # 0.98 to it, 0.92 to each other
    result = featcache.audit(write(tmp_path / "chain.h5", train, labels, test, test_labels))
    assert result.n_test_with_duplicate == 2 == len(result.duplicates)
    (group,) = result.groups
    assert [(image.split, image.row) for image in group.images] == [
        ("train", 0), ("test", 0), ("test", 1),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def flipped_digits(tmp_path_factory):
    """scikit-learn's digits as pixels, with one label in twenty wrong, in both splits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(labels))
    pixels, labels = pixels[order], labels[order].astype(np.int64)
    wrong = generator.choice(len(labels), len(labels) // 20, replace=False)
    given = labels.copy()
    given[wrong] = (labels[wrong] + generator.integers(1, 10, len(wrong))) % 10
    path = tmp_path_factory.mktemp("digits") / "digits.h5"
    write(path, pixels[:1300], given[:1300], pixels[1300:], given[1300:])
    planted = {("train", row) if row < 1300 else ("test", row - 1300) for row in wrong.tolist()}
    truth = {("train", row) if row < 1300 else ("test", row - 1300): labels[row] for row in wrong}
    return path, planted, truth


def test_planted_label_errors_are_found(flipped_digits):
    path, planted, truth = flipped_digits
    result = featcache.audit(path)
    for split in ("train", "test"):
        mine = [s for s in result.mislabelled if s.split == split]
        wrong = {node for node in planted if node[0] == split}
        caught = {(s.split, s.row) for s in mine} & wrong
        assert len(caught) / len(wrong) > 0.6, split  # by definition only the confident ones
        assert len(caught) / len(mine) > 0.85, split
        first = mine[: len(wrong) // 2]
        assert np.mean([(s.split, s.row) in wrong for s in first]) > 0.95
    right = [s.suggested == f"class {truth[s.split, s.row]}" for s in result.mislabelled
             if (s.split, s.row) in planted]  # fmt: skip
    assert np.mean(right) > 0.9
    scores = [s.score for s in result.mislabelled]
    assert scores == sorted(scores, reverse=True)
    for suspect in result.mislabelled:
        assert suspect.label != suspect.suggested
        assert suspect.score == pytest.approx(1 - suspect.self_confidence, abs=1e-12)
        assert 0 <= suspect.self_confidence < suspect.confidence <= 1
    assert result.n_judged == 1797 and result.C is not None and result.top1 > 0.8
    assert featcache.audit(path).mislabelled == result.mislabelled
    assert featcache.audit(path, seed=1).mislabelled != result.mislabelled


def test_confident_joint_by_hand():
    """Class 2 is never sure of itself: its threshold is low, and it is not suspected wholesale."""
    labels = np.array([0, 0, 1, 1, 2, 2])
    p = np.array(
        [
            [0.9, 0.1, 0.0],
            [0.2, 0.8, 0.0],  # labelled 0, clearly 1
            [0.1, 0.9, 0.0],
            [0.3, 0.7, 0.0],
            [0.5, 0.1, 0.4],  # likeliest 0, but below 0's threshold of 0.55
            [0.6, 0.1, 0.3],  # above it
        ]
    )
    reference = reference_of(p, labels)
    assert np.allclose(reference.thresholds, [0.55, 0.8, 0.35]) and not reference.one_way
    result = doubts(p, labels, reference)
    # Row 4 disagrees too, but two images count as another class than their label: two are listed.
    assert result.rows.tolist() == [1, 5] and result.suggested.tolist() == [1, 0]
    assert np.allclose(result.self_confidence, [0.2, 0.3])
    assert np.allclose(result.score, [0.8, 0.7])
    p[1] = np.nan  # held out by no head
    assert np.allclose(reference_of(p, labels).thresholds, [0.9, 0.8, 0.35])
    assert doubts(p, labels, reference).rows.tolist() == [5]


def test_what_is_mistaken_one_way_only_comes_first():
    """Classes 0 and 1 look alike; 60 images of class 2 were labelled 3, and none the reverse."""
    labels = np.repeat([0, 1, 2, 3], 400)
    p = np.full((1600, 4), 0.03)
    p[np.arange(1600), labels] = 0.91
    swapped = np.r_[0:60, 400:460]  # 60 of each look like the other
    p[swapped, labels[swapped]], p[swapped, 1 - labels[swapped]] = 0.05, 0.92
    wrong = np.arange(1200, 1260)
    p[wrong, 3], p[wrong, 2] = 0.06, 0.92  # by self-confidence they come last
    reference = reference_of(p, labels)
    weights = {(label, other): weight for label, other, weight in reference.one_way}
    assert set(weights) == {(3, 2), (2, 3)} and weights[3, 2] > 8 and weights[2, 3] < 1 / 8
    result = doubts(p, labels, reference)
    assert len(result.rows) == 180 and set(result.rows[:60]) == set(wrong)
    assert np.allclose(result.self_confidence[:60], 0.06)


def test_neighbours_vote_by_hand():
    p = np.array([[0.5, 0.5], [0.5, 0.5], [np.nan, np.nan]])
    similarity = np.array([[0.9, 0.9], [0.8, 0.8], [0.9, 0.9]], np.float32)
    joined = with_neighbours(p, similarity, np.array([[0, 0], [1, -1], [0, 1]]))
    assert np.allclose(joined[:2], [[1.2 / 1.4, 0.2 / 1.4], [0.2 / 1.4, 1.2 / 1.4]])
    assert np.isnan(joined[2]).all()  # what no head can judge stays so
    assert with_neighbours(p[:2], similarity[:2, :0], np.empty((2, 0), int)) is not None


def test_the_least_cosine_of_copies_follows_the_features(tmp_path):
    """Features that share a large offset are all alike by cosine; copies are found all the same."""
    train, labels, test, test_labels = clouds(dim=40)
    train[1] = train[0] + 0.001
    offset = 30 * np.ones(40)
    plain = featcache.audit(write(tmp_path / "a.h5", train, labels, test, test_labels))
    moved = featcache.audit(
        write(tmp_path / "b.h5", train + offset, labels, test + offset, test_labels)
    )
    assert plain.threshold < 0.97 and moved.threshold > 0.99
    for result in (plain, moved):
        (group,) = result.groups
        assert [(image.split, image.row) for image in group.images] == [("train", 0), ("train", 1)]
    crowded = featcache.audit(moved.cache, duplicates=0.9)
    assert any("do not tell copies from pictures" in note for note in crowded.notes)


def test_folds_are_stratified_and_drawn():
    labels = np.array([0] * 23 + [1] * 9 + [2] * 3 + [3])
    numbers = fold_numbers(labels, 5, 0)
    for label in range(4):
        counts = np.bincount(numbers[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    counts = np.bincount(numbers)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(numbers, fold_numbers(labels, 5, 0))
    assert not np.array_equal(numbers, fold_numbers(labels, 5, 1))


def test_planted_outliers_come_first(tmp_path):
    train, labels, test, test_labels = clouds(n=300, spread=0.3)
    train[7], test[3] = -train[7], -test[3]
    test_labels = test_labels.copy()
    test_labels[3] = -1
    result = featcache.audit(
        write(tmp_path / "far.h5", train, labels, test, test_labels), outliers=0.02
    )
    first = {(image.split, image.row): image.label for image in result.outliers[:2]}
    assert first == {("train", 7): "class 1", ("test", 3): None}
    scores = [image.score for image in result.outliers]
    assert scores == sorted(scores, reverse=True) and scores[1] > 2 * scores[2]
    assert min(scores) > result.outlier_score
    assert sum(image.split == "train" for image in result.outliers) == 6


def test_an_outlier_score_by_hand(tmp_path):
    train = np.array([[1, 0], [0.6, 0.8], [0, 1]])
    result = featcache.audit(
        write(tmp_path / "three.h5", train, [0, 1, 0], [[-1, 0]], [0]), neighbours=2
    )
    assert result.n_neighbours == 2
    (other,) = [image for image in result.outliers if image.split == "test"]
    assert other.score == pytest.approx(1 - (0 - 0.6) / 2)
    assert result.outlier_score == pytest.approx(np.quantile([0.7, 0.3, 0.6], 0.99))


def test_images_without_a_label_are_not_judged(tmp_path):
    train, labels, test, test_labels = clouds()
    labels, test_labels = labels.copy(), test_labels.copy()
    labels[:30], test_labels[:10] = -1, -1
    test[0] = train[0]
    result = featcache.audit(write(tmp_path / "some.h5", train, labels, test, test_labels))
    assert result.n_unlabelled == 40 and result.n_judged == 80
    assert nodes(result.duplicates[0]) == (("test", 0), ("train", 0))
    assert result.duplicates[0].same_label is None and result.duplicates[0].first.label is None
    assert all(suspect.label is not None for suspect in result.mislabelled)


@pytest.mark.parametrize(("labels", "excerpt"), [([-1] * 90, "none"), ([1] * 90, "class 1")])
def test_without_two_classes_no_label_is_judged(tmp_path, labels, excerpt):
    train, _, test, _ = clouds()
    noted = []
    path = write(tmp_path / "one.h5", train, labels, test, [1] * 30)
    result = featcache.audit(path, on_note=noted.append)
    assert result.mislabelled == () and result.n_judged == 0
    assert result.C is result.top1 is result.top1_without_duplicates is None
    assert list(result.notes) == noted and noted[0].endswith(excerpt)
    assert noted[1:] == ["copies: not checked: not every image has the SHA-256 of its file"]
    assert result.outliers


def test_small_classes_get_notes(tmp_path):
    """Classes of 1, 2 and 3 training images among five folds, and one of test images alone."""
    train, labels, test, test_labels = clouds(n=90, m=30, n_classes=6)
    keep = np.concatenate(
        [np.flatnonzero(labels == label)[:count]
         for label, count in enumerate((15, 15, 1, 2, 3))]
    )  # fmt: skip
    path = write(tmp_path / "rare.h5", train[keep], labels[keep], test, test_labels)
    result = featcache.audit(path)
    assert "only training image of a class" in result.notes[0] and "class 2" in result.notes[0]
    assert "fewer training images than the 5 folds" in result.notes[1]
    assert result.notes[1].endswith("class 3, class 4")
    assert "5 test images whose class has no training image" in result.notes[2]
    assert result.n_judged == 35 + 25
    alone = int(np.flatnonzero(labels[keep] == 2)[0])
    assert ("train", alone) not in {(s.split, s.row) for s in result.mislabelled}


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_constant_features(tmp_path, value):
    """All zeros are similar to nothing; all alike are one group of n - 1 pairs."""
    labels = np.arange(40) % 2
    path = write(tmp_path / "flat.h5", np.full((40, 6), value), labels, [[value] * 6] * 4, [0] * 4)
    result = featcache.audit(path)
    text = json.dumps(asdict(result), default=str, allow_nan=False)
    assert "NaN" not in text
    if value:
        assert len(result.groups) == 1 and len(result.groups[0].images) == 44
        assert len(result.duplicates) == 4 + 39 + 3 and result.n_test_with_duplicate == 4
        assert result.top1_without_duplicates is None and result.n_test_without_duplicates == 0
    else:
        assert result.duplicates == result.groups == ()
        assert result.outlier_score == 1.0
    assert result.outliers == ()  # none is further out than the others


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("m", [0, 1, 2])
def test_tiny_caches(tmp_path, capsys, n, m):
    generator = np.random.default_rng(n)
    path = write(
        tmp_path / "tiny.h5",
        generator.normal(size=(n, 4)),
        np.arange(n) % 2,
        generator.normal(size=(m, 4)),
        np.arange(m) % 2,
        names=["a", "b"],
    )
    result = featcache.audit(path)
    assert (result.n_train, result.n_test) == (n, m)
    assert (result.outlier_score is None) == (n == 1)
    assert (result.top1 is None) == (n == 1 or m == 0)
    json.dumps(asdict(result), default=str, allow_nan=False)
    assert main(["audit", str(path)]) == 0
    assert f"of {m} test images have one in the training split" in capsys.readouterr().out


def test_mapped_and_halved_features(tmp_path):
    meta = ingredients(dtype="float16")
    path = write_shards(tmp_path / "shards", meta, n_train=60, n_test=20, shard_rows=16)
    whole, mapped = featcache.audit(path), featcache.audit(path, mmap=True)
    assert whole.duplicates == mapped.duplicates and whole.outliers == mapped.outliers
    assert whole.mislabelled == mapped.mislabelled


def test_what_cannot_be_audited(tmp_path):
    with pytest.raises(CacheMismatchError, match=r"expected features \(N, D\), found maps"):
        featcache.audit(write_shards(tmp_path / "maps", ingredients(cuts=["layer4"]), pack=True))
    train, labels, test, _ = clouds()
    test[5, 2] = np.nan
    broken = write(tmp_path / "nan.h5", train, labels, test, [-1] * 30)
    with pytest.raises(CacheCorruptError, match="NaN or infinity in test, row 5"):
        featcache.audit(broken)


@pytest.mark.parametrize(
    ("arguments", "excerpt"),
    [
        ({"duplicates": 0.0}, "duplicates: expected a cosine above 0"),
        ({"duplicates": 1.01}, "duplicates"),
        ({"duplicates": float("nan")}, "found nan"),
        ({"folds": 1}, "folds: expected at least 2, found 1"),
        ({"neighbours": 0}, "neighbours: expected at least 1"),
        ({"outliers": 1.0}, "outliers: expected a fraction"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_options_out_of_range(small_cache, arguments, excerpt):
    with pytest.raises(RecipeError, match=excerpt):
        featcache.audit(small_cache, **arguments)


@pytest.fixture
def hostile_cache(tmp_path):
    """A cache whose names are made to break tables, in which every list has lines."""
    train, labels, test, test_labels = clouds(n=80, m=8, n_classes=8, spread=0.5)
    labels = labels.copy()
    labels[:8] = (labels[:8] + 1) % 8
    test[:] = train[:8]
    ids = [*HOSTILE, "bytes \udcff", *(f"plain {row}" for row in range(80))]
    return write(
        tmp_path / "hostile.h5", train, labels, test, test_labels, names=list(HOSTILE), ids=ids
    )


def test_csv_gives_every_name_back(hostile_cache, tmp_path, capsys):
    folder = tmp_path / "lists" / "of health"
    assert main(["audit", str(hostile_cache), "--csv", str(folder)]) == 0
    assert main(["audit", str(hostile_cache), "--csv", str(folder)]) == 0  # replaces them
    result = featcache.audit(hostile_cache)
    assert {path.name for path in folder.iterdir()} == {f"{table}.csv" for table in TABLES}
    rows = {}
    for table in TABLES:
        text = (folder / f"{table}.csv").read_bytes().decode()
        with (folder / f"{table}.csv").open(encoding="utf-8", newline="") as stream:
            rows[table] = list(csv.DictReader(stream))
        assert text == as_csv(result, table).encode("utf-8", "backslashreplace").decode()
    assert len(rows["mislabelled"]) == len(result.mislabelled) >= 4
    for row, suspect in zip(rows["mislabelled"], result.mislabelled, strict=True):
        assert row["label"] == suspect.label and row["suggested"] == suspect.suggested
        assert row["id"] == suspect.id.replace("\udcff", "\\udcff")
        assert float(row["self_confidence"]) == pytest.approx(suspect.self_confidence, abs=1e-6)
    assert len(rows["duplicates"]) == len(result.duplicates)
    for row, pair in zip(rows["duplicates"], result.duplicates, strict=True):
        assert (row["first_split"], int(row["first_row"])) == nodes(pair)[0]
        assert row["second_id"] == pair.second.id.replace("\udcff", "\\udcff")
        assert row["same_label"] == ("yes" if pair.same_label else "no")
    assert len(rows["groups"]) == sum(len(group.images) for group in result.groups)
    assert [row["id"] for row in rows["outliers"]] == [
        image.id.replace("\udcff", "\\udcff") for image in result.outliers
    ]


def test_tables_show_names_as_text(hostile_cache, capsys):
    assert main(["audit", str(hostile_cache), "--top", "50"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "[red]not markup[/red]" in out and "\\x1b[31m" in out
    assert "8 of 8 test images have one in the training split" in out
    assert "p(suggested)" in out and "x" * 100 not in out


def test_cli(capsys, tmp_path):
    small_cache = write_gaussian_cache(tmp_path / "vague.h5", spread=2.5)
    assert main(["audit", str(small_cache), "--json", "--duplicates", "0.99"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["threshold"] == 0.99 and result["n_train"] == 120
    assert result["cache"] == str(small_cache)
    assert set(result["mislabelled"][0]) >= {"id", "split", "row", "label", "suggested", "score"}
    assert main(["audit", str(small_cache), "--top", "0"]) == 0
    assert "p(suggested)" not in capsys.readouterr().out
    assert main(["audit", str(small_cache), "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "distance" in out and "--csv FOLDER" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere.h5"], 1),
        (["{cache}", "--csv", "{cache}"], 1),
        (["{cache}", "--duplicates", "0"], 2),
        (["{cache}", "--duplicates", "1.5"], 2),
        (["{cache}", "--folds", "1"], 2),
        (["{cache}", "--top", "-1"], 2),
    ],
)
def test_cli_refuses_in_one_line(capsys, small_cache, arguments, code):
    words = [word.replace("{cache}", str(small_cache)) for word in arguments]
    assert main(["audit", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1 and captured.err.startswith("error: ")


def test_a_folder_that_cannot_be_written_fails_before_the_work(small_cache, tmp_path):
    from featcache.auditing.findings import write_tables

    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken"):
        write_tables(featcache.audit(small_cache), tmp_path / "taken")


def test_importing_the_command_line_loads_no_numbers():
    code = "import featcache.cli.audit, sys; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_cache_of_vectors_and_maps_is_audited_by_its_vectors(tmp_path):
    path = write_shards(tmp_path / "rich", RICH, pack=True)
    assert featcache.audit(path).n_train == 10
