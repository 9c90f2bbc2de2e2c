"""From images to a cache: naming, reuse, refusal, and never half a file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil

import numpy as np
import pytest
from caches import content
from conftest import FakeEngine

from featcache import ExtractOptions, extract, load, load_dataset, load_weights, probe
from featcache.datasets.images import Folder
from featcache.errors import (
    CacheError,
    CacheMismatchError,
    CacheMissError,
    DatasetError,
    FeatcacheError,
    OutputError,
    RecipeError,
    WeightsError,
)
from featcache.extraction import extract as extraction
from featcache.extraction.pipeline import _one_behind, bottleneck
from featcache.preprocess import FLIP_VIEWS, Preprocess, apply_view
from featcache.store.shards import single_writer

STARTER = "tinyimagenet32"


def test_features_land_in_a_named_file(image_folder, fake_engine, home):
    heard = []
    result = extract(image_folder, weights=STARTER, on_progress=heard.append)
    name = f"colours-resnet18-tinyimagenet32-64-{result.fingerprint[:8]}.h5"
    assert result.cache == home / "cache" / name
    assert (result.reused, result.n_rows, result.feature_dim) == (False, 54, 8)
    assert (result.engine, result.precision) == ("fake", "f32")
    assert heard[-1].stage == "test images" and heard[-1].done == heard[-1].total == 18
    cache = result.load()
    assert cache.meta["dataset_path"] == str(image_folder)
    data = load_dataset(image_folder)
    pixels = Preprocess(64).batch([data.test.images[row] for row in range(18)])
    expected = fake_engine[0].extract(pixels)["avgpool"]
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


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were read, in this order."""
    names, honest = [], Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: names.append(name) or honest(self, name))
    return names


