"""The cache's format: what is written is read, and what was damaged or rigged is refused."""

from __future__ import annotations

import os
import shutil

import h5py
import numpy as np
import pytest
from conftest import write_gaussian_cache

from featcache import load, newest_cache
from featcache.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissError,
    OutputError,
    ShapeMismatchError,
)
from featcache.preprocess import FLIP_VIEWS
from featcache.store import BLOCK_ROWS, SplitArrays, block_checksums, differences, fingerprint


def test_what_is_written_is_read(small_cache):
    cache = load(small_cache)
    assert (len(cache.train), len(cache.test), cache.feature_dim) == (120, 60, 8)
    assert cache.train.features.dtype == np.float32 and cache.train.features.shape == (120, 8)
    assert cache.train.labels.dtype == np.int64 and set(cache.train.labels) == {0, 1, 2}
    assert cache.train.ids[5] == "train/5" and len(cache.test.ids) == 60
    assert cache.class_names == ("class 0", "class 1", "class 2")
    assert cache.views == FLIP_VIEWS
    assert cache.meta["preprocess"]["size"] == 64
    assert cache.fingerprint == fingerprint(cache.meta)
    assert not np.array_equal(cache.train.view("hflip"), cache.train.features)
    assert cache.train.view("identity") is cache.train.features
    assert "120 x 8" in repr(cache.train) and "3 classes" in repr(cache)
    with pytest.raises(ValueError, match="read-only"):
        cache.train.features[0] = 0


def test_h5py_alone_reads_it(small_cache):
    with h5py.File(small_cache) as file:
        assert file["train/features"].shape == (120, 8)
        assert file["train/features"].chunks is None
        assert file["train/ids"][3].decode() == "train/3"
        assert file.attrs["format"] == "featcache" and file.attrs["format_version"] == 1
        assert file.attrs["backbone"] == "resnet18"
        assert set(file["train/views"]) >= set(FLIP_VIEWS[1:])


def test_ids_of_any_alphabet_survive(tmp_path, small_cache):
    from featcache.store import write_cache

    cache = load(small_cache)
    ids = ("train/猫/写真 1.jpg", 'a "quoted" <b>', "é" * 200)
    arrays = SplitArrays(cache.train.features[:3], cache.train.labels[:3], ids)
    meta = {k: v for k, v in cache.meta.items() if not k.startswith("format")}
    write_cache(tmp_path / "ids.h5", {"train": arrays, "test": arrays}, meta)
    assert load(tmp_path / "ids.h5").train.ids == ids


def test_the_newest_cache_is_found(tmp_path):
    with pytest.raises(CacheMissError, match="found none; make one with featcache"):
        newest_cache(tmp_path)
    for number, name in enumerate(("b", "c", "a")):
        path = write_gaussian_cache(tmp_path / f"{name}.h5")
        os.utime(path, (number, number))
    assert newest_cache(tmp_path).name == "a.h5"


def test_arrays_that_do_not_belong_together_are_not_written():
    features, labels, ids = np.zeros((2, 4), np.float32), np.zeros(2, np.int64), ("a", "b")
    with pytest.raises(ShapeMismatchError, match="float64"):
        SplitArrays(features.astype(np.float64), labels, ids)
    with pytest.raises(ShapeMismatchError, match="1 ids"):
        SplitArrays(features, labels, ("a",))
    with pytest.raises(ShapeMismatchError, match=r"hflip: expected float32 \(2, D\)"):
        SplitArrays(features, labels, ids, {"hflip": features[:1]})


def test_checksums_cover_blocks_of_rows():
    array = np.zeros((BLOCK_ROWS + 1, 2), np.float32)
    first = block_checksums(array)
    assert first.shape == (2, 32)
    array[-1, -1] = 1
    second = block_checksums(array)
    assert np.array_equal(first[0], second[0]) and not np.array_equal(first[1], second[1])


def test_the_fingerprint_follows_every_ingredient_and_nothing_else(small_cache):
    meta = load(small_cache).meta
    assert fingerprint({**meta, "created": "later", "wall_s": 9.0}) == fingerprint(meta)
    for name, value in {
        "weights_sha256": "1" * 64,
        "preprocess": {**meta["preprocess"], "mean": [0.5, 0.5, 0.5]},
        "dataset_digest": "2" * 64,
        "engine_version": "2",
        "precision": "bfloat16",
        "views": ["identity"],
        "cut": "layer4",
    }.items():
        changed = {**meta, name: value}
        assert fingerprint(changed) != fingerprint(meta), name
        (difference,) = differences(meta, changed)
        assert difference.startswith(f"{name}: found ")


