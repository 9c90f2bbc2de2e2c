"""The trainer: steps of SGD over drawn batches, and predictions.

It trains on the same draws as a probe on cached features does (`featcache.sampling`),
so that a frozen backbone gives the same head either way. Every draw is a function of the
seed and the epoch, so that a run goes on at any step without the history of a generator.
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
from ..errors import RecipeError
from ..progress import OnProgress, Progress, silent
from ..sampling import epoch_plan, row_batches
from .batch_norm import SharedStatistics
from .batches import AUGMENT_VIEWS, Draw, Source, draw_shifts, movement_of
from .framework import Framework, oneflow_framework
from .network import HeadArrays, Network
from .ranks import Ranks
from .recipes import FinetuneRecipe
from .schedule import group_rates, rate_factor

_EVALUATION_BATCH = 64
_OPTIMIZER = "optimizer."
_MODEL = "model."
_SCALE = "scale."

# Steps that a GPU may be behind: it is not waited for to read a loss.
_BEHIND = 2


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
        ``"cpu"``, ``"cuda"`` or ``"mps"``. Anything but the CPU was never run; what differs
        there is each tested on the CPU: flips and shifts on the device, losses that are
        read late, mixed precision.
    precision : str
        ``"f32"``, or what convolutions and products compute in: ``"bf16"``, ``"f16"``.
        Parameters, momentum and the loss are float32 in any case.
    compiled : bool
        Compile the part that trains, where the framework can: seconds to minutes at the
        beginning, for faster steps.
    seed : int
        Of every draw.
    head : (float32 (K, D), float32 (K,)), optional
        Where the head starts: a probe's weight and bias (LP-FT: Kumar et al., "Fine-Tuning
        can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022).
    framework : Framework, optional
        What computes; OneFlow by default.
    ranks : Ranks, optional
        The processes that share every batch; this one alone by default. All of them must call
        `steps` and `predict` alike.

    Attributes
    ----------
    behind : int
        How many steps the device may be behind before their losses are to be read: 0 on the
        CPU, where a loss that is not finite stops a run before the update.
    """

    def __init__(
        self,
        weights: Weights,
        n_classes: int,
        recipe: FinetuneRecipe,
        *,
        device: str = "cpu",
        precision: str = "f32",
        compiled: bool = False,
        seed: int = 0,
        head: HeadArrays | None = None,
        framework: Framework | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        framework = framework or oneflow_framework()
        self._flow = flow = framework.module
        self._recipe = recipe
        self._framework = framework
        self._device = device
        self._precision = precision
        self._seed = seed
        self._ranks = ranks or Ranks()
        self._moves_on_device = device != "cpu"
        self.behind = 0 if device == "cpu" else _BEHIND
        self.network = Network(
            framework,
            weights,
            n_classes,
            recipe,
            device=device,
            seed=seed,
            compiled=compiled,
            head=head,
        )
        self._statistics = SharedStatistics(flow, self._ranks)
        if self._ranks.size > 1:
            self._statistics.swap_into(self.network.backbone)
        self._loss = flow.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self._base_rates = group_rates(recipe)
        groups: list[dict[str, Any]] = [
            {"params": self.network.parameters(stage), "lr": rate}
            for stage, rate in self._base_rates.items()
        ]
        self._parameters = [one for group in groups for one in group["params"]]
        self.optimizer = framework.sgd(groups, device, recipe.momentum, recipe.weight_decay)
        self._scale = LossScale(flow) if precision == "f16" else None

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
            The loss is not finite. On the CPU the parameters are then those after the last
            good step; elsewhere it is the step's loss that raises, and they are lost.
        """
        recipe = self._recipe
        n = len(source)
        rows, views = epoch_plan(n, len(AUGMENT_VIEWS[recipe.augment]), self._seed, epoch)
        shifts = draw_shifts(recipe, n, self._seed, epoch)
        batches = list(row_batches(n, recipe.batch_size))
        parts = [self._ranks.part(batch) for batch in batches]
        draws = [
            Draw(rows[place], views[place], None if shifts is None else shifts[place])
            for place in map(_not_empty, parts[first:])
        ]
        n_steps = recipe.epochs * len(batches)
        self.network.train()
        with closing(self._inputs(source, draws, recipe.augment)) as inputs:
            for index, draw in enumerate(draws, start=first):
                x = self._ranks.agreed(partial(next, inputs))
                number = epoch * len(batches) + index
                rates = self._set_rates(rate_factor(recipe, number, n_steps))
                y = self._framework.to_device(source.labels[draw.rows], self._device)
                n_images, n_here = _length(batches[index]), _length(parts[index])
                self._statistics.share = float(n_here > 0)
                with self._autocast():
                    scores = self.network.scores(x, source.start)
                loss = self._loss(scores.to(self._flow.float32), y) * (n_here / n_images)
                total = self._ranks.total(loss.detach().clone())
                read = partial(self._read, total, (number + 1, n_steps), epoch, rates)
                step = Step(number + 1, batches[index].stop, n_images, rates, read)
                if not self.behind:
                    _ = step.loss
                self._update(loss)
                yield step

    def predict(
        self, source: Source, on_progress: OnProgress = silent, stage: str = "test images"
    ) -> np.ndarray:
        """Return the predicted class of every image: int64 (N,)."""
        n = len(source)
        step = _EVALUATION_BATCH * self._ranks.size
        batches = [slice(start, min(start + step, n)) for start in range(0, n, step)]
        parts = [self._ranks.part(batch) for batch in batches]
        self.network.eval()
        classes = np.zeros(n, np.int64)
        on_progress(Progress(stage, 0, n))
        draws = [Draw(np.arange(part.start, part.stop)) for part in parts if _length(part)]
        with self._flow.no_grad(), closing(self._inputs(source, draws, "none")) as inputs:
            for batch, part in zip(batches, parts, strict=True):
                x = self._ranks.agreed(partial(next, inputs, None))
                if x is not None:  # else the last batch has fewer images than there are ranks
                    with self._autocast():
                        scores = self.network.scores(x, source.start)
                    best = scores.to(self._flow.float32).cpu().numpy().argmax(axis=1)
                    classes[part] = best
                on_progress(Progress(stage, batch.stop, n))
        return self._ranks.total_array(classes)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that a step depends on: every tensor of the network and the optimizer."""
        model = {_MODEL + name: value for name, value in self.network.state().items()}
        optimizer = {_OPTIMIZER + name: value for name, value in self._momenta()}
        scale = self._scale.arrays() if self._scale else {}
        return {**model, **optimizer, **{_SCALE + name: value for name, value in scale.items()}}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` returned, in a trainer of the same recipe."""
        self.network.load(_under(_MODEL, arrays))
        state = self.optimizer.state_dict()
        for name, value in _under(_OPTIMIZER, arrays).items():
            index, _, key = name.partition(".")
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
        """Yield the batch of each draw on the device, moved there or before."""
        here = self._moves_on_device and source.start is None
        asked = ([Draw(draw.rows) for draw in draws], "none") if here else (draws, augment)
        with closing(source.batches(*asked)) as batches:
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
            self._scale.step(loss, self.optimizer, self._parameters, self._ranks)
        else:
            loss.backward()
            self._ranks.totals([one.grad for one in self._parameters])
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _read(
        self, loss: Any, place: tuple[int, int], epoch: int, rates: Mapping[str, float]
    ) -> float:
        value = float(loss.item())
        if math.isfinite(value):
            return value
        said = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        raise self._ranks.met(
            RecipeError(
                f"epoch {epoch + 1}/{self._recipe.epochs}: expected a finite loss, found {value} "
                f"at step {place[0]} of {place[1]} (learning rates: {said}); use a smaller --lr, "
                "or --warmup"
            )
        )


def _not_empty(part: slice) -> slice:
    """Return a part of a batch; where there is none, the image before, to go along with."""
    return part if _length(part) else slice(max(part.start - 1, 0), max(part.start, 1))


def _length(part: slice) -> int:
    return int(part.stop - part.start)


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
        Steps taken in the whole run, this one included.
    n_seen : int
        Images of the epoch seen, this step's included.
    n_images : int
        Of this step.
    rates : mapping of str to float
        Learning rate of the head and of each stage that trains.
    read : callable
        Fetches the loss.
    """

    step: int
    n_seen: int
    n_images: int
    rates: Mapping[str, float]
    read: Callable[[], float] = field(repr=False)

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy over its images, before the update; waits for the device.

        Raises
        ------
        RecipeError
            It is not finite.
        """
        return self.read()


_FIRST = 2.0**16
_PATIENCE = 2000


class LossScale:
    """The factor, and what it takes to move it.

    Parameters
    ----------
    flow : module
        The framework.
    """

    def __init__(self, flow: Any) -> None:
        self._flow = flow
        self.factor = _FIRST
        self._since = 0  # steps without an overflow

    def step(self, loss: Any, optimizer: Any, parameters: Sequence[Any], ranks: Ranks) -> None:
        """Take the optimizer's step, or leave it out where a gradient overflowed.

        The one question to the device, whether gradients are finite, waits for the step.
        """
        (loss * self.factor).backward()
        gradients = [one.grad for one in parameters]
        ranks.totals(gradients)
        total = self._flow.stack([gradient.sum() for gradient in gradients]).sum()
        if not math.isfinite(total.item()):
            self.factor, self._since = self.factor / 2, 0
            return
        for gradient in gradients:
            gradient.mul_(1 / self.factor)
        optimizer.step()
        self._since += 1
        if self._since == _PATIENCE:
            self.factor, self._since = self.factor * 2, 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the state: two arrays of one number."""
        return {"factor": np.array([self.factor]), "since": np.array([self._since])}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` returned."""
        self.factor, self._since = float(arrays["factor"][0]), int(arrays["since"][0])
