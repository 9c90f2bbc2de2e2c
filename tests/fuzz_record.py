"""Records of runs that nobody wrote, read by `compare` and by all that a report says of them."""

from __future__ import annotations

import copy
import json
from functools import partial

from altered_json import alter_json, json_bytes

from featcache import compare
from featcache.errors import CacheError
from featcache.progress import silent
from featcache.reporting.commands import run_command
from featcache.reporting.judged import choose_probe
from featcache.reporting.page import View, lede, rows, tiles_of
from featcache.reporting.report import _drawers
from featcache.reporting.selection import select
from featcache.runs import load_runs, run_labels

_OF_ALL = {
    "run": "1",
    "created": "2026-01-01T00:00:00+00:00",
    "cache": "x.h5",
    "features_wall_s": 1.0,
    "dataset": "pets",
    "dataset_digest": "d" * 64,
    "backbone": "resnet18",
    "weights": "tinyimagenet32",
    "weights_sha256": "1" * 64,
    "size": 64,
    "engine": "fake",
    "device": "cpu",
    "wall_s": 2.0,
    "n_train": 100,
    "n_val": 10,
    "n_test": 50,
    "seed": 0,
    "target": "age",
    "question": {"target": "age", "where": ["a=1"]},
    "class_weight": "balanced",
}
_OF_ONE = {
    "top1": 0.9,
    "top1_interval": [0.8, 0.95],
    "n_epochs": 3,
    "images_per_s": 10.0,
    "cuts": ["avgpool", "layer4"],
    "head": "head.safetensors",
}
_EPOCHS = [{"epoch": n, "train_loss": 1.0, "top1": 0.5, "wall_s": 1.0} for n in (1, 2)]
_RECIPE = {"epochs": 3, "lr": 0.1, "batch_size": 8, "freeze_until": "layer2", "lora": 4}
_POINT = {"n_train": 3, "shots": 1, "mean": 0.5, "interval": [0.4, 0.6], "scores": [0.5, 0.5]}
RECORDS = {
    "probe": {
        **{**_OF_ALL, **_OF_ONE, "method": "probe lbfgs", "solver": "lbfgs", "C": 1.0},
        **{"scale": "none", "metric": "top1", "check": {"agreement": 1.0}, "test_cache": None},
        "sweep": {
            "C": 1.0,
            "n_holdout": 9,
            "at_edge": "",
            "points": [{"C": 0.1, "score": 0.5}, {"C": 1.0, "score": 0.6}],
        },
        "recipe": {**_RECIPE, "schedule": "cosine", "whiten": False},
    },
    "knn": {**_OF_ALL, **_OF_ONE, "method": "k-NN", "k": 3},
    "finetune": {
        **{**_OF_ALL, **_OF_ONE, "method": "full", "recipe": _RECIPE, "init_head": "h.safetensors"},
        **{"epochs": _EPOCHS, "curve_split": "test", "best_epoch": 2},
    },
    "few-shot": {
        **{**_OF_ALL, "method": "few-shot", "metric": "top1", "seeds": 2},
        "points": [_POINT, {**_POINT, "n_train": 9, "shots": None}],
    },
    "learning-curve": {
        **{**_OF_ALL, "method": "learning curve", "metric": "top1", "seeds": 2},
        "points": [_POINT, {**_POINT, "n_train": 9, "wall_s": 1.0}],
    },
    "multilabel": {**_OF_ALL, "method": "probe", "task": "labels", "map": 0.5, "names": ["a"]},
    "regression": {**_OF_ALL, "method": "ridge", "task": "numbers", "r2": 0.5, "mae": 1.0},
    "cross-validation": {**_OF_ALL, "method": "probe", "folds": 5, "mean": 0.5, "scores": [0.5]},
}
RECORDS = {kind: {**record, "kind": kind} for kind, record in RECORDS.items()}


def write(folder, records):
    """Write so many records, each in a folder of its own, and return the folder of all."""
    for number, data in enumerate(records):
        run = folder / "runs" / f"{number}"
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_bytes(
            data if isinstance(data, bytes) else json.dumps(data).encode()
        )
    return folder / "runs"


def with_field(kind, name, value, folder):
    return write(folder, [RECORDS["knn"], {**copy.deepcopy(RECORDS[kind]), name: value}])


SEEDS = {
    f"{kind} {name} {number}": partial(with_field, kind, name, value)
    for kind, name in (
        ("probe", "n_val"), ("probe", "wall_s"), ("probe", "top1"), ("probe", "C"),
        ("probe", "scale"), ("probe", "recipe"), ("probe", "sweep"), ("probe", "question"),
        ("finetune", "epochs"), ("finetune", "cuts"), ("few-shot", "points"), ("knn", "k"),
    )
    for number, value in enumerate(("x", 10**400, float("nan"), [], {}, None, "\0", "\x1b[2J"))
}  # fmt: skip


def alter(rng, folder):
    """Write a sound record and one that is altered."""
    record = copy.deepcopy(rng.choice(list(RECORDS.values())))
    alter_json(record, rng)
    return write(folder, [RECORDS["knn"], json_bytes(record, rng)])


def read(path):
    """Read the folder as `compare` and `report` do, and check that the sound one is there."""
    records, problems = load_runs(path)
    assert len(records) + len(problems) == 2 and records[0]["kind"] == "knn"
    assert all(len(problem) < 2000 and problem.isprintable() for problem in problems), problems
    compared = compare(runs=path)
    compared._repr_html_()
    run_labels(compared)
    runs = [path / record["run"] for record in records]
    for group in select(runs, path, silent)[0]:
        view = View("d1", group.dataset, lede(group), ())
        view.probe = probe = choose_probe(group)
        for draw in _drawers(view, group).values():
            draw()
        rows(group)
        tiles_of(group, probe, None, None)
        for run in group.runs:
            run_command(run.record, None)
    if problems:  # which the commands print as notes
        raise CacheError(problems[0])
