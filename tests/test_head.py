"""A head: its scores, its file, and which features it may be used on."""

from __future__ import annotations

import copy
import json
import os
import re
import struct
import subprocess
import sys

import fuzz_head
import numpy as np
import PIL
import pytest
from safetensors.numpy import save

from featcache import load, load_head
from featcache.errors import FeatcacheError, RecipeError, ShapeMismatchError, WeightsError
from featcache.probes.head import Head, save_head
from featcache.probes.ingredients import (
    INGREDIENTS,
    feature_differences,
    feature_ingredients,
    rounding_differences,
)
from featcache.store.format import FINGERPRINT_FIELDS, OPTIONAL_FIELDS

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy

KEY = "featcache.head"


def drawn(n, seed=0, dim=5):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


@pytest.fixture
def head(small_cache):
    cache = load(small_cache)
    return Head(
        drawn(3, 1),
        np.array([0.5, -0.25, 0], np.float32),
        ("cat", "dog, small", "köttur"),
        cache.fingerprint,
        "l2",
        feature_ingredients(cache.meta),
    )


def test_scores_probabilities_and_classes():
    head = Head(drawn(3, 1), drawn(1, 2, 3)[0], ("a", "b", "c"), "f" * 64)
    features = drawn(40)
    scores = head.scores(features)
    expected = features.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    assert scores.dtype == np.float32 and scores.shape == (40, 3)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    shares = head.probabilities(features)
    odds = np.exp(expected)
    np.testing.assert_allclose(shares, odds / odds.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-12)
    assert head.predict(features).dtype == np.int64
    assert np.array_equal(head.predict(features), expected.argmax(axis=1))
    assert head.predict(features[:0]).shape == (0,)


