"""Files from strangers: whatever they claim, they are refused in one line and read nothing else."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket

import fuzz_cache
import pytest
from altered_json import DEEP
from caches import (
    FORMS,
    RICH,
    content,
    index_file,
    make_room,
    put_index,
    rewrite_index,
    write_shards,
)

from featcache import load
from featcache.cli import main
from featcache.errors import CacheCorruptError, CacheError, CacheMissError, visible
from featcache.store.format import unseal

pytestmark = pytest.mark.timeout(60)  # a test that waits for a pipe or a device fails soon


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A cache of each form, with room for any other index."""
    folder = tmp_path_factory.mktemp("sound")
    paths = {
        form: write_shards(folder / f"{form}.h5", RICH, n_train=6, skip=(1,), **options)
        for form, options in FORMS.items()
    }
    make_room(paths["packed"])
    assert content(paths["packed"]) == content(paths["shards"])
    return paths


def copied(path, folder):
    return (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)


@pytest.fixture(params=FORMS)
def cache(sound, tmp_path, request):
    return copied(sound[request.param], tmp_path)


@pytest.fixture
def shards(sound, tmp_path):
    return copied(sound["shards"], tmp_path)


def refused(path, said=".", error=CacheCorruptError):
    """Assert that a cache is refused in one line that names it, mapped or not."""
    for mmap in (False, True):
        with pytest.raises(error, match=said) as caught:
            content(path, mmap=mmap)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def meta(**changes):
    return lambda index: index["meta"].update(changes)


def spec(name, **changes):
    return lambda index: index["arrays"][name].update(changes)


def block(name, at, value):
    """Change one entry of an array's first block."""

    def change(index):
        index["arrays"][name]["blocks"][0][at] = value

    return change


def emptied(name, row_shape):
    """Claim rows of any shape, and none of them."""

    def change(index):
        for array in index["arrays"].values():
            array["blocks"] = []
        index["arrays"][name]["row_shape"] = row_shape
        index["arrays"]["test/features"]["row_shape"] = row_shape

    return change


