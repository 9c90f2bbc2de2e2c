"""Claim: a shipped file answers as `featcache predict` does, for every backbone and kind of head.

    python benchmarks/ship.py IMAGES CACHE [CACHE ...]

IMAGES is a folder or archive of which 32 images are used. Ships from each CACHE a head of classes,
the same weights as heads of several labels and of numbers, and the vote of 20 neighbours; prints
the largest difference of a probability (of a value, relative to the largest) and of a feature,
relative to the largest, and the CPU time of one photograph of 12 million pixels in ONNX Runtime
and, to its pixels alone, in Pillow.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

import featcache
from featcache.preprocess import Preprocess
from featcache.probes.head import save_head

_LIMIT = 1000  # images to train on: what a head says does not matter here


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    images, *caches = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        for cache in caches:
            measure(Path(cache), images, Path(name))


def measure(path: Path, images: str, folder: Path) -> None:
    cache = featcache.load(path)
    head = featcache.load_head(
        featcache.probe(cache, C=1.0, check=False, train_limit=_LIMIT, runs=folder / "runs").head
    )
    half = np.full(len(head.class_names), 0.5, np.float32)
    heads = {
        "classes": head,
        "labels": replace(head, task="labels", thresholds=half),
        "numbers": replace(head, task="numbers"),
        "20-NN": None,
    }
    print(f"{cache.meta['backbone']}, {cache.meta['preprocess']['size']} px")
    for kind, one in heads.items():
        file = folder / "head.safetensors"
        subject: Path = path
        if one is not None:
            save_head(file, one, {})
            subject = file
        result = featcache.ship(
            subject,
            folder / "model.onnx",
            knn=None if one else 20,
            images=[images],
            runs=folder / "runs",
            force=True,
        )
        found = result.agreement
        print(
            f"  {kind:8} {found.largest_difference:.1e}, features {found.feature_difference:.1e}, "
            f"{result.size_bytes / 1e6:.1f} MB",
            flush=True,
        )
    photograph = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), np.uint8)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    preprocess = Preprocess.from_dict(cache.meta["preprocess"])
    small = np.zeros((1, 64, 64, 3), np.uint8)
    for name, run in (
        ("64 x 64", lambda: session.run(None, {"image": small})),
        ("12 MP", lambda: session.run(None, {"image": photograph[None]})),
        ("12 MP in Pillow", lambda: preprocess.pixels(Image.fromarray(photograph))),
    ):
        run()
        started = time.process_time()
        run()
        print(f"  {name}: {time.process_time() - started:.2f} s of CPU time", flush=True)


if __name__ == "__main__":
    main()
