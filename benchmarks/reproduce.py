"""The tutorial's experiment, whole: every method on CIFAR-10, a record for each run, one table.

    python benchmarks/reproduce.py CIFAR10.zip [--only probe,full …] [--work FOLDER] [--table]

CIFAR10.zip holds train/ and test/ with class folders; ``cifar10`` downloads the original archive.
Runs what has no record yet, each run in a process of its own; killed, the same command goes on
where it was, in the middle of a training too. What needs an engine that is not installed here is
named and left out: OneFlow and PyTorch may be in two environments, used one after the other with
the same ``--work``. Records go to docs/results/WEIGHTS-SIZE, with a table and a figure of them all.

The starter weights at 64 px, as in the README, take about two hours on two cores. The tutorial's
own experiment, for a machine with a network and a GPU:

    python benchmarks/reproduce.py cifar10 --weights imagenet --size 224

It publishes, after three epochs on all images: everything trained 90.17 %, from scratch 49.57 %
(OneFlow, "Transfer Learning in Computer Vision"). Of a linear head it says nothing. Those are the
figures to expect within a point or two: it trains its epochs 2 and 3 with batch normalisation in
eval mode, which is not repeated here (docs/design.md).
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
PART = 10_000  # training images where all would take OneFlow hours on a processor


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    title: str
    kind: str  # features, probe, knn or finetune
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: str = ""  # that it must have, where it is not any
    n_train: int | None = None
    seeds: int = 1
    views: str = "none"  # of the features
    head_of: str = ""  # the row whose head it begins with


def _tuned(
    name: str, title: str, engine: str, *place: int | None, head_of: str = "", **options: Any
) -> Row:
    """Return a row of `featcache.finetune`; ``place`` is the images and the seeds."""
    return Row(name, title, "finetune", options, engine, *place, head_of=head_of)


EXACT = "linear probe, exact, C by a sweep"
FULL = "method 1: train everything"
SPLIT = "method 2: backbone at a tenth"
FROZEN = "method 3 end to end: frozen backbone"
LP_FT = "from the probe's head, gently (LP-FT)"
# As `featcache.fit` trains from a probe's head, but for its early stopping: every row has 3 epochs.
GENTLY: dict[str, Any] = {"method": "full", "lr": 1e-4, "bn": "eval", "schedule": "cosine"}
SGD = {"solver": "sgd", "check": False}
METHOD_3 = {"recipe": "tutorial", "check": False}
PLAN = (
    Row("features", "the backbone, once", "features"),
    Row("features-flips", "the same over four flip views", "features", views="flips"),
    Row("probe", EXACT, "probe"),
    Row("knn", "10 nearest neighbours", "knn"),
    Row("probe-sgd", "linear probe, SGD to the optimum", "probe", SGD, "oneflow", seeds=3),
    Row(
        "probe-tutorial",
        "method 3 on the cache: SGD over flips",
        "probe",
        METHOD_3,
        "oneflow",
        seeds=3,
        views="flips",
    ),
    _tuned("frozen", FROZEN, "torch", method="frozen"),
    _tuned("full", FULL, "torch", method="full"),
    _tuned("split", SPLIT, "torch", method="split"),
    _tuned("lp-ft", LP_FT, "torch", head_of="probe", **GENTLY),
    _tuned("scratch", "from scratch", "torch", method="scratch"),
    Row("probe-part", EXACT, "probe", n_train=PART),
    _tuned("full-part", FULL, "oneflow", PART, method="full"),
    _tuned("full-part-torch", FULL, "torch", PART, 3, method="full"),
    _tuned("frozen-part", FROZEN, "oneflow", PART, method="frozen"),
    _tuned("split-part", SPLIT, "oneflow", PART, method="split"),
    _tuned("lp-ft-part", LP_FT, "oneflow", PART, head_of="probe-part", **GENTLY),
    _tuned("scratch-part", "from scratch", "oneflow", PART, method="scratch"),
    _tuned("scratch-part-long", "from scratch", "torch", PART, method="scratch", epochs=12),
)
ROWS = {row.name: row for row in PLAN}


class Experiment:
    """One data set and one backbone: where their features, runs and records are."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.data = options.data
        self.weights = options.weights
        self.size = options.size
        self.limit = options.images
        self.precision = options.precision
        self.work = options.work
        named = f"{Path(self.weights).stem}-{self.size}"
        self.results = options.results or ROOT / "docs" / "results" / named

    def place(self, row: Row, seed: int) -> Path:
        """Return where the record of a run is, or will be."""
        return self.results / f"{row.name}-{seed}.json"

    def records(self) -> Records:
        """Return the records that there are, by row, in the table's order."""
        found = {
            row.name: [
                json.loads(self.place(row, seed).read_text(encoding="utf-8"))
                for seed in range(row.seeds)
                if self.place(row, seed).exists()
            ]
            for row in PLAN
        }
        return {name: records for name, records in found.items() if records}

    def run(self, row: Row, seed: int) -> None:
        """Do one run, and write its record."""
        record = self._extract(row) if row.kind == "features" else self._train(row, seed)
        used = resource.getrusage(resource.RUSAGE_SELF)
        # What an earlier sitting of the run used is not known any more.
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
            on_progress=_told(),
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
        common: dict[str, Any] = {"runs": runs, "on_progress": _told()}
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
                on_note=lambda note: _say(f"  {note}"),
                **row.options,
                **limits,
                **common,
            )
        newest = max(runs.glob("*/run.json"))  # their names begin with the time
        record: dict[str, Any] = json.loads(newest.read_text(encoding="utf-8"))
        return record

    def _at_most(self, n: int | None) -> int | None:
        return min((one for one in (n, self.limit) if one is not None), default=None)

    def _head(self, name: str) -> Path:
        found = sorted((self.work / f"{name}-0").glob("*/head.safetensors"))
        if not found:
            raise SystemExit(f"expected the head of row {name}, found none; run that row first")
        return found[-1]


