"""The health of a data set: what `featcache.audit` found, cut to what a person looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..auditing import AuditResult, DuplicatePair, Outlier, Suspect

__all__ = ["Health", "listed"]

_LISTED = 24


@dataclass(frozen=True)
class Health:
    """The heads of an audit's three lists.

    Parameters
    ----------
    audit : AuditResult
        The whole.
    duplicates, mislabelled, outliers : tuple
        The first of each.
    """

    audit: AuditResult
    duplicates: tuple[DuplicatePair, ...]
    mislabelled: tuple[Suspect, ...]
    outliers: tuple[Outlier, ...]

    def places(self) -> Iterator[tuple[str, int]]:
        """Yield split and row of every image in the lists."""
        for pair in self.duplicates:
            for image in (pair.first, pair.second):
                yield image.split, image.row
        for one in (*self.mislabelled, *self.outliers):
            yield one.split, one.row


def listed(audit: AuditResult) -> Health:
    """Return what is put on the page."""
    return Health(
        audit,
        audit.duplicates[:_LISTED],
        audit.mislabelled[:_LISTED],
        audit.outliers[:_LISTED],
    )
