"""What a probe is given: no labels, another test cache, features on the disk, nonsense."""

from __future__ import annotations

import json

import numpy as np
import pytest
from caches import SplitArrays, write_cache, write_shards
from conftest import write_gaussian_cache

from featcache import evaluate_head, few_shot, knn, learning_curve, load, load_head, probe, verify
from featcache.cli import main
from featcache.errors import CacheCorruptError, CacheMismatchError, DatasetError, RecipeError
from featcache.probes import blocks as blocks_module
from featcache.probes.blocks import Rows, in_memory, loaded
from featcache.probes.lbfgs import train_lbfgs
from featcache.probes.objective import objective
from featcache.probes.recipes import ExactRecipe
from featcache.probes.scaling import Scaling, moments

VIEWS = ("hflip", "vflip", "hvflip")
SGD = pytest.param("sgd", marks=pytest.mark.oneflow)


def rewritten(path, target, *, features=None, labels=None, rows=None, role="train", **facts):
    """Write a cache anew with other features or labels in one split, and other facts."""
    cache = load(path)
    splits = {}
    for name, split in (("train", cache.train), ("test", cache.test)):
        mine = name == role
        kept = rows if mine and rows is not None else np.arange(len(split))
        views = VIEWS if name == "train" else ()
        splits[name] = SplitArrays(
            (features if mine and features is not None else split.features)[kept],
            (labels if mine and labels is not None else split.labels)[kept],
            tuple(np.array(split.ids)[kept]),
            {view: split.view(view)[kept] for view in views},
        )
    write_cache(target, splits, {**cache.meta, **facts})
    return target


@pytest.fixture
def partly_labelled(small_cache, tmp_path):
    """20 of 120 training images and 10 of 60 test images have no label."""
    train, test = load(small_cache).train.labels.copy(), load(small_cache).test.labels.copy()
    train[:20], test[-10:] = -1, -1
    one = rewritten(small_cache, tmp_path / "one.h5", labels=train)
    return rewritten(one, tmp_path / "two.h5", labels=test, role="test")


@pytest.mark.parametrize("solver", ["lbfgs", "ridge", SGD])
def test_unlabelled_images_are_left_out_and_counted(small_cache, partly_labelled, tmp_path, solver):
    options = {"epochs": 2} if solver == "sgd" else {"C": 1.0}
    outcome = probe(partly_labelled, solver=solver, **options)
    assert (outcome.n_train, outcome.n_test, outcome.n_unlabelled) == (100, 50, 30)
    # The same head as without their rows.
    fewer = rewritten(small_cache, tmp_path / "fewer.h5", rows=np.arange(20, 120))
    expected = probe(fewer, solver=solver, **options)
    ours, theirs = load_head(outcome.head), load_head(expected.head)
    assert np.array_equal(ours.weight, theirs.weight) and expected.n_unlabelled == 0
    labels = load(small_cache).test.labels[:50]
    hits = ours.predict(load(small_cache).test.features[:50]) == labels
    assert outcome.top1 == hits.mean() == evaluate_head(outcome.head, partly_labelled).top1


def test_a_grid_and_a_tolerance_are_those_of_the_sweep_and_the_head(small_cache, capsys):
    outcome = probe(small_cache, grid="1e-3:10:5", tolerance=1e-3, check=False)
    assert [point.C for point in outcome.sweep.points] == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])
    assert outcome.recipe.tolerance == 1e-3
    assert outcome.sweep.n_folds == 5 and outcome.sweep.n_holdout == outcome.n_train
    assert main(["probe", str(small_cache), "--grid", "0.1:1:2", "--no-check"]) == 0
    assert "the best of 2 by top1 on" in " ".join(capsys.readouterr().out.split())
    for wrong in ({"C": 1.0}, {"sweep": False}, {"cv": 3}, {"solver": "sgd"}):
        with pytest.raises(RecipeError, match="grid"):
            probe(small_cache, grid="0.1:1:2", **wrong)
    with pytest.raises(RecipeError, match="tolerance: expected it with lbfgs, found ridge"):
        probe(small_cache, solver="ridge", tolerance=1e-3)


