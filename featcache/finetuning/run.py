"""One training, from its first step or a checkpoint to its last; and its result."""

from __future__ import annotations

import importlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import (
    DivergedError,
    EngineUnavailableError,
    FeatcacheError,
    RecipeError,
    WeightsError,
    one_line,
)
from ..metrics import top1
from ..notebook import ShownAsTable
from ..progress import OnProgress, Progress
from .batches import Source
from .folder import RunFolder
from .network import below
from .recipes import FinetuneRecipe
from .trainer import Step, Trainer


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
        Seconds of training and evaluation.
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
        Seconds of training and evaluation together.
    checkpoint : Path
        The network as safetensors with torchvision's names, or the library's: usable as
        ``--weights``. A library's has no head, which is beside it.
    n_train, n_val, n_test : int
        Images.
    seed : int
        Seed of the order of images, the views, the head, the validation split, and a random
        backbone.
    recipe : FinetuneRecipe
        The hyperparameters used.
    engine, device, precision : str
        What trained, such as ``"torch"``, ``"cpu"``, ``"f32"``.
    cache : Path or None
        The features that were used instead of images.
    init_head : str or None
        The probe's head that the run started with.
    resumed : bool
        Whether an earlier run was resumed.
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


# A checkpoint is written at the end of each epoch but the last, and this long after the one before.
CHECKPOINT_EVERY_S = 180.0

_BEST = "best."


