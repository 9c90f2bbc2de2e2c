"""Folders, archives, digits, and images of every kind."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from conftest import colour_image
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from featcache.datasets.dataset import Dataset, Split, dataset_digest
from featcache.datasets.decoding import decode_image, image_suffixes
from featcache.datasets.images import ArrayImages, Folder
from featcache.datasets.loading import load_dataset
from featcache.errors import DatasetChangedError, DatasetError
from featcache.preprocess import Preprocess


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{prefix}{file.relative_to(folder).as_posix()}")
    return path


def test_a_folder_with_train_and_test(image_folder):
    data = load_dataset(image_folder)
    assert data.name == "colours"
    assert data.class_names == ("blue", "green", "red")
    assert (len(data.train), len(data.test)) == (36, 18)
    assert data.train.ids[0] == "train/blue/00.png"
    assert data.train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    image = data.train.images[13]
    assert image.mode == "RGB" and image.size == (40, 32)
    assert image.tobytes() == colour_image(1, 1).tobytes()


def test_a_zip_is_the_same_data_set(image_folder, tmp_path):
    data = load_dataset(image_folder)
    for prefix in ("", "colours/"):
        archive = load_dataset(zipped(image_folder, tmp_path / "colours.zip", prefix))
        assert archive.class_names == data.class_names
        assert archive.train.images[5].tobytes() == data.train.images[5].tobytes()
        assert archive.test.labels.tolist() == data.test.labels.tolist()
    plain = load_dataset(zipped(image_folder, tmp_path / "colours.zip"))
    assert plain.digest == data.digest


def sides(data):
    """Return the content of every image as hex, and whether it is on the test side."""
    return {
        hashlib.sha256(split.images.content(row)).hexdigest(): role == "test"
        for role, split in data.splits()
        for row in range(len(split))
    }


def test_without_a_split_the_content_of_an_image_decides_its_side(image_folder):
    data = load_dataset(image_folder / "train")
    assert data.divided_by == "content" and data.val is None and data.class_names[0] == "blue"
    assert (
        sides(data) == {digest: int(digest[:16], 16) < 0.2 * 2**64 for digest in sides(data)}
        and len(sides(data)) == 36
    )
    assert {*data.train.ids, *data.test.ids} == set(data.undivided.whole.ids)
    assert data.test.labels.tolist() == [
        data.class_names.index(name.split("/")[0]) for name in data.test.ids
    ]
    assert load_dataset(image_folder / "train").test.ids == data.test.ids


def test_adding_moving_and_renaming_images_changes_no_other_side(image_folder, tmp_path):
    copy = tmp_path / "colours"
    shutil.copytree(image_folder / "train", copy)
    before = sides(load_dataset(copy))
    for number in range(4):
        colour_image(0, 500 + number).save(copy / "blue" / f"a{number}.png")
    (copy / "red/00.png").rename(copy / "green/moved.png")
    (copy / "red/01.png").rename(copy / "red/renamed.png")
    (copy / "green").rename(copy / "verdant")
    after = sides(load_dataset(copy))
    assert len(after) == 40 and {name: after[name] for name in before} == before


def test_exact_copies_are_on_the_same_side(image_folder, tmp_path):
    copy = tmp_path / "colours"
    shutil.copytree(image_folder / "train", copy)
    for path in sorted(copy.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    data = load_dataset(copy)
    for split in (data.train, data.test):
        copies = {name.replace("copy-", "") for name in split.ids}
        assert len(split) == 2 * len(copies) > 0


def test_an_undivided_data_set_is_not_read_before_a_side_is_asked_for(image_folder, monkeypatch):
    read, honest = [], Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: read.append(name) or honest(self, name))
    data = load_dataset(image_folder / "train").limited(None, None)
    assert data.class_names == ("blue", "green", "red") and not read
    assert [len(split) for split in data.listed()] == [36] and not read
    assert len(data.train) + len(data.test) == len(read) == 36
    assert data.digest == dataset_digest(data.train.digest, data.test.digest)
    assert len(read) == 36, "the digest is of the hashes that were made"


def test_a_class_of_one_image_is_no_error(tmp_path):
    data = load_dataset(folder_of(tmp_path, "a/1.png", "a/2.png", "b/1.png"))
    assert data.class_names == ("a", "b") and len(data.train) + len(data.test) == 3


def test_links_are_followed_once_and_dangling_ones_are_errors(image_folder, tmp_path):
    root = tmp_path / "linked"
    (root / "train").mkdir(parents=True)
    for name in ("blue", "green", "red"):
        (root / "train" / name).symlink_to(image_folder / "train" / name)
    (root / "test").symlink_to(image_folder / "test")
    (root / "loop").symlink_to(root)
    data = load_dataset(root)
    assert (len(data.train), len(data.test)) == (36, 18)
    copy = tmp_path / "copy"
    shutil.copytree(image_folder, copy)
    (copy / "train/red/00.png").unlink()
    (copy / "train/red/00.png").symlink_to("nowhere.png")
    with pytest.raises(DatasetError, match=r"red/00\.png: cannot be read"):
        load_dataset(copy).digest  # noqa: B018


def test_a_class_may_be_called_train(tmp_path):
    for index, name in enumerate(("plane", "train")):
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        for number in range(5):
            colour_image(index, number).save(tmp_path / "vehicles" / name / f"{number}.png")
    assert load_dataset(tmp_path / "vehicles").class_names == ("plane", "train")


def test_other_files_are_left_alone(image_folder, tmp_path):
    copy = tmp_path / "colours"
    shutil.copytree(image_folder, copy)
    (copy / "README.txt").write_text("about")
    (copy / "train" / "red" / "Thumbs.db").write_bytes(b"x")
    (copy / "train" / ".cache").mkdir()
    (copy / "train" / "red" / ".hidden.png").write_bytes(b"x")
    assert load_dataset(copy).digest == load_dataset(image_folder).digest


def test_the_digest_follows_every_byte_label_and_name(image_folder, tmp_path):
    digest = load_dataset(image_folder).digest
    changes = {
        "a pixel": lambda root: colour_image(0, 77).save(root / "train" / "blue" / "00.png"),
        "an id": lambda root: (root / "test/red/00.png").rename(root / "test/red/zz.png"),
        "a label": lambda root: (root / "test/red/00.png").rename(root / "test/blue/zz.png"),
        "a class": lambda root: [
            (root / role / "red").rename(root / role / "scarlet") for role in ("train", "test")
        ],
    }
    for name, change in changes.items():
        copy = tmp_path / name / "colours"
        shutil.copytree(image_folder, copy)
        assert load_dataset(copy).digest == digest
        change(copy)
        assert load_dataset(copy).digest != digest, name


def test_the_digest_is_of_the_files_however_they_are_packed(image_folder, tmp_path):
    digest = load_dataset(image_folder).digest
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{compression}" / "colours.zip"
        path.parent.mkdir()
        with zipfile.ZipFile(path, "w", compression) as archive:
            for file in sorted(image_folder.rglob("*.png"), reverse=True):
                archive.write(file, file.relative_to(image_folder).as_posix())
        assert load_dataset(path).digest == digest


def test_the_digest_of_many_files_is_made_once_in_order_and_tells_how_far_it_is(tmp_path):
    files = {f"{name}/{number:03d}.png": os.urandom(9) for name in "ab" for number in range(300)}
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    data = load_dataset(tmp_path / "set.zip")
    heard = []
    digest = data.digest_with(heard.append)
    assert [message.done for message in heard] == sorted(message.done for message in heard)
    assert heard[-1].done == heard[-1].total == 600 and len(heard) > 5
    assert data.digest == data.digest_with(pytest.fail) == digest
    expected = hashlib.sha256(json.dumps([["a", "b"], list(data.train.ids)]).encode())
    expected.update(data.train.labels.tobytes())
    for name in data.train.ids:
        expected.update(hashlib.sha256(files[name]).digest())
    assert data.train.digest == expected.hexdigest()
    assert data.train.take(np.arange(9)).digest != data.train.take(np.arange(9)[::-1]).digest


def test_digits_is_fixed_and_stratified():
    data = load_dataset("digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert np.bincount(data.test.labels).min() >= 34
    assert set(data.train.ids).isdisjoint(data.test.ids)
    assert data.train.images[0].size == (8, 8)
    assert data.digest == load_dataset("digits").digest


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def uniform(mode, colour, size=(8, 8)):
    return Image.new(mode, size, colour)


def sixteen_bit():
    return Image.fromarray(np.full((8, 8), 51400, np.uint16))


def palette_with_transparency():
    image = uniform("P", 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(uniform("L", 90)), (90, 90, 90)),
        (encoded(uniform("1", 1)), (255, 255, 255)),
        (encoded(sixteen_bit()), (200, 200, 200)),
        (encoded(palette_with_transparency()), (10, 200, 30)),
        (encoded(palette_with_transparency(), transparency=1), (255, 255, 255)),
        (encoded(uniform("RGBA", (255, 0, 0, 255))), (255, 0, 0)),
        (encoded(uniform("RGBA", (255, 0, 0, 0))), (255, 255, 255)),
        (encoded(uniform("RGBA", (0, 0, 0, 51))), (204, 204, 204)),
        (encoded(uniform("LA", (40, 255))), (40, 40, 40)),
        (encoded(uniform("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encoded(uniform("RGB", (1, 2, 3)), "BMP"), (1, 2, 3)),
    ],
    ids=[
        "gray",
        "bilevel",
        "16 bit",
        "palette",
        "palette, transparent",
        "opaque",
        "transparent",
        "shade",
        "gray with alpha",
        "cmyk",
        "bmp",
    ],
)
def test_every_mode_becomes_the_rgb_that_a_person_sees(data, expected):
    image = decode_image(data, "an image")
    assert image.mode == "RGB"
    assert image.getpixel((4, 4)) == expected


def test_cmyk_jpeg_keeps_its_colours():
    image = decode_image(encoded(uniform("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), "a jpeg")
    red, green, blue = image.getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


def exif(orientation):
    held = Image.Exif()
    held[0x0112] = orientation
    return held


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(orientation):
    data = encoded(colour_image(0, 0), "PNG", exif=exif(orientation))
    pillows = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode_image(data, "a photo").tobytes() == pillows.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photo_whose_exif_is_damaged_is_shown_as_it_is(kind):
    data = encoded(colour_image(0, 0), kind, exif=b"Exif\0\0nonsense")
    assert decode_image(data, "a photo").size == (40, 32)


@pytest.fixture(scope="module")
def photos():
    """Real photos: two of 640 x 427 as they are, and 4 x 5 of them in one of 2,560 x 2,135."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    wall = Image.new("RGB", (2560, 2135))
    for number in range(20):
        photo = (china, flower)[number % 2].transpose(Image.Transpose(number % 2))
        wall.paste(photo, (640 * (number % 4), 427 * (number // 4)))
    return {"china": china, "flower": flower, "wall": wall, "odd": wall.crop((3, 2, 2002, 1503))}


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 75, "progressive": True},
        {"quality": 92, "subsampling": 0},
        {"mode": "CMYK"},
        {"mode": "L"},
        *({"exif": exif(orientation)} for orientation in range(2, 9)),
    ],
    ids=["plain", "progressive", "4:4:4", "cmyk", "gray", *map(str, range(2, 9))],
)
@pytest.mark.parametrize("name", ["china", "wall", "odd"])
def test_a_photo_scaled_down_by_the_decoder_has_the_same_pixels(photos, name, options):
    # Measured over these: mean difference 0.2 to 0.5 of 255 levels, largest 12. Cut at whole
    # pixels of the scaled photo instead, the square would differ by 1.5 to 2.8 and up to 66.
    options = dict(options)
    data = encoded(photos[name].convert(options.pop("mode", "RGB")), "JPEG", **options)
    preprocess = Preprocess(64)
    whole, square = decode_image(data, "a photo"), decode_image(data, "a photo", preprocess)
    assert max(whole.size) == max(photos[name].size) and square.size == (64, 64)
    difference = np.abs(preprocess.pixels(whole).astype(int) - preprocess.pixels(square))
    assert difference.mean() <= 0.6
    assert difference.max() <= 16


