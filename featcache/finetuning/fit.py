"""Reaching an accuracy at the least cost: the probe first, then fine-tunes, the cheapest first.

Everything is decided on one validation split of the training images; the test split is read when
an option is done, and decides nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones.architectures import BACKBONES, get_backbone
from ..backbones.naming import parse_backbone
from ..datasets.dataset import Dataset, Split
from ..datasets.loading import load_dataset
from ..errors import DatasetError, EngineUnavailableError, FeatcacheError, RecipeError
from ..extraction.extract import extract
from ..extraction.result import ExtractResult
from ..metrics import top1, wilson_interval
from ..notebook import ShownAsTable
from ..options import with_options
from ..probes.head import Head
from ..probes.ingredients import feature_ingredients
from ..probes.probe import ProbeOptions, ProbeResult, probe
from ..progress import OnNote, OnProgress, Progress, silent
from ..runs import runs_folder
from ..sampling import validation_rows
from .finetune import finetune
from .framework import choose_trainer
from .ingredients import check_labelled, check_trainable, check_two_classes
from .recipes import FINETUNE_RECIPES, TRAINERS

_LEAST_OF_A_CLASS = 3


@dataclass(frozen=True)
class FitResult(ShownAsTable):
    """What was tried, and the model that it gave.

    Parameters
    ----------
    target : float
        The accuracy asked for.
    reached : bool
        Whether the winner's accuracy on the validation split is at least the target.
    winner : str
        The attempt with the best accuracy on the validation split.
    val_top1 : float
        That accuracy.
    top1 : float
        The winner's accuracy on the test split.
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval of it.
    n_train, n_val, n_test : int
        Images; the validation split is a part of the training images.
    head : Path
        The model: what `featcache.predict` takes. A fine-tuned network is beside its head.
    attempts : tuple of Attempt
        Every option, the probe first, then by cost.
    next_step : str
        What could still be tried, and its cost; empty where nothing is left.
    wall_s : float
        Seconds of everything.
    over_s : float
        Of these, seconds beyond the budget; 0 within it, or without one.
    """

    target: float
    reached: bool
    winner: str
    val_top1: float
    top1: float
    top1_interval: tuple[float, float]
    n_train: int
    n_val: int
    n_test: int
    head: Path
    attempts: tuple[Attempt, ...]
    next_step: str
    wall_s: float
    over_s: float = 0.0


@dataclass(frozen=True)
class FitOptions:
    """The options of `featcache.fit`.

    Parameters
    ----------
    target : float
        Accuracy on the validation split to reach, above 0 and at most 1.
    budget_s : float, optional
        Seconds that everything may take. Features that are expected to exceed it are an error,
        and a fine-tune is not started; one that has started is stopped, unless it is in its last
        epoch. So the budget is exceeded by at most one epoch, or one fit of the probe.
    backbone, weights, size, engine, device, precision, data_root
        As in `featcache.extract`. An engine that trains (``"oneflow"``, ``"torch"``) also runs
        the fine-tunes; else they choose as `featcache.finetune` does.
    epochs : int, optional
        Epochs of each fine-tune, the tutorial's 3 by default; the last takes twice as many.
    seed : int
        Seed of every random draw.
    runs : str or Path, optional
        Folder for records and models; ``cache/runs`` by default.

    Raises
    ------
    RecipeError
        A target outside 0 to 1, or a budget that is not positive.
    """

    target: float = 0.9
    budget_s: float | None = None
    backbone: str = "resnet18"
    weights: str | Path | None = None
    size: int | None = None
    engine: str = "auto"
    device: str = "auto"
    precision: str = "f32"
    epochs: int | None = None
    seed: int = 0
    data_root: str | Path | None = None
    runs: str | Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0 < self.target <= 1:
            raise RecipeError(
                f"target: expected a fraction above 0 and up to 1, found {self.target}"
            )
        if self.budget_s is not None and not self.budget_s > 0:
            raise RecipeError(f"budget: expected seconds above 0, found {self.budget_s}")

    @property
    def extracting(self) -> dict[str, Any]:
        """What `extract` takes of these."""
        names = ("backbone", "weights", "size", "engine", "device", "precision")
        return {name: getattr(self, name) for name in names}

    @property
    def training(self) -> dict[str, Any]:
        """What `finetune` takes of these."""
        return {
            "backbone": self.backbone,
            "weights": self.weights,
            "size": self.size,
            "engine": self.engine if self.engine in TRAINERS else "auto",
            "device": self.device,
            "epochs": self.epochs or FINETUNE_RECIPES["split"].epochs,
        }


@with_options(FitOptions)
def fit(
    dataset: str | Path | Dataset = "cifar10",
    target: float | None = None,
    *,
    options: FitOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> FitResult:
    """Reach an accuracy at the least cost.

    Extracts features (or reuses a cache) and fits a probe. If that misses the target, it
    estimates the cost of each fine-tune from a few timed steps, and tries them by cost: the last
    stage of a ResNet from a cache of the cut before it, then the whole network, in small steps at
    split rates, then in large ones on crops. Each starts with the probe's head.

    Parameters
    ----------
    dataset : str, Path or Dataset
        As `featcache.load_dataset` takes it.
    target : float, optional
        Accuracy on the validation split to reach, above 0 and at most 1; 0.9 by default.
    options : FitOptions, optional
        Its fields can also be given by name, as keyword arguments.
    on_progress, on_note : callable
        Called with the progress of the work, and with each decision and its reason.

    Returns
    -------
    FitResult

    Raises
    ------
    RecipeError
        A target outside 0 to 1, or a budget that is not positive.
    DatasetError
        Fewer than 2 classes, or a class with fewer than 3 training images.
    FeatcacheError
        As `featcache.extract`, `featcache.probe` and `featcache.finetune`.
    """
    budget = _Budget(options.budget_s)
    if target is not None:
        options = replace(options, target=target)
    target = options.target
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset, data_root=options.data_root, on_progress=on_progress)
    _check_classes(dataset)
    on_extracted = budget.watched(on_progress)
    extracted = extract(dataset, **options.extracting, on_progress=on_extracted, on_note=on_note)
    # What a fine-tune holds out too, so that all are measured on the same images.
    recipe = FINETUNE_RECIPES["split"]
    held_out = validation_rows(dataset.train.labels, recipe.val_fraction, options.seed)
    work = _Work(dataset, extracted, held_out, options, on_progress, budget)
    head, outcome = work.probe()
    probe_s = budget.spent_s
    first = Attempt("probe", "done", "the cheapest option", probe_s, probe_s, outcome)
    on_note(f"probe: {100 * outcome.val_top1:.2f} % on {len(held_out):,} validation images")
    choices: list[Option] = []
    if outcome.val_top1 < target:
        try:
            training = options.training["engine"]
            extracted_by = str(work.meta.get("engine"))
            check_trainable(parse_backbone(options.backbone), training, extracted_by)
            library = options.backbone not in BACKBONES
            on_note(choose_trainer(training, options.device, library=library).why)
        except (EngineUnavailableError, RecipeError) as error:
            choices = [_impossible(f"{error}")]
        else:
            choices = work.choices(head, on_note)

    def note(attempt: Attempt) -> None:
        accuracy = f"{100 * attempt.outcome.val_top1:.2f} %: " if attempt.outcome else ""
        on_note(f"{attempt.name}: {attempt.status}, {accuracy}{attempt.why}")

    spent_s = budget.spent_s
    attempts = climb(first, choices, target, budget.for_work_s, spent_s, on_attempt=note)
    winner = best_of(attempts)
    best = winner.outcome
    assert best is not None
    test_top1, model = best.top1, best.head
    if test_top1 is None or model is None:  # the probe's
        refitted = work.refit()
        test_top1, model = refitted.top1, refitted.head
    left = [attempt for attempt in attempts if attempt.status == "over budget"]
    return FitResult(
        target=target,
        reached=best.val_top1 >= target,
        winner=winner.name,
        val_top1=best.val_top1,
        top1=test_top1,
        top1_interval=wilson_interval(test_top1, len(dataset.test)),
        n_train=len(dataset.train),
        n_val=len(held_out),
        n_test=len(dataset.test),
        head=model,
        attempts=tuple(attempts),
        next_step=f"{left[0].name}, about {left[0].estimated_s:,.0f} s" if left else "",
        wall_s=budget.spent_s,
        over_s=max(0.0, budget.spent_s - budget.seconds) if budget.seconds else 0.0,
    )


_SURE_S = 3.0  # of work, after which its speed tells how long it takes


class _OverBudgetError(FeatcacheError):
    """A fine-tune that the budget has stopped."""


class _Budget:
    """The seconds of a fit: spent, left, and kept for the last step."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.kept_s = 0.0  # for the probe's fit to all training images
        self._started = time.monotonic()

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def for_work_s(self) -> float | None:
        """The budget without what is kept."""
        return None if self.seconds is None else self.seconds - self.kept_s

    @property
    def left_s(self) -> float:
        """Seconds left for work; infinity without a budget, negative where it is exceeded."""
        return float("inf") if self.for_work_s is None else self.for_work_s - self.spent_s

    def watched(self, on_progress: OnProgress) -> OnProgress:
        """Return an `on_progress` that refuses an extraction which cannot end in time."""
        first: dict[str, tuple[int, float]] = {}

        def report(message: Progress) -> None:
            on_progress(message)
            done, since = first.setdefault(message.stage, (message.done, self.spent_s))
            worked_s, n_done = self.spent_s - since, message.done - done
            if message.total is None or n_done <= 0 or worked_s < _SURE_S:
                return
            needed_s = worked_s / n_done * (message.total - message.done)
            if needed_s > self.left_s:
                raise RecipeError(
                    f"budget: expected at least {self.spent_s + needed_s:,.0f} s, which the "
                    f"features alone take here, found {self.seconds:,.0f} s; give a larger "
                    "--budget, or run featcache extract first (fit takes its features)"
                )

        return report

    def stopping(self, on_progress: OnProgress, epochs: int) -> OnProgress:
        """Return an `on_progress` that stops a fine-tune before its last epoch."""

        def report(message: Progress) -> None:
            on_progress(message)
            stage = message.stage
            last = stage == f"epoch {epochs}/{epochs}"
            if self.left_s < 0 and stage.startswith("epoch ") and not last:
                raise _OverBudgetError(f"stopped in {stage}, at the budget's end")

        return report


