"""What every engine asks of its input."""

from __future__ import annotations

import numpy as np

from ..errors import ShapeMismatchError
from ..preprocess import Preprocess


def check_images(images: np.ndarray, preprocess: Preprocess) -> None:
    """Refuse what is not a batch of square uint8 images of at most the input's size.

    Raises
    ------
    ShapeMismatchError
        Another dtype or shape, or no image at all.
    """
    size = preprocess.size
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or not len(images)
        or images.shape[1] != images.shape[2]
        or not 1 <= images.shape[1] <= size
        or images.shape[3] != 3
    ):
        raise ShapeMismatchError(
            f"images: expected uint8 (N >= 1, s, s, 3) with s up to {size}, found {images.dtype} "
            f"{images.shape}; make them with Preprocess.batch or Preprocess.compact"
        )
