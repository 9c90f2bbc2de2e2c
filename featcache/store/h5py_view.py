"""What h5py sees in a file, read by a child process: a damaged file can crash libhdf5."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheError, one_line
from .format import BLOCK_ROWS, Index, decode_id, encode_id, seal, unseal
from .index import AGAIN
from .writer import attributes


def _attribute(file: Any, name: str, path: Path) -> str | int | float:
    """Return an attribute of the root; raise where it is neither text nor a number."""
    value = file.attrs[name]
    if isinstance(value, bytes):
        value = value.decode()
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, (str, int, float)):
        raise CacheCorruptError(
            f"{path}: expected text or a number in attribute {name!r}, found "
            f"{type(value).__name__}; {AGAIN}"
        )
    return value


def _dataset(file: Any, name: str, path: Path) -> Any:
    """Return a data set of this file, without filters, reached by hard links alone.

    Through links, external storage and virtual data sets HDF5 reads any file of the machine,
    and filters turn a few bytes into terabytes.
    """
    import h5py

    node = file
    for part in name.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise CacheCorruptError(f"{path}: expected {name}, found none in this file; {AGAIN}")
        if not isinstance(link, h5py.HardLink):
            raise CacheCorruptError(
                f"{path}: expected {name} in the file itself, found a "
                f"{type(link).__name__} to elsewhere; do not use this file"
            )
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise CacheCorruptError(f"{path}: expected an array at {name}, found a group; {AGAIN}")
    if node.external or node.is_virtual or node.chunks or node.dtype.kind not in "fiuS":
        raise CacheCorruptError(
            f"{path}: expected {name} as plain contiguous numbers or text, found external, "
            "virtual, filtered or other storage; do not use this file"
        )
    if node.nbytes > path.stat().st_size:
        raise CacheCorruptError(
            f"{path}: expected {name} to fit into the file, found {node.nbytes:,} bytes declared "
            f"in a file of {path.stat().st_size:,}; {AGAIN}"
        )
    return node


# Like ``python -m``, but without the current folder, which may hold a stranger's files: nothing
# may be imported from there.
_RUN = (
    "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__')"
)
_TIMEOUT_S = 60
_MEMORY_BYTES = 4 << 30


def child_answer(module: str, arguments: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Run a module of ours in a child; return what it printed, sealed, or raise a ChildError."""
    root = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{before}" if before else root,
        # Each thread of a BLAS reserves memory, which is limited in the child.
        "OPENBLAS_NUM_THREADS": "1",
    }
    try:
        child = subprocess.run(
            [sys.executable, "-c", _RUN, module, *arguments],
            capture_output=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        return unseal(child.stdout)
    except subprocess.TimeoutExpired:
        raise ChildError(f"one that libhdf5 did not finish reading in {timeout_s:.0f} s") from None
    except ValueError:
        last = (child.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        raise ChildError(
            f"one that ended libhdf5 with exit code {child.returncode} ({one_line(last)})"
        ) from None


class ChildError(Exception):
    """A child that read a file crashed or hung."""


def _answer_parent() -> None:
    """Print, in the child, what `_describe` returns or raises, sealed."""
    limit_this_process(_TIMEOUT_S)
    path = Path(sys.argv[1])
    try:
        answer = _describe(path)
    except CacheError as error:
        answer = {"error": str(error)}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        # h5py raises any of these for a damaged file.
        answer = {"error": f"{path}: expected a readable HDF5 file, found: {error}; {AGAIN}"}
    sys.stdout.buffer.write(seal(answer))


def limit_this_process(timeout_s: int) -> None:
    """Limit the memory and time that a hostile file can take, where the system can."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CPU, timeout_s),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(OSError, ValueError):  # macOS refuses some
            _, hard = resource.getrlimit(limit)
            resource.setrlimit(limit, (value if hard == -1 else min(value, hard), hard))


_DEEPEST = 4  # train/cuts/layer3/identity
_DIGESTS = "_sha256"


def check_view(index: Index) -> None:
    """Compare what h5py sees in a packed file with its index; name the first difference."""
    try:
        seen = child_answer(__name__, [os.fspath(index.path)], _TIMEOUT_S)
    except ChildError as error:
        raise CacheCorruptError(
            f"{index.path}: expected a readable HDF5 file, found {error}; {AGAIN}"
        ) from None
    if "error" in seen:
        raise CacheCorruptError(seen["error"])
    names = {"class_names", *index.arrays, *(f"{name}{_DIGESTS}" for name in index.arrays)}
    for name in sorted(names.symmetric_difference(seen["names"])):
        where = "its index alone" if name in names else "HDF5 alone, and not in its index"
        raise CacheCorruptError(
            f"{index.path}: expected the same arrays in HDF5 and in its index, found {name} in "
            f"{where}; do not use this file, or {AGAIN}"
        )
    for name, in_index, in_hdf5 in _compared(index, seen):
        if in_index != in_hdf5:
            raise CacheCorruptError(
                f"{index.path}: expected h5py to see {name} as {in_index!r:.200}, as its index "
                f"says, found {in_hdf5!r:.200}; do not use this file, or {AGAIN}"
            )


def _compared(index: Index, seen: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is compared: its name, its value in the index, and the child's."""
    in_index = attributes(index.meta)
    for name in sorted({*in_index, *seen["attributes"]}):
        yield f"attribute {name!r}", in_index.get(name), seen["attributes"].get(name)
    # HDF5 fills up names with zeros.
    class_names = [decode_id(encode_id(name).rstrip(b"\0")) for name in index.meta["class_names"]]
    yield "class_names", class_names, seen["class_names"]
    for name, array in index.arrays.items():
        offset = array.blocks[0].offset if array.size_bytes else None
        encoding = "utf-8" if array.dtype.kind == "S" else None
        described = [array.dtype.str, encoding, list(array.shape), offset]
        yield name, described, seen["arrays"][name][:4]
        digests = [block.sha256 for block in array.blocks]
        yield f"{name}{_DIGESTS}", digests, seen["arrays"][name][4]


def _describe(path: Path) -> dict[str, Any]:
    """Return what h5py sees in a packed file: names, attributes, and where the arrays are."""
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        names = sorted(_walk(file, "", path))
        arrays = [name for name in names if f"{name}{_DIGESTS}" in names]
        class_names = []
        if "class_names" in names:
            class_names = _dataset(file, "class_names", path)[...].tolist()
        return {
            "names": names,
            "attributes": {name: _attribute(file, name, path) for name in file.attrs},
            "class_names": [decode_id(name) for name in class_names],
            "arrays": {name: _array(file, name, path) for name in arrays},
        }


def _walk(group: Any, prefix: str, path: Path) -> Iterator[str]:
    """Yield the names of all data sets and of empty groups; follow no link."""
    import h5py

    if prefix.count("/") >= _DEEPEST:
        raise CacheCorruptError(
            f"{path}: expected arrays at most {_DEEPEST} groups deep, found {prefix}; do not use "
            "this file"
        )
    names = list(group)
    if prefix and not names:
        yield prefix
    for name in names:
        link = group.get(name, getlink=True)
        # A link that is not hard is left for _dataset to refuse.
        hard = isinstance(link, h5py.HardLink)
        if hard and group.get(name, getclass=True) is h5py.Group:
            yield from _walk(group[name], f"{prefix}{name}/", path)
        else:
            yield f"{prefix}{name}"


def _array(file: Any, name: str, path: Path) -> list[Any]:
    import h5py

    array = _dataset(file, name, path)
    digests = _dataset(file, f"{name}{_DIGESTS}", path)
    n_blocks = -(-array.shape[0] // BLOCK_ROWS) if array.shape else 0
    if digests.shape != (n_blocks, 32) or digests.dtype != np.uint8:
        raise CacheCorruptError(
            f"{path}: expected {n_blocks} SHA-256 beside {name}, found {digests.dtype} "
            f"{digests.shape}; {AGAIN}"
        )
    offset = array.id.get_offset() if array.nbytes else None
    return [
        array.dtype.str,
        getattr(h5py.check_string_dtype(array.dtype), "encoding", None),
        list(array.shape or ()),
        offset,
        [digest.tobytes().hex() for digest in digests[...]],
    ]


if __name__ == "__main__":
    _answer_parent()
