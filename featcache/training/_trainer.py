"""The trainer: steps of SGD over drawn batches, and predictions.

It trains on the same draws as a probe on cached features does (`featcache.sampling`),
so that a frozen backbone gives the same head either way. Every draw is a function of the
seed and the epoch, so that a run goes on at any step without the history of a generator.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ..errors import RecipeError
from ..progress import OnProgress, Progress, silent
from ..recipe import FinetuneRecipe
from ..sampling import epoch_plan, row_batches
from ..weights import Weights
from ._framework import Framework, oneflow_framework
from ._network import HeadArrays, Network
from ._schedule import group_rates, rate_factor
from ._sources import AUGMENT_VIEWS, Draw, Source, draw_shifts

__all__ = ["Step", "Trainer"]

_EVALUATION_BATCH = 64
_OPTIMIZER = "optimizer."
_MODEL = "model."


@dataclass(frozen=True)
class Step:
    """One update of the parameters.

    Parameters
    ----------
    step : int
        Steps taken in the whole run, this one included.
    n_seen : int
        Images of the epoch seen, this step's included.
    n_images : int
        Of this step.
    loss : float
        Mean cross-entropy over them, before the update.
    rates : mapping of str to float
        Learning rate of the head and of each stage that trains.
    """

    step: int
    n_seen: int
    n_images: int
    loss: float
    rates: Mapping[str, float]


class Trainer:
    """A network, and the optimizer of one recipe.

    Parameters
    ----------
    weights : Weights
        Where the backbone starts, and its preprocessing.
    n_classes : int
        K.
    recipe : FinetuneRecipe
        What is trained, at which rates.
    device : str
        ``"cpu"`` or ``"cuda"``; the latter is written with care and was never run.
    seed : int
        Of every draw.
    head : (float32 (K, D), float32 (K,)), optional
        Where the head starts: a probe's weight and bias (LP-FT: Kumar et al., "Fine-Tuning
        can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022).
    framework : Framework, optional
        What computes; OneFlow by default.
    """

    def __init__(
        self,
        weights: Weights,
        n_classes: int,
        recipe: FinetuneRecipe,
        *,
        device: str = "cpu",
        seed: int = 0,
        head: HeadArrays | None = None,
        framework: Framework | None = None,
    ) -> None:
        framework = framework or oneflow_framework()
        self._flow = flow = framework.module
        self._recipe = recipe
        self._device = device
        self._seed = seed
        self.network = Network(
            framework, weights, n_classes, recipe, device=device, seed=seed, head=head
        )
        self._loss = flow.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self._base_rates = group_rates(recipe)
        groups = [
            {"params": self.network.parameters(stage), "lr": rate}
            for stage, rate in self._base_rates.items()
        ]
        self.optimizer = flow.optim.SGD(
            groups,
            lr=recipe.head_lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )

    def n_batches(self, n_images: int) -> int:
        """Return the steps per epoch."""
        return sum(1 for _ in row_batches(n_images, self._recipe.batch_size))

    def steps(self, source: Source, epoch: int, first: int = 0) -> Generator[Step, None, None]:
        """Train on every image once, a step each time the generator is asked.

        Wrap the call in ``contextlib.closing``: leaving it ends the decoding ahead.

        Parameters
        ----------
        source : Source
            The training images.
        epoch : int
            From 0; which draws, and where in the schedule.
        first : int
            The step of the epoch to begin with, to go on where a run was stopped.

        Raises
        ------
        RecipeError
            The loss is not finite; the parameters are then those after the last good step.
        """
        recipe = self._recipe
        n = len(source)
        rows, views = epoch_plan(n, len(AUGMENT_VIEWS[recipe.augment]), self._seed, epoch)
        shifts = draw_shifts(recipe, n, self._seed, epoch)
        batches = list(row_batches(n, recipe.batch_size))
        draws = [
            Draw(rows[batch], views[batch], None if shifts is None else shifts[batch])
            for batch in batches[first:]
        ]
        n_steps = recipe.epochs * len(batches)
        self.network.train()
        with closing(source.batches(draws, recipe.augment)) as inputs:
            for index, (draw, x) in enumerate(zip(draws, inputs, strict=True), start=first):
                step = epoch * len(batches) + index
                rates = self._set_rates(rate_factor(recipe, step, n_steps))
                loss = self._step(x, source.labels[draw.rows], source.start)
                if not math.isfinite(loss):
                    said = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
                    raise RecipeError(
                        f"epoch {epoch + 1}/{recipe.epochs}: expected a finite loss, found {loss} "
                        f"at step {step + 1} of {n_steps} (learning rates: {said}); use a smaller "
                        "--lr, or --warmup"
                    )
                yield Step(step + 1, batches[index].stop, len(x), loss, rates)

    def predict(
        self, source: Source, on_progress: OnProgress = silent, stage: str = "test images"
    ) -> np.ndarray:
        """Return the predicted class of every image: int64 (N,)."""
        n = len(source)
        batches = [
            np.arange(start, min(start + _EVALUATION_BATCH, n))
            for start in range(0, n, _EVALUATION_BATCH)
        ]
        self.network.eval()
        classes = []
        done = 0
        on_progress(Progress(stage, 0, n))
        with self._flow.no_grad(), closing(source.batches(map(Draw, batches))) as inputs:
            for x in inputs:
                scores = self.network.scores(x, source.start)
                classes.append(scores.numpy().argmax(axis=1))
                done += len(x)
                on_progress(Progress(stage, done, n))
        return np.concatenate(classes)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that a step depends on: every tensor of the network and the optimizer."""
        model = {_MODEL + name: value for name, value in self.network.state().items()}
        return {**model, **{_OPTIMIZER + name: value for name, value in self._momenta()}}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` returned, in a trainer of the same recipe."""
        self.network.load(
            {
                name.removeprefix(_MODEL): value
                for name, value in arrays.items()
                if name.startswith(_MODEL)
            }
        )
        state = self.optimizer.state_dict()
        for name, value in arrays.items():
            if name.startswith(_OPTIMIZER):
                index, _, field = name.removeprefix(_OPTIMIZER).partition(".")
                tensor = self._flow.from_numpy(np.array(value)).to(self._device)
                state["state"].setdefault(int(index), {})[field] = tensor
        self.optimizer.load_state_dict(state)

    def _momenta(self) -> Iterator[tuple[str, np.ndarray]]:
        for index, fields in self.optimizer.state_dict()["state"].items():
            if isinstance(fields, dict):  # OneFlow keeps a count of steps beside them
                for field, value in fields.items():
                    yield f"{index}.{field}", np.array(value.numpy())

    def _set_rates(self, factor: float) -> dict[str, float]:
        rates = {name: rate * factor for name, rate in self._base_rates.items()}
        for group, rate in zip(self.optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate
        return rates

    def _step(self, inputs: np.ndarray, labels: np.ndarray, start: str | None) -> float:
        y = self._flow.from_numpy(labels).to(self._device)
        loss = self._loss(self.network.scores(inputs, start), y)
        value = float(loss.item())
        if math.isfinite(value):
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return value