@pytest.mark.parametrize(
    ("size", "kind", "scaled"),
    [
        ((255, 900), "JPEG", False),
        ((256, 900), "JPEG", True),
        ((900, 900), "PNG", False),
        ((900, 900), "WEBP", False),
        ((900, 900), "MPO", True),
    ],
)
def test_the_decoder_scales_what_stays_twice_as_large_as_wanted(size, kind, scaled):
    image = decode_image(
        encoded(uniform("RGB", (9, 99, 199), size), kind), "a photo", Preprocess(64)
    )
    assert image.size == ((64, 64) if scaled else size)
    assert decode_image(encoded(uniform("RGB", 0, size), kind), "a photo").size == size


def test_a_photo_above_the_limit_is_read_where_the_decoder_scales_it_down():
    data = encoded(uniform("L", 90, (10_000, 9_000)), "JPEG")
    with pytest.raises(DatasetError, match="at most 89,478,485 pixels, found 10000 x 9000"):
        decode_image(data, "a photo")
    assert decode_image(data, "a photo", Preprocess(224)).getpixel((9, 9)) == (90, 90, 90)
    with pytest.raises(
        DatasetError, match="at most 89,478,485 pixels"
    ):  # and no warning of Pillow's
        decode_image(encoded(uniform("1", 1, (10_000, 9_000)), "PNG"), "a scan", Preprocess(224))


