"""INT8 beside float32 and bfloat16: the speed of the engine, and what it costs in top-1.

    python benchmarks/int8.py CIFAR10.zip [--size 64] [--images 60000] [--rounds 3]

CIFAR10.zip holds train/ and test/ with class folders. Needs OpenVINO and nncf. The engines run in
turn on arrays in memory: images per second as the median of the rounds with the least and the
greatest, and the ratio to bf16 round by round. Then the images are extracted in each precision and
probed; the last column is float32 features under the head that was trained on each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace

import numpy as np
from extract import WEIGHTS, processor, spread, subset

import featcache
from featcache.backbones.choice import choose_engine
from featcache.backbones.engine import build_engine
from featcache.extraction.precision import _rates
from featcache.preprocess import upscale

PRECISIONS = ("f32", "bf16", "int8")
N_SCALED, N_TIMED = 256, 512


def speeds(data, size: int, n_rounds: int) -> None:
    """Print the rates of the engines, in turn, on pixels in memory."""
    weights = featcache.load_weights(WEIGHTS, size=size)
    images = data.train.images
    pixels = weights.preprocess.compact([images[row] for row in range(N_SCALED + N_TIMED)])
    scaling = upscale(pixels[:N_SCALED], weights.preprocess)
    if size > 64:  # images of the network's own size
        pixels = upscale(pixels, weights.preprocess)
    engines = {}
    for name in PRECISIONS:
        choice = choose_engine("openvino", precision=name)
        choice = replace(choice, calibration=scaling if name == "int8" else None)
        engines[name] = build_engine(choice, weights)
    rounds = [_rates(engines, pixels[N_SCALED:]) for _ in range(n_rounds)]
    for name in PRECISIONS:
        rates = sorted(one[name] for one in rounds)
        ratios = sorted(one[name] / one["bf16"] for one in rounds)
        print(
            f"{name:6} {spread(rates):>24} images/s, {statistics.median(ratios):.2f} times bf16 "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def accuracies(data, size: int) -> None:
    """Print each precision's cosine to f32, its top-1, and that of its head on f32 features."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            name: featcache.extract(
                data, weights=WEIGHTS, size=size, precision=name, output=folder, reuse=False
            ).load()
            for name in PRECISIONS
        }
        exact = np.asarray(caches["f32"].test.features)
        for name, cache in caches.items():
            found = featcache.probe(cache, check=False, runs=folder)
            features = np.asarray(cache.test.features)
            lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(exact, axis=1)
            cosines = (features * exact).sum(axis=1) / lengths
            on_exact = featcache.evaluate_head(found.head, caches["f32"])
            low, high = (100 * one for one in found.top1_interval)
            print(
                f"{name:6} least cosine {cosines.min():.5f}, median {np.median(cosines):.5f}, "
                f"top-1 {100 * found.top1:.2f} % ({low:.1f} to "
                f"{high:.1f}), its head on f32 {100 * on_exact.top1:.2f} %"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a zip of train/ and test/ with class folders")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    data = subset(options.data, options.images)
    print(f"ResNet-18 at {options.size} px, {processor()}")
    speeds(data, options.size, options.rounds)
    accuracies(data, options.size)


if __name__ == "__main__":
    main()
