"""Data sets and caches behind URLs: a real S3 server on this machine, and fsspec's memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from caches import content
from conftest import write_gaussian_cache
from test_import import loaded_after
from test_shard_jobs import assert_same

from featcache import extract, extract_share, load, load_dataset, pack, probe, verify
from featcache import remote as _place
from featcache.cli import main
from featcache.datasets import urls as _remote
from featcache.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissError,
    DatasetError,
    OutputError,
    RemoteError,
)
from featcache.extraction import extract as extraction
from featcache.remote import RemotePlace, is_url, located, shown
from featcache.store.remote_caches import cache_file

STARTER = {"weights": "tinyimagenet32", "reuse": False}  # what is compared is made twice
SLOW_EXTRACT = Path(__file__).with_name("slow_extract.py")
REMOTE = {"fsspec", "s3fs", "aiohttp", "botocore"}
# What a store is asked before a cache is read: for the cache, and for a table beside it.
LOOKED = {"HEAD": 2, "LIST": 1}


# What needs no package: URLs themselves, and what happens where fsspec is missing.


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("s3://bucket/photos", True),
        ("https://host/x.zip", True),
        ("file:///photos", True),
        ("photos", False),
        ("C://photos", False),
        ("s3:/bucket", False),
        ("cifar10", False),
        (Path("s3://bucket"), False),
        (None, False),
    ],
)
def test_what_is_a_url(text, answer):
    assert is_url(text) is answer


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://bucket/a b/c?d", "s3://bucket/a b/c?d"),
        ("s3://KEY:SECRET@bucket/photos", "s3://bucket/photos"),
        ("https://me:SECRET@host/x.zip?X-Amz-Signature=SECRET", "https://host/x.zip"),
        ("https://host/x.zip#SECRET", "https://host/x.zip"),
        ("https://TOKEN@host/x.zip", "https://host/x.zip"),
        ("sftp://me@host/photos", "sftp://me@host/photos"),
        ("s3://bucket/a:b@c.jpg", "s3://bucket/a:b@c.jpg"),
        ("photos", "photos"),
    ],
)
def test_secrets_are_not_shown(url, told):
    assert shown(url) == told


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hunter2@bucket/photos",
        "sftp://me:hunter2@host/photos",
        "http://hunter2@host/photos",
    ],
)
@pytest.mark.parametrize("use", [load_dataset, load, extract, located, RemotePlace])
def test_a_password_in_a_url_is_refused_and_not_repeated(url, use, home):
    with pytest.raises(
        RemoteError, match=r"//(bucket|host)/photos: expected a URL without"
    ) as caught:
        use(url)
    assert "hunter2" not in str(caught.value)
    assert not any(home.rglob("*"))


@pytest.mark.parametrize(
    ("url", "sibling", "inside"),
    [
        ("https://h/a/b.zip?sig=1/2", "https://h/a/c.h5?sig=1/2", "https://h/a/b.zip/c.h5?sig=1/2"),
        ("http://h/a/b/", "http://h/a/c.h5", "http://h/a/b/c.h5"),
        ("s3://bucket/a/b?.h5", "s3://bucket/a/c.h5", "s3://bucket/a/b?.h5/c.h5"),
    ],
)
def test_the_query_that_signs_a_url_is_kept(url, sibling, inside):
    place = RemotePlace(url)
    assert place.parent.within("c.h5").url == sibling
    assert place.within("c.h5").url == inside


def test_a_url_that_went_through_pathlib_is_told_of(home):
    for use in (load_dataset, load):
        with pytest.raises(
            RemoteError, match=r"s3:/bucket/x: expected a URL as text, found a path"
        ):
            use(Path("s3://bucket/x"))


def test_other_outputs_than_those_of_extract_are_no_urls(
    capsys, small_cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    other = write_gaussian_cache(tmp_path / "other.h5", dataset_digest="1" * 64)
    for command in (
        ["merge", "--prefix", str(small_cache), str(other), "-o", "s3://bucket/x.h5"],
        ["export", str(small_cache), "-o", "s3://bucket/x.npz"],
    ):
        assert main(command) == 1
        assert "error: s3:/bucket/x" in (said := capsys.readouterr().err) and "found a URL" in said
    assert not (tmp_path / "s3:").exists()


def test_a_file_url_is_a_path(image_folder, small_cache, tmp_path):
    spaced = tmp_path / "with space"
    shutil.copytree(image_folder, spaced)
    assert load_dataset(spaced.as_uri()).digest == load_dataset(image_folder).digest
    assert load(small_cache.as_uri()).path == small_cache


def test_paths_load_nothing_for_urls(image_folder, small_cache):
    code = (
        f"import featcache\nfeatcache.load_dataset({str(image_folder)!r}).digest\n"
        f"featcache.load({str(small_cache)!r}).train.features"
    )
    assert loaded_after(code).isdisjoint(REMOTE)
    assert loaded_after("from featcache.cli import main\nmain(['--help'])").isdisjoint(REMOTE)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "s3://bucket/photos",
            r"s3://bucket/photos: cannot be opened: .*pip install 'featcache\[s3\]'",
        ),
        ("gs://bucket/photos", r"pip install fsspec gcsfs"),
    ],
)
def test_without_the_package_it_is_named(monkeypatch, url, said):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(RemoteError, match=said):
        load_dataset(url)


# fsspec's memory: the whole way, without a server.


@pytest.fixture
def memory():
    """An empty store in this process."""
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec")
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield store
    store.store.clear()


def put_folder(store, folder, root):
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def zipped(folder, path, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def assert_same_dataset(one, other):
    assert (one.name, one.digest) == (other.name, other.digest)
    for (_, a), (_, b) in zip(one.splits(), other.splits(), strict=True):
        assert a.ids == b.ids and a.class_names == b.class_names
        assert a.labels.tolist() == b.labels.tolist()
        assert a.images[3].tobytes() == b.images[3].tobytes()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_in_memory(memory, image_folder, tmp_path, compression):
    path = zipped(image_folder, tmp_path / "colours.zip", compression)
    memory.pipe_file("/data/colours.zip", path.read_bytes())
    assert_same_dataset(load_dataset("memory://data/colours.zip"), load_dataset(path))


def test_an_archive_with_a_long_directory(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(_remote, "_TAIL_BYTES", 1000)
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(400):
            archive.writestr(f"{'ab'[number % 2]}/{number:03d}.png", str(number) * 9)
        archive.comment = b"of some length" * 20
    memory.pipe_file("/set.zip", path.read_bytes())
    assert load_dataset("memory://set.zip").digest == load_dataset(path).digest


def test_a_folder_in_memory_to_a_cache_in_memory(memory, image_folder, fake_engine, tmp_path):
    put_folder(memory, image_folder, "/data/colours")
    assert_same_dataset(load_dataset("memory://data/colours"), load_dataset(image_folder))
    local = extract(image_folder, output=tmp_path / "local/", **STARTER)
    made = extract("memory://data/colours", output="memory://caches/", **STARTER)
    assert made.cache == f"memory://caches/{local.cache.name}" and not made.reused
    assert memory.ls("/caches", detail=False) == [f"/caches/{local.cache.name}"]
    assert_same_but_source(local.cache, made.load().path)
    assert extract("memory://data/colours", output="memory://caches/", **STARTER).reused


def assert_same_but_source(one, other):
    """Assert that two caches are the same to the byte but for where the images were."""
    assert content(load(one).path) == content(load(other).path)
    assert load(one).fingerprint == load(other).fingerprint


def test_a_cache_is_fetched_in_order_whatever_the_number_of_requests(
    memory, small_cache, monkeypatch
):
    monkeypatch.setattr(_place, "_CHUNK_BYTES", 1000)
    memory.pipe_file("/caches/small.h5", small_cache.read_bytes())
    heard = []
    copy = cache_file("memory://caches/small.h5", heard.append)
    assert copy.read_bytes() == small_cache.read_bytes() and verify(copy).n_train == 120
    assert [one.done for one in heard] == sorted(one.done for one in heard) and len(heard) > 20
    assert heard[-1].done == heard[-1].total == small_cache.stat().st_size
    memory.pipe_file("/caches/small.h5", small_cache.read_bytes()[:-5000])
    with pytest.raises(CacheCorruptError, match="expected a whole cache"):
        load("memory://caches/small.h5")


def test_what_is_no_data_set(memory, image_folder, tmp_path):
    memory.pipe_file("/data/notes.txt", b"x")
    memory.pipe_file("/data/broken.zip", b"no archive" * 99)
    memory.pipe_file("/data/empty.zip", b"")
    for url, said in (
        (
            "memory://nothing",
            "memory://nothing: expected a folder of class folders or a .zip of one, "
            "found nothing there",
        ),
        ("memory://nothing.zip", "found nothing there"),
        ("memory://data", r"memory://data: expected class folders .*found 3 files, none"),
        ("memory://data/notes.txt", "not a readable zip archive"),
        ("memory://data/broken.zip", "not a readable zip archive"),
        ("memory://data/empty.zip", "not a readable zip archive"),
        (
            "bogus://data",
            r"bogus://data: expected a URL of a protocol that fsspec knows .* 'bogus'",
        ),
    ):
        with pytest.raises((DatasetError, RemoteError), match=said) as caught:
            load_dataset(url)
        assert "\n" not in str(caught.value)


@contextmanager
def serving(get=None, **attributes):
    """Run a web server whose GET is answered by ``get``, by default with files; yield its URL."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    if get is not None:
        Handler.do_GET = Handler.do_HEAD = get
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, **attributes)) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{web.server_port}"
        finally:
            web.shutdown()
            thread.join()


