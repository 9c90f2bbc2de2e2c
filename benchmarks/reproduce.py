"""The tutorial's experiment: every method on CIFAR-10, a record of each run, one table.

    python benchmarks/reproduce.py CIFAR10.zip [--only probe,full …] [--work FOLDER] [--table]

CIFAR10.zip holds train/ and test/ with class folders; ``cifar10`` downloads the original archive.
The script runs every row that has no record yet, each in a process of its own. After a kill, the
same command resumes, even in the middle of a training run. It skips and names rows whose engine is
not installed: OneFlow and PyTorch may be in two environments, used one after the other with the
same ``--work``. Records go to docs/results/WEIGHTS-SIZE, with a table and a figure.

The starter weights at 64 px, as in the README, take hours on two cores. The tutorial's own
experiment, for a machine with a network and a GPU:

    python benchmarks/reproduce.py cifar10 --weights imagenet --size 224

The tutorial (OneFlow, "Transfer Learning in Computer Vision") reports 90.17 % after three epochs
on all images with all layers trained, and 49.57 % from scratch; it has no figure for a linear head.
Expect to match these within a point or two: the tutorial trains its epochs 2 and 3 with batch
normalisation in eval mode, which is not repeated here (docs/design.md).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results import Records, table, write_page

ROOT = Path(__file__).resolve().parents[1]
PART = 10_000  # training images, where all 50,000 would take OneFlow hours on a CPU


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    title: str
    kind: str  # features, probe, knn or finetune
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: str = ""  # the engine it requires, if any
    n_train: int | None = None
    seeds: int = 1
    views: str = "none"  # of the features
    head_of: str = ""  # the row whose head it starts from


def _tuned(
    name: str, title: str, engine: str, *place: int | None, head_of: str = "", **options: Any
) -> Row:
    """Return a row of `featcache.finetune`; ``place`` is the images and the seeds."""
    return Row(name, title, "finetune", options, engine, *place, head_of=head_of)


EXACT = "linear probe, exact, C from a sweep"
FULL = "method 1: train all layers"
SPLIT = "method 2: backbone at 0.1 x the learning rate"
FROZEN = "method 3 end to end: frozen backbone"
LP_FT = "LP-FT: all layers, from the probe's head"
# As `featcache.fit` takes small steps, at one rate and without early stopping: 3 epochs.
LP_FT_OPTIONS: dict[str, Any] = {"method": "full", "lr": 1e-4, "bn": "eval", "schedule": "cosine"}
# A fine-tune with time: no vertical flips, shifted crops, ten times the tutorial's rate, falling to
# 0. On 2,000 training images that the row leaves out, 0.01 was far better than 0.001, and 0.03 a
# little better still, but that is much for weights that are better than these.
LONG = "LP-FT with crops, a higher and falling rate"
LONG_LP_FT: dict[str, Any] = {
    "method": "full",
    "augment": "crop-flip",
    "lr": 0.01,
    "schedule": "cosine",
    "epochs": 6,
}
SGD = {"solver": "sgd", "check": False}
METHOD_3 = {"recipe": "tutorial", "check": False}
PLAN = (
    Row("features", "extraction: the backbone runs once", "features"),
    Row("features-flips", "extraction of four flip views", "features", views="flips"),
    Row("probe", EXACT, "probe"),
    Row("knn", "10 nearest neighbours", "knn"),
    Row("probe-sgd", "linear probe, SGD to the optimum", "probe", SGD, "oneflow", seeds=3),
    Row(
        "probe-tutorial",
        "method 3 from the cache: SGD on flip views",
        "probe",
        METHOD_3,
        "oneflow",
        seeds=3,
        views="flips",
    ),
    _tuned("frozen", FROZEN, "torch", method="frozen"),
    _tuned("full", FULL, "torch", method="full"),
    _tuned("split", SPLIT, "torch", method="split"),
    _tuned("lp-ft", LP_FT, "torch", head_of="probe", **LP_FT_OPTIONS),
    _tuned("lp-ft-long", LONG, "torch", head_of="probe", **LONG_LP_FT),
    _tuned("scratch", "from scratch", "torch", method="scratch"),
    Row("probe-part", EXACT, "probe", n_train=PART),
    _tuned("full-part", FULL, "oneflow", PART, method="full"),
    _tuned("full-part-torch", FULL, "torch", PART, 3, method="full"),
    _tuned("frozen-part", FROZEN, "oneflow", PART, method="frozen"),
    _tuned("split-part", SPLIT, "oneflow", PART, method="split"),
    _tuned("lp-ft-part", LP_FT, "oneflow", PART, head_of="probe-part", **LP_FT_OPTIONS),
    _tuned("lp-ft-part-long", LONG, "torch", PART, head_of="probe-part", **LONG_LP_FT),
    _tuned("scratch-part", "from scratch", "oneflow", PART, method="scratch"),
    _tuned("scratch-part-long", "from scratch", "torch", PART, method="scratch", epochs=12),
)
ROWS = {row.name: row for row in PLAN}


class Experiment:
    """The features, runs and records of one data set and one backbone."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.data = options.data
        self.weights = options.weights
        self.size = options.size
        self.limit = options.images
        self.precision = options.precision
        self.work = options.work
        name = f"{Path(self.weights).stem}-{self.size}"
        self.results = options.results or ROOT / "docs" / "results" / name

    def place(self, row: Row, seed: int) -> Path:
        """Return the path of the record of a run."""
        return self.results / f"{row.name}-{seed}.json"

    def records(self) -> Records:
        """Return the existing records by row, in the order of the table."""
        records = {
            row.name: [
                json.loads(self.place(row, seed).read_text(encoding="utf-8"))
                for seed in range(row.seeds)
                if self.place(row, seed).exists()
            ]
            for row in PLAN
        }
        return {name: runs for name, runs in records.items() if runs}

    def run(self, row: Row, seed: int) -> None:
        """Do one run, and write its record."""
        record = self._extract(row) if row.kind == "features" else self._train(row, seed)
        used = resource.getrusage(resource.RUSAGE_SELF)
        # The processor time that a resumed run used before is unknown.
        whole = not record.get("resumed")
        record["processor_s"] = used.ru_utime + used.ru_stime if whole else None
        place = self.place(row, seed)
        place.parent.mkdir(parents=True, exist_ok=True)
        record |= {"title": row.title, "kind": row.kind}
        place.write_text(json.dumps(_portable(record), indent=1) + "\n", encoding="utf-8")

    def _features(self, views: str) -> Path:
        return self.work / f"features-{views}.h5"

    def _extract(self, row: Row) -> dict[str, Any]:
        import featcache
        from featcache.runs import cache_facts

        made = featcache.extract(
            self.data,
            weights=self.weights,
            size=self.size,
            views=row.views,
            train_limit=self.limit,
            test_limit=self.limit,
            output=self._features(row.views),
            reuse=False,
            on_progress=_progress(),
        )
        cache = featcache.load(made.cache)
        return {
            "kind": "features",
            **cache_facts(cache),
            "n_train": len(cache.train.labels),
            "n_test": len(cache.test.labels),
            "views": list(cache.views),
            "wall_s": made.wall_s,
            "images_per_s": made.images_per_s,
            "precision": cache.meta["precision"],
        }

    def _train(self, row: Row, seed: int) -> dict[str, Any]:
        import featcache

        runs = self.work / f"{row.name}-{seed}"
        limits = {"train_limit": self._at_most(row.n_train), "test_limit": self.limit}
        common: dict[str, Any] = {"runs": runs, "on_progress": _progress()}
        if row.kind == "knn":
            featcache.knn(self._features(row.views), ks=[10], **common)
        elif row.kind == "probe":
            cache = self._features(row.views)
            featcache.probe(cache, seed=seed, **row.options, **limits, **common)
        else:
            head = self._head(row.head_of) if row.head_of else None
            featcache.finetune(
                self.data,
                weights=self.weights,
                size=self.size,
                engine=row.engine,
                precision=self.precision if row.engine == "torch" else "f32",
                init_head=head,
                seed=seed,
                resume=_unfinished(runs),
                on_note=lambda note: _print(f"  {note}"),
                **row.options,
                **limits,
                **common,
            )
        newest = max(runs.glob("*/run.json"))  # folder names start with the time
        record: dict[str, Any] = json.loads(newest.read_text(encoding="utf-8"))
        return record

    def _at_most(self, n: int | None) -> int | None:
        return min((one for one in (n, self.limit) if one is not None), default=None)

    def _head(self, name: str) -> Path:
        heads = sorted((self.work / f"{name}-0").glob("*/head.safetensors"))
        if not heads:
            raise SystemExit(f"expected the head of row {name}, found none; run that row first")
        return heads[-1]


