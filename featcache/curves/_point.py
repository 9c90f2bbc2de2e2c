"""What one point of a curve says."""

from __future__ import annotations

from dataclasses import dataclass

from ..notebook import ShownAsTable

__all__ = ["CurvePoint"]


@dataclass(frozen=True)
class CurvePoint(ShownAsTable):
    """What heads trained on so many images score.

    Parameters
    ----------
    n_train : int
        Images in each draw.
    shots : int or None
        Images of every class; None where classes were drawn by fraction or whole.
    scores : tuple of float
        One per seed, in the order of seeds, each in [0, 1]; a single one where all
        images are used, since there is one way to do that.
    mean : float
        Of the scores.
    interval : tuple of 2 floats
        95 %. Of two or more scores `mean_interval`: Student's, of the mean over draws. Of one
        score `score_interval`: over draws of test images, Wilson's for top-1.
    converged : bool
        Whether every head reached the recipe's tolerance.
    wall_s : float
        Duration of drawing, training and scoring, all seeds together.
    """

    n_train: int
    shots: int | None
    scores: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    converged: bool
    wall_s: float
