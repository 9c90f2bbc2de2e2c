"""What a run is made of, found and checked before the long work begins."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones.architectures import get_backbone
from ..backbones.choice import EngineChoice
from ..backbones.weights import Weights, load_weights
from ..datasets.dataset import Dataset, Split
from ..datasets.loading import load_dataset
from ..errors import DatasetError, RecipeError, WeightsError
from ..prediction import checked_head
from ..preprocess import Preprocess
from ..probes.head import Head
from ..probes.ingredients import feature_differences
from ..progress import OnNote, OnProgress
from ..sampling import LIMIT_SEED, row_batches, stratified_rows, validation_rows
from .batches import ImageSource, Source
from .cached import CachedData
from .engine import choose_trainer
from .network import HeadArrays
from .recipes import FinetuneRecipe

# Steps from which on compiling pays on a GPU: a minute of it, against some milliseconds of each
# step. An estimate: no GPU was at hand.
_COMPILE_STEPS = 10_000
_FEW_STEPS = 1_000  # in which a network does not make up for a wrong beginning: 69 cost 6 points


@dataclass(frozen=True)
class Request:
    """What was asked for, in the words of `featcache.finetune`."""

    dataset: str | Path | Dataset | None
    method: str
    recipe: FinetuneRecipe
    backbone: str | None
    weights: str | Path | None
    size: int | None
    engine: str
    device: str
    precision: str
    cache: str | Path | None
    init_head: str | Path | Head | None
    train_limit: int | None
    test_limit: int | None
    seed: int
    data_root: str | Path | None


@dataclass(frozen=True, eq=False)
class Ingredients:
    """What a run is made of.

    Parameters
    ----------
    weights : Weights
        Where the backbone starts.
    class_names : tuple of str
        In label order.
    train, val, test : Source
        Labelled inputs; ``val`` is None without ``patience``.
    head : (float32 (K, D), float32 (K,)) or None
        Where the head starts.
    choice : EngineChoice
        What computes.
    identity : dict
        All that changes the outcome, as JSON types: a run that goes on must share it.
    facts : dict
        What the record says about data and weights.
    compiled : bool
        Whether the part that trains is to be compiled.
    cache : Path or None
        Where features come from.
    """

    weights: Weights
    class_names: tuple[str, ...]
    train: Source
    val: Source | None
    test: Source
    head: HeadArrays | None
    choice: EngineChoice
    identity: dict[str, Any]
    facts: dict[str, Any]
    compiled: bool
    cache: Path | None


def gather(
    request: Request, processes: int, on_progress: OnProgress, on_note: OnNote
) -> Ingredients:
    """Find and check everything.

    Parameters
    ----------
    request : Request
        What was asked for.
    processes : int
        How many train together.
    on_progress, on_note : callable
        As in `featcache.finetune`.

    Raises
    ------
    FeatcacheError
        As `featcache.finetune` lists them.
    """
    recipe = request.recipe
    choice = choose_trainer(request.engine, request.device, request.precision)
    on_note(choice.why)
    data: _ImageData | CachedData
    if request.cache is not None:
        data = CachedData(request, choice, on_progress, on_note)
    else:
        data = _ImageData(request, on_progress)
    head, head_digest = _start_head(request, data.weights, data.class_names)
    rows = {
        role: _limited(labels, limit, f"{data.name} {role}")
        for role, labels, limit in (
            ("train", data.labels("train"), request.train_limit),
            ("test", data.labels("test"), request.test_limit),
        )
    }
    val_rows = None
    if recipe.patience is not None:
        labels = data.labels("train")[rows["train"]]
        held = validation_rows(labels, recipe.val_fraction, request.seed)
        val_rows = rows["train"][held]
        rows["train"] = np.delete(rows["train"], held)
    _check_enough(len(rows["train"]), len(data.class_names), data.name)
    n_steps = recipe.epochs * len(list(row_batches(len(rows["train"]), recipe.batch_size)))
    if head is not None and recipe.bn == "train" and recipe.backbone_lr is not None:
        said = (
            "the head was trained on features by batch normalisation's kept statistics, and this "
            f"run uses those of batches, for {n_steps:,} step{'s' * (n_steps != 1)}: add --bn eval "
            "--lr 1e-4 to start where the probe ended"
        )
        on_note(f"warning: {said}" if n_steps < _FEW_STEPS else said)
    pretrained = recipe.pretrained
    identity = {
        "method": request.method,
        **{f"recipe {name}": getattr(recipe, name) for name in recipe.__dataclass_fields__},
        "backbone": data.weights.backbone,
        "dataset digest": data.digest,
        "weights sha256": data.weights.sha256 if pretrained else None,
        "size": data.weights.preprocess.size,
        "engine": choice.name,
        "device": choice.device,
        "precision": choice.precision,
        "seed": request.seed,
        "train limit": request.train_limit,
        "test limit": request.test_limit,
        "head": head_digest,
        "cache": data.fingerprint,
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
    }
    return Ingredients(
        weights=data.weights,
        class_names=data.class_names,
        train=data.source("train", rows["train"]),
        val=None if val_rows is None else data.source("train", val_rows),
        test=data.source("test", rows["test"]),
        head=head,
        choice=choice,
        identity=identity,
        facts=facts,
        compiled=choice.device == "cuda" and processes == 1 and n_steps >= _COMPILE_STEPS,
        cache=data.path,
    )


class _ImageData:
    """A data set of images, and the weights that will see them."""

    path: Path | None = None
    fingerprint: str | None = None
    features_wall_s = 0.0

    def __init__(self, request: Request, on_progress: OnProgress) -> None:
        dataset = "cifar10" if request.dataset is None else request.dataset
        if not isinstance(dataset, Dataset):
            dataset = load_dataset(dataset, data_root=request.data_root, on_progress=on_progress)
        self._splits: dict[str, Split] = dict(dataset.splits())
        self.name = dataset.name
        self.class_names = dataset.class_names
        self.digest = dataset.digest_with(on_progress)
        self.weights = _load_weights(request, on_progress)

    def labels(self, role: str) -> np.ndarray:
        return self._splits[role].labels

    def source(self, role: str, rows: np.ndarray) -> Source:
        return ImageSource(self._splits[role].take(rows), self.weights.preprocess)


def _load_weights(request: Request, on_progress: OnProgress) -> Weights:
    backbone = request.backbone or "resnet18"
    name = request.weights or "imagenet"
    if not request.recipe.pretrained and name == "imagenet":
        # Only the size of the input is taken from the weights: not worth a download.
        get_backbone(backbone)
        return Weights(
            "imagenet", backbone, {}, "", Preprocess(request.size or 224), "a random draw"
        )
    return load_weights(name, backbone, size=request.size, on_progress=on_progress)


def _start_head(
    request: Request, weights: Weights, class_names: tuple[str, ...]
) -> tuple[HeadArrays | None, str | None]:
    """Return a probe's head and its digest, once it is known to fit these features."""
    if request.init_head is None:
        return None, None
    head, where = checked_head(request.init_head)
    here = {
        "backbone": weights.backbone,
        "cuts": ["avgpool"],
        "preprocess": weights.preprocess.as_dict(),
        "weights_sha256": weights.sha256,
    }
    differing = feature_differences(head.ingredients, here)
    if not request.recipe.pretrained:
        differing.append("backbone: head one of these weights, here a random draw")
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
    if limit is None:
        return np.arange(len(labels))
    return stratified_rows(labels, limit, LIMIT_SEED, what)


def _check_enough(n_train: int, n_classes: int, name: str) -> None:
    if n_train < max(2, n_classes):
        raise DatasetError(
            f"{name} train: expected at least 2 images, and one for each of {n_classes} classes, "
            f"found {n_train}; use a larger --train-limit, a smaller --val-fraction or more images"
        )
    if n_classes < 2:
        raise RecipeError(f"{name}: expected at least 2 classes, found {n_classes}")