class Run:
    """One training, from its first step or from a checkpoint to its last.

    The curve is measured on ``measured``: the validation split, or test. ``stop`` tells whether
    Ctrl-C was pressed. ``trained_s`` and ``wall_s`` count the seconds of training alone, and of
    everything, before and after a resume.
    """

    def __init__(
        self,
        trainer: Trainer,
        recipe: FinetuneRecipe,
        folder: RunFolder,
        train: Source,
        measured: Source,
        measured_name: str,
        on_progress: OnProgress,
        events: EventLog | None = None,
    ) -> None:
        self.stop: Callable[[], bool] = lambda: False
        self._trainer = trainer
        self._recipe = recipe
        self._folder = folder
        self._train = train
        self._measured = measured
        self._measured_name = measured_name
        self._on_progress = on_progress
        self._events = events
        self._n_batches = trainer.n_batches(len(train))
        self.curve: list[Epoch] = []
        self.trained_s = 0.0
        self.wall_s = 0.0
        self._batch = 0
        self._loss_sum = 0.0
        self._epoch_s = 0.0
        self._best: dict[str, np.ndarray] = {}
        self._whole = True  # no update is half done

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.curve) * self._n_batches + self._batch

    @property
    def n_steps(self) -> int:
        """Steps of all epochs."""
        return self._recipe.epochs * self._n_batches

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, that is kept: with patience the first of the best, else the last."""
        if self._recipe.patience is None:
            return len(self.curve)
        return 1 + int(np.argmax([epoch.top1 for epoch in self.curve])) if self.curve else 0

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or the patience has run out."""
        done, patience = len(self.curve), self._recipe.patience
        return done >= self._recipe.epochs or (
            patience is not None and done - self.best_epoch >= patience
        )

    def load(self, arrays: Mapping[str, np.ndarray], progress: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint; raise WeightsError for one of another network."""
        names = [field.name for field in fields(Epoch)]
        curve = [Epoch(*(epoch[name] for name in names)) for epoch in progress["curve"]]
        position = len(curve) * self._n_batches + progress["batch"]
        if (
            progress["batch"] > self._n_batches
            or position != progress["step"]
            or [epoch.epoch for epoch in curve] != list(range(1, len(curve) + 1))
            or len(curve) > self._recipe.epochs
        ):
            raise WeightsError(
                f"{self._folder.path}: expected a checkpoint of {self._n_batches} steps per epoch, "
                f"found step {progress['step']} after {len(progress['curve'])} epochs and "
                f"{progress['batch']} steps; start anew without --resume"
            )
        best = below(_BEST, arrays)
        try:
            if best:
                self._trainer.network.load(best)  # the end of the run is too late to see it fail
            self._trainer.load_arrays(arrays)
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            # Tensors of other names or shapes; each framework has its own error for them.
            raise WeightsError(
                f"{self._folder.path}: expected a checkpoint of this network, found another's "
                f"({one_line(error)}); start anew without --resume"
            ) from None
        self._best, self.curve = best, curve
        for name in ("batch", "loss_sum", "epoch_s"):
            setattr(self, f"_{name}", progress[name])
        self.trained_s, self.wall_s = progress["trained_s"], progress["wall_s"]

    def train(self) -> None:
        """Run every epoch that is left; end with the network of the epoch that is kept.

        Ctrl-C saves the state and raises KeyboardInterrupt, whose text says where; a loss or a
        parameter that is not finite raises RecipeError.
        """
        try:
            while not self.finished:
                self._epoch()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._stopped()) from None
        if self._best:
            self._trainer.network.load(self._best)

    def _epoch(self) -> None:
        number = len(self.curve) + 1
        n = len(self._train)
        stage = f"epoch {number}/{self._recipe.epochs}"
        earlier_s, earlier_wall_s, earlier_trained_s = self._epoch_s, self.wall_s, self.trained_s
        start = saved = time.perf_counter()

        def clock() -> None:
            spent = time.perf_counter() - start
            self._epoch_s, self.wall_s = earlier_s + spent, earlier_wall_s + spent

        self._on_progress(Progress(stage, min(self._batch * self._recipe.batch_size, n), n))
        with closing(self._trainer.steps(self._train, number - 1, self._batch)) as steps:
            while step := self._next(steps):
                clock()
                self.trained_s = earlier_trained_s + time.perf_counter() - start
                self._batch += 1
                self._loss_sum += step.loss * step.n_images
                self._log(step.step, {"loss": step.loss}, epoch=number, lr=dict(step.rates))
                self._whole = True
                if time.perf_counter() - saved > CHECKPOINT_EVERY_S:
                    self._save()
                    saved = time.perf_counter()
                note = f"loss {self._loss_sum / step.n_seen:.3f}"
                self._on_progress(Progress(stage, step.n_seen, n, note=note))
                if self._trainer.processes.any(self.stop()):
                    raise KeyboardInterrupt
        self._whole = True
        clock()
        self.trained_s = earlier_trained_s + time.perf_counter() - start
        stage = f"{self._measured_name} images"
        predicted = self._trainer.predict(self._measured, self._report_or_stop, stage)
        accuracy = top1(predicted, self._measured.labels)
        clock()
        loss = self._loss_sum / n
        self.curve.append(Epoch(number, loss, accuracy, self._epoch_s))
        self._batch, self._loss_sum, self._epoch_s = 0, 0.0, 0.0
        if self._recipe.patience is not None and self.best_epoch == number:
            self._best = self._trainer.network.state()
        self._log(
            self.step,
            {"train_loss": loss, f"{self._measured_name}_top1": accuracy},
            epoch=number,
        )
        if not self.finished or self._best:  # else the network itself is written at once
            self._save()

    def _next(self, steps: Iterator[Step]) -> Step | None:
        """Take a step; None at the end of the epoch."""
        self._whole = False
        try:
            return next(steps, None)
        except RecipeError as error:
            raise type(error)(f"{error}; {self._folder.kept}") from None

    def _report_or_stop(self, progress: Progress) -> None:
        if self.stop():
            raise KeyboardInterrupt
        self._on_progress(progress)

    def _log(self, step: int, values: dict[str, float], **more: Any) -> None:
        self._folder.log(step=step, **more, **values, wall_s=round(self.wall_s, 3))
        if self._events is not None:
            rates = {f"lr/{name}": rate for name, rate in more.get("lr", {}).items()}
            self._events.add(step, {**values, **rates})

    def _save(self) -> None:
        best = {_BEST + name: value for name, value in self._best.items()}
        progress = {
            "step": self.step,
            "curve": [asdict(epoch) for epoch in self.curve],
            "batch": self._batch,
            "loss_sum": self._loss_sum,
            "epoch_s": self._epoch_s,
            "trained_s": self.trained_s,
            "wall_s": self.wall_s,
        }
        try:
            self._folder.save({**self._trainer.arrays(), **best}, progress)
        except FeatcacheError as error:
            raise DivergedError(
                f"step {self.step} of {self.n_steps}: {error}: training diverged; "
                f"{self._folder.kept}; use a smaller --lr, or --warmup"
            ) from None

    def _stopped(self) -> str:
        """Save the state if it is whole, and say how to resume."""
        if self._whole and self.step:
            self._save()
        return f"step {self.step} of {self.n_steps}: {self._folder.advice}"


class EventLog:
    """Scalars by step, in files that ``tensorboard --logdir`` shows."""

    def __init__(self, folder: Path) -> None:
        event, summary, writer = tensorboard_modules()
        self._event, self._summary = event.Event, summary.Summary
        self._writer: Any = writer.EventFileWriter(str(folder))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        value = [self._summary.Value(tag=tag, simple_value=one) for tag, one in values.items()]
        summary = self._summary(value=value)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Flush to the file."""
        self._writer.close()


def tensorboard_modules() -> tuple[Any, Any, Any]:
    """Return what writes events; EngineUnavailableError where tensorboard is not installed."""
    try:
        return (
            importlib.import_module("tensorboard.compat.proto.event_pb2"),
            importlib.import_module("tensorboard.compat.proto.summary_pb2"),
            importlib.import_module("tensorboard.summary.writer.event_file_writer"),
        )
    except ImportError as error:
        raise EngineUnavailableError(
            f"tensorboard: expected the package tensorboard, found: {error}; run pip install "
            "tensorboard, or leave out --tensorboard (metrics.jsonl has the same numbers)"
        ) from None


# torchrun repeats Ctrl-C to processes that the terminal has sent it to already.
_ECHO_S = 2.0


@contextmanager
def ctrl_c_noted(*, launched: bool = False) -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of raising it in the middle of an update.

    Yields a function that tells whether Ctrl-C was pressed. The second one is raised at once,
    except under torchrun (``launched``) within two seconds.
    """
    pressed: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return

    def note(*_: Any) -> None:
        now = time.monotonic()
        if pressed and not (launched and now - pressed[0] < _ECHO_S):
            raise KeyboardInterrupt
        pressed.append(now)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