def _check_classes(dataset: Dataset) -> None:
    """Refuse a class that is too small to learn from, choose by and measure on."""
    for role, split in (("train", dataset.train), ("test", dataset.test)):
        check_labelled(split.labels, f"{dataset.name} {role}")
    check_two_classes(dataset.train.labels, dataset.name)
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    least = int(counts.argmin())
    if counts[least] < _LEAST_OF_A_CLASS:
        raise DatasetError(
            f"{dataset.name} train: expected at least {_LEAST_OF_A_CLASS} images of every class "
            "(one to learn from, one to choose the penalty by, one to measure on), found "
            f"{counts[least]} of {dataset.class_names[least]!r}; add some, or leave that class out"
        )


def _impossible(why: str) -> Option:
    """Return an option that stands for all fine-tunes where nothing can train."""

    def run() -> Outcome:
        raise EngineUnavailableError(why)

    return Option("fine-tuning", 0.0, run, why)


@dataclass(frozen=True)
class Outcome:
    """The result of an option.

    ``None`` stands for the probe's, which is fitted again to all training images if it wins.
    """

    val_top1: float  # accuracy on the validation split
    top1: float | None = None  # on the test split, read once, when the option was done
    head: Path | None = None  # what `featcache.predict` takes
    run: Path | None = None  # folder of the record


