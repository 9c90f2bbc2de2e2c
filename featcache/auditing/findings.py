"""The result of an audit, and its CSV tables."""

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
        Its row in the split.
    label : str or None
        The name of its class; None without a label.
    """

    id: str
    split: str
    row: int
    label: str | None


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that are almost the same.

    Parameters
    ----------
    first, second : Image
        The test image first where the splits differ, else the earlier row.
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
    """Images of both splits that near-duplicate pairs connect.

    Parameters
    ----------
    number : int
        From 1; groups with images of both splits first, then larger groups first.
    images : tuple of Image
        Training images first, each split by row.
    n_train, n_test : int
        Images of each split.
    same_label : bool or None
        Whether all labels are the same; None with fewer than two labels.
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
        The class that is most likely instead.
    self_confidence : float
        Probability of the label, in [0, 1], by a head that was not trained on the image and the
        labels of its nearest training images.
    confidence : float
        Their probability of the suggested class.
    score : float
        In [0, 1]: the higher, the more suspect. It is 1 - ``self_confidence`` unless two classes
        are clearly confused one way only.
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
class StraddlingCopy:
    """One image whose exact copies stand in several splits, whatever their names.

    Parameters
    ----------
    images : tuple of Image
        The copies, in the order of the cache.
    same_label : bool or None
        Whether all labels are the same; None with fewer than two labels.
    """

    images: tuple[Image, ...]
    same_label: bool | None


@dataclass(frozen=True)
class StraddlingGroup:
    """A group, such as a patient, whose images stand in several splits.

    Parameters
    ----------
    name : str
        Its value in the column.
    n_train, n_val, n_test : int
        Images of each split.
    """

    name: str
    n_train: int
    n_val: int
    n_test: int


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
        Images with at least this cosine are near-duplicates.
    duplicates : tuple of DuplicatePair
        For each test image with near-duplicates in the training split the nearest one; then,
        within train and within test, the closest pairs that connect each group. In each of the
        three the closest pairs come first.
    groups : tuple of DuplicateGroup
        Connected images.
    n_test_with_duplicate : int
        Test images with a near-duplicate in the training split, which inflate accuracy.
    n_label_conflicts : int
        Pairs among ``duplicates`` whose labels differ.
    mislabelled : tuple of Suspect
        The most suspect first.
    n_judged : int
        Images whose label was judged.
    outliers : tuple of Outlier
        The furthest first.
    n_neighbours : int
        Nearest training images that an outlier's score is the mean over.
    outlier_score : float or None
        Images with a higher score are listed: a quantile of the training images' scores. None
        with fewer than two training images.
    C : float or None
        The head's penalty in scikit-learn's terms; None where no head was trained.
    top1, top1_without_duplicates : float or None
        The head's accuracy on all labelled test images, and on those without a near-duplicate
        in the training split. None without such images, or without a head.
    n_test_without_duplicates : int
        Test images of the second accuracy.
    notes : tuple of str
        What was left out and why.
    neighbours_s, heads_s, wall_s : float
        Duration of the search for neighbours, of the heads, and of everything.
    n_val : int
        Images of the split val, which is checked for copies and groups in several splits only.
    straddling_copies : tuple of StraddlingCopy
        Images with exact copies, by the SHA-256 of the file, in several splits.
    group : str or None
        The column of groups that was checked.
    straddling_groups : tuple of StraddlingGroup
        Its groups that stand in several splits, the largest first.
    n_groups : int
        Groups in all.
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
    n_val: int = 0
    straddling_copies: tuple[StraddlingCopy, ...] = ()
    group: str | None = None
    straddling_groups: tuple[StraddlingGroup, ...] = ()
    n_groups: int = 0


def as_csv(result: AuditResult, table: str) -> str:
    """Return one of `TABLES` as CSV; docs/audit.md describes the columns."""
    return "".join(csv_line(line) for line in TABLES[table](result))


def table_paths(folder: Path) -> dict[str, Path]:
    """Return where `write_tables` writes each of `TABLES`."""
    return {table: folder / f"{table}.csv" for table in TABLES}


def write_tables(result: AuditResult, folder: Path) -> None:
    """Write every table to a folder, created if need be; invalid Unicode in names is escaped."""
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


def _straddling(result: AuditResult) -> Iterator[list[str]]:
    yield ["copy", "same_label", *_columns()]
    for number, copy in enumerate(result.straddling_copies, 1):
        for image in copy.images:
            yield [str(number), _truth(copy.same_label), *_image(image)]


def _straddling_groups(result: AuditResult) -> Iterator[list[str]]:
    yield ["group", "n_train", "n_val", "n_test"]
    for group in result.straddling_groups:
        yield [group.name, *map(str, (group.n_train, group.n_val, group.n_test))]


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
    "straddling_copies": _straddling,
    "straddling_groups": _straddling_groups,
}
