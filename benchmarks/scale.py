"""How the exact probe scales with rows, dimensions and classes, up to a million rows.

    python benchmarks/scale.py --grid
    python benchmarks/scale.py [--rows 1000000] [--dim 512] [--classes 1000] [--tolerance 1e-2]
                               [--folder DIR] [--passes-only]

The features are random: overlapping Gaussian classes in float16, whose variances decay like those
of real features. The cache is written shard by shard and mapped, so that it need not fit in memory.
--grid times one pass (value and gradient of the objective) and one training at several sizes.
Otherwise a child process runs one training at the full size and reports passes, wall time, accuracy
and peak memory: VmHWM includes the mapped pages, RssAnon only what the process allocated.
--passes-only measures one pass and prints the time of 60.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import featcache
from featcache.preprocess import Preprocess
from featcache.probes.lbfgs import train_lbfgs
from featcache.probes.objective import objective
from featcache.probes.recipes import ExactRecipe
from featcache.store.shards import ShardWriter
from featcache.store.writer import encoded_ids

SHARD = 16_384


def clouds(n: int, dim: int, n_classes: int, first: int, seed: int = 0):
    """Draw rows ``first`` to ``first + n``: float16 (n, D), int64 (n,)."""
    shape = np.geomspace(1, 0.03, dim).astype(np.float32)
    centres = np.random.default_rng(seed).normal(size=(n_classes, dim)).astype(np.float32)
    generator = np.random.default_rng((seed, first))
    labels = generator.integers(n_classes, size=n)
    noise = generator.standard_normal((n, dim), dtype=np.float32)
    return ((centres[labels] * 0.6 + noise) * shape + 1).astype(np.float16), labels


def make_cache(path: Path, n: int, dim: int, n_classes: int) -> Path:
    """Write a cache of ``n`` training and 10,000 test images, a shard at a time."""
    meta = {
        "backbone": "resnet18",
        "class_names": [f"class {index}" for index in range(n_classes)],
        "cuts": ["avgpool"],
        "dataset_digest": "0" * 64,
        "device": "cpu",
        "dtype": "float16",
        "engine": "drawn",
        "engine_version": "1",
        "precision": "f32",
        "preprocess": Preprocess(224).as_dict(),
        "views": ["identity"],
        "weights_sha256": "0" * 64,
    }
    writer = ShardWriter(path, meta)
    for role, total, offset in (("train", n, 0), ("test", 10_000, 1 << 40)):
        for start in range(writer.done(role), total, SHARD):
            stop = min(start + SHARD, total)
            features, labels = clouds(stop - start, dim, n_classes, offset + start)
            ids = encoded_ids(f"{role}/{row:08d}" for row in range(start, stop))
            writer.commit(
                role, start, stop, {"features": features, "labels": labels, "ids": ids}, {}
            )
    return writer.finish({})


def grid() -> None:
    """Time a pass and a training at sizes that differ in one number each."""
    base = {"n": 50_000, "dim": 256, "n_classes": 50}
    cases = [base]
    for name, factor in (("n", 4), ("dim", 4), ("n_classes", 4)):
        cases += [{**base, name: base[name] // factor}, {**base, name: base[name] * factor}]
    print(f"{'rows':>9} {'dim':>5} {'classes':>7} {'a pass':>9} {'training':>9} {'passes':>6}")
    for case in cases:
        x, labels = clouds(**case, first=0)
        k, recipe = case["n_classes"], ExactRecipe()
        weight, bias = np.zeros((k, case["dim"])), np.zeros(k)
        walls = []
        for _ in range(3):
            started = time.perf_counter()
            objective(weight, bias, [x], labels, recipe)
            walls.append(time.perf_counter() - started)
        found = train_lbfgs([x], labels, k, recipe)
        state = "" if found.converged else "  not converged"
        print(
            f"{case['n']:9,} {case['dim']:5} {k:7,} {1000 * min(walls):6.0f} ms "
            f"{found.wall_s:7.2f} s {found.epochs:6}{state}",
            flush=True,
        )


def one_pass(path: str) -> None:
    """Time the value and gradient over all rows, mapped."""
    cache = featcache.load(path, mmap=True)
    shape = len(cache.class_names), cache.feature_dim
    started = time.perf_counter()
    objective(
        np.zeros(shape), np.zeros(shape[0]), [cache.train.features], cache.train.labels,
        ExactRecipe(),
    )  # fmt: skip
    wall = time.perf_counter() - started
    print(f"a pass: {wall:.1f} s; 60 passes would take {60 * wall / 60:.1f} min", flush=True)


# What the child process runs; its own, so that its peak is the training's.
TRAINING = """
import sys
import featcache
from featcache.probes.lbfgs import train_lbfgs
from featcache.probes.objective import predict
from featcache.probes.recipes import ExactRecipe

cache = featcache.load(sys.argv[1], mmap=True)
train, test = cache.train, cache.test
recipe = ExactRecipe(tolerance=float(sys.argv[2]))
found = train_lbfgs([train.features], train.labels, len(cache.class_names), recipe)
right = (predict(test.features, found.weight, found.bias) == test.labels).mean()
print(f"training: {found.wall_s:.1f} s, {found.epochs} passes, {found.steps} iterations, "
      f"converged {found.converged}, objective {found.objective:.4f}, top-1 {right:.4f}")
with open("/proc/self/status") as lines:
    print(*(" ".join(line.split()) for line in lines if line.startswith(("VmHWM", "Rss"))),
          sep=", ")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--folder", type=Path, help="for the cache, which is kept")
    parser.add_argument("--passes-only", action="store_true")
    options = parser.parse_args()
    if options.grid:
        grid()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        path = folder / f"scale-{options.rows}x{options.dim}x{options.classes}.h5"
        started = time.perf_counter()
        if not path.exists():
            path = make_cache(path, options.rows, options.dim, options.classes)
        cache = featcache.load(path, mmap=True)
        print(
            f"{cache!r}: {cache.size_bytes / 2**30:.2f} GiB, made in "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
        one_pass(str(path))
        if not options.passes_only:
            command = [sys.executable, "-c", TRAINING, str(path), str(options.tolerance)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
