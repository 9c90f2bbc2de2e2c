"""No image is hashed or computed twice, and none is taken for another."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from caches import FORMS, RICH, everything, ingredients, write_shards
from conftest import colour_image

from featcache import ExtractOptions, extract, extract_share, load_dataset, newest_cache, pack
from featcache.cli import main
from featcache.datasets.images import Folder
from featcache.datasets.stat_cache import remembering
from featcache.datasets.zip import ZipArchive
from featcache.errors import CacheMissError
from featcache.extraction import extract as extraction
from featcache.frameworks import openvino_status
from featcache.store.rows import KnownRows

STARTER = "tinyimagenet32"


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were read, in this order."""
    names = []

    def noted(honest):
        return lambda self, name: names.append(name) or honest(self, name)

    for kind in (Folder, ZipArchive):
        monkeypatch.setattr(kind, "read", noted(kind.read))
    return names


def age(folder, seconds=60):
    """Let every file look as if it had been written a while ago, but for its ctime."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def photos(image_folder, tmp_path, monkeypatch):
    """The images of `image_folder`, written long enough ago for their times to be trusted."""
    folder = tmp_path / "photos"
    shutil.copytree(image_folder, folder)
    age(folder)
    in_a_minute(monkeypatch)
    return folder


def in_a_minute(monkeypatch, seconds=60):
    """Move the clock by which files are young: a ctime cannot be set."""
    honest = time.time_ns
    monkeypatch.setattr(
        "featcache.datasets.stat_cache.time",
        type("Clock", (), {"time_ns": staticmethod(lambda: honest() + seconds * 10**9)}),
    )


def digest_of(path, memory, *, verify=False):
    """Return the digest of a data set, with the hashes that are remembered in a folder."""
    dataset = load_dataset(path)
    files = [split.images.files for _, split in dataset.splits()]
    with remembering(files, memory, verify=verify):
        return dataset.digest_with(lambda _: None)


def test_a_file_is_hashed_once(photos, tmp_path, reads, monkeypatch):
    first = digest_of(photos, tmp_path)
    assert len(reads) == 54
    reads.clear()
    assert digest_of(photos, tmp_path) == first and not reads
    assert digest_of(photos, tmp_path, verify=True) == first and len(reads) == 54
    reads.clear()
    monkeypatch.chdir(tmp_path)
    assert digest_of("photos", tmp_path) == first and not reads, "the same folder by another path"


@pytest.mark.parametrize("change", ["bytes", "times", "renamed", "replaced"])
def test_a_file_that_changed_is_hashed_again(photos, tmp_path, reads, change):
    first = digest_of(photos, tmp_path)
    reads.clear()
    victim, other = photos / "train/red/00.png", photos / "train/red/01.png"
    before = victim.stat()
    if change == "bytes":  # of the same size, with the times that it had
        data = bytearray(victim.read_bytes())
        data[-20] ^= 1
        victim.write_bytes(data)
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "times":
        os.utime(victim)
    elif change == "renamed":
        victim.rename(victim.with_name("00b.png"))
    else:
        shutil.copy(other, victim)
    expected = load_dataset(photos).digest
    reads.clear()
    assert digest_of(photos, tmp_path) == expected
    assert reads == ["train/red/00b.png" if change == "renamed" else "train/red/00.png"]
    assert (expected == first) is (change == "times")


def test_a_file_that_is_younger_than_two_seconds_is_not_trusted(photos, tmp_path, reads):
    """It may be written again without a change of its times."""
    (photos / "train/red/00.png").touch()
    os.utime(photos / "train/red/00.png", (time.time() + 59, time.time() + 59))
    digest_of(photos, tmp_path)
    reads.clear()
    digest_of(photos, tmp_path)
    assert reads == ["train/red/00.png"]


def test_an_archive_is_remembered_by_its_own_times(photos, tmp_path, reads):
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(photos.rglob("*.png")):
            packed.write(path, path.relative_to(photos))
    first = digest_of(archive, tmp_path)
    reads.clear()
    assert digest_of(archive, tmp_path) == first and not reads
    archive.touch()
    assert digest_of(archive, tmp_path) == first and len(reads) == 54


def test_hashes_are_not_remembered_through_a_link(photos, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / ".hashes").symlink_to(tmp_path / "precious")
    digest_of(photos, tmp_path)
    assert not list((tmp_path / "precious").iterdir())


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "a folder", "a pipe", "other names"])
def test_what_is_remembered_may_be_lost(photos, tmp_path, reads, damage):
    first = digest_of(photos, tmp_path)
    (memory,) = (tmp_path / ".hashes").iterdir()
    data = memory.read_bytes()
    memory.unlink()
    if damage == "a folder":
        memory.mkdir()
    elif damage == "a pipe":
        os.mkfifo(memory)
    elif damage == "flipped":
        memory.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    else:
        memory.write_bytes({"cut": data[:-10], "empty": b""}.get(damage, data + b"\0x"))
    reads.clear()
    assert digest_of(photos, tmp_path) == first and len(reads) == 54


def test_a_part_does_not_forget_the_rest(photos, tmp_path, reads):
    digest_of(photos, tmp_path)
    (photos / "train/red/00.png").unlink()
    (photos / "train/red/01.png").touch()
    digest_of(photos / "train", tmp_path)
    dataset = load_dataset(photos).limited(9, 3)
    with remembering([dataset.train.images.files], tmp_path, verify=False):
        dataset.digest_with(lambda _: None)
    reads.clear()
    digest_of(photos, tmp_path)
    assert set(reads) <= {"train/red/01.png"}


def test_an_extraction_remembers_what_it_read(photos, fake_engine, reads):
    first = extract(photos, weights=STARTER)
    assert len(reads) == 54
    reads.clear()
    again = extract(photos, weights=STARTER)
    assert again.reused and again.fingerprint == first.fingerprint and not reads
    assert extract(photos, weights=STARTER, verify_images=True).reused and len(reads) == 54


def known_in(folder, meta, shapes=None):
    shapes = shapes or {"avgpool": (5,), "layer4": (3, 2, 2)}
    return KnownRows([folder, folder], meta, shapes)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_found_by_content(tmp_path, form):
    meta = {**RICH, "dataset_digest": "9" * 64}
    path = write_shards(tmp_path / "a.h5", RICH, skip=[5], **FORMS[form])
    whole = everything(path)
    rows = known_in(tmp_path, meta)
    hashes = whole["train/content_hashes"]
    strange = np.random.default_rng(7).integers(0, 256, (3, 32), np.uint8)
    asked = np.concatenate([hashes[[7, 1, 4]], strange, hashes[[0]]])
    known, features = rows.find(asked, RICH["views"])
    assert known.tolist() == [True, True, True, False, False, False, True]
    assert len(features) == 8 and rows.taken == {path: 4}
    for name, array in features.items():
        cut = "layer4" if "layer4" in name else "avgpool"
        view = "identity" if name == "features" else name.rpartition("/")[2]
        assert np.array_equal(array, whole[f"train/{cut}/{view}"][[7, 1, 4, 0]])
    known, features = rows.find(whole["test/content_hashes"], ["identity"])
    assert known.all() and np.array_equal(features["features"], whole["test/avgpool/identity"])
    assert not rows.find(whole["test/content_hashes"], RICH["views"])[0].any(), "has no flips"
    none, nothing = rows.find(strange, ["identity"])
    assert not none.any() and nothing["features"].shape == (0, 5)


@pytest.mark.parametrize(
    "other",
    [{"weights_sha256": "2" * 64}, {"dtype": "float16"}, {"cuts": ["layer4"]}, {"engine": "x"}],
)
def test_rows_of_other_ingredients_are_never_taken(tmp_path, other):
    write_shards(tmp_path / "a.h5", ingredients())
    assert known_in(tmp_path, ingredients())
    assert not known_in(tmp_path, ingredients(**other))


def test_rows_of_another_shape_are_never_taken(tmp_path):
    hashes = everything(write_shards(tmp_path / "a.h5", ingredients()))["test/content_hashes"]
    rows = known_in(tmp_path, ingredients(), {"avgpool": (6,)})
    assert not rows.find(hashes, ["identity"])[0].any()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_taken_from_a_damaged_cache(tmp_path, form):
    meta = ingredients()
    path = write_shards(tmp_path / "a.h5", meta, **FORMS[form])
    hashes = everything(path)["train/content_hashes"]
    whole = known_in(tmp_path, meta)
    block = next(iter(whole._caches)).index.arrays["train/features"].blocks[0]
    with block.path.open("r+b") as stream:
        stream.seek(block.offset)
        stream.write(b"\xff" * 8)
    os.utime(block.path, ns=(0, block.stamp.mtime_ns))  # by the disk, not by a writer
    assert not whole.find(hashes[:2], ["identity"])[0].any()
    assert not whole.find(hashes, ["identity"])[0].any() and not whole.taken
    (note,) = whole.notes
    assert note.startswith("no rows are taken from a cache: ") and "block 0" in note
    copy = write_shards(tmp_path / "b.h5", {**meta, "dataset_digest": "3" * 64}, **FORMS[form])
    os.utime(copy, (1, 1))  # the older one, which is whole
    both = known_in(tmp_path, meta)
    assert both.find(hashes, ["identity"])[0].all() and both.taken == {copy: 10}


def test_what_is_no_cache_is_passed_over(tmp_path):
    path = write_shards(tmp_path / "a.h5", ingredients())
    (tmp_path / "to-nothing.h5").symlink_to(tmp_path / "nothing.h5")
    (tmp_path / "loop.h5").symlink_to(tmp_path / "loop.h5")
    (tmp_path / "loop.shards").symlink_to(tmp_path / "loop.shards")
    (tmp_path / "text.h5").write_text("not a cache")
    (tmp_path / "folder.h5").mkdir()
    os.utime(path)
    (path if path.is_file() else path / "manifest.json").touch()
    rows = known_in(tmp_path, ingredients())
    assert [cache.path for cache in rows._caches] == [path] and len(rows.notes) == 1
    (tmp_path / "text.h5").unlink()
    (tmp_path / "folder.h5").rmdir()
    assert newest_cache(tmp_path) == path
    shutil.rmtree(path)
    with pytest.raises(CacheMissError, match="found none"):
        newest_cache(tmp_path)
    assert not known_in(tmp_path / "nowhere", ingredients())


def same_bytes(one, other):
    """Assert that two caches have the same arrays, block by block, and the same fingerprint."""
    assert one.fingerprint == other.fingerprint
    one, other = one.load(), other.load()
    assert one.index.arrays.keys() == other.index.arrays.keys()
    for name, array in one.index.arrays.items():
        blocks = [block.sha256 for block in array.blocks]
        assert blocks == [block.sha256 for block in other.index.arrays[name].blocks], name


@pytest.fixture
def sixty(tmp_path, fake_engine, monkeypatch):
    """60 images in three classes, in the given form, whose features are in a cache."""
    in_a_minute(monkeypatch)
    monkeypatch.setattr(extraction, "SHARD_ROWS", 16)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # slow, and changes no file

    def make(form):
        root = tmp_path / "photos"
        for number in range(60):
            name = ("blue", "green", "red")[number % 3]
            role = ("train", "train", "test")[number // 3 % 3] if form == "given" else ""
            save(root / role / name / f"{number:02d}.png", number)
        age(root)
        return root

    return make


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour_image(number % 3, number).save(path)


FLIPPED = {"weights": STARTER, "views": "flips", "cut": "pooled,layer4", "batch_size": 5}


@pytest.mark.parametrize("form", ["given", "undivided"])
@pytest.mark.parametrize("packed", [True, False])
def test_only_new_images_are_computed(sixty, fake_engine, reads, tmp_path, form, packed):
    root = sixty(form)
    first = extract(root, pack=packed, **FLIPPED)
    assert (first.computed, first.reused_rows, first.n_rows) == (60, 0, 60)
    train = root / ("train" if form == "given" else "")
    for number in range(5):
        save(train / "red" / f"new {number}.png", 100 + number)
    moved = sorted((train / "blue").iterdir())[:3]
    for path in moved:
        path.rename(train / "green" / path.name)
    for path in sorted((train / "green").iterdir())[-2:]:
        path.unlink()
    reads.clear()
    notes = []
    second = extract(root, pack=packed, on_note=notes.append, **FLIPPED)
    assert (second.computed, second.reused_rows, second.n_rows) == (5, 58, 63)
    assert notes[-1].startswith(f"58 of 63 rows reused from {first.cache}; ")
    # Once for the question whether they are there, with the three at their new places, and once
    # for their pixels.
    new = {path.relative_to(root).as_posix() for path in (train / "red").glob("new*")}
    assert {name for name in reads if reads.count(name) == 2} == new
    assert set(reads) - new <= {f"{(train / 'green').relative_to(root)}/{p.name}" for p in moved}
    fresh = extract(root, pack=packed, output=tmp_path / "fresh.h5", reuse=False, **FLIPPED)
    assert (fresh.computed, fresh.reused_rows) == (63, 0)
    same_bytes(second, fresh)
    assert second.load().meta["reused_rows"] == 58 and "reused_rows" not in fresh.load().meta
    again = extract(root, pack=packed, **FLIPPED)
    assert (again.reused, again.computed, again.reused_rows) == (True, 0, 63)


def test_a_subset_needs_no_engine(sixty, fake_engine, tmp_path):
    root = sixty("given")
    extract(root, **FLIPPED)
    built = len(fake_engine)
    part = extract(root, train_limit=12, test_limit=6, **FLIPPED)
    assert (part.computed, part.reused_rows) == (0, 18) and len(fake_engine) == built
    fresh = {"output": tmp_path / "fresh.h5", "reuse": False, **FLIPPED}
    same_bytes(part, extract(root, train_limit=12, test_limit=6, **fresh))


def test_flips_are_computed_where_a_cache_has_none(sixty, fake_engine, tmp_path):
    root = sixty("given")
    plain = {**FLIPPED, "views": "none"}
    extract(root, **plain)
    flipped = extract(root, **FLIPPED)
    assert (flipped.computed, flipped.reused_rows) == (42, 18), "the images of test are reused"
    same_bytes(flipped, extract(root, output=tmp_path / "a.h5", reuse=False, **FLIPPED))
    flipped.cache.rename(tmp_path / "cache/kept.h5")
    for path in (tmp_path / "cache").glob("photos*"):
        path.unlink()
    back = extract(root, **plain)
    assert (back.computed, back.reused_rows) == (0, 60)
    same_bytes(back, extract(root, output=tmp_path / "b.h5", reuse=False, **plain))


def test_rows_are_reused_from_the_default_folder_too(sixty, fake_engine, tmp_path):
    root = sixty("undivided")
    first = extract(root, **FLIPPED)
    notes = []
    elsewhere = extract(root, output=tmp_path / "b" / "x.h5", on_note=notes.append, **FLIPPED)
    assert elsewhere.reused_rows == 60 and str(first.cache) in notes[-1]
    same_bytes(first, elsewhere)


@pytest.mark.parametrize("how", ["force", "no reuse"])
def test_nothing_is_reused_where_that_is_asked_for(sixty, fake_engine, how):
    root = sixty("undivided")
    extract(root, **FLIPPED)
    save(root / "red" / "new.png", 100)
    options = {"force": True} if how == "force" else {"reuse": False}
    assert extract(root, **options, **FLIPPED).computed == 61


def test_images_that_do_not_decode_are_tried_again(sixty, fake_engine, tmp_path):
    root = sixty("undivided")
    (root / "red" / "torn.png").write_bytes(b"no image")
    (root / "red" / "empty.png").write_bytes(b"")
    options = {**FLIPPED, "on_error": "skip"}
    extract(root, **options)
    save(root / "red" / "new.png", 100)
    second = extract(root, **options)
    assert (second.computed, second.reused_rows, second.n_skipped) == (1, 60, 2)
    same_bytes(second, extract(root, output=tmp_path / "a.h5", reuse=False, **options))


def test_a_damaged_cache_costs_time_alone(sixty, fake_engine, tmp_path):
    root = sixty("undivided")
    first = extract(root, **FLIPPED)
    block = first.load().index.arrays["train/views/hflip"].blocks[0]
    with block.path.open("r+b") as stream:
        stream.seek(block.offset)
        stream.write(b"\xff" * 8)
    save(root / "red" / "new.png", 100)
    notes = []
    second = extract(root, on_note=notes.append, **FLIPPED)
    assert second.computed == 61 and any("no rows are taken from a cache" in n for n in notes)
    same_bytes(second, extract(root, output=tmp_path / "a.h5", reuse=False, **FLIPPED))


def test_a_run_that_was_killed_reuses_what_it_lacks(sixty, fake_engine, tmp_path):
    root = sixty("undivided")
    extract(root, **FLIPPED)
    for number in range(20):
        save(root / "red" / f"new {number:02d}.png", 100 + number)

    def stop(message):
        if message.stage == "images" and message.done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="images are kept"):
        extract(root, on_progress=stop, **FLIPPED)
    rest = extract(root, **FLIPPED)
    assert rest.n_resumed >= 16 and rest.computed + rest.reused_rows + rest.n_resumed == 80
    assert rest.load().meta["reused_rows"] == 60
    same_bytes(rest, extract(root, output=tmp_path / "a.h5", reuse=False, **FLIPPED))


def test_jobs_reuse_rows(sixty, fake_engine, tmp_path):
    root = sixty("undivided")
    extract(root, **FLIPPED)
    save(root / "red" / "new.png", 100)
    output, notes = tmp_path / "jobs" / "x.h5", []
    for number in (1, 2):
        extract_share(root, share=(number, 2), output=output, on_note=notes.append, **FLIPPED)
    assert sum(int(note.split()[0]) for note in notes if "rows reused" in note) == 60
    fresh = extract(root, output=tmp_path / "a.h5", reuse=False, **FLIPPED)
    same_bytes(pack(output), fresh)


def test_an_image_that_changed_is_not_taken_for_what_it_was(sixty, fake_engine, tmp_path):
    root = sixty("undivided")
    extract(root, **FLIPPED)
    save(root / "red" / "02.png", 200)
    second = extract(root, **FLIPPED)
    assert (second.computed, second.reused_rows) == (1, 59)
    same_bytes(second, extract(root, output=tmp_path / "a.h5", reuse=False, **FLIPPED))


def test_the_command_line_says_what_was_computed(sixty, fake_engine, capsys):
    root = sixty("undivided")
    words = ["extract", str(root), "--weights", STARTER, "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 60
    save(root / "red" / "new.png", 100)
    assert main([*words, "--verify-images"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["computed"], json.loads(out)["reused_rows"]) == (1, 60)
    assert "60 of 61 rows reused from " in err
    assert main([*words, "--no-reuse", "--size", "32"]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 61
    options = ExtractOptions(reuse=False, verify_images=True, pack=True)
    assert options.command("x") == "featcache extract x --verify-images --no-reuse"


@pytest.mark.skipif(openvino_status()[0] is None, reason=openvino_status()[1])
def test_a_real_engine_gives_the_same_bytes_in_smaller_batches(photos, tmp_path):
    options = {"weights": STARTER, "size": 32, "engine": "openvino", "views": "flips"}
    extract(photos, **options)
    for number in range(3):
        save(photos / "train" / "red" / f"new {number}.png", 100 + number)
    second = extract(photos, **options)
    assert (second.computed, second.reused_rows) == (3, 54)
    same_bytes(second, extract(photos, output=tmp_path / "a.h5", reuse=False, **options))
