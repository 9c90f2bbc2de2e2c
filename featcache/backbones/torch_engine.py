"""PyTorch: the engine for GPUs and Pythons that OneFlow has no wheel for.

On a CPU everything here was measured and is tested. On a GPU it was never run: what is
written for CUDA, for ROCm (which calls itself CUDA) and for Apple's MPS follows PyTorch's
documentation, and the CPU runs the same code but for compiling.

Weights are cast once, rather than by autocast in every pass: 10 % faster on two Zen 4 cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from threading import Barrier
from typing import Any

import numpy as np

from ..cores import usable_cores
from ..errors import EngineUnavailableError, RecipeError, one_line
from ..frameworks import import_torch
from ..preprocess import check_pixels
from ..progress import OnNote, silent
from .architectures import CUTS, Backbone, get_backbone
from .network import filled_up
from .resnet import build_resnet
from .torch_input import Normaliser
from .weights import Weights, images_per_pass

torch = import_torch()
nn: Any = torch.nn

COMPILE_VARIABLE = "FEATCACHE_COMPILE"

_PIXELS_PER_PASS = 256 * 224 * 224  # on a GPU; on a CPU as few as `images_per_pass` says
_MAX_IMAGES_PER_PASS = 512
_PASSES_PER_CALL = 4  # per core or GPU
# To compile takes tens of seconds on a GPU, and may save some 30 us per image of 224 pixels: an
# estimate until benchmarks/gpu.py has run on one.
_COMPILE_PIXELS = 1_000_000 * 224 * 224


class TorchEngine:
    """A frozen backbone with its BatchNorm folded away."""

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
        self._weights = weights
        self._cuts = cuts
        self._device = device
        self._precision = precision
        self._on_note = on_note
        size = weights.preprocess.size
        self._shapes = weights.shapes(cuts)
        on_gpu = max(1, min(_MAX_IMAGES_PER_PASS, _PIXELS_PER_PASS // size**2))
        self._per_pass = images_per_pass(weights) if device == "cpu" else on_gpu
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
        check_pixels(images, self._weights.preprocess)
        features = {
            cut: np.empty((len(images), *shape), np.float32) for cut, shape in self._shapes.items()
        }
        self._on_device(lambda: self._ready().run(images, features))
        return features

    def _ready(self) -> Passes:
        """Return what runs the network; load it, and compile it if it is to be."""
        if self._passes is None:
            self._passes = Passes(self._forward(), self._per_pass, self._device)
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
        pixels = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        with torch.inference_mode():
            forward(pixels)

    def _on_device(self, work: Callable[[], object]) -> None:
        """Run ``work``; where memory is too small, halve the images per pass and retry.

        One note says so; features change by rounding at most.
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
                torch.cuda.empty_cache()


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


class Forward:
    """Uint8 pixels in, features at every cut out, all on one device."""

    def __init__(
        self,
        weights: Weights,
        cuts: tuple[str, ...],
        device: str,
        precision: str,
        *,
        compiled: bool,
    ) -> None:
        self._normalise = Normaliser(weights.preprocess, device)
        self._dtype = dtype_of(precision)
        self._name, self._own = weights.backbone, weights.network is None
        if weights.network is not None:
            self._library_network(weights.network.module(cuts), device, compiled)
            return
        self._autocast: AbstractContextManager[Any] = nullcontext()
        network = build_backbone(get_backbone(weights.backbone))
        load_backbone(network, weights.state)
        joined = device == "cpu" and not compiled and joins_convolutions(self._dtype)
        folded = Folded(network.eval(), cuts, joined=joined).requires_grad_(False)
        folded.to(device, self._dtype, memory_format=torch.channels_last)
        if joined:
            folded.pack()
        self._network = torch.compile(folded, dynamic=False) if compiled else folded

    def _library_network(self, module: Any, device: str, compiled: bool) -> None:
        """Take a network as its library made it.

        Its numbers stay float32, and autocast chooses what a precision may touch: a transformer's
        position tables would lose too much in bfloat16.
        """
        module.to(device, memory_format=torch.channels_last)
        narrow = self._dtype != torch.float32
        kind = device.partition(":")[0]
        self._autocast = torch.autocast(kind, self._dtype) if narrow else nullcontext()
        self._dtype = torch.float32
        self._network = torch.compile(module, dynamic=False) if compiled else module

    def __call__(self, pixels: Any) -> list[Any]:
        """Return float32 (N, D) or (N, C, H, W) per cut of uint8 (N, s, s, 3)."""
        with self._autocast:
            x = self._normalise(pixels).to(self._dtype)
            results: list[Any] = self._network(x) if self._own else self._foreign(x)
        return results

    def _foreign(self, x: Any) -> list[Any]:
        """Run a network that nobody vouches for; say in our words what it does not take."""
        try:
            results: list[Any] = self._network(x)
            return results
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            raise EngineUnavailableError(
                f"backbone {self._name}: expected a network of float32 images {tuple(x.shape)}, "
                f"found {type(error).__name__}: {one_line(error)}"
            ) from error


