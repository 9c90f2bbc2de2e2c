"""Caches whose sealed index nobody wrote, read by everything that uses their arrays or metadata.

It may end in an error of ours, or in arrays whose bytes are those of an array that was written.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
from functools import cache as once
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from altered_json import DEEP, alter_json, altered_bytes, json_bytes
from caches import FORMS, RICH, content, index_file, make_room, put_index, write_shards

from featcache import diff, load, verify
from featcache.cli.output import cache_facts
from featcache.reporting import page
from featcache.reporting.commands import extract_command
from featcache.reporting.selection import Group
from featcache.runs import cache_facts as record_facts
from featcache.store.format import fingerprint, unseal
from featcache.store.reader import read_array

FACTS = {
    **{"bottleneck": "engine", "created": "2026-01-01", "dataset": "pets", "weights": "none"},
    **{"dataset_path": "pets.zip", "dataset_source": "pets.zip", "featcache_version": "0"},
    **{"images_per_s": 3.0, "library": "timm 1.0", "merged_from": [{"dataset": "a"}]},
    **{"reused_rows": 2, "split": "given", "stages_s": {"engine": 1.0}, "wall_s": 2.0},
    **{"weights_source": "none", "note": {"by": ["somebody"]}},
}


@once
def sound(form):
    """Return a cache of a form, its index, and the digests of its arrays."""
    folder = Path(mkdtemp(prefix="fuzz-cache-"))
    path = write_shards(folder / "x.h5", RICH, n_train=6, skip=(1,), facts=FACTS, **FORMS[form])
    if path.is_file():
        make_room(path)
    return path, unseal(index_file(path).read_bytes()), {*arrays_of(path), digest(b"")}


def digest(data):
    return hashlib.sha256(data).hexdigest()


def arrays_of(path):
    return [digest(read_array(array).tobytes()) for array in load(path).index.arrays.values()]


def copied(form, folder):
    path = sound(form)[0]
    return Path((shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name))


def reseal(path, index, rng=None):
    """Put an index into a cache, its fingerprint right."""
    with contextlib.suppress(Exception):  # what does not hash is refused for that
        index["meta"]["fingerprint"] = fingerprint(index["meta"])
    put_index(path, json_bytes(index, rng) if rng else json.dumps(index).encode())


def edited(name, value):
    """Return an index with another value in a field of its provenance."""
    index = copy.deepcopy(sound("shards")[1])
    inside = index["meta"]
    *outer, name = name.split(".")
    for part in outer:
        inside = inside[part]
    inside.pop(name, None) if value is ... else inside.update({name: copy.deepcopy(value)})
    return index


def with_field(name, value, folder):
    path = copied("shards", folder)
    reseal(path, edited(name, value))
    return path


ODD = {
    **{"null": None, "empty": "", "word": "abc", "negative": -1, "long number": 10**400},
    **{"nan": float("nan"), "list": [], "object": {}, "deep": DEEP, "nul": "a\0b"},
    **{"long": "x" * 5000, "escapes": "\x1b]0;owned\x07\r\n\u202e", "missing": ...},
}
FIELDS = [*RICH, *FACTS, "preprocess.size", "preprocess.decoder", "preprocess.mean"]
FIELDS += ["imported_from", "features_sha256", "class_names"]
SEEDS = {
    f"{name} {kind}": partial(with_field, name, value)
    for name in FIELDS
    for kind, value in ODD.items()
}


def alter(rng, folder):
    form = rng.choice(list(FORMS))
    path = copied(form, folder)
    if rng.random() < 0.1:
        damaged = rng.choice(sorted(path.iterdir())) if path.is_dir() else path
        data = damaged.read_bytes()
        damaged.write_bytes(altered_bytes(data[:9000], rng) + data[9000:])
        return path
    index = copy.deepcopy(sound(form)[1])
    alter_json(index["meta"] if rng.random() < 0.4 else index, rng)
    reseal(path, index, rng)
    return path


def read(path):
    """Read the arrays, and have every command say what it says of a cache's metadata."""
    _, _, written = sound("shards" if path.is_dir() else "packed")
    assert set(arrays_of(path)) <= written, "bytes were read that nobody wrote"
    content(path)
    content(path, mmap=True)
    cache = load(path)
    json.dumps(cache_facts(cache), default=str)
    record_facts(cache)
    group = Group(cache.meta.get("dataset", "unnamed"), cache.meta["dataset_digest"], cache=cache)
    page.lede(group)
    page.facts(cache)
    page.tiles_of(group, None, None, None)
    extract_command(cache.meta, cache.path)
    repr(cache), cache._repr_html_()
    diff(cache, sound("packed")[0])
    verify(path)
