"""Requests per second of `featcache serve`, their latency, and the server's memory.

    python benchmarks/serve.py [--size 224] [--seconds 12] [--requests 10000]

Draws 64 JPEG photos of 320 x 240 pixels, makes a head on a ResNet-18 with random weights, and
starts the server in a process of its own. First come the rates of the engine alone (batches of 64,
pixels ready) and of the engine behind the decoder, as `featcache predict` uses it. Then 1, 8 and 32
clients ask for --seconds each, one image a request, over connections that stay open; for each, the
rate, its share of the engine's, p50, p95 and p99 of the latency, and the processor seconds of the
server and of the engine per image (which other programs on the machine change less than rates). The
clients share the processor with the server. At last --requests requests to a server at 32 pixels,
where requests are the work: the growth of its resident memory after the first tenth. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

import featcache
from featcache.prediction import PredictOptions, load_extractor, new_features
from featcache.probes.head import Head, load_head, save_head
from featcache.probes.ingredients import feature_ingredients

N, CLASSES, BATCH = 64, 10, 64


def photos(folder: Path) -> list[bytes]:
    """Write images with the spectrum of photos, and return their bytes."""
    generator = np.random.default_rng(0)
    images = []
    for row in range(N):
        layers = [
            np.asarray(
                Image.fromarray(generator.integers(0, 256, (s * 3, s * 4, 3), np.uint8)).resize(
                    (320, 240), Image.Resampling.BICUBIC
                ),
                np.float32,
            )
            for s in (1, 4, 16, 60)
        ]
        buffer = io.BytesIO()
        Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        images.append(buffer.getvalue())
        place = folder / f"class{row % CLASSES}" / f"{row}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(images[-1])
    return images


def made_head(folder: Path, root: Path, size: int) -> Path:
    cache = featcache.load(
        featcache.extract(folder, weights="random:0", size=size, output=root / f"{size}.h5").cache
    )
    weight = np.random.default_rng(1).normal(size=(CLASSES, cache.feature_dim)).astype(np.float32)
    head = Head(
        weight / 10,
        np.zeros(CLASSES, np.float32),
        tuple(map(str, range(CLASSES))),
        cache.fingerprint,
        ingredients=feature_ingredients(cache.meta),
    )
    save_head(root / f"{size}.safetensors", head, {})
    return root / f"{size}.safetensors"


def bare_rates(head: Path, folder: Path, seconds: float) -> tuple[float, float, float]:
    """Return images per second of the engine, its processor seconds per image, and predict's."""
    loaded, quiet = load_head(head), {"on_progress": lambda _: None, "on_note": lambda _: None}
    named = {"mine": "head", "again": "", **quiet}
    extractor = load_extractor(loaded.ingredients, str(head), PredictOptions(), **named)
    side = extractor.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), np.uint8)
    extractor.engine.extract(pixels)
    began, cpu, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        extractor.engine.extract(pixels)
        n += BATCH
    rate, cpu_s = n / (time.perf_counter() - began), (time.process_time() - cpu) / n
    del extractor
    repeated = [folder] * max(3, int(seconds * rate / N))
    options = PredictOptions(batch_size=BATCH)
    batches = new_features(repeated, loaded.ingredients, str(head), options, **named)
    with closing(batches):
        next(batches)  # the network is loaded
        began, n = time.perf_counter(), 0
        for names, _ in batches:
            n += len(names)
    return rate, cpu_s, n / (time.perf_counter() - began) if n else float("nan")


@contextmanager
def server(head: Path):
    command = [sys.executable, "-m", "featcache", "serve", str(head), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            address = json.loads(process.stdout.readline())["address"]
            yield process.pid, int(address.rstrip("/").rpartition(":")[2])
        finally:
            process.terminate()
            process.wait(30)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def load(port: int, images: list[bytes], clients: int, more) -> list[float]:
    """Ask until ``more()`` is false; return the seconds of each request."""
    took: list[float] = []

    async def client(row: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while more(len(took)):
            data = images[row % N]
            row += clients
            began = time.perf_counter()
            writer.write(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
                % len(data)
            )
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            status = head.split(b" ", 2)[1]
            if status != b"200":
                raise SystemExit(f"the server answered {status.decode()}")
            length = head.lower().partition(b"content-length: ")[2].split(b"\r", 1)[0]
            await reader.readexactly(int(length))
            took.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--requests", type=int, default=10_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        images = photos(root / "photos")
        head = made_head(root / "photos", root, asked.size)
        rate, engine_cpu_s, predict_rate = bare_rates(head, root / "photos", asked.seconds)
        print(f"engine alone {rate:.1f} images/s; predict {predict_rate:.1f} images/s", flush=True)
        print("clients  requests/s  of engine  of predict   p50 ms   p95 ms   p99 ms  cpu ms/image")
        with server(head) as (pid, port):
            for clients in (1, 8, 32):
                asyncio.run(load(port, images, clients, lambda n, most=2 * clients: n < most))
                cpu, began = cpu_seconds(pid), time.perf_counter()
                end = began + asked.seconds
                took = asyncio.run(
                    load(port, images, clients, lambda _, end=end: time.perf_counter() < end)
                )
                per_s = len(took) / (time.perf_counter() - began)
                cpu_s = (cpu_seconds(pid) - cpu) / len(took)
                cuts = statistics.quantiles(took, n=100)
                print(
                    f"{clients:7}{per_s:12.1f}{per_s / rate:11.0%}{per_s / predict_rate:12.0%}"
                    f"{1000 * cuts[49]:9.1f}{1000 * cuts[94]:9.1f}{1000 * cuts[98]:9.1f}"
                    f"{1000 * cpu_s:8.1f} ({1000 * engine_cpu_s:.1f} the engine's)",
                    flush=True,
                )
        if asked.requests:
            with server(made_head(root / "photos", root, 32)) as (pid, port):
                first, rest = asked.requests // 10, asked.requests - asked.requests // 10
                asyncio.run(load(port, images, 8, lambda n: n < first))
                before = resident(pid)
                asyncio.run(load(port, images, 8, lambda n: n < rest))
                grown = (resident(pid) - before) / 1e6
                print(f"memory: {before / 1e6:.0f} MB, {grown:+.1f} MB over {rest:,} requests")


if __name__ == "__main__":
    main()
