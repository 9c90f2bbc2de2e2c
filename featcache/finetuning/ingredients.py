"""What a run needs, checked before the long work starts: images or cached features, and weights."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones.architectures import BACKBONES, RANDOM, check_resnet_size
from ..backbones.choice import EngineChoice
from ..backbones.loading import load_weights
from ..backbones.naming import (
    PRETRAINED,
    WEIGHT_NAMES,
    BackboneName,
    parse_backbone,
    recorded_backbone,
    recorded_weights,
)
from ..backbones.network import POOLED
from ..backbones.weights import Weights
from ..datasets.dataset import Dataset, Split
from ..datasets.loading import load_dataset
from ..errors import (
    CacheMismatchError,
    CacheMissError,
    DatasetError,
    EngineUnavailableError,
    RecipeError,
    WeightsError,
)
from ..prediction import checked_head
from ..preprocess import Preprocess
from ..probes.ingredients import feature_differences
from ..progress import OnNote, OnProgress
from ..sampling import LIMIT_SEED, row_batches, stratified_rows, validation_rows
from ..store.cache import Cache, CachedSplit, load
from .batches import AUGMENT_VIEWS, CachedSource, ImageSource, Source
from .framework import choose_trainer
from .network import HeadArrays
from .recipes import FinetuneOptions, check_resnet_recipe, frozen_cut

_FEW_STEPS = 1_000  # too few to recover from a head on other statistics: 69 steps cost 6 points
_BOLD_RATE = 0.01  # at which it takes few: 90 steps end 1 point above the probe (digits, the demo)
# A cache up to this size is read whole and verified by its checksums; a larger one is mapped.
_READ_BYTES = 1 << 30

AnyDataset = str | Path | Dataset | None


@dataclass(frozen=True, eq=False)
class Ingredients:
    """What a run needs."""

    weights: Weights  # where the backbone starts
    backbone: str  # as `load_weights` takes it
    class_names: tuple[str, ...]  # in label order
    train: Source
    val: Source | None  # None without ``patience``
    test: Source
    head: HeadArrays | None  # where the head starts: float32 (K, D) and (K,)
    choice: EngineChoice
    identity: dict[str, Any]  # all that changes the outcome, as JSON types: equal on a resume
    facts: dict[str, Any]  # what the record says about data and weights
    cache: Path | None  # where features come from


def gather(
    dataset: AnyDataset,
    options: FinetuneOptions,
    processes: int,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Ingredients:
    """Find and check everything; raises the errors that `featcache.finetune` lists."""
    recipe = options.recipe
    cache = None if options.cache is None else load(options.cache)
    backbone = _backbone(options, cache)
    parsed = parse_backbone(backbone)
    check_trainable(parsed, options.engine)
    if parsed.kind == "resnet":
        check_resnet_recipe(recipe, backbone)
    library = parsed.kind != "resnet"
    choice = choose_trainer(options.engine, options.device, options.precision, library=library)
    on_note(choice.why)
    data: _ImageData | _CachedData
    if cache is not None:
        data = _CachedData(cache, dataset, options, choice, backbone, on_progress, on_note)
    else:
        data = _ImageData(dataset, options, backbone, on_progress)
    moves_statistics = recipe.bn == "train" and recipe.backbone_lr is not None
    if data.weights.network is not None:
        if "torch" not in data.weights.engines:
            raise _untrainable(data.weights.backbone)
        from .model_network import check_model_recipe, has_statistics

        check_model_recipe(data.weights, recipe)
        moves_statistics &= recipe.lora is None and has_statistics(data.weights)
    head, head_digest = _start_head(options, data.weights, data.class_names)
    rows = {
        role: _limited(labels, limit, f"{data.name} {role}")
        for role, labels, limit in (
            ("train", data.labels("train"), options.train_limit),
            ("test", data.labels("test"), options.test_limit),
        )
    }
    val_rows = None
    if recipe.patience is not None:
        labels = data.labels("train")[rows["train"]]
        held_out = validation_rows(labels, recipe.val_fraction, options.seed)
        val_rows = rows["train"][held_out]
        rows["train"] = np.delete(rows["train"], held_out)
    _check_enough(data.labels("train")[rows["train"]], data.class_names, data.name)
    n_steps = recipe.epochs * len(list(row_batches(len(rows["train"]), recipe.batch_size)))
    if head is not None and moves_statistics and recipe.head_lr < _BOLD_RATE:
        note = (
            "the head was trained with batch normalisation's running statistics, and this run "
            f"uses those of its batches, for {n_steps:,} step{'s' * (n_steps != 1)}: add --bn eval "
            "--lr 1e-4 to start where the probe ended"
        )
        on_note(f"warning: {note}" if n_steps < _FEW_STEPS else note)
    pretrained = recipe.pretrained
    made_by: dict[str, Any] = {}
    if data.weights.network is not None:
        preprocess = data.weights.preprocess.as_dict()
        made_by = {"library": data.weights.library, "preprocess": preprocess}
    identity = {
        "method": options.method,
        **{f"recipe {name}": getattr(recipe, name) for name in recipe.__dataclass_fields__},
        "backbone": data.weights.backbone,
        "dataset digest": data.digest,
        "weights sha256": data.weights.sha256 if pretrained else None,
        "size": data.weights.preprocess.size,
        "engine": choice.name,
        "device": choice.device,
        "precision": choice.precision,
        "seed": options.seed,
        "train limit": options.train_limit,
        "test limit": options.test_limit,
        "head": head_digest,
        "cache": data.fingerprint,
        **made_by,
    }
    facts = {
        "dataset": data.name,
        "dataset_digest": data.digest,
        "backbone": data.weights.backbone,
        "weights": data.weights.name if pretrained else "none",
        "weights_sha256": data.weights.sha256 if pretrained else None,
        "size": data.weights.preprocess.size,
        "engine": choice.name,
        "engine_version": choice.version,
        "device": choice.device,
        "precision": choice.precision,
        "features_wall_s": data.features_wall_s,
        "processes": processes,
        **made_by,
    }
    return Ingredients(
        weights=data.weights,
        backbone=backbone,
        class_names=data.class_names,
        train=data.source("train", rows["train"]),
        val=None if val_rows is None else data.source("train", val_rows),
        test=data.source("test", rows["test"]),
        head=head,
        choice=choice,
        identity=identity,
        facts=facts,
        cache=data.path,
    )


def _backbone(options: FinetuneOptions, cache: Cache | None) -> str:
    """Return the backbone's name: the one asked for, or the cache's, which may not name code."""
    if options.backbone is not None:
        return str(options.backbone)
    if cache is None:
        return "resnet18"
    return recorded_backbone(
        cache.meta.get("backbone"), str(cache.path), cache.meta.get("weights_sha256")
    )


_MODULES = ("timm", "torchvision", "hf", "open_clip", "function")


def check_trainable(parsed: BackboneName, engine: str, extracted_by: str = "") -> None:
    """Refuse a backbone that is no module of PyTorch, and an engine that cannot train it."""
    if parsed.kind == "resnet":
        return
    if parsed.kind not in _MODULES or extracted_by == "function":
        raise _untrainable(parsed.stored)
    if engine == "oneflow":
        raise EngineUnavailableError(
            f"engine oneflow: expected torch, which alone trains {parsed.stored}, found oneflow; "
            "leave out --engine"
        )


def _untrainable(backbone: str) -> RecipeError:
    return RecipeError(
        f"backbone {backbone}: expected {', '.join(BACKBONES)} or a PyTorch module of a library or "
        "function to train, found one that can be probed but not trained; use featcache extract "
        "and featcache probe"
    )


class _ImageData:
    """A data set of images, and the weights that will see them."""

    path: Path | None = None
    fingerprint: str | None = None
    features_wall_s = 0.0

    def __init__(
        self,
        dataset: AnyDataset,
        options: FinetuneOptions,
        backbone: str,
        on_progress: OnProgress,
    ) -> None:
        dataset = _loaded("cifar10" if dataset is None else dataset, options, on_progress)
        self._splits: dict[str, Split] = dict(dataset.splits())
        self.name = dataset.name
        self.class_names = dataset.class_names
        self.digest = dataset.digest_with(on_progress)
        self.weights = _load_weights(options, backbone, on_progress)

    def labels(self, role: str) -> np.ndarray:
        return self._splits[role].labels

    def source(self, role: str, rows: np.ndarray) -> Source:
        return ImageSource(self._splits[role].take(rows), self.weights.preprocess)


def _load_weights(options: FinetuneOptions, backbone: str, on_progress: OnProgress) -> Weights:
    resnet = backbone in BACKBONES
    name = options.weights or ("imagenet" if resnet else None)
    scratch = not options.recipe.pretrained
    if scratch and name is None and parse_backbone(backbone).kind in _MODULES:
        name = f"{RANDOM}{options.seed}"  # of the weights only the preprocessing is of use
    if scratch and name == "imagenet" and resnet:
        # Only the size of the input comes from the weights: not worth a download.
        size = options.size or 224
        check_resnet_size(size)
        return Weights("imagenet", backbone, {}, "", Preprocess(size), "random weights")
    return load_weights(name, backbone, size=options.size, on_progress=on_progress)


def _start_head(
    options: FinetuneOptions, weights: Weights, class_names: tuple[str, ...]
) -> tuple[HeadArrays | None, str | None]:
    """Return a probe's head and its digest, checked to fit these features."""
    if options.init_head is None:
        return None, None
    head, where = checked_head(options.init_head, of_classes=True)
    here = {
        "backbone": weights.backbone,
        "cuts": ["avgpool" if weights.network is None else POOLED],
        "preprocess": weights.preprocess.as_dict(),
        "weights_sha256": weights.sha256,
    }
    differing = feature_differences(head.ingredients, here)
    if not options.recipe.pretrained:
        differing.append("backbone: head one of these weights, here random weights")
    if head.scaling != "none":
        differing.append(f"scaling: head {head.scaling!r}, here 'none'")
    if head.class_names != class_names:
        differing.append(f"classes: head {_few(head.class_names)}, here {_few(class_names)}")
    if differing:
        raise WeightsError(
            f"{where}: expected a head on the features that this run starts with, found "
            f"{'; '.join(differing)}; train one with featcache probe --save-head on a cache of "
            "these weights and this size"
        )
    arrays = (np.ascontiguousarray(head.weight), np.ascontiguousarray(head.bias))
    return arrays, hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _few(names: tuple[str, ...]) -> str:
    return f"{len(names)} ({', '.join(names)!r:.60})"


