"""Caches and runs for tests of the report: of real images, or with hostile names."""

from __future__ import annotations

import numpy as np
from caches import SplitArrays, write_cache
from PIL import Image

from featcache import load, probe
from featcache.datasets.dataset import Dataset
from featcache.datasets.loading import load_dataset
from featcache.preprocess import Preprocess
from featcache.runs import cache_facts, save_run

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    '"><img src=x onerror="window.pwned = 2">',
    "]]> <!-- {{ 7 * 7 }} &amp; $\\alpha$ %s",
    "\N{FAMILY}\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 'quote' \"quotes\"",
    "_" + "long" * 75,
)


def clouds(labels, dim, seed, spread=0.8):
    """Return features that a linear head can learn, one cloud for each class."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(labels.max() + 1, dim)) * 1.5 + 2
    noise = generator.normal(scale=spread, size=(len(labels), dim))
    return (centres[labels] + noise).astype(np.float32)


def provenance(class_names, **facts):
    """Return the metadata of a cache."""
    return {
        "backbone": "resnet18",
        "class_names": list(class_names),
        "created": "2026-01-01T00:00:00+00:00",
        "cuts": ["avgpool"],
        "dataset": "made",
        "dataset_digest": "0" * 64,
        "dataset_source": "drawn by a test",
        "device": "cpu",
        "dtype": "float32",
        "engine": "fake",
        "engine_version": "1",
        "featcache_version": "0",
        "images_per_s": 100.0,
        "precision": "f32",
        "preprocess": Preprocess(64).as_dict(),
        "views": ["identity"],
        "wall_s": 1.0,
        "weights": "tinyimagenet32",
        "weights_sha256": "1" * 64,
        "weights_source": "none",
        **facts,
    }


def cache_of_names(path, class_names, *, n_train=60, n_test=30, dim=6, ids=None, **facts):
    """Write a cache of no images: classes in turn, and ids of any kind."""
    splits = {}
    for role, n in (("train", n_train), ("test", n_test)):
        labels = np.arange(n) % len(class_names)
        names = tuple(
            (ids or "{role}/{row:05d}.png").format(role=role, row=row) for row in range(n)
        )
        splits[role] = SplitArrays(
            clouds(labels, dim, len(role)), labels.astype(np.int64), names, {}
        )
    write_cache(path, splits, provenance(class_names, **facts))
    return path


def cache_of_images(path, folder, *, dim=6, skip=0):
    """Write a cache of a folder's or data set's images, without the first ``skip`` of train."""
    dataset = folder if isinstance(folder, Dataset) else load_dataset(folder)
    splits = {}
    for role, split in dataset.splits():
        begin = skip if role == "train" else 0
        features = clouds(split.labels, dim, len(role))
        splits[role] = SplitArrays(features[begin:], split.labels[begin:], split.ids[begin:], {})
    write_cache(
        path,
        splits,
        provenance(
            dataset.class_names,
            dataset=dataset.name,
            dataset_digest=dataset.digest,
            dataset_source=dataset.source,
            **({} if isinstance(folder, Dataset) else {"dataset_path": str(folder)}),
        ),
    )
    return path


def image_folder_of(root, class_names, *, n_train=8, n_test=4, name="{number:02d}.png"):
    """Write images: each of one colour by its class, its number in a corner."""
    for role, count in (("train", n_train), ("test", n_test)):
        for index, class_name in enumerate(class_names):
            folder = root / role / class_name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((40, 40, 3), 40 + 15 * number, np.uint8)
                pixels[..., index % 3] = 220
                Image.fromarray(pixels).save(folder / name.format(number=number))
    return root


def add_finetune(cache, runs, *, top1=0.95, name="20260101-000000-full-abcd", **facts):
    """Write the record of a fine-tune on the images of a cache, as `featcache.finetune` does."""
    cache = load(cache)
    epochs = [
        {"epoch": n, "train_loss": 1 / n, "top1": top1 - 0.1 / n, "wall_s": 5.0} for n in (1, 2, 3)
    ]
    record = {
        "kind": "finetune",
        "method": "full",
        "top1": top1,
        "top1_interval": [top1 - 0.05, min(1.0, top1 + 0.05)],
        "epochs": epochs,
        "curve_split": "test",
        "best_epoch": 3,
        "images_per_s": 10.0,
        "wall_s": 15.0,
        "n_train": len(cache.train),
        "n_val": 0,
        "n_test": len(cache.test),
        "seed": 0,
        "n_epochs": 3,
        "init_head": None,
        **cache_facts(cache),
        "cache": None,
        "features_wall_s": 0.0,
        **facts,
    }
    save_run(runs / name, record)
    return runs / name


def probed(cache, runs):
    """Run a small probe on a cache, with its record in ``runs``."""
    return probe(cache, runs=runs, check=False)
