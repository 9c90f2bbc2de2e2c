"""End-to-end training in OneFlow: full, split, frozen, scratch.

``full``
    Train everything at one rate: the tutorial's method 1.
``split``
    The backbone at a tenth of the head's rate: its method 2.
``frozen``
    Train the head alone, on features computed anew for every batch: its method 3.
    Frozen means frozen: the backbone is in eval mode and without gradients, so
    that no parameter and no batch statistic moves. (The tutorial leaves it in
    train mode, where BatchNorm's running statistics drift.)
``scratch``
    Train everything from a random backbone.

Every epoch sets the mode it means; the tutorial's loop stays in eval mode after
its first evaluation. The test split is evaluated after each epoch and the last
epoch's accuracy is the result: nothing is ever chosen on it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .datasets import Dataset, Split, load_dataset
from .engines import choose_engine
from .errors import RecipeError
from .metrics import top1, wilson_interval
from .preprocess import Preprocess
from .progress import OnProgress, silent
from .recipe import FINETUNE_RECIPES, FinetuneRecipe
from .runs import new_run, runs_folder, save_run
from .sampling import LIMIT_SEED, stratified_rows
from .trainer import Trainer
from .weights import Weights, load_weights, save_weights

__all__ = ["Epoch", "FinetuneResult", "finetune"]


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images.

    Parameters
    ----------
    epoch : int
        From 1.
    train_loss : float
        Mean cross-entropy over the batches, as they were trained on.
    top1 : float
        Accuracy on the test split after the epoch.
    wall_s : float
        Training and evaluation.
    """

    epoch: int
    train_loss: float
    top1: float
    wall_s: float


@dataclass(frozen=True)
class FinetuneResult:
    """A trained network, and how good it is.

    Parameters
    ----------
    method : str
        ``"full"``, ``"split"``, ``"frozen"`` or ``"scratch"``.
    top1 : float
        Accuracy on the test split after the last epoch, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    epochs : tuple of Epoch
        The curve.
    images_per_s : float
        Training images per second, evaluation not counted.
    wall_s : float
        Training and evaluation together.
    checkpoint : Path
        The network as safetensors with torchvision's names: usable as ``--weights``.
    n_train, n_test : int
        Images.
    seed : int
        Of the order of images, the views, the head, and a random backbone.
    recipe : FinetuneRecipe
        The hyperparameters used.
    run : Path
        Folder of the record.
    """

    method: str
    top1: float
    top1_interval: tuple[float, float]
    epochs: tuple[Epoch, ...]
    images_per_s: float
    wall_s: float
    checkpoint: Path
    n_train: int
    n_test: int
    seed: int
    recipe: FinetuneRecipe
    run: Path


def finetune(
    dataset: str | Path | Dataset = "cifar10",
    method: str = "split",
    *,
    backbone: str = "resnet18",
    weights: str | Path = "imagenet",
    size: int | None = None,
    device: str = "auto",
    epochs: int | None = None,
    batch_size: int | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    data_root: str | Path | None = None,
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> FinetuneResult:
    """Train a network end to end on a data set.

    Parameters
    ----------
    dataset : str, Path or Dataset
        As `featcache.load_dataset` takes it.
    method : str
        ``"full"``, ``"split"``, ``"frozen"`` or ``"scratch"``.
    backbone, weights, size, device, data_root
        As in `featcache.extract`. ``"scratch"`` takes the size alone from the weights.
    epochs, batch_size : int, optional
        Replace the recipe's 3 and 64.
    train_limit, test_limit : int, optional
        Use a stratified draw of so many images (seed 0, whatever ``seed`` is).
    seed : int
        Of every draw of the training.
    runs : str or Path, optional
        Folder for checkpoint and record; ``cache/runs`` by default.
    on_progress : callable
        Hears of images, with the running loss.

    Returns
    -------
    FinetuneResult

    Raises
    ------
    DatasetError, WeightsError, EngineUnavailableError, RecipeError, OutputError
        An ingredient is missing or unfit, before the long work begins; or
        (RecipeError) the loss stopped being finite.
    KeyboardInterrupt
        With a message that names the checkpoint of the last whole epoch.
    """
    if method not in FINETUNE_RECIPES:
        raise RecipeError(
            f"method: expected one of {', '.join(FINETUNE_RECIPES)}, found {method!r}"
        )
    recipe = FINETUNE_RECIPES[method]
    recipe = replace(
        recipe,
        epochs=recipe.epochs if epochs is None else epochs,
        batch_size=recipe.batch_size if batch_size is None else batch_size,
    )
    choice = choose_engine("oneflow", device)
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset, data_root=data_root, on_progress=on_progress)
    if method == "scratch" and weights == "imagenet":
        # Only the size of the input is taken from the weights: not worth a download.
        loaded = Weights("imagenet", backbone, {}, "", Preprocess(size or 224), "a random draw")
    else:
        loaded = load_weights(weights, backbone, size=size, on_progress=on_progress)
    train = _limited(dataset.train, train_limit, f"{dataset.name} train")
    test = _limited(dataset.test, test_limit, f"{dataset.name} test")
    run = new_run(runs_folder(runs), method)
    trainer = Trainer(loaded, len(dataset.class_names), recipe, device=choice.device, seed=seed)
    checkpoint = run / "model.safetensors"

    curve: list[Epoch] = []
    trained_s = 0.0
    started = time.perf_counter()
    try:
        for epoch in range(recipe.epochs):
            begun = time.perf_counter()
            loss = trainer.train_epoch(train, epoch, on_progress)
            trained_s += time.perf_counter() - begun
            accuracy = top1(trainer.predict(test, on_progress), test.labels)
            curve.append(Epoch(epoch + 1, loss, accuracy, time.perf_counter() - begun))
            save_weights(
                checkpoint,
                trainer.state(),
                backbone=backbone,
                preprocess=loaded.preprocess,
                metadata={"method": method, "epoch": str(epoch + 1), "dataset": dataset.name},
            )
    except KeyboardInterrupt:
        saved = f"epoch {len(curve)} of {recipe.epochs} is in {checkpoint}"
        raise KeyboardInterrupt(saved if curve else "no epoch was finished") from None
    result = FinetuneResult(
        method=method,
        top1=curve[-1].top1,
        top1_interval=wilson_interval(curve[-1].top1, len(test)),
        epochs=tuple(curve),
        images_per_s=len(train) * recipe.epochs / trained_s,
        wall_s=time.perf_counter() - started,
        checkpoint=checkpoint,
        n_train=len(train),
        n_test=len(test),
        seed=seed,
        recipe=recipe,
        run=run,
    )
    save_run(
        run,
        {
            "kind": "finetune",
            **asdict(result),
            "run": run.name,
            "n_epochs": recipe.epochs,
            "dataset": dataset.name,
            "dataset_digest": dataset.digest,
            "backbone": backbone,
            "weights": loaded.name if recipe.pretrained else "none",
            "weights_sha256": loaded.sha256 if recipe.pretrained else None,
            "size": loaded.preprocess.size,
            "engine": choice.name,
            "device": choice.device,
        },
    )
    return result


def _limited(split: Split, limit: int | None, what: str) -> Split:
    """Return a stratified draw, the same for every run, so that runs can be compared."""
    if limit is None:
        return split
    return split.take(stratified_rows(split.labels, limit, LIMIT_SEED, what))
