"""How the cost of every command grows with rows, dimensions and classes; docs/scaling.md.

    python benchmarks/scale.py [CIFAR10.zip] [--rows 1000 10000 100000 1000000]
        [--dims 64 256 1024] [--classes 10 100 1000] [--only "probe;k-NN"] [--longest 20]
        [--results docs/results] [--draw]

Each point runs in a process of its own, on drawn features: overlapping Gaussian classes whose
variances decay like those of real features. One number grows at a time, from 256 dimensions, 10
classes and 20,000 rows; the test split has 1,000 images. scikit-learn, and faiss where it is
installed, get the same arrays in memory. The next size is left out after a point that took more
than --longest seconds; --only measures some again and keeps the other points. With the zip of JPEGs
extraction is measured too, at 32 pixels. --draw only draws and prints what is there.

Prints processor seconds (of all threads), wall seconds and peak resident memory, and the exponent
of the processor time between the two largest sizes: 1 is linear, 2 quadratic. Writes scale.json and
scale.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARD, N_TEST = 16_384, 1000
BASE = {"rows": 20_000, "dims": 256, "classes": 10}
AXES = {"rows": "training images", "dims": "dimensions", "classes": "classes"}
PENALTY = 1e-4  # lambda of the probe: C = 1 / (N * lambda)
K = 20


def clouds(n: int, dim: int, n_classes: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows ``first`` to ``first + n``: float32 (n, D), int64 (n,)."""
    shape = np.geomspace(1, 0.03, dim).astype(np.float32)
    centres = np.random.default_rng(0).normal(size=(n_classes, dim)).astype(np.float32)
    generator = np.random.default_rng((0, first))
    labels = generator.permutation(np.arange(n) % n_classes)
    noise = generator.standard_normal((n, dim), dtype=np.float32)
    return (centres[labels] * 0.6 + noise) * shape + 1, labels


def make_cache(path: Path, n: int, n_test: int, dim: int, n_classes: int) -> Path:
    """Write a cache of so many drawn images, a shard at a time."""
    import featcache
    from featcache.preprocess import Preprocess
    from featcache.store.shards import ShardWriter
    from featcache.store.writer import encoded_ids

    meta = {
        "backbone": "resnet18",
        "class_names": [f"class {index}" for index in range(n_classes)],
        "created": "2026-01-01T00:00:00+00:00",
        "cuts": ["avgpool"],
        "dataset": "drawn",
        "dataset_digest": "0" * 64,
        "dataset_source": "drawn by benchmarks/scale.py",
        "device": "cpu",
        "dtype": "float32",
        "engine": "none",
        "engine_version": "0",
        "featcache_version": featcache.__version__,
        "precision": "f32",
        "preprocess": Preprocess(64).as_dict(),
        "views": ["identity"],
        "weights": "none",
        "weights_sha256": "0" * 64,
        "weights_source": "none",
    }
    writer = ShardWriter(path, meta)
    for role, total, offset in (("train", n, 0), ("test", n_test, 1 << 40)):
        for start in range(0, total, SHARD):
            stop = min(start + SHARD, total)
            features, labels = clouds(stop - start, dim, n_classes, offset + start)
            ids = encoded_ids(f"{role}/class/{row:08d}.jpg" for row in range(start, stop))
            arrays = {"features": features, "labels": labels, "ids": ids}
            writer.commit(role, start, stop, arrays, {})
    return writer.finish({})


# ---- what is measured; each runs in a process of its own


def probe(path: Path, folder: Path) -> None:
    import featcache

    featcache.probe(path, weight_decay=PENALTY, check=False, runs=folder)


def knn(path: Path, folder: Path) -> None:
    import featcache

    featcache.knn(path, ks=[K], runs=folder)


def audit(path: Path, folder: Path) -> None:
    import featcache

    featcache.audit(path)


def report(path: Path, folder: Path) -> None:
    import featcache

    featcache.report(path, output=folder / "report.html", runs=folder, health=False)


def search(path: Path, folder: Path) -> None:
    import featcache

    featcache.search(path, ["test/class/00000000.jpg"], k=10)


def extract(path: Path, folder: Path) -> None:
    import featcache

    zip_path, n = str(path).rsplit(":", 1)
    n_test = int(n) // 6
    featcache.extract(
        zip_path,
        weights="tinyimagenet32",
        size=32,
        output=folder / "made.h5",
        reuse=False,
        train_limit=int(n) - n_test,
        test_limit=n_test,
    )


def _arrays(path: Path) -> tuple[np.ndarray, ...]:
    import featcache

    cache = featcache.load(path)
    train, test = cache.train, cache.test
    return train.features, train.labels, test.features, test.labels


