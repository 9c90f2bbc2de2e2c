"""The trainer: steps of SGD over drawn batches, and predictions.

It uses the draws of a probe on cached features (`featcache.sampling`), so that a frozen backbone
gives the same head either way. A draw depends on the seed and the epoch alone, so that a run can
be resumed at any step.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backbones.weights import Weights
from ..errors import DivergedError
from ..progress import OnProgress, Progress, silent
from ..sampling import epoch_plan, row_batches
from .batches import AUGMENT_VIEWS, Draw, Source, draw_shifts
from .framework import Framework
from .network import HeadArrays, Network, below
from .processes import Processes
from .recipes import FinetuneRecipe, rate_factor

_EVALUATION_BATCH = 64
_OPTIMIZER = "optimizer."
_MODEL = "model."


class Trainer:
    """A network, and the optimizer of one recipe.

    Parameters, momentum and the loss are float32 in every ``precision``. ``head`` is where the
    head starts, float32 (K, D) and (K,). All of ``processes`` share every batch, and must call
    `steps` and `predict` alike.
    """

    def __init__(
        self,
        framework: Framework,
        weights: Weights,
        n_classes: int,
        recipe: FinetuneRecipe,
        *,
        device: str = "cpu",
        precision: str = "f32",
        seed: int = 0,
        head: HeadArrays | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._flow = flow = framework.module
        self._recipe = recipe
        self._framework = framework
        self._device = device
        self._precision = precision
        self._seed = seed
        self.processes = processes or Processes()
        self.network = network_kind(weights)(
            framework,
            weights,
            n_classes,
            recipe,
            device=device,
            seed=seed,
            head=head,
            processes=self.processes,
        )
        self._loss = flow.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self._base_rates = self.network.rates
        groups: list[dict[str, Any]] = [
            {"params": self.network.parameters(stage), "lr": rate}
            for stage, rate in self._base_rates.items()
        ]
        self._parameters = [one for group in groups for one in group["params"]]
        self.optimizer = flow.optim.SGD(
            groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )

    def n_batches(self, n_images: int) -> int:
        """Return the steps per epoch."""
        return sum(1 for _ in row_batches(n_images, self._recipe.batch_size))

    def steps(self, source: Source, epoch: int, first: int = 0) -> Generator[Step, None, None]:
        """Train on every image once: a step each time the generator is asked.

        ``epoch`` counts from 0, and ``first`` is the step of the epoch to start with. Use
        ``contextlib.closing``: it ends the decoding ahead. A loss that is not finite raises
        DivergedError, and the parameters are then still those after the last good step.
        """
        recipe = self._recipe
        n = len(source)
        rows, views = epoch_plan(n, len(AUGMENT_VIEWS[recipe.augment]), self._seed, epoch)
        shifts = draw_shifts(recipe, n, self._seed, epoch)
        batches = list(row_batches(n, recipe.batch_size))
        parts = [self.processes.part(batch) for batch in batches]
        draws = [
            Draw(rows[part], views[part], None if shifts is None else shifts[part])
            for part, _ in parts[first:]
        ]
        n_steps = recipe.epochs * len(batches)
        self.network.train()
        with closing(self._inputs(source, draws, recipe.augment)) as inputs:
            for index, (draw, x) in enumerate(zip(draws, inputs, strict=True), start=first):
                number = epoch * len(batches) + index
                rates = self._set_rates(rate_factor(recipe, number, n_steps))
                y = self._framework.to_device(source.labels[draw.rows], self._device)
                with self._autocast(), self.network.drawing(number, self.processes.rank):
                    scores = self.network.scores(x, source.start)
                # PyTorch averages the gradients of the processes, whose parts may be uneven.
                loss = self._loss(scores.to(self._flow.float32), y) * parts[index][1]
                mean = float(self.processes.mean(loss.detach().clone()).item())
                if not math.isfinite(mean):
                    raise self._diverged(mean, f"step {number + 1} of {n_steps}", epoch, rates)
                self._update(loss)
                n_images = batches[index].stop - batches[index].start
                yield Step(number + 1, batches[index].stop, n_images, rates, mean)

    def predict(
        self, source: Source, on_progress: OnProgress = silent, stage: str = "test images"
    ) -> np.ndarray:
        """Return the predicted class of every image: int64 (N,)."""
        self.processes.same_buffers(self.network.backbone)
        self.network.eval()
        n, classes = len(source), np.zeros(len(source), np.int64)
        own = self.processes.range(slice(0, n))
        starts = range(own.start, own.stop, _EVALUATION_BATCH)
        draws = [Draw(np.arange(at, min(at + _EVALUATION_BATCH, own.stop))) for at in starts]
        on_progress(Progress(stage, 0, n))
        with self._flow.no_grad(), closing(self._inputs(source, draws, "none")) as inputs:
            for draw, x in zip(draws, inputs, strict=True):
                with self._autocast():
                    scores = self.network.scores(x, source.start)
                classes[draw.rows] = scores.to(self._flow.float32).cpu().numpy().argmax(axis=1)
                seen = (int(draw.rows[-1]) + 1 - own.start) * self.processes.size
                on_progress(Progress(stage, min(seen, n), n))
        return self.processes.total(classes)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything that a step depends on: tensors of the network and the optimizer."""
        model = {_MODEL + name: value for name, value in self.network.state().items()}
        optimizer = {_OPTIMIZER + name: value for name, value in self._momenta()}
        return {**model, **optimizer}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Load what `arrays` returned, into a trainer of the same recipe."""
        self.network.load(below(_MODEL, arrays))
        state = self.optimizer.state_dict()
        for name, value in below(_OPTIMIZER, arrays).items():
            index, _, key = name.partition(".")
            if value.shape != tuple(self._parameters[int(index)].shape):
                raise ValueError(f"optimizer.{index} of another shape than its parameter")
            tensor = self._framework.to_device(np.array(value), self._device)
            state["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(state)

    def _momenta(self) -> Iterator[tuple[str, np.ndarray]]:
        for index, fields in self.optimizer.state_dict()["state"].items():
            if isinstance(fields, dict):  # OneFlow keeps a count of steps beside them
                for key, value in fields.items():
                    if value is not None:  # PyTorch's, where there is no momentum
                        yield f"{index}.{key}", np.array(value.cpu().numpy(), order="C")

    def _inputs(
        self, source: Source, draws: Sequence[Draw], augment: str
    ) -> Generator[Any, None, None]:
        """Yield the batch of each draw on the device."""
        with closing(source.batches(draws, augment)) as batches:
            for batch in batches:
                yield self.network.to_device(batch, source.start)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which convolutions and products compute in the precision."""
        if self._precision == "f32":
            return nullcontext()
        context: AbstractContextManager[Any] = self._flow.autocast(
            self._device, dtype=self._flow.bfloat16
        )
        return context

    def _set_rates(self, factor: float) -> dict[str, float]:
        rates = {name: rate * factor for name, rate in self._base_rates.items()}
        for group, rate in zip(self.optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate
        return rates

    def _update(self, loss: Any) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _diverged(
        self, loss: float, place: str, epoch: int, rates: Mapping[str, float]
    ) -> DivergedError:
        listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        return DivergedError(
            f"epoch {epoch + 1}/{self._recipe.epochs}: expected a finite loss, found {loss} at "
            f"{place} (learning rates: {listed}); use a smaller --lr, or --warmup"
        )


def network_kind(weights: Weights) -> type[Network]:
    """Return the class of the network: a library's model needs PyTorch."""
    if weights.network is None:
        return Network
    from .model_network import ModelNetwork

    return ModelNetwork


@dataclass(frozen=True, eq=False)
class Step:
    """One update of the parameters."""

    step: int  # of the whole run so far, including this one
    n_seen: int  # images of the epoch so far, including this step's
    n_images: int  # of this step
    rates: Mapping[str, float]  # of the head and of each stage that trains
    loss: float  # mean cross-entropy over its images before the update
