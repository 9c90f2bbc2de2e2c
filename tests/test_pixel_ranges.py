"""Gray of many depths, transparency, and colour profiles: what a person sees is what is cached."""

from __future__ import annotations

import io
import struct
import time
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms

from featcache.datasets import decoding
from featcache.datasets.decoding import decode_image, used_range
from featcache.errors import DatasetError

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def encoded(array, kind, **options):
    stream = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_chunk(png, name, content):
    """Return a PNG with one more chunk, right behind its header."""
    crc = zlib.crc32(name + content)
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)
    return png[:33] + chunk + png[33:]


def spoilt(ramp, value):
    """Return a float image with one pixel of its own."""
    ramp = ramp.astype(np.float32)
    ramp[3, 4] = value
    return ramp


TWELVE = encoded((RAMP * 4095).astype(np.uint16), "PNG")
CASES = {
    "float to 1": encoded(RAMP.astype(np.float32), "TIFF"),
    "float to 255": encoded((RAMP * 255).astype(np.float32), "TIFF"),
    "float to 65535": encoded((RAMP * 65535).astype(np.float32), "TIFF"),
    "float with NaN": encoded(spoilt(RAMP, np.nan), "TIFF"),
    "float with infinity": encoded(spoilt(RAMP, np.inf), "TIFF"),
    "float with a hot pixel": encoded(spoilt(RAMP, 1.5), "TIFF"),
    "int32 to 255": encoded((RAMP * 255).astype(np.int32), "TIFF"),
    "int32 to 65535": encoded((RAMP * 65535).astype(np.int32), "TIFF"),
    "16 bit": encoded((RAMP * 65535).astype(np.uint16), "PNG"),
    "16 bit TIFF": encoded((RAMP * 65535).astype(np.uint16), "TIFF"),
    "12 of 16 bits": with_chunk(TWELVE, b"sBIT", b"\x0c"),
}


@pytest.mark.parametrize("data", CASES.values(), ids=CASES)
def test_a_ramp_is_a_ramp_at_every_depth(data):
    image = decode_image(data, "a ramp")
    shades = np.asarray(image)[..., 0].astype(float)
    off = np.abs(shades - 255 * RAMP)
    off[3, 4] = 0  # the pixel that some cases spoil
    assert off.max() <= 1
    assert used_range(image) is None


def test_an_image_that_uses_little_of_its_range_is_told():
    image = decode_image(TWELVE, "12 bits that nothing declares")
    assert used_range(image) == pytest.approx(4095 / 65535)


@pytest.mark.parametrize("damage", [b"sBIT", b"sBIT\xff", b"\xff\xff\xff\xff"])
def test_what_a_png_declares_is_not_trusted(damage):
    decode_image(with_chunk(TWELVE, b"sBIT", b"\xff"), "255 bits")
    with pytest.raises(DatasetError):
        decode_image(TWELVE[:33] + damage, "a stump")


def test_a_transparent_colour_is_laid_on_white():
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    image.putpixel((1, 1), (200, 100, 50))
    data = encoded(image, "PNG", transparency=(10, 20, 30))
    shown = decode_image(data, "a logo")
    assert shown.getpixel((5, 5)) == (255, 255, 255)
    assert shown.getpixel((1, 1)) == (200, 100, 50)
    gray = (RAMP * 65535).astype(np.uint16)
    data = with_chunk(encoded(gray, "PNG"), b"tRNS", struct.pack(">H", 0))
    assert decode_image(data, "16-bit gray").getpixel((0, 0)) == (255, 255, 255)


