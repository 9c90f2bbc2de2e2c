"""Figures of results, for files and for pages: data in, a matplotlib Figure out.

They are drawn with matplotlib's objects alone: no pyplot, no display, no setting left
changed. Each function takes what the library returns, or the same out of a run's
record. matplotlib is an extra, ``pip install 'featcache[report]'``, and is imported
when the first figure is drawn.
"""

from __future__ import annotations

from ._bars import per_class
from ._comparison import accuracy_over_time, published
from ._confusion import confusion
from ._curves import regularisation_path, shots_curve
from ._epochs import learning_curves
from ._files import check_plot, save_figure
from ._overview import probe_overview
from ._reliability import reliability
from ._style import COLOURS, stylesheet
from ._svg import svg

__all__ = [
    "COLOURS",
    "accuracy_over_time",
    "check_plot",
    "confusion",
    "learning_curves",
    "per_class",
    "probe_overview",
    "published",
    "regularisation_path",
    "reliability",
    "save_figure",
    "shots_curve",
    "stylesheet",
    "svg",
]
