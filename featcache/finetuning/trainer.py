"""The trainer: steps of SGD over drawn batches, and predictions.

It uses the draws of a probe on cached features (`featcache.sampling`), so that a frozen backbone
gives the same head either way. A draw depends on the seed and the epoch alone, so that a run can
be resumed at any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from ..backbones.weights import Weights
from ..errors import DivergedError
from ..progress import OnProgress, Progress, silent
from ..sampling import epoch_plan, row_batches
from .batches import AUGMENT_VIEWS, Draw, Source, draw_shifts, movement_of
from .framework import Framework
from .network import HeadArrays, Network
from .processes import Processes
from .recipes import FinetuneRecipe, rate_factor

_EVALUATION_BATCH = 64
_OPTIMIZER = "optimizer."
_MODEL = "model."
_SCALE = "scale."

# Steps that a GPU may be behind: their losses are read later, to not wait for it.
_BEHIND = 2


class Trainer:
    """A network, and the optimizer of one recipe.

    Parameters
    ----------
    framework : Framework
        What computes.
    weights : Weights
        Where the backbone starts, and its preprocessing.
    n_classes : int
        K.
    recipe : FinetuneRecipe
        What is trained, at which rates.
    device, precision : str
        Parameters, momentum and the loss are float32 in every precision.
    compiled : bool
        Compile the part that trains, if the framework can.
    seed : int
        Seed of every draw.
    head : (float32 (K, D), float32 (K,)), optional
        Where the head starts: a probe's weight and bias.
    processes : Processes, optional
        Those that share every batch; all of them must call `steps` and `predict` alike.

    Attributes
    ----------
    behind : int
        How many steps the device may be behind before their losses are read: 0 on the CPU,
        where a loss that is not finite stops a run before the update.
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
        compiled: bool = False,
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
        self._moves_on_device = device != "cpu"
        self.behind = 0 if device == "cpu" else _BEHIND
        self.network = network_kind(weights)(
            framework,
            weights,
            n_classes,
            recipe,
            device=device,
            seed=seed,
            compiled=compiled,
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
        self._scale = LossScale(flow) if precision == "f16" else None

    def n_batches(self, n_images: int) -> int:
        """Return the steps per epoch."""
        return sum(1 for _ in row_batches(n_images, self._recipe.batch_size))

    def steps(self, source: Source, epoch: int, first: int = 0) -> Generator[Step, None, None]:
        """Train on every image once: a step each time the generator is asked.

        ``epoch`` counts from 0, and ``first`` is the step of the epoch to start with. Use
        ``contextlib.closing``: it ends the decoding ahead. A loss that is not finite raises
        DivergedError; on the CPU the parameters are then still those after the last good step.
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
                mean = self.processes.mean(loss.detach().clone())
                read = partial(self._read, mean, (number + 1, n_steps), epoch, rates)
                n_images = batches[index].stop - batches[index].start
                step = Step(number + 1, batches[index].stop, n_images, rates, read)
                if not self.behind:
                    _ = step.loss
                self._update(loss)
                yield step

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
        scale = self._scale.arrays() if self._scale else {}
        return {**model, **optimizer, **{_SCALE + name: value for name, value in scale.items()}}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Load what `arrays` returned, into a trainer of the same recipe."""
        self.network.load(_under(_MODEL, arrays))
        state = self.optimizer.state_dict()
        for name, value in _under(_OPTIMIZER, arrays).items():
            index, _, key = name.partition(".")
            if value.shape != tuple(self._parameters[int(index)].shape):
                raise ValueError(f"optimizer.{index} of another shape than its parameter")
            tensor = self._framework.to_device(np.array(value), self._device)
            state["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(state)
        if self._scale:
            self._scale.load_arrays(_under(_SCALE, arrays))

    def _momenta(self) -> Iterator[tuple[str, np.ndarray]]:
        for index, fields in self.optimizer.state_dict()["state"].items():
            if isinstance(fields, dict):  # OneFlow keeps a count of steps beside them
                for key, value in fields.items():
                    if value is not None:  # PyTorch's, where there is no momentum
                        yield f"{index}.{key}", np.array(value.cpu().numpy(), order="C")

    def _inputs(
        self, source: Source, draws: Sequence[Draw], augment: str
    ) -> Generator[Any, None, None]:
        """Yield the batch of each draw on the device, flipped and shifted there or before."""
        here = self._moves_on_device and source.start is None
        plain = ([Draw(draw.rows) for draw in draws], "none") if here else (draws, augment)
        with closing(source.batches(*plain)) as batches:
            for draw, batch in zip(draws, batches, strict=True):
                names = AUGMENT_VIEWS[augment]
                movement = movement_of(draw, names, batch.shape[1]) if here else None
                yield self.network.to_device(batch, source.start, movement)

    def _autocast(self) -> AbstractContextManager[Any]:
        return self._framework.autocast(self._device, self._precision)

    def _set_rates(self, factor: float) -> dict[str, float]:
        rates = {name: rate * factor for name, rate in self._base_rates.items()}
        for group, rate in zip(self.optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate
        return rates

    def _update(self, loss: Any) -> None:
        if self._scale:
            self._scale.step(loss, self.optimizer, self._parameters)
        else:
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _read(
        self, loss: Any, place: tuple[int, int], epoch: int, rates: Mapping[str, float]
    ) -> float:
        value = float(loss.item())
        if math.isfinite(value):
            return value
        listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        raise DivergedError(
            f"epoch {epoch + 1}/{self._recipe.epochs}: expected a finite loss, found {value} at "
            f"step {place[0]} of {place[1]} (learning rates: {listed}); use a smaller --lr, or "
            "--warmup"
        )


def network_kind(weights: Weights) -> type[Network]:
    """Return the class of the network: a library's model needs PyTorch."""
    if weights.network is None:
        return Network
    from .model_network import ModelNetwork

    return ModelNetwork


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


@dataclass(frozen=True, eq=False)
class Step:
    """One update of the parameters.

    Parameters
    ----------
    step : int
        Steps of the whole run so far, including this one.
    n_seen : int
        Images of the epoch so far, including this step's.
    n_images : int
        Images of this step.
    rates : mapping of str to float
        Learning rate of the head and of each stage that trains.
    read : callable
        Reads the loss from the device.
    """

    step: int
    n_seen: int
    n_images: int
    rates: Mapping[str, float]
    read: Callable[[], float] = field(repr=False)

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy over its images before the update; DivergedError unless finite."""
        return self.read()


_FIRST_FACTOR = 2.0**16
_GROWTH_STEPS = 2000  # without an overflow, after which the factor doubles


class LossScale:
    """The factor by which the loss is multiplied in float16, so that gradients do not vanish."""

    def __init__(self, flow: Any) -> None:
        self._flow = flow
        self.factor = _FIRST_FACTOR
        self._since = 0  # steps without an overflow

    def step(self, loss: Any, optimizer: Any, parameters: Sequence[Any]) -> None:
        """Take the optimizer's step, or skip it where a gradient overflowed."""
        (loss * self.factor).backward()
        gradients = [one.grad for one in parameters]
        total = self._flow.stack([gradient.sum() for gradient in gradients]).sum()
        if not math.isfinite(total.item()):
            self.factor, self._since = self.factor / 2, 0
            return
        for gradient in gradients:
            gradient.mul_(1 / self.factor)
        optimizer.step()
        self._since += 1
        if self._since == _GROWTH_STEPS:
            self.factor, self._since = self.factor * 2, 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the state: two arrays of one number."""
        return {"factor": np.array([self.factor]), "since": np.array([self._since])}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Load what `arrays` returned."""
        self.factor, self._since = float(arrays["factor"][0]), int(arrays["since"][0])