def test_unlabelled_images_are_in_no_curve_vote_or_sweep(partly_labelled, capsys):
    assert few_shot(partly_labelled, shots=("full",))[0].n_train == 100
    assert learning_curve(partly_labelled, fractions=(1.0,))[0].n_train == 100
    assert [item.n_train for item in knn(partly_labelled, ks=(3,))] == [100]
    swept = probe(partly_labelled, check=False).sweep
    assert (swept.n_fit, swept.n_holdout) == (80, 100)
    assert probe(partly_labelled, train_limit=30, C=1.0, check=False).n_train == 30
    assert main(["probe", str(partly_labelled), "--C", "1"]) == 0
    assert "left out without a label: 30 images" in capsys.readouterr().out
    assert any("or -1 for none" in check for check in verify(partly_labelled).checks)
    classes = load(partly_labelled).train
    frame = pytest.importorskip("pandas") and classes.to_pandas()
    assert set(frame["class"][:20]) == {""} and frame["class"].iloc[20] == "class 2"


def test_a_split_without_any_label(small_cache, tmp_path):
    for role, n in (("train", 120), ("test", 60)):
        bare = rewritten(small_cache, tmp_path / f"{role}.h5", labels=np.full(n, -1), role=role)
        with pytest.raises(DatasetError, match=f"labelled {role} images, found {n} without"):
            probe(bare)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("role", ["train", "test"])
def test_features_that_are_not_finite(small_cache, tmp_path, bad, role):
    features = getattr(load(small_cache), role).features.copy()
    features[7, 3] = bad
    path = rewritten(small_cache, tmp_path / "bad.h5", features=features, role=role)
    for ask in (probe, few_shot, knn):
        with pytest.raises(CacheCorruptError, match=f"found NaN or infinity in {role}, row 7"):
            ask(path)


def test_classes_that_are_missing(tmp_path):
    """One that no test image has, and one that no training image has."""
    path = write_gaussian_cache(tmp_path / "g.h5")
    labels = load(path).test.labels
    result = probe(rewritten(path, tmp_path / "t.h5", rows=np.flatnonzero(labels), role="test"))
    assert result.evaluation.per_class_accuracy[0] is None and result.n_test == 40
    assert result.evaluation.balanced_accuracy > 0.8
    labels = load(path).train.labels
    result = probe(rewritten(path, tmp_path / "u.h5", rows=np.flatnonzero(labels)), C=1.0)
    assert result.evaluation.per_class_accuracy[0] == 0.0
    assert abs(result.check.objective_gap) < 1e-4 and result.check.agreement > 0.98
    assert np.isfinite(result.objective) and np.isfinite(load_head(result.head).bias).all()


def test_constant_features_mean_chance(tmp_path):
    path = write_gaussian_cache(tmp_path / "g.h5")
    same = rewritten(path, tmp_path / "c.h5", features=np.full((120, 8), 3, np.float32))
    cache = load(same)
    for scale in ("none", "standardize", "l2"):
        outcome = train_lbfgs(
            [loaded(Scaling(scale, [cache.train.features]).lazily(cache.train.features))],
            cache.train.labels,
            3,
            ExactRecipe(),
        )
        assert outcome.objective == pytest.approx(np.log(3), rel=1e-6) and outcome.converged


def test_another_cache_is_tested_on(small_cache, tmp_path):
    other = write_gaussian_cache(tmp_path / "other.h5", dataset_digest="5" * 64, n_test=30)
    result = probe(small_cache, test=other, C=1.0)
    assert result.test_cache == other and result.n_test == 30 and result.notes == ()
    cache = load(other)
    hits = load_head(result.head).predict(cache.test.features) == cache.test.labels
    assert result.top1 == hits.mean()
    record = json.loads((result.run / "run.json").read_text())
    assert record["test_cache"].endswith("other.h5") and record["cache"].endswith("small.h5")
    rounded = write_gaussian_cache(tmp_path / "rounded.h5", engine="another")
    assert probe(small_cache, test=rounded, C=1.0, check=False).notes == (
        "test features: engine: training 'fake', here 'another'",
    )


