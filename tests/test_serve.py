"""`featcache serve`: what it answers, whom it refuses, and what it bears."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import ExitStack, suppress
from dataclasses import replace

import numpy as np
import pytest
from conftest import colour_image

pytest.importorskip("uvicorn")
from servers import parts, served, until

from featcache import extract, load, predict, probe
from featcache.cli import main
from featcache.errors import CacheMismatchError, OutputError, RecipeError
from featcache.prediction import Extractor, PredictOptions, load_extractor
from featcache.preprocess import Preprocess
from featcache.probes.head import Head, load_head
from featcache.serving.app import ServeOptions
from featcache.serving.batching import Batcher, Busy
from featcache.serving.server import bound

TOKEN = "0123456789abcdef"


def png(index=0, seed=7):
    buffer = io.BytesIO()
    colour_image(index, seed).save(buffer, "PNG")
    return buffer.getvalue()


def huge_png(width, height):
    """Return the head of a PNG of so many pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def made(image_folder, tmp_path_factory):
    """A cache of the folder with real features, and a head on it."""
    root = tmp_path_factory.mktemp("served")
    options = {"weights": "tinyimagenet32", "size": 32}
    cache = extract(image_folder, output=root / "colours.h5", **options).cache
    head = root / "colours.safetensors"
    probe(cache, save_head_to=head, check=False, runs=root / "runs")
    return cache, head


@pytest.fixture(scope="module")
def server(made, image_folder):
    cache, head = made
    with served(head, cache=cache, dataset=image_folder, max_bytes=1_000_000) as client:
        yield client


# ---- answers


def test_answers_equal_those_of_predict(server, made, image_folder):
    paths = sorted((image_folder / "test" / "red").iterdir())[:3]
    expected = predict(paths, made[1], top=2)
    status, headers, rows = server.predict(paths[0].read_bytes(), "?top=2")
    assert status == 200 and [row["path"] for row in rows] == ["image"]
    body, kind = parts(*((path.name, path.read_bytes()) for path in paths))
    status, headers, rows = server.predict(body, "?top=2", content_type=kind)
    assert status == 200 and {"decode", "wait", "compute"} <= {
        part.split(";")[0].strip() for part in headers["server-timing"].split(",")
    }
    for row, one, path in zip(rows, expected, paths, strict=True):
        assert row["path"] == path.name and row["class_name"] == one.class_name
        assert row["labels"] is row["values"] is None
        assert [name for name, _ in row["top"]] == [name for name, _ in one.top]
        shares = [share for _, share in row["top"]]
        assert shares == pytest.approx([share for _, share in one.top], abs=1e-6)
    assert "neighbours" not in rows[0]


def test_the_nearest_image_of_a_cached_one_is_itself(server, image_folder):
    data = (image_folder / "train" / "red" / "03.png").read_bytes()
    (row,) = server.predict(data, "?neighbours=4")[2]
    near = row["neighbours"]
    assert len(near) == 4 and near[0]["split"] == "train" and near[0]["label"] == "red"
    assert near[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert [one["similarity"] for one in near] == sorted(
        (one["similarity"] for one in near), reverse=True
    )
    status, headers, picture = server.get(near[0]["picture"])
    assert status == 200 and headers["content-type"] == "image/webp" and picture[8:12] == b"WEBP"
    assert ".png" not in json.dumps(row), "an id is a file's name"
    assert server.get("/picture/train/999999")[0] == server.get("/picture/none/0")[0] == 404


def test_it_says_what_it_is(server, made):
    status, _, model = server.get("/model")
    assert status == 200 and model["classes"] == ["blue", "green", "red"]
    assert model["fingerprint"] == load_head(made[1]).fingerprint and model["size"] == 32
    low, high = model["accuracy"]["top1_interval"]
    assert low <= model["accuracy"]["top1"] <= high and model["accuracy"]["n_test"] == 18
    assert str(made[1].parent) not in json.dumps(model)
    assert server.get("/health")[2] == {"status": "ok"}
    described = server.get("/openapi.json")[2]
    for path, methods in described["paths"].items():
        asked = path.replace("{split}", "train").replace("{row}", "0")
        for method in methods:
            assert server.ask(method.upper(), asked)[0] in map(int, methods[method]["responses"])
    for path in ("/", "/docs", "/page.js", "/docs.js", "/common.js", "/page.css"):
        status, headers, content = server.get(path)
        assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
        assert b"http://" not in content.replace(b"http://www.w3.org", b"") and b"https://" not in (
            content
        ), "nothing from another host"


@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_heads_of_labels_and_of_numbers_answer_too(made, task):
    head = load_head(made[1])
    thresholds = np.array([0, 1, 0.5], np.float32) if task == "labels" else None
    with served(replace(head, task=task, thresholds=thresholds)) as client:
        (row,) = client.predict(png(), "?top=2")[2]
        assert client.get("/model")[2]["accuracy"] is None
        status, _, error = client.predict(png(), "?neighbours=1")
        assert status == 400 and "no cache" in error["error"]
    if task == "labels":
        assert row["labels"][0][0] == "blue" or row["labels"][-1][0] == "blue"
        assert len(row["top"]) == 2
    else:
        assert row["class_name"] is None and len(row["values"]) == 3


# ---- bad input


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "expected the bytes of an image"),
        (b"no image at all", 400, "do not decode"),
        (png()[:200], 400, "do not decode"),
        (huge_png(25_000, 20_000), 400, "25000 x 20000"),
        (bytes(1_000_001), 413, "at most 1,000,000 bytes"),
        (parts(("a.png", b"")), 400, "expected the bytes"),
        (parts(*[(f"{n}.png", png()) for n in range(65)]), 400, "Too many files"),
        ((b"broken", "multipart/form-data"), 400, "boundary"),
    ],
)
def test_bad_bodies_are_answered_in_one_line(server, body, status, said):
    data, kind = body if isinstance(body, tuple) else (body, "application/octet-stream")
    found, headers, answer = server.predict(data, content_type=kind)
    assert found == status and set(answer) == {"error"} and said in answer["error"]
    assert "\n" not in answer["error"] and "Traceback" not in answer["error"]
    assert "/" + os.sep.join(__file__.split(os.sep)[1:3]) not in answer["error"]
    assert headers["x-content-type-options"] == "nosniff"
    assert server.predict(png())[0] == 200