def test_probabilities_of_scores_that_no_exponential_can_hold():
    head = Head(np.array([[1e4], [-1e4]], np.float32), np.zeros(2, np.float32), ("a", "b"), "")
    assert head.probabilities(np.ones((1, 1), np.float32)).tolist() == [[1.0, 0.0]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("task", ["classes", "numbers"])
def test_scores_that_no_float_can_hold_are_refused(task):
    head = Head(
        np.full((2, 3), 3e38, np.float32), np.zeros(2, np.float32), ("a", "b"), "", task=task
    )
    with pytest.raises(WeightsError, match=r"too large \(up to 3e\+38\)"):
        head.predict(np.ones((4, 3), np.float32))


def test_l2_divides_each_feature_by_its_norm_and_leaves_zeros():
    weight, bias, features = drawn(3, 1), drawn(1, 2, 3)[0], drawn(40)
    features[7] = 0
    scaled = Head(weight, bias, ("a", "b", "c"), "", "l2")
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    norms[7] = 1
    plain = Head(weight, bias, ("a", "b", "c"), "")
    np.testing.assert_allclose(scaled.scores(features), plain.scores(features / norms), atol=1e-6)
    np.testing.assert_allclose(scaled.scores(1e3 * features), scaled.scores(features), atol=1e-5)
    assert np.array_equal(scaled.scores(features)[7], bias)


def test_many_rows_and_half_precision_give_the_same(monkeypatch):
    head = Head(drawn(3, 1), drawn(1, 2, 3)[0], ("a", "b", "c"), "", "l2")
    features = drawn(50).astype(np.float16)
    whole = head.scores(features)
    assert whole.dtype == np.float32
    monkeypatch.setattr("featcache.probes.head._ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(head.scores(features), whole, atol=1e-6)
    np.testing.assert_allclose(head.scores(features.astype(np.float64)), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "excerpt"),
    [
        ({"weight": np.zeros((3, 5))}, ShapeMismatchError, r"float32 \(K, D\).*float64 \(3, 5\)"),
        ({"weight": np.zeros(3, np.float32)}, ShapeMismatchError, r"found float32 \(3,\)"),
        ({"weight": np.zeros((3, 0), np.float32)}, ShapeMismatchError, r"found float32 \(3, 0\)"),
        ({"bias": np.zeros(4, np.float32)}, ShapeMismatchError, r"and float32 \(4,\)"),
        ({"class_names": ("a", "b")}, ShapeMismatchError, "expected 3 class names.*found 2"),
        ({"scaling": "L2"}, RecipeError, "expected the scaling none or l2, found 'L2'"),
        ({"task": "colours"}, RecipeError, "the task classes, labels, numbers, found 'colours'"),
        ({"thresholds": None}, ShapeMismatchError, "the task labels without thresholds"),
        ({"task": "classes"}, ShapeMismatchError, "the task classes with thresholds"),
        ({"thresholds": np.zeros(2, np.float32)}, ShapeMismatchError, r"float32 \(3,\) in \[0, 1"),
        ({"thresholds": np.zeros(3)}, ShapeMismatchError, "found float64"),
        ({"thresholds": np.full(3, np.nan, np.float32)}, ShapeMismatchError, "or others"),
        ({"thresholds": np.full(3, 1.5, np.float32)}, ShapeMismatchError, "or others"),
    ],
)
def test_invalid_heads(changes, error, excerpt):
    with pytest.raises(error, match=excerpt):
        labels_head(**changes)


@pytest.mark.parametrize("shape", [(2, 4), (5,), (1, 5, 1)])
@pytest.mark.parametrize("method", ["scores", "probabilities", "predict"])
def test_features_of_another_length(head, shape, method):
    with pytest.raises(ShapeMismatchError, match=r"expected \(N, 5\), found .* another backbone"):
        getattr(head, method)(np.zeros(shape, np.float32))


def test_a_head_comes_back_as_it_was_saved(head, tmp_path):
    path = tmp_path / "heads" / "h.safetensors"
    save_head(path, head, {"solver": "sgd", "scaling": "of the recipe"})
    again = load_head(path)
    assert again.weight.tobytes() == head.weight.tobytes() and again.weight.dtype == np.float32
    assert again.bias.tobytes() == head.bias.tobytes()
    assert again.class_names == head.class_names and again.fingerprint == head.fingerprint
    assert again.scaling == "l2" and again.ingredients == head.ingredients
    assert np.array_equal(again.predict(drawn(9)), head.predict(drawn(9)))
    assert facts_of(path)["solver"] == "sgd"


def test_a_transposed_weight_is_saved_as_it_is_seen(tmp_path):
    head = Head(drawn(5, 1, 3).T, drawn(1, 2, 6)[0, ::2], ("a", "b", "c"), "")
    save_head(tmp_path / "h", head, {})
    again = load_head(str(tmp_path / "h"))
    assert np.array_equal(again.weight, head.weight) and np.array_equal(again.bias, head.bias)


def test_a_head_has_the_same_bytes_in_every_process(head, tmp_path):
    save_head(tmp_path / "h", head, {})
    code = (
        "import sys; from pathlib import Path; from featcache.probes.head import *\n"
        "save_head(Path(sys.argv[2]), load_head(sys.argv[1]), {})"
    )
    for name in ("one", "two"):
        command = [sys.executable, "-c", code, tmp_path / "h", tmp_path / name]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(command, check=True, env=environment)
        assert (tmp_path / name).read_bytes() == (tmp_path / "h").read_bytes()


# Heads of labels and numbers.


def labels_head(**changes):
    fields = {
        "weight": drawn(3, 1), "bias": drawn(1, 2, 3)[0], "class_names": ("a", "b", "c"),
        "fingerprint": "", "task": "labels", "thresholds": np.array([0.1, 0.5, 0.9], np.float32),
    }  # fmt: skip
    return Head(**{**fields, **changes})


def test_labels_have_a_sigmoid_and_a_threshold_each(tmp_path):
    head, features = labels_head(), drawn(40)
    shares = head.probabilities(features)
    np.testing.assert_allclose(shares, 1 / (1 + np.exp(-head.scores(features))), atol=1e-6)
    assert np.array_equal(head.predict(features), shares >= [0.1, 0.5, 0.9])
    assert head.predict(features).dtype == bool
    save_head(tmp_path / "h", head, {"task": "of the recipe"})
    again = load_head(tmp_path / "h")
    assert again.task == "labels" and np.array_equal(again.thresholds, head.thresholds)
    assert np.array_equal(again.predict(features), head.predict(features))


def test_numbers_are_the_scores(tmp_path):
    head, features = labels_head(task="numbers", thresholds=None), drawn(40)
    assert np.array_equal(head.predict(features), head.scores(features))
    with pytest.raises(RecipeError, match="expected classes or labels, found numbers; use scores"):
        head.probabilities(features)
    save_head(tmp_path / "h", head, {})
    assert load_head(tmp_path / "h").task == "numbers"


# What a head is used on.


def test_a_head_keeps_all_that_the_fingerprint_covers(small_cache):
    assert set(INGREDIENTS) == {*FINGERPRINT_FIELDS, "format_version", "weights"}
    meta = load(small_cache).meta
    kept = feature_ingredients(meta)
    assert (
        set(kept) == set(INGREDIENTS) - OPTIONAL_FIELDS and kept["preprocess"] == meta["preprocess"]
    )
    assert feature_differences(kept, meta) == rounding_differences(kept, meta) == []


def changed(ingredients, name, value):
    """Return a copy with one value changed; ``preprocess.size`` is one inside another."""
    other = copy.deepcopy(dict(ingredients))
    inside, _, field = name.rpartition(".")
    (other[inside] if inside else other)[field] = value
    return other


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone", "resnet50"),
        ("cuts", ["layer3"]),
        ("weights_sha256", "1" * 64),
        ("preprocess.size", 32),
        ("preprocess.mean", [0, 0, 0]),
        ("preprocess.interpolation", "bicubic"),
        ("preprocess.geometry", "stretched"),
        ("preprocess.decoder", f"opencv {PIL.__version__}"),
        ("preprocess.tint", "sepia"),
    ],
)
def test_what_changes_features_is_a_difference(head, name, value):
    other = changed(head.ingredients, name, value)
    for one, two in ((head.ingredients, other), (other, head.ingredients)):
        (excerpt,) = feature_differences(one, two)
        assert (
            excerpt.startswith(f"{name.replace('.', ' ').replace('cuts', 'cut')}: head ")
            and ", here " in excerpt
        )
    assert rounding_differences(head.ingredients, other) == []