@dataclass(frozen=True)
class Option:
    """Something to try."""

    name: str  # in messages and records
    estimated_s: float  # expected seconds on this machine
    run: Callable[[], Outcome]
    obstacle: str = ""  # why it cannot be tried; empty where it can


@dataclass(frozen=True)
class Attempt:
    """An option, and whether it was tried.

    Parameters
    ----------
    name : str
        The option's.
    status : str
        ``"done"``, ``"not needed"``, ``"over budget"`` or ``"not possible"``.
    why : str
        The reason.
    estimated_s : float
        Expected seconds.
    wall_s : float or None
        Seconds that it took.
    outcome : Outcome or None
        Its result; None where it was not tried.
    """

    name: str
    status: str
    why: str
    estimated_s: float
    wall_s: float | None = None
    outcome: Outcome | None = None


def climb(
    first: Attempt,
    options: Sequence[Option],
    target: float,
    budget_s: float | None,
    spent_s: float,
    *,
    on_attempt: Callable[[Attempt], None] = lambda attempt: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Attempt]:
    """Try options by increasing cost; return an attempt for each, ``first`` in front.

    ``spent_s`` of the budget are gone already. ``on_attempt`` is called with each decision.
    """
    start = clock() - spent_s
    attempts = [first]
    for option in sorted(options, key=lambda option: option.estimated_s):
        best = best_of(attempts)
        reached = best.outcome is not None and best.outcome.val_top1 >= target
        left_s = float("inf") if budget_s is None else budget_s - (clock() - start)
        attempt = Attempt(option.name, "done", "", option.estimated_s)
        if reached:
            attempt = replace(attempt, status="not needed", why=f"{best.name} reached the target")
        elif option.obstacle:
            attempt = replace(attempt, status="not possible", why=option.obstacle)
        elif option.estimated_s > left_s:
            attempt = replace(
                attempt,
                status="over budget",
                why=f"about {option.estimated_s:,.0f} s, and {max(left_s, 0):,.0f} s are left",
            )
        else:
            started = clock()
            try:
                outcome = option.run()
            except _OverBudgetError as error:
                attempt = replace(attempt, status="over budget", why=str(error))
            else:
                why = f"the cheapest left, {best.name} stopped at {100 * _val(best):.2f} %"
                attempt = replace(attempt, why=why, outcome=outcome)
            attempt = replace(attempt, wall_s=clock() - started)
        attempts.append(attempt)
        on_attempt(attempt)
    return attempts


