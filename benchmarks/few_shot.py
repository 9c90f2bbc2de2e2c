"""Claim: on few images of each class our heads are ahead of big_vision's few-shot evaluation.

    python benchmarks/few_shot.py CACHE

Trains on the same draws of CACHE (1, 2, 5, 10 and 25 images of each class, 5 seeds): ours with the
penalty chosen on each draw, exact and least squares; ours at 5e-4 for every size; and big_vision's
least squares (evaluators/fewshot_lsr.py: features divided by their spread, a bias of 100, an L2
penalty of 2 ** 10, the value of its configs). Prints the mean top-1 on the whole test split, the
difference to big_vision's on the same draws with its 95 % interval, and the time of each method.
"""

from __future__ import annotations

import sys
import time

import numpy as np

import featcache
from featcache.metrics import top1
from featcache.probes.curves import draw, fit
from featcache.probes.recipes import ExactRecipe

SHOTS, SEEDS = (1, 2, 5, 10, 25), 5
L2, BIAS = 2.0**10, 100.0


def big_vision(x: np.ndarray, y: np.ndarray, test: np.ndarray, n_classes: int) -> np.ndarray:
    """Return what big_vision's few-shot head predicts, written from its description."""
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-5
    known = np.column_stack([(x - mean) / spread, np.full(len(x), BIAS)]).astype(np.float64)
    targets = 2 * np.eye(n_classes)[y] - 1
    n, dim = known.shape
    if n < dim:
        weight = known.T @ np.linalg.solve(known @ known.T + L2 * np.eye(n), targets)
    else:
        weight = np.linalg.solve(known.T @ known + L2 * np.eye(dim), known.T @ targets)
    scores = ((test - mean) / spread) @ weight[:-1].astype(np.float32) + BIAS * weight[-1]
    return scores.argmax(axis=1)


def ours(solver: str, recipe: ExactRecipe | None = None):
    def predict(x: np.ndarray, y: np.ndarray, test: np.ndarray, n_classes: int) -> np.ndarray:
        head, _ = fit(x, y, n_classes, solver, recipe)
        return (test @ head.weight.T + head.bias).argmax(axis=1)

    return predict


METHODS = {
    "big_vision": big_vision,
    "exact": ours("lbfgs"),
    "least squares": ours("ridge"),
    "exact, 5e-4": ours("lbfgs", ExactRecipe()),
}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    cache = featcache.load(sys.argv[1])
    train, test, n_classes = cache.train, cache.test, len(cache.class_names)
    for shots in SHOTS:
        scores, wall_s = {}, dict.fromkeys(METHODS, 0.0)
        for seed in range(SEEDS):
            rows = draw(train.labels, np.full(n_classes, shots), seed)
            for name, predict in METHODS.items():  # in turn
                started = time.perf_counter()
                predicted = predict(
                    train.features[rows], train.labels[rows], test.features, n_classes
                )
                wall_s[name] += time.perf_counter() - started
                scores.setdefault(name, []).append(top1(predicted, test.labels))
        for name in METHODS:
            gain = np.subtract(scores[name], scores["big_vision"])
            half = 2.776 * gain.std(ddof=1) / np.sqrt(SEEDS)  # Student's t, 4 degrees of freedom
            print(
                f"{shots:3d} shots  {name:13s}  top-1 {100 * np.mean(scores[name]):5.2f} %  "
                f"{100 * gain.mean():+5.2f} points ({100 * (gain.mean() - half):+.2f} to "
                f"{100 * (gain.mean() + half):+.2f})  {wall_s[name] / SEEDS:.3f} s",
                flush=True,
            )
    started = time.perf_counter()
    featcache.few_shot(cache, shots=(*SHOTS, "full"), seeds=SEEDS)
    print(f"the whole curve with all images: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