CLAIMS = {
    "no provenance": (lambda index: index.pop("meta"), "found none of 'meta'"),
    "provenance that is a list": (lambda index: index.update(meta=[1]), r"\[1\] as its provenance"),
    "another format": (meta(format="zarr"), "'zarr' in the field 'format'"),
    "another version inside": (meta(format_version=2), "2 in the field 'format_version'"),
    "no version inside": (lambda i: i["meta"].pop("format_version"), "no field 'format_version'"),
    "a field of the fingerprint is missing": (
        lambda i: i["meta"].pop("engine"),
        "no field 'engine'",
    ),
    "no class": (meta(class_names=[]), "class_names"),
    "classes in one text": (meta(class_names="abc"), "class_names"),
    "classes that are numbers": (
        meta(class_names=[1, 2, 3]),
        r"\[1, 2, 3\] in the field 'class_names'",
    ),
    "no cut": (meta(cuts=[]), "cuts"),
    "a cut that is a number": (meta(cuts=[3]), r"\[3\] in the field 'cuts'"),
    "views that are a number": (meta(views=7), "views"),
    "preprocessing that is text": (meta(preprocess="as usual"), "preprocess"),
    "an engine that is a list": (meta(engine=["fake"]), "engine"),
    "a field that is null": (meta(created=None), "created"),
    "a field that is not finite": (meta(wall_s=float("nan")), "wall_s"),
    "a field that is infinite": (meta(wall_s=[float("inf")]), "wall_s"),
    "a field too deep to be shown": (meta(note=DEEP), "note"),
    "no arrays": (lambda index: index.pop("arrays"), "found none of 'arrays'"),
    "arrays that are a list": (lambda index: index.update(arrays=[]), "list"),
    "no labels": (lambda i: i["arrays"].pop("train/labels"), "none of 'train/labels'"),
    "no ids": (lambda i: i["arrays"].pop("test/ids"), "none of 'test/ids'"),
    "no features": (lambda i: i["arrays"].pop("train/features"), "none of 'train/features'"),
    "an array of another name": (
        lambda i: i["arrays"].update({"train/../../x": i["arrays"]["train/ids"]}),
        "an array named",
    ),
    "an array that is a number": (lambda i: i["arrays"].update({"train/ids": 3}), "."),
    "objects": (spec("train/features", dtype="|O"), r"train/features as \|O"),
    "doubles": (spec("train/features", dtype="<f8"), "train/features as <f8"),
    "big-endian features": (spec("train/features", dtype=">f4"), "train/features as >f4"),
    "a structure": (spec("train/features", dtype="i4,i4"), "train/features as i4,i4"),
    "a type that is a list": (spec("train/features", dtype=[]), "."),
    "labels of 32 bits": (spec("train/labels", dtype="<i4"), "train/labels as <i4"),
    "ids of no length": (spec("train/ids", dtype="|S0"), r"train/ids as \|S0"),
    "ids of gigabytes": (spec("train/ids", dtype="|S1000000000"), "train/ids as"),
    "rows of no length": (spec("train/features", row_shape=[0]), "rows of shape"),
    "rows of negative length": (spec("train/features", row_shape=[-5]), "rows of shape"),
    "rows of a true length": (spec("train/features", row_shape=[True]), "rows of shape"),
    "rows of a length with a point": (spec("train/features", row_shape=[5.0]), "rows of shape"),
    "rows of 70 dimensions": (spec("train/features", row_shape=[1] * 70), "rows of shape"),
    "rows of terabytes, and none of them": (
        emptied("train/features", [1 << 20, 1 << 20]),
        "rows of 4,398,046,511,104 bytes",
    ),
    "rows of a single number": (spec("train/features", row_shape=[]), "."),
    "labels in rows": (spec("train/labels", row_shape=[1]), "train/labels of shape"),
    "names of skipped images in rows": (
        spec("train/skipped", row_shape=[1]),
        "train/skipped of shape",
    ),
    "a view of another length": (spec("train/views/hflip", row_shape=[1]), "."),
    "another length in test": (spec("test/features", row_shape=[1]), "."),
    "more rows than labels": (
        block("train/features", 0, 1),
        "1 rows in train/features|instead of 148",
    ),
    "a negative number of rows": (block("train/features", 0, -1), "a block of -1 rows"),
    "rows with a point": (block("train/features", 0, 4.0), "a block of 4.0 rows"),
    "a true number of rows": (block("train/features", 0, True), "a block of True rows"),
    "rows beyond counting": (block("train/features", 0, 1 << 70), "of 1180591620717411303424 rows"),
    "rows too many to be shown": (block("train/features", 0, 10**4000), "."),
    "a negative offset": (block("train/features", 1, -1), "at -1"),
    "an offset with a point": (block("train/features", 1, 1.5), "at 1.5"),
    "an offset beyond the end": (block("train/features", 1, 1 << 40), "1,099,511,62"),
    "a checksum that is null": (block("train/features", 2, None), "."),
    "a checksum that is too short": (block("train/features", 2, "abc"), "checksums 'abc'"),
    "an XXH3 that is too long": (block("train/features", 3, "0" * 64), "and '0000"),
    "an XXH3 that is missing": (block("train/features", 3, ""), "and ''"),
    "a path of the data set that is a number": (
        lambda i: i["meta"].update(dataset_path=1),
        "1 in the field 'dataset_path'",
    ),
    "content hashes of another length": (
        spec("train/content_hashes", row_shape=[16]),
        "content_hashes|instead of",
    ),
    "content hashes as text": (spec("train/content_hashes", dtype="|S1"), r"_hashes as \|S1"),
    "a block without its entries": (
        lambda i: i["arrays"]["train/features"]["blocks"][0].clear(),
        "unpack",
    ),
    "a block too many": (
        lambda i: i["arrays"]["train/features"]["blocks"].append(
            i["arrays"]["train/features"]["blocks"][0]
        ),
        ".",
    ),
    "blocks that are text": (spec("train/features", blocks="abcd"), "."),
    "bytes of another array": (
        lambda i: i["arrays"].update({"train/views/hflip": i["arrays"]["train/features"]}),
        "begins inside|names twice",
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_an_index_that_claims_anything_else_is_refused(cache, claim):
    change, said = CLAIMS[claim]
    rewrite_index(cache, change)
    refused(cache, said)


@pytest.mark.parametrize("size", [None, 0, 1.5, "7", [], {}])
def test_a_file_of_another_size_than_its_index_says_is_refused(sound, tmp_path, size):
    path = copied(sound["packed"], tmp_path)
    rewrite_index(path, lambda index: index.update(size_bytes=size))
    refused(path)
    rewrite_index(path, lambda index: index.pop("size_bytes"))
    refused(path, "none of 'size_bytes'")


def test_another_checksum_is_refused_when_the_rows_are_read(cache):
    def change(index):
        index["arrays"]["train/features"]["blocks"][0][2:4] = ["0" * 64, "0" * 32]

    rewrite_index(cache, change)
    with pytest.raises(CacheCorruptError, match="train/features, found another in block 0"):
        content(cache)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"meta": NaN}',
        b'{"meta": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 30_000,
    ],
    ids=[
        "empty",
        "list",
        "null",
        "half",
        "no text",
        "nan",
        "long number",
        "deep lists",
        "deep objects",
    ],
)
def test_an_index_that_is_no_json_object_is_refused(cache, text):
    put_index(cache, text)
    refused(cache)


