"""Reading HDF5 files of others in a child process, which a damaged or hostile file may crash."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, one_line
from ..store.format import seal
from ..store.h5py_view import ChildError, child_answer, limit_this_process

_LEAST_S = 60
_BYTES_PER_S = 10e6  # of a compressed file on a slow disk
_MOST_DEEP = 3
_MOST_NAMES = 1000
_MOST_INFLATED = 1000  # times the file: what filters may make of it
_SLACK_BYTES = 1 << 24
_PIECE_BYTES = 1 << 24
_AT = "at"  # the number of the file that the child is reading


def read_hdf5(paths: Sequence[Path], folder: Path) -> list[dict[str, Any]]:
    """Return the arrays of files by name, copied into ``folder`` and mapped.

    Numbers are arrays; texts are lists of str; ``"NAME@ATTRIBUTE"`` are attributes that are text,
    ``"@encoding-type"`` of the root among them.
    """
    size_bytes = sum(path.stat().st_size for path in paths)
    timeout_s = int(_LEAST_S + size_bytes / _BYTES_PER_S)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".list", encoding="utf-8") as listed:
        listed.write("\0".join(str(path.resolve()) for path in paths))
        listed.flush()
        try:
            answer = child_answer(__name__, [listed.name, str(folder), str(timeout_s)], timeout_s)
        except ChildError as error:
            at = folder / _AT
            number = int(at.read_text() or 0) if at.exists() else 0
            raise DatasetError(
                f"{paths[number]}: expected a readable HDF5 file, found {error}; write it again"
            ) from None
    if "error" in answer:
        raise DatasetError(f"{paths[answer['number']]}: {answer['error']}")
    return [
        {
            name: np.load(folder / value, mmap_mode="r") if kind == "array" else value
            for name, (kind, value) in found.items()
        }
        for found in answer["files"]
    ]


def _answer_parent() -> None:
    """Copy, in the child, the arrays of every file as .npy; print their names, sealed."""
    listed, folder, timeout_s = sys.argv[1:4]
    limit_this_process(int(timeout_s))
    target = Path(folder)
    answer: dict[str, Any] = {"files": []}
    for number, name in enumerate(Path(listed).read_text("utf-8").split("\0")):
        (target / _AT).write_text(str(number))
        try:
            answer["files"].append(dict(_copied(Path(name), target, f"{number:06d}")))
        except DatasetError as error:
            answer = {"error": str(error), "number": number}
            break
        except Exception as error:  # h5py raises nearly any for a damaged file
            why = f"expected a readable HDF5 file, found: {one_line(error)}; write it again"
            answer = {"error": why, "number": number}
            break
    sys.stdout.buffer.write(seal(answer))


def _copied(path: Path, folder: Path, stem: str) -> Iterator[tuple[str, tuple[str, Any]]]:
    import h5py

    room = _SLACK_BYTES + _MOST_INFLATED * path.stat().st_size
    with h5py.File(path, "r", locking=False) as file:
        yield from _attributes(file, "")
        for number, (name, node) in enumerate(_walk(file, "", 0)):
            if number >= _MOST_NAMES:
                raise DatasetError(f"expected at most {_MOST_NAMES} arrays, found more")
            yield from _attributes(node, name)
            if not isinstance(node, h5py.Dataset) or node.shape is None:
                continue
            if node.external or node.is_virtual:
                raise DatasetError(
                    f"expected {name!r} in the file itself, found it in another; copy it"
                )
            room -= node.nbytes
            if room < 0:
                raise DatasetError(
                    f"expected arrays that fit the file's {path.stat().st_size:,} bytes, found "
                    f"{node.nbytes:,} declared in {name!r}; write it again"
                )
            if h5py.check_string_dtype(node.dtype) or node.dtype.kind == "S":
                values = np.atleast_1d(node[...])
                if values.ndim == 1:
                    yield name, ("text", [_text(value) for value in values.tolist()])
            elif node.dtype.kind in "fiu":
                place = f"{stem}-{number:04d}.npy"
                _copy(node, folder / place)
                yield name, ("array", place)


def _walk(group: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield everything that hard links lead to, by name."""
    import h5py

    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue  # to another file, or to another place in this one
        node = group[name]
        yield f"{prefix}{name}", node
        if isinstance(node, h5py.Group) and depth < _MOST_DEEP:
            yield from _walk(node, f"{prefix}{name}/", depth + 1)


def _attributes(node: Any, name: str) -> Iterator[tuple[str, tuple[str, Any]]]:
    for key in node.attrs:
        value = node.attrs[key]
        if isinstance(value, (str, bytes)):
            yield f"{name}@{key}", ("text", _text(value))


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _copy(node: Any, path: Path) -> None:
    kept = node.dtype.newbyteorder("<")
    shape = node.shape or (1,)
    header = {"descr": kept.str, "fortran_order": False, "shape": shape}
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        if not node.shape:
            stream.write(np.asarray(node[()], kept).tobytes())
        elif node.nbytes:
            step = max(1, _PIECE_BYTES * len(node) // node.nbytes)
            for start in range(0, len(node), step):
                stream.write(node[start : start + step].astype(kept, copy=False).tobytes())


if __name__ == "__main__":
    _answer_parent()
