"""Altered images of every format that Pillow writes here, for the fuzz of the decoder."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image, features

from featcache.datasets.decoding import decode_image
from featcache.preprocess import Preprocess

_NUMBERS = (0, 1, 2, 3, 7, 8, 9, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@cache
def _originals() -> dict[str, bytes]:
    """Return valid images; the suffix of each key is its format."""
    gray = Image.linear_gradient("L").resize((24, 16))
    rgb = Image.merge("RGB", (gray, gray.transpose(Image.Transpose.ROTATE_180), gray))
    rgba = rgb.copy()
    rgba.putalpha(gray)
    deep = gray.convert("I;16")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    made = {
        "rgb.png": _encoded(rgb, "PNG", exif=exif, dpi=(72, 72)),
        "palette.png": _encoded(rgb.quantize(16), "PNG", transparency=3),
        "deep.png": _encoded(deep, "PNG"),
        "alpha.png": _encoded(rgba, "PNG"),
        "plain.jpg": _encoded(rgb, "JPEG", exif=exif),
        "progressive.jpg": _encoded(rgb, "JPEG", progressive=True),
        "cmyk.jpg": _encoded(rgb.convert("CMYK"), "JPEG"),
        "rgb.tif": _encoded(rgb, "TIFF"),
        "float.tif": _encoded(gray.convert("F"), "TIFF"),
        "int.tif": _encoded(gray.convert("I"), "TIFF"),
        "animated.gif": _encoded(rgb, "GIF", save_all=True, append_images=[gray.convert("RGB")]),
        "rgb.bmp": _encoded(rgb, "BMP"),
        "one.bmp": _encoded(gray.convert("1"), "BMP"),
        "rgb.ppm": _encoded(rgb, "PPM"),
        "text.ppm": b"P3\n# by hand\n4 4\n100\n" + b"1 50 100 " * 16,
        "gray.pgm": b"P5 4 4 4095\n" + bytes(range(32)),
        "one.pbm": b"P1\n8 2\n0101010110101010\n",
    }
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"):
        image = gray.convert("1") if packing == "group4" else rgb
        if features.check("libtiff"):
            made[f"{packing}.tif"] = _encoded(image, "TIFF", compression=packing)
    if features.check("webp"):
        made |= {
            "lossy.webp": _encoded(rgba, "WEBP"),
            "lossless.webp": _encoded(rgb, "WEBP", lossless=True, exif=exif),
        }
    if features.check("avif"):
        made["rgb.avif"] = _encoded(rgb, "AVIF", speed=10)
    return made


def _chunk(name: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _altered_png(rng: random.Random, data: bytes) -> bytes:
    """Alter chunks and give them right checksums."""
    chunks = _png_chunks(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(chunks))
        name, content = chunks[at]
        action = rng.randrange(6)
        if action == 0:
            chunks.insert(at, chunks[rng.randrange(len(chunks))])
        elif action == 1 and len(chunks) > 1:
            del chunks[at]
        elif action == 2:
            names = (b"tRNS", b"sBIT", b"PLTE", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"gAMA")
            chunks.insert(at, (rng.choice(names), rng.randbytes(rng.choice((0, 1, 6, 99)))))
        elif action == 3:
            packed = zlib.compress(bytes(rng.choice((0, 999, 10**6))))
            chunks.insert(at, (rng.choice((b"zTXt", b"iCCP", b"iTXt")), b"x\0\0" + packed))
        elif name == b"IDAT" and action == 4:
            with suppress(zlib.error):
                content = _flipped(rng, zlib.decompress(content))
            chunks[at] = name, zlib.compress(content)
        else:
            chunks[at] = name, _flipped(rng, content)
    return _png(*chunks)


def _altered_tiff(rng: random.Random, data: bytes) -> bytes:
    """Alter the type, count or value of tags."""
    made = bytearray(data)
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    for _ in range(rng.randint(1, 3)):
        start = at + 2 + 12 * rng.randrange(count)
        tag, kind, number, value = struct.unpack_from(f"{order}HHII", made, start)
        field = rng.randrange(4)
        if field == 0:
            tag = rng.choice((254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 284, 317, 322, 339))
        elif field == 1:
            kind = rng.randrange(18)
        elif field == 2:
            number = rng.choice(_NUMBERS)
        else:
            value = rng.choice((*_NUMBERS, value ^ 1 << rng.randrange(32)))
        struct.pack_into(f"{order}HHII", made, start, tag, kind, number, value)
    return bytes(made)


def _altered_text(rng: random.Random, data: bytes) -> bytes:
    """Alter the numbers of a PNM's header."""
    words = data[:30].split(b" ")
    at = rng.randrange(len(words))
    words[at] = rng.choice((b"0", b"-1", b"65536", b"9" * 20, b"# x", b"", b"100000", b"1.5"))
    return b" ".join(words) + data[30:]


