"""`ship`: a head with its backbone and preprocessing as one file of ONNX, or of OpenVINO."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones.weights import Weights
from ..errors import (
    CacheMismatchError,
    EngineUnavailableError,
    OutputError,
    RecipeError,
    WeightsError,
    one_line,
)
from ..files import check_writable, discard, user_path
from ..frameworks import import_openvino, openvino_core
from ..metrics import evaluate_scores, expected_calibration_error, wilson_interval
from ..notebook import ShownAsTable
from ..options import MAX_PIXELS, check_choice, with_options
from ..prediction import PredictOptions, checked_head, load_recorded, new_features
from ..probes.head import Head
from ..probes.ingredients import feature_ingredients, head_cuts
from ..probes.question import own_test_images
from ..progress import OnNote, OnProgress, Progress, silent
from ..store.cache import load
from ..version import __version__
from .card import USE, card, headline, record_of
from .check import Agreement, answers, check_images, compared
from .graph import Graph, import_onnx, write_model
from .heads import KnnHead, add_head
from .networks import add_backbone, runs_in_openvino_alone
from .pixels import of_any_size, of_own_size

TARGETS, PRECISIONS = ("onnx", "openvino"), ("f32", "f16")
_SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}
_MOST_NEIGHBOURS = 100_000  # training images of a k-NN
_RESULT = {"classes": "probabilities", "labels": "probabilities", "numbers": "values"}
_STEPS = 4


@dataclass(frozen=True)
class ShipOptions:
    """Options of `ship`, which describes them."""

    to: str = "onnx"
    precision: str = "f32"
    dynamic_batch: bool = False
    knn: int | None = None
    images: Sequence[str | Path] = ()
    weights: str | Path | None = None
    backbone: str | Path | None = None
    runs: str | Path | None = None
    force: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_choice("to", self.to, TARGETS)
        check_choice("precision", self.precision, PRECISIONS)
        if self.knn is not None and self.knn < 1:
            raise RecipeError(f"knn: expected at least 1 neighbour, found {self.knn}")


@dataclass(frozen=True)
class ShipResult(ShownAsTable):
    """A file that runs without featcache.

    Parameters
    ----------
    output : Path
        The model: ``.onnx``, or ``.xml`` with a ``.bin`` beside it.
    card : Path
        The model card, Markdown.
    size_bytes : int
        Of the model, the ``.bin`` too.
    task : str
        ``"classes"``, ``"labels"`` or ``"numbers"``.
    inputs, outputs : mapping of str to str
        Name to type and shape, such as ``"uint8 (1, H, W, 3)"``.
    precision : str
        What large weights are kept in.
    agreement : Agreement
        How far its answers are from those of `featcache.predict`.
    facts : mapping of str to Any
        What the file says of itself: its metadata.
    wall_s : float
        Duration.
    notes : tuple of str
        Further remarks.
    """

    output: Path
    card: Path
    size_bytes: int
    task: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    precision: str
    agreement: Agreement
    facts: Mapping[str, Any]
    wall_s: float
    notes: tuple[str, ...] = ()


@with_options(ShipOptions)
def ship(
    head: str | Path | Head,
    output: str | Path,
    *,
    options: ShipOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ShipResult:
    """Write a head with its backbone and preprocessing as one file, and check it.

    The file takes decoded images, upright RGB, and resizes them as Pillow does. Before it gets its
    name, it answers images in a child process, and its answers are compared with `predict`'s. A
    model card is written beside it. PyTorch is needed for a backbone of its libraries alone.

    Parameters
    ----------
    head : str, Path or Head
        A head's file, or with ``knn`` a cache.
    output : str or Path
        The model, a name that ends in ``.onnx``, or ``.xml`` for OpenVINO.
    to : str
        ``"onnx"``, or ``"openvino"``: an ``.xml`` and a ``.bin``.
    precision : str
        ``"f16"`` keeps large weights in half the space. Everything is computed in float32.
    dynamic_batch : bool
        Take any number of images of the backbone's own size, uint8 (N, s, s, 3), instead of one
        of any size, uint8 (1, H, W, 3).
    knn : int, optional
        Ship the vote of so many nearest training images of a cache instead of a head.
    images : sequence of str or Path
        Images, folders or archives of which 32 are used for the check; by default pieces of
        scikit-learn's photographs.
    weights, backbone : str or Path, optional
        As in `predict`.
    runs : str or Path, optional
        Folder of the records of runs, where the accuracy stands; ``cache/runs`` by default.
    force : bool
        Replace files that are there.
    max_pixels : int
        Images for the check of more pixels are refused.
    on_progress : callable
        Called with the progress of downloads, images and steps.
    on_note : callable
        Called with one-line notes.

    Returns
    -------
    ShipResult
        Where the files are, and how well they agree.

    Raises
    ------
    WeightsError
        Not a head, a backbone that is not here or that no graph can hold, or answers that differ
        from `predict`'s.
    EngineUnavailableError
        A package that is missing, or operators that the target lacks.
    OutputError
        A file that is there or cannot be written, or a model above 2 GB.
    CacheError, DatasetError
        A cache or images that cannot be read.
    RecipeError
        An option out of range.
    """
    started = time.perf_counter()
    import_onnx()
    path = user_path(output)
    files = _files(path, options)
    subject, ingredients, where, record = _subject(head, options, on_note)
    predicting = PredictOptions(
        options.weights, options.backbone, device="cpu", max_pixels=options.max_pixels
    )
    again = "train another head" if options.knn is None else "extract the cache again"
    loaded = load_recorded(ingredients, where, again, predicting, on_progress)
    if runs_in_openvino_alone(loaded) and (options.to != "openvino" or options.dynamic_batch):
        raise RecipeError(
            f"{loaded.source}: expected a network that ONNX can hold, found one of OpenVINO; use "
            "--to openvino, without --dynamic-batch"
        )

    def step(done: int) -> None:
        on_progress(Progress("ship", done, _STEPS, "step"))

    step(0)
    images, described = check_images(options.images, options.max_pixels)
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="featcache-") as folder:
        for number, image in enumerate(images):
            image.save(Path(folder, f"{number:02}.png"), compress_level=1)
        batches = new_features(
            [folder],
            ingredients,
            where,
            predicting,
            mine="head" if options.knn is None else "cache",
            again=again,
            on_progress=silent,
            on_note=notes.append,
        )
        features = np.concatenate([part for _, part in batches])
    name = _RESULT[subject.task]
    answer = subject.probabilities
    if isinstance(subject, Head) and subject.task == "numbers":
        answer = subject.scores
    expected = {"features": features, name: answer(features)}
    step(1)
    given = (
        [loaded.preprocess.batch(images)]
        if options.dynamic_batch
        else [np.asarray(image, np.uint8)[None] for image in images]
    )
    facts = _facts(subject, loaded, record, options)
    ends = _ends(loaded, features.shape[1], subject, options)
    new = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        new.mkdir()
        model = new / path.name
        _write(model, subject, loaded, head_cuts(ingredients), ends, facts, options)
        step(2)
        agreement = compared(answers(model, given), expected, described)
        problem = agreement.problem(options.precision)
        if problem:
            raise WeightsError(
                f"{path}: expected the answers of featcache predict, found {problem}, on "
                f"{agreement.n_images} images; no file is kept: report it, with the backbone"
            )
        step(3)
        facts = {**facts, **_checked(agreement)}
        side = loaded.preprocess.size if options.dynamic_batch else 480
        use = USE.format(
            name=path.name,
            side=side,
            free=", or several" if options.dynamic_batch else " of any size",
        )
        page = card(path.stem, facts, _meaning(ends), record, use if options.to == "onnx" else "")
        (new / files[-1].name).write_text(page, "utf-8")
        for file in files:  # the model's own name comes after what it needs, and before its card
            _move(new / file.name, file)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}; free space or name another "
            "output"
        ) from None
    finally:
        discard(new)
    step(_STEPS)
    return ShipResult(
        output=path,
        card=files[-1],
        size_bytes=sum(file.stat().st_size for file in files[:-1]),
        task=subject.task,
        inputs={"image": _type(ends["image"])},
        outputs={name: _type(one) for name, one in ends.items() if name != "image"},
        precision=options.precision,
        agreement=agreement,
        facts=facts,
        wall_s=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _files(path: Path, options: ShipOptions) -> list[Path]:
    """Return the files that are to be written, the card last; refuse those that are there."""
    suffix = _SUFFIX[options.to]
    if path.suffix != suffix:
        raise OutputError(
            f"{path}: expected a name that ends in {suffix}, found {path.suffix or 'no suffix'}; "
            + ("use --to openvino, or rename it" if path.suffix == ".xml" else "rename it")
        )
    files = [*([path.with_suffix(".bin")] * (suffix == ".xml")), path, path.with_suffix(".md")]
    for file in files:
        if os.path.lexists(file) and not options.force:
            raise OutputError(
                f"{file}: expected no such file, found one; use --force to replace it"
            )
        check_writable(file)
    return files


def _move(new: Path, final: Path) -> None:
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, final)


def _subject(
    head: str | Path | Head, options: ShipOptions, on_note: OnNote
) -> tuple[Head | KnnHead, Mapping[str, Any], str, Mapping[str, Any] | None]:
    """Return what is shipped, the ingredients of its features, its name, and how good it is."""
    if options.knn is not None:
        if isinstance(head, Head):
            raise RecipeError("knn: expected a cache, found a head; leave out knn, or name a cache")
        return _neighbours(head, options.knn)
    found, where = checked_head(head)
    on_disk = not isinstance(head, Head)
    record = record_of(Path(where), options.runs, on_note) if on_disk else None
    if record is None:
        on_note(
            f"{where}: no record of its run has been found, so its accuracy is unknown; name the "
            "folder with --runs"
        )
    return found, found.ingredients, where, record


def _neighbours(
    path: str | Path, k: int
) -> tuple[KnnHead, Mapping[str, Any], str, Mapping[str, Any]]:
    """Return the vote of a cache's training images, and how good it is on the test images."""
    cache = load(path)
    rows = np.flatnonzero(cache.train.labels >= 0)
    if not k <= len(rows) <= _MOST_NEIGHBOURS:
        raise CacheMismatchError(
            f"{cache.path}: expected {k:,} to {_MOST_NEIGHBOURS:,} training images with a label, "
            f"found {len(rows):,}; {'use a smaller --knn' if len(rows) < k else 'ship a head'}"
        )
    features = np.asarray(cache.train.features[rows], np.float32)
    head = KnnHead(features, cache.train.labels[rows], cache.class_names, cache.fingerprint, k)
    record: dict[str, Any] = {"dataset": cache.meta.get("dataset"), "n_train": len(rows)}
    if (cache.test.labels >= 0).any():
        test = own_test_images(cache)
        shares = head.probabilities(np.asarray(test.views[0][:], np.float32))
        measured = asdict(evaluate_scores(shares, test.labels, calibrated=False))
        measured["calibration_error"] = expected_calibration_error(shares, test.labels)[0]
        interval = wilson_interval(measured["top1"], len(test.labels))
        record |= {"evaluation": measured, "n_test": len(test.labels), "top1": measured["top1"]}
        record["top1_interval"] = list(interval)
    ingredients = feature_ingredients(cache.meta)
    return head, {**ingredients, "cuts": [cache.cuts[0]]}, str(cache.path), record


