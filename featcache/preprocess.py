"""From an image to the pixels that a backbone sees, and the four flip views.

Every engine sees the *canonical pixels* defined here, so that features differ
between engines by rounding alone: upright RGB, the centre square cropped and
resized to ``size`` by Pillow's antialiased bilinear filter. For square images
this is exactly the tutorial's ``Resize(224)``.
Normalising belongs to the engine; ``uint8`` is what travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RecipeError, ShapeMismatchError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FLIP_VIEWS", "IMAGENET_MEAN", "IMAGENET_STD", "VIEWS", "Preprocess", "apply_view"]

# Channel statistics of ImageNet's training images on [0, 1]; the tutorial's and torchvision's.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The stem and four stages of a ResNet divide each side by 32: below that no pixel is left.
MIN_SIZE = 32
MAX_SIZE = 4096  # one such image is 200 MB as float32

# The tutorial flips each training image horizontally and vertically with probability 1/2
# each, so that its augmentation has exactly these four outcomes, equally likely.
FLIP_VIEWS = ("identity", "hflip", "vflip", "hvflip")
VIEWS = {"none": FLIP_VIEWS[:1], "flips": FLIP_VIEWS}


@dataclass(frozen=True)
class Preprocess:
    """How images become the input of a backbone.

    Parameters
    ----------
    size : int
        Side of the square input in pixels, 32 to 4096.
    mean, std : tuple of 3 floats
        Channel statistics on [0, 1], subtracted and divided by the engine.
    interpolation : str
        ``"bilinear"`` (Pillow's, with antialias), the only one so far.

    Raises
    ------
    RecipeError
        ``size`` outside 32 to 4096, a ``std`` that is not positive, another interpolation.
    """

    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Refuse values that no backbone could work with."""
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise RecipeError(
                f"size: expected {MIN_SIZE} to {MAX_SIZE} pixels (a ResNet halves the image five "
                f"times), found {self.size}; try --size 64 or --size 224"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise RecipeError(
                f"mean and std: expected 3 values each, std positive, found {self.mean}, {self.std}"
            )
        if self.interpolation != "bilinear":
            raise RecipeError(f"interpolation: expected 'bilinear', found {self.interpolation!r}")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, with the decoder that defines the pixels.

        Pillow's version is part of it: a resampling filter that changes by one
        grey level changes every feature.
        """
        import PIL

        fields = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        return {
            **fields,
            "geometry": "centre square, then resize",
            "decoder": f"pillow {PIL.__version__}",
        }

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resize and crop one upright RGB image.

        Returns
        -------
        numpy.ndarray
            uint8, shape (size, size, 3).
        """
        from PIL import Image

        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        if image.size != (side, side):
            image = image.crop((left, top, left + side, top + side))
        if side != self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(image, dtype=np.uint8)

    def batch(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the canonical pixels of several images: uint8 (N, size, size, 3)."""
        batch = np.empty((len(images), self.size, self.size, 3), np.uint8)
        for row, image in zip(batch, images, strict=True):
            row[...] = self.pixels(image)
        return batch


def apply_view(images: np.ndarray, view: str) -> np.ndarray:
    """Return one flip view of a batch, without copying.

    Parameters
    ----------
    images : numpy.ndarray
        Shape (N, H, W, C).
    view : str
        One of `FLIP_VIEWS`.
    """
    if images.ndim != 4:
        raise ShapeMismatchError(f"images: expected (N, H, W, C), found shape {images.shape}")
    if view == "identity":
        return images
    if view == "hflip":
        return images[:, :, ::-1]
    if view == "vflip":
        return images[:, ::-1]
    if view == "hvflip":
        return images[:, ::-1, ::-1]
    raise RecipeError(f"view: expected one of {', '.join(FLIP_VIEWS)}, found {view!r}")
