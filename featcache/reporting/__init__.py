"""A page that shows what runs found and what features look like, and its figures as files.

`report` writes one HTML file: the comparison, the probe, a map of the features, the
health of the data set, where everything came from. It needs the extra
``featcache[report]``.
"""

from __future__ import annotations

from ._result import ReportResult
from ._run import POINTS, THUMBNAILS, report

__all__ = ["POINTS", "THUMBNAILS", "ReportResult", "report"]
