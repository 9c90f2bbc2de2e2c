"""flowvision's classifiers, which run in OneFlow.

flowvision's own loader would unpickle what it downloads; here its checkpoints go through the same
reader, and the same pinned digests, as those of the ResNets.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineUnavailableError, RecipeError, WeightsError, one_line
from ..files import user_path
from ..frameworks import import_oneflow
from ..preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from ..process import last_line, run_in_child
from ..progress import OnProgress
from .architectures import RANDOM, random_seed
from .checkpoints import parse_checkpoint, read_checkpoint, read_file
from .naming import did_you_mean_model
from .network import POOLED, Network, Shape, arrays_digest, check_tensors, drawn, unknown_cut
from .pretrained import Source, cache_folder, check_digest, find, pin_digest

_BLOCK = re.compile(r"[A-Za-z_]\w*(\.\d+)?")
_TRIAL_TIMEOUT_S = 300
_DEFAULT_SIZE = 224
# One forward pass in a child: an operation that OneFlow lacks may end the process.
_TRIAL = """
import sys
from featcache.backbones.flowvision import build
import oneflow as flow
model = build(sys.argv[1]).eval()
with flow.no_grad():
    model(flow.zeros(1, 3, int(sys.argv[2]), int(sys.argv[2]))).numpy()
print("found")
"""


def registry() -> Any:
    """Return flowvision's ``ModelCreator``."""
    import_oneflow()
    try:
        models: Any = importlib.import_module("flowvision.models")
    except Exception as error:
        raise EngineUnavailableError(
            f"backbone flowvision: expected flowvision 0.2.1 to import, found "
            f"{type(error).__name__}: {one_line(error)}; run pip install 'setuptools<82' and "
            "pip install --no-build-isolation flowvision==0.2.1"
        ) from error
    return models.ModelCreator