def test_one_bad_image_is_not_the_end_of_the_others(server):
    body, kind = parts(("a.png", png()), ("../../etc/pass\x1bwd", b"garbage"), ("", png(1)))
    status, _, rows = server.predict(body, content_type=kind)
    assert status == 200 and [row["error"] is None for row in rows] == [True, False, True]
    assert rows[1]["path"] == r"pass\x1bwd" and "/etc" not in rows[1]["error"]


@pytest.mark.parametrize("query", ["?top=0", "?top=x", "?top=-1", "?neighbours=1e3"])
def test_bad_queries(server, query):
    status, _, answer = server.predict(png(), query)
    assert status == 400 and "whole number" in answer["error"]


def test_unknown_addresses_and_methods(server):
    assert server.get("/nothing")[0] == 404 and server.get("/../app.py")[0] == 404
    assert server.get("/predict")[0] == 405
    assert set(server.get("/nothing")[2]) == {"error"}


def test_a_body_of_unknown_length_is_cut_off(server):
    """Of 10 GB, the server reads little more than it takes."""
    with server.open(
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    ) as connection:
        piece = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        sent = 0
        try:
            for _ in range(160_000):
                connection.sendall(piece)
                sent += len(piece)
        except OSError:  # it has hung up
            pass
    assert sent < 1 << 30
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n"
    assert b" 413 " in server.said(head + b"Expect: 100-continue\r\n\r\n")
    assert server.predict(png())[0] == 200


# ---- who may ask


def test_another_name_or_site_is_refused(server):
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", ""):
        assert server.get("/model", Host=host)[0] == 421
    for host in ("localhost", f"127.0.0.1:{server.port}", f"[::1]:{server.port}"):
        assert server.get("/model", Host=host)[0] == 200
    for origin in ("https://evil.example", "null"):
        status, _, answer = server.predict(png(), Origin=origin)
        assert status == 403 and "another site" in answer["error"]
    assert server.predict(png(), Origin=server.url)[0] == 200


