"""Batch normalisation over a batch that several processes share.

The frameworks' own takes the mean and the variance of the images that a process holds. Of a
batch that is divided these are other numbers, and another network. PyTorch's SyncBatchNorm
refuses the CPU, OneFlow 0.9.0 has none; this is one for both.

On the way forward each rank takes count, mean and sum of squared deviations of its own part, and
all are put together (Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance",
The American Statistician 37, 1983, equation 2.1), so that no large sums are subtracted. On the
way back two sums are added up: Ioffe and Szegedy, "Batch Normalization", ICML 2015, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .ranks import Ranks

_AXES = (0, 2, 3)


class SharedStatistics:
    """What the normalisations of one network share.

    Parameters
    ----------
    flow : module
        The framework.
    ranks : Ranks
        Who shares the batch.

    Attributes
    ----------
    share : float
        1 where this rank's images are a part of the batch; 0 where a batch has fewer images than
        there are ranks, and an idle one goes along with an image that must count for nothing.
    """

    def __init__(self, flow: Any, ranks: Ranks) -> None:
        self._flow = flow
        self._ranks = ranks
        self._function = _function(flow, ranks)
        self.share = 1.0

    def swap_into(self, network: Any) -> None:
        """Let every normalisation of a network, in train mode, compute as above."""
        for module in network.modules():
            if isinstance(module, self._flow.nn.BatchNorm2d):
                module.forward = self._forward(module, module.forward)

    def _forward(self, module: Any, alone: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def forward(x: Any) -> Any:
            if not module.training:
                return alone(x)
            with self._flow.no_grad():
                own, mean, variance, count = self._moments(x.detach().to(self._flow.float32))
                _move(module, mean, variance, count)
                inverse = (variance + module.eps).rsqrt()
                part = self.share / count
            moments = own, own - mean, inverse, part
            return self._function.apply(x, module.weight, module.bias, *moments)

        return forward

    def _moments(self, x: Any) -> tuple[Any, Any, Any, Any]:
        """Return the mean of this rank; and mean, variance and count of the whole batch.

        Parameters
        ----------
        x : tensor
            float32 (N, C, H, W), this rank's.
        """
        channels = x.shape[1]
        own = x.mean(_AXES)
        spread = (x - _per_channel(own)).square().sum(_AXES)
        count = self._flow.ones_like(own[:1]) * (x.numel() // channels)
        mine = self._flow.cat([own, spread, count]) * self.share
        # A row for each rank, of which this one knows its own: their sum has them all.
        rows = self._flow.stack(
            [mine if rank == self._ranks.rank else mine * 0 for rank in range(self._ranks.size)]
        )
        rows = self._ranks.total(rows)
        means, spreads, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (spreads + counts * (means - mean).square()).sum(0) / total
        return own, mean, variance, total


def _move(module: Any, mean: Any, variance: Any, count: Any) -> None:
    """Let the kept statistics follow those of a batch, as the frameworks' own module does."""
    for kept, new in (
        (module.running_mean, mean),
        (module.running_var, variance * (count / (count - 1))),
    ):
        kept.mul_(1 - module.momentum).add_(new * module.momentum)
    module.num_batches_tracked.add_(1)


def _function(flow: Any, ranks: Ranks) -> Any:
    """Return the normalisation as a function that knows its gradient."""
    base: Any = flow.autograd.Function

    class Normalisation(base):
        @staticmethod
        def forward(
            ctx: Any, x: Any, weight: Any, bias: Any, own: Any, offset: Any, inverse: Any, part: Any
        ) -> Any:
            ctx.save_for_backward(x, weight, own, offset, inverse, part)
            scale = weight * inverse
            centred = x.to(flow.float32) - _per_channel(own)
            return (centred * _per_channel(scale) + _per_channel(offset * scale + bias)).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            x, weight, own, offset, inverse, part = ctx.saved_tensors
            wide = dy.to(flow.float32)
            centred = x.to(flow.float32) - _per_channel(own)
            dbias = wide.sum(_AXES)
            dweight = ((wide * centred).sum(_AXES) + offset * dbias) * inverse
            sums = ranks.total(flow.cat([dbias, dweight])) * part
            mean_dy, mean_dyx = sums[: len(weight)], sums[len(weight) :]
            slope = mean_dyx * inverse
            dx = wide - centred * _per_channel(slope) - _per_channel(mean_dy + offset * slope)
            return (dx * _per_channel(weight * inverse)).to(x.dtype), dweight, dbias, *[None] * 4

    return Normalisation


def _per_channel(values: Any) -> Any:
    return values.reshape(1, -1, 1, 1)
