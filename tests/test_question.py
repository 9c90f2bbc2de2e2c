"""Questions to a cache: other targets, splits, groups, conditions and weights than its own."""

from __future__ import annotations

import csv
import json
import warnings

import numpy as np
import pytest
from caches import ingredients
from conftest import write_gaussian_cache

from featcache import compare, few_shot, knn, label, learning_curve, load, load_head, probe
from featcache.cli import main
from featcache.errors import DatasetError, FeatcacheError, RecipeError, TableError
from featcache.probes.blocks import Rows, Stacked, in_memory
from featcache.probes.question import Question, ask, own_test_images
from featcache.reporting.commands import run_command
from featcache.runs import load_predictions, run_labels
from featcache.sampling import drawn_sides, folds, text_hashes
from featcache.store.shards import ShardWriter
from featcache.store.writer import encoded_ids

N = {"train": 120, "val": 30, "test": 60}
COLOURS = ("amber", "blue", "cyan")


def written(path, roles=("train", "test"), *, hashes=None, views=("identity",), **facts):
    """Write a cache of three Gaussian classes whose images have content hashes."""
    meta = ingredients(class_names=["one", "two"], views=list(views), **facts)
    writer = ShardWriter(path, meta)
    centres = np.random.default_rng(0).normal(size=(3, 6)) * 2
    for role in roles:
        n = N[role]
        generator = np.random.default_rng(n)
        features = (centres[np.arange(n) % 3] + generator.normal(size=(n, 6))).astype(np.float32)
        arrays = {
            "features": features,
            "labels": np.arange(n) % 2,
            "ids": encoded_ids(f"{role}/{row:03d}.png" for row in range(n)),
            "content_hashes": text_hashes([f"{role}/{row}" for row in range(n)]),
        }
        if role == "train":
            arrays |= {f"views/{name}": features + 1 for name in views[1:]}
        if hashes and role in hashes:
            arrays["content_hashes"] = hashes[role]
        writer.commit(role, 0, n, arrays, {"wall_s": 1.0})
    return writer.finish({}, pack_limit=1 << 40)


def rows_of(roles=("train", "test")):
    """Return a row of a table for each image of the caches above."""
    every = [(role, row) for role in roles for row in range(N[role])]
    return [
        {
            "id": f"{role}/{row:03d}.png",
            "colour": COLOURS[row % 3],
            "fold": ("train", "train", "Validation", "test")[at % 4],
            "patient": f"p{at // 5}",
            "age": str(20 + at % 60),
            "score": f"{(row % 3) + at / 1000:.3f}",
            "tags": ";".join(name for name, keep in (("a", row % 2), ("b", row % 3)) if keep),
            "side": role,
            "weight": str(1 + at % 2),
        }
        for at, (role, row) in enumerate(every)
    ]