@pytest.mark.parametrize(
    ("name", "value", "excerpt"),
    [
        ("engine", "openvino", "engine: head 'fake', here 'openvino'"),
        ("engine_version", "2", "engine_version: head '1', here '2'"),
        ("device", "cuda", "device: head 'cpu', here 'cuda'"),
        ("precision", "float16", "precision: head 'float32', here 'float16'"),
        ("dtype", "float16", "dtype: head 'float32', here 'float16'"),
        ("preprocess.decoder", "pillow 1.0", "preprocess decoder version: head '.*', here '1.0'"),
        ("weights", "another-name", None),
        ("dataset_digest", "1" * 64, None),
        ("views", ["identity"], None),
    ],
)
def test_only_what_rounds_features_is_a_rounding_difference(head, name, value, excerpt):
    other = changed(head.ingredients, name, value)
    assert feature_differences(head.ingredients, other) == []
    result = rounding_differences(head.ingredients, other)
    assert (
        [bool(re.fullmatch(excerpt, line)) for line in result] == [True]
        if excerpt
        else result == []
    )


def test_a_missing_ingredient_is_a_difference(head):
    assert len(feature_differences({}, {})) == 4
    for name in ("backbone", "cuts", "weights_sha256", "preprocess"):
        silent = {key: value for key, value in head.ingredients.items() if key != name}
        for other in (silent, head.ingredients):
            assert any(
                line.startswith(name.removesuffix("s"))
                for line in feature_differences(silent, other)
            )
    assert "preprocess size: head None, here 64" in feature_differences(
        {**head.ingredients, "preprocess": "text"}, head.ingredients
    )


# Files from strangers.


def facts_of(path):
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(json.loads(data[8:end])["__metadata__"][KEY])


@pytest.fixture
def written(head, tmp_path):
    """Write a head with some facts or tensors changed, and return the path."""
    path = tmp_path / "h.safetensors"
    save_head(path, head, {})
    facts = facts_of(path)

    def write(changes=(), text=None, **tensors):
        excerpt = {
            key: value for key, value in {**facts, **dict(changes)}.items() if value != "GONE"
        }
        arrays = {"weight": head.weight, "bias": head.bias, **tensors}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        path.write_bytes(save(arrays, {KEY: json.dumps(excerpt) if text is None else text}))
        return path

    return write


def refusal(path):
    with pytest.raises(WeightsError) as caught:
        load_head(path)
    excerpt = str(caught.value)
    assert excerpt.startswith(
        f"{path}: expected a head that featcache probe --save-head wrote, found"
    )
    assert excerpt.isprintable() and len(excerpt) < 600, "one line, short, no terminal codes"
    return excerpt


def test_the_written_head_is_a_good_one(written):
    assert load_head(written()).class_names == ("cat", "dog, small", "köttur")


