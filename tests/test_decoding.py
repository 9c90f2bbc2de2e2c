"""Decoding ahead: the same pixels as one by one, in order, bounded, and gone when it ends."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from contextlib import closing

import numpy as np
import pytest
from conftest import colour_image
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from featcache.datasets.batches import decoded_batches
from featcache.datasets.decoding import _plain_jpeg, decode_image, original_size
from featcache.datasets.images import ArrayImages
from featcache.datasets.loading import load_dataset
from featcache.errors import DatasetChangedError, DatasetError
from featcache.finetuning.batches import Draw, ImageSource
from featcache.prediction import PlacedImages, find_places
from featcache.preprocess import Preprocess, upscale


class Images:
    """Images of given sizes; ``bad`` rows do not decode, and reading is watched."""

    def __init__(self, sizes, bad=(), delay_s=0.0):
        self.sizes = sizes
        self.bad = bad
        self.delay_s = delay_s
        self.asked = []
        self.alive = 0
        self.most_alive = 0
        self.lock = threading.Lock()

    def __len__(self):
        return len(self.sizes)

    def read(self, row, preprocess=None):
        with self.lock:
            self.asked.append(row)
        time.sleep(self.delay_s)
        if row in self.bad:
            raise DatasetError(f"folder/{row}.png: expected an image, found none")
        image = self[row]
        if min(image.size) > 100:
            with self.lock:
                self.alive += 1
                self.most_alive = max(self.most_alive, self.alive)
            weakref.finalize(image, self.gone)
        return image

    def gone(self):
        with self.lock:
            self.alive -= 1

    def __getitem__(self, row):
        return colour_image(row % 3, row, self.sizes[row])


def cut(n, size):
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def decoded(images, batches, preprocess, **options):
    options = {"workers": 2, **options}
    with closing(decoded_batches(images, batches, preprocess, **options)) as found:
        return list(found)


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("featcache_")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not our_threads()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_come_in_order_with_the_canonical_pixels(workers):
    images = Images([(40 + row % 7, 90 - row % 11) for row in range(50)])
    preprocess = Preprocess(32)
    batches = decoded(images, cut(50, 16), preprocess, workers=workers)
    assert [batch.rows.tolist() for batch in batches] == [list(rows) for rows in cut(50, 16)]
    pixels = np.concatenate([batch.pixels for batch in batches])
    assert np.array_equal(pixels, preprocess.batch([images[row] for row in range(50)]))
    assert all(batch.rows.dtype == np.int64 and not batch.failures for batch in batches)
    assert all(batch.decode_s > 0 for batch in batches)


def test_rows_may_come_in_any_order_and_batch():
    images = Images([(40, 40)] * 30)
    wanted = [np.array([7, 3, 29, 3]), [5], range(20, 10, -1), []]
    batches = decoded(images, wanted, Preprocess(40))
    assert [batch.rows.tolist() for batch in batches] == [list(rows) for rows in wanted]
    assert batches[3].pixels.shape == (0, 40, 40, 3)
    for batch in batches:
        for row, pixels in zip(batch.rows, batch.pixels, strict=True):
            assert pixels.tobytes() == images[row].tobytes()


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(24, 24)] * 20, 24),
        ([(24, 30)] * 20, 24),
        ([(24, 24)] * 19 + [(25, 25)], 64),
        ([(24, 24)] * 19 + [(640, 480)], 64),
        ([(24, 24)] * 9 + [(64, 64)] * 11, 64),
        ([(24, 3000)] * 20, 64),
    ],
    ids=["small", "small, oblong", "one a little larger", "one photo", "two sizes", "panoramas"],
)
def test_small_images_stay_small_where_all_of_a_batch_are_of_one_size(sizes, side):
    images = Images(sizes)
    preprocess = Preprocess(64)
    (batch,) = decoded(images, [range(20)], preprocess)
    assert batch.pixels.shape == (20, side, side, 3)
    canonical = preprocess.batch([images[row] for row in range(20)])
    assert np.array_equal(upscale(batch.pixels, preprocess), canonical)


def test_arrays_are_images_too():
    array = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    batches = decoded(ArrayImages(array), cut(20, 8), Preprocess(64))
    assert np.array_equal(np.concatenate([batch.pixels for batch in batches]), array)


def test_a_bad_image_fails_in_its_place():
    images = Images([(32, 32)] * 100, bad=(50, 51))
    seen = []
    with (
        pytest.raises(
            DatasetError,
            match=r"^folder/50\.png: .* found none; 1 more of the 100 images looked at so far are "
            "such: 51, or use --on-error skip$",
        ),
        closing(decoded_batches(images, cut(100, 16), Preprocess(32), workers=3)) as batches,
    ):
        for batch in batches:
            seen.append(batch.rows[0])
    assert seen == [0, 16, 32], "what comes before the bad image is delivered"


def test_bad_images_are_skipped_and_told():
    images = Images([(32, 32)] * 40, bad=(3, *range(16, 32)))
    first, second, third = decoded(images, cut(40, 16), Preprocess(32), on_error="skip")
    assert first.rows.tolist() == [row for row in range(16) if row != 3]
    assert len(first.pixels) == 15
    assert first.failures == ((3, "folder/3.png: expected an image, found none"),)
    assert second.pixels.shape == (0, 32, 32, 3) and second.rows.shape == (0,)
    assert [row for row, _ in second.failures] == list(range(16, 32))
    assert len(third.pixels) == 8 and not third.failures


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_what_is_not_a_bad_image_is_never_skipped(on_error):
    class Full(Images):
        def __getitem__(self, row):
            raise MemoryError("no room for a photo")

    with pytest.raises(MemoryError, match="no room"):
        decoded(Full([(32, 32)] * 4), [range(4)], Preprocess(32), on_error=on_error)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_an_image_that_changed_is_never_skipped(tmp_path, on_error):
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour_image(0, 0).save(path)
    data = load_dataset(tmp_path / "set")
    data.digest_with(lambda _: None, on_error)
    row = 1
    colour_image(1, 1).save(tmp_path / "set" / data.train.ids[row])
    with pytest.raises(DatasetChangedError, match=r"being read; run it again$"):
        decoded(data.train.images, [range(2)], Preprocess(32), on_error=on_error)


def test_files_that_cannot_be_read_are_skipped_and_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
            compression = zipfile.ZIP_BZIP2 if name == "a/1.png" else zipfile.ZIP_STORED
            stream = io.BytesIO()
            colour_image(0, 0).save(stream, "PNG")
            archive.writestr(name, stream.getvalue(), compression)
    data = load_dataset(tmp_path / "set.zip")
    data.digest_with(lambda _: None, "skip")
    split = data.train if "a/1.png" in data.train.ids else data.test
    row = split.ids.index("a/1.png")
    (batch,) = decoded(split.images, [range(len(split))], Preprocess(32), on_error="skip")
    assert [failed for failed, _ in batch.failures] == [row]
    assert "found compression method 12" in batch.failures[0][1]
    assert len(batch.rows) == len(split) - 1


def test_a_slow_consumer_is_not_run_away_from():
    size, workers = 512, 2
    ahead = (32 << 20) // (3 * size**2)  # images of 32 MiB
    images = Images([(32, 32)] * 1000)
    with closing(
        decoded_batches(images, cut(1000, 8), Preprocess(size), workers=workers)
    ) as batches:
        for number, _ in zip(range(3), batches, strict=False):
            time.sleep(0.3)
            assert len(images.asked) <= 8 * (number + 1) + ahead + 8
    assert len(images.asked) < 100


def test_one_photo_per_thread_is_in_memory():
    images = Images([(400, 300)] * 48)
    decoded(images, cut(48, 16), Preprocess(32), workers=2)
    assert len(images.asked) == 48
    assert images.alive == 0
    assert images.most_alive <= 2


def test_leaving_early_ends_the_threads_at_once():
    images = Images([(32, 32)] * 1000, delay_s=0.02)
    batches = decoded_batches(images, cut(1000, 8), Preprocess(32), workers=4)
    next(batches)
    began = time.perf_counter()
    batches.close()
    assert not our_threads()
    assert time.perf_counter() - began < 1
    asked = len(images.asked)
    time.sleep(0.1)
    assert len(images.asked) == asked < 200


def test_an_error_in_the_list_of_batches_ends_the_threads():
    def broken():
        yield range(8)
        raise KeyError("rows")

    with pytest.raises(KeyError, match="rows"):
        decoded(Images([(32, 32)] * 8), broken(), Preprocess(32))


INTERRUPTED = """
import sys, threading, time
sys.path.insert(0, {tests!r})
from contextlib import closing
from test_decoding import Images, cut
from featcache.datasets.batches import decoded_batches
from featcache.preprocess import Preprocess