def test_a_token_is_asked_for_everywhere_but_of_health(made):
    with served(made[1], token=TOKEN) as client:
        for path in ("/", "/model", "/page.js", "/picture/train/0", "/nothing"):
            status, headers, answer = client.get(path)
            assert status == 401 and TOKEN not in answer["error"]
            assert headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer", f"Bearer {TOKEN}0", f"Basic {TOKEN}", "Bearer é"):
            assert client.get("/model", Authorization=wrong)[0] == 401
        assert client.get("/health")[0] == 200
        assert client.get("/model", Authorization=f"Bearer {TOKEN}")[0] == 200
        assert client.get("/?token=wrong")[0] == 401
        status, headers, _ = client.get(f"//evil.example/?token={TOKEN}&a=b")
        assert status == 303 and headers["location"] == "/evil.example/?a=b"
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
        assert client.get("/", Cookie=cookie.partition(";")[0])[0] == 200
        assert client.get("/", Cookie="featcache=; a=b")[0] == 401


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "expected a token"),
        ({"host": "example.org"}, "expected a token"),
        ({"token": "short"}, "16 to 200"),
        ({"token": "with spaces in it, and long"}, "16 to 200"),
        ({"port": 70_000}, "0 to 65535"),
        ({"queue": 0}, "at least 1"),
        ({"timeout_s": float("nan")}, "at least 1"),
        ({"dataset": "photos"}, "add --cache"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(RecipeError, match=said):
        ServeOptions(**options)
    assert ServeOptions(host="0.0.0.0", token=TOKEN).port == 8000


def test_a_cache_of_other_features_is_refused(made, small_cache):
    with (
        pytest.raises(CacheMismatchError, match="expected the features of"),
        served(made[1], cache=small_cache),
    ):
        pass


# ---- what it bears


def test_slow_senders_are_sent_away(made, monkeypatch):
    monkeypatch.setattr("featcache.serving.server._HEAD_S", 0.3)
    with served(made[1], timeout_s=1) as client, ExitStack() as opened:
        began = time.monotonic()
        silent, half, late = (
            opened.enter_context(client.open(text))
            for text in (
                b"",
                b"GET / HT",
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc",
            )
        )
        assert client.predict(png())[0] == 200
        for connection in (silent, half):
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""
        assert b" 408 " in late.recv(1000)
        assert time.monotonic() - began < 10


def test_connections_have_an_end(made):
    with served(made[1], connections=8) as client, ExitStack() as opened:
        held = [opened.enter_context(client.open()) for _ in range(8)]
        until(lambda: b" 503 " in client.said())
        answer = client.said()
        assert b"retry-after: 1" in answer and answer.endswith(b'{"error": "busy; try again"}')
        # One that sends meanwhile hears it too, and no other takes its place for long.
        late = client.open(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n"
        )
        with late, suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(20):
                late.sendall(bytes(100_000))
                time.sleep(0.01)
            assert b" 503 " in late.recv(1000)
        for connection in held:
            connection.close()
        until(lambda: b" 200 " in client.said(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n"))
        assert client.predict(png())[0] == 200


class SlowEngine:
    """The mean colour of each image; waits for its gate, and keeps the sizes of its batches."""

    batch_size = 64

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.sizes = []
        self.fails = lambda images: False

    def extract(self, images):
        assert self.gate.wait(20)
        self.sizes.append(len(images))
        if self.fails(images):
            raise RuntimeError("out of luck in /secret/path")
        return {"pooled": images.mean(axis=(1, 2)).astype(np.float32)}


def batcher_of(engine, most=64):
    head = Head(np.eye(3, dtype=np.float32), np.zeros(3, np.float32), tuple("rgb"), "0" * 64)
    extractor = Extractor(Preprocess(32), ("pooled",), engine)
    return Batcher(extractor, lambda: head, None, most=most, max_pixels=10_000)


def test_images_that_arrive_together_are_computed_together():
    engine = SlowEngine()

    async def run():
        async with batcher_of(engine) as batcher:
            engine.gate.clear()
            first = asyncio.create_task(batcher.answers([("a", png())], top=1))
            await asyncio.sleep(0.2)  # the engine has it
            others = [
                asyncio.create_task(batcher.answers([(str(n), png(n % 3))], top=1))
                for n in range(20)
            ]
            while len(batcher._waiting) < 20:
                await asyncio.sleep(0.01)
            engine.gate.set()
            return [(await task)[0][0] for task in (first, *others)]

    answers = asyncio.run(run())
    assert engine.sizes[0] == 1 and sum(engine.sizes) == 21 and len(engine.sizes) <= 4
    assert [one.prediction.path for one in answers] == ["a", *map(str, range(20))]
    assert [one.prediction.class_name for one in answers[1:7]] == list("rgbrgb")


def test_a_full_queue_says_when_to_come_again_and_recovers():
    engine = SlowEngine()

    async def run():
        async with batcher_of(engine, most=5) as batcher:
            engine.gate.clear()
            held = [asyncio.create_task(batcher.answers([("a", png())], top=1)) for _ in range(5)]
            await asyncio.sleep(0)
            with pytest.raises(Busy) as busy:
                await batcher.answers([("b", png())], top=1)
            assert 1 <= busy.value.retry_after_s <= 60
            held[0].cancel()  # a client that goes does not free its place: the work goes on
            await asyncio.sleep(0.05)
            with pytest.raises(Busy):
                await batcher.answers([("b", png())], top=1)
            engine.gate.set()
            await asyncio.gather(*held[1:])
            while batcher._held:
                await asyncio.sleep(0.01)
            return (await batcher.answers([("b", png(2))] * 5, top=1))[0]

    assert [one.prediction.class_name for one in asyncio.run(run())] == ["b"] * 5


def test_an_image_that_breaks_the_engine_breaks_no_other():
    engine = SlowEngine()

    async def run():
        async with batcher_of(engine) as batcher:
            engine.fails = lambda images: (images.mean(axis=(1, 2)).argmax(axis=1) == 0).any()
            tasks = [
                asyncio.create_task(batcher.answers([("a", png(index))], top=1))
                for index in (0, 1, 2, 1)
            ]
            return await asyncio.gather(*tasks, return_exceptions=True)

    failed, *others = asyncio.run(run())
    assert isinstance(failed, RuntimeError)
    assert [answers[0].prediction.class_name for answers, _ in others] == ["g", "b", "g"]


def test_few_small_images_take_passes_of_one_if_these_give_the_same_bytes(made):
    ingredients = load_head(made[1]).ingredients
    named = {"mine": "head", "again": "", "on_progress": lambda _: None, "on_note": lambda _: None}
    extractor = load_extractor(ingredients, "head", PredictOptions(device="cpu"), **named)
    few = extractor.for_few(8)
    if few is extractor:
        pytest.skip("this processor's kernels differ, or this engine fills nothing up")
    pixels = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), np.uint8)
    assert few.features(pixels, "abcde").tobytes() == extractor.features(pixels, "abcde").tobytes()
    assert few.engine.batch_size < extractor.engine.batch_size
    few.engine.extract = lambda images: {cut: np.ones((len(images), 9)) for cut in few.cuts}
    extractor.engine.for_few = lambda: few.engine
    assert extractor.for_few(8) is extractor, "other bytes"


def test_a_zero_shot_head_answers_too(made, image_folder):
    cache = load(made[0])
    vectors = {
        name: cache.train.features[cache.train.labels == number][:3]
        for number, name in enumerate(cache.class_names)
    }
    result = probe(cache, zero_shot=vectors, check=False, runs=made[1].parent / "zero")
    path = sorted((image_folder / "test" / "red").iterdir())[0]
    (expected,) = predict([path], result.zero_shot.head)
    with served(result.zero_shot.head, cache=made[0]) as client:
        (row,) = client.predict(path.read_bytes(), "?neighbours=2")[2]
        assert row["class_name"] == expected.class_name == "red" and len(row["neighbours"]) == 2
        assert row["probability"] == pytest.approx(expected.probability, abs=1e-5)
        assert client.get("/model")[2]["accuracy"]["n_test"] == 18


def test_errors_of_the_server_stay_there(made, monkeypatch):
    def broken(*_):
        raise ValueError("/secret/path")

    with served(made[1]) as client:
        monkeypatch.setattr("featcache.serving.batching.predictions_of", broken)
        status, _, answer = client.predict(png())
        assert status == 500 and "secret" not in answer["error"]
        assert client.notes[-1].startswith("warning: '/predict': ValueError at test_serve.py:")
        monkeypatch.undo()
        assert client.predict(png())[0] == 200


# ---- the command


def test_what_the_command_refuses(made, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(made[1]), "--port", str(port)]) == 1
        assert "in use; give another with --port" in capsys.readouterr().err
    assert main(["serve", str(made[1]), "--host", "0.0.0.0"]) == 2
    assert main(["serve", "nothing.safetensors", "--port", "0"]) == 1
    assert main(["serve", str(made[1]), "--port", "0", "--host", "203.0.113.1", "--token", TOKEN])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(made[1])]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(line.startswith("error: ") for line in said)
    assert "pip install 'featcache[serve]'" in said[-1]
    with pytest.raises(OutputError, match="expected an address"):
        bound("no host of this name.invalid", 0)


