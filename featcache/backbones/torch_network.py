"""Networks of PyTorch's libraries: their cuts, their weights, and their form for engines.

A cut is one of the model's own outputs (``pooled``, ``cls``, ``mean``, ``tokens``, ``projected``),
or the path of a module inside it, such as ``blocks.11``, whose output is taken.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import FeatcacheError, RecipeError, one_line
from ..frameworks import import_torch
from .network import POOLED, Shape, check_tensors, drawn, tensors_digest, unknown_cut

torch = import_torch()
nn: Any = torch.nn

# From the model and its input to the model's own outputs by name.
Outputs = Callable[[Any, Any], Mapping[str, Any]]

_BLOCK = re.compile(r"[A-Za-z_]\w*(\.\d+|\.[A-Za-z_]\w*\.\d+)?")  # what a listing shows


class TorchNetwork:
    """A model of one of PyTorch's libraries in eval mode, in float32 on the CPU.

    ``name`` is for messages, ``size`` the side of the input in pixels.
    """

    def __init__(self, name: str, model: Any, outputs: Outputs, size: int) -> None:
        self.name = name
        self.size = size
        self.model = model.eval().requires_grad_(False)
        self.outputs = outputs
        self._shapes: dict[str, Shape] | None = None

    def shapes(self, cuts: Sequence[str]) -> dict[str, Shape]:
        """Return the shape of one image's features at each cut."""
        known = self._own_shapes()
        paths = [cut for cut in cuts if cut not in known]
        modules = dict(self.model.named_modules())
        for path in paths:
            if path not in modules or not path:
                if path == POOLED:
                    raise RecipeError(
                        f"cut: {self.name} has no pooled output; choose one with --cut: "
                        f"{', '.join(list(self.cut_shapes())[:12])}"
                    )
                raise unknown_cut(path, list(self.cut_shapes()), self.name)
        features = self.module(cuts) if paths else None
        try:
            taken = self._run(features) if features else []
        finally:
            if features:
                features.close()
        found = {cut: tuple(value.shape[1:]) for cut, value in zip(cuts, taken, strict=False)}
        return {cut: known.get(cut) or found[cut] for cut in cuts}

    def cut_shapes(self) -> dict[str, Shape]:
        """Return the model's own outputs, and its stages and blocks."""
        shapes: dict[str, Shape] = {}
        handles = []

        def keep(path: str) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, result: Any) -> None:
                value = _tensor(result)
                if value is not None and value.ndim > 1 and len(value) == 1:
                    shapes[path] = tuple(value.shape[1:])

            return hook

        for path, module in self.model.named_modules():
            if path and _BLOCK.fullmatch(path):
                handles.append(module.register_forward_hook(keep(path)))
        try:
            own = self._run_outputs()
        finally:
            for handle in handles:
                handle.remove()
        return {**own, **shapes}

    def n_parameters(self) -> int:
        """Return how many numbers the weights have."""
        return sum(int(value.numel()) for value in self.model.parameters())

    def module(self, cuts: Sequence[str]) -> Any:
        """Return a module from normalised float32 (N, 3, s, s) to a list of float32 (N, ...)."""
        return Features(self.model, self.outputs, cuts, set(self._own_shapes()))

    def _own_shapes(self) -> dict[str, Shape]:
        if self._shapes is None:
            self._shapes = self._run_outputs()
        return self._shapes

    def _run_outputs(self) -> dict[str, Shape]:
        results = self._run(lambda x: dict(self.outputs(self.model, x)))
        shapes = {
            name: tuple(value.shape[1:])
            for name, value in results.items()
            if _tensor(value) is value and value.ndim > 1 and len(value) == 1 and value.numel()
        }
        if not shapes:
            raise RecipeError(
                f"backbone {self.name}: expected an output of shape (N, ...) for N images, found "
                f"{', '.join(map(_described, results.values())) or 'none'}; choose another network"
            )
        return shapes

    def _run(self, function: Callable[[Any], Any]) -> Any:
        """Call with one image, and say in our words what does not fit."""
        x = torch.zeros(1, 3, self.size, self.size)
        try:
            with torch.inference_mode():
                return function(x)
        except FeatcacheError:
            raise
        except Exception as error:  # whatever a model raises on an input that it was not made for
            raise RecipeError(
                f"backbone {self.name}: expected a network of float32 images (N, 3, {self.size}, "
                f"{self.size}), found {type(error).__name__}: {one_line(error)}; it may need "
                "another --size (its own is the default), or other channels than RGB"
            ) from None


