"""Archives read in place: fast, from several threads, and with nothing taken on trust."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from featcache.datasets import zip as _zip
from featcache.datasets.zip import ZipArchive
from featcache.errors import DatasetError

FILES = {f"cat/{number}.png": random.Random(0).randbytes(50) * number for number in range(40)}

# Where fields of an entry stand in the directory (APPNOTE 4.3.12) and in the local header.
FLAGS, METHOD, CRC, PACKED, SIZE, START = 8, 10, 16, 20, 24, 42
LOCAL_NAME = 30


def archive(path, files=FILES, compression=zipfile.ZIP_DEFLATED, **options):
    with zipfile.ZipFile(path, "w", compression, **options) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return path


def entry(data, name):
    """Return where the directory's entry of a file begins."""
    name = name.encode()
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(name)] != name:
        at = data.index(b"PK\x01\x02", at + 1)
    return at


def patched(path, name, field, value, form="<I"):
    """Return the archive with one field of a file's entry in the directory changed."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, entry(data, name) + field, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("front", [b"", b"#!/bin/sh\n" * 9], ids=["plain", "self-extracting"])
def test_every_file_is_what_was_packed(tmp_path, compression, front):
    path = archive(tmp_path / "a.zip", compression=compression)
    path.write_bytes(front + path.read_bytes())
    opened = ZipArchive(path)
    assert opened.names() == sorted(FILES)
    assert {name: opened.read(name) for name in opened.names()} == FILES


def test_many_threads_read_at_once(tmp_path):
    opened = ZipArchive(archive(tmp_path / "a.zip"))
    names = opened.names() * 50
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened.read, names)) == [FILES[name] for name in names]


def test_names_in_any_script_and_folders(tmp_path):
    files = {"кот/1.png": b"1", "猫/2.png": b"2", "café/3.png": b"3", "dog/": b""}
    opened = ZipArchive(archive(tmp_path / "a.zip", files))
    assert opened.names() == sorted(["кот/1.png", "猫/2.png", "café/3.png"])
    assert opened.folders() == ["dog"]
    assert [opened.read(name) for name in ("кот/1.png", "café/3.png")] == [b"1", b"3"]


def test_names_in_the_old_code_page(tmp_path):
    path = archive(tmp_path / "a.zip", {"caf?/3.png": b"3"})
    path.write_bytes(path.read_bytes().replace(b"caf?", b"caf\x82"))
    assert ZipArchive(path).read("café/3.png") == b"3"


def test_sizes_behind_the_data_and_in_64_bits(tmp_path):
    path = tmp_path / "a.zip"
    with open(path, "wb") as stream:
        stream.seekable = lambda: False  # so that the sizes come behind the data
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as opened:
            for name, data in FILES.items():
                with opened.open(name, "w", force_zip64=True) as member:
                    member.write(data)
    opened = ZipArchive(path)
    assert {name: opened.read(name) for name in opened.names()} == FILES


def test_the_file_is_closed_with_the_archive(tmp_path):
    opened = ZipArchive(archive(tmp_path / "a.zip"))
    file = opened._file
    os.fstat(file)
    del opened
    with pytest.raises(OSError):
        os.fstat(file)


def test_an_archive_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.zip")

    def refuse(*_):  # as chmod 000 would, which does not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_zip.os, "open", refuse)
    with pytest.raises(DatasetError, match=r"a\.zip: cannot be read: Permission denied; make it"):
        ZipArchive(path)


NAME = "cat/7.png"


def overlapping(path):
    data = path.read_bytes()
    other = struct.unpack_from("<I", data, entry(data, "cat/8.png") + START)[0]
    return patched(path, NAME, START, other)


def nested(path):
    """Let a file reach over the next one: every byte of it would be unpacked twice."""
    data = path.read_bytes()
    packed = struct.unpack_from("<I", data, entry(data, NAME) + PACKED)[0]
    return patched(path, NAME, PACKED, packed + 100)


def renamed(path):
    data = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", data, entry(data, NAME) + START)[0]
    data[start + LOCAL_NAME] ^= 1
    path.write_bytes(data)
    return path


def cut_short(path):
    """Take a part out of the middle: what is said of the files stays as it was."""
    data = path.read_bytes()
    start = struct.unpack_from("<I", data, entry(data, NAME) + START)[0]
    path.write_bytes(data[: start + 20] + data[start + 60 :])
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: patched(path, NAME, FLAGS, 1, "<H"), "encrypted; pack .* without a password"),
        (lambda path: patched(path, NAME, METHOD, 12, "<H"), "found compression method 12"),
        (lambda path: patched(path, NAME, SIZE, 1 << 31), "at most 357913940 bytes, found 2147"),
        (lambda path: patched(path, NAME, PACKED, 1 << 31), "at most 357913940 bytes, found 2147"),
        (lambda path: patched(path, NAME, SIZE, 349), "its size or its CRC is not"),
        (lambda path: patched(path, NAME, SIZE, 351), "its size or its CRC is not"),
        (lambda path: patched(path, NAME, CRC, 5), "its size or its CRC is not"),
        (lambda path: patched(path, NAME, START, 1 << 30), "ends early or overlaps|overlaps"),
        (overlapping, "overlaps another|another file stands"),
        (nested, "overlaps another entry"),
        (renamed, "another file stands where the directory says"),
        (cut_short, "cannot be read"),
    ],
    ids=[
        "encrypted",
        "bzip2",
        "absurd size",
        "absurd packed size",
        "longer than said",
        "shorter than said",
        "another crc",
        "beyond the end",
        "two in one place",
        "nested",
        "another name",
        "cut short",
    ],
)
def test_an_archive_that_lies_is_found_out(tmp_path, change, said):
    path = change(archive(tmp_path / "a.zip"))
    opened = ZipArchive(path)
    with pytest.raises(DatasetError, match=said) as caught:
        opened.read(NAME)
    assert str(caught.value).startswith(f"{path}!{NAME}: cannot be read: ")
    assert "\n" not in str(caught.value)


def test_a_bomb_is_not_unpacked(tmp_path):
    path = archive(tmp_path / "a.zip", {NAME: bytes(200 << 20)})
    patched(path, NAME, SIZE, 1000)
    tracemalloc.start()
    with pytest.raises(DatasetError, match="its size or its CRC"):
        ZipArchive(path).read(NAME)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_a_file_within_the_limit_is_read_and_one_above_is_not(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.zip")
    monkeypatch.setattr(_zip, "MAX_FILE_BYTES", 350)
    assert len(ZipArchive(path).read("cat/7.png")) == 350
    with pytest.raises(DatasetError, match="at most 350 bytes, found 400"):
        ZipArchive(path).read("cat/8.png")


@pytest.mark.parametrize("seed", range(3))
def test_damage_anywhere_is_an_error_of_ours_or_harmless(tmp_path, seed):
    draw = random.Random(seed)
    good = archive(tmp_path / "a.zip").read_bytes()
    for number in range(150):
        data = bytearray(good)
        for _ in range(draw.choice((1, 1, 3, 30))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        try:
            opened = ZipArchive(path)
        except DatasetError:
            continue
        for name in opened.names():
            with contextlib.suppress(DatasetError):
                assert opened.read(name) in FILES.values()
