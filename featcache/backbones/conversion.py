"""PyTorch's models as OpenVINO graphs: converted once, kept, and checked at every start.

What is kept beside a graph is PyTorch's own features of a few canonical images. An engine
computes them again when it starts, so that no converted model is trusted unseen, and PyTorch is
not even imported where a graph is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import EngineUnavailableError, FeatcacheError, OutputError, one_line
from ..files import discard
from ..frameworks import import_openvino, openvino_core, openvino_status, torch_status
from ..preprocess import Preprocess
from .network import filled_up, in_passes
from .pretrained import cache_folder

# Below: what a converted graph computes is another function. Measured over eight architectures of
# timm, f32 lies above 0.9999998 (benchmarks/backbones.py); bf16 above 0.999. INT8 is scaled by
# other images than these: 0.80 for EfficientNet-Lite0, whose probe is as good as ever.
LEAST_COSINE = {"f32": 0.99999, "bf16": 0.99, "f16": 0.999, "int8": 0.5}
_N_CANONICAL = 4
_REFERENCE = "reference.npz"
_REASON = "reason.txt"
_SEAL = "digests.json"

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """How far an engine's features of the canonical images are from PyTorch's own."""

    cosine: float  # the least of all images and cuts
    difference: float  # the largest of all numbers

    def __str__(self) -> str:
        return f"cosine {self.cosine:.8f}, largest difference {self.difference:.2g}"


def canonical_images(size: int) -> np.ndarray:
    """Return images that every engine is checked on: uint8 (4, size, size, 3)."""
    generator = np.random.default_rng(0)
    side = -(-size // 8)
    coarse = generator.integers(0, 256, (2, side, side, 3), np.uint8)
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    images = np.empty((_N_CANONICAL, size, size, 3), np.uint8)
    images[:2] = coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size]
    images[2] = generator.integers(0, 256, (size, size, 3), np.uint8)
    images[3] = (ramp[None, :, None] // [1, 2, 3]) ^ ramp[:, None, None]
    return images


def agreement(features: Arrays, reference: Arrays) -> Agreement:
    """Compare features (N, ...) by cut with the reference's."""
    cosine, difference = 1.0, 0.0
    for cut, wanted in reference.items():
        ours = features[cut].reshape(len(wanted), -1).astype(np.float64)
        theirs = wanted.reshape(len(wanted), -1).astype(np.float64)
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        same = np.einsum("nd,nd->n", ours, theirs) / np.where(lengths == 0, 1, lengths)
        same[(lengths == 0) & (ours == theirs).all(axis=1)] = 1
        # A NaN on either side must not pass: min and max would drop it.
        cosine = float(np.min([cosine, *np.nan_to_num(same, nan=-1.0)]))
        largest = float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max(initial=0))
        difference = max(difference, largest)
    return Agreement(cosine, difference)


def seal(folder: Path) -> None:
    """Write down what is in a folder, so that `is_intact` can tell."""
    (folder / _SEAL).write_text(json.dumps(_digests(folder)), "utf-8")


def is_intact(folder: Path) -> bool:
    """Tell whether a folder holds what was there when it was sealed, to the byte.

    OpenVINO may crash on a graph that is not what it wrote.
    """
    try:
        sealed: dict[str, str] = json.loads((folder / _SEAL).read_text("utf-8"))
        return _digests(folder) == sealed
    except (OSError, ValueError):
        return False


def kept_in(folder: Path, make: Callable[[Path], None]) -> None:
    """See that a folder is whole; else have ``make`` fill a new one, which takes its place."""
    if is_intact(folder):
        return
    discard(folder)
    new = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}")
    try:
        new.mkdir(parents=True)
        make(new)
        seal(new)
        with suppress(OSError):  # another process was first
            os.rename(new, folder)
    except OSError as error:
        if isinstance(error, FeatcacheError):
            raise
        raise OutputError(
            f"{new}: a converted model cannot be kept: {error.strerror or error}; free space, "
            "or set FEATCACHE_WEIGHTS to another folder"
        ) from None
    finally:
        discard(new)