def best_of(attempts: Sequence[Attempt]) -> Attempt:
    """Return the attempt with the highest validation accuracy; of equal ones the first."""
    return max((attempt for attempt in attempts if attempt.outcome), key=_val)


def _val(attempt: Attempt) -> float:
    return attempt.outcome.val_top1 if attempt.outcome else 0.0


FREEZE = "layer3"
# Small steps from the probe's head on: at the tutorial's rates, or with BatchNorm's statistics
# moving, the first epochs lose what the probe gained (Kumar et al., ICLR 2022, explain why).
GENTLY = {"lr": 1e-4, "bn": "eval", "schedule": "cosine", "patience": 2}
# Large steps that fall to 0, on crops: the row lp-ft-part-long of benchmarks/reproduce.py.
BOLDLY = {"lr": 0.01, "augment": "crop-flip", "schedule": "cosine", "patience": 2}
_BOLD_EPOCHS = 2  # times as many as of the others
_TIMED_IMAGES = 192  # three of the tutorial's batches: some seconds
_STEP_PASSES = 3  # forward passes that a step costs at least: one forward, and a gradient's two
# A forward pass against one with its gradients: 80 and 30 images per second at 64 px.
_EVALUATION_SPEED = 2.5
_DISK_SHARE = 0.5  # of the free space, that a cache of feature maps may take


