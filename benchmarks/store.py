"""The cost of the cache's guarantees: opening, verified reading, packing.

    python benchmarks/store.py [--rounds 9] [--folder FOLDER]

Works in FOLDER (3 GB; a temporary one by default), with the page cache warm, and prints

- opening: the time of a process that opens and maps a cache of 60,000 x 512 float32, in turn with a
  process that does nothing and one that imports NumPy (goal: 0.25 s in total);
- reading: reading and verifying that cache, in turn with np.load of the same array, and the median
  ratio of the rounds (goal: 1.5); also the ratio of `featcache.verify`;
- packing: a process that packs shards of 600,000 x 512 float32 into one file: the time to check and
  to pack them, and its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import featcache
from featcache.store.shards import SHARD_ROWS, ShardWriter
from featcache.store.writer import Source, encoded_ids, pack

DIM = 512
META = {
    "backbone": "resnet18",
    "class_names": [str(label) for label in range(10)],
    "cuts": ["avgpool"],
    "dataset_digest": "0" * 64,
    "device": "cpu",
    "dtype": "float32",
    "engine": "none",
    "engine_version": "0",
    "precision": "f32",
    "preprocess": {},
    "views": ["identity"],
    "weights_sha256": "0" * 64,
}
PACK = """
import json, re, sys, time
from pathlib import Path
from featcache.store.shards import ShardWriter
path, meta = Path(sys.argv[1]), json.loads(sys.argv[2])
started = time.perf_counter()
writer = ShardWriter(path, meta)
checked = time.perf_counter()
writer.finish({})
packed = time.perf_counter()
# Not ru_maxrss, which also counts the process that started this one.
peak = int(re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"check_s": checked - started, "pack_s": packed - checked, "peak_bytes": peak}))
"""


def timed(work):
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def process_times(code: str) -> tuple[float, float]:
    """Return wall and processor seconds of an interpreter that runs this."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", code])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def rows(n: int, seed: int) -> dict[str, np.ndarray]:
    return {
        "features": np.random.default_rng(seed).random((n, DIM), np.float32),
        "labels": np.arange(n, dtype=np.int64) % 10,
        "ids": encoded_ids(f"{seed:06d}/{row:06d}.jpg" for row in range(n)),
    }


def opening(path: Path, rounds: int) -> None:
    codes = {
        "python -c pass": "pass",
        "import numpy": "import numpy",
        "load(…, mmap=True)": f"import featcache; featcache.load({str(path)!r}, mmap=True)",
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            times[name].append(process_times(code))
    for name, pairs in times.items():
        wall_s, cpu_s = (statistics.median(part) for part in zip(*pairs, strict=True))
        print(f"opening: {name:20} {wall_s:.3f} s, CPU {cpu_s:.3f} s")


def reading(path: Path, plain: Path, rounds: int) -> None:
    contenders = {
        "np.load": lambda: np.load(plain),
        "featcache, verified": lambda: featcache.load(path).train.features,
        "featcache.verify": lambda: featcache.verify(path),
    }
    walls: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            walls[name].append(timed(work)[0])
    for name, found in walls.items():
        walls[name] = found[1:]  # the first round warms the page cache
        print(f"reading: {name:20} {1000 * statistics.median(walls[name]):6.1f} ms")
    for name in list(contenders)[1:]:
        ratios = [ours / theirs for ours, theirs in zip(walls[name], walls["np.load"], strict=True)]
        print(f"reading: {name} / np.load, median of {rounds}: {statistics.median(ratios):.2f}")


def packing(path: Path, n: int) -> None:
    writer = ShardWriter(path, META, force=True)
    for role, count in (("train", n), ("test", SHARD_ROWS)):
        for start in range(0, count, SHARD_ROWS):
            stop = min(start + SHARD_ROWS, count)
            writer.commit(role, start, stop, rows(stop - start, start), {})
    command = [sys.executable, "-c", PACK, str(path), json.dumps(META)]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    size_bytes = path.stat().st_size
    for what in ("check", "pack"):
        seconds = answer[f"{what}_s"]
        print(f"packing: {what:6} {seconds:5.1f} s, {size_bytes / seconds / 1e6:5.0f} MB/s")
    print(f"packing: {size_bytes / 1e9:.2f} GB with at most {answer['peak_bytes'] / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        path, plain = folder / "cache.h5", folder / "features.npy"
        arrays = rows(60_000, 0)
        sources = {}
        for name in ("features", "labels", "ids"):
            sources[f"train/{name}"] = Source.of(arrays[name])
            sources[f"test/{name}"] = Source.of(arrays[name][:10])
        pack(path, sources, META)
        np.save(plain, arrays["features"])
        assert np.array_equal(featcache.load(path).train.features, np.load(plain))
        del arrays, sources
        opening(path, options.rounds)
        reading(path, plain, options.rounds)
        packing(folder / "large.h5", 600_000)


if __name__ == "__main__":
    main()
