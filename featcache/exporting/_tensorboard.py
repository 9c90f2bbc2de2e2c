"""A folder for TensorBoard's projector: points to turn around, coloured by class.

https://github.com/tensorflow/tensorboard/tree/master/tensorboard/plugins/projector
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import OutputError
from ..files import replace_folder, replaced_file, write_atomically
from ..store import decode_id, label_names
from ._reading import Reading, text_of

__all__ = ["PROJECTOR_ROWS", "is_projector", "write_projector"]

PROJECTOR_ROWS = 10_000  # what a browser can do t-SNE on
_CONFIG = "projector_config.pbtxt"
_TENSORS = "tensors.tsv"
_METADATA = "metadata.tsv"
_LIMIT_SEED = 0


def write_projector(folder: Path, reading: Reading, limit: int) -> int:
    """Write ``tensors.tsv``, ``metadata.tsv`` and ``projector_config.pbtxt``.

    One line per image: its features (7 digits), and id, class, label and split.

    Parameters
    ----------
    folder : Path
        Seen under this name when it is complete; replaced if it is there.
    reading : Reading
        The cache.
    limit : int
        Images at most: a draw with the proportions of splits and classes, always the same.

    Returns
    -------
    int
        How many images.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    labels = {role: reading.whole(f"{role}_labels") for role in reading.roles}
    chosen = _draw(labels, limit)
    with _replaced_folder(folder) as hidden:
        _write_lines(hidden / _TENSORS, _tensor_lines(reading, chosen))
        _write_lines(hidden / _METADATA, _metadata_lines(reading, chosen, labels))
        config = (
            f'embeddings {{\n  tensor_name: "features"\n  tensor_path: "{_TENSORS}"\n'
            f'  metadata_path: "{_METADATA}"\n}}\n'
        )
        write_atomically(hidden / _CONFIG, config.encode())
    return sum(map(len, chosen.values()))


def is_projector(folder: Path) -> bool:
    """Tell whether a folder is one that this module wrote, and holds nothing else."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {
        _CONFIG,
        _TENSORS,
        _METADATA,
    }


def _draw(labels: dict[str, np.ndarray], limit: int) -> dict[str, np.ndarray]:
    """Return rows of each split, sorted: every so-many-th of all, ordered by split and class.

    Within a class the order is drawn. So every class has its share to within one
    image, however small it is.
    """
    splits = np.repeat(np.arange(len(labels)), [len(values) for values in labels.values()])
    rows = np.concatenate([np.arange(len(values)) for values in labels.values()])
    classes = np.concatenate(list(labels.values()))
    order = np.lexsort((np.random.default_rng(_LIMIT_SEED).random(len(rows)), classes, splits))
    n_chosen = min(limit, len(rows))
    taken = order[(2 * np.arange(n_chosen) + 1) * len(rows) // max(2 * n_chosen, 1)]
    return {
        role: np.sort(rows[taken[splits[taken] == number]]) for number, role in enumerate(labels)
    }


def _tensor_lines(reading: Reading, chosen: dict[str, np.ndarray]) -> Iterator[str]:
    for role, rows in chosen.items():
        start = 0
        for piece in reading.pieces(f"{role}_features"):
            here = rows[(rows >= start) & (rows < start + len(piece))] - start
            for features in piece[here]:
                yield "\t".join(f"{number:.7g}" for number in features.ravel().tolist())
            start += len(piece)


def _metadata_lines(
    reading: Reading, chosen: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Iterator[str]:
    yield "id\tclass\tlabel\tsplit"
    names = label_names(reading.cache.class_names)
    for role, rows in chosen.items():
        ids = reading.whole(f"{role}_ids")[rows]
        for name, label in zip(ids.tolist(), labels[role][rows].tolist(), strict=True):
            yield "\t".join((_cell(decode_id(name)), _cell(names[label]), str(label), role))


def _cell(text: str) -> str:
    """Return a name without the characters that end a cell or a line: they are spelt out."""
    return text_of("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with (
        replaced_file(path) as descriptor,
        os.fdopen(os.dup(descriptor), "w", encoding="utf-8", newline="\n") as stream,
    ):
        stream.writelines(f"{line}\n" for line in lines)


@contextmanager
def _replaced_folder(folder: Path) -> Iterator[Path]:
    """Show a folder under its final name when everything in it is on the disk."""
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir()
        yield hidden
        replace_folder(hidden, folder)
    except OSError as error:
        if isinstance(error, OutputError):  # of a file in it, by the name that nobody will see
            raise OutputError(str(error).replace(str(hidden), str(folder))) from None
        raise OutputError(
            f"{folder}: cannot be written: {error.strerror or error}; free space or name another "
            "output"
        ) from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