class _Work:
    """What the options share: the data, its validation split, and how each is done."""

    def __init__(
        self,
        dataset: Dataset,
        extracted: ExtractResult,
        held_out: np.ndarray,
        options: FitOptions,
        on_progress: OnProgress,
        budget: _Budget,
    ) -> None:
        self._budget = budget
        self._dataset = dataset
        self._extracted = extracted
        self._cache = extracted.load()
        self._held_out = held_out
        self._options = options
        self._cutting = {**options.extracting, "cut": FREEZE, "views": "flips"}
        self._runs = runs_folder(options.runs)
        self._on_progress = on_progress

    @property
    def meta(self) -> Mapping[str, Any]:
        """What the cache of features records."""
        return self._cache.meta

    def probe(self) -> tuple[Head, Outcome]:
        """Fit the head to all but the validation split, and measure it there."""
        features = np.asarray(self._cache.train.features, np.float32)
        labels = self._cache.train.labels
        fitted = np.delete(np.arange(len(labels)), self._held_out)
        n_classes = len(self._cache.class_names)
        job = ProbeOptions(seed=self._options.seed).job()
        views = [features[fitted]]
        more = (views, labels[fitted], n_classes, self._on_progress)
        started = time.monotonic()
        job, _ = job.with_penalty(*more)
        solution = job.train(*more)
        self._budget.kept_s = time.monotonic() - started
        head = Head(
            solution.weight,
            solution.bias,
            self._cache.class_names,
            self._cache.fingerprint,
            "none",
            feature_ingredients(self._cache.meta),
        )
        return head, Outcome(top1(head.predict(features[self._held_out]), labels[self._held_out]))

    def refit(self) -> ProbeResult:
        """Fit the winning probe to all training images; read the test split."""
        seed = self._options.seed
        return probe(self._cache, seed=seed, runs=self._runs, on_progress=self._on_progress)

    def choices(self, head: Head, on_note: OnNote) -> list[Option]:
        """Time a few steps of each kind; return the options with their expected cost.

        Where not even the forward passes of the cheapest fit into the budget, nothing is timed.
        """
        n_train, n_val = len(self._dataset.train), len(self._held_out)
        training = self._options.training
        n_seen = training["epochs"] * (n_train - n_val + n_val / _EVALUATION_SPEED)
        n_seen += len(self._dataset.test) / _EVALUATION_SPEED
        common = {**training, "init_head": head, "seed": self._options.seed}
        gently = {**common, **GENTLY}
        boldly = {**common, **BOLDLY, "epochs": _BOLD_EPOCHS * training["epochs"]}
        passes = 4 * n_train + len(self._dataset.test)
        timed = 2 * _STEP_PASSES * _TIMED_IMAGES
        least_s = (min(n_seen, passes) + timed) / max(self._extracted.images_per_s, 1e-9)
        if least_s > self._budget.left_s:
            on_note(
                f"budget: the cheapest fine-tune takes at least {least_s:,.0f} s, and "
                f"{max(self._budget.left_s, 0):,.0f} s are left: none is timed"
            )
            return [Option("fine-tuning", least_s, self._unaffordable)]
        rates = self._rates()
        whole_s = n_seen / rates["whole"]
        whole = [
            Option("split", whole_s, lambda: self._finetune("split", **gently)),
            Option("full", _BOLD_EPOCHS * whole_s, lambda: self._finetune("full", **boldly)),
        ]
        if "cut" not in rates:
            return whole
        cut_s = passes / max(self._extracted.images_per_s, 1e-9) + n_seen / rates["cut"]

        def train_cut() -> Outcome:
            maps = extract(self._dataset, **self._cutting, on_progress=self._on_progress)
            return self._finetune("split", cache=maps.cache, freeze_until=FREEZE, **gently)

        obstacle = self._obstacle(passes)
        return [Option(f"layer4 from cached {FREEZE}", cut_s, train_cut, obstacle), *whole]

    def _unaffordable(self) -> Outcome:
        raise _OverBudgetError("not even its forward passes fit into the budget")

    def _obstacle(self, passes: int) -> str:
        """Return why the maps cannot be cached; empty where they can."""
        meta = self._cache.meta
        shape = get_backbone(meta["backbone"]).cut_shape(FREEZE, meta["preprocess"]["size"])
        needed = passes * int(np.prod(shape)) * 4
        free = shutil.disk_usage(self._cache.path.parent).free
        if needed <= _DISK_SHARE * free:
            return ""
        return (
            f"a cache of {FREEZE} would take {needed / 1e9:,.1f} GB of the {free / 1e9:,.1f} GB "
            "that are free"
        )

    def _rates(self) -> dict[str, float]:
        """Return images per second of a few steps: of the whole, and above a ResNet's cut."""
        part = self._part()
        with tempfile.TemporaryDirectory() as folder:
            timed = {**self._options.training, "epochs": 1, "runs": folder}
            timed["on_progress"] = self._on_progress
            whole = finetune(part, "split", **timed)
            if self._options.backbone not in BACKBONES:
                return {"whole": whole.images_per_s}
            maps = extract(part, output=folder, **self._cutting)
            cut = finetune(part, "split", cache=maps.cache, freeze_until=FREEZE, **timed)
        return {"whole": whole.images_per_s, "cut": cut.images_per_s}

    def _part(self) -> Dataset:
        """Return a few images to time the steps on."""

        def some(split: Split, count: int) -> Split:
            drawn = np.random.default_rng(self._options.seed).permutation(len(split))[:count]
            return split.take(np.sort(drawn))

        count = max(_TIMED_IMAGES, len(self._dataset.class_names))
        train, test = some(self._dataset.train, count), some(self._dataset.test, 1)
        return Dataset(self._dataset.name, train, test, "a few images")

    def _finetune(self, method: str, **arguments: Any) -> Outcome:
        stopping = self._budget.stopping(self._on_progress, arguments["epochs"])
        try:
            result = finetune(
                self._dataset, method, runs=self._runs, on_progress=stopping, **arguments
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # without its advice: fit has no --resume
        val = result.epochs[result.best_epoch - 1].top1
        return Outcome(val, result.top1, result.run / "head.safetensors", result.run)