def swapped_profile():
    """Return a profile that is sRGB with red and green exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    swapped = bytearray(profile)
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(swapped)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_of_another_profile_become_srgb(kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    image = Image.new("RGB", (32, 32), (220, 40, 40))
    shown = decode_image(encoded(image, kind, icc_profile=swapped_profile(), **options), "x")
    red, green, blue = shown.getpixel((9, 9))
    assert green > 200 and red < 60 and blue < 60


def test_srgb_itself_and_a_damaged_profile_change_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for profile in (srgb, b"nonsense", srgb[:200]):
        data = encoded(image, "PNG", icc_profile=profile)
        assert decode_image(data, "x").tobytes() == image.tobytes()


def test_what_is_no_picture_says_what_to_do():
    with pytest.raises(DatasetError, match=r"DICOM.*by pydicom"):
        decode_image(b"\0" * 128 + b"DICM" + b"\0" * 100, "scan.png")
    tiff = bytearray(encoded(np.zeros((8, 8, 3), np.uint8), "TIFF"))
    at = tiff.index(struct.pack("<HHI", 277, 3, 1))  # SamplesPerPixel
    tiff[at + 8] = 7
    with pytest.raises(DatasetError, match="a TIFF of 1, 3 or 4 channels is read"):
        decode_image(bytes(tiff), "stack.tif")


def pnm(kind, body, maxval=255, size=(4, 2), head=b""):
    last = b"" if kind in (1, 4) else b" %d" % maxval
    return b"P%d\n%s%d %d%s\n" % (kind, head, *size, last) + body


@pytest.mark.parametrize("kind", range(1, 7))
@pytest.mark.parametrize("maxval", [1, 100, 255, 1023, 65535])
def test_a_pnm_has_pillows_pixels(kind, maxval):
    size = 4 * 2 * (3 if kind in (3, 6) else 1)
    samples = np.random.default_rng(0).integers(0, maxval + 1, size)
    bits = (samples > maxval // 2).astype(int)
    data = pnm(
        kind,
        {
            1: b"".join(b"%d" % bit for bit in bits),
            2: b" # comment\n".join(b"%d" % one for one in samples) + b"\n",
            3: b" ".join(b"%d" % one for one in samples) + b"\n",
            4: bytes([16 * int(bits[0]), 255]),
        }.get(kind, samples.astype("u1" if maxval < 256 else ">u2").tobytes()),
        maxval,
        head=b"# made by hand\r",
    )
    pillows = Image.open(io.BytesIO(data))
    if pillows.mode == "I":  # 16 bits, which Pillow's own RGB clips at 255
        levels = np.asarray(pillows) * (255 / 65535)
        pillows = Image.fromarray(levels.round().astype(np.uint8))
    assert decode_image(data, "x.pnm").tobytes() == pillows.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        pnm(6, bytes(24), head=b"#" + b"x" * 10**7 + b"\n"),
        pnm(6, bytes(24), head=b" " * 10**7),
        pnm(3, b"#\n" * 10**6 + b"1 " * 24),
        pnm(6, bytes(3 * 10**6), 254, (1000, 1000)),
        pnm(3, b"1 " * 3 * 10**6, 255, (1000, 1000)),
        pnm(2, b"9 " * 10, 255, (60000, 60000)),
        pnm(2, b"1234567890123 " * 8),
        pnm(2, b"99999 " * 8),
        pnm(1, b"2 " * 8),
    ],
)
def test_no_pnm_takes_long(data):
    began = time.process_time()
    with suppress(DatasetError):
        decode_image(data, "x.pnm")
    assert time.process_time() - began < 2


def test_a_jpeg_of_a_thousand_scans_is_refused():
    whole = encoded(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    with pytest.raises(DatasetError, match="3000 x 3000 pixels in 1006 scans"):
        decode_image(whole[:-2] + 1000 * scan + b"\xff\xd9", "x.jpg")


def test_a_large_image_is_converted_in_parts(monkeypatch):
    wide = Image.effect_noise((300, 200), 90)
    alpha = Image.effect_noise((300, 200), 50)
    deep = Image.fromarray(np.asarray(wide).astype(np.uint16) * 257)
    both = [Image.merge("LA", (wide, alpha)), deep]
    data = [encoded(image, "PNG") for image in both]
    expected = [decode_image(one, "x").tobytes() for one in data]
    monkeypatch.setattr(decoding, "_BLOCK_PIXELS", 7 * 300)
    assert [decode_image(one, "x").tobytes() for one in data] == expected


def test_the_limit_of_pixels_is_an_option():
    data = encoded(Image.new("L", (30, 20)), "PNG")
    with pytest.raises(DatasetError, match=r"at most 599 pixels, found 30 x 20; .* --max-pixels"):
        decode_image(data, "x.png", max_pixels=599)
    assert decode_image(data, "x.png", max_pixels=600).size == (30, 20)


def test_a_transparent_colour_of_16_bits_is_laid_on_white():
    row = b"\0" + struct.pack(">6H", 1000, 2000, 3000, 40000, 50000, 60000)
    header = b"IHDR" + struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    png += struct.pack(">I", zlib.crc32(header))
    png = with_chunk(with_chunk(png, b"IDAT", zlib.compress(row)), b"tRNS", row[1:7])
    assert np.asarray(decode_image(png, "x")).tolist() == [[[255, 255, 255], [156, 195, 234]]]
