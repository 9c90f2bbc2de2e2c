"""The images most similar to others, and which to label next."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

import featcache
from featcache.cli import main
from featcache.errors import DatasetError, RecipeError, ShapeMismatchError, WeightsError
from featcache.searching import as_csv


@pytest.fixture
def arrays(tmp_path):
    """Return a cache of 40 features in all three splits, unlabelled, with two exact copies."""
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    features[[3, 30]] = features[20]
    splits = ["train"] * 20 + ["val"] * 8 + ["test"] * 12
    return featcache.Cache.from_arrays(
        features, ids=[f"i{row}" for row in range(40)], splits=splits, path=tmp_path / "a.h5"
    )


def stacked(cache):
    features = np.concatenate([split.features for _, split in cache.splits()]).astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize("mmap", [False, True])
def test_ids_and_vectors_find_the_same_as_brute_force_in_all_splits(arrays, tmp_path, mmap):
    unit = stacked(arrays)
    vectors = np.random.default_rng(1).normal(size=(3, 6))
    np.save(tmp_path / "v.npy", vectors)
    result = featcache.search(
        arrays.path, ["i3", "i25"], k=4, vectors=tmp_path / "v.npy", mmap=mmap
    )
    assert [query.name for query in result.queries] == [
        "i3",
        "i25",
        *(f"v.npy[{i}]" for i in range(3)),
    ]
    assert (result.n_images, result.queries[1].split, result.queries[1].row) == (40, "val", 5)
    wanted = np.concatenate([unit[[3, 25]], vectors / np.linalg.norm(vectors, axis=1)[:, None]])
    for query, own, feature in zip(result.queries, [3, 25, -1, -1, -1], wanted, strict=True):
        similarity = unit @ feature
        order = [
            row for row in np.argsort(-similarity.astype(np.float32), kind="stable") if row != own
        ]
        assert [one.id for one in query.neighbours] == [f"i{row}" for row in order[:4]]
        np.testing.assert_allclose(
            [one.similarity for one in query.neighbours], similarity[order[:4]], atol=1e-6
        )
        assert all(one.label is None for one in query.neighbours)
    assert [one.id for one in result.queries[0].neighbours[:2]] == ["i20", "i30"]  # its copies


def test_an_id_with_as_many_copies_as_neighbours_is_still_not_its_own(tmp_path):
    cache = featcache.Cache.from_arrays(np.ones((5, 3)), path=tmp_path / "same.h5")
    (query,) = featcache.search(cache, cache.train.ids[-1], k=3).queries
    assert len(query.neighbours) == 3
    assert query.name not in [one.id for one in query.neighbours]
    (query,) = featcache.search(cache, cache.train.ids[-1], k=50).queries
    assert len(query.neighbours) == 4


def test_images_get_the_features_of_the_cache(image_folder, tmp_path, capsys):
    made = featcache.extract(
        image_folder, weights="tinyimagenet32", size=32, output=tmp_path / "c.h5"
    )
    cache = made.load()
    found = image_folder / cache.test.ids[0]
    page, table = tmp_path / "page.html", tmp_path / "found.csv"
    words = ["search", str(made.cache), str(found), cache.test.ids[0], "-k", "3"]
    assert main([*words, "--json", "--csv", str(table)]) == 0
    by_id, by_image = json.loads(capsys.readouterr().out)["queries"]
    assert (by_id["kind"], by_image["kind"]) == ("id", "image")
    assert by_image["neighbours"][0]["id"] == cache.test.ids[0]
    assert by_image["neighbours"][0]["similarity"] > 0.99999
    near = [one["id"] for one in by_id["neighbours"]]
    assert near[:2] == [one["id"] for one in by_image["neighbours"][1:]]
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["id"] for row in rows[:3]] == near
    assert rows[0]["label"] == by_id["neighbours"][0]["label"] in cache.class_names
    pytest.importorskip("jinja2")
    assert main([*words, "--html", str(page), "--images", str(image_folder)]) == 0
    text = page.read_text()
    assert text.count("data:image/webp;base64") == 8  # 2 queries with 3 neighbours
    assert "<script" not in text and near[0] in text
    assert main([*words, "--html", str(page)]) == 0
    assert "name them with --images" in capsys.readouterr().err
    assert page.read_text().count("data:image/webp;base64") == 1  # the file that was named


@pytest.mark.parametrize(
    ("queries", "options", "error", "message"),
    [
        (
            (),
            {},
            RecipeError,
            "expected an image, a folder, an id of the cache, a text or vectors, found",
        ),
        ("nobody", {}, DatasetError, "nobody: expected an id of .*a.h5, or the path"),
        ("i1", {"k": 0}, RecipeError, "k: expected at least 1, found 0"),
        (
            (),
            {"vectors": np.ones((2, 5))},
            ShapeMismatchError,
            r"\(M, 6\).* found float64 \(2, 5\)",
        ),
        ((), {"vectors": np.ones((0, 6))}, ShapeMismatchError, r"found float64 \(0, 6\)"),
        ((), {"vectors": ["a"] * 6}, ShapeMismatchError, r"found <U1 \(1, 6\)"),
        ((), {"vectors": np.full(6, 1e300)}, ShapeMismatchError, "expected finite numbers"),
        ((), {"vectors": "none.npy"}, DatasetError, "none.npy"),
        (__file__, {}, WeightsError, "found imported ones, whose backbone it does not have"),
    ],
)
def test_wrong_queries_are_one_line(arrays, queries, options, error, message):
    with pytest.raises(error, match=message) as caught:
        featcache.search(arrays, queries, **options)
    assert "\n" not in str(caught.value)


def test_names_are_data(tmp_path, capsys):
    name = '<b>\x1b[31m,"x"'
    cache = featcache.Cache.from_arrays(np.eye(3), ids=["a", "b", name], path=tmp_path / "n.h5")
    result = featcache.search(cache, "a", k=2)
    assert [row["id"] for row in csv.DictReader(io.StringIO(as_csv(result)))] == ["b", name]
    assert main(["search", str(cache.path), "a"]) == 0
    assert "\x1b[31m" not in capsys.readouterr().out
    pytest.importorskip("jinja2")
    assert main(["search", str(cache.path), "a", "--html", str(tmp_path / "n.html")]) == 0
    assert "<b>" not in (tmp_path / "n.html").read_text()


# Which images to label next.

CLASSES = ("blue", "green", "red")


@pytest.fixture
def partly(tmp_path):
    """Return a cache whose training images have classes in a table, the last 90 of 120 missing.

    A class is a cloud around its own axis; the cloud of red has no label.
    """
    generator = np.random.default_rng(0)
    truth = np.array([0, 1] * 15 + [0, 1, 2] * 30)
    features = 4 * np.eye(4)[truth] + generator.normal(scale=0.5, size=(120, 4))
    ids = [f"i{row}" for row in range(120)] + ["t0", "t1"]
    cache = featcache.Cache.from_arrays(
        np.concatenate([features, features[:2]]),
        ids=ids,
        splits=["train"] * 120 + ["test"] * 2,
        path=tmp_path / "p.h5",
    )
    given = [CLASSES[label] for label in truth[:30]]
    table = {
        "id": ids,
        "colour": [*given, *[None] * 92],
        "site": [*("A", "A", "B", "B") * 30, "A", "A"],
    }
    featcache.label(cache, table)
    return featcache.load(cache.path), truth


@pytest.mark.parametrize("by", ["uncertain", "diverse", "both"])
def test_images_without_a_label_are_selected_the_same_every_time(partly, by):
    cache, truth = partly
    result = featcache.select(cache, n=20, by=by, target="colour", where='site == "A"')
    numbers = [int(one.id[1:]) for one in result.selected]
    assert len(set(numbers)) == 20 and min(numbers) >= 30
    assert all(number % 4 < 2 for number in numbers)  # site A
    assert all(one.id.startswith("i") for one in result.selected)  # test measures
    assert (result.n_labelled, result.n_unlabelled) == (16, 44)
    again = featcache.select(cache, n=20, by=by, target="colour", where='site == "A"')
    assert again.selected == result.selected
    assert [one.suggested in CLASSES for one in result.selected] == [by != "diverse"] * 20
    if by != "uncertain":
        assert np.bincount(truth[numbers])[2] >= 6  # the cloud that has no label yet
    else:
        margins = [one.margin for one in result.selected]
        assert margins == sorted(margins)


def test_label_takes_the_table_back_and_loses_nothing(partly, tmp_path, capsys):
    cache, truth = partly
    path = tmp_path / "next.csv"
    words = ["select", str(cache.path), "-n", "6", "--csv", str(path), "--target", "colour"]
    for labelled in (30, 36, 42):
        assert main([*words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["n_labelled"], len(found["selected"])) == (labelled, 6)
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        assert list(rows[0]) == ["id", "suggested", "colour", "site"]
        for row in rows[:6]:
            assert row["suggested"] in CLASSES and row["colour"] == "" and row["site"] in "AB"
            row["colour"] = CLASSES[truth[int(row["id"][1:])]]
        featcache.label(cache, {name: [row[name] or None for row in rows] for name in rows[0]})
        table = featcache.load(cache.path).table
        assert (table["colour"].missing == False).sum() == labelled + 6  # noqa: E712
        assert not table["site"].missing.any()
    assert main(words) == 0
    assert f"featcache label {cache.path} {path}" in capsys.readouterr().out


def test_without_any_label_both_is_diversity_and_the_table_asks_for_one(arrays, tmp_path):
    path = tmp_path / "first.csv"
    result = featcache.select(arrays, n=30, csv=path)
    assert "by diversity alone" in result.notes[0] and "only 20 images" in result.notes[1]
    assert sorted(one.id for one in result.selected) == sorted(arrays.train.ids)
    assert path.read_text().splitlines()[0] == "id,suggested,label"
    by = {way: featcache.select(arrays, n=4, by=way).selected for way in ("diverse", "both")}
    assert by["diverse"] == by["both"]


def test_own_labels_of_the_cache_are_kept_in_the_table(tmp_path):
    features = np.random.default_rng(0).normal(size=(12, 3))
    labels = ["x", "y", "x", "y", *[""] * 8]
    cache = featcache.Cache.from_arrays(
        features, labels, splits=["train"] * 12, path=tmp_path / "own.h5"
    )
    featcache.select(cache, n=3, csv=tmp_path / "next.csv")
    lines = (tmp_path / "next.csv").read_text().splitlines()
    assert sorted(lines[4:]) == ["0,,x", "1,,y", "2,,x", "3,,y"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, RecipeError, "n: expected at least 1, found 0"),
        ({"by": "random"}, RecipeError, "by: expected"),
        ({"target": "site"}, DatasetError, "found that all 120 have one; name a column"),
        ({"target": "color"}, RecipeError, "did you mean .*colour"),
        ({"by": "uncertain"}, DatasetError, "found 0; use --by diverse first"),
    ],
)
def test_what_cannot_be_selected_is_one_line(partly, options, error, message):
    with pytest.raises(error, match=message) as caught:
        featcache.select(partly[0], **options)
    assert "\n" not in str(caught.value)