@pytest.mark.parametrize(
    ("changes", "excerpt"),
    [
        ({"backbone": "resnet50"}, "backbone: training 'resnet18', here 'resnet50'"),
        ({"weights_sha256": "9" * 64}, "weights_sha256"),
        ({"dim": 9}, "length: training 8, here 9"),
        ({"n_classes": 4}, "classes: training 3, here 4"),
        ({"class_names": ["class 0", "class 2", "class 1"]}, "the same classes in another order"),
    ],
)
def test_a_test_cache_of_other_features_or_classes(small_cache, tmp_path, changes, excerpt):
    other = write_gaussian_cache(tmp_path / "other.h5", **changes)
    with pytest.raises(CacheMismatchError, match=excerpt):
        probe(small_cache, test=other)
    assert main(["probe", str(small_cache), "--test-cache", str(other)]) == 1


@pytest.mark.parametrize("scale", ["none", "standardize", "l2"])
@pytest.mark.parametrize("solver", ["lbfgs", "ridge", SGD])
def test_mapped_features_give_the_same_head(small_cache, solver, scale):
    options = {"solver": solver, "scale": scale, "train_limit": 100}
    options |= {"epochs": 2} if solver == "sgd" else {}
    read, mapped = (probe(small_cache, mmap=mmap, **options) for mmap in (False, True))
    ours, theirs = load_head(mapped.head), load_head(read.head)
    # SGD multiplies mapped rows a batch at a time and features in memory all at once: a BLAS
    # need not give the same bits for products of another shape (AVX-512 on Intel does not).
    within = 1e-5 if solver == "sgd" else 0
    assert mapped.C == read.C
    for a, b in (
        (mapped.check.objective_gap, read.check.objective_gap),
        (ours.weight, theirs.weight),
        (ours.bias, theirs.bias),
    ):
        np.testing.assert_allclose(a, b, rtol=within, atol=within)


def test_shards_on_the_disk_are_read_as_one_array(tmp_path):
    from caches import ingredients

    meta = ingredients(dtype="float16", class_names=["a", "b"])
    shards = write_shards(tmp_path / "s.h5", meta, n_train=90, n_test=10, shard_rows=16, dim=4)
    packed = write_shards(
        tmp_path / "p.h5", meta, n_train=90, n_test=10, shard_rows=16, dim=4, pack=True
    )
    one, two = (probe(path, mmap=True) for path in (shards, packed))
    assert not in_memory(load(shards, mmap=True).train.features)
    assert one.objective == two.objective and one.sweep == two.sweep


def test_large_mapped_features_are_not_checked_and_a_note_says_so(small_cache, monkeypatch):
    from featcache.probes import probe as _run

    monkeypatch.setattr(_run, "_CHECKED_BYTES", 100)
    result = probe(small_cache, mmap=True, C=1.0)
    assert result.check is None and "not checked" in result.notes[0]
    assert probe(small_cache, C=1.0).check is not None
    assert main(["probe", str(small_cache), "--mmap", "--C", "1", "--strict"]) == 0


def test_rows_are_read_scaled_and_chosen():
    x = np.random.default_rng(0).normal(3, 2, (500, 5)).astype(np.float16)
    scaling = Scaling("standardize", [x])
    numbers = np.arange(499, -1, -2)
    rows = Rows(scaling.lazily(x), numbers)
    expected = (x.astype(np.float64) - x.mean(0, np.float64)) / x.std(0, dtype=np.float64)
    assert rows.shape == (250, 5) and rows.dtype == np.float32 and in_memory(rows)
    np.testing.assert_allclose(rows[10:20], expected[numbers[10:20]], atol=1e-5)
    np.testing.assert_allclose(loaded(rows), expected[numbers], atol=1e-5)