def _limited(labels: np.ndarray, limit: int | None, what: str) -> np.ndarray:
    """Return the rows of a stratified draw, the same for every run, so that runs compare."""
    check_labelled(labels, what)
    if limit is None:
        return np.arange(len(labels))
    return stratified_rows(labels, limit, LIMIT_SEED, what)


def check_labelled(labels: np.ndarray, what: str) -> None:
    """Raise DatasetError unless there are images, and each has a label."""
    n_unlabelled = int((labels < 0).sum())
    if n_unlabelled or not len(labels):
        found = f"{n_unlabelled:,} of {len(labels):,} without" if len(labels) else "no image"
        raise DatasetError(
            f"{what}: expected images that all have a label, found {found}; sort images into class "
            "folders, or leave those out that have no label"
        )


def check_two_classes(labels: np.ndarray, name: str) -> None:
    """Raise DatasetError unless at least two classes have training images."""
    n_classes = len(np.unique(labels))
    if n_classes < 2:
        raise DatasetError(
            f"{name}: expected at least 2 classes with training images, found {n_classes}; add "
            "images of another class"
        )


def _check_enough(labels: np.ndarray, class_names: tuple[str, ...], name: str) -> None:
    if len(labels) > 1:
        check_two_classes(labels, name)
    if len(labels) < max(2, len(class_names)):
        raise DatasetError(
            f"{name} train: expected at least 2 images, and one for each of {len(class_names)} "
            f"classes, found {len(labels)}; use a larger --train-limit, a smaller --val-fraction "
            "or more images"
        )


