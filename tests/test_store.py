"""The cache's format: what is written is read again, by this package and by h5py alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from caches import (
    DATA,
    FORMS,
    RICH,
    SplitArrays,
    content,
    everything,
    ingredients,
    rows_of,
    write_cache,
    write_shards,
)
from conftest import write_gaussian_cache

from featcache import load, newest_cache, verify
from featcache.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissError,
    OutputError,
    ShapeMismatchError,
)
from featcache.preprocess import FLIP_VIEWS
from featcache.store.format import BLOCK_ROWS, FINGERPRINT_FIELDS, differences, fingerprint
from featcache.store.shards import ShardWriter
from featcache.store.writer import Source, pack

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


def test_what_is_written_is_read(small_cache):
    cache = load(small_cache)
    assert (len(cache.train), len(cache.test), cache.feature_dim) == (120, 60, 8)
    assert cache.train.features.dtype == np.float32 and cache.train.features.shape == (120, 8)
    assert cache.train.labels.dtype == np.int64 and set(cache.train.labels) == {0, 1, 2}
    assert cache.train.ids[5] == "train/5" and len(cache.test.ids) == 60
    assert cache.train.skipped == () and cache.train.content_hashes is None
    assert cache.class_names == ("class 0", "class 1", "class 2")
    assert (cache.views, cache.cuts) == (FLIP_VIEWS, ("avgpool",))
    assert cache.meta["preprocess"]["size"] == 64
    assert cache.fingerprint == fingerprint(cache.meta)
    assert cache.size_bytes == small_cache.stat().st_size
    assert not np.array_equal(cache.train.view("hflip"), cache.train.features)
    assert cache.train.view("identity") is cache.train.features
    assert "120 x 8" in repr(cache.train) and "3 classes" in repr(cache)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cuts_views_and_skipped_images_survive_in_both_forms_and_precisions(tmp_path, form, dtype):
    meta, skip = {**RICH, "dtype": dtype}, (1, 4, 5, 6, 7)  # the second shard is skipped whole
    path = write_shards(tmp_path / "x.h5", meta, skip=skip, **FORMS[form])
    wanted = rows_of("train", 10, meta=meta, skip=skip)
    train = load(path).train
    assert train.features.dtype == dtype
    assert np.array_equal(train.features, wanted["features"])
    assert np.array_equal(train.labels, wanted["labels"])
    assert train.ids == tuple(f"train/{row:05d}.png" for row in (0, 2, 3, 8, 9))
    assert train.skipped == tuple(f"train/{row:05d}.png" for row in skip)
    for view in FLIP_VIEWS[1:]:
        assert np.array_equal(train.view(view), wanted[f"views/{view}"])
        assert np.array_equal(train.cut("layer4", view), wanted[f"cuts/layer4/{view}"])
    assert train.cut("layer4").shape == (5, 3, 2, 2)
    assert np.array_equal(load(path).test.features, rows_of("test", 4, meta=meta)["features"])
    with pytest.raises(CacheMissError, match=r"'layer1' in the view 'identity', found .*--cut"):
        train.cut("layer1")


@pytest.mark.parametrize("form", FORMS)
def test_mapped_features_equal_those_that_are_read(tmp_path, form):
    path = write_shards(tmp_path / "x.h5", RICH, n_train=23, skip=(8, 9, 10, 11, 22), **FORMS[form])
    assert content(path, mmap=True) == content(path)
    train = load(path, mmap=True).train
    assert not isinstance(train.labels, np.memmap), "labels are small, and always verified"
    assert train.features.shape == (18, 5) and len(train.features) == 18
    assert train.features.dtype == np.float32 and train.features.nbytes == 18 * 5 * 4


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_arrays_are_read_only(tmp_path, form, mmap):
    train = load(write_shards(tmp_path / "x.h5", RICH, **FORMS[form]), mmap=mmap).train
    for array in (train.features[1:3], train.view("hflip")[1:3], train.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("n", [1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS])
def test_any_number_of_rows_survives_at_the_borders_of_blocks(tmp_path, n):
    meta = ingredients()
    arrays = rows_of("train", n, meta=meta, dim=3)
    ids = tuple(name.decode() for name in arrays["ids"].tolist())
    split = SplitArrays(arrays["features"], arrays["labels"], ids)
    write_cache(tmp_path / "x.h5", {"train": split, "test": split}, meta)
    for mmap in (False, True):
        train = load(tmp_path / "x.h5", mmap=mmap).train
        assert np.array_equal(train.features, split.features)
        assert np.array_equal(train.labels, split.labels) and train.ids == ids
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["train/features_sha256"].shape == (-(-n // BLOCK_ROWS), 32)


def test_h5py_alone_reads_the_same_and_can_verify_it(tmp_path):
    path = write_shards(tmp_path / "x.h5", RICH, pack=True, skip=(2,), facts={"wall_s": 1.5})
    read = everything(path)
    with h5py.File(path) as file:
        assert file.attrs["format"] == "featcache" and file.attrs["format_version"] == 1
        assert file.attrs["backbone"] == "resnet18" and file.attrs["wall_s"] == 1.5
        assert json.loads(file.attrs["views"]) == list(FLIP_VIEWS)
        assert [name.decode() for name in file["class_names"]] == RICH["class_names"]
        assert np.array_equal(file["train/features"], read["train/avgpool/identity"])
        assert np.array_equal(file["train/cuts/layer4/hflip"], read["train/layer4/hflip"])
        assert np.array_equal(file["test/labels"], read["test/labels"])
        assert [name.decode() for name in file["train/skipped"]] == ["train/00002.png"]
        arrays = {}
        file.visititems(lambda name, item: arrays.update({name: item}))
        arrays = {name: item for name, item in arrays.items() if isinstance(item, h5py.Dataset)}
        checked = {name for name in arrays if f"{name}_sha256" in arrays}
        assert checked == set(load(path).index.arrays)
        for name in checked:
            assert arrays[name].chunks is None
            for number, digest in enumerate(arrays[f"{name}_sha256"]):
                rows = arrays[name][number * BLOCK_ROWS : (number + 1) * BLOCK_ROWS]
                assert hashlib.sha256(rows.tobytes()).digest() == digest.tobytes(), name


def test_numpy_alone_reads_shards(tmp_path):
    path = write_shards(tmp_path / "x.h5", RICH)
    shards = [np.load(file) for file in sorted(path.glob("train-*-features.npy"))]
    assert [len(shard) for shard in shards] == [4, 4, 2]
    assert np.array_equal(np.concatenate(shards), load(path).train.features)


ARCHIVED = {
    "format-1.h5": "c5e349972050a98dba1e9bd1f3ec14df1c5748bd1839c3be3a74d997f109546a",
    "format-1.shards": "c5e349972050a98dba1e9bd1f3ec14df1c5748bd1839c3be3a74d997f109546a",
}


@pytest.mark.parametrize("name", ARCHIVED)
def test_archived_files_of_each_version_stay_readable(name):
    """Never write these files again: the format promises that they stay readable as they are."""
    assert load(DATA / name).meta["format_version"] == int(name[7])
    assert verify(DATA / name).notes == ()
    for mmap in (False, True):
        text = json.dumps(content(DATA / name, mmap=mmap), sort_keys=True)
        assert hashlib.sha256(text.encode()).hexdigest() == ARCHIVED[name]


def test_ids_of_any_alphabet_survive(tmp_path, small_cache):
    train = load(small_cache).train
    ids = ("train/猫/写真 1.jpg", 'a "quoted" <b>', "é" * 200, "no\udcfftext.png", "", "line\nfeed")
    arrays = SplitArrays(train.features[:6], train.labels[:6], ids)
    write_cache(tmp_path / "ids.h5", {"train": arrays, "test": arrays}, ingredients())
    assert load(tmp_path / "ids.h5").train.ids == ids


def test_h5py_decodes_every_text_of_a_cache(tmp_path):
    """Whatever the alphabet: arrays of text are marked as UTF-8."""
    ids, meta = ("кошка/1.png", "狗/2.png", "a"), ingredients(class_names=["кошка", "狗"])
    arrays = SplitArrays(np.ones((3, 4), np.float32), np.array([0, 1, 0]), ids)
    write_cache(tmp_path / "x.h5", {"train": arrays, "test": arrays}, meta)
    verify(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["class_names"].asstr()[:].tolist() == meta["class_names"]
        assert tuple(file["train/ids"].asstr()) == ids
    with h5py.File(write_shards(tmp_path / "y.h5", meta, skip=(3,), pack=True)) as file:
        for name in ("class_names", "test/ids", "train/skipped"):
            assert h5py.check_string_dtype(file[name].dtype).encoding == "utf-8"
        assert file["train/skipped"].asstr()[:].tolist() == ["train/00003.png"]


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_found_by_the_hash_of_their_file(tmp_path, form):
    meta = ingredients()
    writer = ShardWriter(tmp_path / "x.h5", meta)
    hashes = {}
    for role, n, skipped in (("train", 6, 2), ("test", 3, None)):
        files = [hashlib.sha256(f"{role} {row}".encode()).digest() for row in range(n)]
        hashes[role] = np.frombuffer(b"".join(files), np.uint8).reshape(n, 32)
        for start in range(0, n, 3):
            rows = np.arange(start, start + 3)
            lost = [int(row) for row in rows if row == skipped]
            kept = np.setdiff1d(rows, lost).astype(int)
            arrays = {**rows_of(role, n, meta=meta), "content_hashes": hashes[role]}
            arrays = {name: array[kept] for name, array in arrays.items()}
            left_out = [(row, 0) for row in lost]
            writer.commit(
                role, start, start + 3, arrays, {}, hashes=hashes[role][rows], left_out=left_out
            )
    limit = (1 << 40) if form == "packed" else -1
    path = writer.finish({}, pack_limit=limit)
    verify(path)
    train, test = load(path).train, load(path).test
    assert np.array_equal(test.content_hashes, hashes["test"])
    assert np.array_equal(train.content_hashes, np.delete(hashes["train"], 2, axis=0))
    wanted = hashlib.sha256(b"train 4").digest()
    (row,) = [row for row, found in enumerate(train.content_hashes) if found.tobytes() == wanted]
    assert train.ids[row] == "train/00004.png"


@pytest.mark.parametrize("place", ["/data/photos", "s3://bucket/photos", None])
def test_the_path_of_the_data_set_is_a_field_of_its_own(tmp_path, place):
    path = write_shards(tmp_path / "x.h5", ingredients(dataset_path=place), pack=True)
    assert load(path).meta["dataset_path"] == place and verify(path).n_train == 10
    with h5py.File(path) as file:  # which knows no null
        assert file.attrs.get("dataset_path") == place


def test_class_names_of_any_length_survive(tmp_path):
    names = [f"{'κλάση' * 10} {number}" for number in range(2000)]
    assert len(json.dumps(names)) > 1 << 16, "more than an attribute of HDF5 can hold"
    path = write_shards(tmp_path / "x.h5", ingredients(class_names=names), pack=True)
    assert load(path).class_names == tuple(names)
    with h5py.File(path) as file:
        assert [name.decode() for name in file["class_names"]] == names
        assert "class_names" not in file.attrs


def test_the_newest_cache_is_found(tmp_path):
    with pytest.raises(CacheMissError, match="found none; make one with featcache"):
        newest_cache(tmp_path)
    for number, name in enumerate(("b", "c", "a")):
        path = write_gaussian_cache(tmp_path / f"{name}.h5")
        os.utime(path, (number, number))
    assert newest_cache(tmp_path).name == "a.h5"
    (tmp_path / "no cache.shards").mkdir()
    assert newest_cache(tmp_path).name == "a.h5"
    assert write_shards(tmp_path / "d.h5", ingredients()) == newest_cache(tmp_path)


def test_arrays_of_another_type_or_length_are_not_written(tmp_path):
    rows = np.zeros((2, 4), np.float32)
    for n_rows, dtype in ((2, np.float64), (3, np.float32)):
        source = Source(np.dtype(dtype), (n_rows, 4), lambda: [rows])
        with pytest.raises(ShapeMismatchError, match="float64" if n_rows == 2 else "3 rows"):
            pack(tmp_path / "x.h5", {"train/features": source}, ingredients())
    assert not [*tmp_path.iterdir()]


def test_the_fingerprint_follows_every_ingredient_and_nothing_else(small_cache):
    meta = load(small_cache).meta
    assert fingerprint({**meta, "created": "later", "wall_s": 9.0}) == fingerprint(meta)
    changes = {
        "backbone": "resnet34",
        "calibration": "3" * 64,
        "cuts": ["avgpool", "layer4"],
        "dataset_digest": "2" * 64,
        "device": "cuda",
        "dtype": "float16",
        "engine": "other",
        "engine_version": "2",
        "library": "timm 1",
        "precision": "bf16",
        "preprocess": {**meta["preprocess"], "mean": [0.5, 0.5, 0.5]},
        "views": ["identity"],
        "weights_sha256": "1" * 64,
    }
    assert set(changes) == set(FINGERPRINT_FIELDS)
    for name, value in changes.items():
        changed = {**meta, name: value}
        assert fingerprint(changed) != fingerprint(meta), name
        (difference,) = differences(meta, changed)
        assert difference.startswith((f"{name}: found ", f"{name}.mean: found ")), difference


@pytest.mark.parametrize("name", ["features", "labels", "ids", "views/vflip"])
def test_a_flipped_bit_is_found_on_reading(small_cache, name):
    with h5py.File(small_cache) as file:
        offset = file[f"train/{name}"].id.get_offset()
    data = bytearray(small_cache.read_bytes())
    data[offset + 3] ^= 0x10
    small_cache.write_bytes(data)
    train = load(small_cache).train
    with pytest.raises(CacheCorruptError, match=f"train/{name}, found another in block 0"):
        train.view(name.removeprefix("views/")) if "/" in name else getattr(train, name)


def test_the_first_bad_block_is_named(tmp_path):
    arrays = rows_of("train", 2 * BLOCK_ROWS + 7, meta=ingredients(), dim=2)
    ids = tuple(name.decode() for name in arrays["ids"].tolist())
    split = SplitArrays(arrays["features"], arrays["labels"], ids)
    write_cache(tmp_path / "x.h5", {"train": split, "test": split}, ingredients())
    blocks = load(tmp_path / "x.h5").index.arrays["train/features"].blocks
    assert len(blocks) == 3
    with (tmp_path / "x.h5").open("r+b") as stream:
        for block in blocks[1:]:
            stream.seek(block.offset)
            stream.write(b"\xff")
    with pytest.raises(CacheCorruptError, match=r"in block 1 \(rows 16384 to 32767, byte \d+ on\)"):
        load(tmp_path / "x.h5").train.features  # noqa: B018


def test_labels_outside_the_classes_are_refused(tmp_path):
    arrays = rows_of("train", 6, meta=ingredients())
    split = SplitArrays(arrays["features"], np.full(6, 7, np.int64), tuple("abcdef"))
    write_cache(tmp_path / "x.h5", {"train": split, "test": split}, ingredients())
    with pytest.raises(CacheCorruptError, match="labels of train from 0 to 2, found 7 to 7"):
        load(tmp_path / "x.h5").train.labels  # noqa: B018


def test_a_file_of_a_later_version_says_so(small_cache):
    data = small_cache.read_bytes()
    small_cache.write_bytes(data.replace(b"featcache 1 ", b"featcache 3 ", 1))
    with pytest.raises(CacheMismatchError, match="format version 1, found 3; use the feat"):
        load(small_cache)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5: expected a feature cache"):
        load(tmp_path / "none.h5")
    with pytest.raises(CacheMissError, match="found a folder that is none; if it holds images"):
        load(tmp_path)


def test_a_file_that_was_replaced_or_went_away_after_it_was_opened(small_cache):
    read, mapped = load(small_cache), load(small_cache, mmap=True)
    write_gaussian_cache(small_cache, seed=1)
    for _ in range(2):
        for cache in (read, mapped):
            with pytest.raises(
                CacheMismatchError, match=r"small\.h5: .* was replaced, changed or removed"
            ):
                cache.train.features  # noqa: B018
        small_cache.unlink(missing_ok=True)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_cache_that_is_replaced_all_the_time_is_one_or_the_other(tmp_path, form, mmap):
    """Two caches of one size take turns under one name: nothing is of both, and none is damaged."""
    path = tmp_path / ("x.h5" if form == "packed" else "x.shards")
    sides, first_rows = [], {}
    for seed, digit in enumerate("ab"):
        meta = ingredients(dataset_digest=digit * 64)
        sides.append(write_shards(tmp_path / f"{digit}.h5", meta, seed=seed, **FORMS[form]))
        first_rows[digit * 64] = rows_of("train", 10, meta=meta, seed=seed)["features"][0]
    ended = threading.Event()

    def take_turns():
        for side in itertools.cycle(sides):
            if ended.is_set():
                return
            if form == "packed":
                os.link(side, tmp_path / "next")
                os.replace(tmp_path / "next", path)
            else:
                os.rename(side, path)
                time.sleep(0.002)
                os.rename(path, side)

    turns = threading.Thread(target=take_turns)
    turns.start()
    started, n_loaded, told = time.monotonic(), 0, set()
    try:
        while time.monotonic() < started + (0.7 if n_loaded > 5 else 20):
            try:
                cache = load(path, mmap=mmap)
                row = np.asarray(cache.train.features[0])
            except (CacheMissError, CacheMismatchError) as error:
                told.add(str(error).partition(" found ")[2])
                continue
            assert np.array_equal(row, first_rows[cache.meta["dataset_digest"]])
            n_loaded += 1
    finally:
        ended.set()
        turns.join()
    assert n_loaded > 5, told


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("question", ["passes", "rows"])
def test_a_file_that_is_cut_short_while_it_is_mapped_is_an_error(tmp_path, form, question):
    """In a child: without the check, the system ends it with SIGBUS."""
    path = write_shards(
        tmp_path / "x.h5", ingredients(), n_train=20_000, n_test=40, shard_rows=4096, **FORMS[form]
    )
    asked = {
        "passes": "list(each_block([features], lambda view, rows: view[rows].sum(), 10**5))",
        "rows": "Rows(features, np.arange(9000, 9100))[:]",
    }
    script = f"""
import os
import numpy as np
from featcache import load
from featcache.errors import CacheCorruptError
from featcache.probes.blocks import Rows, each_block
features = load({str(path)!r}, mmap=True).train.features
before = {asked[question]}
for block in load({str(path)!r}).index.arrays["train/features"].blocks:
    os.truncate(block.path, block.offset)
try:
    after = {asked[question]}
except CacheCorruptError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert str(path) in done.stdout and "found that it was cut short to" in done.stdout


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


def test_a_cache_can_be_copied_and_renamed(tmp_path):
    for form, options in FORMS.items():
        path = write_shards(tmp_path / f"{form}.h5", RICH, **options)
        before, target = content(path), tmp_path / f"moved {form}"
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
        assert content(target) == before