def test_every_image_is_read_once(image_folder, fake_engine, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
    arguments = {"weights": STARTER, "batch_size": 8, "reuse": False}
    whole = extract(image_folder, output=tmp_path / "a.h5", **arguments)
    assert len(reads) == len(set(reads)) == 54
    assert whole.load().meta["dataset_digest"] == load_dataset(image_folder).digest

    reads.clear()

    def stop(message):
        if message.stage == "test images" and message.done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(image_folder, output=tmp_path / "b.h5", on_progress=stop, **arguments)
    reads.clear()
    rest = extract(image_folder, output=tmp_path / "b.h5", **arguments)
    assert len(reads) == 54 - rest.n_resumed <= 18, "no image of a shard that is done"
    assert rest.fingerprint == whole.fingerprint
    for name, array in whole.load().index.arrays.items():
        assert [block.sha256 for block in array.blocks] == [
            block.sha256 for block in rest.load().index.arrays[name].blocks
        ]

    reads.clear()
    again = {**arguments, "verify_images": True}
    assert extract(image_folder, output=tmp_path / "b.h5", **again).reused
    assert len(reads) == 54, "hashed, since the cache may be of other images"
    other = extract(image_folder, output=tmp_path / "c.h5", size=32, **arguments)
    assert len(reads) == 108 and not other.reused, "there is no such cache: nothing to compare"


def test_every_image_of_an_undivided_data_set_is_read_once(
    image_folder, fake_engine, reads, tmp_path, monkeypatch
):
    monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
    folder = image_folder / "train"
    arguments = {"weights": STARTER, "batch_size": 4, "reuse": False}
    whole = extract(folder, output=tmp_path / "a.h5", views="flips", **arguments)
    assert len(reads) == len(set(reads)) == 36
    cache, data = whole.load(), load_dataset(folder)
    assert cache.meta["split"] == "content" and cache.meta["dataset_digest"] == data.digest
    engine = fake_engine[0]
    for (role, split), (_, kept) in zip(data.splits(), cache.splits(), strict=True):
        assert kept.ids == split.ids and kept.labels.tolist() == split.labels.tolist()
        for view in FLIP_VIEWS if role == "train" else ("identity",):
            for row in range(len(split)):
                pixels = apply_view(Preprocess(64).batch([split.images[row]]), view)
                expected = engine.extract(pixels)["avgpool"][0]
                np.testing.assert_allclose(kept.view(view)[row], expected, rtol=1e-4, atol=1e-3)
        assert [bytes(one) for one in kept.content_hashes] == [
            hashlib.sha256(split.images.content(row)).digest() for row in range(len(split))
        ]

    def stop(message):
        if message.stage == "images" and message.done == 20:
            raise KeyboardInterrupt

    output = tmp_path / "b.h5"
    with pytest.raises(KeyboardInterrupt, match=r"^16 of 36 images are kept"):
        extract(folder, output=output, views="flips", on_progress=stop, **arguments)
    reads.clear()
    rest = extract(folder, output=output, views="flips", **arguments)
    assert rest.n_resumed == 16 and len(reads) == 20
    assert content(rest.cache) == content(whole.cache) and rest.fingerprint == whole.fingerprint


def test_a_limited_part_of_an_undivided_data_set(image_folder, fake_engine):
    cache = extract(image_folder / "train", weights=STARTER, train_limit=9).load()
    data = load_dataset(image_folder / "train")
    assert len(cache.train) == 9 and set(cache.train.ids) < set(data.train.ids)
    assert cache.test.ids == data.test.ids and cache.meta["split"] == "content"


def test_a_class_without_an_image_on_one_side_is_told(image_folder, fake_engine, tmp_path):
    notes = []
    folder = tmp_path / "few"
    for name in ("blue", "green"):
        (folder / name).mkdir(parents=True)
    digests = load_dataset(image_folder / "train")
    in_train = {name.split("/")[0]: name for name in digests.train.ids}
    shutil.copy(image_folder / "train" / in_train["blue"], folder / "blue")
    shutil.copy(image_folder / "train" / in_train["green"], folder / "green")
    cache = extract(folder, weights=STARTER, on_note=notes.append, views="flips").load()
    assert notes[-1].startswith("test: no image: the content of an image decides its side")
    assert (len(cache.train), len(cache.test)) == (2, 0)
    assert cache.test.features.shape == (0, 8) and cache.views == FLIP_VIEWS
    red = next(name for name in digests.test.ids if name.startswith("red"))
    (folder / "red").mkdir()
    shutil.copy(image_folder / "train" / red, folder / "red")
    cache = extract(folder, weights=STARTER, on_note=notes.append, pack=False).load()
    assert notes[-2].startswith("train: no image of 'red': ")
    assert notes[-1].startswith("test: no image of 'blue', 'green': ")
    assert cache.test.labels.tolist() == [2]
    for name in ("blue", "green"):
        shutil.rmtree(folder / name)
    cache = extract(folder, weights=STARTER, views="flips").load()
    assert (len(cache.train), len(cache.test)) == (0, 1) and cache.class_names == ()
    assert cache.train.view("hflip").shape == (0, 8)


@pytest.mark.parametrize("pack", [True, False])
def test_a_validation_split_is_a_split_of_the_cache(image_folder, fake_engine, tmp_path, pack):
    folder = tmp_path / "colours"
    shutil.copytree(image_folder, folder)
    for name in ("blue", "green"):
        (folder / "valid" / name).mkdir(parents=True)
        for number in range(3):
            (folder / f"test/{name}/0{number}.png").rename(folder / f"valid/{name}/{number}.png")
    result = extract(folder, weights=STARTER, views="flips", pack=pack)
    cache, data = result.load(), load_dataset(folder)
    assert (result.n_rows, result.n_val) == (54, 6)
    assert cache.meta["dataset_digest"] == data.digest and "split" not in cache.meta
    assert cache.val.ids == data.val.ids and cache.val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = Preprocess(64).batch([data.val.images[row] for row in range(6)])
    assert np.array_equal(cache.val.features, fake_engine[0].extract(pixels)["avgpool"])
    assert not [name for name in cache.index.arrays if name.startswith("val/views")]
    assert extract(folder, weights=STARTER, views="flips", pack=pack).n_val == 6


def test_images_without_labels(image_folder, fake_engine, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((image_folder / "train").rglob("*.png"))):
        shutil.copy(path, flat / f"{number}.png")
    notes = []
    cache = extract(flat, weights=STARTER, on_note=notes.append).load()
    assert "the images have no labels" in notes[0] and len(notes) == 2
    assert cache.class_names == () and len(cache.train) + len(cache.test) == 36
    assert set(cache.train.labels) == set(cache.test.labels) == {-1}
    shutil.make_archive(str(flat), "zip", flat)
    zipped = extract(tmp_path / "flat.zip", weights=STARTER)
    assert zipped.reused and zipped.fingerprint == cache.fingerprint
    (tmp_path / "roles").mkdir()
    shutil.copytree(flat, tmp_path / "roles/train")
    shutil.copytree(flat, tmp_path / "roles/val")
    given = extract(tmp_path / "roles", weights=STARTER)
    assert (given.n_rows, given.n_val, len(given.load().test)) == (72, 36, 0)


def test_a_changed_image_is_noticed(image_folder, fake_engine, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(image_folder, folder)
    first = extract(folder, weights=STARTER)
    named = extract(folder, weights=STARTER, output=tmp_path / "x.h5")
    shutil.copy(folder / "train/red/01.png", folder / "train/red/00.png")
    second = extract(folder, weights=STARTER)
    assert not second.reused and second.cache != first.cache and first.cache.exists()
    with pytest.raises(CacheMismatchError, match="dataset_digest: found"):
        extract(folder, weights=STARTER, output=named.cache)
    assert extract(folder, weights=STARTER).reused


def test_options_may_be_one_object(image_folder, fake_engine):
    options = ExtractOptions(weights=STARTER, size=32, cut=" layer3, avgpool")
    assert options.cuts == ("avgpool", "layer3")
    cache = extract(image_folder, options=options).load()
    assert cache.cuts == ("avgpool", "layer3") and cache.meta["preprocess"]["size"] == 32
    assert options.command("my photos") == (
        "featcache extract 'my photos' --weights tinyimagenet32 --size 32 --cut ' layer3, avgpool'"
    )


def test_named_data_sets_have_no_path(fake_engine):
    made = extract("digits", weights=STARTER, train_limit=20, test_limit=10)
    assert made.load().meta["dataset_path"] is None


@pytest.mark.parametrize("named", ["photos.h5", "photos.shards"])
def test_force_never_deletes_what_is_no_cache_of_ours(image_folder, fake_engine, tmp_path, named):
    other = tmp_path / ("photos.shards" if named == "photos.h5" else "photos.h5")
    if other.suffix == ".shards":
        other.mkdir()
        (other / "manifest.json").write_text("a user's own")
        (other / "picture.npy").write_bytes(b"precious")
    else:
        other.write_bytes(b"precious")
    output = tmp_path / named
    with pytest.raises(OutputError, match=rf"{other.name}: expected no file or folder, or a cache"):
        extract(image_folder, weights=STARTER, output=output, force=True)
    kept = other / "picture.npy" if other.is_dir() else other
    assert kept.read_bytes() == b"precious" and not output.exists() and not fake_engine
    shutil.rmtree(other) if other.is_dir() else other.unlink()
    extract(image_folder / "train", weights=STARTER, output=other)
    with pytest.raises(OutputError, match=r"found a cache of train; move it, or name another"):
        extract(image_folder, weights=STARTER, output=output, force=True)
    shutil.rmtree(other) if other.is_dir() else other.unlink()
    extract(image_folder, weights=STARTER, output=other)
    assert extract(image_folder, weights=STARTER, output=output, force=True).cache == output
    assert not other.exists(), "the same data set's cache in the other form is replaced"


def test_a_limited_extraction_has_the_images_that_a_limited_probe_takes(image_folder, fake_engine):
    whole, part = (
        extract(image_folder, weights=STARTER, train_limit=limit, test_limit=limit).load()
        for limit in (None, 12)
    )
    assert (len(part.train), len(part.test)) == (12, 12)
    assert part.fingerprint != whole.fingerprint
    limited, own = probe(whole, train_limit=12, test_limit=12), probe(part)
    assert limited.top1 == own.top1 and limited.objective == own.objective
    assert extract(image_folder, weights=STARTER, train_limit=36).reused, "36 are all"
    with pytest.raises(DatasetError, match="colours train: expected to draw 2 of 36 images"):
        extract(image_folder, weights=STARTER, train_limit=2)


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
    with pytest.raises(CacheMismatchError, match=r"preprocess\.size: found 64, wanted 32"):
        extract(image_folder, weights=STARTER, size=32, output=output)
    assert output.read_bytes() == before
    assert extract(image_folder, weights=STARTER, size=32, output=output, force=True)
    assert load(output).meta["preprocess"]["size"] == 32


def test_a_damaged_cache_is_not_taken_either(image_folder, fake_engine, tmp_path):
    output = tmp_path / "mine.h5"
    output.write_bytes(b"not a cache")
    with pytest.raises(CacheError, match=r"mine\.h5: expected a file that .*--force"):
        extract(image_folder, weights=STARTER, output=output)


def test_flip_views_are_kept_beside_the_training_features(image_folder, fake_engine):
    cache = extract(image_folder, weights=STARTER, views="flips").load()
    assert cache.views == FLIP_VIEWS
    data = load_dataset(image_folder)
    pixels = Preprocess(64).batch([data.train.images[row] for row in range(36)])
    for view in FLIP_VIEWS:
        expected = fake_engine[0].extract(apply_view(pixels, view))["avgpool"]
        assert np.array_equal(cache.train.view(view), expected)


def only_hidden(folder):
    return all(path.name.startswith(".") for path in folder.glob("*"))


def test_what_was_measured_is_kept(image_folder, fake_engine):
    notes = []
    result = extract(image_folder, weights=STARTER, on_note=notes.append)
    assert notes == ["a test asked for it"]
    stages = result.load().meta["stages_s"]
    times = (stages["engine_s"], stages["waiting_for_pixels_s"], stages["waiting_for_disk_s"])
    assert result.bottleneck == ("engine", "decoding", "writing")[int(np.argmax(times))]
    waiting = {"waiting_for_pixels_s": 1.4, "waiting_for_disk_s": 0.0}
    assert bottleneck({"wall_s": 11.2, "engine_s": 9.8, **waiting}) == "engine"
    assert bottleneck({"wall_s": 11.2, "engine_s": 1.3, **waiting}) == "decoding"
    assert 0 < stages["engine_s"] < stages["wall_s"] and stages["decoding_cpu_s"] > 0
    assert result.images_per_s == pytest.approx(54 / stages["wall_s"], rel=0.2)


def test_several_cuts_come_from_one_pass(image_folder, fake_engine):
    cache = extract(image_folder, weights=STARTER, cut="avgpool,layer3", views="flips").load()
    assert cache.cuts == ("avgpool", "layer3")
    assert cache.train.features.shape == (36, 8)
    assert cache.train.cut("layer3").shape == cache.train.cut("layer3", "vflip").shape
    assert cache.test.cut("layer3").shape == (18, 4, 2, 2)
    assert cache.train.cut("avgpool") is not None
    with pytest.raises(CacheMissError, match=r"expected the cut 'layer2' in the view 'identity'"):
        cache.train.cut("layer2")
    maps = extract(image_folder, weights=STARTER, cut="layer3").load()
    assert np.array_equal(maps.test.features, cache.test.cut("layer3"))
    with pytest.raises(CacheMismatchError, match=r"found maps \(N, 4, 2, 2\) of the cut layer3"):
        probe(maps)


def test_float16_is_half_and_refuses_what_does_not_fit(image_folder, fake_engine, monkeypatch):
    half = extract(image_folder, weights=STARTER, dtype="float16").load()
    full = extract(image_folder, weights=STARTER).load()
    assert half.train.features.dtype == np.float16
    assert np.array_equal(half.train.features, full.train.features.astype(np.float16))
    honest = FakeEngine.extract
    monkeypatch.setattr(
        FakeEngine,
        "extract",
        lambda self, images: {"avgpool": honest(self, images)["avgpool"] * np.float32(1e5)},
    )
    with pytest.raises(FeatcacheError, match=r"train/blue/\d+\.png: .*65,504 for float16"):
        extract(image_folder, weights=STARTER, dtype="float16", force=True)


@pytest.mark.parametrize(
    ("n_offset", "offset", "said"), [(8, 60_000, "error"), (3, 60_000, "note"), (8, 100, "")]
)
def test_float16_is_told_where_an_offset_hides_the_spread(
    image_folder, fake_engine, monkeypatch, tmp_path, n_offset, offset, said
):
    """Beside 60,000, float16 counts in steps of 32; beside 100, in steps of 1/16."""
    honest = FakeEngine.extract
    offsets = np.where(np.arange(8) < n_offset, offset, 0).astype(np.float32)
    monkeypatch.setattr(
        FakeEngine,
        "extract",
        lambda self, images: {"avgpool": honest(self, images)["avgpool"] + offsets},
    )
    notes = []
    options = {"weights": STARTER, "output": tmp_path / "x.h5", "on_note": notes.append}
    expected = (
        rf"avgpool: float16 rounds away more than 10% of the spread of {n_offset} of 8 features "
        r"\(train images 0 to 35\); .*--dtype float32"
    )
    if said == "error":
        with pytest.raises(FeatcacheError, match=expected):
            extract(image_folder, dtype="float16", **options)
        assert not list(tmp_path.glob("*.h5"))
    else:
        extract(image_folder, dtype="float16", **options)
        assert any(re.match(expected, note) for note in notes) == (said == "note")
        assert sum("float16" in note for note in notes) == (2 if said else 0)  # of each split
    notes.clear()
    extract(image_folder, dtype="float32", force=True, **options)
    assert not any("float16" in note for note in notes)


@pytest.fixture
def torn_folder(image_folder, tmp_path):
    """The same images, of which two training files hold something else."""
    folder = tmp_path / "torn"
    shutil.copytree(image_folder, folder)
    for name in ("blue/03.png", "red/07.png"):
        (folder / "train" / name).write_bytes(b"not an image")
    return folder


def test_images_that_do_not_decode_fail_or_are_listed(torn_folder, fake_engine, tmp_path):
    output = tmp_path / "torn.h5"
    with pytest.raises(DatasetError, match=r"train/blue/03\.png: expected an image"):
        extract(torn_folder, weights=STARTER, output=output)
    result = extract(torn_folder, weights=STARTER, output=output, on_error="skip")
    cache = result.load()
    assert (result.n_rows, result.n_skipped) == (52, 2)
    assert cache.train.skipped == ("train/blue/03.png", "train/red/07.png")
    assert not set(cache.train.skipped) & set(cache.train.ids) and cache.test.skipped == ()
    data = load_dataset(torn_folder)
    row = data.train.ids.index("train/red/08.png")
    pixels = Preprocess(64).batch([data.train.images[row]])
    expected = fake_engine[0].extract(pixels)["avgpool"][0]
    found = cache.train.ids.index("train/red/08.png")
    np.testing.assert_allclose(cache.train.features[found], expected, rtol=1e-5)
    assert cache.train.labels[found] == 2

    assert extract(torn_folder, weights=STARTER, output=output, on_error="skip").reused
    with pytest.raises(CacheMismatchError, match=r"without 2 that did not decode \(train/blue/03"):
        extract(torn_folder, weights=STARTER, output=output)


def test_a_split_without_one_good_image_is_an_error(torn_folder, fake_engine):
    for path in (torn_folder / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match="test: expected at least one image that decodes"):
        extract(torn_folder, weights=STARTER, on_error="skip")


@pytest.mark.parametrize("pack", [True, False])
def test_an_interrupted_run_resumes(image_folder, fake_engine, tmp_path, monkeypatch, pack):
    monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
    arguments = {"weights": STARTER, "views": "flips", "batch_size": 3, "pack": pack}
    arguments["reuse"] = False
    whole = extract(image_folder, output=tmp_path / "whole.h5", **arguments)

    def stop(message):
        if message.stage == "train images" and message.done == 30:
            raise KeyboardInterrupt

    output = tmp_path / "parts.h5"
    with pytest.raises(KeyboardInterrupt, match=r"^24 of 54 images are kept, and the same"):
        extract(image_folder, output=output, on_progress=stop, **arguments)
    notes, heard = [], []
    rest = extract(
        image_folder, output=output, on_note=notes.append, on_progress=heard.append, **arguments
    )
    assert rest.n_resumed == 24 and "resuming after 24 of 54 images" in notes[-1]
    assert next(message for message in heard if message.stage == "train images").done == 24
    assert rest.cache.suffix == (".h5" if pack else ".shards")
    one, other = whole.load(), rest.load()
    for name, array in one.index.arrays.items():
        digests = [
            [block.sha256 for block in index.arrays[name].blocks]
            for index in (one.index, other.index)
        ]
        assert digests[0] == digests[1], name
        assert array.shape == other.index.arrays[name].shape
    assert extract(image_folder, output=output, **arguments).reused
    assert not list(tmp_path.glob(".parts.h5.parts"))


def test_a_run_killed_at_its_very_end_leaves_nothing_behind(image_folder, fake_engine, tmp_path):
    output = tmp_path / "mine.h5"
    extract(image_folder, weights=STARTER, output=output)
    left = tmp_path / ".mine.h5.parts"
    left.mkdir()
    (left / "train-000000000000-labels.npy").write_bytes(b"")
    assert extract(image_folder, weights=STARTER, output=output).reused
    assert not left.exists()


def test_skipped_images_of_an_unfinished_run_are_not_taken_over_in_silence(
    torn_folder, fake_engine, tmp_path, monkeypatch
):
    monkeypatch.setattr(extraction, "SHARD_ROWS", 8)

    def stop(message):
        if message.stage == "train images" and message.done == 24:
            raise KeyboardInterrupt

    arguments = {"weights": STARTER, "output": tmp_path / "mine.h5", "batch_size": 8}
    with pytest.raises(KeyboardInterrupt):
        extract(torn_folder, on_error="skip", on_progress=stop, **arguments)
    with pytest.raises(CacheMismatchError, match="unfinished run that left out 1 that did not"):
        extract(torn_folder, **arguments)
    assert extract(torn_folder, on_error="skip", **arguments).n_skipped == 2


def test_an_unfinished_run_of_other_ingredients_is_refused(
    image_folder, fake_engine, tmp_path, monkeypatch
):
    monkeypatch.setattr(extraction, "SHARD_ROWS", 8)

    def stop(message):
        if message.done == 16:
            raise KeyboardInterrupt

    output = tmp_path / "mine.h5"
    with pytest.raises(KeyboardInterrupt):
        extract(image_folder, weights=STARTER, output=output, batch_size=8, on_progress=stop)
    with pytest.raises(CacheMismatchError, match=r"unfinished run .*preprocess\.size: found 64"):
        extract(image_folder, weights=STARTER, output=output, size=32)
    assert extract(image_folder, weights=STARTER, output=output, size=32, force=True).n_rows == 54


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
    honest = FakeEngine.extract

    def broken(self, images):
        features = honest(self, images)
        features["avgpool"][5, 2] = np.nan
        return features

    monkeypatch.setattr(FakeEngine, "extract", broken)
    with pytest.raises(FeatcacheError, match=r"train/blue/05\.png: expected finite features"):
        extract(image_folder, weights=STARTER)
    assert only_hidden(home / "cache")


def test_one_writer_at_a_time_and_the_other_is_told(tmp_path):
    path = tmp_path / "x.h5"
    with single_writer(path):
        said = pytest.raises(CacheError, match=f"being written by process {os.getpid()} on ")
        with said, single_writer(path):
            pass
    with single_writer(path):
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
        ({"backbone": "vgg16"}, RecipeError, "found 'vgg16'"),
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


def test_copies_across_a_given_split_are_told(image_folder, fake_engine, tmp_path):
    folder = tmp_path / "leaky"
    shutil.copytree(image_folder, folder)
    train = next((folder / "train").rglob("*.png"))
    for number in range(3):
        shutil.copyfile(train, folder / "test" / train.parent.name / f"copy-{number}.png")
    notes = []
    extract(folder, output=tmp_path / "c.h5", on_note=notes.append, weights=STARTER)
    (told,) = (note for note in notes if "also in train" in note)
    assert told.startswith("3 of ")
    clean = []
    extract(image_folder, output=tmp_path / "d.h5", on_note=clean.append, weights=STARTER)
    assert not any("also in train" in note for note in clean)


def test_dead_features_are_told(image_folder, fake_engine, tmp_path, monkeypatch):
    notes = []
    extract(image_folder, output=tmp_path / "live.h5", on_note=notes.append, weights=STARTER)
    assert not any("same in all images" in note for note in notes)
    run = FakeEngine.extract
    monkeypatch.setattr(FakeEngine, "extract", lambda *_: {c: x * 0 for c, x in run(*_).items()})
    extract(image_folder, output=tmp_path / "d.h5", on_note=notes.append, weights="random:1")
    dim = FakeEngine.dim
    for role, n in ("train", 36), ("test", 18):
        told = f"{role}: {dim} of {dim} features are the same in all images; all features of {n} of"
        assert any(told in note for note in notes), notes


def test_a_batch_is_started_before_the_one_before_is_waited_for():
    heard = []

    def started(error=None):
        for number in range(3):
            heard.append(f"start {number}")
            yield number
        if error:
            raise error

    for number in _one_behind(started()):
        heard.append(f"finish {number}")
    assert heard == ["start 0", "start 1", "finish 0", "start 2", "finish 1", "finish 2"]
    finished = []
    batches = _one_behind(started(DatasetError("the fourth")))
    with pytest.raises(DatasetError, match="the fourth"):
        for number in batches:
            finished.append(number)
    assert finished == [0, 1, 2], "what was started before an error is finished"
