"""A saved head at work: classes of new images, and accuracy on another cache.

Whatever the head is used on must have been made as its own features were. Of a cache,
its provenance says so. Of new images it is arranged: the backbone, the weights and the
size that the head recorded are loaded again, and compared with the record before any
image is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backbone import BACKBONES
from ..datasets import OnError, reading_threads
from ..decoding import decoded_batches
from ..engines import build_engine, choose_engine, computed_by
from ..errors import DatasetError, FeatcacheError, RecipeError, WeightsError
from ..extraction import CUT
from ..preprocess import MAX_SIZE, MIN_SIZE
from ..probes import Head, feature_differences, rounding_differences
from ..progress import OnNote, OnProgress, Progress, silent
from ..weights import WEIGHT_NAMES, Weights, load_weights
from ._csv import as_csv
from ._evaluation import HeadResult, checked_head, evaluate_head
from ._places import PlacedImages, find_places

__all__ = ["HeadResult", "OnNote", "Prediction", "as_csv", "evaluate_head", "predict"]

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """What a head says about one image.

    Parameters
    ----------
    path : str
        The image file; ``archive.zip!name`` inside an archive.
    class_name : str
        The class with the highest score.
    probability : float
        Its share of the softmax, in [0, 1].
    top : tuple of (str, float)
        The likeliest classes with their probabilities, the first one included.
    """

    path: str
    class_name: str
    probability: float
    top: tuple[tuple[str, float], ...]


def predict(
    paths: str | Path | Sequence[str | Path],
    head: str | Path | Head,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    batch_size: int = _BATCH_SIZE,
    top: int = 1,
    on_error: OnError = "fail",
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> list[Prediction]:
    """Name the class of images, with a head that `featcache.probe` saved.

    Threads decode the next images while a batch is computed; what is in memory does not grow
    with their number.

    Parameters
    ----------
    paths : str, Path or sequence of them
        Image files, folders and ``.zip`` archives. The last two are searched for image
        files at any depth, hidden ones left out; their order is that of the names.
    head : str, Path or Head
        The head, or its file.
    weights : str or Path, optional
        The backbone's checkpoint; by default the one whose name the head recorded.
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    batch_size : int
        Images per forward pass.
    top : int
        How many classes per image `Prediction.top` names, K at most.
    on_error : str
        ``"fail"`` raises at the first file that is not a readable image, ``"skip"``
        leaves it out and tells ``on_note``.
    on_progress : callable
        Hears of downloads and images.
    on_note : callable
        Hears, as one text each, of files that were skipped, and of another engine,
        device or version than the head's features were made with.

    Returns
    -------
    list of Prediction
        One per image, in the order of ``paths``.

    Raises
    ------
    WeightsError
        Not a head, weights that cannot be had, or ingredients that differ from the head's.
    DatasetError
        Nothing at a path, no image there, an unreadable one, or not one readable.
    EngineUnavailableError
        The engine or the device cannot run here.
    ShapeMismatchError
        A head for features of another length than the backbone's.
    RecipeError
        An option out of range.
    """
    for name, value in (("batch size", batch_size), ("top", top)):
        if value < 1:
            raise RecipeError(f"{name}: expected at least 1, found {value}")
    if on_error not in ("fail", "skip"):
        raise RecipeError(f"on error: expected fail or skip, found {on_error!r}")
    head, where = checked_head(head)
    images = PlacedImages(find_places([paths] if isinstance(paths, (str, Path)) else paths))
    choice = choose_engine(device=device)
    loaded = _load_weights(head, where, weights, on_progress)
    here = {**computed_by(choice, loaded), "cuts": [CUT], "dtype": "float32"}
    differing = feature_differences(head.ingredients, here)
    if differing:
        raise WeightsError(
            f"{where}: expected features made as those that it was trained on, found others: "
            f"{'; '.join(differing)}; name the checkpoint that it was trained on with --weights, "
            "or train another head"
        )
    rounding = rounding_differences(head.ingredients, here)
    if rounding:
        on_note(f"{where}: expect rounding differences: {'; '.join(rounding)}")
    engine = build_engine(choice, loaded, (CUT,), on_note=on_note)

    predictions: list[Prediction] = []
    n = len(images)
    batches = (range(start, min(start + batch_size, n)) for start in range(0, n, batch_size))
    threads, done = reading_threads(images), 0
    on_progress(Progress("images", 0, n))
    with closing(
        decoded_batches(images, batches, loaded.preprocess, workers=threads, on_error=on_error)
    ) as decoded:
        for batch in decoded:
            for _, why in batch.failures:
                on_note(f"skipped: {why}")
            if batch.rows.size:
                names = [images.where(row) for row in batch.rows]
                features = engine.extract(batch.pixels)[CUT]
                _check_finite(features, names)
                predictions += _named(head, features, names, top)
            done += batch.rows.size + len(batch.failures)
            on_progress(Progress("images", done, n))
    if not predictions:
        raise DatasetError(
            f"images: expected at least one that can be read, found none among {n}; "
            "name other files"
        )
    return predictions


def _load_weights(
    head: Head, where: str, weights: str | Path | None, on_progress: OnProgress
) -> Weights:
    """Load the checkpoint that the head recorded, or the one that was named, at its size.

    A fine-tuned network lies beside its head; whether it is the one shows its digest.
    """
    backbone, preprocess = head.ingredients["backbone"], head.ingredients["preprocess"]
    size = preprocess.get("size") if isinstance(preprocess, Mapping) else None
    if not isinstance(backbone, str) or backbone not in BACKBONES:
        raise WeightsError(
            f"{where}: expected a head on {', '.join(BACKBONES)}, found one on {backbone!r:.80}"
        )
    if type(size) is not int or not MIN_SIZE <= size <= MAX_SIZE:
        raise WeightsError(
            f"{where}: expected a head on images of {MIN_SIZE} to {MAX_SIZE} pixels a side, found "
            f"{size!r:.80}"
        )
    if weights is None:
        weights = head.ingredients.get("weights")
        beside = Path(where).with_name(Path(str(weights)).name or "none")
        if weights not in WEIGHT_NAMES and beside.suffix == ".safetensors" and beside.is_file():
            weights = beside
        elif weights not in WEIGHT_NAMES:
            raise WeightsError(
                f"{where}: expected the checkpoint that its features were made with, "
                f"{weights!r:.80}, which is not one of {', '.join(WEIGHT_NAMES)}; name it with "
                f"--weights (its SHA-256 is {head.ingredients['weights_sha256']!r:.80})"
            )
    return load_weights(weights, backbone, size=size, on_progress=on_progress)


def _check_finite(features: np.ndarray, names: Sequence[str]) -> None:
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if broken.size:
        raise FeatcacheError(
            f"{names[broken[0]]}: expected finite features, found NaN or infinity; the weights do "
            "not suit these images"
        )


def _named(
    head: Head, features: np.ndarray, names: Sequence[str], top: int
) -> Iterator[Prediction]:
    # Ordered by score and not by probability, which may round to the same number for two.
    order = np.argsort(-head.scores(features), axis=1, kind="stable")[:, :top]
    likely = np.take_along_axis(head.probabilities(features), order, axis=1)
    for name, classes, shares in zip(names, order.tolist(), likely.tolist(), strict=True):
        pairs = tuple(zip((head.class_names[index] for index in classes), shares, strict=True))
        yield Prediction(name, *pairs[0], pairs)
