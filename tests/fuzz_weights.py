"""Altered checkpoints: PyTorch's two formats, safetensors, OneFlow's archives and folders.

What reads them is `read_checkpoint` and, for what passes it, `load_weights`.
"""

import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from featcache.backbones.checkpoints import read_checkpoint
from featcache.backbones.loading import load_weights

BIG = int("9" * 401)
INTEGERS = (-1, 0, 1, 2, 3, 7, 255, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 1 << 64, BIG)
ODD = (*INTEGERS, None, True, 1.5, float("nan"), float("inf"), "", "x", "a\0\x1b[31m\n", "x" * 5000)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "x" * 999, "")
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
DIMS = 70


def small_state() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "conv1.weight": generator.standard_normal((4, 3, 2, 2), np.float32),
        "bn1.weight": np.ones(4, np.float32),
        "bn1.num_batches_tracked": np.array(7),
        "fc.bias": np.zeros(5, np.float16),
    }


STATE = small_state()


# --- pickles: a writer that can say anything ------------------------------------------------


class Global:
    """A name in a pickle."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Reduce:
    """A call in a pickle."""

    def __init__(self, function: Global, *arguments: object) -> None:
        self.function, self.arguments = function, arguments


class Persistent:
    """A reference to a storage."""

    def __init__(self, value: object) -> None:
        self.value = value


def pickled(value: object) -> bytes:
    """Return a program of protocol 2 for a value."""
    return b"\x80\x02" + _program(value) + b"."


def _program(value: object) -> bytes:
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode("utf-8", "replace")
    if isinstance(value, Reduce):
        return _program(value.function) + _program(tuple(value.arguments)) + b"R"
    if isinstance(value, Persistent):
        return _program(value.value) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_program, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_program, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_program(k) + _program(v) for k, v in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def pytorch_description(storage: str = "FloatStorage") -> tuple[object, dict[str, bytes]]:
    """Return the description of `STATE` and its storages' bytes."""
    kinds = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}
    described, storages = {}, {}
    for index, (name, array) in enumerate(STATE.items()):
        kind = Global("torch", kinds[str(array.dtype)])
        strides = tuple(step // array.itemsize for step in array.strides)
        reference = Persistent(("storage", kind, str(index), "cpu", array.size))
        rebuild = Global("torch._utils", "_rebuild_tensor_v2")
        hooks = Reduce(Global("collections", "OrderedDict"))
        described[name] = Reduce(rebuild, reference, 0, array.shape, strides, False, hooks)
        storages[str(index)] = array.tobytes()
    return described, storages


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def pytorch_zip(described: object, storages: dict[str, bytes], compression: int = 0) -> bytes:
    entries = {"a/data.pkl": pickled(described), "a/byteorder": b"little"}
    entries.update({f"a/data/{key}": data for key, data in storages.items()})
    return zipped(entries, compression)


def pytorch_stream(described: object, storages: dict[str, bytes]) -> bytes:
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    head = (0x1950A86A20F9469CFC6C, 1001, machine, described, list(storages))
    widths = {"0": 4, "1": 4, "2": 8, "3": 2}
    numbers = b"".join(
        (len(data) // widths.get(key, 4)).to_bytes(8, "little") + data
        for key, data in storages.items()
    )
    return b"".join(map(pickled, head)) + numbers


def altered(rng: random.Random, value: object) -> object:
    """Return a copy of a description with one place changed."""
    copied = _copied(value)
    places: list[tuple[list, int]] = []
    _places(copied, places)
    container, index = rng.choice(places)
    old = container[index]
    choices: list[object] = [rng.choice(ODD), [old], (old, old), {"a": old}, ()]
    if isinstance(old, int):
        choices += [old + 1, old - 1, -old, *INTEGERS]
    if isinstance(old, list) and old and old[0] == "tuple":
        kept = old[1:]
        choices += [tuple(rng.choice(INTEGERS) for _ in range(rng.choice([1, 2, 4, DIMS])))]
        choices += [["tuple", *kept[1:]], ["tuple", *kept, 1], ["tuple", 0, 1 << 62]]
    container[index] = rng.choice(choices)
    return _restored(copied)


# A description as nested lists, whose first item says what each is: any place can be replaced.
def _copied(value: object) -> object:
    if isinstance(value, Global):
        return ["name", value.module, value.name]
    if isinstance(value, Reduce):
        return ["call", _copied(value.function), *map(_copied, value.arguments)]
    if isinstance(value, Persistent):
        return ["storage", _copied(value.value)]
    if isinstance(value, tuple):
        return ["tuple", *map(_copied, value)]
    if isinstance(value, dict):
        return ["dict", *(["pair", _copied(k), _copied(v)] for k, v in value.items())]
    return value


def _places(value: object, found: list[tuple[list, int]]) -> None:
    if isinstance(value, list):
        for index, part in enumerate(value):
            if index:
                if value[0] != "dict":
                    found.append((value, index))
                _places(part, found)


def _restored(value: object) -> object:
    if not isinstance(value, list) or not value:
        return value
    kind, *parts = value
    ready = [_restored(part) for part in parts]
    match kind:
        case "name":
            return Global(*(str(part)[:300].replace("\n", "") for part in ready))
        case "call" if isinstance(ready[0], Global):
            return Reduce(ready[0], *ready[1:])
        case "storage" if ready:
            return Persistent(ready[0])
        case "dict":
            return {_key(pair[0]): pair[1] for pair in ready if isinstance(pair, tuple)}
        case "tuple" | "pair":
            return tuple(ready)
    return ready


def _key(value: object) -> object:
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)[:200]


# --- safetensors ---------------------------------------------------------------------------


def safetensors(header: object, numbers: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def split(data: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _metadata() -> dict[str, str]:
    preprocess = {"size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    return {"featcache.backbone": "resnet18", "featcache.preprocess": json.dumps(preprocess)}


PLAIN = save(STATE, _metadata())


def altered_safetensors(rng: random.Random) -> bytes:
    header, numbers = split(PLAIN)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    what = rng.randrange(9)
    if what == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif what == 1:
        entry["shape"] = [rng.choice(INTEGERS) for _ in range(rng.choice([1, 2, DIMS]))]
    elif what == 2:
        entry["shape"] = [0, rng.choice(INTEGERS), *[1] * rng.choice([0, 60, 70])]
        entry["data_offsets"] = [entry["data_offsets"][0]] * 2
    elif what == 3:
        entry["data_offsets"] = [rng.choice(INTEGERS), rng.choice(INTEGERS)]
    elif what == 4:
        header["__metadata__"] = rng.choice([*ODD, [], {"a": 1}, {"a": "b" * 99999}])
    elif what == 5:
        key = rng.choice(list(header["__metadata__"]))
        value = json.loads(_metadata()["featcache.preprocess"])
        value[rng.choice(["size", "mean", "std", "interpolation", "geometry", "decoder"])] = (
            rng.choice([*ODD, [], [1, 2], [0, 0, 0], [1e400] * 3, ["a"] * 3, [BIG] * 3])
        )
        header["__metadata__"][key] = rng.choice([json.dumps(value), "[" * 9999, str(BIG), "{}"])
    elif what == 6:
        header[rng.choice(["", "x" * 9999, "\x1b]0;x\x07", "module.", name + ".x"])] = header.pop(
            name
        )
    elif what == 7:
        entry.pop(rng.choice(list(entry)))
    else:
        text = json.dumps(header)
        at = text.index(json.dumps(name))
        twice = text[: at + 1] + text[at + 1 :].replace(name, name, 1)
        twice = twice[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
        return safetensors(twice.encode(), numbers)
    return safetensors(header, numbers)


# --- OneFlow -------------------------------------------------------------------------------


def oneflow_entries(rng: random.Random | None = None) -> dict[str, bytes]:
    kinds = {"float32": "kFloat", "float16": "kFloat16", "int64": "kInt64"}
    entries = {"m/snapshot_done": b""}
    for name, array in STATE.items():
        dims = "".join(f"  dim: {dim}\n" for dim in array.shape)
        kind = kinds[str(array.dtype)]
        entries[f"m/{name}/meta"] = f"shape {{\n{dims}}}\ndata_type: {kind}\n".encode()
        entries[f"m/{name}/out"] = array.tobytes()
    if rng:
        name = rng.choice([name for name in entries if name.endswith("meta")])
        dims = "".join(f"  dim: {rng.choice(INTEGERS)}\n" for _ in range(rng.choice([1, 2, DIMS])))
        kind = rng.choice(["kFloat", "kDouble", "kOFRecord", "x" * 999, "kBFloat16"])
        odd = f"shape {{\n{dims}}}\ndata_type: {kind}\n".encode()
        change = rng.randrange(4)
        if change == 0:
            entries[name] = odd
        elif change == 1:
            del entries[rng.choice(list(entries))]
        elif change == 2:
            entries[rng.choice(["m/../x/out", "m/x\n/out", "m//out", "n/snapshot_done"])] = b""
        else:
            entries[name[:-4] + "out"] = b"x" * rng.choice([0, 1, 3, 64])
    return entries


# --- damage below the format ------------------------------------------------------------------


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Flip bytes, cut the file short, or repeat a part of it."""
    changed = bytearray(data)
    match rng.randrange(4):
        case 0:
            for _ in range(rng.choice([1, 2, 8])):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        case 1:
            del changed[rng.randrange(len(changed)) :]
        case 2:
            at = rng.randrange(len(changed))
            changed[at:at] = changed[at : at + rng.choice([1, 8, 100])]
        case _:  # the directory of a zip archive: sizes, methods, offsets, flags
            at = data.rfind(b"PK\x01\x02") if rng.random() < 0.5 else data.find(b"PK\x01\x02")
            at = max(at, 0)
            for _ in range(rng.choice([1, 2])):
                place = min(at + rng.randrange(46), len(changed) - 1)
                changed[place] = rng.choice([0, 1, 12, 14, 20, 93, 127, 255])
    return bytes(changed)


def _in_compressed_entry(compression: int) -> bytes:
    data = bytearray(pytorch_zip(*pytorch_description(), compression))
    at = data.index(b"a/data.pkl") + len(b"a/data.pkl")
    for place in range(at + 12, at + 60):
        data[place] ^= 0x5A
    return bytes(data)


def _with_shape(shape: list[int], numbers: int = 0) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * numbers]}
    return safetensors({"x": entry}, b"\0" * 4 * numbers)


def _with_storage_length(length: int) -> bytes:
    described, storages = pytorch_description()
    assert isinstance(described, dict)
    reference = described["bn1.weight"].arguments[0]
    reference.value = (*reference.value[:4], length)
    return pytorch_zip(described, storages)


def _bomb() -> bytes:
    """Return 100 kB that ask for 100 MB."""
    described, storages = pytorch_description()
    assert isinstance(described, dict)
    call, n = described["bn1.weight"], 25_000_000
    reference = Persistent((*call.arguments[0].value[:4], n))
    call.arguments = (reference, 0, (n,), (1,), *call.arguments[4:])
    return pytorch_zip(described, {**storages, "1": bytes(4 * n)}, zipfile.ZIP_DEFLATED)


def _link_loop(folder: Path) -> Path:
    path = folder / "loop.pth"
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)
    return path


def _folder_with_link_loop(folder: Path) -> Path:
    root = folder / "model"
    shutil.rmtree(root, ignore_errors=True)
    for name, data in oneflow_entries().items():
        path = root / name.removeprefix("m/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "bn1.weight" / "meta").unlink()
    (root / "bn1.weight" / "meta").symlink_to("meta")
    return root


def _file(suffix: str, make: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"seed{suffix}"
        path.write_bytes(make())
        return path

    return write


SEEDS: dict[str, Callable[[Path], Path]] = {
    "lzma": _file(".pth", lambda: _in_compressed_entry(zipfile.ZIP_LZMA)),
    "bz2": _file(".pth", lambda: _in_compressed_entry(zipfile.ZIP_BZIP2)),
    "deflate": _file(".pth", lambda: _in_compressed_entry(zipfile.ZIP_DEFLATED)),
    "a huge empty shape": _file(".safetensors", lambda: _with_shape([0, 1 << 62])),
    "two huge dimensions": _file(".safetensors", lambda: _with_shape([0, 1 << 62, 1 << 62])),
    "70 dimensions": _file(".safetensors", lambda: _with_shape([1] * 70, 1)),
    "70 empty dimensions": _file(".safetensors", lambda: _with_shape([0] * 70)),
    "a 401-digit length": _file(".pth", lambda: _with_storage_length(BIG)),
    "a negative length": _file(".pth", lambda: _with_storage_length(-4)),
    "a bomb": _file(".pth", _bomb),
    "a link loop": _link_loop,
    "a link loop inside": _folder_with_link_loop,
}
ORIGINALS = (
    ("pth", lambda: pytorch_zip(*pytorch_description())),
    ("pth", lambda: pytorch_stream(*pytorch_description())),
    ("safetensors", lambda: PLAIN),
    ("zip", lambda: zipped(oneflow_entries())),
)


def alter(rng: random.Random, folder: Path) -> Path:
    """Write one altered checkpoint."""
    kind = rng.randrange(6)
    suffix = "pth"
    if kind == 0:
        described, storages = pytorch_description()
        data = pytorch_zip(altered(rng, described), storages, rng.choice(COMPRESSIONS))
    elif kind == 1:
        described, storages = pytorch_description()
        data = pytorch_stream(altered(rng, described), storages)
    elif kind == 2:
        suffix, data = "safetensors", altered_safetensors(rng)
    elif kind == 3:
        suffix, data = "zip", zipped(oneflow_entries(rng), rng.choice(COMPRESSIONS))
    elif kind == 4:
        suffix, make = rng.choice(ORIGINALS)
        data = damaged(rng, make())
    else:
        compression = rng.choice(COMPRESSIONS)
        data = damaged(rng, pytorch_zip(*pytorch_description(), compression))
    path = folder / f"altered.{suffix}"
    path.write_bytes(data)
    return path


def read(path: Path) -> None:
    """Read a checkpoint as it is, and as a ResNet-18's."""
    read_checkpoint(path)
    load_weights(path, "resnet18")
