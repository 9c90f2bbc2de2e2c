"""`featcache.merge`: caches of the same ingredients and other images become one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from caches import RICH, content, ingredients, rows_of, write_shards
from conftest import write_gaussian_cache

from featcache import merge, probe, verify
from featcache.cli import main
from featcache.errors import CacheCorruptError, CacheMismatchError, OutputError, RecipeError
from featcache.store.cache import load
from featcache.store.writer import SplitArrays, write_cache


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
    other = part(tmp_path / "c.h5", "birds", wall_s="long", images_per_s=[1])
    meta = merge([two[0], other], tmp_path / "all.h5").load().meta
    assert (meta["wall_s"], meta["images_per_s"]) == (2.0, 10.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights_sha256": "7" * 64}, "weights_sha256: '1111"),
        ({"engine_version": "2"}, "engine_version: '1' and '2'"),
        ({"preprocess": {**ingredients()["preprocess"], "size": 96}}, "preprocess.size: 64 and 96"),
        ({"class_names": ["red", "green", "blue"]}, "class_names: "),
        ({"dtype": "float16"}, "dtype: 'float32' and 'float16'"),
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


def test_features_of_another_length(tmp_path, two):
    other = part(tmp_path / "c.h5", "birds", dim=7)
    with pytest.raises(CacheMismatchError, match=r"test/features: \(5,\) and \(7,\); train/f"):
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
            tmp_path / f"{n}.h5", n_train=12_000, dim=512, dataset=n, dataset_digest=n * 64
        )
        for n in "ab"
    ]
    tracemalloc.start()
    merge(paths, tmp_path / "both.h5", prefix=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6 and (tmp_path / "both.h5").stat().st_size > 190e6


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