def _loaded(
    dataset: str | Path | Dataset, options: FinetuneOptions, on_progress: OnProgress
) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    return load_dataset(dataset, data_root=options.data_root, on_progress=on_progress)


class _CachedData:
    """Features where the frozen part of a network ends, and the weights that made them."""

    def __init__(
        self,
        cache: Cache,
        dataset: AnyDataset,
        options: FinetuneOptions,
        choice: EngineChoice,
        backbone: str,
        on_progress: OnProgress,
        on_note: OnNote,
    ) -> None:
        cut = frozen_cut(options.recipe)
        if backbone not in BACKBONES:
            if options.recipe.backbone_lr is not None:
                raise RecipeError(
                    f"cache: expected method frozen with {cache.meta.get('backbone')}, found "
                    f"method {options.method}, which trains more than the head; leave out --cache, "
                    "or use --method frozen"
                )
            cut = POOLED
        if cut is None:
            raise RecipeError(
                f"cache: expected a run with frozen layers, found method {options.method} that "
                "trains all; use --freeze-until layer3"
            )
        if options.recipe.augment == "crop-flip":
            raise RecipeError(
                "augment: expected tutorial, flip or none with a cache, found crop-flip, which "
                "has too many outcomes to cache; use --augment tutorial"
            )
        if cache.size_bytes > _READ_BYTES:
            cache = load(cache.path, mmap=True)
        self._cut = cut
        self.path: Path | None = cache.path
        self.fingerprint: str | None = cache.fingerprint
        self.features_wall_s = float(cache.meta.get("wall_s", 0.0))
        self.name = str(cache.meta.get("dataset", "unnamed"))
        self.class_names = cache.class_names
        self.digest = str(cache.meta["dataset_digest"])
        views = AUGMENT_VIEWS[options.recipe.augment]
        command = _extract_command(cache, dataset, options, cut)
        self._splits = {
            "train": (cache.train, _features(cache.train, cut, views, command)),
            "test": (cache.test, _features(cache.test, cut, ("identity",), command)),
        }
        self.weights = _weights(cache, options, backbone, command, on_progress)
        if dataset is not None:
            _check_dataset(cache, _loaded(dataset, options, on_progress), on_progress)
        rounding = _rounding(cache.meta, choice)
        if rounding:
            on_note(f"{cache.path}: expect rounding differences: {', '.join(rounding)}")

    def labels(self, role: str) -> np.ndarray:
        return self._splits[role][0].labels

    def source(self, role: str, rows: np.ndarray) -> Source:
        split, views = self._splits[role]
        return CachedSource(views, split.labels, self._cut, rows)