# The fields that a record keeps: options, results and engine, but no paths.
KEPT = (
    "title", "kind", "method", "created", "dataset", "dataset_digest", "n_train", "n_test",
    "backbone", "weights", "weights_sha256", "size", "views", "seed", "recipe", "solver", "C",
    "weight_decay", "k", "check", "top1", "top1_interval", "epochs", "n_epochs", "images_per_s",
    "wall_s", "features_wall_s", "processor_s", "engine", "engine_version", "device", "precision",
    "resumed", "run",
)  # fmt: skip


def _portable(record: Mapping[str, Any]) -> dict[str, Any]:
    import featcache

    kept = {name: record[name] for name in KEPT if name in record}
    return {**kept, "featcache": featcache.__version__}


def _unfinished(runs: Path) -> bool:
    return any(not (one.parent / "run.json").exists() for one in runs.glob("*/checkpoint.*"))


def _progress() -> Any:
    """Return an `on_progress` that prints a line every half minute."""
    last = [time.perf_counter()]

    def report(message: Any) -> None:
        now = time.perf_counter()
        if now - last[0] > 30:
            last[0] = now
            _print(f"  {message.stage} {message.done:,}/{message.total:,} {message.note}")

    return report


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def missing(experiment: Experiment, only: list[str]) -> Iterator[tuple[Row, int]]:
    """Yield the runs without a record; skip and name those that cannot run here."""
    for row in PLAN:
        if only and row.name not in only:
            continue
        seeds = [seed for seed in range(row.seeds) if not experiment.place(row, seed).exists()]
        if seeds and row.engine and importlib.util.find_spec(row.engine) is None:
            _print(f"{row.name}: skipped, {row.engine} is not installed")
            continue
        for seed in seeds:
            yield row, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a zip or folder of train/ and test/, or cifar10")
    parser.add_argument("--weights", default="tinyimagenet32")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--precision", default="bf16", help="precision of PyTorch; OneFlow has f32")
    parser.add_argument("--only", default="", help=f"rows to run, of {', '.join(ROWS)}")
    parser.add_argument(
        "--work", type=Path, default=Path("reproduce"), help="for features and runs"
    )
    parser.add_argument("--results", type=Path, help="for records; by default in docs/results")
    parser.add_argument("--images", type=int, help="limit of images per split, for a trial")
    parser.add_argument("--table", action="store_true", help="only rewrite the page")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    experiment = Experiment(options)
    if options.run:
        name, _, seed = options.run.rpartition("-")
        try:
            experiment.run(ROWS[name], int(seed))
        except KeyboardInterrupt as stopped:
            _print(f"{stopped}")
            sys.exit(130)
        return
    only = [name for name in options.only.split(",") if name]
    unknown = [name for name in only if name not in ROWS]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(ROWS)}, found {', '.join(unknown)}")
    experiment.work.mkdir(parents=True, exist_ok=True)
    for row, seed in [] if options.table else missing(experiment, only):
        _print(f"{row.name}, seed {seed}")
        command = [sys.executable, __file__, *sys.argv[1:], "--run", f"{row.name}-{seed}"]
        try:
            if subprocess.run(command).returncode:
                sys.exit(f"{row.name}, seed {seed}: failed; the same command resumes there")
        except KeyboardInterrupt:
            sys.exit(130)
        write_page(experiment.results, experiment.records())
    write_page(experiment.results, experiment.records())
    print(table(experiment.records()), end="")


if __name__ == "__main__":
    main()
