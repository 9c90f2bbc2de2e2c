"""From the bytes of an image file to upright RGB pixels, the way a person expects to see them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..errors import DatasetError, one_line
from ..preprocess import REDUCING_GAP, Preprocess

if TYPE_CHECKING:
    from PIL import Image


# What may be decoded. Pillow knows some forty formats; these are the ones that data sets
# come in, and their decoders are the ones that are tested and fuzzed the most.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "HEIF")
_ALWAYS = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif")
) | {".tiff", ".webp"}
_HEIF = frozenset((".heic", ".heif"))
# What an installation needs that does not read these.
NEEDED = {".avif": "Pillow 11.3", **dict.fromkeys(_HEIF, "pip install pillow-heif")}
HEAD_BYTES = 32  # enough to recognise an image by
# Formats that begin with two letters, as a text may: what stands behind these tells.
_WEAK = {"BMP": re.compile(rb"BM.{4}\0{4}", re.S), "PPM": re.compile(rb"P[1-6]\s")}

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
_SIZE, _RANGE = "featcache.size", "featcache.range"


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return how the names of images end, lower case, that the decoders here can read."""
    from PIL import features

    # Pillow before 11.3 does not know of AVIF, and says so by a warning or an error.
    has_avif = find_spec("PIL._avif") is not None and features.check("avif")
    has_heif = find_spec("pillow_heif") is not None
    return _ALWAYS | ({".avif"} if has_avif else set()) | (_HEIF if has_heif else set())


def is_image(head: bytes) -> bool:
    """Tell by its first `HEAD_BYTES` whether a file is an image of a format that is read here."""
    return any(_WEAK[name].match(head) if name in _WEAK else True for name, _ in _openers(head))


def decode_image(data: bytes, where: str, preprocess: Preprocess | None = None) -> Image.Image:
    """Decode an image file the way a person expects to see it.

    Turned upright by its EXIF orientation; transparency laid on white; gray of any depth,
    palette and CMYK turned to RGB, other colour profiles to sRGB; the first frame of several.
    A large JPEG comes as the square that ``preprocess`` makes of it, if its geometry lets the
    decoder scale; `original_size` tells what it was.
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
        raise _not_decoded(where, data, error) from None
    if not fits:
        raise DatasetError(
            f"{where}: expected at most {MAX_PIXELS // 10**6} million pixels, found "
            f"{size[0]} x {size[1]}; scale the image down or leave it out"
        )
    try:
        rgb = _to_rgb(image, data)
    except Exception as error:  # of a mode or profile that Pillow does not convert
        raise _not_decoded(where, data, error) from None
    dim = rgb.info.get(_RANGE)
    if preprocess and factor > 1:
        rgb = _centre_square(rgb, size, reverses, factor, preprocess)
    if turn:
        rgb = rgb.transpose(Image.Transpose[turn])
    # What the file said of itself has been heeded.
    rgb.info = {_SIZE: size[::-1] if turn in _SIDEWAYS else size, _RANGE: dim}
    return rgb


def _not_decoded(where: str, data: bytes, error: Exception) -> DatasetError:
    why = f"{type(error).__name__}: {error}".rstrip(": ")
    advice = "replace or remove the file"
    if data[128:132] == b"DICM":
        why, advice = "DICOM", "convert it to a 16-bit PNG, with its window, by pydicom"
    elif data[:4] in (b"II*\0", b"MM\0*"):
        advice = "a TIFF of 1, 3 or 4 channels is read: choose three of others, as RGB"
    return DatasetError(
        f"{where}: expected an image ({', '.join(FORMATS)}), found {len(data)} bytes that do "
        f"not decode ({one_line(why)}); {advice}"
    )


def original_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an upright image before `decode_image` scaled it down."""
    size: tuple[int, int] = image.info.get(_SIZE, image.size)
    return size


def used_range(image: Image.Image) -> float | None:
    """Return the share of its range that the brightest pixel reaches, where that is small."""
    share: float | None = image.info.get(_RANGE)
    return share


def _open(data: bytes) -> Image.Image:
    """Read the header, as ``Image.open`` does, without its check of the size."""
    from PIL import UnidentifiedImageError

    for _, opener in _openers(data[:HEAD_BYTES]):
        return opener(io.BytesIO(data), "")
    raise UnidentifiedImageError


def _openers(head: bytes) -> Iterator[tuple[str, Callable[[IO[bytes], str], Image.Image]]]:
    """Yield the formats, of those that are read, that a file may have which begins like this."""
    from PIL import Image

    Image.init()  # fills OPEN once
    _add_heif()
    for name in FORMATS:
        opener, accepts = Image.OPEN.get(name, (None, None))
        # A string, which is true, is how a plugin says that its library is missing.
        if opener and accepts and accepts(head[:16]) is True:
            yield name, opener


