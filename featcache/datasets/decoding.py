"""From the bytes of an image file to upright RGB pixels, the way a person expects to see them."""

from __future__ import annotations

import io
import logging
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..errors import DatasetError, one_line, shown_place
from ..options import MAX_PIXELS
from ..preprocess import REDUCING_GAP, Preprocess

if TYPE_CHECKING:
    from PIL import Image


# What may be decoded. Pillow knows some forty formats; these are the ones that data sets
# come in, and their decoders are the ones that are tested and fuzzed the most.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "HEIF")
# fmt: off
_ALWAYS = frozenset((
    ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".pjpeg", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
))
# fmt: on
_HEIF = frozenset((".heic", ".heif"))
# fmt: off
# Images of formats that are not read: a note says so. Some cameras' begin as a TIFF does.
OTHER_IMAGES = frozenset((
    ".3fr", ".apng", ".arw", ".cr2", ".dcr", ".dds", ".dng", ".eps", ".erf", ".exr", ".hdr",
    ".ico", ".iiq", ".j2k", ".jp2", ".jpx", ".jxl", ".kdc", ".nef", ".nrw", ".orf", ".pcx",
    ".pef", ".psd", ".raw", ".rw2", ".sr2", ".srw", ".svg", ".tga", ".avif", ".heic", ".heif",
))
# fmt: on
# What an installation needs that does not read these.
NEEDED = {".avif": "Pillow 11.3", **dict.fromkeys(_HEIF, "pip install pillow-heif")}
HEAD_BYTES = 32  # enough to recognise an image by
# Formats that begin with two letters, as a text may: what stands behind these tells.
_WEAK = {"BMP": re.compile(rb"BM.{4}\0{4}", re.S), "PPM": re.compile(rb"P[1-6]\s")}

# No image of any use is a larger file; what is, by mistake or by malice, must not fill the memory.
MAX_FILE_BYTES = 4 * MAX_PIXELS
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
# Times its scans: a progressive JPEG draws all pixels with each, and cameras write some ten.
_MAX_SCANNED = 40 * MAX_PIXELS
_BLOCK_PIXELS = 1 << 22  # that are converted at a time where that needs many bytes for each
_SIZE, _RANGE = "featcache.size", "featcache.range"


def file_error(where: str, problem: str) -> DatasetError:
    """Return the error of a file of a data set."""
    return DatasetError(f"{shown_place(where)}: {problem}")


def not_read(where: str, why: object) -> DatasetError:
    """Return the error of a file that cannot be read."""
    return file_error(where, f"cannot be read: {why}")


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


