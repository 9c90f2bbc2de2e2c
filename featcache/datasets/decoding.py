"""From the bytes of an image file to upright RGB pixels, the way a person expects to see them."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetError
from ..preprocess import REDUCING_GAP, Preprocess

if TYPE_CHECKING:
    from PIL import Image


# What may be decoded. Pillow knows some forty formats; these are the ones that data sets
# come in, and their decoders are the ones that are tested and fuzzed the most.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

# A quarter of a gigabyte as RGB. It is where Pillow starts to warn, so that below it there
# is no warning to silence: filters for warnings are the whole process's, and no thread's.
MAX_PIXELS = 89_478_485
# A JPEG that is scaled down while it is decoded may have more, since it never exists at full
# size; a progressive one keeps up to 6 bytes per pixel meanwhile. Phones make 200 million.
MAX_SCALED_PIXELS = 3 * MAX_PIXELS

# How the camera was held, by EXIF's number: what turns the image upright, and whether that
# reverses what was stored from left to right, and from top to bottom.
_ORIENTATION = 0x0112
_TURNS: dict[int, tuple[str, bool, bool]] = {
    2: ("FLIP_LEFT_RIGHT", True, False),
    3: ("ROTATE_180", True, True),
    4: ("FLIP_TOP_BOTTOM", False, True),
    5: ("TRANSPOSE", False, False),
    6: ("ROTATE_270", False, True),
    7: ("TRANSVERSE", True, True),
    8: ("ROTATE_90", True, False),
}
_UPRIGHT = ("", False, False)
_SIDEWAYS = ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_SIZE = "featcache.size"


def decode_image(data: bytes, where: str, preprocess: Preprocess | None = None) -> Image.Image:
    """Decode an image file the way a person expects to see it.

    Turned upright by its EXIF orientation; transparency laid on white; gray, 16-bit gray,
    palette and CMYK turned to RGB; the first frame of several. A large JPEG comes as the square
    that ``preprocess`` makes of it, if its geometry lets the decoder scale; `original_size`
    tells what it was.
    """
    from PIL import Image

    try:
        image = _open(data)
        size = image.size
        drafts = preprocess is not None and preprocess.geometry == "square"
        factor = _draft(image, preprocess.size) if preprocess and drafts else 1
        fits = image.width * image.height <= MAX_PIXELS
        if fits:
            image.load()
            turn, *reverses = _TURNS.get(_orientation(image), _UPRIGHT)
    except Exception as error:  # decoders raise whatever they like on damaged files
        why = f"{type(error).__name__}: {error}".rstrip(": ")
        raise DatasetError(
            f"{where}: expected an image ({', '.join(FORMATS)}), found {len(data)} bytes that do "
            f"not decode ({why}); replace or remove the file"
        ) from None
    if not fits:
        raise DatasetError(
            f"{where}: expected at most {MAX_PIXELS // 10**6} million pixels, found "
            f"{size[0]} x {size[1]}; scale the image down or leave it out"
        )
    rgb = _to_rgb(image)
    if preprocess and factor > 1:
        rgb = _centre_square(rgb, size, reverses, factor, preprocess)
    if turn:
        rgb = rgb.transpose(Image.Transpose[turn])
    # What the file said of itself has been heeded.
    rgb.info = {_SIZE: size[::-1] if turn in _SIDEWAYS else size}
    return rgb


def original_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an upright image before `decode_image` scaled it down."""
    size: tuple[int, int] = image.info.get(_SIZE, image.size)
    return size


def _open(data: bytes) -> Image.Image:
    """Read the header, as ``Image.open`` does, without its check of the size."""
    from PIL import Image, UnidentifiedImageError

    Image.init()  # fills OPEN once
    for name in FORMATS:
        opener, accepts = Image.OPEN.get(name, (None, None))
        # A string, which is true, is how a plugin says that its library is missing.
        if opener and accepts and accepts(data[:16]) is True:
            return opener(io.BytesIO(data), "")
    raise UnidentifiedImageError


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF that cannot be read says nothing: viewers show the image as it is
        return 1


def _draft(image: Image.Image, side: int) -> float:
    """Let the decoder scale a large JPEG down; return by how much."""
    least = math.ceil(REDUCING_GAP * side)
    if min(image.size) < 2 * least or image.width * image.height > MAX_SCALED_PIXELS:
        return 1
    width = image.width
    drafted = image.draft(None, (least, least))  # None: a format that cannot do it
    return width / drafted[1][2] if drafted else 1


def _centre_square(
    image: Image.Image,
    size: tuple[int, int],
    reverses: list[bool],
    factor: float,
    preprocess: Preprocess,
) -> Image.Image:
    """Return the canonical square of an image that was ``size`` before it was scaled down.

    The square hardly ever begins and ends between two of the pixels that are left. Cut there
    all the same, it would be off by up to half a pixel of the result: ten times the difference
    that the decoder makes.
    """
    length = min(size)
    # Of an odd margin, the smaller half is at the left and the top of the upright image.
    left, top = (
        (whole - length + reverse) // 2 / factor
        for whole, reverse in zip(size, reverses, strict=True)
    )
    right, bottom = left + length / factor, top + length / factor
    x, y = math.floor(left), math.floor(top)
    # Pixels outside the square must not shine through its edges, and so are cut off first.
    image = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    box = (left - x, top - y, right - x, bottom - y)
    return image.resize((preprocess.size,) * 2, preprocess.resampling, box=box)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow clips 16-bit gray at 255, which turns every photo white.
        gray = np.asarray(image, dtype=np.float64)
        if image.mode == "F":
            gray = np.clip(gray, 0, 1) * 65535 if gray.max(initial=0) <= 1 else gray
        brightest = max(65535.0, float(gray.max(initial=0)))  # a 32-bit image may go beyond
        shades = (np.clip(gray, 0, brightest) * (255 / brightest)).round().astype(np.uint8)
        return Image.fromarray(shades).convert("RGB")
    if _has_transparency(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _has_transparency(image: Image.Image) -> bool:
    """Say what ``image.has_transparency_data`` does, which Pillow 10.0 does not have."""
    return (
        image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
        or "transparency" in image.info
        or (image.palette is not None and image.palette.mode.endswith("A"))
    )
