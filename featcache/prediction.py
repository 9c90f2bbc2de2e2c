"""Using a saved head: classify new images, and test it on a cache.

The features must be made like those the head was trained on. A cache's provenance says how they
were made. For new images the backbone, weights and size that the head recorded are loaded again
and compared with the record before any image is read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .backbones.architectures import BACKBONES, check_resnet_size
from .backbones.choice import choose_engine
from .backbones.engine import build_engine, computed_by, settled
from .backbones.loading import load_weights
from .backbones.naming import WEIGHT_NAMES, parse_backbone, recorded_backbone, recorded_weights
from .backbones.weights import Weights
from .datasets.batches import decoded_batches
from .datasets.decoding import decode_image, image_suffixes
from .datasets.images import Files, Folder, OnError, images_among, reading_threads, shown_names
from .datasets.named import default_data_root
from .datasets.tar import TarShards
from .datasets.urls import RemoteFolder, open_url
from .datasets.zip import ZipArchive
from .errors import (
    CacheMismatchError,
    DatasetError,
    EngineUnavailableError,
    FeatcacheError,
    OutputError,
    RecipeError,
    WeightsError,
    text_of,
)
from .files import check_writable, csv_line, write_atomically
from .metrics import top1, wilson_interval
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
from .remote import RemotePlace, located
from .store.cache import Cache
from .store.format import FINGERPRINT_FIELDS, OPTIONAL_FIELDS, fingerprint
from .store.provenance import IMPORTED

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Prediction:
    """The classes, labels or numbers of one image.

    Parameters
    ----------
    path : str
        The image file; ``archive.zip!name`` inside an archive.
    class_name : str or None
        The class or label with the highest score; None for a head of numbers.
    probability : float or None
        Its probability, in [0, 1]: by softmax for classes, by a sigmoid for labels.
    top : tuple of (str, float)
        The most likely classes or labels with their probabilities, including the first one.
    labels : tuple of (str, float) or None
        Only for a head of labels: those at or above their thresholds, with their probabilities.
    values : tuple of (str, float) or None
        Only for a head of numbers: each target with its value.
    """

    path: str
    class_name: str | None
    probability: float | None
    top: tuple[tuple[str, float], ...]
    labels: tuple[tuple[str, float], ...] | None = None
    values: tuple[tuple[str, float], ...] | None = None


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

    def __post_init__(self) -> None:
        for name, value in (
            ("batch size", self.batch_size),
            ("top", self.top),
            ("max pixels", self.max_pixels),
        ):
            if value < 1:
                raise RecipeError(f"{name}: expected at least 1, found {value}")
        check_choice("on error", self.on_error, ("fail", "skip"))


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
    of images.

    Parameters
    ----------
    paths : str, Path or sequence of them
        Image files, folders and ``.zip`` archives, or their URLs. Folders and archives are
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
        ``"fail"`` raises at the first file that is not a readable image, ``"skip"`` leaves it
        out and calls ``on_note``.
    max_pixels : int
        Images of more pixels are taken for ones that are not readable.
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
        The engine or the device cannot run here.
    ShapeMismatchError
        A head for features of another length than the backbone's.
    RecipeError
        An option out of range.
    """
    head, where = checked_head(head)
    batches = new_features(
        [paths] if isinstance(paths, (str, Path)) else paths,
        head.ingredients,
        where,
        options,
        mine="head",
        again="train another head",
        on_progress=on_progress,
        on_note=on_note,
    )
    with closing(batches):
        return [
            prediction
            for names, features in batches
            for prediction in _named(head, features, names, options.top)
        ]


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
    loaded = _load_weights(ingredients, where, again, options, on_progress)
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
    engine = build_engine(choice, loaded, cuts, on_note=on_note)

    n, size, done, found = len(images), options.batch_size, 0, 0
    batches = (range(start, min(start + size, n)) for start in range(0, n, size))
    on_progress(Progress("images", 0, n))
    with closing(
        decoded_batches(
            images,
            batches,
            loaded.preprocess,
            workers=reading_threads(images),
            on_error=options.on_error,
        )
    ) as decoded:
        for batch in decoded:
            for _, reason in batch.failures:
                on_note(f"skipped: {reason}")
            if batch.rows.size:
                names = [images.where(row) for row in batch.rows]
                by_cut = engine.extract(batch.pixels)
                features = np.concatenate([by_cut[cut] for cut in cuts], axis=1)
                _check_finite(features, names)
                yield names, features
            found += batch.rows.size
            done += batch.rows.size + len(batch.failures)
            on_progress(Progress("images", done, n))
    if not found:
        raise DatasetError(
            f"images: expected at least one that can be read, found none among {n}; "
            "give other files"
        )


