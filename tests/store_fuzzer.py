"""Seals one mutated index after the other and reads the cache, in a process of its own.

    python store_fuzzer.py CACHE SECONDS SEED

Guided by coverage: an index that reaches a line of featcache/store for the first time is
mutated further. Reading may end in an error of ours; or in arrays whose bytes are those
of an array that was written. Prints one JSON object: what was reached, and what went wrong.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import resource
import sys
import time
import traceback
from pathlib import Path

from caches import content, index_file, put_index

import featcache.store
from featcache import load, verify
from featcache.errors import CacheError
from featcache.store.format import fingerprint, unseal
from featcache.store.reader import read_array

STORE = str(Path(featcache.store.__file__).parent)
MEMORY_BYTES = 2 << 30
SLOWEST_S = 10

DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 5, 255, 1 << 20, 1 << 31, 1 << 63, (1 << 64) + 1, 10**300),
    *(0.0, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../x.npy", "/etc/passwd", "a\0b", "\ud800", "0" * 64, "x" * 5000),
    *("<f2", "<f4", "<f8", ">f4", "<i8", "|S1", "|S999999", "|S0", "|O", "|V4", "<U4"),
    *("train/features", "test/labels", "train/views/hflip", "avgpool", "layer4"),
    *([], {}, [[]], [0], [1, 1, 1], [1 << 40], {"a": 1}, DEEP),
]


def places(value, found):
    """Collect every container of a JSON value, the value first."""
    if isinstance(value, (list, dict)) and value:
        found.append(value)
        for part in value.values() if isinstance(value, dict) else value:
            places(part, found)
    return found


def mutate(index, generator):
    """Change one to three things anywhere in an index."""
    for _ in range(generator.choice([1, 1, 2, 3])):
        containers = places(index, [])
        if not containers:
            return
        inside = generator.choice(containers)
        key = generator.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        old, kind = inside[key], generator.randrange(7)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, list):
            inside.insert(generator.randrange(len(inside) + 1), copy.deepcopy(old))
        elif kind == 2 and isinstance(old, (int, float)):
            inside[key] = old + generator.choice([-8, -1, 1, 8, 64, 4096, old])
        elif kind == 3:
            other = generator.choice(containers)
            part = generator.choice(list(other.values() if isinstance(other, dict) else other))
            inside[key] = copy.deepcopy(part)
        elif kind == 4 and isinstance(old, str):
            at = generator.randrange(len(old) + 1)
            inside[key] = old[:at] + generator.choice("/.-\0aé0") + old[at + 1 :]
        elif kind == 5 and isinstance(inside, dict):
            inside[generator.choice([*inside, *map(str, VALUES[20:40])])] = inside.pop(key)
        else:
            inside[key] = copy.deepcopy(generator.choice(VALUES))


def sealed_text(index, generator):
    """Return an index as JSON text, its fingerprint mostly right, its syntax too."""
    if generator.random() < 0.9:
        with contextlib.suppress(Exception):  # what does not hash is refused for that
            index["meta"]["fingerprint"] = fingerprint(index["meta"])
    text = bytearray(json.dumps(index).encode())
    if generator.random() < 0.1:
        text[generator.randrange(len(text))] = generator.randrange(256)
    return bytes(text)


class Coverage:
    """Counts the lines of featcache/store that were ever run."""

    def __init__(self):
        self.lines = set()

    def __enter__(self):
        sys.settrace(self._call)

    def __exit__(self, *error):
        sys.settrace(None)

    def _call(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.startswith(STORE) else None

    def _line(self, frame, event, argument):
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


def digest(data):
    return hashlib.sha256(data).hexdigest()


def arrays_of(path):
    index = load(path).index
    return {name: digest(read_array(array).tobytes()) for name, array in index.arrays.items()}


def main(path, seconds, seed):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(float(seconds)) * 2 + 60,) * 2)
    path, generator, coverage = Path(path), random.Random(seed), Coverage()
    corpus = [unseal(index_file(path).read_bytes())]
    verify(path)
    written = {*arrays_of(path).values(), digest(b"")}
    tried, read, wrong, messages = 0, 0, [], set()
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end and len(wrong) < 5:
        mutant = copy.deepcopy(generator.choice([corpus[0], generator.choice(corpus)]))
        mutate(mutant, generator)
        put_index(path, sealed_text(mutant, generator))
        before, began = len(coverage.lines), time.monotonic()
        tried += 1
        try:
            with coverage:
                found = arrays_of(path)
                assert set(found.values()) <= written, "bytes were read that nobody wrote"
                content(path)
                content(path, mmap=True)
                read += 1
                verify(path)
        except CacheError as error:
            assert "\n" not in str(error), f"more than a line: {error}"
            messages.add(str(error).partition("found ")[2][:12])
        except BaseException:
            wrong.append(f"{json.dumps(mutant)[:3000]}\n{traceback.format_exc()}")
        if time.monotonic() - began > SLOWEST_S:
            wrong.append(f"slow: {json.dumps(mutant)[:3000]}")
        if len(coverage.lines) > before:
            corpus.append(mutant)
    report = {"tried": tried, "read": read, "wrong": wrong, "messages": len(messages)}
    print(json.dumps({**report, "corpus": len(corpus), "lines": len(coverage.lines)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
