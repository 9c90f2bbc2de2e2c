"""The exact probe beside scikit-learn's LogisticRegression, at odd shapes and with many classes.

Both fit the same float32 arrays at the same C, in turn in one process, with one BLAS thread. The
table has seconds of processor time, and how far each objective lies above the lower one. By
default scikit-learn stops at a gradient of 1e-4, here 1 to 60 % above the optimum. The second line
asks for more, until its tolerance of the objective ends it, at 0.1 to 1 %:

    OPENBLAS_NUM_THREADS=1 python benchmarks/shapes.py
    OPENBLAS_NUM_THREADS=1 python benchmarks/shapes.py --tol 1e-7
    OPENBLAS_NUM_THREADS=1 python benchmarks/shapes.py --classes 10 1000 --rows 2000 --dims 512
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from featcache.probes.lbfgs import train_lbfgs
from featcache.probes.objective import objective
from featcache.probes.recipes import ExactRecipe


def drawn(n: int, dim: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features as a ReLU network's: of very different spread, not negative."""
    generator = np.random.default_rng(0)
    labels = np.arange(n) % n_classes
    x = generator.normal(size=(n_classes, dim))[labels] + 4 * generator.normal(size=(n, dim))
    return np.maximum(x * generator.normal(size=dim) ** 2 + 1, 0).astype(np.float32), labels


def measure(n: int, dim: int, n_classes: int, C: float, tol: float) -> str:
    """Return one line of the table."""
    x, labels = drawn(n, dim, n_classes)
    recipe = ExactRecipe((2 if n_classes == 2 else 1) / (C * n))
    started = time.process_time()
    ours = train_lbfgs([x], labels, n_classes, recipe)
    seconds = time.process_time() - started
    started = time.process_time()
    theirs = LogisticRegression(C=C, tol=tol, max_iter=2000).fit(x, labels)
    their_seconds = time.process_time() - started
    weight, bias = theirs.coef_, theirs.intercept_
    if n_classes == 2:
        weight, bias = np.vstack([-weight, weight]) / 2, np.append(-bias, bias) / 2
    value = objective(weight, bias, [x], labels, recipe, least=np.float64).value
    best = min(value, ours.objective)
    return (
        f"{n_classes:7,} {n:6,} {dim:5,} | {seconds:7.3f} {ours.objective / best - 1:8.1e} "
        f"{ours.converged!s:5} | {their_seconds:7.3f} {value / best - 1:8.1e}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=[10])
    parser.add_argument("--rows", type=int, nargs="+", default=[20, 100, 500, 2000])
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--C", type=float, default=1.0)
    parser.add_argument("--tol", type=float, default=1e-4, help="of scikit-learn")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # scikit-learn's, of its limit of iterations
    print("classes   rows  dims |  ours s      gap conv. | sklearn s    gap")
    with threadpool_limits(1):
        for n_classes in given.classes:
            for n in given.rows:
                for dim in given.dims:
                    if n >= 2 * n_classes:
                        print(measure(n, dim, n_classes, given.C, given.tol), flush=True)


if __name__ == "__main__":
    main()
