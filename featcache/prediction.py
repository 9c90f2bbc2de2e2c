"""Using a saved head: classify new images, and test it on a cache.

The features must be made like those the head was trained on. A cache's provenance says how they
were made. For new images the backbone, weights and size that the head recorded are loaded again
and compared with the record before any image is read.
"""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .backbones.architectures import BACKBONES, check_resnet_size
from .backbones.choice import choose_engine
from .backbones.engine import Engine, build_engine, computed_by, settled
from .backbones.loading import load_weights
from .backbones.naming import WEIGHT_NAMES, parse_backbone, recorded_backbone, recorded_weights
from .backbones.weights import Weights
from .datasets.batches import decoded_batches
from .datasets.images import OnError, reading_threads
from .errors import (
    CacheMismatchError,
    DatasetError,
    EngineUnavailableError,
    FeatcacheError,
    OutputError,
    RecipeError,
    WeightsError,
    one_line,
    text_of,
)
from .files import check_writable, csv_line, replaced_file
from .metrics import top1, wilson_interval
from .new_images import (
    ImageSet,
    PlacedImages,
    arrivals,
    find_places,
    named_sets,
    step_of,
    streamed_sets,
    watch_folders,
)
from .options import MAX_PIXELS, check_choice, with_options
from .preprocess import Preprocess
from .probes.head import Head, load_head
from .probes.ingredients import (
    class_differences,
    feature_differences,
    head_cuts,
    rounding_differences,
)
from .probes.question import opened, own_test_images
from .progress import OnNote, OnProgress, Progress, silent
from .store.cache import Cache
from .store.format import FINGERPRINT_FIELDS, OPTIONAL_FIELDS, fingerprint
from .store.provenance import IMPORTED