def bomb():
    """A PNG of a few bytes that declares 60,000 x 60,000 pixels."""
    data = bytearray(encoded(uniform("L", 0)))
    import zlib

    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"not an image", "do not decode"),
        (b"", "found 0 bytes"),
        (encoded(colour_image(0, 0))[:400], "do not decode"),
        (bomb(), "expected at most 89,478,485 pixels, found 60000 x 60000; scale"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "do not decode"),
    ],
    ids=["text", "empty", "cut short", "bomb", "a format that runs a program"],
)
def test_what_is_not_an_image_is_named(data, said):
    with pytest.raises(DatasetError, match=said) as caught:
        decode_image(data, "some/where.png")
    assert str(caught.value).startswith("some/where.png: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_images_are_not_read(image_folder, tmp_path):
    copy = tmp_path / "colours"
    shutil.copytree(image_folder, copy)
    with open(copy / "train/blue/00.png", "wb") as stream:
        stream.truncate((1 << 30) + 1)
    (copy / "train/blue/01.png").unlink()
    os.mkfifo(copy / "train/blue/01.png")
    images = load_dataset(copy).train.images
    with pytest.raises(DatasetError, match=r"00\.png: cannot be read: .* more than an image has"):
        images[0]
    with pytest.raises(DatasetError, match=r"01\.png: cannot be read: it is a pipe or a device"):
        images[1]


def folder_of(tmp_path, *names):
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            colour_image(0, 0).save(path)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["readme/"], "found no file "),
        (["train/cat/"], "found no file "),
        (["a/b/1.png", "a/c/1.png", "2.png"], "found 2 folders in a/; name .*/data/a$"),
        (["x/y/b/1.png", "x/y/c/1.png"], "found 2 folders in x/y/; name .*/data/x/y$"),
        (["b\\1.png", "c\\1.png"], "a backslash where a / belongs"),
        (["a/1.png", "a/2.png", "b/"], r"found no image in 1 class \('b'\)"),
        (["a/1.png", "b/", "c/", "d/"], r"no image in 3 classes \('b', 'c', 'd'\)"),
        (["train/a/1.png", "train/b/1.png"], "expected test/ beside train/"),
        (
            ["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"],
            r"1 image in test/ of 1 class \('c'\), of",
        ),
        (
            ["train/a/1.png", "train/b/1.png", "test/a/1.png", "val/c/1.png"],
            r"1 image in val/ of 1 class \('c'\), of",
        ),
        (["train/a/1.png", "test/a/1.png"], "one class alone, 'train/a'"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png", "val/1.png"], "none in val/; sort"),
        (
            ["train/a/1.png", "train/b/", "train/c/1.png", "test/a/1.png", "test/d/1.png"],
            r"found no image in 1 class \('train/b'\) .*; and 1 image in test/ of 1 class \('d'\)",
        ),
        (["Train/a/1.png", "Train/b/1.png", "Val/a/1.png"], "rename Val/ to test/ if"),
        (["Train/a/1.png", "TEST/1.png"], "expected class folders .* found none in TEST/; sort"),
        (["val/1.png", "Test/2.png"], "found Test/ and val/; rename"),
        (["val/a/1.png", "test/a/1.png"], "found test/ and val/; rename .*, name .*/data/test$"),
        (["test/a/1.png", "test/b/1.png"], "found test/; rename .*, name .*/data/test$"),
        (["training/a/1.png", "train/a/1.png"], "one train/, found train/ and training/"),
        (["s/val/a/1.png", "s/test/a/1.png"], "found test/ and val/; .*, name .*/data/s/test$"),
        (["train/a/1.png", "Train/b/1.png", "test/a/1.png"], "one train/, found Train/ and train/"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, names, said):
    with pytest.raises(DatasetError, match=said):
        load_dataset(folder_of(tmp_path, *names))


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("TRAIN", "test"), ("train", "tEsT")])
def test_train_and_test_may_be_spelled_in_capitals(tmp_path, train, test):
    names = [f"{role}/{name}/1.png" for role in (train, test) for name in ("cat", "dog")]
    folder = folder_of(tmp_path, *names)
    for data in (load_dataset(folder), load_dataset(zipped(folder, tmp_path / "a.zip", "in/"))):
        assert data.class_names == ("cat", "dog")
        assert (len(data.train), len(data.test)) == (2, 2)
        assert data.test.ids[0].endswith(f"{test}/cat/1.png")