def test_a_flipped_bit_is_found_on_reading(small_cache):
    for name in ("features", "labels", "ids", "views/vflip"):
        copy = small_cache.with_name("flipped.h5")
        shutil.copy(small_cache, copy)
        with h5py.File(copy) as file:
            offset = file[f"train/{name}"].id.get_offset()
        data = bytearray(copy.read_bytes())
        data[offset + 3] ^= 0x10
        copy.write_bytes(data)
        train = load(copy).train
        with pytest.raises(CacheCorruptError, match=f"SHA-256 .* train/{name}, found another"):
            train.view(name.removeprefix("views/")) if "/" in name else getattr(train, name)


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def replace(file, name, value, **options):
    del file[name]
    file.create_dataset(name, data=value, **options)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda f: f.attrs.update(format_version=2), CacheMismatchError, "format version 1, found"),
        (lambda f: f.attrs.update(format="other"), CacheCorruptError, "without its mark"),
        (lambda f: f.attrs.pop("class_names"), CacheCorruptError, "attribute 'class_names'"),
        (lambda f: f.attrs.update(cut="layer4"), CacheCorruptError, "someone edited them"),
        (lambda f: f.attrs.update(created=[1, 2]), CacheCorruptError, "attribute 'created'"),
        (lambda f: f.attrs.update(views="{not json"), CacheCorruptError, "readable HDF5"),
        (lambda f: f.pop("test"), CacheMissError, "expected test/features, found none"),
        (lambda f: replace(f, "train/features", np.zeros((3, 4))), CacheCorruptError, "float64"),
        (lambda f: replace(f, "train/features", np.zeros(3, "f4")), CacheCorruptError, r"\(3,\)"),
    ],
    ids=[
        "version",
        "mark",
        "attribute",
        "edited",
        "odd attribute",
        "json",
        "split",
        "dtype",
        "ndim",
    ],
)
def test_files_that_are_no_cache_of_this_format(small_cache, change, error, said):
    edit(small_cache, change)
    with pytest.raises(error, match=said) as caught:
        load(small_cache)
    assert str(small_cache) in str(caught.value) and "\n" not in str(caught.value)


def test_labels_outside_the_classes_are_refused(small_cache):
    labels = np.full(120, 7, np.int64)

    def change(file):
        replace(file, "train/labels", labels)
        replace(file, "train/labels_sha256", block_checksums(labels))

    edit(small_cache, change)
    with pytest.raises(CacheCorruptError, match="labels of train from 0 to 2, found 7 to 7"):
        load(small_cache).train.labels  # noqa: B018


@pytest.mark.parametrize("size", [0, 7, 100, 3000])
def test_truncated_files_are_refused(small_cache, size):
    small_cache.write_bytes(small_cache.read_bytes()[:size])
    with pytest.raises(CacheCorruptError, match="readable HDF5"):
        load(small_cache)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5: expected a feature cache"):
        load(tmp_path / "none.h5")
    with pytest.raises(CacheMissError):
        load(tmp_path)


def hostile_external(file, secret):
    del file["train/features"]
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_external(os.fsencode(secret), 0, 120 * 8 * 4)
    space = h5py.h5s.create_simple((120, 8))
    h5py.h5d.create(file["train"].id, b"features", h5py.h5t.IEEE_F32LE, space, layout)


def hostile_virtual(file, secret):
    del file["train/features"]
    layout = h5py.VirtualLayout((120, 8), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "x", (120, 8))
    file.create_virtual_dataset("train/features", layout)


def hostile_link(file, link):
    del file["train/features"]
    file["train/features"] = link


def declare(file, **options):
    del file["train/features"]
    file.create_dataset("train/features", shape=(1 << 36, 8), dtype="f4", **options)


HOSTILE = {
    "external storage": hostile_external,
    "virtual data set": hostile_virtual,
    "external link": lambda f, s: hostile_link(f, h5py.ExternalLink(str(s), "/x")),
    "soft link": lambda f, s: hostile_link(f, h5py.SoftLink("/test/features")),
    "soft link to a group": lambda f, s: (
        f.move("train", "t"),
        f.update(train=h5py.SoftLink("/t")),
    ),
    "group of the name": lambda f, s: (f.pop("train/features"), f.create_group("train/features")),
    "compressed terabytes": lambda f, s: declare(f, chunks=(1024, 8), compression="gzip"),
    "declared terabytes": lambda f, s: declare(f),
    "references": lambda f, s: replace(
        f, "train/features", np.array([[f.ref]], dtype=h5py.ref_dtype)
    ),
}


@pytest.mark.parametrize("trick", HOSTILE)
def test_rigged_files_are_refused_before_any_data_is_read(small_cache, tmp_path, trick):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.full((120, 8), 42, np.float32)

    edit(small_cache, lambda file: HOSTILE[trick](file, secret))
    with pytest.raises(CacheCorruptError, match=r"expected (an array at )?train"):
        load(small_cache)


def test_a_full_disk_leaves_the_old_file(small_cache, monkeypatch):
    from featcache import files

    before = small_cache.read_bytes()

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(OutputError, match="No space left on device"):
        files.write_atomically(small_cache, b"new")
    assert small_cache.read_bytes() == before
    assert [path.name for path in small_cache.parent.iterdir()] == ["small.h5"]
