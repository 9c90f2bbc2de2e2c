"""From a data set and a target to a model: the probe first, fine-tuning where it is not enough.

Everything is decided on a validation split of the training images, the same for all
that is tried; the test split is read when an option is done, and decides nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import Dataset, load_dataset
from ..errors import DatasetError, EngineUnavailableError, RecipeError
from ..extraction import extract
from ..finetuning import choose_trainer
from ..metrics import wilson_interval
from ..notebook import ShownAsTable
from ..progress import OnNote, OnProgress, silent
from ..recipe import FINETUNE_RECIPES
from ..runs import runs_folder
from ..sampling import validation_rows
from ..training import TRAINERS
from ._climb import Attempt, Option, Outcome, best_of, climb
from ._work import Work

__all__ = ["Attempt", "FitResult", "Outcome", "fit"]

_LEAST_OF_A_CLASS = 3


@dataclass(frozen=True)
class FitResult(ShownAsTable):
    """What was tried, and what came out of it.

    Parameters
    ----------
    target : float
        As asked for.
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
        The model: what `featcache.predict` takes. A fine-tuned network lies beside its head.
    attempts : tuple of Attempt
        Everything that was considered, the probe first, then by cost.
    next_step : str
        What could still be tried, and what it would cost; empty where nothing is left.
    wall_s : float
        All in all.
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


def fit(
    dataset: str | Path | Dataset = "cifar10",
    target: float = 0.9,
    *,
    budget_s: float | None = None,
    backbone: str = "resnet18",
    weights: str | Path = "imagenet",
    size: int | None = None,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "f32",
    epochs: int | None = None,
    seed: int = 0,
    data_root: str | Path | None = None,
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> FitResult:
    """Reach an accuracy at the least cost.

    Extracts features (or reuses a cache) and probes them. Where the target is missed,
    what each fine-tune would cost here is estimated from a few timed steps, and they are
    tried by cost: the last stage from a cache of the cut before it, then the whole
    network at split rates, then at one rate; each begins with the probe's head.

    Parameters
    ----------
    dataset, backbone, weights, size, engine, device, precision, data_root
        As in `featcache.extract`. An engine that trains (``"oneflow"``, ``"torch"``) does the
        fine-tunes too; else they choose as `featcache.finetune` does.
    target : float
        Accuracy on the validation split, above 0 and at most 1.
    budget_s : float, optional
        Seconds that everything may take. What is expected to go beyond is not begun; what
        is begun is finished.
    epochs : int, optional
        Of each fine-tune; the tutorial's 3 by default.
    seed : int
        Of every draw.
    runs : str or Path, optional
        Folder for records and models; ``cache/runs`` by default.
    on_progress, on_note : callable
        Hear of the work, and of each decision with its reason.

    Returns
    -------
    FitResult

    Raises
    ------
    RecipeError
        A target outside 0 to 1, or a budget that is not positive.
    DatasetError
        A class of fewer than 3 training images.
    FeatcacheError
        As `featcache.extract`, `featcache.probe` and `featcache.finetune`.
    """
    started = time.monotonic()
    if not 0 < target <= 1:
        raise RecipeError(f"target: expected a fraction above 0 and up to 1, found {target}")
    if budget_s is not None and not budget_s > 0:
        raise RecipeError(f"budget: expected seconds above 0, found {budget_s}")
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset, data_root=data_root, on_progress=on_progress)
    _check_classes(dataset)
    made: dict[str, Any] = {"backbone": backbone, "weights": weights, "size": size}
    extracting = {**made, "engine": engine, "device": device, "precision": precision}
    heard: dict[str, Any] = {"on_progress": on_progress, "on_note": on_note}
    extracted = extract(dataset, **extracting, **heard)
    cache = extracted.load()
    recipe = FINETUNE_RECIPES["split"]
    # What a fine-tune holds out too, so that all are measured on the same images.
    held = validation_rows(dataset.train.labels, recipe.val_fraction, seed)
    work = Work(dataset, cache, held, seed, runs_folder(runs), on_progress)
    head, outcome = work.probe()
    probe_s = time.monotonic() - started
    first = Attempt("probe", "done", "the cheapest of all", probe_s, probe_s, outcome)
    on_note(f"probe: {100 * outcome.val_top1:.2f} % on {len(held):,} validation images")
    options: list[Option] = []
    if outcome.val_top1 < target:
        training: dict[str, Any] = {
            **made,
            "engine": engine if engine in TRAINERS else "auto",
            "device": device,
            "epochs": epochs or recipe.epochs,
        }
        try:
            on_note(choose_trainer(training["engine"], device).why)
        except EngineUnavailableError as error:
            options = [_impossible(f"{error}")]
        else:
            options = work.options(head, extracted, extracting, training)

    def told(attempt: Attempt) -> None:
        found = f"{100 * attempt.outcome.val_top1:.2f} %: " if attempt.outcome else ""
        on_note(f"{attempt.name}: {attempt.status}, {found}{attempt.why}")

    spent_s = time.monotonic() - started
    attempts = climb(first, options, target, budget_s, spent_s, on_attempt=told)
    winner = best_of(attempts)
    won = winner.outcome
    assert won is not None
    test_top1, model = won.top1, won.head
    if test_top1 is None or model is None:  # of the probe
        refitted = work.refit()
        test_top1, model = refitted.top1, refitted.head
    left = [attempt for attempt in attempts if attempt.status == "over budget"]
    return FitResult(
        target=target,
        reached=won.val_top1 >= target,
        winner=winner.name,
        val_top1=won.val_top1,
        top1=test_top1,
        top1_interval=wilson_interval(test_top1, len(dataset.test)),
        n_train=len(dataset.train),
        n_val=len(held),
        n_test=len(dataset.test),
        head=model,
        attempts=tuple(attempts),
        next_step=f"{left[0].name}, about {left[0].estimated_s:,.0f} s" if left else "",
        wall_s=time.monotonic() - started,
    )


def _check_classes(dataset: Dataset) -> None:
    """Refuse a class that is too small to be learnt from, chosen by and measured on."""
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    least = int(counts.argmin())
    if counts[least] < _LEAST_OF_A_CLASS:
        raise DatasetError(
            f"{dataset.name} train: expected at least {_LEAST_OF_A_CLASS} images of every class "
            "(one to learn from, one to choose the penalty by, one to measure on), found "
            f"{counts[least]} of {dataset.class_names[least]!r}; add some, or leave that class out"
        )


def _impossible(why: str) -> Option:
    """Return what stands for all fine-tunes where nothing can train."""

    def run() -> Outcome:
        raise EngineUnavailableError(why)

    return Option("fine-tuning", 0.0, run, why)
