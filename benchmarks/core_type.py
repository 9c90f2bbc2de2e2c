"""Claim: naming the processor's kernels for OneFlow's OpenBLAS makes it faster at no cost.

    python benchmarks/core_type.py [--size 64] [--rounds 3]

Runs the starter ResNet-18 on the CPU in child processes, in turn: OpenBLAS left to itself
against the core type that featcache sets. Prints images per second of each, the median ratio of
the rounds, and the largest difference between the two sets of features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

CHILD = """
import json, os, sys, time
import numpy as np
from featcache import frameworks, load_weights
if sys.argv[1] == "none":
    frameworks._oneflow.openblas_core_type = lambda: None
from featcache.engines import build_engine, choose_engine
weights = load_weights("tinyimagenet32", size=int(sys.argv[2]))
engine = build_engine(choose_engine("oneflow", "cpu"), weights)
shape = (32, weights.preprocess.size, weights.preprocess.size, 3)
images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
features = engine.extract(images)["avgpool"]
begun, done = time.perf_counter(), 0
while time.perf_counter() - begun < 5:
    engine.extract(images)
    done += len(images)
rate = done / (time.perf_counter() - begun)
print(json.dumps({"rate": rate, "features": features.tolist()}))
"""


def measure(kind: str, size: int) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    answer = subprocess.run(
        [sys.executable, "-c", CHILD, kind, str(size)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    import numpy as np

    from featcache.frameworks import openblas_core_type

    ratios = []
    for number in range(options.rounds):
        alone, named = (measure(kind, options.size) for kind in ("none", "named"))
        ratios.append(named["rate"] / alone["rate"])
        difference = np.abs(np.subtract(alone["features"], named["features"])).max()
        print(
            f"round {number + 1}: alone {alone['rate']:.1f} img/s, {openblas_core_type()} "
            f"{named['rate']:.1f} img/s, ratio {ratios[-1]:.2f}, max difference {difference:.1e}"
        )
    print(f"median ratio {statistics.median(ratios):.2f}, {options.size} px, batches of 32")


if __name__ == "__main__":
    main()