def _flipped(rng: random.Random, data: bytes) -> bytes:
    """Alter bytes anywhere: one, a number of four, a part twice, or cut."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        action = rng.randrange(5)
        if action == 0:
            made[at : at + 1] = rng.randbytes(1)
        elif action == 1:
            made[at : at + 4] = rng.choice(_NUMBERS).to_bytes(4, rng.choice(("little", "big")))
        elif action == 2:
            made[at:at] = made[at : at + rng.randrange(64)] * rng.choice((1, 1, 100))
        elif action == 3:
            del made[at : at + rng.randrange(16)]
        elif rng.random() < 0.3:
            del made[at:]
    return bytes(made)


def _wide(depth: int, colour: int, bits: int) -> bytes:
    """Return a small PNG of 36 million black pixels."""
    side = 6000
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    body = zlib.compress(bytes((side * bits // 8 + 1) * side), 9)
    return _png((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))


def _scans() -> bytes:
    whole = _encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * 1000 + b"\xff\xd9"


def _as_file(name: str, make: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(make())
        return path

    return write


def _link(target: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "linked.png"
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        return path

    return write


_HEADER = struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0)
_PIXELS = (b"IDAT", zlib.compress(bytes(7)))
SEEDS: dict[str, Callable[[Path], Path]] = {
    "a comment of 10 MB": _as_file("x.ppm", lambda: b"P6\n#" + b"x" * 10**7 + b"\n1 1\n255\n123"),
    "space of 10 MB": _as_file("x.ppm", lambda: b"P6\n" + b" " * 10**7 + b"1 1\n255\n123"),
    "a million comments": _as_file("x.ppm", lambda: b"P3 1 1 255\n" + b"#\n" * 10**6 + b"1 1 1"),
    "a PPM to 254": _as_file("x.ppm", lambda: b"P6 2000 2000 254\n" + bytes(12 * 10**6)),
    "16-bit gray": _as_file("x.png", lambda: _wide(16, 0, 16)),
    "16-bit RGB": _as_file("x.png", lambda: _wide(16, 2, 48)),
    "transparency": _as_file("x.png", lambda: _wide(8, 6, 32)),
    "a thousand scans": _as_file("x.jpg", _scans),
    "a text of 100 MB": _as_file(
        "x.png",
        lambda: _png(
            (b"IHDR", _HEADER),
            (b"zTXt", b"x\0\0" + zlib.compress(bytes(10**8))),
            _PIXELS,
            (b"IEND", b""),
        ),
    ),
    "a profile of 100 MB": _as_file(
        "x.png",
        lambda: _png(
            (b"IHDR", _HEADER),
            (b"iCCP", b"x\0\0" + zlib.compress(bytes(10**8))),
            _PIXELS,
            (b"IEND", b""),
        ),
    ),
    "60,000 x 60,000": _as_file("x.ppm", lambda: b"P6 60000 60000 255\n123"),
    "DICOM": _as_file("x.png", lambda: bytes(128) + b"DICM" + bytes(99)),
    "nothing": _as_file("x.png", bytes),
    "/dev/zero": _link("/dev/zero"),
    "/dev/tty": _link("/dev/tty"),
    "/proc/kmsg": _link("/proc/kmsg"),
    "/proc/self/mem": _link("/proc/self/mem"),
}


def altered_image(rng: random.Random) -> tuple[str, bytes]:
    """Return an altered image and a name for it."""
    name, data = rng.choice(list(_originals().items()))
    kind = name.rpartition(".")[2]
    if rng.random() < 0.7:
        if kind == "png":
            return name, _altered_png(rng, data)
        if kind == "tif":
            return name, _altered_tiff(rng, data)
        if kind in ("ppm", "pgm", "pbm"):
            return name, _altered_text(rng, data)
    return name, _flipped(rng, data)


def alter(rng: random.Random, folder: Path) -> Path:
    """Write one altered image."""
    name, data = altered_image(rng)
    path = folder / name
    path.write_bytes(data)
    return path


def read(path: Path) -> None:
    """Read it as extraction does, whole and scaled."""
    from featcache.datasets.images import Folder

    data = Folder(path.parent).read(path.name)
    Preprocess(32).pixels(decode_image(data, str(path), Preprocess(32)))
