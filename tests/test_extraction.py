"""From images to a cache: naming, reuse, refusal, and never half a file."""

from __future__ import annotations

import os

import numpy as np
import pytest

from featcache import extract, load, load_dataset, load_weights
from featcache.errors import (
    CacheError,
    CacheMismatchError,
    FeatcacheError,
    OutputError,
    RecipeError,
    WeightsError,
)
from featcache.extraction import _single_writer
from featcache.preprocess import FLIP_VIEWS, Preprocess, apply_view

STARTER = "tinyimagenet32"


def test_features_land_in_a_named_file(image_folder, fake_engine, home):
    heard = []
    result = extract(image_folder, weights=STARTER, on_progress=heard.append)
    name = f"colours-resnet18-tinyimagenet32-64-{result.fingerprint[:8]}.h5"
    assert result.cache == home / "cache" / name
    assert (result.reused, result.n_rows, result.feature_dim) == (False, 54, 8)
    assert (result.engine, result.precision) == ("fake", "float32")
    assert heard[-1].stage == "test images" and heard[-1].done == heard[-1].total == 18
    cache = result.load()
    data = load_dataset(image_folder)
    pixels = Preprocess(64).batch([data.test.images[row] for row in range(18)])
    expected = fake_engine[0].extract(pixels)
    assert np.array_equal(cache.test.features, expected)
    assert cache.test.ids == data.test.ids
    assert cache.meta["dataset_digest"] == data.digest
    assert cache.meta["weights_sha256"] == load_weights(STARTER).sha256


def test_the_same_call_again_answers_from_the_cache(image_folder, fake_engine):
    first = extract(image_folder, weights=STARTER)
    stamp = first.cache.stat().st_mtime_ns
    second = extract(image_folder, weights=STARTER)
    assert second.reused and second.cache == first.cache
    assert len(fake_engine) == 1, "the engine must not be loaded again"
    assert first.cache.stat().st_mtime_ns == stamp
    third = extract(image_folder, weights=STARTER, force=True)
    assert not third.reused and third.fingerprint == first.fingerprint
    assert np.array_equal(third.load().train.features, first.load().train.features)


def test_the_batch_size_changes_nothing(image_folder, fake_engine, tmp_path):
    one = extract(image_folder, weights=STARTER, batch_size=1, output=tmp_path / "1.h5")
    many = extract(image_folder, weights=STARTER, batch_size=64, output=tmp_path / "64.h5")
    assert one.fingerprint == many.fingerprint
    close = np.testing.assert_allclose
    close(one.load().train.features, many.load().train.features, rtol=1e-5)


def test_other_ingredients_make_another_file(image_folder, fake_engine):
    names = {
        extract(image_folder, weights=STARTER).cache,
        extract(image_folder, weights=STARTER, size=32).cache,
        extract(image_folder, weights=STARTER, views="flips").cache,
        extract(image_folder / "train", weights=STARTER).cache,
    }
    assert len(names) == 4


def test_a_cache_of_other_ingredients_is_never_taken(image_folder, fake_engine, tmp_path):
    output = tmp_path / "mine.h5"
    extract(image_folder, weights=STARTER, output=output)
    before = output.read_bytes()
    with pytest.raises(CacheMismatchError, match=r"preprocess: found .*'size': 64.*'size': 32"):
        extract(image_folder, weights=STARTER, size=32, output=output)
    assert output.read_bytes() == before
    assert extract(image_folder, weights=STARTER, size=32, output=output, force=True)
    assert load(output).meta["preprocess"]["size"] == 32


def test_a_damaged_cache_is_not_taken_either(image_folder, fake_engine, tmp_path):
    output = tmp_path / "mine.h5"
    output.write_bytes(b"not a cache")
    with pytest.raises(CacheError, match=r"readable HDF5.*--force"):
        extract(image_folder, weights=STARTER, output=output)


def test_flip_views_are_kept_beside_the_training_features(image_folder, fake_engine):
    cache = extract(image_folder, weights=STARTER, views="flips").load()
    assert cache.views == FLIP_VIEWS
    data = load_dataset(image_folder)
    pixels = Preprocess(64).batch([data.train.images[row] for row in range(36)])
    for view in FLIP_VIEWS:
        expected = fake_engine[0].extract(apply_view(pixels, view))
        assert np.array_equal(cache.train.view(view), expected)


def only_hidden(folder):
    return all(path.name.startswith(".") for path in folder.rglob("*"))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_leaves_no_file(image_folder, fake_engine, home, failure):
    def stop(message):
        if message.stage == "test images":
            raise failure

    with pytest.raises(failure):
        extract(image_folder, weights=STARTER, on_progress=stop)
    assert only_hidden(home / "cache")
    assert not extract(image_folder, weights=STARTER).reused


def test_features_that_are_not_finite_are_never_written(
    image_folder, fake_engine, home, monkeypatch
):
    from conftest import FakeEngine

    honest = FakeEngine.extract

    def broken(self, images):
        features = honest(self, images)
        features[5, 2] = np.nan
        return features

    monkeypatch.setattr(FakeEngine, "extract", broken)
    with pytest.raises(FeatcacheError, match=r"train/blue/05\.png: expected finite features"):
        extract(image_folder, weights=STARTER)
    assert only_hidden(home / "cache")


def test_one_writer_at_a_time_and_the_other_is_told(tmp_path):
    path = tmp_path / "x.h5"
    with _single_writer(path):
        said = pytest.raises(CacheError, match=f"being written by process {os.getpid()} on ")
        with said, _single_writer(path):
            pass
    with _single_writer(path):
        pass


def test_an_output_that_cannot_be_written_is_found_before_the_work(
    image_folder, fake_engine, tmp_path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="expected a file that can be written"):
        extract(image_folder, weights=STARTER, output=tmp_path / "file" / "folder")
    assert not fake_engine


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"backbone": "vgg16"}, RecipeError, "resnet18, resnet34, resnet50, found 'vgg16'"),
        ({"size": 0}, RecipeError, "size"),
        ({"batch_size": 0}, RecipeError, "batch size"),
        ({"views": "five"}, RecipeError, "views"),
        ({"weights": "imagnet"}, WeightsError, "imagnet"),
        ({"backbone": "resnet50"}, WeightsError, "resnet18 weights: use --backbone resnet18"),
    ],
)
def test_wrong_arguments(image_folder, fake_engine, home, arguments, error, said):
    with pytest.raises(error, match=said):
        extract(image_folder, **{"weights": STARTER, **arguments})
    assert not fake_engine and not list(home.rglob("*.h5"))
