"""What a run leaves: its curve and its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..notebook import ShownAsTable
from ..recipe import FinetuneRecipe

__all__ = ["Epoch", "FinetuneResult"]


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
        Accuracy after the epoch, on the split that `FinetuneResult.curve_split` names.
    wall_s : float
        Training and evaluation.
    """

    epoch: int
    train_loss: float
    top1: float
    wall_s: float


@dataclass(frozen=True)
class FinetuneResult(ShownAsTable):
    """A trained network, and how good it is.

    Parameters
    ----------
    method : str
        ``"full"``, ``"split"``, ``"frozen"`` or ``"scratch"``.
    top1 : float
        Accuracy on the test split, in [0, 1]: after the last epoch, or with ``patience`` of
        the best epoch on the validation split.
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    epochs : tuple of Epoch
        The curve.
    curve_split : str
        ``"test"``, or with ``patience`` ``"val"``: a part of the training images.
    best_epoch : int
        The epoch, from 1, whose network this is.
    images_per_s : float
        Training images per second, evaluation not counted.
    wall_s : float
        Training and evaluation together.
    checkpoint : Path
        The network as safetensors with torchvision's names: usable as ``--weights``.
    n_train, n_val, n_test : int
        Images.
    seed : int
        Of the order of images, the views, the head, the validation split, and a random
        backbone.
    recipe : FinetuneRecipe
        The hyperparameters used.
    engine, device, precision : str
        What trained, such as ``"torch"``, ``"cpu"``, ``"f32"``.
    cache : Path or None
        Where features were read instead of images.
    init_head : str or None
        The probe's head that the run began with.
    resumed : bool
        Whether an earlier run was gone on with.
    run : Path
        Folder of the record.
    """

    method: str
    top1: float
    top1_interval: tuple[float, float]
    epochs: tuple[Epoch, ...]
    curve_split: str
    best_epoch: int
    images_per_s: float
    wall_s: float
    checkpoint: Path
    n_train: int
    n_val: int
    n_test: int
    seed: int
    recipe: FinetuneRecipe
    engine: str
    device: str
    precision: str
    cache: Path | None
    init_head: str | None
    resumed: bool
    run: Path
