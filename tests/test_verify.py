"""`featcache.verify`: what is whole passes, and the first thing that is not is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time

import h5py
import numpy as np
import pytest
from caches import (
    FORMS,
    RICH,
    SplitArrays,
    ingredients,
    rewrite_index,
    rows_of,
    write_cache,
    write_roles,
    write_shards,
)
from conftest import write_gaussian_cache

from featcache import verify
from featcache.cli import main
from featcache.errors import CacheCorruptError, CacheMismatchError, CacheMissError
from featcache.store.cache import load
from featcache.store.format import seal, unseal
from featcache.store.writer import Source, pack


@pytest.fixture(params=FORMS)
def rich_cache(request, tmp_path):
    """A cache with two cuts, four views and a skipped image, packed or in shards."""
    return write_shards(tmp_path / "rich.h5", RICH, skip=(3,), **FORMS[request.param])


def flip(path, offset, bit=4):
    """Change one bit of a file."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        (byte,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 1 << bit]))


def refused(path):
    """Verify a cache that must not pass; return what is said of it, in one line."""
    with pytest.raises(CacheCorruptError) as caught:
        verify(path)
    said = str(caught.value)
    assert path.name in said and "expected" in said and "\n" not in said
    return said


def test_a_whole_cache_passes(rich_cache):
    messages = []
    report = verify(rich_cache, on_progress=messages.append)
    cache = load(rich_cache)
    assert report.form == ("shards" if rich_cache.is_dir() else "hdf5")
    assert (report.n_train, report.n_test) == (9, 4) and report.notes == ()
    assert report.n_arrays == len(cache.index.arrays) and report.fingerprint == cache.fingerprint
    assert report.size_bytes == sum(array.size_bytes for array in cache.index.arrays.values())
    done = [message.done for message in messages]
    assert done == sorted(done) and {message.unit for message in messages} == {"B"}
    assert (messages[0].done, messages[-1].done) == (0, report.size_bytes)


def test_ctrl_c_ends_the_threads_too(rich_cache, monkeypatch):
    monkeypatch.setattr("featcache.store.verify._REPORT_EVERY_S", 0.0)

    def endless(*_):
        while True:
            time.sleep(0.01)
            yield np.zeros(0)

    monkeypatch.setattr("featcache.store.verify.iterate_block", endless)
    n_threads = []

    def interrupt(message):
        n_threads.append(threading.active_count())
        if len(n_threads) == 2:  # the first report comes before the threads
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(rich_cache, on_progress=interrupt)
    assert threading.active_count() == n_threads[0] < n_threads[1]


def test_every_array_is_read(rich_cache, monkeypatch):
    """A bit of any array, in its last block, is found and its place is named."""
    # Which takes a child each time, and looks at no array.
    monkeypatch.setattr("featcache.store.h5py_view.check_view", lambda index: None)
    for name, array in load(rich_cache).index.arrays.items():
        number, block = len(array.blocks) - 1, array.blocks[-1]
        if not block.n_rows:
            continue
        flip(block.path, block.offset + block.n_rows * array.row_bytes - 1)
        said = refused(rich_cache)
        assert f"for {name}, found another in block {number} (rows" in said
        assert f"byte {block.offset} on" in said and "featcache extract --force" in said
        flip(block.path, block.offset + block.n_rows * array.row_bytes - 1)
    verify(rich_cache)


def test_the_first_bad_block_is_named(tmp_path):
    path = write_shards(tmp_path / "x.h5", RICH, n_train=40, shard_rows=4)
    blocks = load(path).index.arrays["train/features"].blocks
    for number in (7, 2, 5):
        flip(blocks[number].path, blocks[number].offset)
    assert "block 2 (rows 8 to 11" in refused(path)


@pytest.mark.parametrize("where", ["superblock", "last byte", "between"])
def test_the_bytes_of_hdf5_itself_are_covered(small_cache, where):
    with h5py.File(small_cache) as file:
        start = file.userblock_size
    offsets = {"superblock": start + 20, "last byte": small_cache.stat().st_size - 1}
    arrays = sorted(load(small_cache).index.arrays.values(), key=lambda a: a.blocks[0].offset)
    offsets["between"] = arrays[1].blocks[0].offset - 1
    flip(small_cache, offsets[where])
    assert "structure_sha256" in refused(small_cache)