def _features(
    split: CachedSplit, cut: str, views: tuple[str, ...], command: str
) -> dict[str, np.ndarray]:
    try:
        return {view: split.cut(cut, view) for view in views}
    except CacheMissError as error:
        problem = str(error).rpartition("; ")[0]
        raise CacheMissError(f"{problem}; make one with {command}") from None


def _weights(
    cache: Cache, options: FinetuneOptions, backbone: str, command: str, on_progress: OnProgress
) -> Weights:
    """Load the weights that the cache was made with, at its size."""
    meta = cache.meta
    name: Any = options.weights or meta.get("weights")
    if options.weights is None and parse_backbone(backbone).brings_weights(name):
        name = None
    elif options.weights is None:
        found = recorded_weights(name, meta["weights_sha256"])
        if found is None:
            raise WeightsError(
                f"{cache.path}: expected the checkpoint that made its features, {name!r:.80}, "
                f"which is not one of {', '.join(WEIGHT_NAMES)}; name it with --weights (its "
                f"SHA-256 is {meta['weights_sha256']!r:.80})"
            )
        name = found
    size = options.size or meta["preprocess"]["size"]
    weights = load_weights(name, backbone, size=size, on_progress=on_progress)
    here = {
        **meta,
        "backbone": weights.backbone,
        "weights_sha256": weights.sha256,
        "preprocess": weights.preprocess.as_dict(),
    }
    differing = feature_differences(meta, here, "cache")
    if differing:
        raise CacheMismatchError(
            f"{cache.path}: expected the features of this run's frozen layers, found others: "
            f"{'; '.join(differing)}; make them with {command}"
        )
    return weights


def _check_dataset(cache: Cache, dataset: Dataset, on_progress: OnProgress) -> None:
    digest = dataset.digest_with(on_progress)
    if digest != cache.meta["dataset_digest"]:
        raise CacheMismatchError(
            f"{cache.path}: expected features of {dataset.name} (digest {digest[:8]}), found those "
            f"of {cache.meta.get('dataset')} (digest {cache.meta['dataset_digest'][:8]}); name the "
            "data set of the cache, or none"
        )


def _extract_command(cache: Cache, dataset: AnyDataset, options: FinetuneOptions, cut: str) -> str:
    """Return the command that makes the cache that this run needs."""
    meta = cache.meta
    name = dataset if isinstance(dataset, (str, Path)) else meta.get("dataset")
    words = ["featcache", "extract", str(name or "DATASET")]
    if str(meta.get("backbone")) not in BACKBONES:
        words += ["--backbone", str(options.backbone or meta.get("backbone"))]
    if options.weights or meta.get("weights") != PRETRAINED:
        words += ["--weights", str(options.weights or meta.get("weights", "WEIGHTS"))]
    words += ["--size", str(options.size or meta["preprocess"]["size"]), "--cut", cut]
    if options.recipe.augment != "none":
        words += ["--views", "flips"]
    return shlex.join(words)


def _rounding(meta: Mapping[str, Any], choice: EngineChoice) -> list[str]:
    """List what makes these features differ, by rounding, from a run on the images."""
    differing = []
    if meta.get("engine") != choice.name:
        engine = f"{meta.get('engine')} {meta.get('engine_version', '')}"
        differing.append(f"features by {engine.rstrip()}")
    if meta.get("precision", "f32").replace("float32", "f32") != choice.precision:
        differing.append(f"computed in {meta['precision']}")
    if meta.get("dtype", "float32") != "float32":
        differing.append(f"kept as {meta['dtype']}")
    return differing
