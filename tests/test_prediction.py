"""A saved head on new images and on other caches: what it says, and when it is refused."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from conftest import FakeEngine, colour_image, write_gaussian_cache

from featcache import extract, load, load_weights, probe
from featcache.backbones.choice import EngineChoice
from featcache.backbones.weights import save_weights
from featcache.cli import main
from featcache.errors import (
    CacheMismatchError,
    CacheMissError,
    DatasetError,
    FeatcacheError,
    OutputError,
    RecipeError,
    ShapeMismatchError,
    WeightsError,
)
from featcache.prediction import (
    Prediction,
    PredictionFile,
    PredictOptions,
    csv_head,
    csv_row,
    evaluate_head,
    predict,
    predict_stream,
    table_columns,
)
from featcache.preprocess import Preprocess
from featcache.probes.head import Head, save_head
from featcache.probes.ingredients import feature_ingredients
from featcache.store.format import fingerprint

STARTER = "tinyimagenet32"
SIZE = 32


@pytest.fixture
def engines(fake_engine, monkeypatch):
    """Let `predict` run the fake engine too; the engines that were made."""
    from featcache import prediction
    from featcache.extraction import extract as extraction

    for name in ("choose_engine", "build_engine"):
        monkeypatch.setattr(prediction, name, getattr(extraction, name))
    return fake_engine


def fitted(cache, scaling="none"):
    """Return the least-squares head of a cache: exact, and without a framework."""
    features, labels = cache.train.features, cache.train.labels
    if scaling == "l2":
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
    columns = np.column_stack([features, np.ones(len(features))])
    solution = np.linalg.lstsq(columns, np.eye(len(cache.class_names))[labels], rcond=None)[0]
    weight, bias = (part.astype(np.float32) for part in (10 * solution[:-1].T, 10 * solution[-1]))
    ingredients = feature_ingredients(cache.meta)
    return Head(weight, bias, cache.class_names, cache.fingerprint, scaling, ingredients)


@pytest.fixture
def cache(engines, image_folder):
    return extract(image_folder, weights=STARTER, size=SIZE).load()


@pytest.fixture
def head(cache, tmp_path):
    """A head's file."""
    path = tmp_path / "h.safetensors"
    save_head(path, fitted(cache), {})
    return path


def edited(head, **changes):
    """Return a head of other ingredients, ``preprocess`` changed field by field.

    Its fingerprint is that of the ingredients, as if they had been so from the start.
    """
    ingredients = copy.deepcopy(dict(head.ingredients))
    if isinstance(changes.get("preprocess"), dict):
        changes["preprocess"] = {**ingredients["preprocess"], **changes["preprocess"]}
    ingredients.update(changes)
    return replace(head, ingredients=ingredients, fingerprint=fingerprint(ingredients))


# New images.


@pytest.mark.parametrize("scaling", ["none", "l2"])
def test_the_test_images_get_the_classes_of_their_cached_features(cache, image_folder, scaling):
    head = fitted(cache, scaling)
    outcome = predict(image_folder / "test", head, batch_size=4)
    names = [
        f"test/{prediction.path[len(str(image_folder / 'test')) + 1 :]}" for prediction in outcome
    ]
    assert names == list(cache.test.ids)
    classes = head.predict(cache.test.features)
    assert [prediction.class_name for prediction in outcome] == [
        cache.class_names[index] for index in classes
    ]
    shares = head.probabilities(cache.test.features)
    np.testing.assert_allclose(
        [prediction.probability for prediction in outcome], shares.max(axis=1), atol=1e-5
    )
    assert (classes == cache.test.labels).mean() > 0.8, "the head must have something to say"


def test_files_folders_and_archives_are_the_same_images(head, image_folder, tmp_path):
    folder = image_folder / "test"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    archive = tmp_path / "images.ZIP"
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in reversed(names):
            zipped.write(folder / name, name)
    inside = predict(str(archive), str(head))
    assert [outcome.path for outcome in inside] == [f"{archive}!{name}" for name in names]
    files = predict([folder / name for name in names], head)
    assert [outcome.path for outcome in files] == [str(folder / name) for name in names]
    whole = predict([folder], head)
    assert files == whole
    assert [outcome.top for outcome in inside] == [outcome.top for outcome in whole]
    assert predict([folder, archive], head) == whole + inside, "in the order that was asked for"


def test_hidden_and_other_files_are_left_out_unless_named(head, image_folder, tmp_path):
    folder = tmp_path / "mixed"
    (folder / ".hidden").mkdir(parents=True)
    (folder / "__MACOSX").mkdir()
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "notes.txt").write_text("no image")
    image = image_folder / "test" / "red" / "00.png"
    for name in (".hidden/1.png", "__MACOSX/._1.png", ".2.png", "deep/er/B.PNG", "a.png", "plain"):
        shutil.copy(image, folder / name)
    outcome = [prediction.path for prediction in predict(folder, head)]
    assert outcome == [str(folder / name) for name in ("a.png", "deep/er/B.PNG", "plain")]
    named = predict([folder / ".2.png", folder / "plain"], head)
    assert [prediction.class_name for prediction in named] == ["red", "red"]


