"""Altered heads: their tensors, and the JSON about them, resealed with a fitting fingerprint.

What reads them is `evaluate_head` on a cache of the same ingredients, and `predict` on an image.
"""

import contextlib
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from caches import ingredients, write_roles
from fuzz_weights import ODD, damaged, safetensors
from PIL import Image
from safetensors.numpy import save

from featcache.errors import FeatcacheError
from featcache.prediction import checked_head, evaluate_head, predict
from featcache.store.format import fingerprint

KEY = "featcache.head"
DIM = 5
META = ingredients()
INGREDIENTS = {**META, "weights": "own.safetensors", "format_version": 1}
FACTS = {
    "version": 1,
    "class_names": META["class_names"],
    "fingerprint": fingerprint(INGREDIENTS),
    "scaling": "none",
    "ingredients": INGREDIENTS,
}
GENERATOR = np.random.default_rng(0)
ARRAYS = {
    "weight": GENERATOR.normal(size=(3, DIM)).astype(np.float32),
    "bias": np.zeros(3, np.float32),
}
THRESHOLDS = np.full(3, 0.5, np.float32)
LONG = "x" * 5000 + ".safetensors"
EXTREMES = (3e38, -3e38, 1e-45, np.nan, np.inf)


def write(folder: Path, arrays: dict[str, np.ndarray], facts: object) -> Path:
    """Write a head; its fingerprint is that of its ingredients where these have one."""
    if isinstance(facts, dict) and facts.get("fingerprint") == FACTS["fingerprint"]:
        with contextlib.suppress(KeyError, TypeError, UnicodeError):
            facts = {**facts, "fingerprint": fingerprint(facts["ingredients"])}
    path = folder / "head.safetensors"
    path.write_bytes(save(arrays, {KEY: facts if isinstance(facts, str) else json.dumps(facts)}))
    return path


def _facts(**changes: object) -> Callable[[Path], Path]:
    return lambda folder: write(folder, ARRAYS, {**FACTS, **changes})


def _of(**changes: object) -> Callable[[Path], Path]:
    return _facts(ingredients={**INGREDIENTS, **changes})


def _tensors(facts: dict[str, object] | None = None, **arrays: np.ndarray) -> Callable[..., Path]:
    return lambda folder: write(folder, {**ARRAYS, **arrays}, {**FACTS, **(facts or {})})


def _shaped(folder: Path) -> Path:
    entry = {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}
    path = folder / "head.safetensors"
    header = {"weight": entry, "bias": entry, "__metadata__": {KEY: json.dumps(FACTS)}}
    path.write_bytes(safetensors(header, b""))
    return path


HUGE = np.full((3, DIM), 3e38, np.float32)
SEEDS: dict[str, Callable[[Path], Path]] = {
    "a 5,000-character weights name": _of(weights=LONG),
    "a name with a NUL": _of(weights="a\0b.safetensors"),
    "weights of 3e38": _tensors(weight=HUGE),
    "numbers of 3e38": _tensors({"task": "numbers"}, weight=HUGE),
    "labels of 3e38": _tensors({"task": "labels"}, weight=HUGE, thresholds=THRESHOLDS),
    "a huge empty shape": _shaped,
    "no cuts": _of(cuts=[]),
    "cuts of numbers": _of(cuts=7),
    "cuts of a head": _of(head_cuts=7),
    "a list for a backbone": _of(backbone=["resnet18"]),
    "a 401-digit version": _facts(version=int("9" * 401)),
    "a list for a task": _facts(task=["labels"]),
    "a preprocessing of nothing": _of(preprocess={}),
    "a list for weights": _of(weights=["x"]),
}


def odd_facts(rng: random.Random) -> object:
    """Return facts with one to three places changed."""
    facts = copy.deepcopy(FACTS)
    facts["task"] = rng.choice(["classes", "classes", "labels", "numbers"])
    for _ in range(rng.choice([1, 1, 3])):
        containers: list = [facts]
        for one in containers:
            inside = one.values() if isinstance(one, dict) else one
            containers += [part for part in inside if isinstance(part, (dict, list)) and part]
        container = rng.choice(containers)
        if not container:
            break
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        odd = rng.choice([*ODD, [], {}, [[]], ["avgpool"], {"a": 1}, LONG, "\ud800", [1, 2, 3]])
        match rng.randrange(4):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(["", "x", "a\0\x1b[2J\n", "x" * 5000, "head_cuts"])] = odd
            case _:
                container[key] = copy.deepcopy(odd)
    return facts if rng.random() < 0.95 else rng.choice(["", "[" * 9999, "null", "[1]", "9" * 5000])


def odd_arrays(rng: random.Random) -> dict[str, np.ndarray]:
    """Return tensors of which one has another name, type, shape or value."""
    arrays = {**ARRAYS, "thresholds": THRESHOLDS}
    name = rng.choice(list(arrays))
    array = arrays.pop(name).copy()
    match rng.randrange(4):
        case 0:
            arrays[rng.choice(["", "x" * 5000, "\x1b[2J"])] = array
        case 1:
            arrays[name] = array.astype(rng.choice(["f2", "f8", "i4", "u1", "?"]))
        case 2:
            shape = rng.choice([(), (0,), (0, 5), (3, 0), (5, 3), (1,) * 20, (2,), (3, 1), (3, 7)])
            arrays[name] = np.zeros(shape, np.float32)
        case _:
            array.flat[rng.randrange(array.size)] = rng.choice(EXTREMES)
            arrays[name] = array
    return arrays


def alter(rng: random.Random, folder: Path) -> Path:
    """Write one altered head."""
    task = rng.choice(["classes", "labels", "numbers"])
    arrays = {**ARRAYS, "thresholds": THRESHOLDS} if task == "labels" else ARRAYS
    match rng.randrange(5):
        case 0:
            return write(folder, odd_arrays(rng), {**FACTS, "task": task})
        case 1:
            path = write(folder, arrays, {**FACTS, "task": task})
            path.write_bytes(damaged(rng, path.read_bytes()))
            return path
        case _:
            return write(folder, {**ARRAYS, "thresholds": THRESHOLDS}, odd_facts(rng))


def read(path: Path) -> None:
    """Use a head on features, on a cache and on an image; raise the first error."""
    cache, image = path.parent.parent / "fuzz_head.h5", path.parent.parent / "fuzz_head.png"
    if not image.exists():
        write_roles(cache, META, train=6, test=4)
        Image.new("RGB", (40, 40)).save(image)
    errors = []
    for use in (
        lambda: _numbers(path),
        lambda: evaluate_head(path, cache),
        lambda: predict(image, path),
    ):
        try:
            use()
        except FeatcacheError as error:
            errors.append(error)
    for error in errors:
        if "\n" in str(error) or len(str(error)) > 2000 or not str(error).isprintable():
            raise error
    if errors:
        raise errors[0]


def _numbers(path: Path) -> None:
    head, _ = checked_head(path)
    features = np.ones((4, head.weight.shape[1]), np.float32)
    scores = head.scores(features) if head.task == "numbers" else head.probabilities(features)
    assert np.isfinite(scores).all()
    head.predict(features)
