"""OneFlow's features of made-up images, to hold other engines against where it cannot be.

    python tests/engine_features.py

writes tests/data/oneflow_features.npz anew, which test_engines.py holds every engine against,
OneFlow too. Rewrite it only where what an engine computes is meant to change.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from featcache import load_weights
from featcache.backbones.architectures import CUTS, get_backbone
from featcache.backbones.choice import choose_engine
from featcache.backbones.engine import build_engine
from featcache.backbones.weights import Weights
from featcache.preprocess import INTERPOLATIONS, Preprocess

STORED = Path(__file__).parent / "data" / "oneflow_features.npz"
# Backbone, side of the input, images, cuts; the first with the starter weights, the rest drawn.
CASES = {
    "starter": ("resnet18", 32, 2, CUTS),
    "resnet18": ("resnet18", 33, 1, ("layer4", "avgpool")),
    "resnet34": ("resnet34", 64, 1, ("layer4", "avgpool")),
    "resnet50": ("resnet50", 50, 1, ("layer4", "avgpool")),
}


def noise(n, side=64, seed=0):
    return np.random.default_rng((seed, side)).integers(0, 256, (n, side, side, 3), np.uint8)


def every_filter(size):
    """Return preprocessing with each filter, with and without a crop, that leaves pixels alone."""
    unit = (0.0,) * 3, (1 / 255,) * 3
    for interpolation in INTERPOLATIONS:
        yield Preprocess(size, *unit, interpolation)
        yield Preprocess(size, *unit, interpolation, "crop", size * 8 // 7 // 2 * 2)


def stark(n, side):
    """Draw images of black and white, between which filters overshoot the most."""
    return np.random.default_rng(side).integers(0, 2, (n, side, side, 3), np.uint8) * 255


def random_weights(name, size):
    """Draw a network whose activations neither fade nor explode (He et al., ICCV 2015)."""
    generator = np.random.default_rng(0)
    state = {}
    for key, shape in get_backbone(name).shapes().items():
        if key.endswith("num_batches_tracked"):
            state[key] = np.zeros(shape, np.int64)
        elif len(shape) == 4:
            spread = np.sqrt(2 / np.prod(shape[1:]))
            state[key] = generator.normal(0, spread, shape).astype(np.float32)
        elif key.endswith("running_var"):
            state[key] = generator.uniform(0.5, 1.5, shape).astype(np.float32)
        elif key.endswith("weight"):  # less than 1, since every block adds its input again
            state[key] = generator.uniform(0.1, 0.7, shape).astype(np.float32)
        else:
            state[key] = generator.normal(0, 0.1, shape).astype(np.float32)
    return Weights("random", name, state, "0" * 64, Preprocess(size), "drawn by a test")


def ingredients(case):
    """Return weights, images and cuts."""
    name, size, n, cuts = CASES[case]
    drawn = random_weights(name, size) if case != "starter" else None
    return drawn or load_weights("tinyimagenet32", size=size), noise(n, size), cuts


def main() -> None:
    arrays = {}
    for case in CASES:
        weights, images, cuts = ingredients(case)
        engine = build_engine(choose_engine("oneflow", "cpu"), weights, cuts)
        arrays.update({f"{case} {cut}": a for cut, a in engine.extract(images).items()})
    np.savez_compressed(STORED, **arrays)


if __name__ == "__main__":
    main()
