"""Claim: the probe reaches the same accuracy on the features of every engine and precision.

    python benchmarks/parity.py CIFAR10.zip [--reference CACHE] [--folder DIR]

Extracts the zip with every engine and precision available here, or reuses the caches in DIR. The
reference is OneFlow in float32, which takes a quarter of an hour on two cores; --reference reuses a
cache of it. Compares each with the reference: the smallest cosine, the largest difference, the
probe's top-1, and the agreement of the two heads on test images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import featcache
from featcache.backbones.choice import PRECISIONS, EngineChoice, choose_engine
from featcache.errors import EngineUnavailableError
from featcache.frameworks import torch_gpu_status
from featcache.metrics import agreement
from featcache.probes.head import load_head

WEIGHTS = "tinyimagenet32"


def contenders() -> Iterator[EngineChoice]:
    """Yield the other engines, precisions and devices that run here."""
    gpu, _ = torch_gpu_status()
    for engine, device in (("openvino", "cpu"), ("torch", "cpu"), ("torch", gpu)):
        for precision in PRECISIONS if device else ():
            try:
                yield choose_engine(engine, device, precision)
            except EngineUnavailableError as error:
                print(f"skipped: {error}")


def closeness(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the least cosine between rows, and the largest difference."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(cosine.min()), float(np.abs(a - b).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--reference", type=Path, help="a cache made by OneFlow in float32")
    parser.add_argument("--folder", type=Path, default=Path("cache"))
    options = parser.parse_args()
    reference = options.reference
    if reference is None:
        made = featcache.extract(
            options.data, weights=WEIGHTS, engine="oneflow", device="cpu", output=options.folder
        )
        reference = made.cache
    caches = {"oneflow f32": featcache.load(reference)}
    for choice in contenders():
        made = featcache.extract(
            options.data,
            weights=WEIGHTS,
            engine=choice.name,
            device=choice.device,
            precision=choice.precision,
            output=options.folder,
        )
        on_gpu = "" if choice.device == "cpu" else f" {choice.device}"
        caches[f"{choice.name} {choice.precision}{on_gpu}"] = made.load()
    expected = caches["oneflow f32"]
    predicted = {}
    for name, cache in caches.items():
        result = featcache.probe(cache, runs=options.folder / "runs", check=False)
        predicted[name] = load_head(result.head).predict(cache.test.features)
        cosine, difference = closeness(cache.test.features, expected.test.features)
        same = agreement(predicted[name], predicted["oneflow f32"])
        print(
            f"{name:14} least cosine 1 - {1 - cosine:.1e}, largest difference {difference:.1e}, "
            f"top-1 {result.top1:.4f} (C = {result.C:.3g}), agreement {100 * same:.2f} %"
        )


if __name__ == "__main__":
    main()