def test_top_names_the_likeliest_classes(head, image_folder):
    image = image_folder / "test" / "blue" / "03.png"
    (outcome,) = predict(image, head, top=2)
    assert len(outcome.top) == 2 and outcome.top[0] == (outcome.class_name, outcome.probability)
    assert outcome.top[0][1] >= outcome.top[1][1]
    (outcome,) = predict(image, head, top=99)
    assert sorted(name for name, _ in outcome.top) == ["blue", "green", "red"]
    assert sum(share for _, share in outcome.top) == pytest.approx(1)
    assert predict(image, head)[0].top == (outcome.top[0],)


def test_no_more_than_a_batch_is_decoded_at_once(head, image_folder, monkeypatch):
    seen, progress = [], []
    honest = FakeEngine.extract
    monkeypatch.setattr(
        FakeEngine,
        "extract",
        lambda self, images: seen.append(images.shape) or honest(self, images),
    )
    predict(image_folder / "test", head, batch_size=7, on_progress=progress.append)
    assert seen == [(7, SIZE, SIZE, 3), (7, SIZE, SIZE, 3), (4, SIZE, SIZE, 3)]
    assert [(message.stage, message.done, message.total) for message in progress] == [
        ("images", done, 18) for done in (0, 7, 14, 18)
    ]


def test_images_of_other_shapes_are_cropped_as_in_a_cache(cache, tmp_path):
    head = fitted(cache)
    image = colour_image(2, 5, (90, 33))
    image.save(tmp_path / "wide.png")
    (outcome,) = predict(tmp_path / "wide.png", head, top=3)
    engine = FakeEngine(load_weights(STARTER, size=SIZE), ("avgpool",))
    shares = head.probabilities(engine.extract(Preprocess(SIZE).batch([image]))["avgpool"])[0]
    expected = dict(zip(cache.class_names, shares, strict=True))
    assert dict(outcome.top) == pytest.approx(expected)


@pytest.fixture
def torn(image_folder, tmp_path):
    """Three images, the first two of them damaged."""
    folder = tmp_path / "torn"
    shutil.copytree(image_folder / "test" / "red", folder)
    for name in ("00", "01"):
        (folder / f"{name}.png").write_bytes(b"not an image")
    for path in sorted(folder.iterdir())[3:]:
        path.unlink()
    return folder


