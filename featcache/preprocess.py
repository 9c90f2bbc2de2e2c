"""From an image to the pixels that a backbone sees, and the four flip views.

Every engine sees the *canonical pixels* defined here, so that features differ
between engines by rounding alone: upright RGB, the centre square cropped and
resized to ``size`` by Pillow's antialiased bilinear filter. For square images
this is exactly the tutorial's ``Resize(224)``.
Normalising belongs to the engine; ``uint8`` is what travels.

An image smaller than ``size`` may travel as it is (`Preprocess.compact`) and be
enlarged by the engine. `upscale_taps` defines how: as Pillow does it, in the same
fixed-point arithmetic, so that both ways lead to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RecipeError, ShapeMismatchError

if TYPE_CHECKING:
    from PIL import Image


# Channel statistics of ImageNet's training images on [0, 1]; the tutorial's and torchvision's.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The stem and four stages of a ResNet divide each side by 32: below that no pixel is left.
MIN_SIZE = 32
MAX_SIZE = 4096  # one such image is 200 MB as float32

# A JPEG decoder may shrink a photo by 2, 4 or 8 while it decodes, as long as the result stays at
# least so many times the target's side; Pillow's filter does the rest. The name is Pillow's.
REDUCING_GAP = 2.0

# Pillow's weights for uint8 images are multiples of 2 ** -22: 32 bits, less 8 for the pixel and
# 2 to spare (PRECISION_BITS in its Resample.c).
WEIGHT_BITS = 22

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
            "reducing_gap": REDUCING_GAP,
        }

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resize and crop one upright RGB image.

        Returns
        -------
        numpy.ndarray
            uint8, shape (size, size, 3).
        """
        from PIL import Image

        image = _centre_square(image)
        if image.width != self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(image, dtype=np.uint8)

    def batch(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the canonical pixels of several images: uint8 (N, size, size, 3)."""
        batch = np.empty((len(images), self.size, self.size, 3), np.uint8)
        for row, image in zip(batch, images, strict=True):
            row[...] = self.pixels(image)
        return batch

    def compact(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the smallest pixels that stand for the canonical ones of a batch.

        Parameters
        ----------
        images : sequence of PIL.Image.Image
            Upright RGB images.

        Returns
        -------
        numpy.ndarray
            uint8 (N, s, s, 3). Where the centre squares of all images have one side
            s <= size: these, which `upscale` turns into what `batch` returns, byte for
            byte. Otherwise what `batch` returns, with s = size.
        """
        sides = {min(image.size) for image in images}
        if len(sides) != 1 or max(sides) > self.size:
            return self.batch(images)
        return np.stack([np.asarray(_centre_square(image), np.uint8) for image in images])


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    if image.size == (side, side):
        return image
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def upscale(images: np.ndarray, size: int) -> np.ndarray:
    """Enlarge square images exactly as Pillow's bilinear filter does.

    The reference for every engine's own way: horizontally, then vertically, rounding to uint8
    after each.
    """
    if images.ndim != 4 or not 1 <= images.shape[1] == images.shape[2] <= size:
        raise ShapeMismatchError(
            f"images: expected (N, s, s, 3) with s up to {size}, found shape {images.shape}; "
            "make them with Preprocess.compact"
        )
    first, second, weights = upscale_taps(images.shape[1], size)
    for axis in (2, 1):
        shape = [1, 1, 1, 1]
        shape[axis] = size
        total = images.take(first, axis) * weights[:, 0].reshape(shape)
        total += images.take(second, axis) * weights[:, 1].reshape(shape)
        images = ((total + (1 << WEIGHT_BITS >> 1)) >> WEIGHT_BITS).astype(np.uint8)
    return images


def upscale_taps(side: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where each pixel of an enlarged row comes from, and with which weights.

    Pixel i of the result is ``w[i, 0] * x[first[i]] + w[i, 1] * x[second[i]]``, rounded half
    up, where ``w = weights / 2 ** WEIGHT_BITS``. A sum of such products takes 30 bits: integers
    and float64 hold it exactly, float32 does not.

    Follows ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` in Pillow's
    ``src/libImaging/Resample.c``; when an image grows, the bilinear filter is a triangle that
    reaches one pixel to either side, so that two weights suffice.
    """
    centre = (np.arange(size) + 0.5) * (side / size)
    weights = np.maximum(1 - np.abs(np.arange(side) - centre[:, None] + 0.5), 0)
    weights /= weights.sum(axis=1, keepdims=True)  # at the border one of the two is missing
    fixed = np.floor(weights * (1 << WEIGHT_BITS) + 0.5).astype(np.int32)
    first = (fixed > 0).argmax(axis=1)
    second = np.minimum(first + 1, side - 1)
    rows = np.arange(size)
    pair = np.stack((fixed[rows, first], np.where(second > first, fixed[rows, second], 0)), axis=1)
    return first.astype(np.int32), second.astype(np.int32), pair


def apply_view(images: np.ndarray, view: str) -> np.ndarray:
    """Return one flip view of a batch, without copying."""
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


def check_pixels(images: np.ndarray, preprocess: Preprocess) -> None:
    """Refuse what is not a batch of square uint8 images of at most the input's size."""
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
