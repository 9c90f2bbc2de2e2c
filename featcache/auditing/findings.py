"""What an audit returns: plain fields, so that JSON and CSV are one step away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import csv_line, write_atomically


@dataclass(frozen=True)
class Image:
    """One image of the cache.

    Parameters
    ----------
    id : str
        Its name.
    split : str
        ``"train"`` or ``"test"``.
    row : int
        Its place in the split.
    label : str or None
        Its class as given; None for an image without a label.
    """

    id: str
    split: str
    row: int
    label: str | None


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that are all but the same.

    Parameters
    ----------
    first, second : Image
        Across splits the test image stands first, within one the earlier row.
    similarity : float
        Cosine of their features.
    same_label : bool or None
        None where one of them has no label.
    group : int
        The number of their `DuplicateGroup`.
    """

    first: Image
    second: Image
    similarity: float
    same_label: bool | None
    group: int


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that hang together by near-duplicates, of both splits.

    Parameters
    ----------
    number : int
        From 1; groups of both splits come first, then the larger ones.
    images : tuple of Image
        Training images first, each split by row.
    n_train, n_test : int
        How many of each split.
    same_label : bool or None
        Whether the labels that are there are all the same; None where there are fewer than two.
    """

    number: int
    images: tuple[Image, ...]
    n_train: int
    n_test: int
    same_label: bool | None


@dataclass(frozen=True)
class Suspect(Image):
    """An image whose label is likely wrong.

    Parameters
    ----------
    id, split, row, label
        As of `Image`.
    suggested : str
        The class that the head takes it for.
    self_confidence : float
        The head's probability of the label, in [0, 1]; the head never saw the image.
    confidence : float
        Its probability of the suggested class.
    score : float
        1 - ``self_confidence``: the higher, the more suspect.
    """

    suggested: str
    self_confidence: float
    confidence: float
    score: float


@dataclass(frozen=True)
class Outlier(Image):
    """An image that is far from every training image.

    Parameters
    ----------
    id, split, row, label
        As of `Image`.
    score : float
        1 minus the mean cosine to its nearest training images: the higher, the further.
    """

    score: float


@dataclass(frozen=True)
class AuditResult:
    """Near-duplicates, likely wrong labels and outliers of one cache.

    Parameters
    ----------
    cache : Path
        The file.
    n_train, n_test : int
        Images, with and without labels.
    n_unlabelled : int
        Those without.
    threshold : float
        The cosine from which on two images count as near-duplicates.
    duplicates : tuple of DuplicatePair
        For each test image with near-duplicates in train, the nearest of them; then, of
        train and of test, just so many pairs that they hold each group together. Within
        each of the three the closest come first.
    groups : tuple of DuplicateGroup
        Everything that hangs together.
    n_test_with_duplicate : int
        Test images with a near-duplicate in train: they inflate the accuracy.
    n_label_conflicts : int
        Pairs among ``duplicates`` whose labels differ.
    mislabelled : tuple of Suspect
        The most suspect first.
    n_judged : int
        Images whose label was looked at.
    outliers : tuple of Outlier
        The furthest first.
    n_neighbours : int
        How many of the nearest training images an outlier's score is the mean over.
    outlier_score : float or None
        The score above which images are listed: the quantile of the training images' own
        that was asked for. None with fewer than two training images.
    C : float or None
        The head's penalty in scikit-learn's terms; None where no head was trained.
    top1, top1_without_duplicates : float or None
        The head's accuracy on the labelled test images: on all, and on those without a
        near-duplicate in train. None where there are none, or no head.
    n_test_without_duplicates : int
        How many the second is over.
    notes : tuple of str
        What was left out and why, a sentence each.
    neighbours_s, heads_s, wall_s : float
        Duration of the search for neighbours, of the heads, and of everything.
    """

    cache: Path
    n_train: int
    n_test: int
    n_unlabelled: int
    threshold: float
    duplicates: tuple[DuplicatePair, ...]
    groups: tuple[DuplicateGroup, ...]
    n_test_with_duplicate: int
    n_label_conflicts: int
    mislabelled: tuple[Suspect, ...]
    n_judged: int
    outliers: tuple[Outlier, ...]
    n_neighbours: int
    outlier_score: float | None
    C: float | None
    top1: float | None
    top1_without_duplicates: float | None
    n_test_without_duplicates: int
    notes: tuple[str, ...]
    neighbours_s: float
    heads_s: float
    wall_s: float


def as_csv(result: AuditResult, table: str) -> str:
    r"""Return one of `TABLES` as comma-separated values, a header first.

    An image takes four columns: ``split``, ``row``, ``id``, ``label``, the last empty where
    there is none. Text is quoted where it holds a comma, a quote or a line break, and
    otherwise as it is: names that a spreadsheet takes for a formula stay names. Lines end
    in ``\n``.
    """
    return "".join(csv_line(line) for line in TABLES[table](result))


def table_paths(folder: Path) -> dict[str, Path]:
    """Return where `write_tables` writes each of `TABLES`."""
    return {table: folder / f"{table}.csv" for table in TABLES}


def write_tables(result: AuditResult, folder: Path) -> None:
    """Write every table as a file of a folder, which is made where it is not there.

    A name that is not text (a path may be none) is spelt out with backslashes.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """
    for table, path in table_paths(folder).items():
        write_atomically(path, as_csv(result, table).encode("utf-8", "backslashreplace"))


def _image(image: Image) -> list[str]:
    return [image.split, str(image.row), image.id, image.label or ""]


def _columns(prefix: str = "") -> list[str]:
    return [f"{prefix}{name}" for name in ("split", "row", "id", "label")]


def _truth(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _duplicates(result: AuditResult) -> Iterator[list[str]]:
    yield ["group", "similarity", "same_label", *_columns("first_"), *_columns("second_")]
    for pair in result.duplicates:
        facts = [str(pair.group), f"{pair.similarity:.6f}", _truth(pair.same_label)]
        yield [*facts, *_image(pair.first), *_image(pair.second)]


def _groups(result: AuditResult) -> Iterator[list[str]]:
    yield ["group", *_columns()]
    for group in result.groups:
        for image in group.images:
            yield [str(group.number), *_image(image)]


def _mislabelled(result: AuditResult) -> Iterator[list[str]]:
    yield [*_columns(), "suggested", "self_confidence", "confidence", "score"]
    for suspect in result.mislabelled:
        shares = suspect.self_confidence, suspect.confidence, suspect.score
        yield [*_image(suspect), suspect.suggested, *(f"{share:.6f}" for share in shares)]


def _outliers(result: AuditResult) -> Iterator[list[str]]:
    yield [*_columns(), "score"]
    for outlier in result.outliers:
        yield [*_image(outlier), f"{outlier.score:.6f}"]


TABLES: dict[str, Callable[[AuditResult], Iterator[list[str]]]] = {
    "duplicates": _duplicates,
    "groups": _groups,
    "mislabelled": _mislabelled,
    "outliers": _outliers,
}