# A real S3 server on this machine, by s3fs.


class Server:
    """An S3 server that counts what it is asked, and can be told to refuse."""

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_):
                pass

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.asked = []
        self.refuse = lambda method, path: False

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.asked.append((method, path, environ.get("HTTP_RANGE", "")))
        if self.refuse(method, path):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"]
        return self._app(environ, start_response)

    def counted(self):
        """Return how often each method was asked for, listings apart, and forget it."""
        kinds = Counter(
            "LIST" if method == "GET" and path.strip("/").count("/") == 0 else method
            for method, path, _ in self.asked
        )
        self.asked.clear()
        return dict(kinds)

    def stop(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'featcache[s3]'")
    pytest.importorskip("moto", reason="needs moto[server]")
    made = Server()
    yield made
    made.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """The server with an empty bucket, and credentials for it."""
    import boto3
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    server.refuse = lambda method, path: False
    bucket = boto3.resource("s3").create_bucket(Bucket="bucket")
    server.bucket = bucket
    server.asked.clear()
    yield server
    server.refuse = lambda method, path: False
    bucket.objects.all().delete()
    bucket.delete()


@pytest.fixture
def photos(s3, image_folder):
    """The images of `image_folder` in the bucket."""
    for path in sorted(image_folder.rglob("*.png")):
        s3.bucket.put_object(
            Key=f"photos/colours/{path.relative_to(image_folder).as_posix()}",
            Body=path.read_bytes(),
        )
    s3.asked.clear()
    return "s3://bucket/photos/colours"


def keys(s3):
    return sorted(item.key for item in s3.bucket.objects.all())


@pytest.mark.s3
class TestOnS3:
    def test_a_folder_is_what_it_is_on_the_disk(self, s3, photos, image_folder):
        found = load_dataset(photos)
        assert s3.counted() == {"LIST": 1}
        assert_same_dataset(found, load_dataset(image_folder))
        assert found.train.images.files.place.url == photos
        assert load_dataset(f"{photos}/").name == "colours"

    def test_one_request_per_image(self, s3, photos, image_folder, fake_engine, tmp_path):
        local = extract(image_folder, output=tmp_path / "local/", **STARTER)
        made = extract(photos, output=tmp_path / "s3/", **STARTER)
        assert s3.counted() == {"LIST": 1, "GET": 54}
        assert made.cache.name == local.cache.name and not made.reused
        assert_same_but_source(local.cache, made.cache)
        again = extract(photos, output=tmp_path / "s3/", **STARTER)
        assert again.reused and s3.counted() == {"LIST": 1, "GET": 54}

    def test_views_limits_shares_and_images_that_do_not_decode(
        self, s3, photos, image_folder, fake_engine, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
        torn = tmp_path / "torn"
        shutil.copytree(image_folder, torn)
        for name, data in (("train/blue/03.png", b"no image"), ("train/red/00.png", b"")):
            (torn / name).write_bytes(data)
            s3.bucket.put_object(Key=f"photos/colours/{name}", Body=data)
        options = {**STARTER, "views": "flips", "on_error": "skip", "batch_size": 3}
        local = extract(torn, output=tmp_path / "a.h5", **options)
        s3.asked.clear()
        made = extract(photos, output=tmp_path / "b.h5", **options)
        assert s3.counted() == {"LIST": 1, "GET": 54} and made.n_skipped == 2
        assert content(made.cache) == content(local.cache)
        for number in (2, 1):
            extract_share(photos, share=(number, 2), output=tmp_path / "c.h5", **options)
        assert s3.counted() == {"LIST": 2, "GET": 54}
        assert_same(made.cache, pack(tmp_path / "c.h5").cache)

    def test_an_archive_is_read_by_ranges(self, s3, image_folder, fake_engine, tmp_path):
        path = zipped(image_folder, tmp_path / "colours.zip")
        s3.bucket.put_object(Key="colours.zip", Body=path.read_bytes())
        s3.asked.clear()
        local = extract(path, output=tmp_path / "local/", **STARTER)
        made = extract("s3://bucket/colours.zip", output=tmp_path / "s3/", **STARTER)
        asked = list(s3.asked)
        counts = s3.counted()
        assert counts.pop("HEAD") <= 2 and counts == {"GET": 1 + 54}
        assert all(spread.startswith("bytes=") for method, _, spread in asked if method == "GET")
        assert_same_but_source(local.cache, made.cache)

    def test_an_image_that_is_gone_or_refused(self, s3, photos, fake_engine, tmp_path):
        found = load_dataset(photos)
        s3.bucket.Object("photos/colours/train/blue/03.png").delete()
        with pytest.raises(
            DatasetError, match=r"/blue/03\.png: cannot be read: it is not there any"
        ):
            extract(found, output=tmp_path / "a.h5", **STARTER)
        made = extract(found, output=tmp_path / "a.h5", on_error="skip", **STARTER)
        assert made.n_skipped == 1
        s3.refuse = lambda method, path: path.endswith("green/07.png")
        with pytest.raises(RemoteError, match=r"green/07\.png: cannot be read: expected the right"):
            extract(found, output=tmp_path / "b.h5", on_error="skip", **STARTER)

    def test_a_thousand_and_more_are_listed_in_pages(self, s3):
        from moto.s3.models import s3_backends

        store = s3_backends["123456789012"]["aws"]
        for number in range(1205):
            store.put_object("bucket", f"many/{'ab'[number % 2]}/{number:04d}.png", b"x")
        found = load_dataset("s3://bucket/many")
        assert [len(split) for split in found.listed()] == [1205]
        assert s3.counted() == {"LIST": 2}

    def test_strange_keys(self, s3, photos, image_folder):
        before = load_dataset(photos).digest
        for key, data in {
            "photos/colours/": b"",
            "photos/colours/train/": b"",
            "photos/colours/train/blue/": b"",
            "photos/colours/../secret.png": b"x",
            "photos/colours/train/../../x.png": b"x",
            "photos/colours/.hidden/x.png": b"x",
            "photos/colours/train/blue/notes.txt": b"x",
            "photos/colours/train/blue/photo.heic": b"x",
            "photos/colours2/train/blue/1.png": b"x",
            "photos/coloursx": b"x",
        }.items():
            s3.bucket.put_object(Key=key, Body=data)
        found = load_dataset(photos)
        assert found.digest == before
        assert [note for note in found.notes if "1 file ignored: .heic 1" in note]
        s3.bucket.put_object(Key="photos/colours/train/violet/", Body=b"")
        with pytest.raises(DatasetError, match=r"'train/violet'"):
            load_dataset(photos)
        s3.bucket.Object("photos/colours/train/violet/").delete()
        s3.bucket.put_object(Key="photos/colours//train/blue/1.png", Body=b"x")
        with pytest.raises(DatasetError, match=r"between two slashes, found '/train/blue/1\.png'"):
            load_dataset(photos)

    @pytest.mark.parametrize("name", ["a b", "ä", "100%", "a+b", "a?b", "a#b", "a[1]*", "a::b"])
    def test_names_are_taken_as_they_are(self, s3, image_folder, name):
        for number, path in enumerate(sorted(image_folder.rglob("train/*/0[0-3].png"))):
            s3.bucket.put_object(
                Key=f"{name}/{number % 2}{name}/{number}.png", Body=path.read_bytes()
            )
        found = load_dataset(f"s3://bucket/{name}")
        assert found.class_names == (f"0{name}", f"1{name}")
        assert found.train.images[0].size == (40, 32)

    def test_output_and_a_second_run(self, s3, photos, fake_engine, tmp_path, capsys, image_folder):
        local = extract(image_folder, output=tmp_path / "local/", **STARTER)
        command = ["extract", photos, "-o", "s3://bucket/caches/colours.h5", *starter_words()]
        assert main(command) == 0
        said = capsys.readouterr()
        assert said.out.startswith("s3://bucket/caches/colours.h5: 54 x 8 features in")
        assert "is a copy, which may be deleted" in said.err
        counts = s3.counted()
        assert counts["GET"] == 54 and counts["PUT"] == 2, "the cache, and one trial"
        assert keys(s3)[0] == "caches/colours.h5"
        s3.bucket.download_file("caches/colours.h5", str(tmp_path / "back.h5"))
        assert_same_but_source(local.cache, tmp_path / "back.h5")
        # read through the copy that was made
        s3.asked.clear()
        cache = load("s3://bucket/caches/colours.h5")
        assert s3.counted() == LOOKED and content(cache.path) == content(local.cache)
        calls = sum(engine.calls for engine in fake_engine)
        # again, here and on another machine
        assert main(command) == 0
        assert "already there" in capsys.readouterr().out
        shutil.rmtree(os.environ["FEATCACHE_DIR"])
        s3.asked.clear()
        assert main(command) == 0
        assert "already there" in capsys.readouterr().out
        asked = s3.counted()
        assert "PUT" not in asked and asked["GET"] == 54 + 2, "the images, and the cache's index"
        assert sum(engine.calls for engine in fake_engine) == calls
        assert not list(Path(os.environ["FEATCACHE_DIR"]).rglob("*.h5"))

    def test_local_images_to_a_bucket(self, s3, image_folder, fake_engine, tmp_path):
        made = extract(image_folder, output="s3://bucket/caches/", **STARTER)
        assert made.cache.startswith("s3://bucket/caches/colours-resnet18-tinyimagenet32-64-")
        s3.asked.clear()
        made.load()
        assert s3.counted() == LOOKED, "what was made here is its own copy"
        assert extract(image_folder, output="s3://bucket/caches/", **STARTER).reused
        assert keys(s3) == [made.cache.removeprefix("s3://bucket/")]
        other = {**STARTER, "train_limit": 9, "test_limit": 9}
        with pytest.raises(CacheMismatchError, match=r"s3://bucket/caches/.*dataset_digest: found"):
            extract(image_folder, output=made.cache, **other)
        replaced = extract(image_folder, output=made.cache, force=True, **other)
        assert load(replaced.cache).train.features.shape == (9, 8)

    def test_shards_and_their_manifest_last(self, s3, image_folder, fake_engine, monkeypatch):
        monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
        made = extract(image_folder, output="s3://bucket/colours.shards", **STARTER)
        assert made.cache == "s3://bucket/colours.shards"
        puts = [path for method, path, _ in s3.asked if method == "PUT"]
        assert puts[-1] == "/bucket/colours.shards/manifest.json" and len(puts) == 2 + 8 * 4
        assert verify(made.cache).n_train == 36
        shutil.rmtree(os.environ["FEATCACHE_DIR"])
        s3.asked.clear()
        assert verify(made.cache).n_train == 36
        assert s3.counted()["GET"] == 8 * 4 + 1
        assert extract(image_folder, output="s3://bucket/colours.h5", **STARTER).reused
        s3.refuse = lambda method, path: method == "PUT" and "test-000000000008" in path
        with pytest.raises(OutputError, match="the right to do so"):
            extract(image_folder, output="s3://bucket/colours.shards", force=True, **STARTER)
        assert "colours.shards/manifest.json" not in keys(s3)
        s3.refuse = lambda method, path: False
        with pytest.raises(CacheMissError, match="found nothing there"):
            load("s3://bucket/colours.shards")
        calls = sum(engine.calls for engine in fake_engine)
        extract(image_folder, output="s3://bucket/colours.shards", **STARTER)
        assert sum(engine.calls for engine in fake_engine) == calls
        assert verify("s3://bucket/colours.shards").n_test == 18

    def test_an_upload_that_fails_keeps_the_cache(self, s3, photos, fake_engine, capsys):
        s3.refuse = lambda method, path: method == "PUT" and path.endswith("/x.h5")
        command = ["extract", photos, "-o", "s3://bucket/x.h5", *starter_words()]
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "error: s3://bucket/x.h5: cannot be written: expected the right" in said
        assert "x.h5; the same command only uploads it" in said
        (kept,) = Path(os.environ["FEATCACHE_DIR"]).rglob("x.h5")
        assert str(kept) in said and verify(kept).n_train == 36
        s3.refuse = lambda method, path: False
        assert main(command) == 0
        assert len(fake_engine) == 1 and keys(s3)[-1] == "x.h5"
        assert verify("s3://bucket/x.h5").n_test == 18

    def test_a_bucket_that_cannot_be_written_is_told_of_first(self, s3, photos, fake_engine):
        s3.refuse = lambda method, path: method == "PUT"
        with pytest.raises(RemoteError, match=r"x\.h5: cannot be written: expected the right"):
            extract(photos, output="s3://bucket/x.h5", **STARTER)
        with pytest.raises(
            RemoteError, match=r"cannot be .*: expected a bucket of that name, found"
        ):
            extract(photos, output="s3://nobody/x.h5", **STARTER)
        assert not fake_engine

    @pytest.mark.slow
    def test_a_killed_run_goes_on(self, s3, photos, fake_engine, tmp_path):
        output = "s3://bucket/caches/"
        arguments = ["extract", photos, "-o", output, *starter_words("--batch-size", "2")]
        run = [sys.executable, str(SLOW_EXTRACT)]
        killed = subprocess.Popen(
            [*run, "0.1", "0", "8", "0", *arguments], stdout=subprocess.PIPE, text=True
        )
        assert killed.stdout.readline() == "ready\n"
        parts = Path(os.environ["FEATCACHE_DIR"])
        while len(list(parts.rglob("train-*.json"))) < 2:
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        killed.stdout.close()
        assert not [key for key in keys(s3) if key.startswith("caches/")]
        answer = subprocess.run(
            [*run, "0", "0", "8", "0", *arguments], capture_output=True, text=True, check=True
        )
        assert "resuming after" in answer.stderr
        (key,) = (key for key in keys(s3) if key.startswith("caches/"))
        assert verify(f"s3://bucket/{key}").n_train == 36

    def test_reading_fetches_once(self, s3, small_cache, capsys, tmp_path):
        s3.bucket.upload_file(str(small_cache), "small.h5")
        s3.asked.clear()
        assert main(["info", "s3://bucket/small.h5", "--json"]) == 0
        said = capsys.readouterr()
        facts = json.loads(said.out)
        assert facts["n_train"] == 120 and "s3://bucket/small.h5: copied to" in said.err
        copy = Path(facts["cache"])
        assert copy.read_bytes() == small_cache.read_bytes()
        assert s3.counted() == {**LOOKED, "GET": 1}
        for command in (["probe", "--no-check"], ["verify"], ["probe", "--knn", "3"], ["audit"]):
            assert main([command[0], "s3://bucket/small.h5", *command[1:]]) == 0, command
        assert s3.counted() == {"HEAD": 8, "LIST": 4}
        assert main(["diff", "s3://bucket/small.h5", str(small_cache)]) == 0
        assert probe("s3://bucket/small.h5", check=False).top1 > 0.5
        other = write_gaussian_cache(tmp_path / "other.h5", seed=5)
        s3.bucket.upload_file(str(other), "small.h5")
        cache = load("s3://bucket/small.h5", mmap=True)
        assert cache.path == copy and copy.read_bytes() == other.read_bytes()
        s3.bucket.Object("small.h5").delete()
        with pytest.raises(
            CacheMissError, match=r"s3://bucket/small\.h5: expected a feature cache"
        ):
            load("s3://bucket/small.h5")
        capsys.readouterr()

    def test_other_ingredients_in_a_folder_cost_no_second_reading(
        self, s3, photos, fake_engine, tmp_path
    ):
        for output in ("s3://bucket/caches/", tmp_path / "caches"):
            extract(photos, output=output, **STARTER)
            s3.counted()
            made = extract(photos, output=output, views="flips", **STARTER)
            assert s3.counted()["GET"] <= 54 + 2 and not made.reused, "the other's index"

    def test_predict_and_the_pictures_of_a_report(self, s3, photos, image_folder, tmp_path):
        pytest.importorskip("openvino")
        from featcache import predict
        from featcache.reporting.pictures import find_pictures

        made = extract(photos, output="s3://bucket/x.h5", engine="openvino", **STARTER)
        head = probe(made.cache, check=False).head
        s3.asked.clear()
        found = predict([f"{photos}/test/red", f"{photos}/test/blue/01.png"], head)
        assert s3.counted() == {"LIST": 1, "GET": 7}
        local = predict([image_folder / "test/red", image_folder / "test/blue/01.png"], head)
        assert [one.probability for one in found] == [one.probability for one in local]
        assert found[-1].path == f"{photos}/test/blue/01.png"
        pictures, why = find_pictures(made.load(), photos, None, lambda _: None)
        assert not why and len(pictures.small([("train", 3)], 64, lambda _: None)) == 1

    def test_the_same_by_https_and_a_signature_that_stays_secret(
        self, s3, image_folder, fake_engine, tmp_path
    ):
        path = zipped(image_folder, tmp_path / "colours.zip")
        s3.bucket.put_object(Key="colours.zip", Body=path.read_bytes(), ACL="public-read")
        url = f"{s3.url}/bucket/colours.zip"
        notes = []
        made = extract(f"{url}?x-id=hunter2", on_note=notes.append, **STARTER)
        assert made.load().meta["dataset_source"] == f"{url}, train/ and test/ as given"
        local = extract(path, output=tmp_path / "local/", **STARTER)
        assert_same_but_source(local.cache, made.cache)
        for file in Path(os.environ["FEATCACHE_DIR"]).rglob("*"):
            assert file.is_dir() or b"hunter2" not in file.read_bytes()
        with pytest.raises(DatasetError, match=f"{url}x.zip: expected") as caught:
            load_dataset(f"{url}x.zip?x-id=hunter2")
        assert "hunter2" not in str(caught.value) + "".join(notes)
        with pytest.raises(RemoteError, match="found a web server; name a path"):
            extract(path, output=f"{s3.url}/bucket/x.h5", **STARTER)

    def test_a_server_that_knows_no_ranges(self, s3, image_folder, tmp_path):
        path = zipped(image_folder, tmp_path / "colours.zip")
        with path.open("ab") as stream:
            stream.write(bytes(200_000))
        said = "expected a server that sends parts of a file"
        with serving(directory=str(tmp_path)) as web, pytest.raises(RemoteError, match=said):
            load_dataset(f"{web}/colours.zip")

    def test_what_is_no_cache_is_not_fetched(self, s3, photos):
        for name, data in {
            "big.h5": bytes(99),
            "empty.h5": b"",
            "torn.h5": b"featcache 1 x",
        }.items():
            s3.bucket.put_object(Key=name, Body=data)
            with pytest.raises(CacheCorruptError, match=name):
                load(f"s3://bucket/{name}")
        with pytest.raises(CacheMissError, match="found nothing there"):
            load(photos)
        with pytest.raises(CacheCorruptError, match=r"big\.h5: .* --force"):
            extract(photos, output="s3://bucket/big.h5", **STARTER)

    @pytest.mark.parametrize("output", ["s3://bucket/caches/x.h5", "s3://bucket/caches/"])
    def test_jobs_share_nothing_but_the_bucket(
        self, s3, photos, image_folder, fake_engine, tmp_path, monkeypatch, output
    ):
        monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
        local = extract(image_folder, output=tmp_path / "local/", **STARTER).cache
        s3.asked.clear()
        for number in (3, 1, 2):
            monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / f"machine {number}"))
            part = extract_share(photos, share=(number, 3), output=output, **STARTER)
            images = [path for method, path, _ in s3.asked if path.endswith(".png")]
        assert len(images) == len(set(images)) == 54
        assert part.n_shards_there == part.n_shards_wanted == 8
        assert part.next_step == f"featcache pack {output}"
        assert str(part.output).startswith("s3://bucket/caches/") and ".h5.parts" in part.folder
        with pytest.raises(CacheMismatchError, match="views: found"):
            extract_share(photos, share=(1, 3), output=part.output, views="flips", **STARTER)
        monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "machine 4"))
        made = pack(output)
        assert made.cache.endswith("x.h5") or made.cache.endswith(local.name)
        assert_same_but_source(local, made.cache)
        assert [f"s3://bucket/{key}" for key in keys(s3) if "photos/" not in key] == [made.cache]
        assert pack(made.cache).reused
        assert extract(photos, output=output, **STARTER).reused
        with pytest.raises(OutputError, match=r"\.h5: expected a name for a new cache"):
            extract_share(photos, share=(1, 3), output=made.cache, **STARTER)

    def test_jobs_divide_an_undivided_data_set(
        self, s3, photos, image_folder, fake_engine, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
        options = {"views": "flips", **STARTER}
        local = extract(image_folder / "train", output=tmp_path / "local.h5", **options).cache
        s3.asked.clear()
        for number in (2, 1):
            monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / f"machine {number}"))
            share = {"share": (number, 2), "output": "s3://bucket/x.h5", **options}
            extract_share(f"{photos}/train", **share)
        images = [path for method, path, _ in s3.asked if path.endswith(".png")]
        assert len(images) == len(set(images)) == 36, "one request per image"
        monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "machine 3"))
        assert extract_share(f"{photos}/train", **share).n_resumed == 16
        assert_same_but_source(local, pack("s3://bucket/x.h5").cache)
        assert [key for key in keys(s3) if "photos/" not in key] == ["x.h5"]

    def test_a_job_that_is_lost_is_gone_on_with_on_another_machine(
        self, s3, photos, image_folder, fake_engine, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
        local = extract(image_folder, output=tmp_path / "local.h5", **STARTER).cache
        output = "s3://bucket/x.h5"
        for where in ("here", "there"):
            monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / where))
            s3.refuse = lambda method, path: method == "PUT" and "000000000016" in path
            options = {"share": (1, 2), "output": output, **STARTER}
            with pytest.raises(RemoteError, match=r"of 32 images are kept, and the same command"):
                extract_share(photos, **options)
        s3.refuse = lambda method, path: False
        with pytest.raises(
            CacheMissError, match=r"--output s3://bucket/x\.h5 .*--shard 1/2"
        ) as caught:
            pack(output)
        assert f"featcache extract {photos} " in str(caught.value)
        monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "elsewhere"))
        assert extract_share(photos, **options).n_resumed == 16, "what had reached the bucket"
        monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "here"))
        assert extract_share(photos, **{**options, "share": (2, 2)}).n_resumed == 0
        assert_same_but_source(local, pack(output).cache)
        with pytest.raises(CacheMissError, match="expected the shards of jobs, found none"):
            pack("s3://bucket/y.h5")
        with pytest.raises(CacheMissError, match="expected the shards of jobs, found none"):
            pack("s3://bucket/caches/")

    @pytest.mark.ray
    @pytest.mark.slow
    def test_workers_of_a_cluster_open_the_url_themselves(
        self, s3, photos, image_folder, tmp_path, monkeypatch
    ):
        pytest.importorskip("openvino")
        pytest.importorskip("ray", reason="needs Ray: pip install 'featcache[ray]'")
        from featcache.extraction.ray import import_ray

        import_ray()
        from ray.cluster_utils import Cluster

        monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
        archive = zipped(image_folder, tmp_path / "colours.zip")
        s3.bucket.put_object(Key="colours.zip", Body=archive.read_bytes())
        options = {**STARTER, "engine": "openvino"}
        local = extract(image_folder, output=tmp_path / "local.h5", **options)
        # The nodes have the environment of this process, and with it the credentials.
        cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1)
            on_ray = {**options, "executor": "ray", "address": cluster.address}
            s3.asked.clear()
            made = extract(photos, output="s3://bucket/caches/a.h5", **on_ray)
            assert s3.counted()["GET"] == 54
            assert_same_but_source(local.cache, made.cache)
            made = extract("s3://bucket/colours.zip", output=tmp_path / "b.h5", **on_ray)
            assert s3.counted()["GET"] <= 54 + 3, "every opening of the archive is one"
            assert_same_but_source(local.cache, made.cache)
        finally:
            cluster.shutdown()

    def test_what_goes_wrong(self, s3, photos, monkeypatch):
        import s3fs

        with pytest.raises(RemoteError, match=r"s3:///photos: expected a bucket, found none"):
            load_dataset("s3:///photos")

        with pytest.raises(
            RemoteError, match=r"s3://nobody/x: cannot be listed: expected a bucket"
        ):
            load_dataset("s3://nobody/x")
        with pytest.raises(
            RemoteError, match=r"s3://nobody/x\.zip: .*expected a bucket of that name"
        ):
            load_dataset("s3://nobody/x.zip")
        with pytest.raises(
            DatasetError, match=r"s3://bucket/nothing: expected a folder .* nothing"
        ):
            load_dataset("s3://bucket/nothing")
        with pytest.raises(
            DatasetError, match=r"s3://bucket/no\.zip: expected a folder .* nothing"
        ):
            load_dataset("s3://bucket/no.zip")
        s3.refuse = lambda method, path: True
        with pytest.raises(RemoteError, match=r"the server refuses it .*set AWS_PROFILE"):
            load_dataset(photos)
        s3.refuse = lambda method, path: False
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(RemoteError, match=r"expected credentials, found none .*AWS_PROFILE"):
            load_dataset(photos)
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(RemoteError, match=r"expected credentials, found none .*\(nobody\)"):
            load_dataset(photos)
        monkeypatch.delenv("AWS_PROFILE")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(
            RemoteError, match=r"cannot be listed: .*127\.0\.0\.1:1.*AWS_ENDPOINT_URL"
        ):
            load_dataset(photos)
        s3fs.S3FileSystem.clear_instance_cache()