def test_an_unreadable_image_fails_or_is_skipped_with_a_note(head, torn):
    with pytest.raises(DatasetError, match=r"00\.png: expected an image .* --on-error skip"):
        predict(torn, head)
    notes = []
    *bad, good = predict(torn, head, on_error="skip", batch_size=2, on_note=notes.append)
    assert (good.path, good.error) == (str(torn / "02.png"), None)
    for name, one in zip(("00.png", "01.png"), bad, strict=True):
        assert (one.path, one.class_name, one.top) == (str(torn / name), None, ())
        assert f"{name}: expected an image" in one.error
    assert [note.split(":")[0] for note in notes] == ["skipped", "skipped"]
    assert "01.png: expected an image" in notes[1]
    (torn / "02.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="at least one that can be read, found none among 3"):
        predict(torn, head, on_error="skip")


def test_no_images(head, tmp_path, engines):
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("notes.txt", "no image")
    (tmp_path / "damaged.zip").write_bytes(b"not an archive")
    made = len(engines)
    for path, excerpt in (
        ("empty", r"empty: expected images \(names that end in .*\.png.*\), found none"),
        ("empty.zip", r"empty\.zip: expected images"),
        ("damaged.zip", "damaged.zip: .* not a readable zip archive"),
        (
            "nowhere",
            "nowhere: expected an image, a folder, or a .zip or .tar of images, found nothing",
        ),
    ):
        with pytest.raises(DatasetError, match=excerpt):
            predict([tmp_path / path], head, on_error="skip")
    with pytest.raises(DatasetError, match="expected the path of at least one"):
        predict([], head)
    assert len(engines) == made, "found before any engine is loaded"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_no_image(head, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DatasetError, match="found something else"):
        predict(tmp_path / "pipe.png", head)


@pytest.mark.parametrize(
    ("options", "excerpt"),
    [
        ({"batch_size": 0}, "batch size: expected at least 1, found 0"),
        ({"top": 0}, "top: expected at least 1, found 0"),
        ({"on_error": "ignore"}, "on error: expected one of fail, skip, found 'ignore'"),
    ],
)
def test_wrong_options(head, image_folder, options, excerpt):
    with pytest.raises(RecipeError, match=excerpt):
        predict(image_folder, head, **options)


def test_features_that_are_not_finite(head, image_folder, monkeypatch):
    honest = FakeEngine.extract

    def broken(self, images):
        features = honest(self, images)
        features["avgpool"][2, 1] = np.nan
        return features

    monkeypatch.setattr(FakeEngine, "extract", broken)
    with pytest.raises(FeatcacheError, match=r"02\.png: expected finite features"):
        predict(image_folder / "test" / "blue", head, on_error="skip")


# Heads that do not fit the features that can be made here.


@pytest.mark.parametrize(
    ("changes", "excerpt"),
    [
        ({"weights_sha256": "1" * 64}, r"weights_sha256: head '1{64}', here '.{64}'; give the"),
        ({"cuts": ["layer3"]}, r"found the cut 'layer3' of shape \(N, 4, "),
        ({"preprocess": {"geometry": "stretched"}}, "geometry: .* found 'stretched'"),
        ({"backbone": "vgg16"}, "resnet18, resnet34, resnet50 or of a library, found 'vgg16'"),
        ({"backbone": ["resnet18"]}, r"of a library, found '\['resnet18'\]'"),
        ({"backbone": "mine:build"}, "found 'mine:build', which is a file or code of whoever"),
        ({"backbone": "/etc/net.onnx"}, "found '/etc/net.onnx', which is a file or code"),
        ({"preprocess": {"size": 10**6}}, "size: expected 1 to 4096 pixels, found 1000000"),
        ({"preprocess": {"size": 16}}, "size: expected 32 to 4096 pixels .*, found 16"),
        ({"preprocess": {"size": "32"}}, "found '32'"),
        ({"preprocess": "text"}, "preprocess: .* found 'text'"),
        ({"weights": "mine", "weights_sha256": "ab" * 32}, "'mine', .* --weights .*'(ab){32}'"),
        ({"weights": None}, "which is not one of imagenet, tinyimagenet32; give it with --weights"),
    ],
)
def test_a_head_of_other_ingredients_is_refused(cache, image_folder, engines, changes, excerpt):
    made = len(engines)
    with pytest.raises(WeightsError, match=f"head: .*{excerpt}"):
        predict(image_folder, edited(fitted(cache), **changes))
    assert len(engines) == made


def test_a_head_with_missing_or_edited_ingredients(cache, image_folder):
    head = fitted(cache)
    with pytest.raises(WeightsError, match=r"found no backbone, cuts, .*; train it again"):
        predict(image_folder, replace(head, ingredients={}))
    for other in (
        replace(head, ingredients={**head.ingredients, "cuts": ["layer4"]}),
        replace(head, fingerprint="1" * 64),
    ):
        with pytest.raises(WeightsError, match=r"hash to its fingerprint .* they were edited"):
            predict(image_folder, other)
        with pytest.raises(WeightsError, match=r"hash to its fingerprint .* they were edited"):
            evaluate_head(other, cache)


def test_a_missing_or_unsound_head_file(image_folder, tmp_path, small_cache):
    with pytest.raises(WeightsError, match="none: expected a head"):
        predict(image_folder, tmp_path / "none")
    with pytest.raises(WeightsError, match="expected a head"):
        evaluate_head(small_cache, small_cache)


def test_a_head_of_another_length(cache, image_folder):
    head = fitted(cache)
    short = replace(head, weight=head.weight[:, :5])
    with pytest.raises(ShapeMismatchError, match=r"expected \(N, 5\), found \(6, 8\)"):
        predict(image_folder / "test" / "red", short)


def test_a_checkpoint_of_the_user_is_named_once(image_folder, engines, tmp_path, monkeypatch):
    starter = load_weights(STARTER)
    mine = save_weights(
        tmp_path / "mine.safetensors",
        starter.state,
        backbone="resnet18",
        preprocess=starter.preprocess,
    )
    cache = extract(image_folder, weights=mine, size=SIZE).load()
    head = fitted(cache)
    image = image_folder / "test" / "red" / "00.png"
    assert predict(image, head)[0].class_name == "red", "this user's extraction has read the file"
    with pytest.raises(WeightsError, match="weights_sha256: head"):
        predict(image, head, weights=STARTER)
    kept = mine.read_bytes()
    altered = {**starter.state, "bn1.bias": starter.state["bn1.bias"] + 1}
    save_weights(mine, altered, backbone="resnet18", preprocess=starter.preprocess)
    with pytest.raises(WeightsError, match="weights_sha256: head"):
        predict(image, head)  # another file by now
    mine.write_bytes(kept)
    monkeypatch.setenv("FEATCACHE_WEIGHTS", str(tmp_path / "of another user"))
    with pytest.raises(WeightsError, match=f"'mine'.*--weights .*{cache.meta['weights_sha256']}"):
        predict(image, head)  # a stranger's head names no file here
    assert predict(image, head, weights=mine)[0].class_name == "red"
    mine.unlink()
    with pytest.raises(WeightsError, match="give it with --weights"):
        predict(image, head)


def test_another_engine_gets_a_note(cache, image_folder, monkeypatch):
    from featcache import prediction

    other = EngineChoice("fake", "2", "cuda", "float32", "a test asked for it")
    monkeypatch.setattr(prediction, "choose_engine", lambda **wishes: other)
    image = image_folder / "test" / "red" / "00.png"
    notes = []
    outcome = predict(image, fitted(cache), on_note=notes.append)
    assert outcome == predict(image, fitted(cache)), "nobody has to listen"
    (note,) = notes
    assert "device: head 'cpu', here 'cuda'; engine_version: head '1', here '2'" in note


# Other caches.


def test_a_head_on_its_own_cache(cache, head):
    result = evaluate_head(head, cache.path)
    assert result.top1 == (result.predicted == cache.test.labels).mean() > 0.8
    assert result.top1_interval[0] < result.top1 <= result.top1_interval[1]
    assert (result.n_test, result.own_cache, result.notes) == (18, True, ())
    assert result.predicted.dtype == np.int64 and result.cache == cache.path


def test_a_head_on_a_cache_made_alike(small_cache, tmp_path):
    head = fitted(load(small_cache))
    facts = {"device": "cuda", "dataset_digest": "2" * 64}
    other = write_gaussian_cache(tmp_path / "more.h5", n_test=90, **facts)
    result = evaluate_head(head, other)
    assert (result.n_test, result.own_cache) == (90, False)
    assert result.notes == ("device: head 'cpu', here 'cuda'",)


@pytest.mark.parametrize(
    ("changes", "excerpt"),
    [
        ({"class_names": ("class 0", "class 2", "class 1")}, "the same classes in another order"),
        ({"class_names": ("class 0", "cat", "class 2")}, "class 1: head 'cat', here 'class 1'"),
        ({"weight": np.zeros((3, 5), np.float32)}, "length: head 5, here 8"),
    ],
)
def test_a_head_of_other_classes_or_length_is_refused(small_cache, changes, excerpt):
    head = replace(fitted(load(small_cache)), **changes)
    with pytest.raises(
        CacheMismatchError, match=f"{small_cache}: expected .*, found {excerpt}; give"
    ):
        evaluate_head(head, small_cache)


def test_a_head_of_another_number_of_classes_is_refused(small_cache, tmp_path):
    head = fitted(load(small_cache))
    other = write_gaussian_cache(tmp_path / "four.h5", n_classes=4)
    with pytest.raises(CacheMismatchError, match="classes: head 3, here 4"):
        evaluate_head(head, other)


@pytest.mark.parametrize(
    ("changes", "excerpt"),
    [
        ({"backbone": "resnet50"}, "backbone: head 'resnet50', here 'resnet18'"),
        ({"cuts": ["layer3"]}, "cut: head 'layer3', here 'avgpool'"),
        ({"weights_sha256": "1" * 64}, "weights_sha256: head '1{64}', here '0{64}'"),
        ({"preprocess": {"size": 32}}, "preprocess size: head 32, here 64"),
    ],
)
def test_a_cache_of_other_features_is_refused(small_cache, changes, excerpt):
    head = edited(fitted(load(small_cache)), **changes)
    with pytest.raises(CacheMismatchError, match=f"found {excerpt}; give the cache"):
        evaluate_head(head, small_cache)


def test_every_difference_is_named(small_cache):
    head = fitted(load(small_cache))
    head = edited(
        replace(
            head, weight=np.zeros((2, 5), np.float32), bias=head.bias[:2], class_names=("a", "b")
        ),
        cuts=["layer3"],
        preprocess={"size": 32},
    )
    with pytest.raises(CacheMismatchError) as caught:
        evaluate_head(head, small_cache)
    for excerpt in ("cut: ", "preprocess size: ", "length: head 5", "classes: head 2"):
        assert excerpt in str(caught.value)


def test_no_cache_and_no_test_images(small_cache, tmp_path):
    head = fitted(load(small_cache))
    with pytest.raises(CacheMissError):
        evaluate_head(head, tmp_path / "none.h5")
    empty = write_gaussian_cache(tmp_path / "empty.h5", n_test=0)
    with pytest.raises(CacheMismatchError, match=r"expected test images .*, found no test images"):
        evaluate_head(head, empty)


# As a table.


@pytest.mark.parametrize(
    "path",
    [
        "a.png", "a, b.png", 'say "cheese".png', "two\nlines.png", "carriage\rreturn.png",
        "both\r\n.png", "=SUM(A1).png", "+1.png", "-1.png", "@me.png", " spaces .png",
        "köttur.png", "it's.png",
    ],
)  # fmt: skip
def test_csv_gives_every_name_back(path):
    columns = [("path", str), ("class", str), ("probability", float)]
    rows = [
        Prediction(path, "cat, or =dog", 0.75, (("cat, or =dog", 0.75),)),
        Prediction("next.png", "dog", 1e-7, (("dog", 1e-7),)),
    ]
    text = csv_head(columns) + "".join(csv_row(row, columns) for row in rows)
    assert text.startswith("path,class,probability\n") and text.endswith("next.png,dog,1e-07\n")
    read = list(csv.reader(io.StringIO(text, newline="")))
    assert read[1:] == [[path, "cat, or =dog", "0.75"], ["next.png", "dog", "1e-07"]]


def test_columns_follow_from_the_head_and_the_options(cache):
    head = fitted(cache)

    def names(head, **options):
        return [name for name, _ in table_columns(head, PredictOptions(**options))]

    assert names(head) == ["path", "class", "probability"]
    assert names(head, top=2, on_error="skip") == [
        *("path", "class", "probability", "class_2", "probability_2", "error")
    ]
    assert names(head, top=99)[-2:] == ["class_3", "probability_3"], "there are three classes"
    labels = replace(head, task="labels", thresholds=np.zeros(3, np.float32))
    assert names(labels) == ["path", "labels", "probabilities"]
    numbers = replace(head, task="numbers", class_names=("class", "labels", "n"))
    assert names(numbers) == ["path", "class", "labels", "n"]
    columns = table_columns(head, PredictOptions(top=2, on_error="skip"))
    top = (("cat", 0.5), ("dog", 0.3))
    assert csv_row(Prediction("a.png", "cat", 0.5, top), columns) == "a.png,cat,0.5,dog,0.3,\n"
    bad = Prediction("b.png", None, None, (), error="no image")
    assert csv_row(bad, columns) == "b.png,,,,,no image\n"


def as_table(outcome, head):
    """Return the rows of a CSV table of predictions, the names of the columns first."""
    columns = table_columns(head, PredictOptions())
    text = csv_head(columns) + "".join(csv_row(one, columns) for one in outcome)
    return list(csv.reader(io.StringIO(text, newline="")))


# Labels and numbers.


def test_labels_above_their_thresholds(cache, image_folder):
    thresholds = np.array([0.3, 0.6, 0.9], np.float32)
    head = replace(fitted(cache), task="labels", thresholds=thresholds)
    outcome = predict(image_folder / "test", head, top=2)
    shares = head.probabilities(cache.test.features)
    for row, found in zip(shares, outcome, strict=True):
        order = np.argsort(-row)
        assert [name for name, _ in found.top] == [cache.class_names[label] for label in order[:2]]
        assert (found.class_name, found.probability) == found.top[0]
        expected = [cache.class_names[label] for label in order if row[label] >= thresholds[label]]
        assert [name for name, _ in found.labels] == expected and found.values is None
    assert len({len(found.labels) for found in outcome}) > 1, "some have more than others"
    rows = as_table(outcome, head)
    assert rows[0] == ["path", "labels", "probabilities"]
    assert rows[1][1].split(";") == [name for name, _ in outcome[0].labels]


def test_numbers_of_images(cache, image_folder):
    head = replace(fitted(cache), task="numbers", class_names=("age", "height", "=sum"))
    outcome = predict(image_folder / "test", head)
    values = [[value for _, value in found.values] for found in outcome]
    np.testing.assert_allclose(values, head.scores(cache.test.features), atol=1e-4)
    assert outcome[0].class_name is outcome[0].probability is outcome[0].labels is None
    rows = as_table(outcome, head)
    assert rows[0] == ["path", "age", "height", "=sum"]
    assert [float(cell) for cell in rows[1][1:]] == pytest.approx(values[0], rel=1e-6)


def test_only_a_head_of_classes_is_tested_on_a_cache(cache):
    head = replace(fitted(cache), task="numbers")
    with pytest.raises(WeightsError, match="head: expected a head of classes, found one of num"):
        evaluate_head(head, cache)


@pytest.mark.oneflow
def test_a_probed_head_predicts_the_same_for_images_and_features(image_folder, tmp_path):
    cache = extract(image_folder, weights=STARTER, size=SIZE).load()
    path = tmp_path / "h.safetensors"
    probed = probe(cache, save_head_to=path, check=False)
    result = evaluate_head(path, cache)
    assert result.own_cache and result.top1 == probed.top1
    notes = []
    outcome = predict(image_folder / "test", path, device="cpu", batch_size=5, on_note=notes.append)
    names = [cache.class_names[index] for index in result.predicted]
    assert [prediction.class_name for prediction in outcome] == names
    assert notes == [] or cache.meta["device"] == "cuda"
    one = predict(image_folder / "test" / "red" / "00.png", path)
    assert one[0].class_name == outcome[12].class_name
    assert one[0].probability == pytest.approx(outcome[12].probability, abs=1e-3)


# Streams.


def test_a_stream_is_answered_before_it_goes_on(head, image_folder, tmp_path):
    """Nobody waits for a batch to fill; a path that leads nowhere is a row like any other."""
    first, second = (image_folder / "test" / name for name in ("red/00.png", "blue/01.png"))
    go_on = threading.Event()

    def paths():
        yield str(first)
        yield str(tmp_path / "nothing.png")
        assert go_on.wait(20), "the first answers must not wait for the rest"
        yield str(second)
        yield str(image_folder / "test" / "green")

    stream = predict_stream(paths(), head, on_error="skip")
    found, missing = next(stream), next(stream)
    assert (found.path, found.class_name) == (str(first), "red")
    assert (missing.path, missing.class_name) == (str(tmp_path / "nothing.png"), None)
    assert "found nothing" in missing.error
    go_on.set()
    assert [one.class_name for one in stream] == ["blue", *["green"] * 6]


def test_a_stream_ends_with_the_error_of_its_source_or_of_a_path(head, image_folder):
    image = str(image_folder / "test" / "red" / "00.png")

    def broken():
        yield image
        raise DatasetError("the other end is gone")

    stream = predict_stream(broken(), head)
    assert next(stream).class_name == "red"
    with pytest.raises(DatasetError, match="the other end is gone"):
        next(stream)
    with pytest.raises(DatasetError, match=r"nowhere: expected an image, .*, or use --on-error"):
        list(predict_stream(iter([image, "nowhere"]), head))
    with pytest.raises(DatasetError, match="at least one that can be read, found none among 0"):
        list(predict_stream(iter([]), head))


def test_a_stream_left_early_ends_its_thread(head, image_folder):
    image = str(image_folder / "test" / "red" / "00.png")
    stream = predict_stream(iter([image] * 2000), head)
    next(stream)
    stream.close()
    end = time.monotonic() + 10
    while any(thread.name == "featcache paths" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def piped(monkeypatch, data):
    """Let standard input be these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_paths_on_standard_input(head, image_folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(image_folder / "test" / "red", tmp_path / "red")
    monkeypatch.chdir(tmp_path / "red")
    odd = os.fsdecode(b"\xff odd\x1b.png")
    shutil.copy("00.png", odd)
    piped(monkeypatch, b"00.png\r\n\n\xff odd\x1b.png\nnone.png\n01.png")
    arguments = ["predict", "-", "--head", str(head), "--on-error", "skip"]
    assert main(arguments) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["path", "class", "probability", "error"]
    assert [row[:2] for row in rows[1:]] == [
        *(["00.png", "red"], ["\\udcff odd\x1b.png", "red"], ["none.png", ""], ["01.png", "red"])
    ], "paths are as they were given"
    piped(monkeypatch, b"00.png\n")
    assert main([*arguments, "--format", "jsonl"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["class_name"] == "red"
    piped(monkeypatch, b"00.png\n01.png\n")
    assert main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    piped(monkeypatch, b"x" * (1 << 17))
    assert main(arguments) == 1
    assert "expected a path a line" in capsys.readouterr().err
    assert main([*arguments, "00.png"]) == 2
    assert "expected - alone" in capsys.readouterr().err


def test_ctrl_c_ends_the_wait_for_a_line():
    """In a process: the interpreter must not abort because of the thread that waits."""
    script = """
import sys
from featcache.cli.probe import _lines_of_stdin
from featcache.new_images import arrivals
try:
    for some in arrivals(_lines_of_stdin()):
        print(some, flush=True)
except KeyboardInterrupt:
    sys.exit(3)
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as child:
        child.stdin.write("a.png\n")
        child.stdin.flush()
        assert child.stdout.readline() == "['a.png']\n"
        child.send_signal(signal.SIGINT)
        assert (child.wait(60), child.stderr.read()) == (3, "")


# Watched folders.


@pytest.fixture
def inbox(tmp_path, monkeypatch):
    """A folder to watch, which is looked at every few milliseconds."""
    monkeypatch.setattr("featcache.new_images.POLL_S", 0.02)
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def test_a_watched_folder_is_answered_as_images_come(head, image_folder, inbox):
    images = sorted((image_folder / "test" / "red").iterdir())
    shutil.copy(images[0], inbox / "there.png")
    (inbox / "empty.png").touch()
    (inbox / "notes.txt").write_text("no image")
    stream = predict_stream([inbox], head, watch=True)
    assert next(stream).path == str(inbox / "there.png")
    (inbox / "deep").mkdir()
    shutil.copy(images[1], inbox / "deep" / "new.png")
    assert next(stream).path == str(inbox / "deep" / "new.png")
    shutil.copy(image_folder / "test" / "blue" / "00.png", inbox / "there.png")
    changed = next(stream)
    assert (changed.path, changed.class_name) == (str(inbox / "there.png"), "blue")
    (inbox / "there.png").unlink()
    shutil.copy(images[2], inbox / "last.png")
    assert next(stream).path == str(inbox / "last.png"), "nothing else, and nothing twice"
    stream.close()


def test_a_file_is_taken_when_it_stands_still(head, image_folder, inbox, monkeypatch):
    monkeypatch.setattr("featcache.new_images.POLL_S", 0.4)
    data = (image_folder / "test" / "red" / "00.png").read_bytes()
    done = threading.Event()

    def write():
        with (inbox / "slow.png").open("wb", buffering=0) as file:
            for part in range(20):
                file.write(data[part * len(data) // 20 : (part + 1) * len(data) // 20])
                time.sleep(0.05)
        done.set()

    stream = predict_stream([inbox], head, watch=True)
    thread = threading.Thread(target=write)
    thread.start()
    found = next(stream)
    assert done.is_set() and found.class_name == "red"
    thread.join()
    stream.close()


def test_watching_refuses_what_is_no_folder(head, image_folder, engines):
    made = len(engines)
    for path in (image_folder / "test" / "red" / "00.png", "https://example.com/images"):
        with pytest.raises(RecipeError, match="watch: expected folders of this machine"):
            predict_stream([path], head, watch=True)
    assert len(engines) == made


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_watch_ends_with_ctrl_c_and_goes_on_where_it_was(
    head, image_folder, inbox, capsys, monkeypatch, form
):
    for row in range(3):
        shutil.copy(image_folder / "test" / "red" / f"0{row}.png", inbox)
    output = inbox.parent / f"found.{form}"

    def interrupted_after(n_rows):
        def write(self, prediction, write=PredictionFile.write):
            write(self, prediction)
            if self.n_rows == n_rows:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PredictionFile, "write", write)
            arguments = ["predict", str(inbox), "--watch", "--head", str(head), "-o", str(output)]
            assert main(arguments) == 0
        return capsys.readouterr()

    first = interrupted_after(2)
    assert "stopped watching" in first.err and "2 predictions" in first.err
    interrupted_after(1)
    lines = output.read_text().splitlines()
    names = [
        json.loads(line)["path"] if form == "jsonl" else line.split(",")[0]
        for line in lines[form == "csv" :]
    ]
    assert names == [str(inbox / f"0{row}.png") for row in range(3)], "none twice, none missing"
    output.write_text("something,else\n1,2\n")
    arguments = ["predict", str(inbox), "--watch", "--head", str(head), "-o", str(output)]
    assert main(arguments) == 1
    assert "expected predictions of this head to add to" in capsys.readouterr().err
    assert output.read_text() == "something,else\n1,2\n"
    assert main([*arguments[:5], "--json"]) == 2


# Where predictions are written as they come.


def test_predictions_are_written_as_they_come(cache, head, image_folder, tmp_path, capsys, engines):
    arguments = ["predict", str(image_folder / "test"), "--head", str(head), "--top", "2"]
    assert main([*arguments, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    tables = {}
    for suffix in ("csv", "jsonl"):
        path = tmp_path / f"found.{suffix}"
        path.write_text("of an earlier run\n" * 100)
        assert main([*arguments, "-o", str(path)]) == 0
        tables[suffix] = path.read_text()
        assert main([*arguments, "--format", suffix]) == 0
        captured = capsys.readouterr().out
        assert captured.endswith(tables[suffix])
    assert [json.loads(line) for line in tables["jsonl"].splitlines()] == expected
    rows = list(csv.reader(io.StringIO(tables["csv"])))
    assert rows[0] == ["path", "class", "probability", "class_2", "probability_2"]
    assert [row[0] for row in rows[1:]] == [one["path"] for one in expected]
    made = len(engines)
    capsys.readouterr()
    assert main([*arguments, "-o", "found.docx"]) == 1
    assert "expected a name that ends in .csv, .jsonl, .parquet" in capsys.readouterr().err
    assert len(engines) == made, "said before any image is read"


def test_parquet_has_types_and_its_name_only_when_it_is_whole(
    head, image_folder, torn, tmp_path, capsys
):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "found.parquet"
    arguments = ["predict", str(torn), "--head", str(head), "-o", str(path)]
    assert main(arguments) == 1 and not path.exists()
    assert not list(tmp_path.glob(".*.part"))
    assert main([*arguments, "--on-error", "skip"]) == 0
    table = parquet.read_table(path)
    assert [str(field.type) for field in table.schema] == ["string", "string", "double", "string"]
    rows = table.to_pylist()
    assert [row["class"] for row in rows] == [None, None, "red"]
    assert "expected an image" in rows[0]["error"] and rows[2]["error"] is None


def test_numbers_in_parquet_whatever_they_are_called(cache, image_folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    head = replace(fitted(cache), task="numbers", class_names=("class", "labels", "path of it"))
    columns = table_columns(head, PredictOptions())
    with PredictionFile(tmp_path / "n.parquet", columns) as file:
        for one in predict(image_folder / "test" / "red", head):
            file.write(one)
    table = parquet.read_table(tmp_path / "n.parquet")
    assert table.num_rows == 6 and str(table.schema.field("class").type) == "double"


def test_a_killed_process_leaves_whole_rows(tmp_path):
    path = tmp_path / "found.jsonl"
    script = f"""
from pathlib import Path
from featcache.prediction import Prediction, PredictionFile
with PredictionFile(Path({str(path)!r}), [("path", str)]) as file:
    while True:
        file.write(Prediction("image.png" * 50, "cat", 0.5, (("cat", 0.5),)))
"""
    with subprocess.Popen([sys.executable, "-c", script]) as child:
        end = time.monotonic() + 60
        while not (path.exists() and path.stat().st_size > 100_000):
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        child.kill()
    text = path.read_text()
    assert text.endswith("}\n") and all(json.loads(line) for line in text.splitlines())


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    columns = [("path", str), ("class", str), ("probability", float)]
    honest = os.write

    def full(descriptor, data):
        return honest(descriptor, data[: len(data) // 2]) if b"second" in data else 0

    path = tmp_path / "found.csv"
    with PredictionFile(path, columns) as file:
        file.write(Prediction("first.png", "cat", 0.5, (("cat", 0.5),)))
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OutputError, match=r"found\.csv: cannot be written: No space left"):
            file.write(Prediction("second.png", "cat", 0.5, (("cat", 0.5),)))
        monkeypatch.setattr(os, "write", honest)
    assert path.read_text() == "path,class,probability\nfirst.png,cat,0.5\n"


# Videos.


def write_video(path, colours, rate=10, size=(64, 48)):
    """Write a video of one frame of each colour."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for colour in colours:
            pixels = np.full((size[1], size[0], 3), colour, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


# The names of `conftest.image_folder`, in which red and blue have changed places.
BLUE, GREEN, RED = (200, 60, 60), (60, 200, 60), (60, 60, 200)


def test_frames_of_a_video(head, image_folder, tmp_path, capsys):
    video = tmp_path / "clip.mp4"
    write_video(video, [RED] * 10 + [GREEN] * 10 + [BLUE] * 5)
    found = predict(video, head)
    assert [one.path for one in found] == [f"{video}#t={second}.0" for second in range(3)]
    assert [one.class_name for one in found] == ["red", "green", "blue"]
    half = predict(video, head, every="0.5s")
    assert [one.path.rpartition("=")[2] for one in half] == ["0.0", "0.5", "1.0", "1.5", "2.0"]
    tenth = predict([video, image_folder / "test" / "red" / "00.png"], head, every="8")
    assert [one.path.rpartition("=")[2] for one in tenth[:4]] == ["0.0", "0.8", "1.6", "2.4"]
    assert tenth[4].class_name == "red"
    assert main(["predict", str(video), "--head", str(head), "--every", "x"]) == 2
    assert "every: expected seconds such as 1s" in capsys.readouterr().err


@pytest.mark.parametrize("every", ["0", "0s", "-1s", "infs", "nans", "s", "", "1 m", "1.5"])
def test_wrong_steps(every):
    with pytest.raises(RecipeError, match="every: expected seconds"):
        PredictOptions(every=every)


def test_a_damaged_video_is_a_row_and_not_the_end(head, image_folder, tmp_path):
    write_video(tmp_path / "whole.avi", [RED] * 30)
    data = (tmp_path / "whole.avi").read_bytes()
    image = image_folder / "test" / "blue" / "00.png"
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    # A list of other files: FFmpeg would open them.
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/whole.avi\n")
    (tmp_path / "big.avi").write_bytes(data)
    for name in ("cut.mp4", "list.mp4"):
        with pytest.raises(DatasetError, match=rf"{name}: expected a video .* does not decode"):
            predict([tmp_path / name, image], head)
        bad, good = predict([tmp_path / name, image], head, on_error="skip")
        assert (bad.path, good.class_name) == (str(tmp_path / name), "blue")
        assert "does not decode after 0 frames" in bad.error
    bad, good = predict(
        [tmp_path / "big.avi", image], head, on_error="skip", max_pixels=64 * 48 - 1
    )
    assert "expected a video of at most 3,071 pixels" in bad.error and good.error is None
    with pytest.raises(DatasetError, match=r"none\.mp4: expected an image, a folder"):
        predict(tmp_path / "none.mp4", head)


def test_a_video_is_turned_upright(head, tmp_path):
    """As a telephone does: the frames are lying, and the header says how to turn them."""
    av = pytest.importorskip("av")
    from featcache.new_images import named_sets

    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        pixels = np.full((32, 64, 3), 20, np.uint8)
        pixels[:, :16] = 230  # left; on top once the frame is turned clockwise
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    one = 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    place = data.index(identity, data.index(b"tkhd"))
    path.write_bytes(data[:place] + clockwise + data[place + len(clockwise) :])
    ((frames,), _) = (list(named_sets([path], "1", 10**6)[0]), None)
    image = np.asarray(frames.read(0))
    assert image.shape == (64, 32, 3)
    assert image[:12].mean() > 180 and image[20:].mean() < 60


def test_videos_need_pyav(head, tmp_path, monkeypatch, engines):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"whatever")
    made = len(engines)
    with pytest.raises(FeatcacheError, match=r"pip install 'featcache\[video\]'"):
        predict(tmp_path / "clip.mp4", head)
    assert len(engines) == made
