"""Unfinished extractions whose plan and commits nobody wrote: resumed, and packed."""

from __future__ import annotations

import copy
import json
import math
import shutil
from functools import cache as once
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from altered_json import DEEP, alter_json, altered_bytes, json_bytes
from caches import content, ingredients, rows_of, seal_text

from featcache import pack
from featcache.store.format import unseal
from featcache.store.shards import ShardWriter, unfinished_folder

META = ingredients(weights="none", dataset="pets")
N, ROWS = 8, 4


def writer_of(path):
    """Return what makes or resumes an extraction; one named ``all`` is divided by content."""
    undivided = path.stem == "all"
    listed = {"n_all": N} if undivided else {"n_train": N, "n_test": N}
    jobs = {"agreed": {"shard_rows": ROWS, **listed}, "command": "featcache extract pets"}
    jobs |= {"n_jobs": 2, "named": True, "pack": True}
    # Divided by content, it has the digest of its names until it is packed.
    digest = "names:" * undivided + META["dataset_digest"]
    return ShardWriter(path, {**META, "dataset_digest": digest}, jobs=jobs)


@once
def sound(undivided):
    """Return an unfinished cache by jobs, of given splits or of one that is divided by content."""
    path = Path(mkdtemp(prefix="fuzz-shards-")) / ("all.h5" if undivided else "x.h5")
    writer = writer_of(path)
    facts = {"wall_s": 1.0, "passes": 4.0}
    for role in ("all",) if undivided else ("train", "test"):
        for start in range(0, N, ROWS):
            part = "train" if undivided else role
            hashes = np.zeros((ROWS, 32), np.uint8) + 255  # on the side of train
            arrays = {
                name: array[start : start + ROWS]
                for name, array in rows_of(part, N, meta=META).items()
            }
            arrays["content_hashes"] = hashes
            if undivided:
                arrays = {f"{part}/{name}": array for name, array in arrays.items()}
            writer.commit(role, start, start + ROWS, arrays, facts, hashes=hashes)
    return path


def copied(undivided, folder):
    path = sound(undivided)
    shutil.copytree(unfinished_folder(path), unfinished_folder(folder / path.name))
    return folder / path.name


def rewrite(file, change, rng=None):
    said = unseal(file.read_bytes())
    change(said)
    file.write_bytes(seal_text(json_bytes(said, rng) if rng else json.dumps(said).encode()))


def with_field(file, where, value, folder):
    def change(inside):
        *outer, last = where
        for part in outer:
            inside = inside[part]
        inside[last] = copy.deepcopy(value)

    path = copied(False, folder)
    rewrite(unfinished_folder(path) / ".commits" / f"{file}.json", change)
    return path


_COMMIT, _FEATURES = "train-000000000000", ("arrays", "train/features")
PLACES = (
    *((_COMMIT, (name,)) for name in ("stop", "arrays", "facts", "left_out", "hashes")),
    *((_COMMIT, (*_FEATURES, name)) for name in ("dtype", "row_shape", "block")),
    *((_COMMIT, (*_FEATURES, "block", at)) for at in range(5)),
    (_COMMIT, ("facts", "wall_s")),
    *(("ingredients", (name,)) for name in ("meta", "jobs", "forced")),
    *(("ingredients", ("jobs", name)) for name in ("agreed", "n_jobs", "command", "pack")),
    *(("ingredients", ("jobs", "agreed", name)) for name in ("shard_rows", "n_train")),
    *(("ingredients", ("meta", name)) for name in ("preprocess", "weights", "cuts", "class_names")),
)
VALUES = (None, "", "../x.npy", -1, 0, 10**15, 10**400, float("nan"), [], [[0, 0]], {}, DEEP, "a\0")
SEEDS = {
    f"{file} {'.'.join(map(str, where))} {number}": partial(with_field, file, where, value)
    for file, where in PLACES
    for number, value in enumerate(VALUES)
}


def alter(rng, folder):
    path = copied(rng.random() < 0.5, folder)
    parts = unfinished_folder(path)
    commits = sorted((parts / ".commits").glob("*.json"))
    if rng.random() < 0.1:
        file = rng.choice([*commits, *parts.glob("*.npy"), *parts.glob(".commits/*.npy")])
        file.write_bytes(altered_bytes(file.read_bytes(), rng))
    else:
        rewrite(rng.choice(commits), lambda said: alter_json(said, rng), rng)
    return path


def read(path):
    """Resume, which makes again what is not sound; then pack, which refuses what is not whole."""
    resumed = path.parent / "resumed" / path.name
    shutil.copytree(unfinished_folder(path), unfinished_folder(resumed))
    writer = writer_of(resumed)
    assert math.isfinite(writer.total("wall_s")) and 0 <= writer.skipped() <= writer.n_done
    if writer.n_done:
        content(writer.finish({}))
    pack(path)
