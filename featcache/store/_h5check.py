"""Whether h5py shows the same as the index: whoever reads with h5py alone must see no other cache.

A child process opens the file, since libhdf5 can crash the process that opens a
damaged one, and says what it finds; the parent compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CacheCorruptError, CacheMissError
from ._child import answer_parent, run_in_child
from ._format import BLOCK_ROWS, Index, decode_id, encode_id
from ._hdf5 import block_digests, opened, plain_attribute, plain_dataset
from ._index import AGAIN
from ._layout import attributes

__all__ = ["check_view", "describe"]

_DEEPEST = 4  # train/cuts/layer3/identity
_DIGESTS = "_sha256"


def check_view(index: Index) -> None:
    """Compare what h5py sees in a packed file with its index.

    Raises
    ------
    CacheCorruptError
        They differ; the first difference is named.
    """
    try:
        found = run_in_child(__name__, index.path)
    except CacheMissError as error:  # an array whose way is broken
        raise CacheCorruptError(str(error)) from None
    names = {"class_names", *index.arrays, *(f"{name}{_DIGESTS}" for name in index.arrays)}
    for name in sorted(names.symmetric_difference(found["names"])):
        where = "its index alone" if name in names else "HDF5 alone, and not in its index"
        raise CacheCorruptError(
            f"{index.path}: expected the same arrays in HDF5 and in its index, found {name} in "
            f"{where}; do not use this file, or {AGAIN}"
        )
    for name, (wanted, seen) in _pairs(index, found):
        if wanted != seen:
            raise CacheCorruptError(
                f"{index.path}: expected h5py to see {name} as {wanted!r:.200}, as its index says, "
                f"found {seen!r:.200}; do not use this file, or {AGAIN}"
            )


def _pairs(index: Index, found: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield what is compared: its name, what the index says, and what the child saw."""
    wanted = attributes(index.meta)
    for name in sorted({*wanted, *found["attributes"]}):
        yield f"attribute {name!r}", (wanted.get(name), found["attributes"].get(name))
    # Where the bytes of a name end, HDF5 has zeros.
    class_names = [decode_id(encode_id(name).rstrip(b"\0")) for name in index.meta["class_names"]]
    yield "class_names", (class_names, found["class_names"])
    for name, array in index.arrays.items():
        offset = array.blocks[0].offset if array.size_bytes else None
        yield name, ([array.dtype.str, list(array.shape), offset], found["arrays"][name][:3])
        digests = [block.sha256 for block in array.blocks]
        yield f"{name}{_DIGESTS}", (digests, found["arrays"][name][3])


def describe(path: Path) -> dict[str, Any]:
    """Return what h5py sees in a packed file: names, attributes, and where arrays lie.

    Raises
    ------
    CacheCorruptError
        It is damaged, or built to read outside itself.
    """
    with opened(path) as file:
        names = sorted(_walk(file, "", path))
        arrays = [name for name in names if f"{name}{_DIGESTS}" in names]
        class_names = []
        if "class_names" in names:
            class_names = plain_dataset(file, "class_names", path)[...].tolist()
        return {
            "names": names,
            "attributes": {name: plain_attribute(file, name, path) for name in file.attrs},
            "class_names": [decode_id(name) for name in class_names],
            "arrays": {name: _array(file, name, path) for name in arrays},
        }


def _walk(group: Any, prefix: str, path: Path) -> Iterator[str]:
    """Yield the names of all data sets, and of groups without one; no link is followed."""
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
        # A link that is not hard is left for plain_dataset to refuse.
        hard = isinstance(link, h5py.HardLink)
        if hard and group.get(name, getclass=True) is h5py.Group:
            yield from _walk(group[name], f"{prefix}{name}/", path)
        else:
            yield f"{prefix}{name}"


def _array(file: Any, name: str, path: Path) -> list[Any]:
    array = plain_dataset(file, name, path)
    n_rows = array.shape[0] if array.shape else 0
    offset = array.id.get_offset() if array.nbytes else None
    return [
        array.dtype.str,
        list(array.shape or ()),
        offset,
        block_digests(file, name, -(-n_rows // BLOCK_ROWS), path),
    ]


if __name__ == "__main__":
    answer_parent(describe)
