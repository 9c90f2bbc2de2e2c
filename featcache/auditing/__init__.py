"""The health of a data set, read off its features: near-duplicates, wrong labels, outliers.

Each list is a ranking for a person to look at, not a verdict: what the measures mean,
and what they found where the truth is known, is in ``docs/audit.md``.
"""

from __future__ import annotations

from ._result import AuditResult, DuplicateGroup, DuplicatePair, Image, Outlier, Suspect
from ._run import audit
from ._tables import TABLES, as_csv, table_paths, write_tables

__all__ = [
    "TABLES",
    "AuditResult",
    "DuplicateGroup",
    "DuplicatePair",
    "Image",
    "Outlier",
    "Suspect",
    "as_csv",
    "audit",
    "table_paths",
    "write_tables",
]