def test_classes_too_deep_in_an_archive_say_what_to_do(tmp_path):
    folder = folder_of(tmp_path, "x/y/cat/1.png", "x/y/dog/1.png")
    with pytest.raises(DatasetError, match="unpack the archive and name its folder x/y"):
        load_dataset(zipped(folder, tmp_path / "deep.zip"))


def test_an_archive_with_backslashes_says_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat\\1.png", b"1")
        archive.writestr("dog\\1.png", b"1")
    with pytest.raises(DatasetError, match=r"names with a backslash .* \(cat\\1\.png\); pack"):
        load_dataset(tmp_path / "a.zip")


def test_what_is_left_out_is_noted(tmp_path):
    folder = folder_of(tmp_path, *(f"{name}/{n}.png" for name in "ab" for n in range(3)))
    assert load_dataset(folder).notes == ()
    for name in ("a/1.psd", "a/2.JP2", "b/3.jp2", "b/notes.txt", "c.heic", ".hidden.heic"):
        (folder / name).write_bytes(b"")
    colour_image(0, 0).save(folder / "stray.png")
    ignored, outside = load_dataset(folder).notes
    assert (
        ": 4 files ignored: .heic 1 (needs pip install pillow-heif), .jp2 2, .psd 1 (images end in "
        in ignored
    )
    assert outside.endswith(": 1 image outside of the class folders ignored, stray.png the first")
    assert all(note.startswith(f"{folder}: ") for note in (ignored, outside))
    (folder / "d").mkdir()
    (folder / "d" / "1.heic").write_bytes(b"")
    with pytest.raises(
        DatasetError, match=r"in 1 class \('d'\) \(1 file ignored: \.heic 1 .*; images end"
    ):
        load_dataset(folder)


