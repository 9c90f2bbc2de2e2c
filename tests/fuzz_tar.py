"""Altered tar archives of images: class folders, and samples as WebDataset has them."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

from fuzz_image import altered_image
from fuzz_zip import read as read

_NAMES = (
    "a/1.png", "b/2.png", "train/a/1.png", "test/a/2.png", "0001.png", "0002.jpg", "./a/3.png",
    "../x.png", "/x.png", "a/../../x.png", "\x1b[31m.png", "a\nb.png", "x" * 3000 + ".png",
)  # fmt: skip
_SIDECARS = {
    "0001.cls": (b"3", b"x", b"", b"9" * 500, b"\xff"),
    "0002.cls": (b"1", b"1.5", b"nan"),
    "0001.json": (b'{"a": 1}', b"[" * 99_999, b'{"a": NaN, "b": [1]}', b'{"cls": {}}', b"\xff"),
    "0002.json": (b'{"a": "x", "\\u001b[31m": 1}', b'{"a": 1e999}', b"null", b'{"": 0}'),
    "0001.txt": (b"a caption", b"\0", b"x" * (2 << 20)),
}
# The fields of a header: where each begins, and its bytes.
_FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
_KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)


def packed(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytearray:
    """Return an archive of files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return bytearray(stream.getvalue())


def _sealed(data: bytearray, at: int) -> None:
    """Give a header the checksum that it must have."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def _as_file(name: str, make: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(make())
        return path

    return write


def _of_size(field: bytes) -> bytes:
    data = packed({"a/1.png": bytes(99), "b/1.png": bytes(99)})
    data[124:136] = field
    _sealed(data, 0)
    return bytes(data)


SEEDS: dict[str, Callable[[Path], Path]] = {
    "a size of 8 GB": _as_file("x.tar", lambda: _of_size(b"77777777777\0")),
    "a size below 0": _as_file("x.tar", lambda: _of_size(b"\xff" * 12)),
    "a size of 2^88": _as_file("x.tar", lambda: _of_size(b"\x80" + b"\xff" * 11)),
    "a bomb in gzip": _as_file("x.tar.gz", lambda: gzip.compress(bytes(10**8))),
    "a deep JSON": _as_file(
        "x.tar", lambda: bytes(packed({"1.png": b"x", "1.cls": b"0", "1.json": b"[" * 10**5}))
    ),
    "nothing": _as_file("x.tar", bytes),
}


def alter(rng: random.Random, folder: Path) -> Path:
    """Write an archive of altered images, whose headers may be altered, with right checksums."""
    members = {name: altered_image(rng)[1] for name in rng.sample(_NAMES, rng.randint(1, 5))}
    for name in rng.sample(list(_SIDECARS), rng.randrange(4)):
        members[name] = rng.choice(_SIDECARS[name])
    form = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    data = packed(members, form)
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.randrange(4)):
        at = rng.choice(headers)
        start, size = rng.choice(_FIELDS)
        value = rng.choice((
            b"", b"0", b"-1", b"7" * size, b"\xff" * size, b"\x80" + bytes(size - 1), b"x" * size,
            rng.choice(_KINDS), b"L", b"K", b"x", b"g", b"S", rng.randbytes(size),
        ))  # fmt: skip
        data[at + start : at + start + size] = value[:size].ljust(size, b"\0")
        if rng.random() < 0.8:
            _sealed(data, at)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    path = folder / "altered.tar"
    path.write_bytes(data)
    return path