def dtype_of(precision: str) -> Any:
    """Return torch's name of a precision."""
    return {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[precision]


@cache
def joins_convolutions(dtype: Any) -> bool:
    """Try whether oneDNN's joined convolution is in this build, and right.

    It is what `torch.compile` calls, but no promise of PyTorch's.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    conv = nn.Conv2d(4, 4, 3, padding=1).to(dtype).requires_grad_(False)
    x = torch.linspace(-1, 1, 512, dtype=dtype).reshape(2, 8, 8, 4).permute(0, 3, 1, 2)
    expected = _separate(x, conv, True, x.clone())
    try:
        _pack(conv)
        result = _joined(x, conv, True, x.clone())
    except (RuntimeError, AttributeError, TypeError):
        return False
    return bool(torch.allclose(result.float(), expected.float(), rtol=0.05, atol=0.05))


class Folded(nn.Module):
    """The network without BatchNorm: normalised pixels in, float32 features at every cut out."""

    def __init__(self, network: Any, cuts: tuple[str, ...], *, joined: bool) -> None:
        super().__init__()
        self._cuts = cuts
        self._convolve = _joined if joined else _separate
        self.stem = _fold(network.conv1, network.bn1)
        deepest = max(CUTS.index(cut) for cut in cuts)
        self.stages = nn.ModuleList(
            nn.ModuleList(_folded_block(block) for block in getattr(network, stage))
            for stage in CUTS[:-1][: deepest + 1]
        )

    def pack(self) -> None:
        """Lay every kernel out as oneDNN's joined convolution wants it."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _pack(module)

    def forward(self, x: Any) -> list[Any]:
        """Return the cuts asked for, in order, as float32."""
        x = nn.functional.max_pool2d(self._convolve(x, self.stem, True, None), 3, 2, 1)
        taken = {}
        for stage, blocks in zip(CUTS, self.stages, strict=False):
            for block in blocks:
                x = self._block(x, block)
            taken[stage] = x.to(torch.float32)
        if "avgpool" in self._cuts:
            taken["avgpool"] = x.to(torch.float32).mean((2, 3))
        return [taken[cut] for cut in self._cuts]

    def _block(self, x: Any, block: Any) -> Any:
        """Run a block. The shortcut's tensor becomes the result's.

        No cut is lost by that: a stage's first block never has its input as the shortcut,
        layer1's of ResNet-18 and 34 aside, before which there is no cut.
        """
        *first, last = block["convs"]
        shortcut = self._convolve(x, block["down"], False, None) if "down" in block else x
        for conv in first:
            x = self._convolve(x, conv, True, None)
        return self._convolve(x, last, True, shortcut)


def _folded_block(block: Any) -> Any:
    pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if block.bottleneck:
        pairs.append((block.conv3, block.bn3))
    parts = {"convs": nn.ModuleList(_fold(*pair) for pair in pairs)}
    if block.downsample is not None:
        parts["down"] = _fold(*block.downsample)
    return nn.ModuleDict(parts)


def _fold(conv: Any, norm: Any) -> Any:
    """Return the convolution with the BatchNorm after it in its kernel and bias."""
    return nn.utils.fuse_conv_bn_eval(conv.double(), norm.double()).float()


def _pack(conv: Any) -> None:
    where = conv.padding, conv.stride, conv.dilation, conv.groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *where)
    conv.weight = nn.Parameter(packed, requires_grad=False)


def _separate(x: Any, conv: Any, relu: bool, shortcut: Any) -> Any:
    """Convolve, add the shortcut if there is one, and apply ReLU if so asked: layer by layer."""
    x = conv(x)
    if shortcut is not None:
        x = x.add_(shortcut)
    return x.relu_() if relu else x


def _joined(x: Any, conv: Any, relu: bool, shortcut: Any) -> Any:
    """Do the same in one call of oneDNN, in place of the shortcut."""
    where = conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups
    if shortcut is None:
        kind = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, *where, kind, [], "")
    add_and_relu: Any = ("add", 1.0, "relu", [], "")
    return torch.ops.mkldnn._convolution_pointwise_.binary(shortcut, x, *where, *add_and_relu)


Arrays = dict[str, np.ndarray]


class Passes:
    """Runs a network over any number of images: a pass per core at a time, or one on a GPU."""

    def __init__(self, network: Forward, per_pass: int, device: str) -> None:
        self._network = network
        self._per_pass = per_pass
        self._device = device
        self._threads = _single_threads(usable_cores()) if device == "cpu" else None

    def run(self, images: np.ndarray, features: Arrays) -> None:
        """Fill features (N, ...) by cut from uint8 images (N, s, s, 3)."""
        starts = range(0, len(images), self._per_pass)
        if self._threads is None:
            # TensorFloat-32 would be a fourth precision; timing kernels, a draw of lots.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                for start in starts:
                    self._pass(images, features, start)
            return
        passes = [self._threads.submit(self._pass, images, features, start) for start in starts]
        try:
            for done in passes:
                done.result()
        finally:
            for waiting in passes:
                waiting.cancel()
            wait(passes)  # after Ctrl-C too: nothing may be under way when this returns

    def _pass(self, images: np.ndarray, features: Arrays, start: int) -> None:
        chunk = images[start : start + self._per_pass]
        filled = filled_up(chunk, self._per_pass)
        with torch.inference_mode():
            results = self._network(torch.from_numpy(filled).to(self._device))
        for array, result in zip(features.values(), results, strict=True):
            array[start : start + len(chunk)] = result[: len(chunk)].cpu().numpy()


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
        all_here.abort()  # so that no thread waits for a main thread that Ctrl-C ended
        raise
    torch.set_num_threads(before)  # it is the number of threads to come as well
    return threads


def build_backbone(backbone: Backbone) -> Any:
    """Return a ResNet with its head replaced by the identity; load a checkpoint into it."""
    return build_resnet(torch, backbone)


def load_backbone(network: Any, state: Mapping[str, np.ndarray]) -> None:
    """Copy a checkpoint's tensors, its head left out, into a network of `build_backbone`."""
    network.load_state_dict(
        {key: torch.tensor(value) for key, value in state.items() if not key.startswith("fc.")}
    )


def state_arrays(network: Any) -> dict[str, np.ndarray]:
    """Return name -> NumPy copy of every parameter and buffer, on the CPU and C-contiguous."""
    return {
        key: np.array(value.detach().cpu().numpy(), order="C")
        for key, value in network.state_dict().items()
    }