def starter_words(*more):
    return ("--weights", "tinyimagenet32", *more)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the server refuses it .401 "),
        (403, "the server refuses it .403 "),
        (500, "cannot be read: 500 "),
        (302, "cannot be read: "),
        (404, "found nothing there"),
    ],
)
def test_what_a_web_server_answers_is_what_is_said(status, said):
    pytest.importorskip("aiohttp")

    def answer(self):
        self.send_response(status, "why\x1b[2Jnot")
        self.send_header("Location", self.path)  # to itself, for ever
        self.send_header("Content-Length", "0")
        self.end_headers()

    with serving(answer) as web:
        url = f"{web}/x.h5"
        with pytest.raises((RemoteError, CacheMissError), match=said) as caught:
            load(url)
    assert "\x1b" not in str(caught.value)
    if status != 404:
        return
    with pytest.raises(RemoteError, match="cannot be read"):  # nobody listens any more
        load(url)


@pytest.mark.s3
def test_a_server_that_falls_silent_is_given_up(monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(_place, "_SILENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.h5"
        with pytest.raises(RemoteError, match=r"cannot be read: .*(no answer|[Tt]imeout)"):
            load(url)


def test_a_server_that_sends_without_an_end_is_left():
    pytest.importorskip("aiohttp")

    def answer(self):
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b"<a href='x'>" * 10_000)

    with serving(answer) as web:
        place = RemotePlace(f"{web}/photos")
        for use in (
            lambda: place.read("x.png", 10**6),
            lambda: place.read_range(5, 100),
            place.list_files,
        ):
            with pytest.raises(RemoteError, match=r"photos.*: expected a server that sends parts"):
                use()