@lru_cache(maxsize=1)
def _add_heif() -> None:
    """Tell Pillow of HEIF, where its package is installed."""
    if find_spec("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()


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


def _to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_gray(image, data)
    image = _in_srgb(image)
    if _has_transparency(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


# What gray values of more than 8 bits may run up to, where the file does not say.
_WHITES = (1.0, 255.0, 65535.0)
_OUTLIERS = 0.001  # share of an image's pixels that may lie above its white: hot pixels, overshoot
_DIM = 1 / 8  # share of the range below which an image's brightest pixel is told of
_BITS_PER_SAMPLE = 258  # a TIFF's tag


def _deep_gray(image: Image.Image, data: bytes) -> Image.Image:
    """Return gray of 16 or 32 bits or floating point; Pillow clips it at 255.

    White is what the file declares, or the container's most for 16 bits. Of 32 bits and floating
    point, it is the first of 1 (floats), 255 and 65535 that all but a few pixels keep to, else the
    brightest. Pixels that are not finite are black.
    """
    from PIL import Image

    gray = np.nan_to_num(np.asarray(image, np.float64), nan=0, posinf=0, neginf=0)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        white = float(2 ** _declared_bits(image, data) - 1)
    else:
        most = float(np.quantile(gray, 1 - _OUTLIERS, method="lower")) if gray.size else 0.0
        known = _WHITES if image.mode == "F" else _WHITES[1:]
        white = next((one for one in known if most <= one), float(gray.max(initial=1)))
    shades = (np.clip(gray, 0, white) * (255 / white)).round().astype(np.uint8)
    see_through = image.info.get("transparency")
    if isinstance(see_through, int):
        shades[gray == see_through] = 255
    rgb = Image.fromarray(shades).convert("RGB")
    share = float(gray.max(initial=0)) / white
    if share < _DIM:
        rgb.info[_RANGE] = share
    return rgb


def _declared_bits(image: Image.Image, data: bytes) -> int:
    """Return how many bits of 16 a file says that it uses."""
    found = 16
    if image.format == "PNG":
        # Chunks of length, name, content and checksum follow the signature; sBIT precedes IDAT.
        at = 8
        while at + 9 <= len(data) and data[at + 4 : at + 8] != b"IDAT":
            if data[at + 4 : at + 8] == b"sBIT":
                found = data[at + 8]
                break
            at += 12 + int.from_bytes(data[at : at + 4], "big")
    elif image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))  # type: ignore[attr-defined]
        found = bits[0] if isinstance(bits, tuple) and bits else bits
    return found if isinstance(found, int) and 8 <= found <= 16 else 16


def _in_srgb(image: Image.Image) -> Image.Image:
    """Return an image in sRGB where its file has another colour profile that can be read."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or image.mode not in ("RGB", "RGBA", "L", "CMYK"):
        return image
    transform = _to_srgb(profile, image.mode)
    if transform is None:
        return image
    from PIL import ImageCms

    converted: Image.Image = ImageCms.applyTransform(image, transform)  # type: ignore[assignment]
    if "transparency" in image.info and image.mode == "RGB":
        # Which colour is transparent was said of the colours in the file.
        mask = image.convert("RGBA").getchannel("A")
        converted.putalpha(mask)
    return converted


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """Return what converts images of a profile to sRGB; None where that changes nothing."""
    from PIL import Image, ImageCms

    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGBA" if mode == "RGBA" else "RGB",
            # Without its cache of the last pixel, several threads may use a transform.
            flags=ImageCms.Flags.NOCACHE,
        )
        sample = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
        bands = {"L": sample[..., 0], "RGB": sample[..., :3]}.get(mode, sample)
        before = Image.frombytes(mode, (32, 32), bands.tobytes())
        after = np.asarray(ImageCms.applyTransform(before, transform))
        plain = np.asarray(before.convert("RGBA" if mode == "RGBA" else "RGB"))
    except Exception:  # a profile that cannot be read says nothing: viewers show the image as it is
        return None
    return None if np.abs(after.astype(int) - plain).max() <= 2 else transform


def _has_transparency(image: Image.Image) -> bool:
    """Say what ``image.has_transparency_data`` does, which Pillow 10.0 does not have."""
    return (
        image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
        or "transparency" in image.info
        or (image.palette is not None and image.palette.mode.endswith("A"))
    )
