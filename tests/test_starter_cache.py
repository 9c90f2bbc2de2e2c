"""The cache that comes with a clone: whole, made by the weights that ship, and good enough."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import featcache
from featcache.cli import main

ROOT = Path(__file__).resolve().parents[1]
NAME = "cifar10-jpeg-resnet18-tinyimagenet32-64-fdac738c.h5"
WEIGHTS = Path(featcache.__file__).parent / "backbones" / "resnet18-tinyimagenet32.safetensors"


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    """A copy, alone in a folder for caches: nothing that a test does may land in the clone."""
    if (ROOT / "PKG-INFO").exists():
        pytest.skip("this is a source distribution, which leaves the starter cache out")
    folder = tmp_path_factory.mktemp("clone") / "cache"
    folder.mkdir()
    return Path(shutil.copy(ROOT / "cache" / NAME, folder))


@pytest.fixture
def here(starter, monkeypatch):
    """Work in a folder that has the starter cache in ``cache/``, as a clone does."""
    monkeypatch.delenv("FEATCACHE_DIR")
    monkeypatch.chdir(starter.parents[1])
    return starter


def test_every_byte_is_what_it_was(starter):
    report = featcache.verify(starter)  # raises at the first bad block
    assert (report.n_train, report.n_test) == (10_000, 2_000)
    assert any("checksums" in check for check in report.checks)
    assert starter.stat().st_size <= 13_500_000


def test_it_says_how_it_was_made(starter):
    cache = featcache.load(starter)
    assert cache.meta["weights_sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert cache.fingerprint.startswith(starter.stem.rpartition("-")[2])
    assert (cache.meta["backbone"], cache.meta["dtype"]) == ("resnet18", "float16")
    assert cache.meta["preprocess"]["size"] == 64
    assert len(cache.class_names) == 10 and cache.class_names[0] == "airplane"
    assert np.bincount(cache.train.labels).tolist() == [1000] * 10
    assert np.bincount(cache.test.labels).tolist() == [200] * 10


def texts(value):
    """Yield every text in a provenance, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def test_it_names_no_place_of_the_machine_that_made_it(starter):
    meta = featcache.load(starter).meta
    assert meta["dataset_path"] == "cifar10-jpeg.zip"
    assert meta["dataset_source"] == "cifar10-jpeg.zip, train/ and test/ as given"
    assert not [text for text in texts(meta) if text.startswith(("/", "~")) or ":\\" in text]


def test_every_image_is_found_by_the_hash_of_its_file(starter):
    cache = featcache.load(starter)
    for split in (cache.train, cache.test):
        assert split.content_hashes.shape == (len(split), 32)
        assert len(np.unique(split.content_hashes, axis=0)) == len(split)


def test_the_ids_are_files_of_both_splits(starter):
    cache = featcache.load(starter)
    assert {name.split("/")[0] for name in cache.train.ids} == {"train"}
    assert {name.split("/")[0] for name in cache.test.ids} == {"test"}
    label_of = dict(zip(cache.class_names, range(10), strict=True))
    assert [label_of[name.split("/")[1]] for name in cache.test.ids] == cache.test.labels.tolist()


def test_a_probe_without_arguments_finds_it_and_is_good(here, capsys):
    assert main(["probe", "--C", "0.03", "--no-check"]) == 0
    shown = capsys.readouterr().out
    assert NAME.removesuffix(".h5") in shown
    (record,) = featcache.compare(runs=here.parent / "runs")
    # Measured 0.7535 with C chosen by the sweep; three standard errors of 2,000 images below.
    assert record["top1"] > 0.724 and record["n_test"] == 2000


def test_neighbours_and_few_shots_are_good_without_training(here):
    (votes,) = featcache.knn(ks=(20,))
    assert votes.top1 > 0.69  # measured 0.721
    (point,) = featcache.few_shot(shots=(10,), seeds=2)
    assert point.mean > 0.5  # measured 0.567 over 5 draws


def test_git_keeps_it_and_nothing_else(starter):
    def ignored(path):
        command = ["git", "check-ignore", "--quiet", "--no-index", f"cache/{path}"]
        return subprocess.run(command, cwd=ROOT).returncode == 0

    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone")
    assert not ignored(NAME) and not ignored("README.md")
    assert ignored("mine.h5") and ignored("runs/x/run.json") and ignored("report.html")
