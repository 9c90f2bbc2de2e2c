"""How OneFlow runs a network: layer by layer, or compiled ahead for one shape."""

from __future__ import annotations

from typing import Any

from ..backbone import CUTS
from ..frameworks import import_oneflow

__all__ = ["StaticForward", "forward_cuts"]

_MAX_BATCH = 256


def forward_cuts(model: Any, cuts: tuple[str, ...]) -> Any:
    """Wrap flowvision's ResNet as a module that returns the features at every cut.

    Parameters
    ----------
    model : oneflow.nn.Module
        A backbone, as `featcache.engines._oneflow.build_backbone` makes it.
    cuts : tuple of str
        Where features are taken; stages after the last one do not run.

    Returns
    -------
    oneflow.nn.Module
        float32 (N, 3, size, size) -> list of tensors, in the order of ``cuts``.
    """
    flow = import_oneflow()
    module: Any = flow.nn.Module
    stages = CUTS[:-1][: 1 + max(CUTS.index(cut) for cut in cuts)]

    class ForwardCuts(module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> list[Any]:
            net = self.model
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            taken = {}
            for stage in stages:
                x = getattr(net, stage)(x)
                taken[stage] = x
            if "avgpool" in cuts:
                taken["avgpool"] = flow.flatten(net.avgpool(x), 1)
            return [taken[cut] for cut in cuts]

    return ForwardCuts()


class StaticForward:
    """A module compiled by nn.Graph, for any number of images.

    A graph knows one shape alone. It is compiled for as many images as the largest call so
    far had, up to 256; a call is cut into pieces of that many, the last filled up with
    zeros.

    Parameters
    ----------
    module : oneflow.nn.Module
        Tensor (N, ...) -> list of tensors (N, ...), each row on its own.
    mixed : bool
        Let the graph compute in float16 what gains by it (``enable_amp``): never run on
        a GPU, and without meaning on a CPU.
    """

    def __init__(self, module: Any, *, mixed: bool) -> None:
        self._flow = import_oneflow()
        self._module = module
        self._mixed = mixed
        self._graph: Any = None
        self._batch = 0

    def __call__(self, x: Any) -> list[Any]:
        """Return the module's results for x."""
        if min(len(x), _MAX_BATCH) > self._batch:
            self._batch = min(len(x), _MAX_BATCH)
            self._graph = _compiled(self._module, self._mixed)
        pieces = []
        for start in range(0, len(x), self._batch):
            piece = x[start : start + self._batch]
            count = len(piece)
            if count < self._batch:
                shape = (self._batch - count, *piece.shape[1:])
                filling = self._flow.zeros(*shape, dtype=piece.dtype, device=piece.device)
                piece = self._flow.cat([piece, filling], dim=0)
            pieces.append([result[:count] for result in self._graph(piece)])
        return [self._flow.cat(list(parts), dim=0) for parts in zip(*pieces, strict=True)]


def _compiled(module: Any, mixed: bool) -> Any:
    flow = import_oneflow()
    graph: Any = flow.nn.Graph

    class Forward(graph):
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            if mixed:
                self.config.enable_amp(True, dtype=flow.float16)

        def build(self, x: Any) -> list[Any]:
            result: list[Any] = self.module(x)
            return result

    return Forward()
