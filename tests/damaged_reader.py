"""Reads damaged copies of a cache in a process of its own, which may not crash.

    python damaged_reader.py CACHE FLIPS CUTS SEED

Flips one bit at a time, or cuts one file short, in every region of the cache alike. Each
copy must be refused by `featcache.verify`, or hold the same arrays; and reading it must
end in an error of ours, or give the same arrays. Prints one JSON object: how many were
caught, and harmless, by region, and what went wrong.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from caches import HDF5_SIGNATURE, content, index_file

from featcache import load, verify
from featcache.errors import CacheError

MEMORY_BYTES, CPU_S = 3 << 30, 240


def regions(path):
    """Return what a cache's bytes are for: lists of (file, from, to) by name."""
    index = load(path).index
    blocks = [block for array in index.arrays.values() for block in array.blocks]
    start = index_file(path)
    line = start.read_bytes().index(b"\n") + 1
    end = line + int(start.read_bytes().split(b" ")[2])
    found = {"seal": [(start, 0, line)], "index": [(start, line, end)]}
    sizes = {
        (block.path, block.offset): block.n_rows * array.row_bytes
        for array in index.arrays.values()
        for block in array.blocks
    }
    found["arrays"] = [
        (file, offset, offset + size) for (file, offset), size in sizes.items() if size
    ]
    if path.is_dir():
        found["headers"] = [(block.path, 0, block.offset) for block in blocks]
        return found
    hdf5 = path.read_bytes().index(HDF5_SIGNATURE)
    found["padding"] = [(path, end, hdf5)]
    at, found["structure"] = hdf5, []
    for file, begin, stop in [*sorted(found["arrays"]), (path, path.stat().st_size, 0)]:
        if at < begin:
            found["structure"].append((file, at, begin))
        at = stop
    return found


def damages(path, flips, cuts, seed):
    """Yield (region, file inside the copy, function from its bytes to damaged bytes)."""
    generator = random.Random(seed)
    places = regions(path)
    names = list(places)
    for number in range(flips + cuts):
        region = names[number % len(names)]
        spans = places[region]
        weights = [stop - begin for _, begin, stop in spans]
        file, begin, stop = generator.choices(spans, weights)[0]
        at, bit = generator.randrange(begin, stop), generator.randrange(8)
        if number < flips:
            yield (
                f"{region}, byte {at}, bit {bit}",
                file,
                lambda data, a=at, b=bit: data[:a] + bytes([data[a] ^ 1 << b]) + data[a + 1 :],
            )
        else:
            yield f"{region}, cut at {at}", file, lambda data, a=at: data[:a]


def judge(path, wanted):
    """Return "caught" or "harmless"; raise for anything else."""
    try:
        verify(path)
    except CacheError as error:
        assert "\n" not in str(error) and str(path) in str(error), f"odd message: {error}"
        caught = True
    else:
        caught = False
    try:
        assert content(path) == wanted, "other arrays were read"
    except CacheError:
        assert caught, "verify passes what cannot be read"
    return "caught" if caught else "harmless"


def main(path, flips, cuts, seed):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    sound, tally, wrong = Path(path), Counter(), []
    wanted = content(sound)
    with tempfile.TemporaryDirectory() as folder:
        for name, file, damage in damages(sound, int(flips), int(cuts), seed):
            copy = Path(folder) / sound.name
            (shutil.copytree if sound.is_dir() else shutil.copy)(sound, copy)
            damaged = copy / file.relative_to(sound)
            damaged.write_bytes(damage(file.read_bytes()))
            try:
                tally[f"{name.partition(',')[0]}: {judge(copy, wanted)}"] += 1
            except Exception:
                wrong.append(f"{name}: {traceback.format_exc()}")
            (shutil.rmtree if copy.is_dir() else Path.unlink)(copy)
    print(json.dumps({"tally": tally, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