@dataclass(frozen=True)
class Prediction:
    """The classes, labels or numbers of one image.

    Parameters
    ----------
    path : str
        The image file; ``archive.zip!name`` inside an archive, ``video.mp4#t=12.0`` in a video,
        12 seconds from its start.
    class_name : str or None
        The class or label with the highest score; None for a head of numbers and of an error.
    probability : float or None
        Its probability, in [0, 1]: by softmax for classes, by a sigmoid for labels.
    top : tuple of (str, float)
        The most likely classes or labels with their probabilities, including the first one.
    labels : tuple of (str, float) or None
        Only for a head of labels: those at or above their thresholds, with their probabilities.
    values : tuple of (str, float) or None
        Only for a head of numbers: each target with its value.
    error : str or None
        Why the image could not be read; then there is nothing else.
    """

    path: str
    class_name: str | None
    probability: float | None
    top: tuple[tuple[str, float], ...]
    labels: tuple[tuple[str, float], ...] | None = None
    values: tuple[tuple[str, float], ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class PredictOptions:
    """Options of `predict`, which describes them."""

    weights: str | Path | None = None
    backbone: str | Path | None = None
    device: str = "auto"
    batch_size: int = 64
    top: int = 1
    on_error: OnError = "fail"
    max_pixels: int = MAX_PIXELS
    every: str = "1s"

    def __post_init__(self) -> None:
        for name, value in (
            ("batch size", self.batch_size),
            ("top", self.top),
            ("max pixels", self.max_pixels),
        ):
            if value < 1:
                raise RecipeError(f"{name}: expected at least 1, found {value}")
        check_choice("on error", self.on_error, ("fail", "skip"))
        step_of(self.every)


@with_options(PredictOptions)
def predict(
    paths: str | Path | Sequence[str | Path],
    head: str | Path | Head,
    *,
    options: PredictOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> list[Prediction]:
    """Predict the classes, labels or numbers of images with a saved head.

    Threads decode the next images while a batch is computed. Memory does not grow with the number
    of images, but for the predictions; `predict_stream` gives these one by one.

    Parameters
    ----------
    paths : str, Path or sequence of them
        Image files, videos, folders and ``.zip`` archives, or their URLs. Folders and archives are
        searched for image files at any depth, without hidden ones, in the order of names.
    head : str, Path or Head
        The head, or its file.
    weights : str or Path, optional
        The backbone's checkpoint; by default the one that the head recorded.
    backbone : str or Path, optional
        The backbone that the head recorded, where that is a file or a function: a head, which
        may be a stranger's, never names one by itself.
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    batch_size : int
        Images per forward pass.
    top : int
        Classes or labels per image in `Prediction.top`, at most K.
    on_error : str
        ``"fail"`` raises at the first file that is not a readable image, ``"skip"`` puts into its
        `Prediction.error` what is wrong, and calls ``on_note``.
    max_pixels : int
        Images of more pixels are taken for ones that are not readable.
    every : str
        Which frames of a video: ``"1s"`` takes one a second, ``"10"`` every tenth.
    on_progress : callable
        Called with the progress of downloads and images.
    on_note : callable
        Called with one-line notes: files that were skipped; another engine, device or version
        than made the head's features.

    Returns
    -------
    list of Prediction
        One per image, in the order of ``paths``.

    Raises
    ------
    WeightsError
        Not a head, unavailable weights, or ingredients that differ from the head's.
    DatasetError
        Nothing at a path, no image in it, an unreadable image, or no readable one at all.
    EngineUnavailableError
        The engine or the device cannot run here, or a video without PyAV.
    ShapeMismatchError
        A head for features of another length than the backbone's.
    RecipeError
        An option out of range.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    return list(
        predict_stream(paths, head, options=options, on_progress=on_progress, on_note=on_note)
    )


@with_options(PredictOptions)
def predict_stream(
    paths: Iterable[str | Path],
    head: str | Path | Head,
    *,
    options: PredictOptions,
    watch: bool = False,
    answered: Collection[str] = (),
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> Iterator[Prediction]:
    """Predict as `predict` does, and yield each prediction as soon as it is there.

    Parameters
    ----------
    paths : iterable of str or Path
        A sequence is checked before any image is read. Another iterable, such as the lines of a
        pipe, is a stream: a path that leads nowhere is an image that cannot be read, and whatever
        has come is answered before the next path is waited for.
    head : str, Path or Head
        The head, or its file.
    watch : bool
        Take ``paths`` for folders, whose images are answered, and wait for new ones for ever. A
        file is taken when its size and time stand still; one that changes later is new.
    answered : collection of str
        With ``watch``: paths that are not answered again.

    Yields
    ------
    Prediction
        One per image, in the order of ``paths``.

    Raises
    ------
    FeatcacheError
        As `predict` does.
    """
    head, where = checked_head(head)
    total: int | None = None
    if watch:
        arriving: Iterable[Sequence[str | Path]] = watch_folders(list(paths), answered)
        sets = streamed_sets(arriving, options.every, options.max_pixels)
    elif isinstance(paths, (str, Path, Sequence)):
        listed = [paths] if isinstance(paths, (str, Path)) else paths
        sets, total = named_sets(listed, options.every, options.max_pixels)
    else:
        sets = streamed_sets(arrivals(paths), options.every, options.max_pixels)
    return _predicted(head, where, sets, total, options, on_progress, on_note)


def _predicted(
    head: Head,
    where: str,
    sets: Iterator[ImageSet],
    total: int | None,
    options: PredictOptions,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Iterator[Prediction]:
    extractor = load_extractor(
        head.ingredients, where, options, on_progress=on_progress, on_note=on_note
    )
    with closing(_computed(extractor, sets, total, options, on_progress, on_note)) as computed:
        for names, errors, features in computed:
            good = [name for row, name in enumerate(names) if row not in errors]
            made = predictions_of(head, features, good, options.top) if good else iter(())
            for row, name in enumerate(names):
                yield (
                    Prediction(name, None, None, (), error=errors[row])
                    if row in errors
                    else next(made)
                )


def new_features(
    paths: Sequence[str | Path],
    ingredients: Mapping[str, Any],
    where: str,
    options: PredictOptions,
    *,
    mine: str,
    again: str,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Generator[tuple[list[str], np.ndarray], None, None]:
    """Yield names and features float32 (B, D) of images, made as the ingredients say.

    ``where`` and ``mine`` say in messages what recorded them, and ``again`` what to do where they
    are of no use. All is checked before the first image is read.
    """
    images = PlacedImages(find_places(paths), options.max_pixels)
    extractor = load_extractor(
        ingredients,
        where,
        options,
        mine=mine,
        again=again,
        on_progress=on_progress,
        on_note=on_note,
    )
    sets = iter((images,))
    computing = _computed(extractor, sets, len(images), options, on_progress, on_note)
    with closing(computing) as computed:
        for names, errors, features in computed:
            if len(features):
                yield [name for row, name in enumerate(names) if row not in errors], features


_FIRST_BATCH = 8  # images: the first answer does not wait for a whole batch


def _computed(
    extractor: Extractor,
    sets: Iterator[ImageSet],
    total: int | None,
    options: PredictOptions,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Generator[tuple[list[str], dict[int, str], np.ndarray], None, None]:
    """Yield names, what is wrong with which of them, and the features of the others, by batches."""
    size, done, found = options.batch_size, 0, 0
    on_progress(Progress("images", 0, total))
    for images in sets:
        n = len(images)
        first = 0 if done else min(n, size, _FIRST_BATCH)
        whole = (range(start, min(start + size, n)) for start in range(first, n, size))
        batches = decoded_batches(
            images,
            chain([range(first)] * bool(first), whole),
            extractor.preprocess,
            workers=min(n, reading_threads(images)),
            on_error=options.on_error,
        )
        with closing(batches):
            for batch in batches:
                for _, reason in batch.failures:
                    on_note(f"skipped: {reason}")
                wrong = dict(batch.failures)
                rows = sorted([*batch.rows.tolist(), *wrong])
                names = [images.where(row) for row in rows]
                features = np.empty((0, 0), np.float32)
                if batch.rows.size:
                    good = [images.where(row) for row in batch.rows]
                    features = extractor.features(batch.pixels, good)
                errors = {place: wrong[row] for place, row in enumerate(rows) if row in wrong}
                yield names, errors, features
                found += len(features)
                done += len(rows)
                on_progress(Progress("images", done, total))
    if not found:
        raise DatasetError(
            f"images: expected at least one that can be read, found none among {done}; "
            "give other files"
        )


@dataclass(frozen=True, eq=False)
class Extractor:
    """The backbone that a head or a cache records, checked against the record and ready."""

    preprocess: Preprocess
    cuts: tuple[str, ...]
    engine: Engine

    def features(self, pixels: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Return float32 (B, D) of canonical or compact pixels, as `Engine.extract` takes them."""
        by_cut = self.engine.extract(pixels)
        features = np.concatenate([by_cut[cut] for cut in self.cuts], axis=1)
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if broken.size:
            raise FeatcacheError(
                f"{names[broken[0]]}: expected finite features, found NaN or infinity; the "
                "weights do not suit these images"
            )
        return features

    def for_few(self, n_images: int) -> Extractor:
        """Return what is quicker for up to so many images, if its features have the same bytes."""
        engine = getattr(self.engine, "for_few", lambda: None)()
        if engine is None:
            return self
        few, side = replace(self, engine=engine), self.preprocess.size
        pixels = np.random.default_rng(0).integers(0, 256, (n_images, side, side, 3), np.uint8)
        names = ["noise"] * n_images
        same = few.features(pixels, names).tobytes() == self.features(pixels, names).tobytes()
        return few if same else self


def load_extractor(
    ingredients: Mapping[str, Any],
    where: str,
    options: PredictOptions,
    *,
    mine: str = "head",
    again: str = "train another head",
    on_progress: OnProgress,
    on_note: OnNote,
) -> Extractor:
    """Load the backbone that made features, and refuse another; arguments as `new_features`."""
    loaded = load_recorded(ingredients, where, again, options, on_progress)
    cuts = head_cuts(ingredients)
    choice = settled(choose_engine(device=options.device, runs_in=loaded.engines), loaded, cuts)
    here = {**computed_by(choice, loaded), "cuts": list(cuts), "dtype": "float32"}
    differing = feature_differences(ingredients, here, mine)
    if differing:
        raise WeightsError(
            f"{where}: expected features of the backbone that it records, found others: "
            f"{'; '.join(differing)}; give the checkpoint that made them with --weights, or {again}"
        )
    for cut, shape in loaded.shapes(cuts).items():
        if len(shape) != 1:
            raise WeightsError(
                f"{where}: expected vectors, found the cut {cut!r:.80} of shape "
                f"(N, {', '.join(map(str, shape))}); {again}"
            )
    rounding = rounding_differences(ingredients, here, mine)
    if rounding:
        on_note(f"{where}: expect rounding differences: {'; '.join(rounding)}")
    return Extractor(loaded.preprocess, cuts, build_engine(choice, loaded, cuts, on_note=on_note))


def load_recorded(
    ingredients: Mapping[str, Any],
    where: str,
    again: str,
    options: PredictOptions,
    on_progress: OnProgress,
) -> Weights:
    """Load the checkpoint that was given or recorded, with the recorded preprocessing.

    A fine-tuned network is saved beside its head; its digest is compared later.
    """
    if ingredients.get("backbone") == IMPORTED:
        raise WeightsError(
            f"{where}: expected features that featcache computed, found imported ones, whose "
            "backbone it does not have; import the features of the new images too"
        )
    try:
        sha256 = ingredients.get("weights_sha256")
        recorded = ingredients["backbone"]
        backbone = str(options.backbone or recorded_backbone(recorded, where, sha256))
        preprocess = Preprocess.from_dict(ingredients["preprocess"])
        if backbone in BACKBONES:
            check_resnet_size(preprocess.size)
    except RecipeError as error:
        place = "" if str(error).startswith(f"{where}: ") else f"{where}: "
        raise WeightsError(f"{place}{error}; {again}") from None
    weights, name = options.weights, ingredients.get("weights")
    beside = Path(where).with_name(Path(str(name)).name or "none")
    if weights is None and beside.suffix == ".safetensors" and os.path.isfile(beside):
        weights = beside
    elif weights is None and not parse_backbone(backbone).brings_weights(name):
        weights = recorded_weights(name, sha256)
        if weights is None:
            raise WeightsError(
                f"{where}: expected the checkpoint that its features were made with, "
                f"{name!r:.80}, which is not one of {', '.join(WEIGHT_NAMES)}; give it with "
                f"--weights (its SHA-256 is {ingredients['weights_sha256']!r:.80})"
            )
    loaded = load_weights(weights, backbone, size=preprocess.size, on_progress=on_progress)
    return loaded.prepared(preprocess)


def predictions_of(
    head: Head, features: np.ndarray, names: Sequence[str], top: int
) -> Iterator[Prediction]:
    """Yield what a head makes of features float32 (B, D), in their order."""
    scores, targets = head.scores(features), head.class_names
    if head.task == "numbers":
        for name, numbers in zip(names, scores.tolist(), strict=True):
            yield Prediction(name, None, None, (), values=tuple(zip(targets, numbers, strict=True)))
        return
    # Ordered by score, since two probabilities may round to the same number.
    order = np.argsort(-scores, axis=1, kind="stable")
    if head.task == "classes":
        order = order[:, :top]
    probabilities = head.probabilities(features)
    present = head.predict(features) if head.task == "labels" else None
    for row, (name, classes) in enumerate(zip(names, order.tolist(), strict=True)):
        pairs = [(targets[index], float(probabilities[row, index])) for index in classes]
        labels = None
        if present is not None:
            labels = tuple(
                pair for pair, index in zip(pairs, classes, strict=True) if present[row, index]
            )
        yield Prediction(name, *pairs[0], tuple(pairs[:top]), labels)


_AGAIN = "train it again with featcache probe --save-head"


@dataclass(frozen=True, eq=False)
class HeadResult:
    """The accuracy of a saved head on the test split of a cache.

    Parameters
    ----------
    top1 : float
        Accuracy, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    n_test : int
        Labelled test images.
    predicted : numpy.ndarray
        int64 (n_test,), the class of each.
    cache : Path
        The features.
    own_cache : bool
        Whether the head was trained on the training split of this cache.
    notes : tuple of str
        How engine, version, device or precision differ from those of the head's features.
    """

    top1: float
    top1_interval: tuple[float, float]
    n_test: int
    predicted: np.ndarray
    cache: Path
    own_cache: bool
    notes: tuple[str, ...]


def evaluate_head(head: str | Path | Head, cache: str | Path | Cache) -> HeadResult:
    """Test a saved head on the test split of a cache.

    Parameters
    ----------
    head : str, Path or Head
        The head, or its file.
    cache : str, Path or Cache
        The features; possibly of another data set than the head was trained on.

    Raises
    ------
    WeightsError
        Not a head, one of labels or numbers, or one without the ingredients of its features.
    CacheMismatchError
        Features made in another way or of another length, other classes or another order of
        classes, or no test images; the message says which.
    CacheError
        A cache that cannot be read.
    """
    head, where = checked_head(head, of_classes=True)
    cuts = head_cuts(head.ingredients) if "head_cuts" in head.ingredients else ()
    cache = opened(cache, cuts=cuts)
    differing = feature_differences(head.ingredients, cache.meta)
    dim = sum(cache.train.cut(cut).shape[1] for cut in cuts) or cache.feature_dim
    if head.weight.shape[1] != dim:
        differing.append(f"length: head {head.weight.shape[1]}, here {dim}")
    differing += class_differences(head.class_names, cache.class_names)
    if differing or not len(cache.test):
        raise CacheMismatchError(
            f"{cache.path}: expected test images with the features and classes of {where}, found "
            f"{'; '.join(differing) or 'no test images'}; give the cache that the head was "
            "trained on, or one made alike"
        )
    test = own_test_images(cache, cuts=cuts)
    predicted = head.predict(test.views[0])
    accuracy = top1(predicted, test.labels)
    return HeadResult(
        top1=accuracy,
        top1_interval=wilson_interval(accuracy, len(predicted)),
        n_test=len(predicted),
        predicted=predicted,
        cache=cache.path,
        own_cache=head.fingerprint == cache.fingerprint,
        notes=tuple(rounding_differences(head.ingredients, cache.meta)),
    )


def checked_head(head: str | Path | Head, *, of_classes: bool = False) -> tuple[Head, str]:
    """Return a head whose ingredients hash to its fingerprint, and its name for messages.

    ``of_classes`` refuses one of labels or numbers.
    """
    where = "head" if isinstance(head, Head) else str(head)
    if not isinstance(head, Head):
        head = load_head(head)
    if of_classes and head.task != "classes":
        raise WeightsError(
            f"{where}: expected a head of classes, found one of {head.task}; give another head, or "
            "use it with featcache predict"
        )
    missing = [
        name for name in FINGERPRINT_FIELDS if name not in {*OPTIONAL_FIELDS, *head.ingredients}
    ]
    if missing:
        raise WeightsError(
            f"{where}: expected a head that records what made its features, found no "
            f"{', '.join(missing)}; {_AGAIN}"
        )
    if fingerprint(head.ingredients) != head.fingerprint:
        raise WeightsError(
            f"{where}: expected ingredients that hash to its fingerprint "
            f"{head.fingerprint[:8]!r}, found others: they were edited; {_AGAIN}"
        )
    return head, where


Columns = list[tuple[str, type]]  # names, and whether they are of text or float


def table_columns(head: Head, options: PredictOptions) -> Columns:
    """Return the columns of a table of predictions.

    Of classes ``path, class, probability``, then ``class_2`` and so on; of labels ``path, labels,
    probabilities``, those at or above their thresholds with ``;`` between; of numbers ``path`` and
    a column for each. With ``"skip"`` there is ``error`` too.
    """
    if head.task == "numbers":
        columns: Columns = [(text_of(name), float) for name in head.class_names]
    elif head.task == "labels":
        columns = [("labels", str), ("probabilities", str)]
    else:
        width = min(options.top, len(head.class_names))
        ends = ["", *(f"_{number}" for number in range(2, width + 1))]
        columns = [(f"{name}{end}", kind) for end in ends for name, kind in _PAIR]
    return [("path", str), *columns, *[("error", str)] * (options.on_error == "skip")]


_PAIR = (("class", str), ("probability", float))


def table_row(prediction: Prediction, columns: Columns) -> list[str | float | None]:
    """Return the cells of a prediction, in these columns."""
    middle: list[str | float | None] = [None] * (len(columns) - 1)
    if prediction.error is not None:
        return [text_of(prediction.path), *middle[:-1], text_of(prediction.error)]
    if prediction.values is not None:
        middle[: len(prediction.values)] = [value for _, value in prediction.values]
    elif prediction.labels is not None:
        shares = ";".join(f"{probability:.6g}" for _, probability in prediction.labels)
        middle[:2] = [";".join(name for name, _ in prediction.labels), shares]
    else:
        middle[: 2 * len(prediction.top)] = [cell for pair in prediction.top for cell in pair]
    return [text_of(prediction.path), *middle]


def csv_row(prediction: Prediction, columns: Columns) -> str:
    """Return a line of CSV; a name that a spreadsheet takes for a formula is not changed."""
    digits = ".6g" if prediction.values is None else ".9g"
    cells = table_row(prediction, columns)
    return csv_line([f"{one:{digits}}" if isinstance(one, float) else one or "" for one in cells])


def csv_head(columns: Columns) -> str:
    """Return the first line of CSV."""
    return csv_line([name for name, _ in columns])


def json_row(prediction: Prediction) -> str:
    """Return a line of JSON: the fields of a prediction."""
    return json.dumps(asdict(prediction), allow_nan=False) + "\n"


_SUFFIXES = (".csv", ".jsonl", ".parquet")


class PredictionFile:
    """A file of predictions, a row each.

    CSV and JSON lines have each row as soon as it is there, and whole rows alone, whenever the
    process ends. Parquet, which needs its end to be read, gets its name at the end. The suffix
    says the format; OutputError for others, or where it cannot be written. A file that is there
    is replaced when the first row comes.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        if path.suffix not in _SUFFIXES:
            raise OutputError(
                f"{path}: expected a name that ends in {', '.join(_SUFFIXES)}, found "
                f"{path.suffix or 'no suffix'}; rename it"
            )
        if path.suffix == ".parquet":
            _pyarrow()
        check_writable(path)
        self.path = path
        self.n_rows = 0
        self._columns = columns
        self._is_continued = False
        self._closing = ExitStack()
        self._write: Callable[[Prediction], None] | None = None

    def answered(self) -> set[str]:
        """Return the paths that the file has rows of, and add to it from here on."""
        self._is_continued = self.path.suffix != ".parquet" and self.path.exists()
        if not self._is_continued:
            return set()
        try:
            with self.path.open(encoding="utf-8", errors="replace", newline="") as file:
                if self.path.suffix == ".jsonl":
                    return {text_of(json.loads(line)["path"]) for line in file}
                rows = csv.reader(file, strict=True)
                names = [name for name, _ in self._columns]
                if next(rows, []) != names:
                    raise ValueError(f"other columns than {', '.join(names)}")
                return {row[0] for row in rows}
        except (OSError, ValueError, TypeError, KeyError, IndexError, csv.Error) as error:
            raise OutputError(
                f"{self.path}: expected predictions of this head to add to, found: "
                f"{one_line(error)}; move it away or name another output"
            ) from None

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.__exit__(*error)

    def write(self, prediction: Prediction) -> None:
        """Add a row."""
        if self._write is None:
            opened_as = self._parquet if self.path.suffix == ".parquet" else self._lines
            self._write = opened_as()
        self._write(prediction)
        self.n_rows += 1

    def _lines(self) -> Callable[[Prediction], None]:
        start = os.O_APPEND if self._is_continued else os.O_TRUNC
        flags = os.O_WRONLY | os.O_CREAT | start | getattr(os, "O_BINARY", 0)
        is_csv = self.path.suffix == ".csv"

        def append(text: str) -> None:
            data = text_of(text).encode()
            end = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise self._unwritable(error) from None

        try:
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise self._unwritable(error) from None
        self._closing.callback(os.close, descriptor)
        if is_csv and not self._is_continued:
            append(csv_head(self._columns))
        return lambda one: append(csv_row(one, self._columns) if is_csv else json_row(one))

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: cannot be written: {error.strerror or error}; free space or name "
            "another output"
        )

    def _parquet(self) -> Callable[[Prediction], None]:
        arrow, parquet = _pyarrow()
        kinds = {str: arrow.string(), float: arrow.float64()}
        schema = arrow.schema([(name, kinds[kind]) for name, kind in self._columns])
        descriptor = self._closing.enter_context(replaced_file(self.path))
        file = self._closing.enter_context(os.fdopen(os.dup(descriptor), "wb"))
        writer = self._closing.enter_context(parquet.ParquetWriter(file, schema))
        rows: list[list[Any]] = []

        def flush() -> None:
            if rows:
                columns = zip(zip(*rows, strict=True), schema, strict=True)
                arrays = [arrow.array(cells, field.type) for cells, field in columns]
                writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))
                rows.clear()

        def add(prediction: Prediction) -> None:
            rows.append(table_row(prediction, self._columns))
            if len(rows) >= _GROUP_ROWS:
                flush()

        self._closing.callback(flush)
        return add


_GROUP_ROWS = 10_000  # in memory until they are written


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EngineUnavailableError(
            f"predictions: expected the package pyarrow for Parquet, found: {error}; type: pip "
            "install 'featcache[parquet]', or name a .csv or .jsonl file"
        ) from None
    return pyarrow, parquet
