"""Claim: naming the processor's kernels for OpenBLAS makes OneFlow and NumPy 1 faster at no cost.

    python benchmarks/core_type.py [--size 64] [--rounds 3]

Runs the starter ResNet-18 in OneFlow on the CPU, and a product of 2048 x 2048 matrices in NumPy,
in child processes, in turn: with OpenBLAS's own choice of kernels, and with the one that featcache
sets. Prints the rates, the median ratio of the rounds, and the largest difference between the two
sets of features.
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
from featcache import load_weights
from featcache import frameworks
if sys.argv[1] == "none":
    frameworks.openblas_core_type = lambda: None
from featcache.backbones.choice import choose_engine
from featcache.backbones.engine import build_engine
weights = load_weights("tinyimagenet32", size=int(sys.argv[2]))
engine = build_engine(choose_engine("oneflow", "cpu"), weights)
shape = (32, weights.preprocess.size, weights.preprocess.size, 3)
images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
features = engine.extract(images)["avgpool"]
started, done = time.perf_counter(), 0
while time.perf_counter() - started < 5:
    engine.extract(images)
    done += len(images)
rate = done / (time.perf_counter() - started)
print(json.dumps({"rate": rate, "features": features.tolist()}))
"""

NUMPY = """
import json, sys, time
if sys.argv[1] == "named":
    from featcache.process import import_numpy
    import_numpy()
import numpy as np
a = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32)
a @ a
started = time.perf_counter()
for _ in range(10):
    a @ a
print(json.dumps({"rate": 10 * 2 * 2048**3 / 1e9 / (time.perf_counter() - started)}))
"""


def measure(kind: str, code: str, size: int = 0) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    answer = subprocess.run(
        [sys.executable, "-c", code, kind, str(size)],
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

    from featcache.process import openblas_core_type

    ratios: dict[str, list[float]] = {"OneFlow": [], "NumPy": []}
    for number in range(options.rounds):
        alone, named = (measure(kind, CHILD, options.size) for kind in ("none", "named"))
        difference = np.abs(np.subtract(alone["features"], named["features"])).max()
        products = [measure(kind, NUMPY)["rate"] for kind in ("none", "named")]
        ratios["OneFlow"].append(named["rate"] / alone["rate"])
        ratios["NumPy"].append(products[1] / products[0])
        print(
            f"round {number + 1}: OneFlow alone {alone['rate']:.1f} img/s, {openblas_core_type()} "
            f"{named['rate']:.1f}, max difference {difference:.1e}; "
            f"NumPy alone {products[0]:.0f} GFLOP/s, named {products[1]:.0f}"
        )
    for what, found in ratios.items():
        print(f"{what}: median ratio {statistics.median(found):.2f}")
    print(f"{options.size} px, batches of 32; NumPy {np.__version__}")


if __name__ == "__main__":
    main()
