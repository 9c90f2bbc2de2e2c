"""From an image to the pixels that a backbone sees, and the four flip views.

Every engine sees the *canonical pixels* defined here, so that features differ
between engines by rounding alone: upright RGB, resized by one of Pillow's antialiased
filters and cut to a square as the model's own preprocessing does it, to the byte.
Normalising belongs to the engine; ``uint8`` is what travels.

An image smaller than ``size`` may travel as it is (`Preprocess.compact`) and be
enlarged by the engine. `resample_taps` defines how: as Pillow does it, in the same
fixed-point arithmetic, so that both ways lead to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RecipeError, ShapeMismatchError
from .options import check_choice

if TYPE_CHECKING:
    from PIL import Image


# Channel statistics of ImageNet's training images on [0, 1]; the tutorial's and torchvision's.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MIN_SIZE = 1
MAX_SIZE = 4096  # one such image is 200 MB as float32
MAX_RESIZE = 2 * MAX_SIZE  # before the centre crop

GEOMETRIES = ("square", "crop", "squash", "pad")
ROUNDINGS = ("even", "down")
_CROPPED = ("crop", "squash")  # the geometries with a centre crop after the resize
_SQUARE = "centre square, then resize"  # how caches have always named the default geometry

# A JPEG decoder may shrink a photo by 2, 4 or 8 while it decodes, as long as the result stays at
# least so many times the target's side; Pillow's filter does the rest. The name is Pillow's.
REDUCING_GAP = 2.0

# Pillow's weights for uint8 images are multiples of 2 ** -22: 32 bits, less 8 for the pixel and
# 2 to spare (PRECISION_BITS in its Resample.c).
WEIGHT_BITS = 22

# Pixels of an enlarged panorama from which on the part that the crop keeps is made alone. The
# libraries make the whole: gigabytes, where a line of pixels is enlarged.
_MAX_ENLARGED_PIXELS = 2**24

# The tutorial flips each training image horizontally and vertically with probability 1/2
# each, so that its augmentation has exactly these four outcomes, equally likely.
FLIP_VIEWS = ("identity", "hflip", "vflip", "hvflip")
VIEWS = {"none": FLIP_VIEWS[:1], "flips": FLIP_VIEWS}


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0)


# Filters of Pillow's Resample.c: the curve, and how many pixels it reaches to either side.
_FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_cubic, 2),
    "lanczos": (_lanczos, 3),
}
INTERPOLATIONS = tuple(_FILTERS)


@dataclass(frozen=True)
class Preprocess:
    """How images become the input of a backbone.

    Parameters
    ----------
    size : int
        Side of the square input in pixels, 1 to 4096.
    mean, std : tuple of 3 floats
        Channel statistics on [0, 1], subtracted and divided by the engine.
    interpolation : str
        Pillow's antialiased filter: ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``.
    geometry : str
        ``"square"``: the centre square, resized to ``size``. ``"crop"``: the shorter side
        resized to ``resize`` pixels, the aspect ratio kept, then the centre. ``"squash"``: both
        sides resized to ``resize``, then the centre. ``"pad"``: the longer side resized to
        ``size``, the aspect ratio kept, centred on ``fill``.
    resize : int, optional
        Side in pixels before the centre crop of ``"crop"`` and ``"squash"``, ``size`` to 8192;
        None means ``size``.
    rounding : str
        The crop's offset where its margin is odd: ``"even"`` rounds half to even, as
        torchvision does; ``"down"`` as Hugging Face's Pillow processors do.
    fill : tuple of 3 ints
        Background of ``"pad"``, RGB, 0 to 255.

    Raises
    ------
    RecipeError
        A value outside these, or one that the geometry does not use.
    """

    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"
    geometry: str = "square"
    resize: int | None = None
    rounding: str = "even"
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        _check_int("size", self.size, MIN_SIZE, MAX_SIZE, "224")
        if not _are_three(self.mean, -1e6, 1e6) or not _are_three(self.std, 1e-6, 1e6):
            raise RecipeError(
                "mean and std: expected 3 values each, finite, std positive, found "
                f"{self.mean!r:.80}, {self.std!r:.80}; try {IMAGENET_MEAN}, {IMAGENET_STD}"
            )
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("geometry", self.geometry, GEOMETRIES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        if not _are_three(self.fill, 0, 255) or any(type(level) is not int for level in self.fill):
            raise RecipeError(
                f"fill: expected 3 integers from 0 to 255, found {self.fill!r:.80}; try (0, 0, 0)"
            )
        if self.resize is not None:
            _check_int("resize", self.resize, self.size, MAX_RESIZE, str(self.size))
        # One way to say each thing, so that equal preprocessing compares equal.
        set_field = object.__setattr__
        if self.resize == self.size:
            set_field(self, "resize", None)
        for name in ("mean", "std", "fill"):
            set_field(self, name, tuple(getattr(self, name)))
        for name, unused, used_by in (
            ("resize", None, _CROPPED),
            ("rounding", "even", _CROPPED),
            ("fill", (0, 0, 0), ("pad",)),
        ):
            found = getattr(self, name)
            if found != unused and self.geometry not in used_by:
                raise RecipeError(
                    f"{name}: expected none for geometry {self.geometry}, found {found!r}; "
                    f"leave it out, or try geometry {used_by[0]}"
                )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocess:
        """Return what `as_dict` wrote; the decoder may be another, and what is missing a default.

        The fields may be from a file that nobody vouches for: RecipeError where `as_dict`
        writes others.
        """
        if not isinstance(fields, Mapping):
            raise RecipeError(
                f"preprocess: expected fields with values, found {fields!r:.80}; "
                "write them with Preprocess.as_dict"
            )
        given = {key: value for key, value in fields.items() if key != "decoder"}
        if given.get("geometry") == _SQUARE:
            given["geometry"] = "square"
        names = cls.__dataclass_fields__
        preprocess = cls(**{key: value for key, value in given.items() if key in names})
        expected = {**preprocess.as_dict(), "geometry": preprocess.geometry}
        for key in given:
            if key not in expected or given[key] != expected[key]:
                raise RecipeError(
                    f"preprocess: expected {key!r:.80} to be {expected.get(key, 'left out')!r:.80} "
                    f"beside the other fields, found {given.get(key, 'nothing')!r:.80}; "
                    "write it with Preprocess.as_dict"
                )
        return preprocess

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, with the decoder that defines the pixels.

        Pillow's version is part of it: a resampling filter that changes by one
        grey level changes every feature.
        """
        import PIL

        fields: dict[str, Any] = {
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "geometry": _SQUARE if self.geometry == "square" else self.geometry,
            "decoder": f"pillow {PIL.__version__}",
            "reducing_gap": REDUCING_GAP if self.geometry == "square" else None,
        }
        if self.geometry in _CROPPED:
            fields |= {"resize": self.resized, "rounding": self.rounding}
        elif self.geometry == "pad":
            fields["fill"] = list(self.fill)
        return fields

    def describe(self, decoder: str | None = None) -> str:
        """Return what is done to an image, in words for the methods section of a paper.

        ``decoder`` is what a cache recorded, such as ``"pillow 11.0.0"``; by default the one here.
        """
        import PIL

        version = ".".join((decoder or PIL.__version__).rpartition(" ")[2].split(".")[:2])
        resized = f"resized with Pillow {version}'s antialiased {self.interpolation} filter"
        side = f"{self.size} x {self.size} pixels"
        crop = f", cropped to the central {side},"
        if self.geometry == "square":
            done = f"cropped to their central square, {resized} to {side}"
        elif self.geometry == "crop":
            done = f"{resized} so that the shorter side had {self.resized} pixels{crop}"
        elif self.geometry == "squash":
            whole = f"{self.resized} x {self.resized} pixels"
            crop = crop if self.resized > self.size else ""
            done = f"{resized} to {whole} whatever their aspect ratio{crop}"
        else:
            done = (
                f"{resized} so that the longer side had {self.size} pixels, centred on a "
                f"background of {side} of RGB colour {self.fill},"
            )
        text = (
            f"Images were {done} and normalised with mean {self.mean} and standard deviation "
            f"{self.std} on [0, 1]."
        )
        if self.geometry == "square":
            text += (
                " The decoder scaled large JPEG images down, to no less than "
                f"{REDUCING_GAP:g} times that size, before they were resized."
            )
        return text

    def kept_share(self, width: int, height: int) -> float:
        """Return how much of an upright image's area is left after the crop, in (0, 1]."""
        if self.geometry == "square":
            return min(width, height) / max(width, height)
        if self.geometry == "pad":
            return 1.0
        resized = self._resized(width, height)
        return self.size**2 / (resized[0] * resized[1])

    def overridden(
        self,
        size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        interpolation: str | None = None,
        geometry: str | None = None,
        crop_pct: float | None = None,
    ) -> Preprocess:
        """Return this preprocessing with some values replaced; None keeps a value.

        ``size`` changes the side before the crop in proportion. What a new ``geometry``
        does not use returns to its default. ``crop_pct`` is the share of the side that the
        centre crop keeps, in (0, 1], as timm defines it: the side before the crop is
        ``floor(size / crop_pct)``.

        Raises RecipeError for what the constructor refuses, and for a ``crop_pct`` where
        nothing is cropped after the resize.
        """
        size = self.size if size is None else size
        geometry = self.geometry if geometry is None else geometry
        _check_int("size", size, MIN_SIZE, MAX_SIZE, "224")
        check_choice("geometry", geometry, GEOMETRIES)
        cropped = geometry in _CROPPED
        resize = size * self.resized // self.size if cropped else None
        if crop_pct is not None:
            if not cropped:
                raise RecipeError(
                    f"crop_pct: expected geometry crop or squash, found {geometry}, which has no "
                    "crop after the resize; leave crop_pct out, or try geometry crop"
                )
            number = isinstance(crop_pct, (int, float)) and not isinstance(crop_pct, bool)
            if not number or not size / MAX_RESIZE <= crop_pct <= 1:
                raise RecipeError(
                    f"crop_pct: expected above 0 up to 1, and {MAX_RESIZE} pixels at most before "
                    f"the crop, found {crop_pct!r:.80}; try 0.875"
                )
            resize = math.floor(size / crop_pct)
        return Preprocess(
            size,
            self.mean if mean is None else mean,
            self.std if std is None else std,
            self.interpolation if interpolation is None else interpolation,
            geometry,
            resize,
            self.rounding if cropped else "even",
            self.fill if geometry == "pad" else (0, 0, 0),
        )

    @property
    def resized(self) -> int:
        """Side in pixels before the centre crop: ``resize``, or ``size`` where that is None."""
        return self.size if self.resize is None else self.resize

    @property
    def resampling(self) -> Image.Resampling:
        """The filter, as Pillow names it."""
        from PIL import Image

        return Image.Resampling[self.interpolation.upper()]

    @property
    def enlarges(self) -> bool:
        """Whether engines may get smaller square images, and enlarge them.

        Flips come before enlarging. With an odd margin the crop of a flipped image is not the
        flipped crop.
        """
        return self.geometry != "pad" and (self.resized - self.size) % 2 == 0

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resize and crop one upright RGB image: uint8 (size, size, 3)."""
        if self.geometry == "square":
            image = _centre_square(image)
        resized = self._resized(*image.size)
        if self.geometry == "pad":
            return self._padded(image.resize(resized, self.resampling))
        left, top = (self._offset(side) for side in resized)
        if self._is_far_too_large(resized) and min(image.size) < self.resized:
            return self._part(image, resized, left, top)
        image = image.resize(resized, self.resampling)
        if image.size != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image, np.uint8)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after the resize, rounded as torchvision and timm do."""
        if self.geometry == "pad":
            ratio = max(width, height) / self.size
            # A side of no pixel, where timm fails, becomes one.
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        if self.geometry != "crop":
            return self.resized, self.resized
        short, long = sorted((width, height))
        longer = int(self.resized * long / short)
        return (self.resized, longer) if width <= height else (longer, self.resized)

    def _offset(self, side: int) -> int:
        """Return where the centre crop begins in a resized side."""
        margin = side - self.size
        return margin // 2 if self.rounding == "down" else round(margin / 2)

    def _padded(self, image: Image.Image) -> np.ndarray:
        from PIL import Image

        whole = Image.new("RGB", (self.size, self.size), self.fill)
        left, top = ((self.size - side) // 2 for side in image.size)
        whole.paste(image, (left, top))
        return np.asarray(whole, np.uint8)

    def _is_far_too_large(self, resized: tuple[int, int]) -> bool:
        return resized[0] * resized[1] > max(_MAX_ENLARGED_PIXELS, 2 * self.resized**2)

    def _part(
        self, image: Image.Image, resized: tuple[int, int], left: int, top: int
    ) -> np.ndarray:
        """Make what the crop keeps of an enlarged image, and no more, as Pillow would."""
        taps = [
            _taps(side, longer, first, self.size, self.interpolation)
            for side, longer, first in zip(image.size, resized, (left, top), strict=True)
        ]
        (x, right), (y, bottom) = ((index.min(), index.max() + 1) for index, _ in taps)
        pixels = np.asarray(image.crop((x, y, right, bottom)), np.uint8)
        for axis, first, (index, weights) in ((1, x, taps[0]), (0, y, taps[1])):
            pixels = _resampled(pixels, axis, index - first, weights)
        return pixels

    def batch(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the canonical pixels of several images: uint8 (N, size, size, 3)."""
        batch = np.empty((len(images), self.size, self.size, 3), np.uint8)
        for row, image in zip(batch, images, strict=True):
            row[...] = self.pixels(image)
        return batch

    def compact(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the smallest pixels that stand for the canonical ones of a batch.

        Uint8 (N, s, s, 3). Where all images (with geometry ``"square"`` their centre
        squares) are squares of one side s < size, and enlarging them commutes with
        flipping: these, which `upscale` turns into what `batch` returns, byte for byte.
        Otherwise what `batch` returns.
        """
        squares = (
            [_centre_square(image) for image in images] if self.geometry == "square" else images
        )
        sizes = {image.size for image in squares}
        if len(sizes) != 1 or not _travels(*sizes.pop(), self):
            return self.batch(images)
        return _stacked(squares)


def _stacked(images: Sequence[Image.Image]) -> np.ndarray:
    """Return the pixels of squares of one side, uint8 (N, s, s, 3).

    Pillow packs an image 2.5 times as fast as a part of a long one as by itself.
    """
    from PIL import Image

    (side, _), n = images[0].size, len(images)
    strip = Image.new("RGB", (side, side * n))
    for row, image in enumerate(images):
        strip.paste(image, (0, row * side))
    return np.asarray(strip, np.uint8).reshape(n, side, side, 3)


def _check_int(name: str, found: Any, least: int, most: int, example: str) -> None:
    if type(found) is not int or not least <= found <= most:
        raise RecipeError(
            f"{name}: expected {least} to {most} pixels, found {found!r:.80}; try {example}"
        )


def _are_three(values: Any, least: float, most: float) -> bool:
    """Tell whether these are three numbers within limits; NaN is within none."""
    return (
        isinstance(values, (tuple, list))
        and len(values) == 3
        and all(isinstance(value, (int, float)) for value in values)
        and all(not isinstance(value, bool) and least <= value <= most for value in values)
    )


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    if image.size == (side, side):
        return image
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


@lru_cache(maxsize=64)
def _travels(width: int, height: int, preprocess: Preprocess) -> bool:
    """Tell whether images of a size may stay as they are, for the engine to enlarge.

    Weights that are rounded might differ from those of the mirror image. Of 12,000 sizes tried
    none do; one that did would have other pixels in the views made by flips.
    """
    if width != height or width >= preprocess.size or not preprocess.enlarges:
        return False
    dense = np.zeros((preprocess.size, width), np.int32)
    index, weights = resample_taps(width, preprocess)
    np.add.at(dense, (np.arange(preprocess.size)[:, None], index), weights)
    return np.array_equal(dense, dense[::-1, ::-1])


def upscale(images: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Enlarge small squares, uint8 (N, s, s, 3), exactly as Pillow does, and crop them.

    The reference for every engine's own way: horizontally, then vertically, rounded and clipped
    to uint8 after each. The geometry must not be ``"pad"``; ShapeMismatchError for another
    shape.
    """
    size = preprocess.size
    if images.ndim != 4 or not 1 <= images.shape[1] == images.shape[2] <= size:
        raise ShapeMismatchError(
            f"images: expected (N, s, s, 3) with s up to {size}, found shape {images.shape}; "
            "make them with Preprocess.compact"
        )
    if images.shape[1] == size:
        return images
    index, weights = resample_taps(images.shape[1], preprocess)
    for axis in (2, 1):
        images = _resampled(images, axis, index, weights)
    return images


def resample_taps(side: int, preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """Return where each pixel of an enlarged and cropped row comes from, and its weights.

    Pixel i of the result is the sum over k of ``weights[i, k] / 2 ** WEIGHT_BITS * x[index[i,
    k]]``, rounded half up and clipped to 0 to 255. Such a sum takes 31 bits and a sign: int32
    and float64 hold it exactly, float32 does not. Both are int32 (size, K), K being 2 for
    bilinear, 4 for bicubic and 6 for lanczos; a tap that is not needed has weight 0. ``side``
    is below ``preprocess.size``, whose geometry is not ``"pad"``.
    """
    resized, size = preprocess.resized, preprocess.size
    first = preprocess._offset(resized)
    return _taps(side, resized, first, size, preprocess.interpolation)


def _taps(
    length: int, resized: int, first: int, size: int, interpolation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the taps of ``size`` pixels from ``first`` on of a row resized from ``length``.

    Follows ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` in Pillow's
    ``src/libImaging/Resample.c``, operation by operation.
    """
    curve, reach = _FILTERS[interpolation]
    scale = length / resized
    stretch = max(scale, 1.0)
    support = reach * stretch
    centre = (np.arange(first, first + size) + 0.5) * scale
    low = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + support + 0.5).astype(np.int64), length)
    index = low[:, None] + np.arange(2 * math.ceil(support) + (scale > 1))
    exact = curve((index - centre[:, None] + 0.5) * (1 / stretch))
    exact[index >= high[:, None]] = 0
    exact /= exact.cumsum(axis=1)[:, -1:]  # summed in Pillow's order
    fixed = np.trunc(exact * (1 << WEIGHT_BITS) + np.copysign(0.5, exact))
    return np.minimum(index, length - 1).astype(np.int32), fixed.astype(np.int32)


def _resampled(images: np.ndarray, axis: int, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Apply taps along one axis of uint8 images."""
    shape = [1] * images.ndim
    shape[axis] = len(index)
    total: Any = np.int32(1 << WEIGHT_BITS >> 1)
    for where, weight in zip(index.T, weights.T, strict=True):
        total = images.take(where, axis) * weight.reshape(shape) + total
    return (total >> WEIGHT_BITS).clip(0, 255).astype(np.uint8)


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
    """Refuse what is not a batch of square uint8 images, of the input's size or to enlarge."""
    size = preprocess.size
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or not len(images)
        or images.shape[1] != images.shape[2]
        or not (1 if preprocess.enlarges else size) <= images.shape[1] <= size
        or images.shape[3] != 3
    ):
        sides = f"s up to {size}" if preprocess.enlarges else f"s of {size}"
        raise ShapeMismatchError(
            f"images: expected uint8 (N >= 1, s, s, 3) with {sides}, found {images.dtype} "
            f"{images.shape}; make them with Preprocess.batch or Preprocess.compact"
        )
