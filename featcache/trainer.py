"""The end-to-end trainer: a backbone, a head, one optimizer, and what each epoch means.

It trains on the same draws as a probe on cached features does (`featcache.sampling`),
so that a frozen backbone gives the same head either way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .backbone import get_backbone
from .datasets import Split
from .errors import RecipeError
from .frameworks import import_oneflow
from .preprocess import VIEWS, apply_view
from .progress import OnProgress, Progress, silent
from .recipe import FinetuneRecipe
from .sampling import epoch_plan, initial_head, row_batches
from .weights import Weights

__all__ = ["Trainer"]

_EVALUATION_BATCH = 256


class Trainer:
    """A backbone, a head, and the optimizer of one recipe.

    Parameters
    ----------
    weights : Weights
        Where the backbone starts, and its preprocessing.
    n_classes : int
        K.
    recipe : FinetuneRecipe
        What is trained, at which rates.
    device : str
        ``"cpu"`` or ``"cuda"``.
    seed : int
        Of every draw.
    """

    def __init__(
        self,
        weights: Weights,
        n_classes: int,
        recipe: FinetuneRecipe,
        *,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        from .engines import _oneflow as engine

        self._engine = engine
        self._flow = import_oneflow()
        self._preprocess = weights.preprocess
        self._recipe = recipe
        self._device = device
        self._seed = seed
        architecture = get_backbone(weights.backbone)
        self._flow.manual_seed(seed)
        self.backbone = engine.build_backbone(architecture)
        if recipe.pretrained:
            engine.load_backbone(self.backbone, weights.state)
        weight, bias = initial_head(n_classes, architecture.feature_dim, seed)
        self.head = self._flow.nn.Linear(architecture.feature_dim, n_classes)
        self.head.load_state_dict({"weight": weight, "bias": bias})
        self.backbone.to(device)
        self.head.to(device)
        self._loss = self._flow.nn.CrossEntropyLoss()
        groups = [{"params": list(self.head.parameters()), "lr": recipe.head_lr}]
        if recipe.backbone_lr is None:
            for parameter in self.backbone.parameters():
                parameter.requires_grad = False
        else:
            groups.append({"params": list(self.backbone.parameters()), "lr": recipe.backbone_lr})
        self.optimizer = self._flow.optim.SGD(
            groups,
            lr=recipe.head_lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )

    @property
    def frozen(self) -> bool:
        """Whether the backbone stays as it is."""
        return self._recipe.backbone_lr is None

    def train_epoch(self, split: Split, epoch: int, on_progress: OnProgress = silent) -> float:
        """Train on every image once; return the mean loss.

        Raises
        ------
        RecipeError
            The loss is not finite.
        """
        self.backbone.train(not self.frozen)
        self.head.train()
        views = VIEWS[self._recipe.views]
        rows, drawn = epoch_plan(len(split), len(views), self._seed, epoch)
        stage = f"epoch {epoch + 1}/{self._recipe.epochs}"
        total = 0.0
        on_progress(Progress(stage, 0, len(split)))
        for batch in row_batches(len(split), self._recipe.batch_size):
            pixels = self._pixels(split, rows[batch])
            for view, name in enumerate(views):
                pixels[drawn[batch] == view] = apply_view(pixels[drawn[batch] == view], name)
            loss = self._step(pixels, split.labels[rows[batch]])
            if not math.isfinite(loss):
                raise RecipeError(
                    f"{stage}: expected a finite loss, found {loss} after {batch.start} images "
                    f"at learning rate {self._recipe.head_lr}; use a smaller rate"
                )
            total += loss * len(pixels)
            note = f"loss {total / batch.stop:.3f}"
            on_progress(Progress(stage, batch.stop, len(split), note=note))
        return total / len(split)

    def predict(self, split: Split, on_progress: OnProgress = silent) -> np.ndarray:
        """Return the predicted class of every image: int64 (N,)."""
        self.backbone.eval()
        self.head.eval()
        classes = []
        on_progress(Progress("test images", 0, len(split)))
        with self._flow.no_grad():
            for batch in row_batches(len(split), _EVALUATION_BATCH):
                pixels = self._pixels(split, np.arange(batch.start, batch.stop))
                logits = self.head(self.backbone(self._input(pixels)))
                classes.append(logits.numpy().argmax(axis=1))
                on_progress(Progress("test images", batch.stop, len(split)))
        return np.concatenate(classes)

    def state(self) -> Mapping[str, np.ndarray]:
        """Return every tensor by torchvision's name, the head as ``fc``."""
        head = self._engine.state_arrays(self.head)
        return {
            **self._engine.state_arrays(self.backbone),
            **{f"fc.{key}": value for key, value in head.items()},
        }

    def _step(self, pixels: np.ndarray, labels: np.ndarray) -> float:
        x = self._input(pixels)
        if self.frozen:
            with self._flow.no_grad():
                features = self.backbone(x)
        else:
            features = self.backbone(x)
        y = self._flow.from_numpy(labels).to(self._device)
        loss = self._loss(self.head(features), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())

    def _pixels(self, split: Split, rows: np.ndarray) -> np.ndarray:
        return self._preprocess.batch(
            [split.images.read(int(row), self._preprocess.size) for row in rows]
        )

    def _input(self, pixels: np.ndarray) -> Any:
        return self._engine.to_input(pixels, self._preprocess, self._device)