def _facts(
    subject: Head | KnnHead,
    loaded: Weights,
    record: Mapping[str, Any] | None,
    options: ShipOptions,
) -> dict[str, Any]:
    """Return what the file says of itself; no path of this machine is among it."""
    source = loaded.source
    if os.path.exists(source):
        source = f"the file {Path(source).name}, whose licence only its owner knows"
    facts: dict[str, Any] = {
        "task": subject.task,
        "classes": list(subject.class_names),
        "head": subject.kind if isinstance(subject, KnnHead) else "linear",
        "backbone": loaded.backbone,
        "weights": loaded.name,
        "weights_sha256": loaded.sha256,
        "weights_source": source,
        "library": loaded.library,
        "preprocess": loaded.preprocess.describe(),
        "precision": options.precision,
        "fingerprint": subject.fingerprint,
        "featcache_version": __version__,
    }
    if subject.thresholds is not None:
        facts["thresholds"] = [round(float(one), 6) for one in subject.thresholds]
    found = headline(record) if record else None
    if record and found:
        facts |= {"measure": found[0], "accuracy": found[1], "accuracy_interval": found[2]}
        facts |= {"dataset": record.get("dataset"), "n_test": record.get("n_test")}
    return {name: one for name, one in facts.items() if one not in ("", None)}