images = Images([(32, 32)] * 1000, delay_s=0.3)
try:
    with closing(decoded_batches(images, cut(1000, 64), Preprocess(32), workers=4)) as batches:
        print("ready", flush=True)
        for batch in batches:
            print("a batch", flush=True)
except KeyboardInterrupt:
    print("threads:", threading.active_count(), "asked:", len(images.asked) < 100, flush=True)
"""


def test_ctrl_c_ends_the_threads_while_they_decode():
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.format(tests=str(__file__).rpartition("/")[0])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # every thread is in the middle of an image, and the caller waits
        sent = time.perf_counter()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert out == "threads: 1 asked: True\n"
    assert err == ""
    assert process.returncode == 0
    assert time.perf_counter() - sent < 3


def test_everybody_sees_the_same_pixels_of_large_photos(tmp_path):
    for name in ("a", "b"):
        for number in range(2):
            path = tmp_path / "set" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour_image(number, 0, (503, 400)).save(path)
    preprocess = Preprocess(64)
    split = load_dataset(tmp_path / "set").train
    (extracted,) = decoded(split.images, [range(2)], preprocess)
    assert split.images.read(0, preprocess).size == (64, 64) and split.images[0].size == (503, 400)

    (trained,) = ImageSource(split, preprocess).batches([Draw(np.arange(2))])
    assert trained.tobytes() == extracted.pixels.tobytes()
    places = find_places([tmp_path / "set" / name for name in split.ids])
    (named,) = decoded(PlacedImages(places), [range(2)], preprocess)
    assert named.pixels.tobytes() == extracted.pixels.tobytes()


def jpegs(root, sizes):
    for number, size in enumerate(sizes):
        path = root / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour_image(number % 2, 0, size).save(path)
    return PlacedImages(find_places([root / "ab"[n % 2] / f"{n}.jpg" for n in range(len(sizes))]))


@pytest.mark.parametrize(
    ("geometry", "told"),
    [("square", {1: 0.25, 2: 0.4, 5: 3 / 8}), ("crop", {1: 0.25, 2: 0.4, 5: 3 / 8})],
)
def test_images_of_which_most_is_cut_away_are_told(tmp_path, geometry, told):
    """By their size in the file, whatever the decoder made of it."""
    sizes = [(40, 40), (40, 160), (1000, 400), (64, 32), (1000, 501), (30, 80)]
    images = jpegs(tmp_path, sizes)
    preprocess = Preprocess(64, geometry=geometry)
    assert (images.read(2, preprocess).size == (64, 64)) == (geometry == "square")
    (batch,) = decoded(images, [range(6)], preprocess)
    assert dict(batch.cut_away) == pytest.approx(told, rel=0.02)
    for kept in ("squash", "pad"):
        (batch,) = decoded(images, [range(6)], Preprocess(64, geometry=kept))
        assert batch.cut_away == ()


def test_a_photo_on_its_side_is_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    colour_image(0, 0, (600, 400)).save(tmp_path / "a.jpg", exif=exif)
    image = PlacedImages(find_places([tmp_path / "a.jpg"])).read(0, Preprocess(64))
    assert image.size == (64, 64) and original_size(image) == (400, 600)


def test_what_a_file_says_of_itself_is_no_size(tmp_path):
    notes = PngInfo()
    notes.add_text("featcache.size", "9 x 9")
    colour_image(0, 0, (50, 40)).save(tmp_path / "a.png", pnginfo=notes)
    image = PlacedImages(find_places([tmp_path / "a.png"])).read(0)
    assert original_size(image) == (50, 40)


@pytest.mark.parametrize("geometry", ["crop", "squash", "pad"])
def test_the_decoder_leaves_photos_whole_for_the_models_own_geometry(tmp_path, geometry):
    images = jpegs(tmp_path, [(900, 700), (700, 901)])
    preprocess = Preprocess(64, interpolation="bicubic", geometry=geometry)
    (batch,) = decoded(images, [range(2)], preprocess)
    assert np.array_equal(batch.pixels, preprocess.batch([images.read(0), images.read(1)]))


def test_a_scaled_photo_is_resized_by_the_filter_that_was_asked_for(tmp_path):
    images = jpegs(tmp_path, [(900, 700)])
    whole = images.read(0)
    for interpolation in ("bilinear", "bicubic", "lanczos"):
        preprocess = Preprocess(64, interpolation=interpolation)
        found = np.asarray(images.read(0, preprocess)).astype(int)
        differences = {
            name: abs(found - Preprocess(64, interpolation=name).pixels(whole)).mean()
            for name in ("bilinear", "bicubic", "lanczos")
        }
        assert min(differences, key=differences.get) == interpolation, differences


def small_jpeg(size=(33, 31), mode="RGB", **options):
    stream = io.BytesIO()
    colour_image(2, 1).resize(size).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


PLAIN = {
    "RGB": {},
    "gray": {"mode": "L"},
    "4:4:4": {"subsampling": 0, "quality": 97},
    "4:2:2": {"subsampling": 1},
    "restarts": {"restart_marker_blocks": 1},
    "own tables": {"optimize": True},
    "square": {"size": (32, 32)},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_jpeg_has_the_pixels_of_pillows_own_reader(kind):
    data = small_jpeg(**PLAIN[kind])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for tail in (b"", b"appended"):
        image = _plain_jpeg(data + tail, 1000)
        assert image is not None and image.mode == "RGB"
        assert np.array_equal(image, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"mode": "CMYK"},
        {"exif": Image.Exif()},
        {"comment": b"text"},
        {"icc_profile": b"profile"},
        {"size": (300, 300)},
        {"size": (128, 128)},
    ],
)
def test_any_other_jpeg_is_left_to_pillows_own_reader(options):
    if "exif" in options:
        options["exif"][0x0112] = 6
    data = small_jpeg(**options)
    assert _plain_jpeg(data, 128) is None
    upright = (31, 33) if "exif" in options else options.get("size", (33, 31))
    assert original_size(decode_image(data, "x.jpg", Preprocess(size=32))) == upright


def test_a_plain_jpeg_of_too_many_pixels_is_refused():
    with pytest.raises(DatasetError, match="at most 1,000 pixels, found 33 x 31"):
        decode_image(small_jpeg(), "x.jpg", max_pixels=1000)


def test_of_a_damaged_jpeg_nothing_is_accepted_that_pillows_own_reader_refuses():
    data = small_jpeg()
    generator = np.random.default_rng(0)
    damaged = [data[:end] for end in range(0, len(data), 5)]
    for _ in range(600):
        changed = bytearray(data)
        changed[generator.integers(len(data))] = generator.integers(256)
        damaged.append(bytes(changed))
    n_accepted = 0
    for one in damaged:
        image = _plain_jpeg(one, 1000)
        if image is not None:
            n_accepted += 1
            assert np.array_equal(image, Image.open(io.BytesIO(one)).convert("RGB"))
    assert n_accepted > 100
