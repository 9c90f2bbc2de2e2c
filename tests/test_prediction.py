"""A saved head on new images and on other caches: what it says, and when it is refused."""

from __future__ import annotations

import copy
import csv
import io
import os
import shutil
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
    RecipeError,
    ShapeMismatchError,
    WeightsError,
)
from featcache.prediction import Prediction, as_csv, evaluate_head, predict
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
    (outcome,) = predict(torn, head, on_error="skip", batch_size=2, on_note=notes.append)
    assert outcome.path == str(torn / "02.png")
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
    predictions = [
        Prediction(path, "cat, or =dog", 0.75, (("cat, or =dog", 0.75),)),
        Prediction("next.png", "dog", 1e-7, (("dog", 1e-7),)),
    ]
    text = as_csv(predictions)
    assert text.startswith("path,class,probability\n") and text.endswith("next.png,dog,1e-07\n")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[1:] == [[path, "cat, or =dog", "0.75"], ["next.png", "dog", "1e-07"]]


def test_csv_has_columns_for_further_classes():
    top = (("cat", 0.5), ("dog", 0.3), ("cow", 0.2))
    assert as_csv([Prediction("a.png", "cat", 0.5, top)]) == (
        "path,class,probability,class_2,probability_2,class_3,probability_3\n"
        "a.png,cat,0.5,dog,0.3,cow,0.2\n"
    )
    assert as_csv([]) == "path,class,probability\n"


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
    rows = list(csv.reader(io.StringIO(as_csv(outcome), newline="")))
    assert rows[0] == ["path", "labels", "probabilities"]
    assert rows[1][1].split(";") == [name for name, _ in outcome[0].labels]


def test_numbers_of_images(cache, image_folder):
    head = replace(fitted(cache), task="numbers", class_names=("age", "height", "=sum"))
    outcome = predict(image_folder / "test", head)
    values = [[value for _, value in found.values] for found in outcome]
    np.testing.assert_allclose(values, head.scores(cache.test.features), atol=1e-4)
    assert outcome[0].class_name is outcome[0].probability is outcome[0].labels is None
    rows = list(csv.reader(io.StringIO(as_csv(outcome), newline="")))
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


def test_predictions_are_kept_in_a_file(cache, image_folder, engines, tmp_path, capsys):
    head = tmp_path / "head.safetensors"
    save_head(head, fitted(cache), {})
    for name in ("found.csv", "found.parquet"):
        path = tmp_path / name
        assert main(["predict", str(image_folder), "--head", str(head), "-o", str(path)]) == 0
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "found.parquet")
    text = (tmp_path / "found.csv").read_text()
    assert table.column_names == ["path", "class", "probability"]
    assert table.num_rows == len(text.splitlines()) - 1 > 0
    made = len(engines)
    capsys.readouterr()
    assert main(["predict", str(image_folder), "--head", str(head), "-o", "found.docx"]) == 1
    assert "expected a name that ends in .csv or .parquet" in capsys.readouterr().err
    assert len(engines) == made, "said before any image is read"
