"""Claim: images that `select --by both` chooses are worth more than as many random ones.

    python benchmarks/selection.py CACHE [SEEDS]

Labels 100 random training images of CACHE (features of CIFAR-10) in a table, and 200 more: random
ones, ten times, or those that each way selects. Prints the mean top-1 of a head on the 300 over
SEEDS (5) starts, and the difference to the mean of random ones of the same start with its 95 %
interval (Student's t).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

import featcache
from featcache.metrics import top1
from featcache.probes.curves import fit

START, MORE, DRAWS = 100, 200, 10


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    scores: dict[str, list[float]] = {"start": [], "random": []}
    wall: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(sys.argv[1], Path(folder, "cache.h5")))
        cache = featcache.load(path)
        train, test, names = cache.train, cache.test, cache.class_names
        row_of = {name: row for row, name in enumerate(train.ids)}

        def accuracy(rows: np.ndarray) -> float:
            head, _ = fit(train.features[rows], train.labels[rows], len(names))
            return top1((test.features @ head.weight.T + head.bias).argmax(axis=1), test.labels)

        for seed in range(int(sys.argv[2]) if sys.argv[2:] else 5):
            drawn = np.random.default_rng(seed).permutation(len(train))
            start = drawn[:START]
            known = {"id": [train.ids[row] for row in start]}
            featcache.label(path, {**known, "y": [names[n] for n in train.labels[start]]})
            scores["start"].append(accuracy(start))
            parts = [
                np.concatenate([start, drawn[first : first + MORE]])
                for first in range(START, START + DRAWS * MORE, MORE)
            ]
            scores["random"].append(float(np.mean([accuracy(rows) for rows in parts])))
            for by in ("uncertain", "diverse", "both"):
                started = time.perf_counter()
                chosen = featcache.select(path, n=MORE, by=by, target="y", seed=seed).selected
                wall[by] = wall.get(by, 0.0) + time.perf_counter() - started
                rows = np.array([row_of[one.id] for one in chosen])
                scores.setdefault(by, []).append(accuracy(np.concatenate([start, rows])))
    seeds = len(scores["start"])
    for name, of_seeds in scores.items():
        gain = np.subtract(of_seeds, scores["random"])
        half = stdtrit(seeds - 1, 0.975) * gain.std(ddof=1) / np.sqrt(seeds)
        print(
            f"{name:10} {np.mean(of_seeds):.4f}  against random {gain.mean():+.4f} +- {half:.4f}  "
            f"{wall.get(name, 0.0) / seeds:.1f} s"
        )


if __name__ == "__main__":
    main()
