"""The speed of the exact probe and of scikit-learn's LogisticRegression on the same features.

    python benchmarks/probe.py CACHE [--rounds 3]
    python benchmarks/probe.py CACHE --memory
    python benchmarks/probe.py CACHE --frozen CIFAR10.zip
    python benchmarks/probe.py CACHE --blocks

CACHE holds features of CIFAR-10 (featcache extract … --weights tinyimagenet32). In turn, in one
process: scikit-learn with its defaults and the given C; scikit-learn on standardised features, with
its defaults and at a matched tolerance; featcache's L-BFGS to a relative gap of 1e-6 on plain and
standardised features; one sweep. Prints the median wall time of each, the gap of each
objective to the best one, and top-1.

--memory measures, each in a child process, how much memory a probe with its sweep needs beyond
importing and opening, in units of the float32 training features.
--frozen times the tutorial's 3 epochs of SGD on the cache, and the same end to end with a frozen
backbone on a few hundred images, of which one epoch is extrapolated to the whole data set.
--blocks times one evaluation of the objective at several block sizes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from sklearn.linear_model import LogisticRegression

import featcache
from featcache.probes import blocks
from featcache.probes.lbfgs import train_lbfgs
from featcache.probes.objective import objective
from featcache.probes.recipes import ExactRecipe
from featcache.probes.scaling import Scaling
from featcache.probes.sweep import divide, sweep


def timed(work):
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


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
        sweeps.append(timed(lambda: sweep(divide([x], y), n_classes, recipe))[0])
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
    print(f"{'featcache, sweep':38} {statistics.median(sweeps):6.2f} s")
    for theirs in (name for name in contenders if name.startswith("scikit-learn")):
        ours = "featcache, plain" if theirs.endswith("plain") else "featcache, standardised"
        ratios = [one / other for one, other in zip(walls[theirs], walls[ours], strict=True)]
        least, median = min(walls[theirs]) / min(walls[ours]), np.median(ratios)
        print(f"{theirs} / {ours}: median {median:.1f}, of the least {least:.1f} ({rounds} rounds)")


def block_sizes(cache: featcache.Cache) -> None:
    x, y = cache.train.features, cache.train.labels
    weight = np.random.default_rng(0).normal(size=(len(cache.class_names), x.shape[1])) * 0.05
    bias = np.zeros(len(weight))
    for rows in (250, 500, 1000, 2000, 4000, 8000, len(x)):
        blocks.block_rows = lambda _, rows=rows: rows
        walls = [timed(lambda: objective(weight, bias, [x], y, ExactRecipe()))[0] for _ in range(9)]
        print(f"{rows:6} rows: {1000 * statistics.median(walls):6.1f} ms")


# What the child process of --memory runs: prints how far its peak rose, in bytes.
MEMORY = """
import sys
import featcache
from featcache.probes.probe import probe
import scipy.optimize, sklearn.model_selection

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

cache = featcache.load(sys.argv[1], mmap=sys.argv[3] == "mapped")
cache.train.labels, cache.test.labels
before = status("VmRSS")
options = {"sweep": False, "C": 0.03} if sys.argv[4] == "one C" else {}
featcache.probe(cache, scale=sys.argv[2], check=sys.argv[5] == "check", runs=sys.argv[6], **options)
print(status("VmHWM") - before, status("RssFile"))
"""


def memory(path: str) -> None:
    cache = featcache.load(path)
    n, dim = len(cache.train), cache.feature_dim
    features = 4 * n * dim * len(cache.views)
    test = 4 * len(cache.test) * dim
    print(f"training features {features / 2**20:.0f} MiB, test features {test / 2**20:.0f} MiB")
    for case in (
        ("none", "read", "sweep", "no check"),
        ("standardize", "read", "sweep", "no check"),
        ("l2", "read", "sweep", "no check"),
        ("none", "mapped", "sweep", "no check"),
        ("none", "read", "one C", "check"),
        ("standardize", "read", "sweep", "check"),
    ):
        with tempfile.TemporaryDirectory() as runs:
            command = [sys.executable, "-c", MEMORY, path, *case, runs]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
        rise, mapped = map(int, answer.stdout.split())
        print(
            f"{', '.join(case):38} {rise / 2**20:6.0f} MiB above the start: {rise / features:.2f} "
            f"times the features (files in memory, mapped and libraries: {mapped / 2**20:.0f} MiB)"
        )


def frozen(path: str, zip_path: str, n_images: int = 256) -> None:
    from featcache.datasets.dataset import Dataset
    from featcache.sampling import stratified_rows

    cache, data = featcache.load(path), featcache.load_dataset(zip_path)
    size = cache.meta["preprocess"]["size"]
    train = data.train.take(stratified_rows(data.train.labels, n_images, 0, "train"))
    test = data.test.take(stratified_rows(data.test.labels, 20, 0, "test"))
    with tempfile.TemporaryDirectory() as runs:
        cached = min(
            featcache.probe(cache, recipe="tutorial", check=False, runs=runs).wall_s
            for _ in range(3)
        )
        walls = []
        for epochs in (1, 3):  # the difference is two epochs, without the start
            started = time.perf_counter()
            featcache.finetune(
                Dataset(data.name, train, test, "a part"), "frozen",
                weights=cache.meta["weights"], size=size, epochs=epochs, runs=runs,
            )  # fmt: skip
            walls.append(time.perf_counter() - started)
    rate = 2 * n_images / (walls[1] - walls[0])
    epoch = len(cache.train) / rate
    print(
        f"SGD, 3 epochs on the cache: {cached:.2f} s; frozen end to end: {rate:.0f} images per s "
        f"on {n_images} images, so one epoch of {len(cache.train):,} would take {epoch:.0f} s "
        f"(extrapolated): {epoch / cached:.0f} times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--frozen", metavar="CIFAR10.zip")
    options = parser.parse_args()
    if options.memory:
        memory(options.cache)
        return
    if options.frozen:
        frozen(options.cache, options.frozen)
        return
    cache = featcache.load(options.cache)
    if options.blocks:
        block_sizes(cache)
    else:
        compare(cache, options.rounds)


if __name__ == "__main__":
    main()
