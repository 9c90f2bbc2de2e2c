"""The CIFAR-10 loader on a small archive in the real layout, served over loopback."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from featcache.datasets.named import CIFAR10, CifarArchive, load_cifar10
from featcache.errors import DatasetError

NAMES = ["plane", "bird", "frog"]


def batch_file(rows, seed, dump):
    """Return a batch as it is pickled: rows of 3,072 bytes, channels first."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, 3072), np.uint8)
    labels = (np.arange(rows) % len(NAMES)).tolist()
    return dump({"data": data, "labels": labels}), data, labels


def dump_python_2(value):
    """Write a pickle as Python 2 and NumPy 1 wrote the real files: text and bytes as ``str``."""

    def write(value):
        if isinstance(value, np.ndarray):
            dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
            dtype += b"J\xff\xff\xff\xffK\x00tb"
            empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            raw = value.tobytes()
            shape = b"".join(b"J" + size.to_bytes(4, "little") for size in value.shape) + b"\x86"
            state = b"(K\x01" + shape + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw
            return empty + state + b"tb"
        if isinstance(value, str):
            return b"U" + bytes([len(value)]) + value.encode()
        if isinstance(value, int):
            return b"K" + bytes([value])
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        return b"}(" + b"".join(write(part) for item in value.items() for part in item) + b"u"

    return b"\x80\x02" + write(value) + b"."


def dump_python_3(value):
    """Write a pickle with keys as bytes, by the very NumPy that is installed."""
    return pickle.dumps({key.encode(): part for key, part in value.items()}, protocol=2)


@pytest.fixture(params=[dump_python_2, dump_python_3])
def small(request):
    """An archive of two training batches and a test batch, and what is in it."""
    dump = request.param
    files = {f"data_batch_{i}": batch_file(6, i, dump) for i in (1, 2)}
    files["test_batch"] = batch_file(4, 9, dump)
    blobs = {name: content[0] for name, content in files.items()}
    blobs["batches.meta"] = dump({"label_names": NAMES})
    return archive_of(blobs), files


def archive_of(blobs):
    """Return an archive of these files, and its bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, blob in blobs.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
        stray = tarfile.TarInfo("../../escaped")
        stray.size = 3
        tar.addfile(stray, io.BytesIO(b"out"))
    md5 = {name: hashlib.md5(blob).hexdigest() for name, blob in blobs.items()}
    archive = CifarArchive(
        url="",
        filename="cifar-10-python.tar.gz",
        md5=hashlib.md5(stream.getvalue()).hexdigest(),
        train={name: md5[name] for name in ("data_batch_1", "data_batch_2")},
        test={"test_batch": md5["test_batch"]},
        meta={"batches.meta": md5["batches.meta"]},
    )
    return archive, stream.getvalue()


@pytest.fixture
def served(small, tmp_path):
    """Serve the archive on loopback, and count the requests."""
    (archive, data), files = small
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / archive.filename).write_bytes(data)
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "www"))

        def log_request(self, *arguments):
            requests.append(self.path)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{archive.filename}"
        yield dataclasses.replace(archive, url=url), requests, files
        server.shutdown()


def test_it_is_downloaded_verified_and_read(served, tmp_path):
    archive, requests, files = served
    root = tmp_path / "data"
    heard = []
    data = load_cifar10(root, archive=archive, on_progress=heard.append)
    assert data.class_names == tuple(NAMES)
    assert (len(data.train), len(data.test)) == (12, 4)
    assert data.train.ids[7] == "train/00007"
    expected = files["data_batch_2"][1][1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(data.train.images[7]), expected)
    assert data.train.labels.tolist() == files["data_batch_1"][2] + files["data_batch_2"][2]
    assert heard[-1].done == heard[-1].total and heard[-1].unit == "B"
    assert not (tmp_path / "escaped").exists() and not (root.parent.parent / "escaped").exists()

    again = load_cifar10(root, archive=archive)
    assert again.digest == data.digest
    assert len(requests) == 1, "a second call must not download"


def test_an_archive_that_is_there_is_used(small, tmp_path):
    (archive, data), _ = small
    (tmp_path / archive.filename).write_bytes(data)
    nowhere = dataclasses.replace(archive, url="http://127.0.0.1:9/none")
    assert len(load_cifar10(tmp_path, archive=nowhere).train) == 12


def test_a_wrong_checksum_leaves_nothing(served, tmp_path):
    archive, _, _ = served
    root = tmp_path / "data"
    wrong = dataclasses.replace(archive, md5="0" * 32)
    with pytest.raises(DatasetError, match="0" * 32):
        load_cifar10(root, archive=wrong)
    assert not [path for path in root.rglob("*.tar.gz*") if "lock" not in path.name]
    assert not (root / archive.folder).exists()


def test_a_damaged_archive_that_is_there_is_refused(small, tmp_path):
    (archive, data), _ = small
    (tmp_path / archive.filename).write_bytes(data[:-1])
    with pytest.raises(DatasetError, match=rf"expected MD5 {archive.md5}, found .*; delete"):
        load_cifar10(tmp_path, archive=archive)


def test_a_damaged_file_is_unpacked_again(small, tmp_path):
    (archive, data), _ = small
    (tmp_path / archive.filename).write_bytes(data)
    digest = load_cifar10(tmp_path, archive=archive).digest
    (tmp_path / archive.folder / "test_batch").write_bytes(b"cut short")
    assert load_cifar10(tmp_path, archive=archive).digest == digest


def test_no_network_and_no_archive(small, tmp_path):
    (archive, _), _ = small
    nowhere = dataclasses.replace(archive, url="http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(DatasetError, match=r"127\.0\.0\.1:9.*; without a network: digits --w"):
        load_cifar10(tmp_path, archive=nowhere)


def test_the_real_checksums_are_complete():
    assert len(CIFAR10.train) == 5 and len(CIFAR10.members) == 7
    assert CIFAR10.md5 == "c58f30108f718f92721af3b95e74349a"
    assert all(len(bytes.fromhex(md5)) == 16 for md5 in CIFAR10.members.values())


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda path: {"data": Attack(path), "labels": [0]}, "expected a batch of CIFAR-10 alone"),
        (
            lambda _: {"data": np.zeros((1, 3072), np.float32), "labels": [0]},
            "float32|array of uint8",
        ),
        (
            lambda _: {"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]},
            "found labels of shape",
        ),
        (lambda _: {"data": np.zeros((1, 3071), np.uint8), "labels": [0]}, "reshape"),
        (lambda _: {"data": np.zeros((1, 3072), np.uint8), "labels": [7]}, "found 7 in row 0"),
        (lambda _: {"labels": [0]}, "found others .'data'"),
        (lambda _: [1], "expected a dictionary"),
    ],
)
def test_other_pickles_are_refused_and_never_run(tmp_path, content, reason):
    """Even where the checksums are those of the file."""
    written = tmp_path / "written"
    batch = pickle.dumps(content(written), protocol=2)
    blobs = {"data_batch_1": batch, "data_batch_2": batch, "test_batch": batch}
    blobs["batches.meta"] = pickle.dumps({"label_names": NAMES}, protocol=2)
    archive, data = archive_of(blobs)
    (tmp_path / archive.filename).write_bytes(data)
    with pytest.raises(DatasetError, match=reason) as caught:
        load_cifar10(tmp_path, archive=archive)
    assert "\n" not in str(caught.value)
    assert not written.exists()