def _checked(agreement: Agreement) -> dict[str, Any]:
    return {
        "largest difference from featcache predict": agreement.largest_difference,
        "on": f"{agreement.n_images} images: {agreement.images}",
    }


_End = tuple[Any, list[Any]]


def _ends(
    loaded: Weights, dim: int, subject: Head | KnnHead, options: ShipOptions
) -> dict[str, _End]:
    """Return type and shape of the input and of each output."""
    n, size = ("N", loaded.preprocess.size) if options.dynamic_batch else (1, None)
    return {
        "image": (np.uint8, [n, size or "H", size or "W", 3]),
        _RESULT[subject.task]: (np.float32, [n, len(subject.class_names)]),
        "features": (np.float32, [n, dim]),
    }


def _type(end: _End) -> str:
    return f"{np.dtype(end[0]).name} ({', '.join(map(str, end[1]))})"


def _meaning(ends: Mapping[str, _End]) -> list[tuple[str, str, str]]:
    words = {
        "image": "the image, RGB",
        "probabilities": "of each class or label, in the order of the classes below",
        "values": "of each target, in the order of the classes below",
        "features": "what the backbone makes of the image, before any scaling",
    }
    return [(name, _type(end), words[name]) for name, end in ends.items()]


def _write(
    path: Path,
    subject: Head | KnnHead,
    loaded: Weights,
    cuts: Sequence[str],
    ends: dict[str, _End],
    facts: Mapping[str, Any],
    options: ShipOptions,
) -> None:
    """Write the model in its format."""
    dynamic = options.dynamic_batch
    entry = {"image": ends["image"]}
    results = {name: one for name, one in ends.items() if name != "image"}
    texts = {
        name: one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
        for name, one in facts.items()
    }
    half = options.precision == "f16"
    first = Graph()
    pixels = (of_own_size if dynamic else of_any_size)(first, "image", loaded.preprocess)
    split = runs_in_openvino_alone(loaded)
    last = Graph() if split else first
    features = "given" if split else add_backbone(first, pixels, loaded, cuts, dynamic=dynamic)
    answer = add_head(last, features, subject)
    last.output(answer, _RESULT[subject.task])
    last.output(features, "features")
    if not split:
        model = first.model(entry, results, texts, half)
        if options.to == "onnx":
            write_model(model, path)
            return
        written = path.with_suffix(".onnx")
        write_model(model, written)
        _save_openvino(_read(written), path, texts, subject)
        written.unlink()
        return
    first.output(pixels, "pixels")
    size = loaded.preprocess.size
    parts = [
        first.model(entry, {"pixels": (np.float32, [1, 3, size, size])}, {}, False),
        last.model({"given": ends["features"]}, results, {}, half),
    ]
    graphs = []
    for number, part in enumerate(parts):
        written = path.with_name(f"{number}.onnx")
        write_model(part, written)
        graphs.append(_read(written))
        written.unlink()
    network: Any = loaded.network
    _save_openvino(_chained(graphs[0], network.graph(cuts, 1), graphs[1]), path, texts, subject)


