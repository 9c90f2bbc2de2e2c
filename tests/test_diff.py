"""`featcache.diff`: what two caches say about themselves, and the features of the same images."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from caches import RICH, SplitArrays, ingredients, write_cache, write_roles, write_shards
from conftest import write_gaussian_cache

from featcache import diff
from featcache.cli import main
from featcache.errors import CacheCorruptError, CacheMissError
from featcache.store.cache import load

N, D = 50, 6


def cache_of(path, *, rows=slice(None), change=lambda features: features, ids=None, **changes):
    """Write rows of the same seeded features, changed, and return the path."""
    meta = ingredients(**changes)
    generator = np.random.default_rng(5)
    splits = {}
    for role in ("train", "test"):
        features = generator.normal(size=(N, D))
        names = np.array(ids or [f"{role}/{row}" for row in range(N)])[rows]
        labels = (np.arange(N) % 3)[rows]
        kept = change(features)[rows].astype(meta["dtype"])
        splits[role] = SplitArrays(kept, labels.astype(np.int64), tuple(names.tolist()))
    write_cache(path, splits, meta)
    return path


@pytest.fixture
def a(tmp_path):
    return cache_of(tmp_path / "a.h5")


def test_a_cache_and_its_copy_are_the_same(tmp_path):
    one = write_gaussian_cache(tmp_path / "one.h5")
    other = write_gaussian_cache(tmp_path / "other.h5", created="later", wall_s=7.0, note="new")
    report = diff(one, other)
    assert report.same and report.fields == ()
    assert [(field.name, field.a, field.b) for field in report.other_fields] == [
        ("created", "2026-01-01T00:00:00+00:00", "later"),
        ("note", None, "new"),
        ("wall_s", 1.0, 7.0),
    ]
    assert len(report.train.features) == 4 and len(report.test.features) == 1
    for found in report.train.features:
        assert (found.n_rows, found.n_different, found.max_abs) == (120, 0, 0.0)
        assert found.mean_cosine == found.min_cosine == 1.0


def test_a_split_val_is_compared_too(tmp_path, capsys):
    one = write_roles(tmp_path / "one.h5", train=6, val=3, test=2)
    same = write_roles(tmp_path / "same.h5", train=6, val=3, test=2)
    without = write_roles(tmp_path / "without.h5", train=6, test=2)
    report = diff(one, same)
    assert report.same and report.val.n_both == 3 and diff(without, without).val is None
    for pair, only in (((one, without), "only_a"), ((without, one), "only_b")):
        report = diff(*pair)
        assert not report.same and len(getattr(report.val, only)) == 3
    assert main(["diff", str(one), str(without)]) == 1
    assert "only in a, val: val/00000.png" in capsys.readouterr().out


def test_the_form_makes_no_difference(tmp_path):
    packed = write_shards(tmp_path / "packed.h5", RICH, pack=True, n_train=30, skip=(3, 4))
    shards = write_shards(tmp_path / "x.h5", RICH, n_train=30, shard_rows=7, skip=(3, 4))
    report = diff(packed, shards)
    assert report.same and report.train.n_both == 28
    cuts = {(found.cut, found.view) for found in report.train.features}
    assert cuts == {(c, v) for c in RICH["cuts"] for v in RICH["views"]}


def test_numbers_are_what_numpy_makes_of_them(tmp_path, a):
    noise = np.random.default_rng(1).normal(scale=0.1, size=(N, D))
    b = cache_of(tmp_path / "b.h5", change=lambda features: features + noise)
    report = diff(load(a), b)
    assert not report.same and report.fields == ()
    x, y = (load(path).test.features.astype(np.float64) for path in (a, b))
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    (found,) = report.test.features
    assert found.n_different == found.n_rows == N
    assert found.max_abs == np.abs(x - y).max()
    assert found.mean_cosine == pytest.approx(cosine.mean(), abs=1e-12)
    assert found.min_cosine == pytest.approx(cosine.min(), abs=1e-12)
    assert found.farthest == f"test/{cosine.argmin()}"


def test_one_changed_row_is_named(tmp_path, a):
    def change(features):
        features[17] *= -1
        return features

    (found,) = diff(a, cache_of(tmp_path / "b.h5", change=change)).train.features
    assert found.n_different == 1 and found.farthest == "train/17"
    assert found.min_cosine == pytest.approx(-1, abs=1e-12)


def test_images_are_matched_by_their_ids(tmp_path, a):
    rows = np.random.default_rng(2).permutation(N)[:30]
    report = diff(a, cache_of(tmp_path / "b.h5", rows=rows))
    train = report.train
    assert (train.n_a, train.n_b, train.n_both, train.same_order) == (50, 30, 30, False)
    assert len(train.only_a) == 3 and train.only_b == ()
    assert train.only_a[0] not in {f"train/{row}" for row in rows}
    assert train.features[0].n_rows == 30 and train.features[0].n_different == 0
    assert train.n_relabelled == 0 and not report.same


def test_another_order_alone_is_a_difference(tmp_path, a):
    report = diff(a, cache_of(tmp_path / "b.h5", rows=slice(None, None, -1)))
    assert not report.same and report.train.n_both == N and not report.train.same_order
    assert report.train.features[0].n_different == 0


def test_no_image_in_common(tmp_path, a):
    b = cache_of(tmp_path / "b.h5", ids=[f"other/{row}" for row in range(N)])
    report = diff(a, b)
    assert report.train.n_both == report.train.features[0].n_rows == 0
    assert report.train.only_b == ("other/0", "other/1", "other/2") and not report.same


def test_labels_are_compared_by_the_names_of_classes(tmp_path, a):
    b = cache_of(tmp_path / "b.h5", class_names=["blue", "red", "green"])
    report = diff(a, b)
    assert [field.name for field in report.fields] == ["class_names"]
    assert report.train.n_relabelled == sum(row % 3 > 0 for row in range(N))
    assert report.train.relabelled[0] == ("train/1", "green", "red")


def test_an_image_without_a_label_is_not_of_the_last_class(tmp_path, a):
    cache = load(a)
    labels = cache.train.labels.copy()
    labels[2] = -1  # of the last class in a
    splits = {
        "train": SplitArrays(cache.train.features, labels, cache.train.ids),
        "test": SplitArrays(cache.test.features, cache.test.labels, cache.test.ids),
    }
    write_cache(tmp_path / "b.h5", splits, cache.meta)
    report = diff(a, tmp_path / "b.h5")
    last = cache.class_names[-1]
    assert report.train.relabelled == (("train/2", last, ""),) and not report.same


def test_fields_of_the_fingerprint_one_by_one(tmp_path, a):
    preprocess = {**ingredients()["preprocess"], "size": 96}
    b = cache_of(tmp_path / "b.h5", preprocess=preprocess, weights_sha256="2" * 64, dtype="float16")
    fields = {field.name: (field.a, field.b) for field in diff(a, b).fields}
    assert fields == {
        "dtype": ("float32", "float16"),
        "preprocess.size": (64, 96),
        "weights_sha256": ("1" * 64, "2" * 64),
    }


def test_float16_is_compared_as_numbers(tmp_path, a):
    (found,) = diff(a, cache_of(tmp_path / "b.h5", dtype="float16")).train.features
    assert 0 < found.max_abs < 2e-3 and found.min_cosine > 0.999999


def test_features_of_two_lengths_are_not_compared(tmp_path, a):
    b = cache_of(tmp_path / "b.h5", backbone="resnet50", change=lambda f: np.hstack([f, f]))
    report = diff(a, b)
    (found,) = report.train.features
    assert (found.shape_a, found.shape_b, found.n_rows) == ((6,), (12,), 0) and not report.same


def test_cuts_and_views_that_only_one_has(tmp_path):
    one = write_shards(tmp_path / "one.h5", ingredients(), pack=True)
    views = ingredients(views=["identity", "hflip"], cuts=["layer4", "avgpool"])
    report = diff(one, write_shards(tmp_path / "other.h5", views, pack=True))
    shapes = {(f.cut, f.view): (f.shape_a, f.shape_b) for f in report.train.features}
    assert shapes == {
        ("avgpool", "identity"): ((5,), (5,)),
        ("avgpool", "hflip"): ((), (5,)),
        ("layer4", "identity"): ((), (3, 2, 2)),
        ("layer4", "hflip"): ((), (3, 2, 2)),
    }
    assert not report.same


def test_zeros_have_no_direction(tmp_path):
    def zeros(features):
        return features * (np.arange(N) % 2)[:, None]

    one, other = cache_of(tmp_path / "a.h5", change=zeros), cache_of(tmp_path / "b.h5")
    (found,) = diff(one, other).train.features
    assert (found.n_different, found.min_cosine, found.mean_cosine) == (25, 0.0, 0.5)
    assert diff(one, one).same


def test_memory_does_not_grow_with_the_caches(tmp_path):
    """Of 2 x 25 MB of features, at most a few pieces are in memory at a time."""
    import tracemalloc

    paths = [write_gaussian_cache(tmp_path / f"{n}.h5", n_train=12_000, dim=512) for n in "ab"]
    tracemalloc.start()
    assert diff(*paths).same
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6


def test_damage_in_either_is_found(tmp_path, a):
    b = cache_of(tmp_path / "b.h5")
    data = bytearray(b.read_bytes())
    data[load(b).index.arrays["test/features"].blocks[0].offset] ^= 1
    b.write_bytes(data)
    for pair in ((a, b), (b, a)):
        with pytest.raises(CacheCorruptError, match="test/features, found another in block 0"):
            diff(*pair)
    with pytest.raises(CacheMissError):
        diff(a, tmp_path / "none.h5")


def test_progress_reaches_its_total(tmp_path, a):
    messages = []
    diff(a, cache_of(tmp_path / "b.h5", rows=slice(20)), on_progress=messages.append)
    assert (messages[0].done, messages[-1].done) == (0, messages[-1].total == 2 * N and 2 * N)


def test_the_command(capsys, tmp_path, a):
    assert main(["diff", str(a), str(a)]) == 0
    assert "Same: the caches are interchangeable" in capsys.readouterr().out
    b = cache_of(tmp_path / "b.h5", rows=slice(1, None), engine_version="2", created="x\ty")
    assert main(["diff", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "engine_version" in out and "They differ" in out and "train/0" in out
    assert "x\\ty" in out and max(map(len, out.splitlines())) <= 160
    assert main(["diff", str(a), str(b), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["same"] is False and report["train"]["only_a"] == ["train/0"]
    assert set(report) == {field.name for field in dataclasses.fields(diff(a, b))}
    assert main(["diff", str(a)]) == 2
    assert main(["diff", str(a), "none.h5"]) == 1