def decode_image(
    data: bytes, where: str, preprocess: Preprocess | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image file the way a person expects to see it.

    Turned upright by its EXIF orientation; transparency laid on white; gray of any depth,
    palette and CMYK turned to RGB, other colour profiles to sRGB; the first frame of several.
    A large JPEG comes as the square that ``preprocess`` makes of it, if its geometry lets the
    decoder scale; `original_size` tells what it was.
    """
    from PIL import Image

    drafts = preprocess is not None and preprocess.geometry == "square"
    plain = _plain_jpeg(data, _drafted_from(preprocess.size) if preprocess and drafts else math.inf)
    if plain is not None and plain.width * plain.height <= max_pixels:
        return plain
    where = shown_place(where)
    try:
        image = _open(data)
        size = image.size
        factor = _draft(image, preprocess.size, max_pixels) if preprocess and drafts else 1
        fits = image.width * image.height <= max_pixels
        if fits:
            image.load()
            turn, *reverses = _TURNS.get(_orientation(image), _UPRIGHT)
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise _not_decoded(where, data, error) from None
    if not fits:
        raise DatasetError(
            f"{where}: expected at most {max_pixels:,} pixels, found "
            f"{size[0]} x {size[1]}; scale the image down, leave it out, or allow more with "
            "--max-pixels"
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


# Of a JPEG's segments, those that a plain one has: JFIF, tables, restart intervals, the frame.
_SEGMENT, _FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
_JFIF, _QUANTIZATION, _BASELINE, _SCAN = 0xE0, 0xDB, 0xC0, 0xDA
_PASSED_OVER = (0xC4, 0xDD)
_QUANTIZATION_BYTES = 65
# Beyond these the header hardly counts, and Pillow's reader decodes block by block.
_MAX_PLAIN_BYTES, _MAX_PLAIN_PIXELS = 1 << 16, 1 << 16


def _plain_jpeg(data: bytes, drafted_from: float) -> Image.Image | None:
    """Decode a small baseline JPEG that holds pixels alone; None for any other, or a damaged one.

    Pillow's decoder does it, without Pillow's reader: of such an image, the reader takes as long
    for the header as the decoder for the pixels.
    """
    if len(data) > _MAX_PLAIN_BYTES or data[:3] != b"\xff\xd8\xff":
        return None
    from PIL import Image

    at, width, height, bands = 2, 0, 0, 0
    try:
        while True:
            mark, kind, length = _SEGMENT.unpack_from(data, at)
            if mark != 0xFF or length < 2:
                return None
            if kind == _BASELINE and not bands:
                depth, height, width, bands = _FRAME.unpack_from(data, at + 4)
                if depth != 8 or length != 8 + 3 * bands:
                    return None
            elif kind == _SCAN:
                break
            elif kind == _QUANTIZATION:
                if (length - 2) % _QUANTIZATION_BYTES:
                    return None
            elif kind == _JFIF:
                if data[at + 4 : at + 9] != b"JFIF\0":
                    return None
            elif kind not in _PASSED_OVER:
                return None
            at += 2 + length
        if bands not in (1, 3) or not 0 < width * height <= _MAX_PLAIN_PIXELS:
            return None
        if min(width, height) >= drafted_from:
            return None
        mode = "RGB" if bands == 3 else "L"
        image = Image.frombytes(mode, (width, height), data, "jpeg", mode, "")
    except Exception:  # what is wrong with it, Pillow's reader says
        return None
    return image if bands == 3 else image.convert("RGB")


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

    for name, opener in _openers(data[:HEAD_BYTES]):
        if name == "PPM":
            data = _raw_pnm(data)
        image = opener(io.BytesIO(data), "")
        scans = data.count(b"\xff\xda") if name == "JPEG" else 1
        if scans * min(math.prod(image.size), MAX_SCALED_PIXELS) > _MAX_SCANNED:
            raise ValueError(f"{image.width} x {image.height} pixels in {scans} scans")
        return image
    raise UnidentifiedImageError


def _openers(head: bytes) -> Iterator[tuple[str, Callable[[IO[bytes], str], Image.Image]]]:
    """Yield the formats, of those that are read, that a file may have which begins like this."""
    from PIL import Image

    _prepare()
    for name in FORMATS:
        opener, accepts = Image.OPEN.get(name, (None, None))
        # A string, which is true, is how a plugin says that its library is missing.
        if opener and accepts and accepts(head[:16]) is True:
            yield name, opener


@lru_cache(maxsize=1)
def _prepare() -> None:
    """Load Pillow's formats, and HEIF where its package is installed."""
    # `Image.init` would import all fifty. An MPO of Pillow is a JPEG that goes on.
    for name in ("Avif", "Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tiff", "WebP"):
        with suppress(ImportError):  # Pillow before 11.3 has no AVIF
            import_module(f"PIL.{name}ImagePlugin")
    # What it says of odd tags would appear on the terminal, again for each image.
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if find_spec("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF that cannot be read says nothing: viewers show the image as it is
        return 1


def _drafted_from(side: int) -> int:
    """Return from how many pixels on, along its shorter side, a JPEG is scaled down."""
    return 2 * math.ceil(REDUCING_GAP * side)


def _draft(image: Image.Image, side: int, max_pixels: int) -> float:
    """Let the decoder scale a large JPEG down; return by how much."""
    least = math.ceil(REDUCING_GAP * side)
    most = max(MAX_SCALED_PIXELS, max_pixels)
    if min(image.size) < _drafted_from(side) or image.width * image.height > most:
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
    see_through = image.info.get("transparency")
    if isinstance(see_through, tuple) and image.format == "PNG" and data[24] == 16:
        # Pillow halves the depth of the pixels, and not of the colour that is transparent.
        image.info["transparency"] = tuple(level >> 8 for level in see_through)
    image = _in_srgb(image)
    if not _has_transparency(image):
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for top, bottom in _blocks(image.height, image.width):
        rgba = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, top))
    return rgb


