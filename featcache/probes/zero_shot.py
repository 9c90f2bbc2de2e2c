"""Zero-shot heads: each class is the direction of vectors in the space of the features.

Such vectors come from the text tower of the model that made the features. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, RecipeError, ShapeMismatchError, one_line
from ..files import user_path
from ..importing.tensors import read_npy, read_npz
from ..metrics import PairedTest, paired_test, top1, wilson_interval
from ..options import did_you_mean
from ..store.cache import Cache
from ..store.format import array_name
from .blocks import Rows, Stacked
from .head import Head
from .ingredients import head_cuts
from .question import Part, check_finite

# Both of Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
# ICML 2021: the prompt of section 3.1.4, and the largest scale of cosines (section 2.5).
TEMPLATE = "a photo of a {}."
_SCALE = 100.0

Encode = Callable[[Cache, Sequence[str]], np.ndarray]  # texts to (M, D), as text_features


@dataclass(frozen=True)
class ZeroShotResult:
    """A head without training, on the test images of a probe.

    Parameters
    ----------
    top1 : float
        Accuracy, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    n_vectors : int
        Texts or other vectors that describe the classes, of all together.
    cut : str
        The features that are compared with them.
    versus : PairedTest
        The probe, first, against this head, on the same images.
    head : Path
        Where the head was saved.
    """

    top1: float
    top1_interval: tuple[float, float]
    n_vectors: int
    cut: str
    versus: PairedTest
    head: Path


def zero_shot_head(
    given: Any, encode: Encode | None, names: Sequence[str], cache: Cache, made: Mapping[str, Any]
) -> tuple[Head, int]:
    """Return a head of classes as `ProbeOptions.zero_shot` describes them, and its vectors' number.

    Several vectors of a class are averaged after each is divided by its length. ``made`` are the
    ingredients of the cache.
    """
    where, by_class = _by_class(given, encode, names, cache)
    cuts: tuple[str, ...] = ()
    n_vectors, weight = 0, []
    for name in names:
        rows, cut = vectors_at(cache, by_class[name], f"{where}, {one_line(name)}", cuts)
        cuts, n_vectors = (cut,), n_vectors + len(rows)
        exact = rows.astype(np.float64)
        mean = (exact / np.linalg.norm(exact, axis=1, keepdims=True)).mean(axis=0)
        weight.append(_SCALE * mean / np.linalg.norm(mean))
    head = Head(
        np.stack(weight).astype(np.float32),
        np.zeros(len(names), np.float32),
        tuple(names),
        cache.fingerprint,
        "l2",
        {**made, "head_cuts": list(cuts)},
    )
    return head, n_vectors


def beside_probe(
    head: Head, n_vectors: int, test: Part, predicted: np.ndarray, path: Path
) -> ZeroShotResult:
    """Test a zero-shot head on the images for which a probe predicted classes int64 (M,)."""
    (cut,) = head_cuts(head.ingredients)
    test.cache.check_vectors((cut,))
    features = Rows(Stacked([split.cut(cut) for _, split in test.cache.splits()]), test.rows)
    check_finite(test.cache, "test", [features])
    ours = head.predict(features)
    accuracy = top1(ours, test.labels)
    return ZeroShotResult(
        top1=accuracy,
        top1_interval=wilson_interval(accuracy, len(ours)),
        n_vectors=n_vectors,
        cut=cut,
        versus=paired_test(predicted == test.labels, ours == test.labels),
        head=path,
    )


def vectors_at(
    cache: Cache, given: Any, where: str, cuts: Sequence[str] = ()
) -> tuple[np.ndarray, str]:
    """Return vectors as float32 (M, D), and the cut of the cache that they are compared with.

    It is the first of ``cuts`` with D numbers; by default ``projected`` comes before the others.
    """
    array = np.atleast_1d(given)
    array = array[None] if array.ndim == 1 else array
    shapes: dict[str, tuple[int, ...]] = {}
    for cut in cuts or sorted(cache.cuts, key=lambda cut: cut != "projected"):
        stored = cache.index.arrays[f"train/{array_name(cut, 'identity', cache.cuts[0])}"]
        shapes[cut] = stored.row_shape
    fits = [cut for cut, shape in shapes.items() if shape == array.shape[1:]]
    if array.ndim != 2 or not len(array) or array.dtype.kind not in "fiu" or not fits:
        wanted = {f"(M, {shape[0]})": None for shape in shapes.values() if len(shape) == 1}
        raise ShapeMismatchError(
            f"{where}: expected numbers {' or '.join(wanted)} as the features of the cache, found "
            f"{array.dtype} {array.shape}; give vectors of the same space"
        )
    with np.errstate(over="ignore"):
        vectors = array.astype(np.float32)
    if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
        raise ShapeMismatchError(
            f"{where}: expected finite numbers and a direction, found NaN, infinity, a number "
            "beyond float32 or zeros alone; leave such vectors out"
        )
    return vectors, fits[0]


def _by_class(
    given: Any, encode: Encode | None, names: Sequence[str], cache: Cache
) -> tuple[str, Mapping[str, Any]]:
    """Return where the vectors come from, and those of each class."""
    where = "zero_shot"
    if isinstance(given, (str, Path)):
        path = user_path(given)
        where = str(path)
        if path.suffix == ".npy":
            given = read_npy(path)[""]
        elif path.suffix == ".npz":
            given = read_npz(path)
        else:
            prompts = read_prompts(path, names)
            if encode is None:
                raise RecipeError(f"{path}: expected encode to read texts, such as text_features")
            vectors = encode(cache, [text for texts in prompts.values() for text in texts])
            ends = np.cumsum([len(texts) for texts in prompts.values()])
            return where, dict(zip(prompts, np.split(vectors, ends[:-1]), strict=True))
    if isinstance(given, Mapping):
        _check_names(where, given, names)
        return where, given
    array = np.asarray(given)
    if array.ndim != 2 or len(array) != len(names):
        raise ShapeMismatchError(
            f"{where}: expected vectors ({len(names)}, D), a row for each class in the order of "
            f"the cache, found {array.shape}; give an .npz file with an array for each class"
        )
    return where, dict(zip(names, array, strict=True))


def read_prompts(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of each class, in the order of ``names``.

    A line is a class, ``CLASS<TAB>PROMPT``, or a template for all classes without prompts of their
    own; ``{}`` in it stands for the class. `TEMPLATE` is used where the file has none.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # such as UnicodeDecodeError
        raise DatasetError(
            f"{path}: expected a text file with a class on each line, found "
            f"{getattr(error, 'strerror', None) or one_line(error)}; check the path"
        ) from None
    prompts: dict[str, list[str]] = {}
    templates: list[str] = []
    known = set(names)
    for line in filter(None, (line.strip() for line in lines)):
        name, tab, prompt = line.partition("\t")
        if tab or line in known or "{}" not in line:
            prompts.setdefault(name.strip(), []).extend([prompt.strip()] * bool(tab))
        else:
            templates.append(line)
    every = dict.fromkeys(names) if templates else {}
    _check_names(str(path), {**every, **prompts}, names)
    return {
        name: [
            text.replace("{}", name.replace("_", " "))
            for text in prompts.get(name) or templates or [TEMPLATE]
        ]
        for name in names
    }


def _check_names(where: str, found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse other classes than these, and too few."""
    known = set(names)
    wrong = [name for name in found if name not in known]
    missing = [name for name in names if name not in found]
    if wrong:
        otherwise = "write CLASS, a tab and a prompt, or a template with {} for all classes"
        raise DatasetError(
            f"{where}: expected classes of the cache, found '{one_line(wrong[0])}'"
            + did_you_mean(wrong[0], names, otherwise)
        )
    if missing:
        raise DatasetError(
            f"{where}: expected each of the {len(names):,} classes, found none of "
            f"'{one_line(missing[0])}' ({len(missing):,} missing in all); add them"
        )
