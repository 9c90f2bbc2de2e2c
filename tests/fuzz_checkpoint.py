"""Altered checkpoints of fine-tuning, resealed, and the files beside them in a run's folder.

What reads them is `RunFolder.load`, as ``finetune --resume`` does before it builds a network.
"""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzz_weights import ODD, damaged, safetensors
from safetensors.numpy import save

from featcache.errors import WeightsError
from featcache.finetuning.folder import RunFolder, load_checkpoint, save_checkpoint, seal_of
from featcache.progress import silent

IDENTITY = {"method": "full", "engine": "torch", "precision": "f32", "seed": 0, "classes": ["a"]}
EPOCH = {"epoch": 1, "train_loss": 0.5, "top1": 0.5, "wall_s": 1.0}
PROGRESS = {
    "step": 3,
    "curve": [EPOCH],
    "batch": 1,
    "loss_sum": 0.5,
    "epoch_s": 1.0,
    "trained_s": 1.0,
    "wall_s": 1.0,
}
FACTS = {"identity": IDENTITY, "progress": PROGRESS, "version": 1}
ARRAYS = {
    "model.fc.weight": np.ones((3, 4), np.float32),
    "model.bn1.num_batches_tracked": np.array(7),
    "optimizer.0.momentum_buffer": np.zeros((3, 4), np.float32),
    "best.fc.weight": np.ones((3, 4), np.float32),
}
NAMES = ("", "x", "a\0\x1b[31m\n", "x" * 5000, "\ud800")
DEEP = "[" * 100_000
LINES = ['{"step": 3, "loss": 0.5}', "{", "null", "[]", '{"step": "x"}', DEEP, '{"step": null}']
LINES += ['{"step": 1e999}', f'{{"step": {"9" * 400}}}', f'{{"step": {"9" * 5000}}}', "\x1b[2J"]


def sealed(arrays: dict[str, np.ndarray], text: str) -> bytes:
    """Return a checkpoint whose checksum is right."""
    return save(arrays, {"featcache.checkpoint": text, "featcache.sha256": seal_of(arrays, text)})


def odd_facts(rng: random.Random) -> str:
    """Return facts with one to three places changed, as JSON."""
    facts = copy.deepcopy(FACTS)
    for _ in range(rng.choice([1, 1, 3])):
        containers: list = [facts]
        for one in containers:
            inside = one.values() if isinstance(one, dict) else one
            containers += [part for part in inside if isinstance(part, (dict, list)) and part]
        container = rng.choice([*containers[:3], *containers])
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        odd = rng.choice([*ODD, [], {}, [EPOCH] * 3, [{**EPOCH, "more": 1}], {"step": 1}])
        value = copy.deepcopy(odd)  # what is put in may be changed next
        match rng.randrange(4):
            case 0:
                del container[key]
                if not facts:
                    break
            case 1 if isinstance(container, dict):
                container[rng.choice(NAMES)] = value
            case _:
                container[key] = value
    return json.dumps(facts)


def odd_arrays(rng: random.Random) -> dict[str, np.ndarray]:
    """Return tensors of which one has another name, type, shape or value."""
    arrays = dict(ARRAYS)
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    match rng.randrange(4):
        case 0:
            arrays[rng.choice(["", "model.", "x" * 5000, "\x1b[2J", "optimizer.x"])] = array
        case 1:
            arrays[name] = array.astype(rng.choice(["f2", "f8", "i4", "u1", "?", "u8"]))
        case 2:
            arrays[name] = np.zeros(rng.choice([(), (0,), (0, 5), (1,) * 20]), np.float32)
        case _:
            arrays[name] = np.full((3, 4), rng.choice([np.nan, np.inf, 3e38]), np.float32)
    return arrays


def write(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "checkpoint.safetensors"
    path.write_bytes(data)
    return path


def _with_progress(**changes: object) -> Callable[[Path], Path]:
    text = json.dumps({**FACTS, "progress": {**PROGRESS, **changes}})
    return lambda folder: write(folder, sealed(ARRAYS, text))


def _flipped(folder: Path) -> Path:
    data = bytearray(sealed(ARRAYS, json.dumps(FACTS)))
    data[-5] ^= 1
    return write(folder, bytes(data))


def _renamed(folder: Path) -> Path:
    data = sealed(ARRAYS, json.dumps(FACTS))
    return write(folder, data.replace(b"model.fc.weight", b"model.fc.weighs"))


def _shaped(folder: Path) -> Path:
    entry = {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}
    return write(folder, safetensors({"x": entry}, b""))


def _typed(folder: Path) -> Path:
    entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
    return write(folder, safetensors({"x": entry}, b"abcd"))


def _logged(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes("\n".join(LINES).encode() + b"\xff\xfe\n")
    return write(folder, sealed(ARRAYS, json.dumps(FACTS)))


def _environment(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "environment.json").write_text('{"processes": "two"}', "utf-8")
    return write(folder, sealed(ARRAYS, json.dumps(FACTS)))


SEEDS: dict[str, Callable[[Path], Path]] = {
    "a flipped bit": _flipped,
    "a renamed tensor": _renamed,
    "10**9 steps of an epoch": _with_progress(batch=10**9),
    "a 401-digit number": _with_progress(wall_s=int("9" * 401)),
    "no time at all": _with_progress(trained_s=0),
    "a curve of text": _with_progress(curve=["x"]),
    "an epoch of more": _with_progress(curve=[{**EPOCH, "more": 1}]),
    "a huge empty shape": _shaped,
    "an unknown type": _typed,
    "a strange log": _logged,
    "a strange environment": _environment,
}


def alter(rng: random.Random, folder: Path) -> Path:
    """Write one altered checkpoint, or a strange file beside a good one."""
    text, arrays = json.dumps(FACTS), ARRAYS
    match rng.randrange(5):
        case 0:
            arrays = odd_arrays(rng)
        case 1:
            lines = [rng.choice(LINES) for _ in range(4)]
            (folder / "metrics.jsonl").write_text("\n".join(lines), "utf-8")
            environment = rng.choice([*LINES, json.dumps({"processes": rng.choice(ODD)})])
            (folder / "environment.json").write_text(environment, "utf-8")
        case 2:
            return write(folder, damaged(rng, sealed(arrays, text)))
        case _:
            text = odd_facts(rng)
    return write(folder, sealed(arrays, text))


def read(path: Path) -> None:
    """Read a checkpoint and what lies beside it; what passes can be written again."""
    folder = RunFolder(path.parent, IDENTITY, silent)
    folder.load()
    folder.note_processes(1)
    arrays, facts = load_checkpoint(path)
    progress = facts["progress"]
    if not progress["trained_s"] > 0 or progress["batch"] + len(progress["curve"]) < 0:
        raise AssertionError("a checkpoint of no training was accepted")
    save_checkpoint(path, arrays, facts)
    if not arrays:
        raise WeightsError("no tensors")
