"""PyTorch: the engine for GPUs and Pythons that OneFlow has no wheel for.

On a CPU everything here was measured and is tested. On a GPU it was never run: what is
written for CUDA, for ROCm (which calls itself CUDA) and for Apple's MPS follows PyTorch's
documentation, and the CPU runs the same code but for streams, pinned memory and compiling.

Weights are cast once, rather than by autocast in every pass: 10 % faster on two Zen 4 cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from ..backbone import get_backbone
from ..cores import usable_cores
from ..errors import EngineUnavailableError, RecipeError
from ..frameworks import import_torch
from ..progress import OnNote, silent
from ..weights import Weights
from ._images import check_images
from ._torch_graph import Forward
from ._torch_passes import GpuPasses, Passes, ProcessorPasses

__all__ = ["COMPILE_VARIABLE", "TorchEngine"]

COMPILE_VARIABLE = "FEATCACHE_COMPILE"

# On a CPU 32 images of 64 pixels, 2 of 224, as for OpenVINO; on a GPU 256 of 224.
_PIXELS_PER_PASS = {"cpu": 2**17, "gpu": 256 * 224 * 224}
_MAX_IMAGES_PER_PASS = {"cpu": 32, "gpu": 512}
_PASSES_PER_CALL = 4  # per core or GPU
# To compile takes tens of seconds on a GPU, and may save some 30 us per image of 224 pixels: an
# estimate until benchmarks/gpu.py has run on one.
_COMPILE_PIXELS = 1_000_000 * 224 * 224


class TorchEngine:
    """A frozen backbone with its BatchNorm folded away.

    Parameters
    ----------
    weights : Weights
        The checkpoint; its preprocessing is the input's.
    cuts : tuple of str
        Where features are taken.
    device : str
        ``"cpu"``, ``"cuda"`` or ``"mps"``.
    precision : str
        ``"f32"``, ``"bf16"`` or ``"f16"``: what the convolutions compute in, and what
        passes between them. Pixels are enlarged and normalised in float32, and features
        pooled in it, in any case.
    n_images : int
        How many images are to come, all in all: whether compiling is worth its time. The
        environment variable ``FEATCACHE_COMPILE``, 0 or 1, overrides. Never on a CPU.
    on_note : callable
        Told when the network is compiled, and when the GPU's memory is too small.

    Raises
    ------
    RecipeError
        ``FEATCACHE_COMPILE`` is something else.
    EngineUnavailableError
        The device fails, or has no memory for a single image.
    """

    def __init__(
        self,
        weights: Weights,
        cuts: tuple[str, ...],
        device: str = "cpu",
        precision: str = "f32",
        *,
        n_images: int = 0,
        on_note: OnNote = silent,
    ) -> None:
        self._torch = import_torch()
        self._weights = weights
        self._cuts = cuts
        self._device = device
        self._precision = precision
        self._on_note = on_note
        size = weights.preprocess.size
        backbone = get_backbone(weights.backbone)
        self._shapes = {cut: backbone.cut_shape(cut, size) for cut in cuts}
        kind = "cpu" if device == "cpu" else "gpu"
        fitting = min(_MAX_IMAGES_PER_PASS[kind], _PIXELS_PER_PASS[kind] // size**2)
        self._per_pass = max(1, fitting)
        self._told = False
        self._compiled = _is_to_compile(device, n_images * size**2)
        self._passes: Passes | None = None
        self._on_device(self._ready)

    @property
    def batch_size(self) -> int:
        """Images per call that keep the device busy; any other number works too."""
        workers = usable_cores() if self._device == "cpu" else 1
        return self._per_pass * workers * _PASSES_PER_CALL

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of uint8 pixels (N, s, s, 3), as `Engine.extract` does."""
        check_images(images, self._weights.preprocess)
        features = {
            cut: np.empty((len(images), *shape), np.float32) for cut, shape in self._shapes.items()
        }
        self._on_device(lambda: self._ready().run(images, features))
        return features

    def _ready(self) -> Passes:
        """Return what runs the network; load it, and compile it if it is to be."""
        if self._passes is None:
            forward = self._forward()
            if self._device == "cpu":
                self._passes = ProcessorPasses(forward, self._per_pass)
            else:
                size = self._weights.preprocess.size
                self._passes = GpuPasses(forward, self._per_pass, size, self._shapes, self._device)
        return self._passes

    def _forward(self) -> Forward:
        facts = self._weights, self._cuts, self._device, self._precision
        if self._compiled:
            self._on_note("PyTorch compiles the network for many images, for tens of seconds")
            try:
                forward = Forward(*facts, compiled=True)
                self._warm_up(forward)
                return forward
            except Exception as error:  # whatever a compiler's absence may raise
                if _is_out_of_memory(error):
                    raise
                self._on_note(
                    "PyTorch could not compile the network, and runs it layer by layer: "
                    f"{_first_line(error)}"
                )
                self._compiled = False
        return Forward(*facts, compiled=False)

    def _warm_up(self, forward: Forward) -> None:
        size = self._weights.preprocess.size
        shape = (self._per_pass, size, size, 3)
        pixels = self._torch.zeros(shape, dtype=self._torch.uint8, device=self._device)
        with self._torch.inference_mode():
            forward(pixels)

    def _on_device(self, work: Callable[[], object]) -> None:
        """Do some work; where the memory is too small, halve the images per pass and do it again.

        That is told once, and it changes features by rounding at most.
        """
        while True:
            try:
                work()
                return
            except RuntimeError as error:
                little = _is_out_of_memory(error)
                if not little and self._device == "cpu":
                    raise
                if not little or self._per_pass == 1:
                    raise EngineUnavailableError(
                        f"engine torch: expected {self._device} to compute, found "
                        f"{type(error).__name__}: {_first_line(error)}; run featcache doctor, or "
                        "use --device cpu"
                    ) from error
            if not self._told:
                self._on_note(
                    f"{self._device}: too little memory for {self._per_pass} images at once; "
                    "going on with half as many, or fewer"
                )
            self._told = True
            self._per_pass //= 2
            self._passes = None
            if self._device == "cuda":
                self._torch.cuda.empty_cache()


def _is_to_compile(device: str, n_pixels: int) -> bool:
    wish = os.environ.get(COMPILE_VARIABLE, "").strip()
    if wish not in ("", "0", "1"):
        raise RecipeError(f"{COMPILE_VARIABLE}: expected 0 or 1, found {wish!r}; unset it")
    if device == "cpu":
        return False  # its layers are joined as they are
    return wish == "1" if wish else device == "cuda" and n_pixels >= _COMPILE_PIXELS


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell a memory that is too small from other failures: CUDA's error, MPS's by its text."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error)