def test_what_stands_between_the_index_and_hdf5_is_covered(small_cache):
    with h5py.File(small_cache) as file:
        start = file.userblock_size
    flip(small_cache, start - 1)
    assert f"expected a line feed at byte {start - 1}" in refused(small_cache)
    flip(small_cache, start - 1)
    flip(small_cache, start)
    assert "expected HDF5 behind its index, found none" in refused(small_cache)


@pytest.mark.parametrize("size", [0, 9, 100, 5000, -1])
def test_what_was_cut_short_is_found(small_cache, size):
    data = small_cache.read_bytes()
    small_cache.write_bytes(data[:size])
    refused(small_cache)
    small_cache.write_bytes(data + b"\0")
    assert "added to" in refused(small_cache)


def forge(path, change=lambda file: None, change_index=lambda content: None):
    """Edit the HDF5 in a packed file, and seal an index that takes it for genuine."""
    content = unseal(path.read_bytes())
    with h5py.File(path, "r+") as file:
        start = file.userblock_size
        change(file)
    content["size_bytes"] = path.stat().st_size
    change_index(content)
    data = bytearray(path.read_bytes())
    digest, at = hashlib.sha256(), start
    arrays = [array for array in content["arrays"].values() if array["blocks"][0][1] >= start]
    for array in sorted(arrays, key=lambda array: array["blocks"][0][1]):
        (n_rows, offset, *_), *_ = array["blocks"]
        size = np.dtype(array["dtype"]).itemsize * int(np.prod(array["row_shape"])) * n_rows
        digest.update(data[at:offset])
        at = offset + size
    digest.update(data[at:])
    content["structure_sha256"] = digest.hexdigest()
    sealed = seal(content)
    assert len(sealed) <= start
    data[:start] = sealed.ljust(start, b"\n")
    path.write_bytes(data)


def other_class_names(file):
    file["class_names"][:] = np.array([b"a"] * 3, h5py.string_dtype("utf-8", 7))


def elsewhere(file, name, **options):
    data = file[name][:]
    data = data.astype(options["dtype"]) if "dtype" in options else data
    file.create_dataset("new", data=data, **options)
    del file[name]
    file.move("new", name)


def outside(file, path):
    del file["test/features"]
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_external(path.encode(), 0, 60 * 8 * 4)
    space = h5py.h5s.create_simple((60, 8))
    h5py.h5d.create(file["test"].id, b"features", h5py.h5t.IEEE_F32LE, space, layout)


def virtual(file):
    del file["test/features"]
    layout = h5py.VirtualLayout((60, 8), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (60, 8))
    file.create_virtual_dataset("test/features", layout)


def references(file):
    del file["test/features"]
    file.create_dataset("test/features", data=np.array([[file.ref]], dtype=h5py.ref_dtype))


def terabytes(file):
    del file["test/features"]
    file.create_dataset("test/features", shape=(1 << 31, 8), dtype="f4")


def other_digest(file):
    file["test/labels_sha256"][0, 0] ^= 1