def _load_weights(
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


Place = tuple[Files, str]  # where an image file is, and its name there


class PlacedImages:
    """Image files that `find_places` found, as `decoded_batches` reads them."""

    def __init__(self, places: Sequence[Place], max_pixels: int = MAX_PIXELS) -> None:
        self._places = places
        self._max_pixels = max_pixels
        self.remote = any(files.remote for files, _ in places)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int, preprocess: Preprocess | None = None) -> Image.Image:
        """Read and decode one image, as `decode_image` does; raises `DatasetError`."""
        files, name = self._places[index]
        return decode_image(files.read(name), files.where(name), preprocess, self._max_pixels)

    def where(self, index: int) -> str:
        """Return the path or URL of an image, for messages."""
        files, name = self._places[index]
        return files.where(name)


def find_places(paths: Sequence[str | Path]) -> list[Place]:
    """Find the image files at paths and URLs: in their order, and inside each in that of names.

    A file is taken whatever its suffix. Folders, ``.zip`` and ``.tar`` archives are searched at any
    depth for images, without hidden files.
    """
    places: list[Place] = []
    for path in map(located, paths):
        if not isinstance(path, Path):
            places += _behind(path)
            continue
        # os.path returns False where pathlib raises: for a path without permission.
        folder = os.path.isdir(path)
        if not folder and not os.path.isfile(path):
            kind = "something else" if os.path.exists(path) else "nothing"
            raise DatasetError(
                f"{path}: expected an image, a folder, or a .zip or .tar of images, found {kind}; "
                "check the path"
            )
        if not folder and path.suffix.lower() not in (".zip", ".tar"):
            places.append((Folder(path.parent), path.name))
            continue
        files: Files
        if folder:
            files = Folder(path)
        elif path.suffix.lower() == ".tar":
            files = TarShards([path], [""], default_data_root())
        else:
            files = ZipArchive(path)
        places += _inside(files, path)
    if not places:
        raise DatasetError("images: expected the path of at least one, found none")
    return places


def _behind(place: RemotePlace) -> list[Place]:
    """Return the image files behind a URL."""
    if place.suffix in image_suffixes():
        return [(RemoteFolder(place.parent), place.name)]
    return _inside(open_url(place)[0], place)


def _inside(files: Files, path: Path | RemotePlace) -> list[Place]:
    inside = [(files, name) for name in images_among(files, shown_names(files, path)[0])[0]]
    if not inside:
        raise DatasetError(
            f"{path}: expected images (names that end in {', '.join(sorted(image_suffixes()))}), "
            "found none; give another folder, or the files themselves"
        )
    return inside


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


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Return a CSV table: ``path,class,probability``, then ``class_2`` and so on.

    Of labels: ``path,labels,probabilities``, those at or above their thresholds with ``;`` between.
    Of numbers: ``path`` and a column for each. A name that a spreadsheet takes for a formula is not
    changed.
    """
    first = predictions[0] if predictions else None
    if first is not None and first.values is not None:
        lines = [["path", *(name for name, _ in first.values)]]
        for prediction in predictions:
            lines.append(
                [prediction.path, *(f"{value:.9g}" for _, value in prediction.values or ())]
            )
    elif first is not None and first.labels is not None:
        lines = [["path", "labels", "probabilities"]]
        for prediction in predictions:
            found = prediction.labels or ()
            shares = ";".join(f"{probability:.6g}" for _, probability in found)
            lines.append([prediction.path, ";".join(name for name, _ in found), shares])
    else:
        width = max((len(prediction.top) for prediction in predictions), default=1)
        ends = ["", *(f"_{number}" for number in range(2, width + 1))]
        columns = (f"{column}{end}" for end in ends for column in ("class", "probability"))
        lines = [["path", *columns]]
        for prediction in predictions:
            pairs = ((name, f"{probability:.6g}") for name, probability in prediction.top)
            lines.append([prediction.path, *(text for pair in pairs for text in pair)])
    return "".join(csv_line(line) for line in lines)


def check_table_path(path: Path) -> None:
    """Refuse a name for `save_table` before the images are read."""
    if path.suffix not in (".csv", ".parquet"):
        raise OutputError(
            f"{path}: expected a name that ends in .csv or .parquet, found "
            f"{path.suffix or 'no suffix'}; rename it"
        )
    if path.suffix == ".parquet":
        _pyarrow()
    check_writable(path)


def save_table(predictions: Sequence[Prediction], path: Path) -> None:
    """Write the table of `as_csv` to a file that `check_table_path` let pass."""
    data = text_of(as_csv(predictions)).encode()
    if path.suffix == ".parquet":
        reading, parquet = _pyarrow()
        options = reading.ParseOptions(newlines_in_values=True)
        buffer = io.BytesIO()
        parquet.write_table(reading.read_csv(io.BytesIO(data), parse_options=options), buffer)
        data = buffer.getvalue()
    write_atomically(path, data)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow.csv as reading
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EngineUnavailableError(
            f"predictions: expected the package pyarrow for Parquet, found: {error}; type: pip "
            "install 'featcache[parquet]', or name a .csv file"
        ) from None
    return reading, parquet