def _blocks(n_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the rows, from and to, of each block of an image."""
    step = max(1, _BLOCK_PIXELS // max(1, width))
    return ((row, min(n_rows, row + step)) for row in range(0, n_rows, step))


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

    gray = np.asarray(image)
    if image.mode == "F":
        gray = np.where(np.isfinite(gray), gray, np.float32(0))
    brightest = float(gray.max(initial=0))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        white = float(2 ** _declared_bits(image, data) - 1)
    else:
        place = int((1 - _OUTLIERS) * (gray.size - 1))
        known = _WHITES if image.mode == "F" else _WHITES[1:]
        above = gray.size - 1 - place  # pixels that may be
        fits = (one for one in known if np.count_nonzero(gray > one) <= above)
        white = next(fits, max(brightest, 1))
    shades = np.empty(gray.shape, np.uint8)
    see_through = image.info.get("transparency")
    table = _shades(np.arange(1 << 16), white)
    for top, bottom in _blocks(*gray.shape):
        part = gray[top:bottom]
        shades[top:bottom] = table[part] if gray.dtype.itemsize == 2 else _shades(part, white)
        if isinstance(see_through, int):
            shades[top:bottom][part == see_through] = 255
    rgb = Image.fromarray(shades).convert("RGB")
    share = brightest / white
    if share < _DIM:
        rgb.info[_RANGE] = share
    return rgb


def _shades(levels: np.ndarray, white: float) -> np.ndarray:
    return (np.clip(levels.astype(np.float64), 0, white) * (255 / white)).round().astype(np.uint8)


_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_SIZE = (_GAP + rb"(\d{1,9})") * 2
_PNM_HEADER = re.compile(
    rb"P(?:[14]" + _PNM_SIZE + rb"|[2356]" + _PNM_SIZE + _GAP + rb"(\d{1,9}))\s"
)
_MAX_PNM_HEADER = 1 << 16
_MAX_PNM_TEXT, _MAX_COMMENTS = 1 << 26, 100_000


def _raw_pnm(data: bytes) -> bytes:
    """Return a PBM, PGM or PPM file as Pillow reads it by itself: binary, up to 255 or 65535.

    Of any other, and of the header, Pillow takes a microsecond for each byte or sample.
    """
    header = _PNM_HEADER.match(data[:_MAX_PNM_HEADER])
    if header is None:
        raise ValueError(f"no header in the first {_MAX_PNM_HEADER} bytes")
    kind, body = int(data[1:2]), data[header.end() :]
    width, height, maxval = (
        int(one or 1) for one in (header[1] or header[3], header[2] or header[4], header[5])
    )
    if not 0 < maxval < 65536:
        raise ValueError(f"samples up to {maxval}")
    count = width * height * (3 if kind in (3, 6) else 1)
    if kind != 4 and count > len(body):
        raise ValueError(f"{len(body)} bytes for {count} samples")
    most = 65535 if maxval > 255 and kind in (2, 5) else 255
    form = f"P{6 if kind in (3, 6) else 5} {width} {height} {most}\n".encode()
    if kind == 4:
        return f"P4 {width} {height}\n".encode() + body
    if kind in (5, 6) and maxval == most:
        return form + body
    if kind in (5, 6):
        samples = np.frombuffer(body, "u1" if maxval < 256 else ">u2", count)
    else:
        samples = _samples_of_text(body, count, apart=kind != 1)
    levels = np.minimum(np.arange(65536) / maxval, 1) * most
    table = (most - levels if kind == 1 else levels.round()).astype("u1" if most == 255 else ">u2")
    scaled = np.empty(count, table.dtype)
    for start, end in _blocks(count, 1):
        scaled[start:end] = table[samples[start:end]]
    return form + scaled.tobytes()


def _samples_of_text(body: bytes, count: int, *, apart: bool) -> np.ndarray:
    """Return ``count`` numbers, or digits of 0 and 1, which need not stand apart."""
    if len(body) > _MAX_PNM_TEXT:
        raise ValueError("a plain PNM of so many bytes: convert it to a binary one")
    if body.count(b"#") > _MAX_COMMENTS:
        raise ValueError(f"more than {_MAX_COMMENTS} comments")
    body = re.sub(rb"#[^\r\n]*", b"", body)
    digits = b"0123456789" if apart else b"01"
    if body.translate(None, digits + b" \t\n\v\f\r") or (apart and re.search(rb"\d{10}", body)):
        raise ValueError("a sample that is no number")
    if apart:
        return np.fromstring(body, np.int32, count, sep=" ")
    return np.frombuffer(b"".join(body.split()), np.uint8, count) - ord("0")


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
