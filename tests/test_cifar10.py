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

pytestmark = pytest.mark.oneflow

NAMES = ["plane", "bird", "frog"]


def batch_file(rows, seed):
    """Return a batch as the original pickles it: rows of 3,072 bytes, channels first."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, 3072), np.uint8)
    labels = (np.arange(rows) % len(NAMES)).tolist()
    return pickle.dumps({"data": data, "labels": labels}, protocol=2), data, labels


@pytest.fixture
def small():
    """An archive of two training batches and a test batch, and what is in it."""
    files = {f"data_batch_{i}": batch_file(6, i) for i in (1, 2)}
    files["test_batch"] = batch_file(4, 9)
    blobs = {name: content[0] for name, content in files.items()}
    blobs["batches.meta"] = pickle.dumps({"label_names": NAMES}, protocol=2)
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
    return archive, stream.getvalue(), files


@pytest.fixture
def served(small, tmp_path):
    """Serve the archive on loopback, and count the requests."""
    archive, data, files = small
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
    archive, data, _ = small
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
    archive, data, _ = small
    (tmp_path / archive.filename).write_bytes(data[:-1])
    with pytest.raises(DatasetError, match=rf"expected MD5 {archive.md5}, found .*; delete"):
        load_cifar10(tmp_path, archive=archive)


def test_a_damaged_file_is_unpacked_again(small, tmp_path):
    archive, data, _ = small
    (tmp_path / archive.filename).write_bytes(data)
    digest = load_cifar10(tmp_path, archive=archive).digest
    (tmp_path / archive.folder / "test_batch").write_bytes(b"cut short")
    assert load_cifar10(tmp_path, archive=archive).digest == digest


def test_no_network_and_no_archive(small, tmp_path):
    archive, _, _ = small
    nowhere = dataclasses.replace(archive, url="http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(DatasetError, match=r"127\.0\.0\.1:9.*; without a network: digits --w"):
        load_cifar10(tmp_path, archive=nowhere)


def test_the_real_constants_are_flowvisions():
    from featcache.frameworks import import_flowvision

    theirs = import_flowvision().datasets.CIFAR10
    assert (CIFAR10.url, CIFAR10.filename, CIFAR10.md5) == (
        theirs.url,
        theirs.filename,
        theirs.tgz_md5,
    )
    assert [list(item) for item in CIFAR10.train.items()] == theirs.train_list
    assert [list(item) for item in CIFAR10.test.items()] == theirs.test_list
    assert CIFAR10.meta == {theirs.meta["filename"]: theirs.meta["md5"]}