# What a record keeps: what was asked for, what was found, what computed; no paths.
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


def _told() -> Any:
    """Return a listener that prints a line of progress every half minute."""
    last = [time.perf_counter()]

    def hear(message: Any) -> None:
        now = time.perf_counter()
        if now - last[0] > 30:
            last[0] = now
            _say(f"  {message.stage} {message.done:,}/{message.total:,} {message.note}")

    return hear


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def missing(experiment: Experiment, only: list[str]) -> Iterator[tuple[Row, int]]:
    """Yield the runs without a record that can be done here; name the others."""
    for row in PLAN:
        if only and row.name not in only:
            continue
        seeds = [seed for seed in range(row.seeds) if not experiment.place(row, seed).exists()]
        if seeds and row.engine and importlib.util.find_spec(row.engine) is None:
            _say(f"{row.name}: left out, {row.engine} is not installed here")
            continue
        for seed in seeds:
            yield row, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a zip or folder of train/ and test/, or cifar10")
    parser.add_argument("--weights", default="tinyimagenet32")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--precision", default="bf16", help="of PyTorch; OneFlow has f32")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--work", type=Path, default=Path("reproduce"), help="features and runs")
    parser.add_argument("--results", type=Path, help="records; by default in docs/results")
    parser.add_argument("--images", type=int, help="so many at most of either split: for a trial")
    parser.add_argument("--table", action="store_true", help="write the page anew, run nothing")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    experiment = Experiment(options)
    if options.run:
        name, _, seed = options.run.rpartition("-")
        try:
            experiment.run(ROWS[name], int(seed))
        except KeyboardInterrupt as stopped:
            _say(f"{stopped}")
            sys.exit(130)
        return
    only = [name for name in options.only.split(",") if name]
    unknown = [name for name in only if name not in ROWS]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(ROWS)}, found {', '.join(unknown)}")
    experiment.work.mkdir(parents=True, exist_ok=True)
    for row, seed in [] if options.table else missing(experiment, only):
        _say(f"{row.name}, seed {seed}")
        command = [sys.executable, __file__, *sys.argv[1:], "--run", f"{row.name}-{seed}"]
        try:
            if subprocess.run(command).returncode:
                sys.exit(f"{row.name}, seed {seed}: not done; the same command goes on there")
        except KeyboardInterrupt:
            sys.exit(130)
        write_page(experiment.results, experiment.records())
    write_page(experiment.results, experiment.records())
    print(table(experiment.records()), end="")


if __name__ == "__main__":
    main()
