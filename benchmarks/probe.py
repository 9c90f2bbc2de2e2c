"""What the exact probe costs beside scikit-learn's LogisticRegression, on the same features.

    python benchmarks/probe.py CACHE [--rounds 3]
    python benchmarks/probe.py CACHE --blocks

CACHE holds features of CIFAR-10 (featcache extract … --weights tinyimagenet32). In turn, in one
process: scikit-learn as a user calls it (C given, everything else as it comes), scikit-learn on
standardised features, featcache's L-BFGS to a relative gap of 1e-6 on plain and on standardised
features, one sweep of 20 values. Prints the median wall time of each, how far each objective lies
above the best one found, and top-1. --blocks times one evaluation of the objective at several
block sizes instead.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from sklearn.linear_model import LogisticRegression

import featcache
from featcache.probes import Scaling, objective, objectives, sweep_lbfgs, train_lbfgs
from featcache.recipe import ExactRecipe


def timed(work):
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def sklearn_head(x, y, inverse_penalty, **options):
    model = LogisticRegression(C=inverse_penalty, max_iter=5000, **options).fit(x, y)
    return model.coef_, model.intercept_, int(model.n_iter_[0])


def exact_head(x, y, n_classes, recipe):
    found = train_lbfgs([x], y, n_classes, recipe)
    return found.weight, found.bias, found.steps


def compare(cache: featcache.Cache, rounds: int) -> None:
    x, y = cache.train.features, cache.train.labels
    test, labels = cache.test.features, cache.test.labels
    n_classes, recipe = len(cache.class_names), ExactRecipe()
    inverse_penalty = 1 / (len(x) * recipe.weight_decay)
    scaling = Scaling("standardize", [x])
    scaled, scaled_test = scaling.apply(x), scaling.apply(test)
    contenders = {
        "scikit-learn, plain": (x, test, lambda: sklearn_head(x, y, inverse_penalty)),
        "featcache, plain": (x, test, lambda: exact_head(x, y, n_classes, recipe)),
        "scikit-learn, standardised": (
            scaled, scaled_test, lambda: sklearn_head(scaled, y, inverse_penalty)),
        "scikit-learn, standardised, tol 1e-6": (
            scaled, scaled_test, lambda: sklearn_head(scaled, y, inverse_penalty, tol=1e-6)),
        "featcache, standardised": (
            scaled, scaled_test, lambda: exact_head(scaled, y, n_classes, recipe)),
    }  # fmt: skip
    walls: dict[str, list[float]] = {name: [] for name in contenders}
    sweeps, heads = [], {}
    for _ in range(rounds):
        for name, (_, _, work) in contenders.items():
            wall, heads[name] = timed(work)
            walls[name].append(wall)
        sweeps.append(timed(lambda: sweep_lbfgs([x], y, n_classes, recipe))[0])
    values = {
        name: objective(*heads[name][:2], [data], y, recipe).value
        for name, (data, _, _) in contenders.items()
    }
    for name, (data, held, _) in contenders.items():
        best = min(value for other, value in values.items() if contenders[other][0] is data)
        weight, bias, iterations = heads[name]
        right = ((held @ weight.T + bias).argmax(axis=1) == labels).mean()
        print(
            f"{name:38} {statistics.median(walls[name]):6.2f} s  {iterations:4} iterations  "
            f"gap {values[name] / best - 1:.1e}  top-1 {right:.4f}"
        )
    print(f"{'featcache, sweep of 20 values':38} {statistics.median(sweeps):6.2f} s")
    for kind in ("plain", "standardised"):
        pairs = zip(walls[f"scikit-learn, {kind}"], walls[f"featcache, {kind}"], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        print(f"{kind}: scikit-learn / featcache, median of {rounds}: {np.median(ratios):.1f}")


def blocks(cache: featcache.Cache) -> None:
    x, y = cache.train.features, cache.train.labels
    weight = np.random.default_rng(0).normal(size=(len(cache.class_names), x.shape[1])) * 0.05
    bias = np.zeros(len(weight))
    for rows in (250, 500, 1000, 2000, 4000, 8000, len(x)):
        objectives._BLOCK_BYTES = rows * 4 * (x.shape[1] + len(weight))
        walls = [timed(lambda: objective(weight, bias, [x], y, ExactRecipe()))[0] for _ in range(9)]
        print(f"{rows:6} rows: {1000 * statistics.median(walls):6.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", action="store_true")
    options = parser.parse_args()
    cache = featcache.load(options.cache)
    if options.blocks:
        blocks(cache)
    else:
        compare(cache, options.rounds)


if __name__ == "__main__":
    main()
