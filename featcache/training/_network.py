"""A backbone and its head, cut where training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backbone import CUTS, get_backbone
from ..recipe import FinetuneRecipe
from ..sampling import initial_head
from ..weights import Weights
from ._framework import Framework
from ._schedule import STAGES, frozen_cut, group_rates

__all__ = ["Network"]

HeadArrays = tuple[np.ndarray, np.ndarray]


class Network:
    """A backbone and a linear head, of which the recipe says what trains.

    Parameters
    ----------
    framework : Framework
        What runs it.
    weights : Weights
        Where the backbone starts, and its preprocessing.
    n_classes : int
        K.
    recipe : FinetuneRecipe
        What is trained, and in which mode.
    device : str
        ``"cpu"`` or ``"cuda"``.
    seed : int
        Of a random backbone and of the head.
    head : (float32 (K, D), float32 (K,)), optional
        Where the head starts; by default as `featcache.sampling.initial_head` draws it.

    Attributes
    ----------
    backbone, head : modules of the framework
        Their state dicts have torchvision's names.
    cut : str or None
        Everything up to this cut is frozen.
    """

    def __init__(
        self,
        framework: Framework,
        weights: Weights,
        n_classes: int,
        recipe: FinetuneRecipe,
        *,
        device: str,
        seed: int,
        head: HeadArrays | None = None,
    ) -> None:
        self._framework = framework
        self._flow = flow = framework.module
        self._preprocess = weights.preprocess
        self._device = device
        self._recipe = recipe
        architecture = get_backbone(weights.backbone)
        flow.manual_seed(seed)
        self.backbone = framework.build_backbone(architecture)
        if recipe.pretrained:
            framework.load_backbone(self.backbone, weights.state)
        weight, bias = head or initial_head(n_classes, architecture.feature_dim, seed)
        self.head = flow.nn.Linear(architecture.feature_dim, n_classes)
        self.head.load_state_dict({"weight": weight, "bias": bias})
        framework.prepare(self.backbone, device)
        self.backbone.to(device)
        self.head.to(device)
        self.cut = frozen_cut(recipe)
        for stage, modules in self._modules().items():
            for module in modules:
                for parameter in module.parameters():
                    parameter.requires_grad = stage in self.trained
        self.eval()

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that train: ``"head"`` first, then stages from the last to the first."""
        return tuple(group_rates(self._recipe))

    def parameters(self, stage: str) -> list[Any]:
        """Return the parameters of ``"head"`` or of a stage."""
        return [value for module in self._modules()[stage] for value in module.parameters()]

    def train(self) -> None:
        """Set the mode to train in: frozen parts, and all statistics if so asked, in eval mode."""
        for stage, modules in self._modules().items():
            for module in modules:
                module.train(stage in self.trained)
        if self._recipe.bn == "eval":
            for module in self.backbone.modules():
                if isinstance(module, self._flow.nn.BatchNorm2d):
                    module.eval()

    def eval(self) -> None:
        """Set the mode to measure in."""
        self.backbone.eval()
        self.head.eval()

    def scores(self, inputs: np.ndarray, start: str | None) -> Any:
        """Return the class scores, a tensor (N, K) with gradients of what trains.

        Parameters
        ----------
        inputs : numpy.ndarray
            uint8 pixels (N, s, s, 3), or features at the cut ``start``.
        start : str or None
            None for pixels; of `featcache.backbone.CUTS` for features.
        """
        if start is None:
            x = self._framework.to_input(inputs, self._preprocess, self._device)
        else:
            x = self._flow.from_numpy(inputs).to(self._device)
        if _place(start) < _place(self.cut):
            with self._flow.no_grad():
                x = self._run(x, start, self.cut)
            start = self.cut
        return self.head(self._run(x, start, CUTS[-1]))

    def state(self) -> dict[str, np.ndarray]:
        """Return a copy of every tensor by torchvision's name, the head as ``fc``."""
        arrays = self._framework.state_arrays
        head = {f"fc.{key}": value for key, value in arrays(self.head).items()}
        return {**arrays(self.backbone), **head}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        head = {
            key.removeprefix("fc."): value for key, value in state.items() if key.startswith("fc.")
        }
        self._framework.load_backbone(self.backbone, state)
        self.head.load_state_dict(head)

    def _run(self, x: Any, after: str | None, until: str | None) -> Any:
        """Run the parts of the backbone after one cut up to another, that one included."""
        net = self.backbone
        if after is None:
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for cut in CUTS[_place(after) : _place(until)]:
            x = getattr(net, cut)(x)
        return self._flow.flatten(x, 1) if until == CUTS[-1] else x

    def _modules(self) -> dict[str, tuple[Any, ...]]:
        net = self.backbone
        stages = {stage: (getattr(net, stage),) for stage in STAGES[1:]}
        return {"head": (self.head,), "stem": (net.conv1, net.bn1), **stages}


def _place(cut: str | None) -> int:
    """Return how many cuts lie at or before this one: 0 for the pixels."""
    return 0 if cut is None else 1 + CUTS.index(cut)
