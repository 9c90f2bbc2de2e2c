"""Cross-validation of a probe on a cache: every image is tested by a head that did not see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RecipeError, one_line
from ..notebook import ShownAsTable
from ..progress import OnProgress
from ..runs import cache_facts, new_run, runs_folder, save_predictions, save_run
from ..store.cache import Cache
from .crossval import CrossValidation, Fitted, Fold, cross_validate, over_folds
from .labels_and_numbers import check_options
from .outcomes import Columns, class_outcomes, number_outcomes
from .question import Asked, ask
from .regression import probe_numbers

if TYPE_CHECKING:
    from .probe import ProbeOptions

_LISTED = 5  # classes named in a note


@dataclass(frozen=True)
class CrossValidationResult(ShownAsTable):
    """The score of the heads of all folds, each on the images that it did not see.

    Parameters
    ----------
    metric : str
        What is scored, and what each fold's sweep maximised; ``"r2"``, the mean over the numbers
        asked for, whose penalties generalized cross-validation chose within each fold.
    mean : float
        Of all images together, and over the repeats: in [0, 1], or at most 1 for R2.
    interval : tuple of 2 floats
        95 %, over draws of groups, or of images where there are none.
    scores : tuple of float
        Of each fold's test images, repeat by repeat.
    folds : tuple of Fold
        Images, penalty and score of each fold.
    n_folds, repeats : int
        Folds, and how many times they were drawn.
    n_images, n_groups, n_unlabelled : int
        Images tested, groups among them, and images left out without a target.
    class_names : tuple of str
        In label order, or the names of the numbers.
    scale : str
        ``"none"``, ``"standardize"`` (by the training images of each fold) or ``"l2"``.
    seed : int
        Of folds and holdouts.
    wall_s : float
        Of all folds.
    views, cuts : tuple of str
        The flip views that the heads were trained on; where the features were taken.
    cache : Path
        The features.
    target, task, split, group, where, table
        As in `ProbeResult`; the split is ``"folds"``.
    notes : tuple of str
        Further remarks.
    run : Path
        Folder of the record.
    """

    metric: str
    mean: float
    interval: tuple[float, float]
    scores: tuple[float, ...]
    folds: tuple[Fold, ...]
    n_folds: int
    repeats: int
    n_images: int
    n_groups: int
    n_unlabelled: int
    class_names: tuple[str, ...]
    scale: str
    seed: int
    wall_s: float
    views: tuple[str, ...]
    cuts: tuple[str, ...]
    cache: Path
    notes: tuple[str, ...]
    run: Path
    target: str | None
    task: str
    split: str
    group: str | None
    where: str | None
    table: str | None


def probe_in_folds(
    cache: Cache, options: ProbeOptions, cuts: Sequence[str], on_progress: OnProgress
) -> CrossValidationResult:
    """Cross-validate the probe on all images of a cache, whatever their split; save the record."""
    assert options.cv is not None
    asked = ask(cache, options, views=cache.views, cuts=cuts, together=True)
    if asked.task == "labels":
        raise RecipeError(
            "cv: expected classes or numbers, found several labels in "
            f"{asked.describes['target']}; leave out cv, or ask for a column of one label with "
            "--task classification"
        )
    run = new_run(runs_folder(options.runs), "cv")
    validate = _of_classes if asked.task == "classes" else _of_numbers
    validated = validate(asked, options, on_progress)
    images = asked.train
    result = CrossValidationResult(
        metric=options.metric if asked.task == "classes" else "r2",
        mean=validated.score,
        interval=validated.interval,
        scores=tuple(fold.score for fold in validated.folds),
        folds=validated.folds,
        n_folds=options.cv,
        repeats=options.repeats,
        n_images=validated.n_images,
        n_groups=validated.n_groups,
        n_unlabelled=asked.n_unlabelled,
        class_names=asked.names,
        scale=options.scale,
        seed=options.seed,
        wall_s=validated.wall_s,
        views=cache.views[: len(images.views)],
        cuts=tuple(cuts) or cache.cuts[:1],
        cache=cache.path,
        notes=(*asked.notes, *_of_one_group(asked, validated)),
        run=run,
        **asked.describes,
    )
    record = {
        "kind": "cross-validation",
        "method": f"probe, {options.cv} folds",
        **asdict(result),
        **cache_facts(cache),
        "question": options.record(),
        "class_weight": options.class_weight,
        "n_train": result.n_images,
        "n_test": result.n_images,
        "run": run.name,
    }
    columns = _outcomes(asked, validated)
    if columns is not None:
        save_predictions(run, columns)
    save_run(run, record)
    return result


def _outcomes(asked: Asked, validated: CrossValidation) -> Columns | None:
    """Return what the first repeat predicted of each image, by heads that did not see it."""
    images, predicted = asked.train, validated.predicted[0]
    if asked.task == "numbers":
        numbers = predicted.reshape(len(predicted), -1)
        return number_outcomes(images.ids, images.labels, numbers, asked.names, split="fold")
    if validated.probabilities is None:
        return None  # of ridge, whose scores rank classes and are no probabilities
    seen = np.flatnonzero(np.isfinite(validated.probabilities[0]).all(axis=1))
    part = images.take(seen)
    own, of_label = validated.probabilities[0][seen].T
    return class_outcomes(
        part.ids,
        part.labels,
        predicted[seen],
        asked.names,
        probability=own,
        label_probability=of_label,
        split="fold",
    )


def _of_one_group(asked: Asked, validated: CrossValidation) -> list[str]:
    """Say which classes no head can know when it is tested on them."""
    names = [one_line(asked.names[number]) for number in validated.of_one_group]
    if not names:
        return []
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return [
        f"all images of {', '.join(names[:_LISTED])}{more} are of one group: the head that is "
        "tested on them saw none, and each counts as an error"
    ]


def _of_classes(asked: Asked, options: ProbeOptions, on_progress: OnProgress) -> CrossValidation:
    images = asked.train
    return cross_validate(
        images.views,
        images.labels,
        len(asked.names),
        options.job(),
        n_folds=options.cv or 0,
        repeats=options.repeats,
        groups=images.groups,
        weights=images.weights,
        class_weight=options.class_weight,
        class_names=asked.names,
        scale=options.scale,
        on_progress=on_progress,
    )


def _of_numbers(asked: Asked, options: ProbeOptions, on_progress: OnProgress) -> CrossValidation:
    check_options(options, of_labels=False)
    images = asked.train

    def fit_predict(train: np.ndarray, test: np.ndarray, _: OnProgress) -> Fitted:
        held = images.take(test)
        _scores, head = probe_numbers(
            images.take(train),
            None,
            held,
            asked.names,
            C=options.C,
            weight_decay=options.weight_decay,
            scale=options.scale,
            check=False,
        )
        return Fitted(head.scores(held.views[0]))

    return over_folds(
        images.labels,
        fit_predict,
        lambda predicted, rows: _mean_r2(predicted, images.labels[rows]),
        n_folds=options.cv or 0,
        repeats=options.repeats,
        groups=images.groups,
        left_out=None if images.weights is None else images.weights == 0,
        seed=options.seed,
        on_progress=on_progress,
    )


def _mean_r2(predicted: np.ndarray, numbers: np.ndarray) -> float:
    """Return R2, the mean over the T columns of (M, T); NaN where one is constant."""
    errors = np.nansum((predicted - numbers) ** 2, axis=0)
    spread = np.nansum((numbers - np.nanmean(numbers, axis=0)) ** 2, axis=0)
    return float(np.mean(1 - errors / spread)) if (spread > 0).all() else math.nan