def _read(path: Path) -> Any:
    try:
        return openvino_core().read_model(str(path))
    except RuntimeError as error:
        raise EngineUnavailableError(
            f"{path.stem}: expected operators that OpenVINO has, found: {one_line(error)}; use "
            "--to onnx"
        ) from None


def _chained(pixels: Any, network: Any, head: Any) -> Any:
    """Join three graphs of OpenVINO: the outputs of one are the inputs of the next."""
    ov = import_openvino()
    for reader in network.inputs[0].get_target_inputs():
        reader.replace_source_output(pixels.outputs[0].get_node().input_value(0))
    cuts = [one.get_node().input_value(0) for one in network.outputs]
    features = cuts[0] if len(cuts) == 1 else ov.opset8.concat(cuts, 1).output(0)
    for reader in head.inputs[0].get_target_inputs():
        reader.replace_source_output(features)
    return ov.Model(head.get_results(), pixels.get_parameters(), "featcache")


def _save_openvino(model: Any, path: Path, texts: Mapping[str, str], subject: Any) -> None:
    """Write an .xml and a .bin; each class has a name of its own, for readers without JSON."""
    for name, text in texts.items():
        model.set_rt_info(text, ["featcache", name.replace(" ", "_")])
    for number, text in enumerate(subject.class_names):
        model.set_rt_info(text, ["featcache", f"class_{number}"])
    import_openvino().save_model(model, str(path), compress_to_fp16=False)