FORGED = {
    "attribute": (lambda f: f.attrs.update(backbone="resnet50"), "attribute 'backbone'"),
    "another attribute": (lambda f: f.attrs.update(note="new"), "attribute 'note'"),
    "object for an attribute": (lambda f: f.attrs.update(wall_s=[1, 2]), "text or a number"),
    "class names": (other_class_names, "class_names"),
    "array elsewhere": (lambda f: elsewhere(f, "test/ids"), "test/ids"),
    "array of another type": (
        lambda f: elsewhere(f, "train/features", dtype="f8"),
        "train/features",
    ),
    "no array": (lambda f: f.pop("train/labels"), "train/labels in its index alone"),
    "one more": (lambda f: f.update(extra=np.zeros(3)), "extra in HDF5 alone"),
    "one more group": (lambda f: f.create_group("test/more"), "test/more/ in HDF5 alone"),
    "checksum": (other_digest, "test/labels_sha256"),
    "external link": (
        lambda f: f.update({"test/more": h5py.ExternalLink("/etc/passwd", "/")}),
        "test/more",
    ),
    "soft link": (
        lambda f: (f.pop("test/labels"), f.update({"test/labels": h5py.SoftLink("/train/labels")})),
        "test/labels in the file itself, found a SoftLink",
    ),
    "chunks": (
        lambda f: elsewhere(f, "test/features", chunks=(10, 8), compression="gzip"),
        "test/features as plain contiguous",
    ),
    "external storage": (lambda f: outside(f, "/etc/passwd"), "test/features as plain contiguous"),
    "virtual data set": (virtual, "test/features as plain contiguous"),
    "soft link to a group": (
        lambda f: (f.move("train", "t"), f.update(train=h5py.SoftLink("/t"))),
        "in HDF5 alone",
    ),
    "references": (references, "test/features as plain contiguous"),
    "terabytes": (terabytes, "68,719,476,736 bytes declared"),
    "text of another encoding": (
        lambda f: elsewhere(f, "test/ids", dtype=h5py.string_dtype("ascii", 7)),
        "'ascii'",
    ),
    "a group in itself": (lambda f: f.update({"test/me": f["test"]}), "groups deep"),
}


@pytest.mark.parametrize("trick", FORGED)
def test_hdf5_that_tells_another_story_than_the_index(small_cache, trick):
    change, said = FORGED[trick]
    forge(small_cache, change)
    assert said in refused(small_cache)


def test_verify_imports_nothing_from_the_current_folder(small_cache, tmp_path, monkeypatch):
    (tmp_path / "h5py.py").write_text("raise SystemExit('a stranger was here')")
    monkeypatch.chdir(tmp_path)
    assert verify("small.h5").n_train == 120


def test_forging_alone_is_not_what_is_refused(small_cache):
    forge(small_cache)
    verify(small_cache)


def test_an_array_that_lies_in_the_index(small_cache):
    def move(content):
        content["arrays"]["test/features"]["blocks"][0][1] = 64

    forge(small_cache, change_index=move)
    assert "found it at 64, where something else lies" in refused(small_cache)


def rewritten(path, **changes):
    """Write a cache with other arrays in its training split, as if they had always been so."""
    cache = load(path)
    train = {"features": cache.train.features, "labels": cache.train.labels, "ids": cache.train.ids}
    own = ("format", "format_version", "fingerprint")
    meta = {
        name: value for name, value in {**cache.meta, "views": ["identity"]}.items()
        if name not in own
    }  # fmt: skip
    test = SplitArrays(cache.test.features, cache.test.labels, cache.test.ids)
    write_cache(path, {"train": SplitArrays(**{**train, **changes}), "test": test}, meta)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite(small_cache, value):
    features = load(small_cache).train.features.copy()
    features[77, 3] = value
    rewritten(small_cache, features=features)
    said = refused(small_cache)
    assert "finite numbers in train/features, found others in block 0, row 77" in said


@pytest.mark.parametrize("label", [-2, 3])
def test_labels_of_no_class(small_cache, label):
    labels = load(small_cache).train.labels.copy()
    labels[5] = label
    said = refused(rewritten(small_cache, labels=labels))
    assert (
        "labels from 0 to 2, or -1 for none, in train/labels, found others in block 0, row 5"
        in said
    )


def test_ids_that_name_two_images(small_cache):
    ids = (*load(small_cache).train.ids[:-1], "train/7")
    assert "found 'train/7' 2 times in train/ids" in refused(rewritten(small_cache, ids=ids))


def test_ids_in_both_splits_are_a_note(small_cache):
    ids = ("test/9", *load(small_cache).train.ids[1:])
    (note,) = verify(rewritten(small_cache, ids=ids)).notes
    assert "1 ids are in both splits ('test/9' …)" in note


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "x.h5", RICH)


def test_the_header_of_a_shard(shards):
    block = load(shards).index.arrays["train/views/hflip"].blocks[1]
    for offset in (0, 7, 9, 20, block.offset - 20, block.offset - 1):
        flip(block.path, offset)
        assert "the header of a .npy file with {'descr': '<f4'" in refused(block.path.parent)
        flip(block.path, offset)