def test_images_are_known_by_what_they_begin_with_where_their_names_do_not_end(tmp_path):
    folder = folder_of(tmp_path, *(f"{name}/{n}.png" for name in "ab" for n in range(2)))
    for name in ("README", "Makefile", "empty"):
        (folder / "a" / name).write_bytes(
            {"README": b"Python", "Makefile": b"BM: all"}.get(name, b"")
        )
    for name, kind in {"jpeg": "JPEG", "bitmap": "BMP", "gray": "PPM", "x.jfif": "JPEG"}.items():
        colour_image(0, 0).save(folder / "a" / name, kind)
    colour_image(0, 0).save(folder / "b" / "x.JPE", "JPEG")
    archive = zipped(folder, tmp_path / "set.zip")
    os.mkfifo(folder / "b" / "pipe")
    expected = ["0.png", "1.png", "bitmap", "gray", "jpeg", "x.jfif"]
    for path in (folder, archive):
        data = load_dataset(path)
        ids = {*data.train.ids, *data.test.ids}
        assert ids == {*(f"a/{name}" for name in expected), "b/0.png", "b/1.png", "b/x.JPE"}
        for split in (data.train, data.test):
            assert all(split.images[row].size == (40, 32) for row in range(len(split)))


@pytest.mark.skipif(".avif" not in image_suffixes(), reason="this Pillow has no AVIF")
def test_avif_is_read():
    found = np.asarray(decode_image(encoded(colour_image(1, 0), "AVIF", quality=95), "x.avif"))
    assert np.abs(found.astype(int) - np.asarray(colour_image(1, 0))).mean() < 16


def test_a_link_to_a_folder_means_what_its_path_says(tmp_path):
    folder = folder_of(tmp_path, "a/1.png", "a/2.png", "z/1.png", "z/2.png")
    (folder / "b").symlink_to("z")
    (folder / "z" / "up").symlink_to("..")
    (folder / "z" / "deep").symlink_to("../a")
    data = load_dataset(folder)
    assert data.class_names == ("a", "b", "z")
    inside = ["1.png", "2.png", "deep/1.png", "deep/2.png"]
    ids = sorted({*data.train.ids, *data.test.ids})
    assert ids == [f"{name}/{file}" for name in "abz" for file in inside[: 2 if name == "a" else 4]]
    assert data.notes == (
        f"{folder}: 2 links to a folder above them are not followed, 'b/up' the first",
    )


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "VALID", "Testing"),
        ("train", "validation", "test"),
        ("train", "eval", "test"),
        ("train", "dev", "TEST"),
    ],
)
def test_a_validation_split_by_its_names(tmp_path, train, val, test):
    counts = {train: {"cat": 3, "dog": 2}, val: {"dog": 1}, test: {"cat": 1, "dog": 2}}
    folder = folder_of(
        tmp_path,
        *(
            f"{role}/{name}/{number}.png"
            for role, classes in counts.items()
            for name, count in classes.items()
            for number in range(count)
        ),
    )
    for data in (load_dataset(folder), load_dataset(zipped(folder, tmp_path / "a.zip", "in/"))):
        assert [role for role, _ in data.splits()] == ["train", "val", "test"]
        assert [len(split) for _, split in data.splits()] == [5, 1, 3]
        assert data.divided_by == "given" and data.val.labels.tolist() == [1]
        (note,) = data.notes
        assert note.endswith(f"no image in {val}/ of 1 class ('cat')")
        without = dataset_digest(data.train.digest, data.test.digest)
        assert data.digest != without == replace(data, val=None).digest


