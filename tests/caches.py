"""Caches for tests of the format: written in either form, read whole, told apart by their bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from featcache import load
from featcache.preprocess import FLIP_VIEWS, Preprocess
from featcache.store.format import array_name, fingerprint, seal, unseal
from featcache.store.shards import ShardWriter
from featcache.store.writer import Source, encoded_ids, pack

DATA = Path(__file__).parent / "data"


def ingredients(**changes):
    """Return a provenance, with the fields of the fingerprint and no more."""
    return {
        "backbone": "resnet18",
        "class_names": ["blue", "green", "red"],
        "cuts": ["avgpool"],
        "dataset_digest": "0" * 64,
        "device": "cpu",
        "dtype": "float32",
        "engine": "fake",
        "engine_version": "1",
        "precision": "f32",
        "preprocess": Preprocess(64).as_dict(),
        "views": ["identity"],
        "weights_sha256": "1" * 64,
        **changes,
    }


def rows_of(role, n, *, meta, dim=5, skip=(), seed=0):
    """Return the arrays of ``n`` images of a split, without those that were skipped."""
    generator = np.random.default_rng((seed, len(role)))
    arrays = {
        "labels": np.arange(n, dtype=np.int64) % len(meta["class_names"]),
        "ids": encoded_ids(f"{role}/{row:05d}.png" for row in range(n)),
        "content_hashes": generator.integers(0, 256, (n, 32), np.uint8),
    }
    for cut in meta["cuts"]:
        for view in meta["views"] if role == "train" else ("identity",):
            shape = (n, dim) if cut == "avgpool" else (n, 3, 2, 2)
            values = generator.normal(size=shape).astype(meta["dtype"])
            arrays[array_name(cut, view, meta["cuts"][0])] = values
    kept = np.setdiff1d(np.arange(n), skip)
    taken = {name: array[kept] for name, array in arrays.items()}
    if len(skip):
        taken["skipped"] = arrays["ids"][list(skip)]
    return taken


def commit_rows(writer, role, n, shard_rows, *, meta, skip=(), upto=None, **options):
    """Commit a split shard by shard, as an extraction does, from where the writer stands."""
    whole = rows_of(role, n, meta=meta, **options)
    for start in range(writer.done(role), n if upto is None else upto, shard_rows):
        rows = np.arange(start, min(start + shard_rows, n))
        lost = np.intersect1d(rows, skip)
        kept = np.setdiff1d(rows, lost)
        shard = {name: array[kept] for name, array in whole.items()}
        if not len(kept):  # no forward pass, hence no features
            shard = {name: shard[name] for name in ("labels", "ids", "content_hashes")}
        if len(lost):
            shard["skipped"] = whole["ids"][lost]
        writer.commit(role, start, int(rows[-1]) + 1, shard, {"wall_s": 1.0})


def write_shards(
    path, meta, *, n_train=10, n_test=4, shard_rows=4, pack=False, skip=(), facts=None, **options
):
    """Write a cache by way of shards, and return its path; ``skip`` are rows of train."""
    writer = ShardWriter(path, meta)
    commit_rows(writer, "train", n_train, shard_rows, meta=meta, skip=skip, **options)
    commit_rows(writer, "test", n_test, shard_rows, meta=meta, **options)
    return writer.finish(facts or {}, pack_limit=1 << 40 if pack else -1)


class SplitArrays(NamedTuple):
    """A split in memory: features (N, …), labels (N,), N ids, and features of further views."""

    features: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    views: Mapping[str, np.ndarray] = {}


def write_cache(path, splits, meta):
    """Write a packed cache of splits in memory, by role."""
    sources = {}
    for role, split in splits.items():
        arrays = {"features": split.features, "labels": split.labels, "ids": encoded_ids(split.ids)}
        arrays |= {f"views/{view}": features for view, features in split.views.items()}
        sources |= {f"{role}/{name}": Source.of(array) for name, array in arrays.items()}
    pack(path, sources, meta)


def write_roles(path, meta=None, *, seed=0, **counts):
    """Write a packed cache with so many images of each role, such as ``val=4``."""
    meta = ingredients() if meta is None else meta
    sources = {
        f"{role}/{name}": Source.of(array)
        for role, n in counts.items()
        for name, array in rows_of(role, n, meta=meta, seed=seed).items()
    }
    pack(path, sources, meta)
    return path


FORMS = {"packed": {"pack": True}, "shards": {"pack": False}}
RICH = ingredients(cuts=["avgpool", "layer4"], views=list(FLIP_VIEWS))


def everything(path, *, mmap=False):
    """Read every array of a cache through the public names, by name."""
    cache = load(path, mmap=mmap)
    found = {}
    for role, split in (("train", cache.train), ("test", cache.test)):
        found[f"{role}/labels"] = split.labels
        found[f"{role}/ids"] = np.array(split.ids, dtype=object)
        found[f"{role}/skipped"] = np.array(split.skipped, dtype=object)
        if split.content_hashes is not None:
            found[f"{role}/content_hashes"] = split.content_hashes
        for cut in cache.cuts:
            for view in cache.views if role == "train" else ("identity",):
                found[f"{role}/{cut}/{view}"] = np.asarray(split.cut(cut, view))
    return found


def content(path, *, mmap=False):
    """Return what a cache holds as plain text: equal if and only if all its arrays are."""
    return {name: _described(array) for name, array in everything(path, mmap=mmap).items()}


def _described(array):
    data = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
    return f"{array.dtype} {array.shape} {hashlib.sha256(data).hexdigest()}"


ROOM = 1 << 18  # bytes for an index of any length; HDF5 wants a power of two
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def make_room(path):
    """Move HDF5 back in a packed file, so that any other index fits in front of it."""
    data = path.read_bytes()
    index, hdf5 = unseal(data), data.index(HDF5_SIGNATURE)
    for array in index["arrays"].values():
        for block in array["blocks"]:
            block[1] += ROOM - hdf5
    index["size_bytes"] += ROOM - hdf5
    path.write_bytes(seal(index).ljust(ROOM, b"\n") + data[hdf5:])


def index_file(path):
    """Return the file that begins with the index."""
    return path / "manifest.json" if path.is_dir() else path


def seal_text(text):
    """Return JSON text (bytes), right or not, with a seal that fits."""
    return f"featcache 1 {len(text)} {hashlib.sha256(text).hexdigest()}\n".encode() + text


def put_index(path, text):
    """Put JSON text (bytes) in the place of a cache's index, with a seal that fits."""
    sealed = seal_text(text)
    if path.is_dir():
        index_file(path).write_bytes(sealed)
    else:
        assert len(sealed) <= ROOM, "make_room, or change less"
        with path.open("r+b") as stream:
            stream.write(sealed)


def rewrite_index(path, change):
    """Let ``change`` edit a cache's index, and seal it as if it had always been so."""
    content = unseal(index_file(path).read_bytes())
    change(content)
    with contextlib.suppress(Exception):  # what does not hash is refused for that
        content["meta"]["fingerprint"] = fingerprint(content["meta"])
    put_index(path, json.dumps(content).encode())