def table_of(rows, path):
    """Write rows as CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def cache(tmp_path):
    return written(tmp_path / "c.h5")


@pytest.fixture
def table(tmp_path):
    return table_of(rows_of(), tmp_path / "t.csv")


def test_without_a_question_nothing_is_copied(small_cache):
    cache = load(small_cache)
    asked = ask(cache, views=cache.views)
    assert asked.train.views[0] is cache.train.features
    assert asked.test.views[0] is cache.test.features
    assert [np.array_equal(view, cache.train.view(name)) for view, name in zip(
        asked.train.views, cache.views, strict=True)] == [True] * 4  # fmt: skip
    assert np.array_equal(asked.train.labels, cache.train.labels)
    assert asked.test.rows.tolist() == list(range(120, 180))
    assert asked.test.ids == list(cache.test.ids) and asked.notes == ()
    assert asked.describes["split"] == "given" and asked.describes["target"] is None


def test_features_of_several_splits_are_gathered(tmp_path):
    cache = load(written(tmp_path / "c.h5", ("train", "val", "test")))
    features = np.concatenate([split.features for _, split in cache.splits()])
    rows = rows_of(("train", "val", "test"))
    asked = ask(cache, Question(target="colour", labels=columns_of(rows), split_column="fold"))
    for part in (asked.train, asked.val, asked.test):
        assert np.array_equal(part.views[0][:], features[part.rows])
        assert np.array_equal(part.views[0][3:11], features[part.rows[3:11]])
        assert [asked.names[label] for label in part.labels] == [
            rows[row]["colour"] for row in part.rows
        ]
        assert [rows[row]["id"] for row in part.rows] == part.ids
    # Without the split in between.
    for row in rows:
        row["fold"] = {"train": "train", "val": "", "test": "train"}[row["side"]]
    rows[0]["fold"] = "test"
    asked = ask(cache, Question(target="colour", labels=columns_of(rows), split_column="fold"))
    assert np.array_equal(asked.train.views[0][:], features[asked.train.rows])
    assert len(asked.train) == 179 and asked.val is None
    assert any("30 images without a side" in note for note in asked.notes)


def columns_of(rows):
    """Return rows as a mapping of lists, empty text as missing."""
    return {name: [row[name] or None for row in rows] for name in rows[0]}


def test_stacked_arrays():
    one, two = np.arange(12.0).reshape(4, 3), np.arange(100.0, 115.0).reshape(5, 3)
    stacked, whole = Stacked([one, two]), np.concatenate([one, two])
    assert stacked.shape == whole.shape and len(stacked) == 9 and stacked.dtype == whole.dtype
    for index in (slice(None), slice(2, 7), np.array([8, 0, 3, 4]), np.array([], int)):
        assert np.array_equal(stacked[index], whole[index])
    assert in_memory(Rows(stacked, np.array([1, 6])))


def test_another_target_gives_another_head(cache, table):
    result = probe(cache, labels=table, target="colour", check=False)
    assert (result.target, result.task, result.n_train, result.n_test) == (
        "colour", "classes", 120, 60)  # fmt: skip
    head = load_head(result.head)
    assert head.class_names == COLOURS and result.top1 > 0.9
    predicted = head.predict(load(cache).test.features)
    assert result.top1 == (predicted == np.arange(60) % 3).mean()
    record = json.loads((result.run / "run.json").read_text())
    assert record["class_names"] == list(COLOURS)
    assert record["question"] == {"target": "colour", "labels": str(table)}
    assert probe(cache, C=1.0, check=False).target is None
    assert {run["target"] for run in compare()} == {None, "colour"}


def test_a_split_column_with_val(cache, table):
    asked = {"labels": table, "target": "colour", "split_column": "fold"}
    result = probe(cache, check=False, **asked)
    assert (result.n_train, result.n_val, result.n_test) == (90, 45, 45)
    assert result.split == "column fold"
    # All of train is fitted while C is chosen, and val chooses it.
    assert (result.sweep.n_fit, result.sweep.n_holdout) == (90, 45)
    fixed = probe(cache, C=result.C, check=False, **asked)
    assert np.array_equal(load_head(fixed.head).weight, load_head(result.head).weight)
    assert fixed.n_val == 0 and any("45 val images are not used" in note for note in fixed.notes)


def test_the_val_split_of_a_cache_chooses_c(tmp_path):
    cache = written(tmp_path / "c.h5", ("train", "val", "test"))
    rows = rows_of(("train", "val", "test"))
    result = probe(cache, labels=columns_of(rows), target="colour")
    assert (result.n_train, result.n_val, result.n_test) == (120, 30, 60)
    assert result.sweep.n_holdout == 30 and result.check.agreement > 0.98
    assert [vote.n_train for vote in knn(cache, ks=(3,))] == [120]


def test_images_that_do_not_count(cache, table):
    result = probe(cache, labels=table, target="colour", where="age >= 40", C=1.0, check=False)
    ages = np.array([int(row["age"]) for row in rows_of()])
    assert (result.n_train, result.n_test) == ((ages[:120] >= 40).sum(), (ages[120:] >= 40).sum())
    with pytest.raises(TableError, match="expected images where age > 99, found none of 180"):
        probe(cache, labels=table, target="colour", where="age > 99")
    rows = rows_of()
    for row in rows[:7]:
        row["colour"] = ""
    result = probe(cache, labels=columns_of(rows[:-4]), target="colour", C=1.0, check=False)
    assert (result.n_train, result.n_test, result.n_unlabelled) == (113, 56, 11)
    assert any("4 of 180 images have no row" in note for note in result.notes)
    # The same head as from the other images alone.
    split = load(cache).train
    alone = probe(cache, labels=columns_of(rows[7:]), target="colour", C=1.0, check=False)
    assert np.array_equal(load_head(alone.head).weight, load_head(result.head).weight)
    assert len(split) == 120


def test_groups_and_splits(tmp_path, table):
    given = written(tmp_path / "given.h5")
    rows = rows_of()
    for row in rows:
        row["patient"] = f"p{int(row['age']) % 7}"
    asked = {"labels": columns_of(rows), "target": "colour", "group": "patient"}
    with pytest.raises(TableError, match=r"found 7 of 7 on several: 'p\d'.*--cv 5 --group patient"):
        probe(given, **asked)
    drawn = written(tmp_path / "drawn.h5", split="content")
    question = Question(**{**asked, "labels": table})
    parts = ask(load(drawn), question)
    assert parts.describes["split"] == "group"
    names = [row["patient"] for row in rows_of()]
    is_test = drawn_sides(text_hashes(names))
    assert np.array_equal(parts.test.rows, np.flatnonzero(is_test))
    assert set(parts.train.groups).isdisjoint(parts.test.groups)
    assert not any("not used" in note for note in parts.notes)
    # A side depends on the group alone, and without one nothing moves.
    fewer = ask(load(drawn), Question(**{**asked, "labels": table, "where": "age > 30"}))
    assert set(fewer.test.rows) <= set(parts.test.rows)
    assert np.array_equal(ask(load(drawn)).test.rows, np.arange(120, 180))


def test_a_group_that_is_missing(tmp_path):
    rows = rows_of()
    for row in rows[:10]:
        row["patient"] = ""
    drawn = load(written(tmp_path / "drawn.h5", split="content"))
    asked = ask(drawn, Question(labels=columns_of(rows), target="colour", group="patient"))
    assert any("10 images without a patient" in note for note in asked.notes)
    # They stay where their own content put them.
    assert set(range(10)) <= set(asked.train.rows.tolist())
    assert len(set(asked.train.groups[:10])) == 10


def test_sides_are_drawn_from_hashes_alone():
    hashes = text_hashes([f"image {number}" for number in range(20_000)])
    sides = drawn_sides(hashes)
    assert abs(sides.mean() - 0.2) < 0.01
    chosen = np.random.default_rng(0).permutation(20_000)[:500]
    assert np.array_equal(drawn_sides(hashes[chosen]), sides[chosen])
    expected = int.from_bytes(hashes[3][:8].tobytes(), "big") < 0.2 * 2**64
    assert sides[3] == expected
    assert text_hashes([]).shape == (0, 32) and drawn_sides(text_hashes([])).shape == (0,)


def test_copies_on_both_sides_are_noted(tmp_path, capsys):
    hashes = text_hashes([f"train/{row}" for row in range(25)] + [f"x{row}" for row in range(35)])
    path = written(tmp_path / "c.h5", hashes={"test": hashes})
    note = "25 of 60 test images are also in train (same bytes)"
    assert any(note in line for line in probe(path, C=1.0, check=False).notes)
    assert any(note in line for line in knn(path, ks=(3,))[0].notes)
    assert main(["probe", str(path), "--knn", "3"]) == 0
    assert note in capsys.readouterr().out
    assert probe(written(tmp_path / "d.h5"), C=1.0, check=False).notes == ()


def test_classes_without_a_training_image_count_as_errors(cache):
    rows = rows_of()
    for row in rows[:120]:
        row["colour"] = "amber" if row["colour"] == "cyan" else row["colour"]
    result = probe(cache, labels=columns_of(rows), target="colour", C=1.0, check=False)
    assert result.evaluation.per_class_accuracy[2] == 0 and result.top1 <= 40 / 60
    assert any("20 of 60 test images are of classes without a training image (cyan)" in note
               for note in result.notes)  # fmt: skip


def test_weights(cache, table):
    asked = {"labels": table, "target": "colour", "C": 1.0}
    plain, weighted = probe(cache, **asked), probe(cache, weight_column="weight", **asked)
    assert weighted.check.agreement > 0.98 and abs(weighted.check.objective_gap) < 1e-3
    assert not np.allclose(load_head(plain.head).weight, load_head(weighted.head).weight)
    rare = {"where": 'side == "test" or not (colour == "amber" and age < 60)', **asked}
    even = probe(cache, class_weight="balanced", **rare)
    named = probe(cache, class_weight={"amber": 9.0}, **rare)
    assert even.check.agreement > 0.98 and named.evaluation.per_class_accuracy[0] >= 0.9
    with pytest.raises(RecipeError, match=r"expected a class of 'amber'.*found 'green'"):
        probe(cache, class_weight={"green": 2.0}, **asked)
    rows = rows_of()
    rows[5]["weight"] = ""
    with pytest.raises(TableError, match=r"weight of every training image.*found none of 1"):
        probe(cache, weight_column="weight", labels=columns_of(rows), target="colour")
    rows[5]["weight"] = "-1"
    with pytest.raises(RecipeError, match="expected 0 or positive numbers, found -1"):
        probe(cache, weight_column="weight", labels=columns_of(rows), target="colour")


@pytest.mark.oneflow
def test_weights_with_sgd(cache, table):
    asked = {"labels": table, "target": "colour", "epochs": 3, "check": False}
    plain, even = probe(cache, **asked), probe(cache, weight_column="weight", **asked)
    assert not np.array_equal(load_head(plain.head).weight, load_head(even.head).weight)


def test_curves_and_votes_of_another_target(cache, table):
    asked = {"labels": table, "target": "colour"}
    assert few_shot(cache, shots=(5,), seeds=2, **asked)[0].n_train == 15
    assert learning_curve(cache, fractions=(0.5,), seeds=2, **asked)[0].n_train == 60
    (vote,) = knn(cache, ks=(5,), split_column="fold", **asked)
    assert (vote.n_train, vote.n_test) == (90, 45) and vote.top1 > 0.9
    plain = few_shot(cache, shots=(5,), seeds=1, metric="f1", **asked)[0]
    rows = rows_of()
    for row in rows:
        row["weight"] = "1000" if row["colour"] == "amber" else "1"
    asked["labels"] = columns_of(rows)
    skewed = few_shot(cache, shots=(5,), seeds=1, metric="f1", weight_column="weight", **asked)[0]
    assert skewed.mean < plain.mean
    with pytest.raises(RecipeError, match="weight_column: expected none, since k-NN"):
        knn(cache, weight_column="weight", **asked)
    for verb in (few_shot, learning_curve, knn):
        with pytest.raises(RecipeError, match="expected classes, found numbers in score"):
            verb(cache, labels=table, target="score")


def test_the_column_of_a_table_with_only_one(cache):
    rows = [{"id": row["id"], "colour": row["colour"]} for row in rows_of()]
    assert ask(load(cache), Question(labels=columns_of(rows))).names == COLOURS
    sides = {"id": [row["id"] for row in rows_of()], "side": [row["side"] for row in rows_of()]}
    asked = ask(load(cache), Question(labels=sides, split_column="side"))
    assert asked.names == ("one", "two") and len(asked.train) == 120
    with pytest.raises(TableError, match="the column to predict, found 'colour', 'fold'"):
        ask(load(cache), Question(labels=columns_of(rows_of())))


@pytest.mark.parametrize(
    ("options", "excerpt"),
    [
        ({"target": "species"}, "expected a column 'species', found 'id', 'colour'"),
        ({"target": "color"}, "did you mean colour"),
        ({"target": "empty"}, "all 180 missing"),
        ({"target": "same"}, "at least two classes"),
        ({"target": "id"}, "like an id"),
        ({"target": "colour", "split_column": "colour"}, "expected train, val or test in the"),
        ({"target": "colour", "split_column": "side", "group": "colour"}, "found 3 of 3 on sever"),
        ({"target": "colour", "where": "height > 3"}, "height"),
        ({"target": "colour", "where": "colour =="}, "the condition 'colour =='"),
        ({"target": "colour", "where": 'side == "train"'}, "labelled test images of the target"),
        ({"target": "colour", "where": 'colour == "blue"'}, "at least two classes"),
        ({"target": "colour", "weight_column": "colour"}, "expected numbers in the column"),
        ({"target": "colour", "by": "colour"}, ""),
        ({"target": "a,,b"}, "names of columns, each once"),
        ({"target": ["colour", "colour"]}, "each once"),
        ({"target": "colour", "task": "guess"}, "task: expected one of auto"),
    ],
)
def test_questions_without_an_answer(cache, options, excerpt):
    rows = [{**row, "empty": "", "same": "x"} for row in rows_of()]
    with pytest.raises(FeatcacheError) as caught:
        probe(cache, labels=columns_of(rows), **options)
    assert excerpt in str(caught.value) and "\n" not in str(caught.value)


def test_options_that_need_others(cache, table, tmp_path):
    for options, excerpt in (
        ({"by": "id"}, "by: expected it with labels"),
        ({"task": "regression"}, "task: expected it with a target"),
        ({"separator": ";"}, "separator: expected it with a target"),
        ({"labels": table, "target": "colour", "test": cache}, "test: expected no other question"),
    ):
        with pytest.raises(RecipeError, match=excerpt):
            probe(cache, **options)
    for options in ({"target": "colour"}, {"where": "age > 3"}, {"split_column": "fold"}):
        with pytest.raises(TableError, match="found none; attach one with featcache label"):
            probe(cache, **options)


def test_the_command(cache, table, capsys):
    common = ["probe", str(cache), "--labels", str(table)]
    assert main([*common, "--target", "colour", "--split-column", "fold", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["target"], told["n_val"], told["split"]) == ("colour", 45, "column fold")
    assert main([*common, "--target", "colour", "--C", "1", "--class-weight", "balanced"]) == 0
    assert "target colour" in capsys.readouterr().out
    assert main([*common, "--target", "colour", "--knn", "3", "--where", "age > 30"]) == 0
    assert main([*common, "--target", "colour", "--knn", "3", "--weight-column", "weight"]) == 2
    assert main([*common, "--target", "nothing"]) == 2
    error = capsys.readouterr().err
    assert "expected a column 'nothing'" in error and "Traceback" not in error


def test_the_test_images_of_a_cache(small_cache):
    part = own_test_images(load(small_cache))
    assert len(part) == 60 and part.views[0] is part.cache.test.features
    with pytest.raises(DatasetError, match="labelled test images, found none"):
        own_test_images(load(write_gaussian_cache(small_cache.with_name("e.h5"), n_test=0)))


def test_flip_views_that_not_all_images_have(tmp_path, table):
    path = written(tmp_path / "v.h5", views=("identity", "hflip"))
    asked = {"labels": table, "target": "colour", "C": 1.0, "check": False}
    assert probe(path, **asked).views == ("identity", "hflip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = probe(path, split_column="fold", **asked)
    assert result.views == ("identity",)
    assert any("flip views are not used" in note for note in result.notes)


def test_several_labels(cache, table):
    asked = {"labels": table, "target": "tags", "separator": ";"}
    result = probe(cache, split_column="fold", where="score >= 0", **asked)
    assert [one.name for one in result.labels] == ["a", "b"] and result.task == "labels"
    assert result.macro_ap > 0.6 and result.check.objective_gap < 1e-3
    assert (result.n_val, result.n_holdout) == (result.n_holdout, result.n_val) != (0, 0)
    assert result.n_unlabelled == 30 and result.split == "column fold"
    head = load_head(result.head)
    assert head.task == "labels" and head.class_names == ("a", "b")
    record = json.loads((result.run / "run.json").read_text())
    assert (record["kind"], record["method"]) == ("multilabel", "probe multilabel")
    assert record["question"]["separator"] == ";"
    for wrong, excerpt in (
        ({"solver": "ridge"}, "solver ridge: expected an option for several labels"),
        ({"class_weight": "balanced"}, "class_weight"),
        ({"metric": "f1"}, "metric f1"),
        ({"epochs": 3}, "recipe of SGD"),
    ):
        with pytest.raises(RecipeError, match=excerpt):
            probe(cache, **asked, **wrong)


def test_numbers(cache, table, tmp_path):
    saved = tmp_path / "numbers.safetensors"
    result = probe(cache, labels=table, target="score,age", save_head_to=saved)
    assert [one.name for one in result.targets] == ["score", "age"] and result.task == "numbers"
    assert result.targets[0].r2 > 0.7 and result.chosen_by == "gcv"
    assert (result.n_train, result.n_test, result.n_val) == (120, 60, 0)
    head = load_head(saved)
    truth = np.array([float(row["score"]) for row in rows_of()[120:]])
    predicted = head.scores(load(cache).test.features)[:, 0]
    assert np.corrcoef(predicted, truth)[0, 1] > 0.8
    chosen = probe(cache, labels=table, target=["score"], split_column="fold")
    assert (chosen.chosen_by, chosen.n_val) == ("val", 45)
    # Classes where that is what is asked for, with a note where it is guessed.
    note = probe(cache, labels=table, target="score").notes[0]
    assert "score: taken as numbers (regression)" in note
    rows = rows_of()
    for at, row in enumerate(rows):
        row["grade"] = ("10", "2", "1")[at % 3]
    graded = probe(cache, labels=columns_of(rows), target="grade", C=1.0, check=False)
    assert load_head(graded.head).class_names == ("1", "2", "10")
    assert any("taken as 3 classes in numeric order" in note for note in graded.notes)


def test_runs_without_an_accuracy_are_not_compared(cache, table, home):
    probe(cache, labels=table, target="score")
    probe(cache, labels=table, target="colour", cv=3)
    with pytest.raises(FeatcacheError, match="found only runs of cross-validation, regression"):
        compare()
    probe(cache, labels=table, target="colour", C=1.0, check=False)
    probe(cache, C=1.0, check=False)
    listed = compare()
    assert [run["target"] for run in listed] == ["colour", None]
    assert run_labels(listed)[0].startswith("probe lbfgs of colour")
    commands = [run_command(run, None) for run in listed]
    assert f"--target colour --labels {table}" in commands[0] and "--target" not in commands[1]


def test_folds(cache, table):
    asked = {"labels": table, "target": "colour", "cv": 4}
    result = probe(cache, repeats=2, group="patient", **asked)
    assert (result.n_images, result.n_groups, len(result.folds)) == (180, 36, 8)
    assert result.mean > 0.9 and result.interval[0] <= result.mean <= result.interval[1]
    assert result.class_names == COLOURS and result.split == "folds"
    record = json.loads((result.run / "run.json").read_text())
    assert record["kind"] == "cross-validation" and record["question"]["group"] == "patient"
    fewer = probe(cache, where='patient != "p3"', C=0.01, **asked)
    assert fewer.n_images == 175 and {round(fold.C, 6) for fold in fewer.folds} == {0.01}
    weighted = probe(cache, class_weight={"amber": 2.0}, weight_column="weight", **asked)
    assert weighted.mean > 0.9
    own = probe(cache, cv=3)
    assert own.target is None and own.n_groups == 180 and own.class_names == ("one", "two")
    for wrong, excerpt in (
        ({"split_column": "fold"}, "cv: expected no split_column"),
        ({"epochs": 2}, "cv: expected no sgd"),
        ({"test": cache}, "cv: expected no test"),
        ({"repeats": 0}, "1 repeat or more"),
        ({"class_weight": {"green": 1.0}}, "found 'green'"),
    ):
        with pytest.raises(RecipeError, match=excerpt):
            probe(cache, **{**asked, **wrong})
    with pytest.raises(RecipeError, match="repeats: expected it with cv"):
        probe(cache, repeats=3)
    alone = probe(cache, group="colour", C=0.1, **{**asked, "cv": 3}).notes
    assert any("all images of amber, blue, cyan are of one group" in note for note in alone)
    with pytest.raises(DatasetError, match="ask for fewer folds"):
        probe(cache, group="colour", **{**asked, "cv": 5})


def test_folds_of_numbers(cache, table):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    asked = {"labels": table, "target": "score", "cv": 4}
    result = probe(cache, group="patient", weight_decay=0.1, **asked)
    assert (result.metric, result.n_groups, result.task) == ("r2", 36, "numbers")
    splits = load(cache).splits()
    x = np.concatenate([split.features for _, split in splits])
    y = np.array([float(row["score"]) for row in rows_of()])
    groups = np.arange(180) // 5
    held = folds(y[:, None], 4, 0, groups)
    predicted = np.empty(180)
    for number in range(4):
        train, test = held != number, held == number
        model = Ridge(alpha=0.1 * train.sum()).fit(x[train], y[train])
        predicted[test] = model.predict(x[test])
    assert abs(result.mean - r2_score(y, predicted)) < 1e-4
    assert result.interval[0] < result.mean < result.interval[1]
    assert abs(probe(cache, **asked).mean - result.mean) < 0.05
    with pytest.raises(RecipeError, match="metric f1: expected an option for numbers"):
        probe(cache, metric="f1", **asked)
    with pytest.raises(RecipeError, match="found several labels in tags"):
        probe(cache, labels=table, target="tags", separator=";", cv=4)


def test_the_attached_table(cache, table):
    before = probe(cache, labels=table, target="colour", where="age > 30", C=1.0, check=False)
    label(cache, table)
    after = probe(cache, target="colour", where="age > 30", C=1.0, check=False)
    assert np.array_equal(load_head(before.head).weight, load_head(after.head).weight)
    assert after.table.endswith("c.table")
    rows = rows_of()
    for row in rows:
        row["colour"] = COLOURS[rows.index(row) % 2]
    # A table that is joined for one question takes the place of the attached one.
    assert load_head(probe(cache, labels=columns_of(rows), target="colour", C=1.0,
                           check=False).head).class_names == COLOURS[:2]  # fmt: skip
    assert probe(cache, split_column="side", C=1.0, check=False).top1 == (
        probe(cache, C=1.0, check=False).top1
    )


def test_copies_are_on_one_side_of_a_fold(tmp_path):
    hashes = text_hashes([f"train/{row}" for row in range(25)] + [f"x{row}" for row in range(35)])
    result = probe(written(tmp_path / "c.h5", hashes={"test": hashes}), cv=3)
    assert (result.n_images, result.n_groups) == (180, 155)
    assert any("25 of 180 images are exact copies of others" in note for note in result.notes)


@pytest.mark.parametrize(
    ("options", "excerpts"),
    [
        (["--target", "tags", "--separator", ";"], ("multi-label probe", "macro", "head: ")),
        (["--target", "score,age"], ("ridge regression", "R2", "generalized cross-validation")),
        (["--target", "score", "--target", "age", "--split-column", "fold"], ("the val split",)),
        (["--target", "colour", "--cv", "3", "--group", "patient"], ("36 groups", "fold")),
    ],
)
def test_the_command_shows_every_kind(cache, table, capsys, options, excerpts):
    command = ["probe", str(cache), "--labels", str(table), *options]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(excerpt in shown for excerpt in excerpts)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_unlabelled"] in (0, 30)


def test_a_label_that_all_images_have_is_in_no_prediction(cache, tmp_path):
    """It has no head, and the file of predictions holds the others."""
    rows = [{**row, "tags": f"all;{row['tags']}".rstrip(";")} for row in rows_of()]
    table = table_of(rows, tmp_path / "all.csv")
    result = probe(cache, labels=table, target="tags", separator=";", split_column="side")
    assert load_head(result.head).class_names == ("a", "b")
    columns = load_predictions(result.run)
    assert len(columns["id"]) == result.n_test and {"p: a", "p: b"} <= columns.keys()
    assert "p: all" not in columns and set(columns["label"]) <= {"", "a", "b", "a; b"}
