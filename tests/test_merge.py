"""`featcache.merge`: caches of the same ingredients and other images become one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from caches import (
    RICH,
    SplitArrays,
    content,
    ingredients,
    rows_of,
    write_cache,
    write_roles,
    write_shards,
)
from conftest import write_gaussian_cache

import featcache
from featcache import merge, probe, verify
from featcache.cli import main
from featcache.errors import CacheCorruptError, CacheMismatchError, OutputError, RecipeError
from featcache.store.cache import load
from featcache.store.writer import Source, pack


def part(path, name, *, n_train=6, n_test=3, width=1, seed=0, dim=5, **changes):
    """Write a cache of the data set ``name``, and return its path."""
    meta = ingredients(dataset=name, dataset_digest=hashlib.sha256(name.encode()).hexdigest())
    meta.update({"wall_s": 2.0, "images_per_s": 10.0, "stages_s": {}, **changes})
    splits = {}
    for role, n in (("train", n_train), ("test", n_test)):
        rows = rows_of(role, n, meta=meta, seed=seed, dim=dim)
        ids = tuple(f"{name}/{row:0{width}d}" for row in range(n))
        splits[role] = SplitArrays(rows["features"], rows["labels"], ids)
    write_cache(path, splits, meta)
    return path


@pytest.fixture
def two(tmp_path):
    a = part(tmp_path / "a.h5", "cats")
    return a, part(tmp_path / "b.h5", "dogs", n_train=4, width=9, seed=1, images_per_s=20.0)


def test_rows_follow_one_another(tmp_path, two):
    messages = []
    made = merge(two, tmp_path / "both.h5", on_progress=messages.append)
    a, b, both = (load(path) for path in (*two, made.cache))
    assert (made.n_parts, made.n_train, made.n_test) == (2, 10, 6)
    assert made.size_bytes == (tmp_path / "both.h5").stat().st_size
    assert both.fingerprint == made.fingerprint not in (a.fingerprint, b.fingerprint)
    for role in ("train", "test"):
        parts = [getattr(cache, role) for cache in (a, b)]
        merged = getattr(both, role)
        assert merged.ids == parts[0].ids + parts[1].ids
        for name in ("features", "labels"):
            joined = np.concatenate([getattr(split, name) for split in parts])
            assert getattr(merged, name).tobytes() == joined.tobytes()
    assert verify(made.cache).n_train == 10
    assert messages[-1].done == messages[-1].total > 0


def test_the_provenance_tells_where_it_comes_from(tmp_path, two):
    meta = merge(two, tmp_path / "both.h5").load().meta
    a, b = (load(path) for path in two)
    lines = f"{a.meta['dataset_digest']} \n{b.meta['dataset_digest']} \n"
    assert meta["dataset_digest"] == hashlib.sha256(lines.encode()).hexdigest()
    assert meta["dataset"] == "cats+dogs" and meta["dataset_source"] == "merged from 2 caches"
    assert [entry["dataset"] for entry in meta["merged_from"]] == ["cats", "dogs"]
    assert meta["merged_from"][1]["fingerprint"] == b.fingerprint
    assert meta["merged_from"][1]["n_train"] == 4
    assert meta["wall_s"] == 4.0 and meta["images_per_s"] == 15.0 and "stages_s" not in meta
    assert merge(two, tmp_path / "named.h5", name="pets").load().meta["dataset"] == "pets"


def test_the_order_is_part_of_the_fingerprint(tmp_path, two):
    one = merge(two, tmp_path / "one.h5")
    again = merge(two, tmp_path / "again.h5")
    other = merge(two[::-1], tmp_path / "other.h5")
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert content(one.cache) == content(again.cache)


def test_views_cuts_skipped_images_and_both_forms(tmp_path):
    paths = [
        write_shards(tmp_path / "a.h5", RICH, pack=True, skip=(2, 5)),
        write_shards(tmp_path / "b.h5", {**RICH, "dataset_digest": "9" * 64}, seed=3),
    ]
    made = merge(paths, tmp_path / "both.h5", prefix=True, name="both")
    verify(made.cache)
    a, b, both = (load(path) for path in (*paths, made.cache))
    assert len(both.train) == 8 + 10
    assert both.train.skipped == ("a/train/00002.png", "a/train/00005.png")
    for cut in a.cuts:
        for view in a.views:
            joined = np.concatenate([a.train.cut(cut, view), b.train.cut(cut, view)])
            assert both.train.cut(cut, view).tobytes() == joined.tobytes()


def test_images_of_one_name_want_a_prefix(tmp_path):
    paths = [part(tmp_path / f"{n}.h5", "photos", dataset_digest=n * 64) for n in "12"]
    with pytest.raises(CacheMismatchError, match=r"'photos/0' in train of both; use --prefix"):
        merge(paths, tmp_path / "both.h5")
    assert not (tmp_path / "both.h5").exists()
    both = merge(paths, tmp_path / "both.h5", prefix=True).load()
    assert both.train.ids[0] == "photos-1/photos/0" and both.train.ids[-1] == "photos-2/photos/5"
    assert both.meta["dataset"] == "photos-1+photos-2"


def test_a_merged_cache_can_be_merged_and_probed(tmp_path):
    paths = [
        write_gaussian_cache(tmp_path / f"{n}.h5", dataset=n, dataset_digest=n * 64) for n in "abc"
    ]
    first = merge(paths[:2], tmp_path / "ab.h5", prefix=True)
    made = merge([first.cache, paths[2]], tmp_path / "abc.h5", prefix=True)
    cache = made.load()
    assert cache.train.ids[0] == "a+b/a/train/0" and len(cache.meta["merged_from"]) == 2
    assert probe(cache, check=False).n_train == 360


def test_a_provenance_without_rates(tmp_path, two):
    other = tmp_path / "c.h5"
    write_roles(other, ingredients(dataset="birds", dataset_digest="b" * 64), train=4, test=2)
    meta = merge([two[0], other], tmp_path / "all.h5").load().meta
    assert (meta["wall_s"], meta["images_per_s"]) == (2.0, 10.0)


def crossed(tmp_path, copies=2):
    """Write two caches; the first ``copies`` test images of b are training images of a."""
    paths, taken = [], {}
    for seed, name in enumerate("ab"):
        meta = ingredients(dataset=name, dataset_digest=name * 64)
        sources = {}
        for role, n in (("train", 8), ("test", 4)):
            rows = rows_of(role, n, meta=meta, seed=seed)
            if (name, role) == ("b", "test"):
                rows["content_hashes"][:copies] = taken["a", "train"][:copies]
            taken[name, role] = rows["content_hashes"]
            sources.update({f"{role}/{part}": Source.of(rows[part]) for part in rows})
        paths.append(tmp_path / f"{name}.h5")
        pack(paths[-1], sources, meta)
    return paths


def test_an_image_in_train_and_test_is_refused(tmp_path, capsys):
    paths = crossed(tmp_path)
    said = (
        r"found 2 in several, first 'train/0000\d.png' in train of .*a.h5, which is "
        r"'test/0000\d.png' in test of .*b.h5 too.*--on-conflict test"
    )
    with pytest.raises(CacheMismatchError, match=said):
        merge(paths, tmp_path / "both.h5", prefix=True)
    assert not (tmp_path / "both.h5").exists()
    with pytest.raises(RecipeError, match="on_conflict: expected one of refuse, train"):
        merge(paths, tmp_path / "both.h5", on_conflict="both")
    arguments = ["merge", *map(str, paths), "-o", str(tmp_path / "both.h5"), "--prefix"]
    assert main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*arguments, "--on-conflict", "test"]) == 0
    said = capsys.readouterr()
    assert "14 train and 8 test images" in said.out and "2 images that also" in said.err


@pytest.mark.parametrize(
    ("choice", "n_train", "n_test"), [("test", 14, 8), ("train", 16, 6), ("drop", 14, 6)]
)
def test_a_conflict_is_resolved_on_request(tmp_path, choice, n_train, n_test):
    paths = crossed(tmp_path)
    made = merge(paths, tmp_path / "both.h5", prefix=True, on_conflict=choice)
    assert (made.n_train, made.n_test) == (n_train, n_test)
    assert made.n_dropped == 24 - n_train - n_test
    verify(made.cache)
    cache, a = made.load(), load(paths[0])
    train, test = ({*map(bytes, split.content_hashes)} for split in (cache.train, cache.test))
    assert not train & test
    # The rows that stay are the rows that were there, in order.
    kept = [row for row, name in enumerate(a.train.ids) if f"a/{name}" in cache.train.ids]
    first = cache.train.features[: len(kept)]
    assert first.tobytes() == a.train.features[kept].tobytes()
    # And a choice is part of what the cache is.
    other = "drop" if choice != "drop" else "test"
    again = merge(paths, tmp_path / "other.h5", prefix=True, on_conflict=other)
    assert again.fingerprint != made.fingerprint


def test_copies_within_a_split_stay_with_a_note(tmp_path, two):
    meta = ingredients(dataset="c", dataset_digest="c" * 64)
    same = write_roles(tmp_path / "c.h5", meta, train=5, test=3)
    other = write_roles(tmp_path / "d.h5", {**meta, "dataset_digest": "d" * 64}, train=5, test=3)
    made = merge([same, other], tmp_path / "both.h5", prefix=True)
    assert made.n_train == 10 and made.n_dropped == 0
    assert made.notes == ("8 images are exact copies of others of their split",)
    assert "was not checked" in merge(two, tmp_path / "unhashed.h5").notes[0]


def test_attached_tables_come_along(tmp_path):
    paths = crossed(tmp_path)
    for path, size in zip(paths, ("cm", None), strict=True):
        cache = load(path)
        ids = [name for _, split in cache.splits() for name in split.ids]
        columns = {"who": [f"{path.stem} {name}" for name in ids]}
        featcache.label(cache, {"id": ids, **columns, **({"size": range(12)} if size else {})})
    made = merge(paths, tmp_path / "both.h5", prefix=True, on_conflict="test").load()
    ids = [name for _, split in made.splits() for name in split.ids]
    assert [name.replace("/", " ", 1) for name in ids] == made.table["who"].values.tolist()
    sizes = made.table["size"].values
    assert np.array_equal(np.isnan(sizes), [name[0] == "b" for name in ids])
    assert made.attached_table.facts["n_matched"] == 24
    (tmp_path / "a.table").unlink(), (tmp_path / "b.table").unlink()
    again = merge(paths, made.path, prefix=True, on_conflict="test", force=True).load()
    assert again.table is None and not (tmp_path / "both.table").exists()


def test_val_is_merged_where_a_part_has_one(tmp_path):
    one = write_roles(tmp_path / "one.h5", train=5, val=4, test=3)
    other = write_roles(
        tmp_path / "other.h5", ingredients(dataset_digest="9" * 64), seed=1, train=6, test=2
    )
    for parts in ((one, other), (other, one)):
        made = merge(parts, tmp_path / "both.h5", prefix=True, force=True)
        assert (made.n_train, made.n_val, made.n_test) == (11, 4, 5)
        cache = made.load()
        assert cache.val.features.tobytes() == load(one).val.features.tobytes()
        assert {part["n_test"] for part in cache.meta["merged_from"]} == {3, 2}
        verify(made.cache)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights_sha256": "7" * 64}, "weights_sha256: '1111"),
        ({"engine_version": "2"}, "engine_version: '1' and '2'"),
        ({"preprocess": {**ingredients()["preprocess"], "size": 96}}, "preprocess.size: 64 and 96"),
        ({"class_names": ["red", "green", "blue"]}, "class_names: "),
        ({"dtype": "float16"}, "dtype: 'float32' and 'float16'"),
        ({"dim": 7}, "test/features: (5,) and (7,); train/features"),
    ],
)
def test_other_ingredients_are_refused(tmp_path, two, changes, said):
    other = part(tmp_path / "c.h5", "birds", **changes)
    with pytest.raises(CacheMismatchError, match="expected the ingredients of") as caught:
        merge([*two, other], tmp_path / "all.h5")
    assert said in str(caught.value) and str(other) in str(caught.value)
    advice = "into one data set" if "class_names" in changes else "with the same options"
    assert advice in str(caught.value)
    assert list(tmp_path.glob("*all*")) == []


def test_views_that_only_one_has(tmp_path, two):
    meta = ingredients(views=["identity", "hflip"], dataset_digest="8" * 64)
    other = write_shards(tmp_path / "c.h5", meta, pack=True)
    with pytest.raises(CacheMismatchError, match=r"views: \['identity'\] and \['identity', 'hf"):
        merge([two[0], other], tmp_path / "all.h5")


def test_outputs(tmp_path, two):
    target = tmp_path / "both.h5"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists already; use --force"):
        merge(two, target)
    assert target.read_text() == "mine"
    assert len(merge(two, target, force=True).load().train) == 10
    with pytest.raises(OutputError, match="is one of the caches"):
        merge(two, two[1], force=True)
    with pytest.raises(OutputError, match=r"name it both\.npz\.h5"):
        merge(two, tmp_path / "both.npz")
    with pytest.raises(RecipeError, match="two or more caches, found 1"):
        merge(two[:1], tmp_path / "one.h5")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="name another place"):
        merge(two, tmp_path / "file" / "both.h5")


def test_damage_in_a_part_leaves_nothing(tmp_path, two):
    data = bytearray(two[1].read_bytes())
    data[load(two[1]).index.arrays["test/features"].blocks[0].offset] ^= 1
    two[1].write_bytes(data)
    with pytest.raises(CacheCorruptError, match="test/features, found another"):
        merge(two, tmp_path / "both.h5")
    assert list(tmp_path.glob("both*")) == list(tmp_path.glob("*.part")) == []


def test_a_full_disk_leaves_nothing(tmp_path, two):
    """The limit on a file's size ends writing as a full disk does, for real."""
    code = f"""
        import resource, signal
        from featcache import merge
        from featcache.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            merge({[str(path) for path in two]!r}, {str(tmp_path / "both.h5")!r})
        except OutputError as error:
            print(error)
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "cannot be written: File too large" in child.stdout and child.stderr == ""
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["a.h5", "b.h5"]
    assert list(tmp_path.glob(".*.part")) == []


def test_memory_does_not_grow_with_the_parts(tmp_path):
    import tracemalloc

    paths = [
        write_gaussian_cache(
            tmp_path / f"{n}.h5", n_train=5_000, dim=512, dataset=n, dataset_digest=n * 64
        )
        for n in "ab"
    ]
    tracemalloc.start()
    merge(paths, tmp_path / "both.h5", prefix=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6 and (tmp_path / "both.h5").stat().st_size > 80e6


def test_the_command(capsys, tmp_path, two):
    target = tmp_path / "both.h5"
    arguments = ["merge", *map(str, two), "-o", str(target)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "10 train and 6 test images of 2 caches" in out
    assert main(arguments) == 1
    assert "use --force" in capsys.readouterr().err
    assert main([*arguments, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_train"] == 10
    for wrong, said in (
        (["merge", str(two[0]), "-o", str(target)], "expected two or more caches"),
        (["merge", *map(str, two)], "--output"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