def _digests(folder: Path) -> dict[str, str]:
    names = sorted(path.name for path in folder.iterdir() if path.name != _SEAL)
    return {name: _digest(folder / name) for name in names}


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Conversion:
    """The OpenVINO form of a PyTorch model, for some cuts and images per pass.

    ``module`` is called only where no graph is kept. ``facts`` says everything that the graph
    depends on.
    """

    def __init__(
        self,
        facts: Mapping[str, Any],
        module: Callable[[], Any],
        cuts: Sequence[str],
        batch: int,
        preprocess: Preprocess,
    ) -> None:
        versions = {"openvino": openvino_status()[0], "torch": torch_status()[0]}
        key = {**facts, **versions, "cuts": list(cuts), "batch": batch, "size": preprocess.size}
        key["mean"], key["std"] = preprocess.mean, preprocess.std
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self._folder = cache_folder().parent / "converted" / digest[:32]
        self._module = module
        self._cuts = tuple(cuts)
        self._batch = batch
        self._preprocess = preprocess

    def problem(self) -> str:
        """Convert unless that is done; return why the model cannot be, or nothing."""
        kept_in(self._folder, self._convert_into)
        reason = self._folder / _REASON
        return one_line(reason.read_text("utf-8", "replace")) if reason.exists() else ""

    def graph(self) -> Any:
        """Return the graph, an ``openvino.Model`` with one output per cut, in order."""
        problem = self.problem()
        if problem:
            raise EngineUnavailableError(
                f"engine openvino: cannot run this model: {problem}; use --engine torch"
            )
        try:
            return openvino_core().read_model(str(self._folder / "model.xml"))
        except RuntimeError:
            discard(self._folder)  # damaged: the next start makes it anew
            raise EngineUnavailableError(
                f"{self._folder}: expected a converted model, found a damaged one, now removed; "
                "run the same command again"
            ) from None

    def reference(self) -> dict[str, np.ndarray]:
        """Return PyTorch's features of the canonical images."""
        with np.load(self._folder / _REFERENCE) as arrays:
            return {cut: arrays[f"cut{number}"] for number, cut in enumerate(self._cuts)}

    def _convert_into(self, folder: Path) -> None:
        import torch

        from .torch_input import normalised

        module = self._module()
        images = canonical_images(self._preprocess.size)
        ov = import_openvino()
        shape = [self._batch, 3, self._preprocess.size, self._preprocess.size]
        try:
            with torch.inference_mode():
                expected = module(normalised(torch.from_numpy(images), self._preprocess))
            arrays = {f"cut{number}": value.numpy() for number, value in enumerate(expected)}
            np.savez(folder / _REFERENCE, **arrays)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                graph = ov.convert_model(module, example_input=torch.zeros(shape), input=shape)
            ov.save_model(graph, str(folder / "model.xml"), compress_to_fp16=False)
            compiled = openvino_core().compile_model(
                graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
            )
            found = self._run(compiled, images)
            agrees = agreement(found, dict(zip(self._cuts, arrays.values(), strict=True)))
            problem = "" if agrees.cosine >= LEAST_COSINE["f32"] else f"it differs: {agrees}"
        except OSError:
            raise
        except Exception as error:  # OpenVINO's converter and a user's module raise what they like
            problem = f"{type(error).__name__}: {one_line(error)}"
        if problem:
            (folder / _REASON).write_text(problem, "utf-8")

    def _run(self, compiled: Any, images: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        from .torch_input import normalised

        pixels = normalised(torch.from_numpy(images), self._preprocess).contiguous().numpy()

        def run(chunk: np.ndarray) -> list[np.ndarray]:
            results = compiled(filled_up(chunk, self._batch))
            return [results[index] for index in range(len(self._cuts))]

        return dict(zip(self._cuts, in_passes(pixels, self._batch, run), strict=True))
