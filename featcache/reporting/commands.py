"""The commands that make a cache or a run again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..backbones.architectures import BACKBONES
from ..backbones.naming import LIBRARIES, PRETRAINED, recorded_weights
from ..finetuning.recipes import FINETUNE_RECIPES
from ..probes.recipes import PROBE_RECIPES
from ..store.cache import Cache
from ..store.provenance import IMPORTED
from .pictures import dataset_place

_SOMEWHERE = "DATASET"  # where the path of the images is unknown


def shell(*words: object) -> str:
    """Return a command, quoted for a shell."""
    return shlex.join(str(word) for word in words)


def extract_command(meta: Mapping[str, Any], output: Path) -> str:
    """Return the command that makes a cache again."""
    if meta["backbone"] == IMPORTED:
        source = meta.get("dataset_source", "FEATURES")
        return shell("featcache", "import", source, "--output", output)
    words: list[object] = ["featcache", "extract", dataset_place(meta) or _SOMEWHERE]
    words += ["--backbone", _backbone(meta), *_weights(meta)]
    words += ["--size", meta["preprocess"]["size"], "--engine", meta["engine"]]
    for option, value, default in (
        ("--precision", meta.get("precision"), "f32"),
        ("--cut", ",".join(meta["cuts"]), "avgpool"),
        ("--dtype", meta.get("dtype"), "float32"),
        ("--views", "flips" if len(meta["views"]) > 1 else "none", "none"),
    ):
        if value is not None and value != default:
            words += [option, value]
    return shell(*words, "--output", output)


def run_command(record: Mapping[str, Any], cache: Cache | None) -> str | None:
    """Return the command that makes a run again; None for an unknown kind."""
    at = str(cache.path) if cache is not None else str(record.get("cache", "CACHE"))
    kind = record["kind"]
    if kind == "probe":
        return _probe_command(record, at, cache)
    if kind == "knn":
        words = ["--knn", record.get("k", ""), "--distance", record.get("distance", "cosine")]
        heat = record.get("temperature", 0.07)
        words += ["--temperature", "inf" if heat is None else heat]
        if record.get("shots") is not None:
            words += ["--shots", record["shots"], "--seeds", record.get("seeds", 5)]
        return shell("featcache", "probe", at, *_question(record), *words)
    if kind == "few-shot":
        # Where a point has no number of shots, all images were taken.
        shots = [point.get("shots") or "full" for point in record["points"]]
        words = ["--shots", ",".join(map(str, shots)), "--seeds", record.get("seeds", 5)]
        return shell("featcache", "probe", at, *words, *_of_curve(record))
    if kind == "learning-curve":
        words = ["--learning-curve", "--seeds", record.get("seeds", 5)]
        return shell("featcache", "probe", at, *words, *_of_curve(record))
    if kind == "finetune":
        return _finetune_command(record, cache)
    return None


def _of_curve(record: Mapping[str, Any]) -> list[object]:
    words = [*_question(record), "--metric", record["metric"]]
    words += ["--solver", record.get("solver", "lbfgs")]
    recipe = record.get("recipe")
    if isinstance(recipe, Mapping) and "weight_decay" in recipe:
        words += ["--weight-decay", recipe["weight_decay"]]
    return words


def _probe_command(record: Mapping[str, Any], at: str, cache: Cache | None) -> str:
    solver = record.get("solver", "lbfgs")
    words: list[object] = ["featcache", "probe", at, *_question(record), "--solver", solver]
    recipe = record.get("recipe")
    if solver == "sgd" and isinstance(recipe, Mapping):
        tutorial = asdict(PROBE_RECIPES["tutorial"])
        name = "tutorial" if recipe.get("whiten") == tutorial["whiten"] else "default"
        words += ["--recipe", name]
        words += _changed(recipe, asdict(PROBE_RECIPES[name]), _OF_SGD)
    if record.get("sweep"):
        words += ["--sweep"]
    elif solver != "sgd" and "C" in record:
        words += ["--C", f"{record['C']:.6g}"]
    for name, default in (("scale", "none"), ("metric", "top1"), ("seed", 0)):
        if record.get(name, default) != default:
            words += [f"--{name}", record[name]]
    words += _limits(record, cache)
    if record.get("test_cache") not in (None, record.get("cache")):
        words += ["--test-cache", record["test_cache"]]
    return shell(*words)


def _question(record: Mapping[str, Any]) -> list[object]:
    """Return the options that ask for other columns than the cache's own labels."""
    asked = record.get("question")
    words: list[object] = []
    for name, value in asked.items() if isinstance(asked, Mapping) else ():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", one]
    if record.get("class_weight") == "balanced":
        words += ["--class-weight", "balanced"]
    return words