class Features(nn.Module):
    """A model with its cuts: normalised pixels in, a list of float32 tensors out."""

    def __init__(self, model: Any, outputs: Outputs, cuts: Sequence[str], own: set[str]) -> None:
        super().__init__()
        self.model = model
        self._outputs = outputs
        self._cuts = tuple(cuts)
        self._taken = threading.local()  # several threads run the same network
        modules = dict(model.named_modules())
        self._handles = [
            modules[cut].register_forward_hook(self._keep(cut)) for cut in cuts if cut not in own
        ]

    def _keep(self, cut: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, result: Any) -> None:
            getattr(self._taken, "values", {})[cut] = _tensor(result)

        return hook

    def forward(self, x: Any) -> list[Any]:
        """Return the cuts in order."""
        values: dict[str, Any] = {}
        self._taken.values = values
        values.update(self._outputs(self.model, x))
        missing = [cut for cut in self._cuts if values.get(cut) is None]
        if missing:
            raise RuntimeError(f"{missing[0]} gave no tensor in this pass")
        for cut in self._cuts:
            rows, n = (
                values[cut].shape[0],
                x.shape[0],
            )  # an export to ONNX fixes what len is asked of
            if rows != n:
                raise RuntimeError(f"{cut} has {rows} rows for {n} images")
        return [values[cut].to(torch.float32) for cut in self._cuts]

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


def _tensor(result: Any) -> Any:
    """Return the tensor of a module's result: itself, or the first of several."""
    if isinstance(result, (tuple, list)) and result:
        result = result[0]
    if isinstance(result, dict) and result:
        result = next(iter(result.values()))
    floating = isinstance(result, torch.Tensor) and result.is_floating_point()
    return result if floating else None


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else str(tuple(shape))


def model_digest(model: Any) -> str:
    """Return SHA-256 (hex) over every tensor of a model: its name, type, shape and numbers."""
    ordered = sorted(model.state_dict().items())
    values = ((name, tensor.detach().cpu().contiguous()) for name, tensor in ordered)
    return tensors_digest(
        (name, one.dtype, one.shape, one.reshape(-1).view(torch.uint8).numpy())
        for name, one in values
    )


def first_broken(model: Any) -> str:
    """Return the name of the first tensor that holds NaN or infinity; empty if none does."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return str(name)
    return ""


def load_strictly(
    model: Any, state: Mapping[str, np.ndarray], head: Sequence[str], where: str
) -> None:
    """Load a checkpoint whose tensors are the model's, and perhaps its classifier's.

    ``head`` has how the names of a classifier's tensors begin, which may be left over.
    """
    expected = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    counters = [
        name for name in shapes if name not in state and name.endswith("num_batches_tracked")
    ]
    check_tensors(shapes, state, where, optional=counters, left_over=head)
    with torch.no_grad():
        for name, tensor in expected.items():
            if name in state:
                tensor.copy_(torch.from_numpy(np.array(state[name])))


def draw_weights(model: Any, seed: int) -> None:
    """Fill a model with the random weights of `featcache.backbones.network.drawn`."""
    groups = {
        f"{path}.weight": module.groups
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    parameters = dict(model.named_parameters())
    arrays = {name: value.detach().numpy() for name, value in parameters.items()}
    with torch.no_grad():
        for name, array in drawn(arrays, groups, seed).items():
            parameters[name].copy_(torch.from_numpy(array))