@pytest.mark.parametrize(
    ("changes", "excerpt"),
    [
        ({"version": 2}, "another version than 1"),
        ({"version": "GONE"}, "another version than 1"),
        ({"class_names": "GONE"}, "no class_names"),
        ({"class_names": "abc"}, "no class_names"),
        ({"class_names": {"a": 1, "b": 2, "c": 3}}, "no class_names"),
        ({"class_names": ["a", "b", 3]}, "no class_names"),
        ({"class_names": ["a", "b"]}, "expected 3 class names"),
        ({"class_names": ["a", "b", "\ud800"]}, "no class_names"),
        ({"fingerprint": "GONE"}, "no fingerprint"),
        ({"fingerprint": 7}, "no fingerprint"),
        ({"scaling": "GONE"}, "no scaling"),
        ({"scaling": "standardize"}, "the scaling none or l2, found 'standardize'"),
        ({"scaling": ["l2"]}, "no scaling, or one of another kind"),
        ({"scaling": "\x1b[2J" * 1000}, "the scaling none or l2"),
        ({"task": "colours"}, "the task classes, labels, numbers, found 'colours'"),
        ({"task": ["labels"]}, "no task, or one of another kind"),
        ({"task": "labels"}, "no float32 tensor called 'thresholds'"),
        ({"ingredients": "GONE"}, "no ingredients"),
        ({"ingredients": []}, "no ingredients"),
        ({"ingredients": {"a": {"b": [[1]]}}}, "nested too deeply"),
        ({"ingredients": {"weights": ["x"]}}, "ingredients whose weights is of another kind"),
        ({"ingredients": {"head_cuts": 7}}, "ingredients whose head_cuts is of another kind"),
        ({"ingredients": {"preprocess": {"a": 10**400}}}, "whose preprocess is"),
        ({"ingredients": {"preprocess": dict.fromkeys("x" * n for n in range(40))}}, "preprocess"),
        ({"ingredients": {"a": "x" * 20_000}}, "fill pages"),
    ],
)
def test_facts_that_are_missing_or_wrong(written, changes, excerpt):
    assert excerpt in refusal(written(changes))


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "null", "7", '"text"', "[" * 5000, "\x1b[2J", "1" * 5000]
)
def test_metadata_that_is_not_an_object_of_json(written, text):
    refusal(written(text=text))


@pytest.mark.parametrize(
    ("tensors", "excerpt"),
    [
        ({"weight": None}, "no float32 tensor called 'weight'"),
        ({"bias": None}, "no float32 tensor called 'bias'"),
        ({"weight": np.zeros((3, 5))}, "no float32 tensor called 'weight'"),
        ({"weight": np.zeros(3, np.float32)}, "expected a weight of float32 (K, D)"),
        ({"weight": np.zeros((), np.float32)}, "expected a weight of float32 (K, D)"),
        ({"weight": np.zeros((0, 5), np.float32)}, "expected a weight of float32 (K, D)"),
        ({"weight": np.zeros((5, 3), np.float32)}, "expected a weight of float32 (K, D)"),
        ({"bias": np.zeros((3, 1), np.float32)}, "expected a weight of float32 (K, D)"),
        ({"weight": np.full((3, 5), np.nan, np.float32)}, "NaN or infinity in 'weight'"),
        ({"bias": np.full(3, -np.inf, np.float32)}, "NaN or infinity in 'bias'"),
    ],
)
def test_tensors_that_are_missing_or_wrong(written, tensors, excerpt):
    assert excerpt in refusal(written(**tensors))


@pytest.mark.parametrize("seed", fuzz_head.SEEDS)
def test_what_a_head_can_make_its_readers_raise(tmp_path, seed):
    (tmp_path / "head").mkdir()
    path = fuzz_head.SEEDS[seed](tmp_path / "head")
    with pytest.raises(FeatcacheError) as caught:
        fuzz_head.read(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


def test_files_that_are_no_heads(written, tmp_path, small_cache):
    good = written().read_bytes()
    refusal(small_cache)
    assert "No such file" in refusal(tmp_path / "none")
    assert "not a file" in refusal(tmp_path)
    plain = tmp_path / "plain"
    plain.write_bytes(save({"weight": drawn(3)}))
    assert f"without {KEY}" in refusal(plain)
    path = tmp_path / "torn"
    header = json.dumps({"weight\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}})
    for data in (
        b"",
        b"short",
        bytes(8),
        good[:-1],
        good[:100],
        good + b"more",
        struct.pack("<Q", 1 << 62) + good[8:],
        struct.pack("<Q", len(header)) + header.encode() + bytes(9),
        struct.pack("<Q", 6) + b"[1, 2]",
    ):
        path.write_bytes(data)
        refusal(path)


def test_a_huge_header_or_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 90 << 20) + b"{")
        stream.truncate(91 << 20)  # holes: it takes no room on the disk
    assert "no safetensors file" in refusal(path)
    os.truncate(path, 2 << 30)
    assert "2,147,483,648 bytes, more than any head has" in refusal(path)


def test_a_changed_byte_never_makes_another_error(written):
    path = written()
    good = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good)
        data[generator.integers(len(data))] = generator.integers(256)
        path.write_bytes(data)
        try:
            load_head(path)
        except WeightsError as error:
            assert str(error).isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")