def _finetune_command(record: Mapping[str, Any], cache: Cache | None) -> str:
    place = dataset_place(cache.meta) if cache is not None else None
    words: list[object] = ["featcache", "finetune", place or _SOMEWHERE]
    words += ["--method", record["method"]]
    if record.get("backbone"):
        words += ["--backbone", record["backbone"]]
    words += ["--weights", record["weights"], "--size", record["size"]]
    recipe = record.get("recipe")
    if isinstance(recipe, Mapping) and record["method"] in FINETUNE_RECIPES:
        words += _changed(recipe, asdict(FINETUNE_RECIPES[record["method"]]), _OF_FINETUNE)
    if record.get("cache"):
        words += ["--cache", record["cache"]]
    if record.get("init_head"):
        words += ["--init-head", record["init_head"]]
    if record.get("seed"):
        words += ["--seed", record["seed"]]
    return shell(*words, *_limits(record, cache))


_OF_SGD = {
    "epochs": "--epochs",
    "batch_size": "--batch-size",
    "lr": "--lr",
    "momentum": "--momentum",
    "schedule": "--schedule",
    "weight_decay": "--weight-decay",
}
_OF_FINETUNE = {
    "epochs": "--epochs",
    "batch_size": "--batch-size",
    "head_lr": "--lr",
    "backbone_lr": "--backbone-lr",
    "layer_decay": "--layer-decay",
    "freeze_until": "--freeze-until",
    "lora": "--lora",
    "bn": "--bn",
    "augment": "--augment",
    "schedule": "--schedule",
    "warmup": "--warmup",
    "label_smoothing": "--label-smoothing",
    "patience": "--patience",
    "val_fraction": "--val-fraction",
}


def _changed(
    recipe: Mapping[str, Any], default: Mapping[str, Any], options: Mapping[str, str]
) -> list[object]:
    """Return the options in which a recipe differs from its default."""
    words: list[object] = []
    for name, option in options.items():
        value = recipe.get(name, default[name])
        if value is not None and value != default[name]:
            words += [option, f"{value:.6g}" if isinstance(value, float) else value]
    return words


def _limits(record: Mapping[str, Any], cache: Cache | None) -> list[object]:
    """Return the options of a run on fewer images than the cache has."""
    if cache is None or record.get("question"):
        return []
    words: list[object] = []
    seen = record["n_train"] + (record.get("n_val") or 0)
    for option, used, split in (
        ("--train-limit", seen, cache.train),
        ("--test-limit", record["n_test"], cache.test),
    ):
        if used < int((split.labels >= 0).sum()):
            words += [option, used]
    return words


def _backbone(meta: Mapping[str, Any]) -> str:
    """Return a backbone's name, or the path or function that it came from."""
    name = str(meta["backbone"])
    named = name in BACKBONES or name.partition(":")[0] in LIBRARIES
    return name if named else str(meta.get("weights_source", name))


def _weights(meta: Mapping[str, Any]) -> list[object]:
    """Return the option that names a checkpoint, or the path that it came from."""
    name = str(meta.get("weights", "unnamed"))
    if name == PRETRAINED or _backbone(meta) != meta["backbone"]:
        return []
    return ["--weights", recorded_weights(name) or str(meta.get("weights_source", name))]