def test_a_class_may_be_called_dev(tmp_path):
    data = load_dataset(folder_of(tmp_path, "dev/1.png", "eval/2.png", "ops/3.png"))
    assert data.class_names == ("dev", "eval", "ops")


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["1.png", "2.png"], ["notes/"]),
        (["a/1.png", "a/2.png"], []),
        (["a/1.png", "b.png"], []),
        (["train/1.png"], []),
    ],
)
def test_images_in_no_class_folder_have_no_labels(tmp_path, names, others):
    folder = folder_of(tmp_path, *names, *others)
    for data in (load_dataset(folder), load_dataset(zipped(folder, tmp_path / "a.zip"))):
        assert data.class_names == () and data.divided_by == "content"
        (whole,) = data.listed()
        assert sorted(whole.ids) == sorted(names) and set(whole.labels) == {-1}
        (note,) = data.notes
        assert "no class folders, so the images have no labels" in note and "label CACHE" in note


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["train/1.png", "train/2.png", "Test/2.png"], {"train": 2, "test": 1}),
        (["s/train/1.png", "s/dev/2.png"], {"train": 1, "val": 1, "test": 0}),
    ],
)
def test_roles_without_class_folders(tmp_path, names, counts):
    data = load_dataset(folder_of(tmp_path, *names))
    assert {role: len(split) for role, split in data.splits()} == counts
    assert data.class_names == () and data.divided_by == "given"
    assert set(data.train.labels) == {-1} and "no labels" in data.notes[0]


def test_a_folder_that_cannot_be_listed_is_named(image_folder, tmp_path, monkeypatch):
    copy = tmp_path / "colours"
    shutil.copytree(image_folder, copy)
    scandir = os.scandir

    def guarded(path):  # as chmod 000 would have it, which does not stop root
        if str(path).endswith(("red", ".git")):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (copy / ".git").mkdir()
    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DatasetError, match=r"/red: cannot be listed: Permission denied; make"):
        load_dataset(copy)
    Folder(copy).read("train/blue/00.png")  # one file alone needs no listing


def unreadable(image_folder, tmp_path):
    """Return the colours with a pipe, a dangling link and a file that is far too large."""
    copy = tmp_path / "colours"
    shutil.copytree(image_folder, copy)
    for number in range(3):
        (copy / f"train/blue/0{number}.png").unlink()
    os.mkfifo(copy / "train/blue/00.png")
    (copy / "train/blue/01.png").symlink_to("nowhere.png")
    with open(copy / "train/blue/02.png", "wb") as stream:
        stream.truncate((1 << 30) + 1)
    return copy


def test_what_cannot_be_read_counts_by_its_name_where_it_is_skipped(image_folder, tmp_path):
    copy = unreadable(image_folder, tmp_path)
    with pytest.raises(DatasetError, match=r"blue/00\.png: cannot be read: it is a pipe"):
        load_dataset(copy).digest_with(lambda _: None)
    data = load_dataset(copy)
    digest = data.digest_with(lambda _: None, "skip")
    assert digest == data.digest == load_dataset(copy).digest_with(lambda _: None, "skip")
    whole = load_dataset(image_folder)
    assert whole.digest_with(lambda _: None, "skip") == load_dataset(image_folder).digest != digest
    for row in range(3):
        with pytest.raises(DatasetError, match="cannot be read") as caught:
            data.train.images[row]
        assert caught.type is DatasetError, "one to be skipped"
    (copy / "train/blue/00.png").rename(copy / "train/blue/0.png")
    assert load_dataset(copy).digest_with(lambda _: None, "skip") != digest


def test_an_image_that_changes_after_it_was_hashed_is_refused(image_folder, tmp_path):
    copy = tmp_path / "colours"
    shutil.copytree(image_folder, copy)
    data = load_dataset(copy)
    assert data.train.images[1].size == (40, 32)
    data.digest  # noqa: B018
    assert data.train.images[1].size == data.train.images[-1].size == (40, 32)
    colour_image(0, 99).save(copy / "train/blue/01.png")
    (copy / "train/blue/02.png").unlink()
    part = data.train.take(np.array([0, 2, 1]))
    assert part.images[0].tobytes() == part.images[-3].tobytes()
    changed = r"blue/01\.png: expected .* changed while it was being read; run it again"
    for images, row in ((data.train.images, 1), (part.images, 2), (part.images, -1)):
        with pytest.raises(DatasetChangedError, match=changed):
            images[row]
    with pytest.raises(DatasetChangedError, match=r"02\.png: cannot be read: .* a moment ago"):
        part.images[1]
    assert load_dataset(copy).train.images[1].size == (40, 32), "another look, another digest"


