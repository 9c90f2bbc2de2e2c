"""Where PyTorch's passes run: on a processor one per core, on a GPU one after the other.

A pass has a fixed number of images, and what is missing is filled up with black ones: the
kernels are then the same for every image, whatever stands beside it, and so are its features.

On a processor a pass keeps to one thread, and there is a pass per core: no thread waits for
another inside a layer. Alone that is a few percent faster than all cores on one pass; while
decoders use the same cores it is two to three times as fast, since OpenMP's threads wait for
the slowest at the end of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from threading import Barrier
from typing import Any, Protocol

import numpy as np

from ..cores import usable_cores
from ..frameworks import import_torch

__all__ = ["GpuPasses", "Passes", "ProcessorPasses"]

torch = import_torch()

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]
Network = Callable[[Any], list[Any]]


class Passes(Protocol):
    """Runs a network over any number of images."""

    def run(self, images: np.ndarray, features: Arrays) -> None:
        """Fill features (N, ...) by cut from uint8 images (N, s, s, 3)."""


class ProcessorPasses:
    """A pass at a time on each core, each by a thread of its own.

    Parameters
    ----------
    network : callable
        uint8 tensor (per_pass, s, s, 3) -> float32 tensors, one per cut.
    per_pass : int
        Images per pass.
    """

    def __init__(self, network: Network, per_pass: int) -> None:
        self._network = network
        self._per_pass = per_pass
        self._threads = _single_threads(usable_cores())

    def run(self, images: np.ndarray, features: Arrays) -> None:
        """Fill features (N, ...) by cut from uint8 images (N, s, s, 3)."""
        passes = [
            self._threads.submit(self._pass, images, features, start)
            for start in range(0, len(images), self._per_pass)
        ]
        try:
            for done in passes:
                done.result()
        finally:
            for waiting in passes:
                waiting.cancel()
            wait(passes)  # after Ctrl-C too: nothing may be under way when this returns

    def _pass(self, images: np.ndarray, features: Arrays, start: int) -> None:
        chunk = images[start : start + self._per_pass]
        filled = np.zeros((self._per_pass, *images.shape[1:]), np.uint8)
        filled[: len(chunk)] = chunk
        with torch.inference_mode():
            results = self._network(torch.from_numpy(filled))
        for array, result in zip(features.values(), results, strict=True):
            array[start : start + len(chunk)] = result[: len(chunk)].numpy()


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Return so many threads in each of which PyTorch uses no other."""
    before = torch.get_num_threads()
    all_here = Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread takes over the process's number when it first asks
        torch.set_num_threads(1)
        all_here.wait()

    threads = ThreadPoolExecutor(count, "featcache-torch", initializer=begin)
    try:
        for _ in range(count):
            threads.submit(int)
        all_here.wait()
    except BaseException:
        all_here.abort()  # nobody waits for ever for a main thread that Ctrl-C took away
        raise
    torch.set_num_threads(before)  # it is the number of threads to come as well
    return threads


class GpuPasses:
    """Two passes under way: one computes while the other's pixels travel.

    Parameters
    ----------
    network : callable
        uint8 tensor (per_pass, s, s, 3) -> float32 tensors, one per cut.
    per_pass : int
        Images per pass.
    size : int
        The largest side of an image.
    shapes : mapping
        Cut -> the shape of one image's features.
    device : str
        ``"cuda"`` or ``"mps"``. On the second, passes do not overlap.
    """

    def __init__(
        self, network: Network, per_pass: int, size: int, shapes: Mapping[str, Shape], device: str
    ) -> None:
        lanes = 2 if device == "cuda" else 1
        self._per_pass = per_pass
        self._lanes = [_Lane(network, per_pass, size, shapes, device) for _ in range(lanes)]

    def run(self, images: np.ndarray, features: Arrays) -> None:
        """Fill features (N, ...) by cut from uint8 images (N, s, s, 3)."""
        backends = torch.backends.cudnn
        try:
            # TensorFloat-32 would be a fourth precision; timing kernels, a draw of lots.
            with torch.inference_mode(), backends.flags(enabled=True, allow_tf32=False):
                for number, start in enumerate(range(0, len(images), self._per_pass)):
                    lane = self._lanes[number % len(self._lanes)]
                    lane.collect()
                    lane.launch(images[start : start + self._per_pass], features, start)
                for lane in self._lanes:
                    lane.collect()
        finally:
            for lane in self._lanes:
                lane.give_up()


class _Lane:
    """One pass on its way: pixels to the GPU, through the network, features back."""

    def __init__(
        self, network: Network, per_pass: int, size: int, shapes: Mapping[str, Shape], device: str
    ) -> None:
        self._network = network
        self._device = device
        self._cuda = cuda = device == "cuda"
        if cuda:
            torch.cuda.synchronize()  # the weights are there before another stream reads them
        self._stream = torch.cuda.Stream() if cuda else None
        # Memory that the system cannot move, so that copies need no processor.
        self._pixels = torch.empty(per_pass * size * size * 3, dtype=torch.uint8, pin_memory=cuda)
        self._results = [
            torch.empty((per_pass, *shape), dtype=torch.float32, pin_memory=cuda)
            for shape in shapes.values()
        ]
        self._per_pass = per_pass
        self._rows: list[np.ndarray] | None = None

    def launch(self, chunk: np.ndarray, features: Arrays, start: int) -> None:
        """Send a pass on its way; its rows are filled by `collect`."""
        shape = (self._per_pass, *chunk.shape[1:])
        pixels = self._pixels[: int(np.prod(shape))].view(shape)
        pixels.numpy()[: len(chunk)] = chunk
        pixels[len(chunk) :] = 0
        with self._in_stream():
            results = self._network(pixels.to(self._device, non_blocking=self._cuda))
            for kept, result in zip(self._results, results, strict=True):
                kept.copy_(result, non_blocking=self._cuda)
        self._rows = [array[start : start + len(chunk)] for array in features.values()]

    def collect(self) -> None:
        """Wait for the pass under way, if any, and fill its rows."""
        if self._rows is None:
            return
        if self._stream is not None:
            self._stream.synchronize()
        for rows, result in zip(self._rows, self._results, strict=True):
            rows[...] = result[: len(rows)].numpy()
        self._rows = None

    def give_up(self) -> None:
        """Let the pass under way, if any, end for nothing."""
        if self._rows is not None and self._stream is not None:
            self._stream.synchronize()
        self._rows = None

    def _in_stream(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context
