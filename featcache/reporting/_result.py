"""What `featcache.report` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ReportResult"]


@dataclass(frozen=True)
class ReportResult:
    """A page, and the figures beside it.

    Parameters
    ----------
    page : Path
        The HTML file.
    size_bytes : int
        Its size.
    thumbnail_bytes : int
        How much of that is thumbnails.
    thumbnails : str
        ``"all"``, ``"lists"`` or ``"none"``: what was put in, of the data set with the most.
    figures : tuple of Path
        The PNG and SVG files.
    datasets : tuple of str
        Whose runs and features are in it.
    n_points : int
        Images on the maps.
    n_runs : int
        Runs in it.
    notes : tuple of str
        What was left out and why, a sentence each.
    stages_s : mapping of str to float
        Seconds that each part of the work took.
    wall_s : float
        Seconds that everything took.
    """

    page: Path
    size_bytes: int
    thumbnail_bytes: int
    thumbnails: str
    figures: tuple[Path, ...]
    datasets: tuple[str, ...]
    n_points: int
    n_runs: int
    notes: tuple[str, ...]
    stages_s: Mapping[str, float]
    wall_s: float

    def open(self) -> bool:
        """Show the page in the browser; return whether there is one."""
        import webbrowser

        return webbrowser.open(self.page.absolute().as_uri())

    def _repr_html_(self) -> str:
        """Return a link, for a notebook."""
        from html import escape

        at = escape(self.page.absolute().as_uri(), quote=True)
        return f'<a href="{at}">{escape(str(self.page))}</a>, {self.size_bytes / 1e6:.1f} MB'