def test_a_file_that_has_become_readable_is_another_one(image_folder, tmp_path):
    copy = unreadable(image_folder, tmp_path)
    data = load_dataset(copy)
    data.digest_with(lambda _: None, "skip")
    (copy / "train/blue/00.png").unlink()
    colour_image(0, 99).save(copy / "train/blue/00.png")
    with pytest.raises(DatasetChangedError, match="changed while"):
        data.train.images[0]


def test_paths_that_are_no_data_set(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere: expected a folder .* cifar10, digits"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(DatasetError, match="not a readable zip archive"):
        load_dataset(tmp_path / "broken.zip")
    for name in ("", " "):
        with pytest.raises(DatasetError, match="found an empty name; try featcache extract digits"):
            load_dataset(name)
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name, found in {
        "dangling": "a link to gone, where nothing is",
        "loop": r"a path that cannot be followed \(Too many",
        "pipe": "a pipe",
        "/dev/null": "a device or a socket",
        "broken.zip/inside": "nothing there",
        "x" * 300: r"a path that cannot be followed \(File name too long\)",
        "null\0byte": "a path that cannot be followed",
    }.items():
        with pytest.raises(
            DatasetError, match=f"digits; found {found}.*; (try featcache|did you mean)"
        ):
            load_dataset(tmp_path / name)


def test_a_damaged_file_in_an_archive_is_named(image_folder, tmp_path):
    path = zipped(image_folder, tmp_path / "colours.zip")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("train/red/03.png")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"colours\.zip!train/red/03\.png: cannot be read"):
        load_dataset(path).digest  # noqa: B018


def test_a_split_refuses_what_does_not_fit_together():
    images = ArrayImages(np.zeros((2, 8, 8, 3), np.uint8))
    labels = np.array([0, 1])
    with pytest.raises(DatasetError, match=r"labels from 0 to 1 .* found 2 in row 1"):
        Split(images, np.array([0, 2]), ("a", "b"), ("x", "y"))
    with pytest.raises(DatasetError, match="found -2 in row 0"):
        Split(images, np.array([-2, 1]), ("a", "b"), ("x", "y"))
    assert Split(images, np.array([-1, 1]), ("a", "b"), ("x", "y")).labels.tolist() == [-1, 1]
    with pytest.raises(DatasetError, match="'x' more than once"):
        Split(images, labels, ("a", "b"), ("x", "x"))
    with pytest.raises(DatasetError, match="2 labels and ids"):
        Split(images, labels, ("a", "b"), ("x",))
    none = Split(ArrayImages(np.zeros((0, 8, 8, 3), np.uint8)), labels[:0], ("a", "b"), ())
    with pytest.raises(DatasetError, match="empty: expected at least one image, found none"):
        Dataset("empty", none, none, "nowhere")
    for unfit, said in (([0, 1], "list"), (labels.astype(float), "float64"), (labels > 0, "bool")):
        with pytest.raises(DatasetError, match=f"array of integers .*, found {said}; make them"):
            Split(images, unfit, ("a", "b"), ("x", "y"))
    with pytest.raises(DatasetError, match="found 18446744073709551615 in row 1"):
        Split(images, np.array([0, -1]).astype(np.uint64), ("a", "b"), ("x", "y"))
    with pytest.raises(DatasetError, match="float32"):
        ArrayImages(np.zeros((2, 8, 8, 3), np.float32))


def test_an_id_that_is_there_twice_is_named_in_time():
    n = 100_000
    images = ArrayImages(np.zeros((n, 1, 1, 3), np.uint8))
    ids = (*map(str, range(n - 1)), str(n - 2))
    began = time.perf_counter()
    with pytest.raises(DatasetError, match="'99998' more than once"):
        Split(images, np.zeros(n, np.int64), ("a",), ids)
    assert time.perf_counter() - began < 10, "minutes where each id is counted on its own"


def test_data_sets_are_compared_by_identity():
    first, second = load_dataset("digits"), load_dataset("digits")
    assert first == first and first != second and first.train != second.train
    assert len({first, second, first.train}) == 3
    assert first.digest == second.digest


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint64", ">i8"])
def test_labels_of_any_width_are_kept_as_int64(dtype):
    images = ArrayImages(np.zeros((2, 8, 8, 3), np.uint8))
    split = Split(images, np.array([1, 0], dtype), ("a", "b"), ("x", "y"))
    assert split.labels.dtype == np.int64 and split.labels.dtype.isnative
    plain = Split(images, np.array([1, 0], np.int64), ("a", "b"), ("x", "y"))
    assert split.labels.tolist() == [1, 0] and split.digest == plain.digest