def build(name: str) -> Any:
    """Return a model with arbitrary weights."""
    creator = registry()
    if name not in creator._model_entrypoints:
        raise RecipeError(
            f"backbone: expected a model of flowvision, found '{one_line(name)}'"
            + did_you_mean_model("flowvision", name, creator._model_entrypoints)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OneFlow warns of arguments that flowvision gives it
        return creator.create_model(name, pretrained=False)


def flowvision_network(
    name: str, weights: str | None, size: int | None, on_progress: OnProgress
) -> tuple[FlowvisionNetwork, Preprocess, str]:
    """Return a model with its weights, its preprocessing, and where the weights come from."""
    side = size or _own_size(name)
    registry()
    problem = _trial(name, side)
    if problem:
        build(name)  # says what is wrong with the name
        raise EngineUnavailableError(
            f"flowvision:{name}: expected OneFlow to run it on images of {side} pixels, found: "
            f"{one_line(problem)}; choose another --size or another model"
        )
    model = build(name)
    if weights is None:
        path, source = find(name, cache_folder(), {name: (_source(name),)}, on_progress)
        data = read_file(path)
        check_digest(path, source, hashlib.sha256(data).hexdigest())
        checkpoint = parse_checkpoint(data, path.suffix, str(path))
        _load(model, checkpoint.state, f"flowvision:{name}")
        pin_digest(path, source, checkpoint.sha256)
        origin = f"{source.url} ({source.provenance})"
    elif weights.startswith(RANDOM):
        arrays = {key: value.numpy() for key, value in model.named_parameters()}
        groups = {
            f"{path}.weight": module.groups
            for path, module in model.named_modules()
            if hasattr(module, "groups") and hasattr(module, "kernel_size")
        }
        model.load_state_dict(drawn(arrays, groups, random_seed(weights)), strict=False)
        origin = f"random weights, seed {random_seed(weights)}"
    else:
        _load(model, read_checkpoint(user_path(weights)).state, weights)
        origin = weights
    preprocess = Preprocess(side, IMAGENET_MEAN, IMAGENET_STD, "bicubic", "crop", side * 256 // 224)
    return FlowvisionNetwork(name, model, side), preprocess, origin


@cache
def _trial(name: str, side: int) -> str:
    """Return why OneFlow cannot run a model on images of this side, or nothing."""
    child = run_in_child(_TRIAL, name, str(side), timeout_s=_TRIAL_TIMEOUT_S)
    if child is not None and not child.returncode and "found" in child.stdout:
        return ""
    return last_line(child) if child else "no answer"


def library() -> str:
    """Return ``"flowvision 0.2.1"``."""
    return f"flowvision {importlib.metadata.version('flowvision')}"


def _own_size(name: str) -> int:
    sizes = [int(number) for number in re.findall(r"(?<!\d)(\d{3})(?!\d)", name)]
    fitting = [size for size in sizes if 160 <= size <= 600 and size % 16 == 0]
    return fitting[-1] if fitting else _DEFAULT_SIZE


def _source(name: str) -> Source:
    creator = registry()
    function = creator._model_entrypoints.get(name, build)
    urls = getattr(sys.modules[function.__module__], "model_urls", {})
    url = urls.get(name)
    if not isinstance(url, str) or not url.startswith("https://"):
        raise WeightsError(
            f"flowvision:{name}: expected pretrained weights, found none in flowvision; use "
            "--weights FILE or --weights random:0"
        )
    file_name = f"flowvision-{name}{Path(url).suffix or '.zip'}"
    return Source(url, file_name, None, f"flowvision's {name}")


def _load(model: Any, state: Any, where: str) -> None:
    expected = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    counters = [name for name in shapes if name.endswith("num_batches_tracked")]
    check_tensors(shapes, state, where, optional=counters)
    arrays = {name: np.asarray(state[name]) for name in expected if name in state}
    model.load_state_dict(arrays, strict=False)


class FlowvisionNetwork(Network):
    """A classifier of flowvision; ``pooled`` is what its last linear layer reads."""

    engines = ("oneflow",)

    def __init__(self, name: str, model: Any, size: int) -> None:
        self._name = f"flowvision:{name}"
        self._size = size
        self._flow = import_oneflow()
        self._model = model.eval()
        linear = [
            path
            for path, module in model.named_modules()
            if isinstance(module, self._flow.nn.Linear)
        ]
        self._head = linear[-1] if linear else ""
        self._modules = {path: module for path, module in model.named_modules() if path}
        self._shapes: dict[str, Shape] = {}
        self._taken: dict[str, Any] = {}  # what the hooks keep of the pass that is under way
        self._hooked: set[str] = set()

    def sha256(self) -> str:
        """Return SHA-256 (hex) over every tensor: its name, type, shape and numbers."""
        return arrays_digest({name: one.numpy() for name, one in self._model.state_dict().items()})

    def shapes(self, cuts: Sequence[str]) -> dict[str, Shape]:
        """Return the shape of one image's features at each cut."""
        for cut in cuts:
            if cut not in self._modules and not (cut == POOLED and self._head):
                raise unknown_cut(cut, list(self.cut_shapes()), self._name)
        if any(cut not in self._shapes for cut in cuts):
            results = self._run(self.module(cuts))
            found = zip(cuts, results, strict=True)
            self._shapes.update({cut: tuple(value.shape[1:]) for cut, value in found})
        return {cut: self._shapes[cut] for cut in cuts}

    def cut_shapes(self) -> dict[str, Shape]:
        """Return the pooled output, and the model's stages and blocks."""
        paths = [path for path in self._modules if _BLOCK.fullmatch(path)]
        for path in paths:
            self._hook(path)
        pooled = self.shapes((POOLED,)) if self._head else {}
        self._run(self._call)
        found = {path: value for path, value in self._taken.items() if path in paths}
        shapes = {
            path: tuple(value.shape[1:])
            for path, value in found.items()
            if isinstance(value, self._flow.Tensor) and value.ndim > 1
        }
        self._taken.clear()
        return {**pooled, **shapes}

    def n_parameters(self) -> int:
        """Return how many numbers the weights have."""
        return sum(int(value.numel()) for value in self._model.parameters())

    def module(self, cuts: Sequence[str]) -> Any:
        """Return a callable: normalised float32 (N, 3, s, s) -> a list of float32 (N, ...)."""
        for cut in cuts:
            self._hook(cut)

        def forward(x: Any) -> list[Any]:
            self._call(x)
            results = [self._taken[cut].to(self._flow.float32) for cut in cuts]
            self._taken.clear()
            return results

        return forward

    def _hook(self, cut: str) -> None:
        """Keep what a module returns, or what the head reads, in every pass from now on.

        OneFlow has no way to take a hook off again, so each module gets one.
        """
        if cut in self._hooked:
            return
        self._hooked.add(cut)
        taken = self._taken

        def after(_module: Any, _inputs: Any, result: Any) -> None:
            taken[cut] = result[0] if isinstance(result, (tuple, list)) else result

        def before(module: Any, inputs: Any) -> None:
            after(module, None, inputs)

        if cut == POOLED:
            self._modules[self._head].register_forward_pre_hook(before)
        else:
            self._modules[cut].register_forward_hook(after)

    def _call(self, x: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OneFlow warns of arguments that flowvision gives it
            self._model(x)

    def _run(self, function: Callable[[Any], Any]) -> Any:
        with self._flow.no_grad():
            return function(self._flow.zeros(1, 3, self._size, self._size))