def test_it_starts_says_so_and_ends_by_ctrl_c(made, tmp_path):
    command = [sys.executable, "-m", "featcache", "serve", str(made[1]), "--port", "0", "--json"]
    environment = {**os.environ, "FEATCACHE_TOKEN": TOKEN}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            facts = json.loads(process.stdout.readline())
            port = int(facts["address"].rstrip("/").rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as one:
                one.sendall(b"GET /model HTTP/1.0\r\nHost: localhost\r\n\r\n")
                assert b" 401 " in one.recv(1000)
            process.send_signal(signal.SIGINT)
            out, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0 and out == ""
    assert said.splitlines()[-1] == "ended" and TOKEN not in said and "Traceback" not in said


@pytest.mark.slow
def test_memory_does_not_grow(server):
    """Good requests, bad ones and connections that break, some thousands of each."""
    resource = pytest.importorskip("resource")
    body, kind = parts(*[(f"{n}.png", png(n % 3)) for n in range(8)], ("bad", b"garbage"))

    def some(n):
        for _ in range(n):
            assert server.predict(body, content_type=kind)[0] == 200
            assert server.predict(b"garbage")[0] == 400
            server.open(b"POST /predict HTTP/1.1\r\nHost: a\r\n").close()
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[1]) * resource.getpagesize()

    some(50)
    before = some(50)
    assert some(300) - before < 20 << 20