@pytest.mark.parametrize(("n_classes", "dim"), [(3, 8), (40, 8), (10, 200)])
def test_blocks_and_threads_change_nothing(monkeypatch, n_classes, dim):
    """Blocks, tiles and remainders sum up to the whole, for any number of threads to the bit."""
    generator = np.random.default_rng(0)
    x = generator.normal(1, 2, (3001, dim))
    labels = generator.integers(n_classes, size=3001)
    weight, bias = generator.normal(size=(n_classes, dim)) / 9, generator.normal(size=n_classes)
    p = np.exp(x @ weight.T + bias)
    p /= p.sum(axis=1, keepdims=True)
    residual = p - np.eye(n_classes)[labels]
    value = -np.log(p[np.arange(3001), labels]).mean() + 0.05 * (weight**2).sum()
    monkeypatch.setattr(blocks_module._Blas, "leave", lambda self: None)
    for rows in (256, 512, 1 << 20):
        monkeypatch.setattr(blocks_module, "block_rows", lambda _, rows=rows: rows)
        outcome = []
        for workers in (1, 3):
            monkeypatch.setattr(blocks_module._Blas, "enter", lambda _, workers=workers: workers)
            at = objective(weight, bias, [x], labels, ExactRecipe(0.1))
            outcome.append((at.value, at.weight_gradient.tobytes()))
            assert at.value == pytest.approx(value, rel=1e-12)
            expected = residual.T @ x / 3001 + 0.1 * weight
            np.testing.assert_allclose(at.weight_gradient, expected, atol=1e-12)
            np.testing.assert_allclose(at.bias_gradient, residual.mean(axis=0), atol=1e-12)
            assert at.curvature == pytest.approx((p * (1 - p)).mean(), rel=1e-9)
            lie = moments([x])
            np.testing.assert_allclose(lie.mean, x.mean(axis=0), atol=1e-5)
            spread = lie.directions * lie.variances @ lie.directions.T
            np.testing.assert_allclose(spread, np.cov(x.T, bias=True), atol=1e-4)
        assert outcome[0] == outcome[1]


def test_blas_has_its_threads_back_after_overlapping_passes():
    from threadpoolctl import threadpool_info, threadpool_limits

    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    np.ones((4, 4)) @ np.ones((4, 4))
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        assert 2 in before
        first, second = blocks_module.one_blas_thread(), blocks_module.one_blas_thread()
        first.__enter__()
        second.__enter__()
        assert set(threads()) <= {1}
        first.__exit__(None, None, None)
        assert set(threads()) <= {1}
        second.__exit__(None, None, None)
        assert threads() == before


@pytest.mark.oneflow
def test_sgd_does_what_its_options_say(small_cache):
    options = {"epochs": 3, "batch_size": 16, "momentum": 0.5, "schedule": "constant", "lr": 0.25}
    result = probe(small_cache, **options, check=False, device="cpu")
    assert {name: getattr(result.recipe, name) for name in options} == options
    assert result.steps == 3 * 8, "120 rows in batches of 16"
    falling = probe(small_cache, **{**options, "schedule": "cosine"}, check=False)
    assert falling.objective != result.objective


@pytest.mark.oneflow
def test_a_gpu_that_is_not_there(small_cache, monkeypatch):
    from featcache.errors import EngineUnavailableError
    from featcache.probes import job as job_module

    monkeypatch.setattr(job_module, "cuda_status", lambda: (False, "no driver"))
    with pytest.raises(EngineUnavailableError, match="found no driver; use --device cpu"):
        probe(small_cache, solver="sgd", device="cuda")


@pytest.mark.oneflow
def test_the_head_trains_on_the_given_device(small_cache, monkeypatch):
    """Never run on a GPU: this holds that the device reaches every tensor."""
    import oneflow

    from featcache.probes.recipes import ProbeRecipe
    from featcache.probes.sgd import train_sgd

    asked = []
    tensor_to = oneflow.Tensor.to

    def to(self, device, *rest):
        asked.append(device)
        return tensor_to(self, "cpu", *rest)

    monkeypatch.setattr(oneflow.Tensor, "to", to)
    cache = load(small_cache)
    recipe = ProbeRecipe(epochs=1, min_steps=0, tolerance=None)
    train_sgd(
        [cache.train.features], cache.train.labels, 3, recipe, framework=oneflow, device="cuda"
    )
    assert set(asked) == {"cuda"} and len(asked) >= 5


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_a_class_of_one_image_cannot_be_held_out(tmp_path, solver):
    cache = write_gaussian_cache(tmp_path / "few.h5", n_classes=40, n_train=40, n_test=40)
    with pytest.raises(DatasetError, match=r"found 1 of class 0 \(40 such .*--no-sweep"):
        probe(cache, solver=solver)
    assert probe(cache, solver=solver, sweep=False, check=False).n_train == 40