def test_files_that_are_no_part_of_a_folder(shards):
    (shards / ".x.npy.abc.part").write_bytes(b"left by a kill")
    assert "hidden files" in verify(shards).notes[0]
    (shards / "notes.txt").write_text("mine")
    assert "found 'notes.txt' besides" in refused(shards)


def test_a_manifest_that_was_added_to(shards):
    manifest = shards / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert "added to" in refused(shards)


def test_checksums_that_were_sealed_wrong(rich_cache):
    """verify checks SHA-256 and XXH3-128: either alone is not enough."""
    for column, length in ((2, 64), (3, 32)):
        copy = rich_cache.with_name(f"copy{rich_cache.suffix}")
        (shutil.copytree if rich_cache.is_dir() else shutil.copy)(rich_cache, copy)

        def forge_one(content, column=column, length=length):
            content["arrays"]["test/features"]["blocks"][0][column] = "0" * length

        if copy.is_dir():
            rewrite_index(copy, forge_one)
        else:
            forge(copy, change_index=forge_one)
        assert "test/features" in refused(copy)
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()


def test_a_block_that_cannot_be_read(shards):
    """Whatever the disk says, it is an error of ours."""
    block = load(shards).index.arrays["train/labels"].blocks[0]
    index = load(shards).index
    size = block.path.stat().st_size
    block.path.unlink()
    block.path.mkdir()
    from featcache.store.reader import iterate_rows

    with pytest.raises(CacheCorruptError, match="see to the disk"):
        list(iterate_rows(index.arrays["train/labels"]))
    block.path.rmdir()
    block.path.write_bytes(b"\0" * size)
    with pytest.raises(CacheMismatchError, match="was replaced, changed or removed"):
        list(iterate_rows(index.arrays["train/labels"]))


def test_many_blocks_of_a_packed_file(tmp_path):
    path = write_gaussian_cache(tmp_path / "many.h5", n_train=40_000, dim=2)
    assert verify(path).n_blocks > 9
    blocks = load(path).index.arrays["train/views/vflip"].blocks
    flip(path, blocks[2].offset)
    assert f"block 2 (rows 32768 to 39999, byte {blocks[2].offset} on)" in refused(path)


def test_files_that_are_no_cache(tmp_path):
    with pytest.raises(CacheMissError, match="no such file"):
        verify(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    assert "no featcache index" in refused(tmp_path / "text.h5")


def test_the_command(capsys, small_cache):
    assert main(["verify", str(small_cache)]) == 0
    out = capsys.readouterr().out
    assert "is whole: 120 train and 60 test images" in out and "ids are unique" in out
    assert main(["verify", str(small_cache), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_train"] == 120 and report["checks"] and report["path"] == str(small_cache)
    flip(small_cache, load(small_cache).index.arrays["train/labels"].blocks[0].offset)
    assert main(["verify", str(small_cache)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
    assert "train/labels, found another in block 0" in captured.err
    assert main(["verify", "none.h5"]) == 1
    assert main(["verify", "a", "b"]) == 2


def test_a_split_val_is_counted_and_checked(tmp_path, capsys):
    path = write_roles(tmp_path / "val.h5", train=6, val=3, test=2)
    assert (verify(path).n_train, verify(path).n_val, verify(path).n_test) == (6, 3, 2)
    assert main(["verify", str(path)]) == 0
    assert "6 train, 3 val and 2 test images" in capsys.readouterr().out
    data = bytearray(path.read_bytes())
    data[load(path).index.arrays["val/features"].blocks[0].offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheCorruptError, match="val/features"):
        verify(path)


def test_a_cache_without_classes(tmp_path):
    meta = ingredients(class_names=[])
    rows = {role: rows_of(role, 3, meta=ingredients()) for role in ("train", "test")}
    sources = {
        f"{role}/{name}": Source.of(np.full(3, -1) if name == "labels" else array)
        for role, arrays in rows.items()
        for name, array in arrays.items()
    }
    pack(tmp_path / "flat.h5", sources, meta)
    assert "labels are -1, for none" in verify(tmp_path / "flat.h5").checks
