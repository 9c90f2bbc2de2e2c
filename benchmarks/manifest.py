"""The cost of very many shards: manifest, `featcache.load`, mapped rows, commit, resume.

    python benchmarks/manifest.py [--shards 1000,10000,100000] [--rows 4096] [--folder DIR]

The shards are fake: sparse files of the right length, in a manifest with invented checksums, split
into features, labels and ids as an extraction writes them. So this measures the work before the
first row, not the speed of reading. Each measurement runs in a process of its own and reports wall
time and peak memory. Commits and a resume use real shards of 8 images.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from featcache.preprocess import Preprocess
from featcache.store.format import fingerprint, seal

DIM = 512
HEADER_BYTES = 128
N_CLASSES = 1000
META = {
    "format": "featcache",
    "format_version": 2,
    "backbone": "resnet18",
    "class_names": [f"class {number}" for number in range(N_CLASSES)],
    "cuts": ["avgpool"],
    "dataset_digest": "0" * 64,
    "device": "cuda",
    "dtype": "float32",
    "engine": "made up",
    "engine_version": "1",
    "precision": "bf16",
    "preprocess": Preprocess(224).as_dict(),
    "views": ["identity"],
    "weights_sha256": "0" * 64,
}
ARRAYS = {"features": ("<f4", [DIM], 4 * DIM), "labels": ("<i8", [], 8), "ids": ("|S40", [], 40)}

LOAD = """
import resource, sys, time
import numpy as np
import featcache
started = time.perf_counter()
cache = featcache.load(sys.argv[1], mmap=True)
loaded = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"  load: {loaded:.2f} s, peak memory of the process {peak:,.0f} MB, "
      f"{len(cache.train):,} + {len(cache.test):,} rows")
started = time.perf_counter()
features = cache.train.features
mapped = time.perf_counter() - started
rows = np.random.default_rng(0).integers(0, len(features), 1000)
started = time.perf_counter()
taken = features[rows]
first = time.perf_counter() - started
started = time.perf_counter()
for start in range(0, 1_000_000, 1000):
    features[start : start + 1000]
sliced = 1000 * (time.perf_counter() - started)
print(f"  features mapped in {1000 * mapped:.1f} ms, 1,000 rows at random in {first:.2f} s, "
      f"a slice of 1,000 in {sliced:.0f} us")
"""

COMMITS = """
import os, sys, time
import numpy as np
from featcache.store.shards import ShardRange, ShardWriter
from featcache.store.writer import encoded_ids
sys.path.insert(0, sys.argv[3])
from manifest import META
from pathlib import Path
os.fsync = lambda descriptor: None  # the disk's own time is no matter of how many there are
path, n_shards = Path(sys.argv[1]), int(sys.argv[2])
writer = ShardWriter(path, META)
arrays = {"features": np.zeros((8, 4), np.float32), "labels": np.zeros(8, np.int64),
          "ids": encoded_ids(map(str, range(8)))}
walls = []
for number in range(n_shards):
    started = time.perf_counter()
    writer.commit("train", 8 * number, 8 * number + 8, arrays, {"wall_s": 1.0})
    walls.append(time.perf_counter() - started)
tenth = max(1, n_shards // 10)
print(f"  a commit: {1e6 * np.median(walls[:tenth]):.0f} us in the first tenth, "
      f"{1e6 * np.median(walls[-tenth:]):.0f} us in the last")
started = time.perf_counter()
again = ShardWriter(path, META)
assert again.n_done == 8 * n_shards
print(f"  to find them all again, and read them: {time.perf_counter() - started:.1f} s")
share = [ShardRange("train", 8 * number, 8 * number + 8) for number in range(n_shards // 100)]
started = time.perf_counter()
ShardWriter(path, META, share=share)
print(f"  one job's hundredth of them: {time.perf_counter() - started:.2f} s")
"""


def make_folder(folder: Path, n_shards: int, rows: int) -> int:
    """Write a folder of shards without a byte in them; return the manifest's bytes."""
    arrays = {}
    folder.mkdir(parents=True)
    for role, count in (("train", n_shards - 1), ("test", 1)):
        for name, (dtype, row_shape, row_bytes) in ARRAYS.items():
            blocks = []
            for number in range(count):
                file = f"{role}-{number * rows:012d}-{name}.npy"
                with (folder / file).open("wb") as stream:
                    stream.truncate(HEADER_BYTES + rows * row_bytes)
                blocks.append([rows, HEADER_BYTES, "a" * 64, "b" * 64, file])
            arrays[f"{role}/{name}"] = {"dtype": dtype, "row_shape": row_shape, "blocks": blocks}
    meta = {**META, "fingerprint": fingerprint(META)}
    sealed = seal({"meta": meta, "arrays": arrays})
    (folder / "manifest.json").write_bytes(sealed)
    return len(sealed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", default="1000,10000,100000")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="for temporary files")
    options = parser.parse_args()
    for n_shards in map(int, options.shards.split(",")):
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary) / "made-up.shards"
            size_bytes = make_folder(folder, n_shards, options.rows)
            print(
                f"{n_shards:,} shards, {n_shards * options.rows / 1e6:,.1f} million images: "
                f"manifest of {size_bytes / 1e6:.1f} MB ({size_bytes / n_shards:.0f} B a shard)",
                flush=True,
            )
            run = [sys.executable, "-c"]
            subprocess.run([*run, LOAD, str(folder)], check=False)
            shutil.rmtree(folder)
            here = str(Path(__file__).parent)
            path = Path(temporary) / "x.h5"
            subprocess.run([*run, COMMITS, str(path), str(n_shards), here], check=True)


if __name__ == "__main__":
    main()