def test_fields_that_were_edited_are_told_by_the_fingerprint(cache):
    edited = unseal(index_file(cache).read_bytes())
    edited["meta"]["engine"] = "another"
    put_index(cache, json.dumps(edited).encode())
    refused(cache, "do not hash to its fingerprint .*: someone edited them")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"featcache 1 -1 " + b"0" * 64, "no featcache index"),
        (b"featcache 1 1_0 " + b"0" * 64, "no featcache index"),
        (b"featcache 1 99999999999 " + b"0" * 64, "an index of 99,999,999,999 bytes"),
        (b"featcache 1 67108865 " + b"0" * 64, "an index has at most 67,108,864"),
        (b"featcache 1 10 " + b"0" * 64, "cut short or changed"),
        (b"featcache 1 10", "no featcache index"),
        (b"featcache", "no featcache index"),
        (b"", "no featcache index"),
        (b"PK\x03\x04", "no featcache index"),
    ],
)
def test_a_seal_that_promises_more_than_there_is_costs_no_memory(tmp_path, line, said):
    path = tmp_path / "x.h5"
    path.write_bytes(line + b"\n" if line else b"")
    if line:
        os.truncate(path, 1 << 34)  # 16 GiB of nothing
    refused(path, said)


def test_a_file_that_was_cut_short_or_added_to_is_refused(sound, tmp_path):
    path = copied(sound["packed"], tmp_path)
    whole = path.read_bytes()
    for data in (whole[:-1], whole + b"\0", whole[: len(whole) // 2], whole[:100], whole[:9]):
        path.write_bytes(data)
        refused(path)


@pytest.mark.parametrize(
    "name",
    ["../secret.npy", "/etc/secret.npy", "sub/secret.npy", "..", "", "a\0.npy", "A.NPY", 7, None],
)
def test_a_shard_outside_the_folder_is_refused(shards, name):
    for place in (shards.parent, shards / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copy(shards / "train-000000000000-features.npy", place / "secret.npy")
    rewrite_index(shards, block("train/features", 4, name))
    refused(shards)


def a_link(file):
    moved = file.rename(file.parent.parent / "moved.npy")
    file.symlink_to(moved)


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def a_folder(file):
    file.unlink()
    file.mkdir()


def a_device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("trick", [a_link, a_pipe, a_folder, a_device])
def test_a_shard_that_is_no_plain_file_is_refused(shards, trick):
    trick(shards / "train-000000000000-features.npy")
    refused(shards, r"no shard train-000000000000-features\.npy")


@pytest.mark.parametrize("trick", [a_pipe, a_folder, a_device])
def test_a_manifest_that_is_no_plain_file_is_no_cache(shards, trick):
    trick(shards / "manifest.json")
    refused(shards, "expected a feature cache", CacheMissError)


def test_pipes_devices_and_sockets_are_no_caches(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "broken.h5").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.h5").symlink_to(tmp_path / "loop.h5")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.h5"))
        for name in ("pipe.h5", "broken.h5", "loop.h5", "socket.h5"):
            refused(tmp_path / name, "expected a feature cache", CacheMissError)
    with pytest.raises(CacheMissError, match="expected a feature cache"):
        load("/dev/zero")


def test_names_that_no_file_can_have(tmp_path):
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(CacheError, match="expected a feature cache"):
            load(tmp_path / name)


def test_a_field_of_the_provenance_is_refused_by_name_or_does_no_harm(tmp_path):
    """Each field as null, text, a number, a list, an object, too long, too deep, or missing."""
    path = fuzz_cache.copied("shards", tmp_path)
    told = 0
    for name, (kind, value) in itertools.product(fuzz_cache.FIELDS, fuzz_cache.ODD.items()):
        fuzz_cache.reseal(path, fuzz_cache.edited(name, value))
        try:
            load(path)
        except CacheCorruptError as error:
            assert f"field '{name.partition('.')[0]}'" in str(error), (name, kind, error)
            assert len(str(error)) < 1000 and str(error).isprintable()
            told += 1
    assert told > len(fuzz_cache.SEEDS) / 2


@pytest.mark.parametrize("kind", ["escapes", "missing"])
def test_commands_work_where_every_field_is_as_odd_as_it_may_be(
    small_cache, tmp_path, monkeypatch, capsys, kind
):
    monkeypatch.chdir(tmp_path)
    make_room(small_cache)
    accepted = 0
    for name in fuzz_cache.FIELDS:
        before = small_cache.read_bytes()

        def change(index, name=name):
            value = fuzz_cache.ODD[kind]
            meta = index["meta"]
            meta.pop(name, None) if value is ... else meta.update({name: value})

        if name in ("cuts", "class_names"):  # of which the arrays tell more
            continue
        rewrite_index(small_cache, change)
        try:
            load(small_cache)
            accepted += 1
        except CacheCorruptError:
            small_cache.write_bytes(before)
    assert accepted
    path = str(small_cache)
    for words in (
        ("probe", path, "--no-check"),
        ("probe", path, "--knn", "3"),
        ("info", path),
        ("info", path, "--json"),
        ("export", path, "--to", "csv", "--output", "o.csv"),
        ("diff", path, path),
        ("compare",),
        ("errors", "--html", "e.html"),
    ):
        assert main(list(words)) == 0, (words, capsys.readouterr().err)
    for text in capsys.readouterr():
        assert visible(text) == text
