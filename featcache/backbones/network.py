"""Backbones that are not our own ResNets, as engines and the trainer see them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import RecipeError, WeightsError, one_line
from ..options import did_you_mean
from ..preprocess import Preprocess

Shape = tuple[int, ...]
# What the model itself pools: the default of every backbone.
POOLED = "pooled"
_STD = 0.02  # of random matrices and embeddings


class Network:
    """A network with its weights, loaded when it is first needed.

    Its input is normalised float32 (N, 3, s, s). `module` or `graph` is there for each of
    ``engines``.
    """

    engines: tuple[str, ...]  # those that can run it, the one of its library first
    preprocess: Preprocess | None = None  # how its images are prepared, in place of its own way
    fixed_batch: int | None = None  # images per pass, where the network takes no other number

    def shapes(self, cuts: Sequence[str]) -> dict[str, Shape]:
        """Return the shape of one image's features at each cut; RecipeError where there is none."""
        raise NotImplementedError

    def cut_shapes(self) -> dict[str, Shape]:
        """Return every cut worth listing, with the shape of one image's features."""
        raise NotImplementedError

    def n_parameters(self) -> int:
        """Return how many numbers the weights have."""
        raise NotImplementedError

    def module(self, cuts: Sequence[str]) -> Any:
        """Return a module in eval mode of the network's library: input -> float32 per cut."""
        raise NotImplementedError

    def graph(self, cuts: Sequence[str], batch: int) -> Any:
        """Return an OpenVINO model: float32 (batch, 3, s, s) -> one output per cut, in order."""
        raise NotImplementedError

    def graph_problem(self, cuts: Sequence[str], batch: int) -> str:
        """Return why there is no such model, or nothing; may convert it."""
        return ""

    def reference(self, cuts: Sequence[str], batch: int) -> dict[str, np.ndarray]:
        """Return the library's features of the canonical images; empty where there are none."""
        return {}


def unknown_cut(cut: str, known: Sequence[str], backbone: str) -> RecipeError:
    """Return the error of a cut that a backbone does not have."""
    shown = ", ".join(list(known)[:12]) + (" ..." if len(known) > 12 else "")
    return RecipeError(
        f"cut: expected one of {shown} of {backbone}, found {cut!r}"
        + did_you_mean(cut, known, f"featcache backbones {backbone} lists them")
    )


def tensors_digest(tensors: Iterable[tuple[str, Any, Sequence[int], Any]]) -> str:
    """Return SHA-256 (hex) over tensors, each as name, type, shape and the bytes of its numbers."""
    digest = hashlib.sha256()
    for name, dtype, shape, numbers in tensors:
        digest.update(f"{name} {dtype} {tuple(shape)}\n".encode())
        digest.update(numbers)
    return digest.hexdigest()


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return `tensors_digest` of arrays in the order of their names."""
    ordered = ((name, np.asarray(array, order="C")) for name, array in sorted(arrays.items()))
    return tensors_digest((name, one.dtype, one.shape, one.tobytes()) for name, one in ordered)


def check_tensors(
    shapes: Mapping[str, Shape],
    state: Mapping[str, np.ndarray],
    where: str,
    *,
    optional: Collection[str] = (),
    left_over: Sequence[str] = (),
) -> None:
    """Refuse a checkpoint whose tensors are not those of an architecture.

    Those named in ``optional`` may be missing; names that begin as ``left_over`` says may be
    there too.
    """
    for name, shape in shapes.items():
        found = tuple(state[name].shape) if name in state else None
        if found != shape and name not in optional:
            raise WeightsError(
                f"{where}: expected '{name}' of shape {shape}, found {found or 'no such tensor'}; "
                "give a checkpoint of this very architecture"
            )
    others = (name for name in state if name not in shapes)
    for name in others:
        if not name.startswith(tuple(left_over)):
            raise WeightsError(
                f"{where}: expected the tensors of this architecture alone, found "
                f"'{one_line(name)}'; give a checkpoint of this very architecture"
            )


def filled_up(chunk: np.ndarray, count: int) -> np.ndarray:
    """Return a copy of a few rows with zeros after them: always ``count``."""
    filled = np.zeros((count, *chunk.shape[1:]), chunk.dtype)
    filled[: len(chunk)] = chunk
    return filled


def in_passes(
    rows: np.ndarray, count: int, run: Callable[[np.ndarray], Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """Run a network over at most ``count`` rows at a time, and join each of its results.

    ``run`` fills its rows up, since products of other shapes round otherwise; what it returns for
    the filling is left out.
    """
    parts = []
    for start in range(0, len(rows), count):
        chunk = rows[start : start + count]
        parts.append([np.array(result[: len(chunk)]) for result in run(chunk)])
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def drawn(
    arrays: Mapping[str, np.ndarray], groups: Mapping[str, int], seed: int
) -> dict[str, np.ndarray]:
    """Draw random weights, the same for every framework.

    What the library's own initialisation leaves constant (norms, layer scales) stays as it is.
    Convolutions are normal with variance 2 / (k * k * outputs / groups) (He et al., "Delving Deep
    into Rectifiers", ICCV 2015), other matrices and embeddings with a standard deviation of 0.02
    (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, as timm draws them), and other
    vectors, which are biases, 0.

    ``arrays`` are the parameters as their library initialised them, ``groups`` the groups of each
    convolution's weight, by name. Returns name -> float32 array, of those that change.
    """
    generator = np.random.default_rng(seed)
    changed = {}
    for name, array in sorted(arrays.items()):
        if array.size > 1 and (array == array.flat[0]).all():
            continue
        if array.ndim < 2 and name not in groups:
            changed[name] = np.zeros(array.shape, np.float32)
            continue
        std = _STD
        if name in groups:
            outputs = array.shape[0] / groups[name]
            std = float(np.sqrt(2 / (outputs * np.prod(array.shape[2:]))))
        changed[name] = generator.standard_normal(array.shape, np.float32) * np.float32(std)
    return changed
