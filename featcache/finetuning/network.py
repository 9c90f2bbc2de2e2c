"""A backbone and its head, cut where training begins."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ..backbones.architectures import CUTS, draw_state, get_backbone
from ..backbones.weights import Weights
from ..sampling import initial_head
from .framework import Framework
from .processes import Processes
from .recipes import STAGES, FinetuneRecipe, frozen_cut, group_rates

HeadArrays = tuple[np.ndarray, np.ndarray]
_HEAD = "fc."  # torchvision's name


class Network:
    """A ResNet of ours and a linear head; the recipe says which parts train.

    The head starts from ``head``, by default as `featcache.sampling.initial_head` draws it.
    Everything up to the cut ``cut`` is frozen. `ModelNetwork` has a library's model in its place.
    """

    cuts: tuple[str, ...] = CUTS  # where features may come in, the last one is the head's input

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
        processes: Processes | None = None,
    ) -> None:
        self._framework = framework
        self._flow = flow = framework.module
        self._preprocess = weights.preprocess
        self._device = device
        self._recipe = recipe
        self._seed = seed
        self.backbone, dim = self._build(weights)
        weight, bias = head or initial_head(n_classes, dim, seed)
        self.head = flow.nn.Linear(dim, n_classes)
        framework.load_arrays(self.head, {"weight": weight, "bias": bias})
        framework.prepare(self.backbone, device)
        self.backbone.to(device)
        self.head.to(device)
        self.cut = self._freeze()
        self._training_scores = self._head_scores
        if processes is not None and processes.size > 1:
            self._training_scores = processes.wrap(self._as_module(), device)
        self.eval()

    @property
    def rates(self) -> dict[str, float]:
        """The rate of each part that trains: the head, then stages from the last to the first."""
        return group_rates(self._recipe)

    def parameters(self, stage: str) -> list[Any]:
        """Return the parameters of ``"head"`` or of a stage that train."""
        return [value for module in self._modules()[stage] for value in module.parameters()]

    def train(self) -> None:
        """Set train mode; frozen parts, and the statistics with bn "eval", stay in eval mode."""
        self._set_train()
        if self._recipe.bn == "eval":
            for module in self.backbone.modules():
                if hasattr(module, "running_mean"):
                    module.eval()

    def eval(self) -> None:
        """Set eval mode."""
        self.backbone.eval()
        self.head.eval()

    def to_device(self, inputs: np.ndarray, start: str | None) -> Any:
        """Copy a batch to the device.

        With ``start`` None these are uint8 pixels (N, s, s, 3), which are normalised; else
        float32 features at the cut ``start``.
        """
        if start is not None:
            return self._framework.to_device(inputs, self._device)
        planes = self._framework.to_device(inputs.transpose(0, 3, 1, 2), self._device)
        return self._framework.to_input(planes, self._preprocess)

    def scores(self, x: Any, start: str | None) -> Any:
        """Return the class scores, a tensor (N, K), of what `to_device` returned."""
        if self._place(start) < self._place(self.cut):
            with self._flow.no_grad():
                x = self._run(x, start, self.cut)
            start = self.cut
        return (self._training_scores if self.head.training else self._head_scores)(x, start)

    def drawing(self, step: int, rank: int) -> AbstractContextManager[Any]:
        """Return a context for the forward pass of a step, in which random layers may draw."""
        return nullcontext()

    def state(self) -> dict[str, np.ndarray]:
        """Return a copy of every tensor by torchvision's name, the head as ``fc``."""
        arrays = self._framework.state_arrays
        head = {_HEAD + key: value for key, value in arrays(self.head).items()}
        return {**arrays(self.backbone), **head}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Load what `state` returned."""
        self._framework.load_arrays(self.backbone, _without_head(state))
        self._framework.load_arrays(self.head, below(_HEAD, state))

    def checkpoint(self) -> dict[str, np.ndarray]:
        """Return the tensors that the saved network has: here all, with the head."""
        return self.state()

    def head_arrays(self) -> HeadArrays:
        """Return a copy of the head's weight (K, D) and bias (K,)."""
        arrays = self._framework.state_arrays(self.head)
        return arrays["weight"], arrays["bias"]

    def _build(self, weights: Weights) -> tuple[Any, int]:
        """Return the backbone with the weights it starts from, and the length of its features."""
        architecture = get_backbone(weights.backbone)
        state = weights.state if self._recipe.pretrained else draw_state(architecture, self._seed)
        backbone = self._framework.build_backbone(architecture)
        self._framework.load_arrays(backbone, _without_head(state))
        return backbone, architecture.feature_dim

    def _freeze(self) -> str | None:
        """Take the gradients from what is frozen; return the cut up to which all is."""
        for stage, modules in self._modules().items():
            for module in modules:
                for parameter in module.parameters():
                    parameter.requires_grad = stage in self.rates
        return frozen_cut(self._recipe)

    def _set_train(self) -> None:
        for stage, modules in self._modules().items():
            for module in modules:
                module.train(stage in self.rates)

    def _as_module(self) -> Any:
        """Return a module of the framework whose forward pass is ours."""
        base: Any = self._flow.nn.Module
        network = self

        class Scoring(base):
            def __init__(self) -> None:
                super().__init__()
                self.backbone, self.head = network.backbone, network.head

            def forward(self, x: Any, start: str | None) -> Any:
                return network._head_scores(x, start)

        return Scoring()

    def _head_scores(self, x: Any, start: str | None) -> Any:
        return self.head(self._run(x, start, self.cuts[-1]))

    def _run(self, x: Any, after: str | None, until: str | None) -> Any:
        """Run the parts of the backbone after one cut up to and including another."""
        net = self.backbone
        if after is None:
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for cut in CUTS[self._place(after) : self._place(until)]:
            x = getattr(net, cut)(x)
        return self._flow.flatten(x, 1) if until == CUTS[-1] else x

    def _place(self, cut: str | None) -> int:
        """Return how many cuts lie at or before this one: 0 for the pixels."""
        return 0 if cut is None else 1 + self.cuts.index(cut)

    def _modules(self) -> dict[str, tuple[Any, ...]]:
        net = self.backbone
        stages = {stage: (getattr(net, stage),) for stage in STAGES[1:]}
        return {"head": (self.head,), "stem": (net.conv1, net.bn1), **stages}


def below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def _without_head(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value for key, value in state.items() if not key.startswith(_HEAD)}