def sklearn_probe(path: Path, folder: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    x, y, other, truth = _arrays(path)
    head = LogisticRegression(C=1 / (len(x) * PENALTY), max_iter=2000).fit(x, y)
    head.score(other, truth)


def sklearn_knn(path: Path, folder: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    x, y, other, truth = _arrays(path)
    KNeighborsClassifier(K, metric="cosine", algorithm="brute").fit(x, y).score(other, truth)


def faiss_knn(path: Path, folder: Path) -> None:
    import faiss

    x, _, other, _ = _arrays(path)
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x / np.linalg.norm(x, axis=1, keepdims=True))
    index.search(other / np.linalg.norm(other, axis=1, keepdims=True), K)


JOBS = {
    "extract": extract,
    "probe": probe,
    "probe, scikit-learn": sklearn_probe,
    "k-NN": knn,
    "k-NN, scikit-learn": sklearn_knn,
    "k-NN, faiss": faiss_knn,
    "search": search,
    "audit": audit,
    "report": report,
}


def child(job: str, path: str) -> None:
    """Run one job, and print what it took, the reading of the features included."""
    with tempfile.TemporaryDirectory() as folder:
        started, before = time.perf_counter(), time.process_time()
        JOBS[job](Path(path), Path(folder))
        found = {
            "cpu_s": time.process_time() - before,
            "wall_s": time.perf_counter() - started,
            "peak_mib": peak_mib(),
        }
    print(json.dumps(found))


def peak_mib() -> float:
    """Return the peak resident memory; on Linux getrusage's begins with that of the parent."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_child(job: str, path: str) -> dict[str, Any] | None:
    command = [sys.executable, __file__, "--child", job, path]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        print(f"{job}: {(answer.stderr.strip() or 'killed').splitlines()[-1]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


# ---- the table, the figure


def measure(asked: argparse.Namespace, points: list[dict[str, Any]]) -> None:
    """Add a point for each job and size, or replace it."""
    chosen = [job for job in JOBS if job in asked.only] if asked.only else list(JOBS)
    sizes = {"rows": asked.rows, "dims": asked.dims, "classes": asked.classes}
    over: set[tuple[str, str]] = set()

    def add(axis: str, size: int, job: str, path: str) -> None:
        if (axis, job) in over:
            return
        found = in_child(job, path)
        if found is None or found["wall_s"] > asked.longest:
            over.add((axis, job))
        if found is not None:
            points[:] = [
                one for one in points if (one["axis"], one["size"], one["job"]) != (axis, size, job)
            ]
            points.append({"axis": axis, "size": size, "job": job, **found})
            print(f"{axis} {size:,}: {job}: {found['wall_s']:.2f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for axis, of_axis in sizes.items():
            for size in sorted(of_axis):
                shape = {**BASE, axis: size}
                path = Path(folder) / f"{axis}-{size}.h5"
                make_cache(path, shape["rows"], N_TEST, shape["dims"], shape["classes"])
                for job in chosen:
                    if job != "extract":
                        add(axis, size, job, str(path))
                path.unlink()
    for size in sorted(asked.rows):
        if asked.data and "extract" in chosen and size <= 60_000:
            add("rows", size, "extract", f"{asked.data}:{size}")


def exponents(points: list[dict[str, Any]], axis: str) -> dict[str, float]:
    """Return each job's exponent between its two largest sizes."""
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for point in points:
        if point["axis"] == axis:
            times[point["job"]][point["size"]] = point["cpu_s"]
    found = {}
    for job, of_sizes in times.items():
        if len(of_sizes) > 1:
            before, last = sorted(of_sizes)[-2:]
            found[job] = math.log(of_sizes[last] / of_sizes[before]) / math.log(last / before)
    return found


def show(points: list[dict[str, Any]]) -> None:
    for axis, words in AXES.items():
        slopes = exponents(points, axis)
        print(f"{words}; other sizes: {', '.join(f'{v:,} {k}' for k, v in BASE.items())}")
        for job in JOBS:
            cells = sorted(
                (one["size"], one) for one in points if (one["axis"], one["job"]) == (axis, job)
            )
            if cells:
                times = "  ".join(
                    f"{size:,}: {one['cpu_s']:.2f} s CPU, {one['wall_s']:.2f} s, "
                    f"{one['peak_mib']:,.0f} MiB"
                    for size, one in cells
                )
                slope = f"{slopes[job]:.2f}" if job in slopes else ""
                print(f"  {job:20} {slope:>5}  {times}")


def draw(points: list[dict[str, Any]], processor: str) -> Any:
    from featcache.reporting.style import SERIES, head, label_beside, sheet

    ours = [job for job in JOBS if "," not in job]
    colours = dict(zip(ours, SERIES, strict=False))
    panels = [
        *((axis, "cpu_s", "processor seconds") for axis in AXES),
        ("rows", "peak_mib", "peak MiB"),
    ]
    with sheet(6.4, 11) as figure:
        caption = (
            f"{processor}. Solid: featcache; dashed: scikit-learn; dotted: faiss, on the same "
            "features. Where not said otherwise 20,000 rows, 256 dimensions, 10 classes; 1,000 "
            "test images. At each line: the exponent between its last two sizes."
        )
        head(figure, "How the cost grows", caption)
        for axes, (axis, what, words) in zip(figure.subplots(len(panels), 1), panels, strict=True):
            slopes = exponents(points, axis)
            for job in JOBS:
                line = sorted(
                    (one["size"], one[what])
                    for one in points
                    if (one["axis"], one["job"]) == (axis, job)
                )
                if len(line) < 2:
                    continue
                base, _, peer = job.partition(", ")
                style = {"": "-", "scikit-learn": "--", "faiss": ":"}[peer]
                axes.plot(*zip(*line, strict=True), style, marker="o", ms=3, color=colours[base])
                if what == "cpu_s":
                    label_beside(axes, *line[-1], f"{job}: {slopes[job]:.1f}", colours[base])
                else:
                    label_beside(axes, *line[-1], job, colours[base])
            axes.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=words)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:g}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", nargs="?", help="a zip of JPEGs, to measure extraction")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--only", type=lambda names: names.split(";"), help="jobs, by ;")
    parser.add_argument("--longest", type=float, default=20)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(*asked.child)
        return
    from extract import processor

    from featcache.reporting.style import save_figure

    place = asked.results / "scale.json"
    known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {"points": []}
    if not asked.draw:
        known["processor"] = processor()
        measure(asked, known["points"])
        place.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    show(known["points"])
    save_figure(draw(known["points"], known["processor"]), asked.results / "scale.svg")


if __name__ == "__main__":
    main()