def test_the_real_archive(cifar_zip):
    data = load_dataset(cifar_zip)
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert data.class_names[0] == "airplane" and data.class_names[9] == "truck"
    assert set(np.bincount(data.test.labels)) == {1000}
    assert data.test.images[9999].size == (32, 32)


@pytest.mark.parametrize("archive", [False, True])
def test_what_systems_put_beside_images_is_counted_and_no_class(tmp_path, archive):
    names = [f"{name}/{n}.png" for name in "ab" for n in range(2)]
    clutter = [
        "@eaDir/a/1.png", "a/@eaDir/1.png/THUMB.png", "#recycle/old.png", "$RECYCLE.BIN/S-1/2.png",
        "System Volume Information/x.png", "lost+found/", "__MACOSX/a/1.png",
        "a/.ipynb_checkpoints/1.png",
    ]  # fmt: skip
    folder = folder_of(tmp_path, *names, *clutter)
    (folder / "a" / "Thumbs.db").write_bytes(b"x")
    data = load_dataset(zipped(folder, tmp_path / "a.zip") if archive else folder)
    assert data.class_names == ("a", "b") and len(data.train) + len(data.test) == 4
    (note,) = data.notes
    assert ": files and folders of operating systems ignored: #recycle 1, " in note
    assert ", @eaDir 2, " in note and "Thumbs.db 1" in note


def test_names_that_nearly_end_as_images_do(tmp_path):
    folder = folder_of(tmp_path, "a/1.png", "b/1.png")
    for name in ("2.jpg_large", "3.pjpeg", "4.jpeg~", "5.img", "6.img"):
        colour_image(0, 0).save(folder / "a" / name, "JPEG")
    colour_image(0, 0).save(folder / "b" / "2.pnm", "PPM")
    colour_image(0, 0).save(folder / "b" / "3.dib", "BMP")
    (folder / "b" / "4.png.txt").write_text("a caption")
    data = load_dataset(folder)
    assert sorted(data.train.ids + data.test.ids) == [
        "a/1.png", "a/2.jpg_large", "a/3.pjpeg", "a/4.jpeg~", "b/1.png", "b/2.pnm", "b/3.dib",
    ]  # fmt: skip
    (note,) = data.notes
    assert "2 files ignored whose names end in .img, though a/5.img begins as an image" in note


@pytest.mark.parametrize("beside", ["README.md", "docs/LICENSE.txt"])
def test_other_files_beside_the_folder_of_the_splits(tmp_path, beside):
    names = [f"data/{role}/{name}/1.png" for role in ("train", "test") for name in "ab"]
    folder = folder_of(tmp_path, *names)
    (folder / beside).parent.mkdir(exist_ok=True)
    (folder / beside).write_text("about")
    for path in (folder, zipped(folder, tmp_path / "a.zip")):
        data = load_dataset(path)
        assert (data.class_names, data.divided_by) == (("a", "b"), "given")


def test_classes_that_cannot_be_used_are_left_out_where_that_is_asked_for(tmp_path):
    names = ("train/a/1.png", "train/b/1.png", "train/c/", "test/a/1.png", "test/d/1.png")
    folder = folder_of(tmp_path, *names)
    data = load_dataset(folder, on_error="skip")
    assert data.class_names == ("a", "b") and data.test.ids == ("test/a/1.png",)
    empty, unknown, fewer = data.notes
    assert ": left out: no image in 1 class ('train/c') " in empty
    assert unknown.endswith("of 1 class ('d'), of which train/ has no image")
    assert fewer.endswith("no image in test/ of 1 class ('b')")
    whole = folder_of(tmp_path / "w", "a/1.png", "b/1.png", "c/")
    assert load_dataset(whole, on_error="skip").class_names == ("a", "b")


def test_an_empty_folder_of_a_class_in_test_is_as_none(tmp_path):
    names = ("train/a/1.png", "train/b/1.png", "test/a/1.png")
    notes = load_dataset(folder_of(tmp_path, *names)).notes
    assert load_dataset(folder_of(tmp_path, "test/b/")).notes == notes != ()


def test_a_file_without_an_end_is_read_up_to_its_size(image_folder, tmp_path):
    copy = tmp_path / "colours"
    shutil.copytree(image_folder, copy)
    for name, target in (("00", "/dev/zero"), ("01", "/proc/self/environ"), ("02", "/dev/tty")):
        (copy / f"train/blue/{name}.png").unlink()
        (copy / f"train/blue/{name}.png").symlink_to(target)
    images = load_dataset(copy).train.images
    for row in range(3):
        with pytest.raises(DatasetError, match=r"0\d\.png: (cannot be read|expected an image)"):
            images[row]
