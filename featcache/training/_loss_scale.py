"""Loss scaling, without which float16's small gradients are zero.

The loss is multiplied by a power of two before the way back and gradients are divided by it
afterwards: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2. The
factor halves where a gradient overflows, and that step is left out; it doubles after 2,000
steps that did not. OneFlow 0.9.0 has the like for its graphs alone, so that this one serves
both frameworks. Written for float16 on a GPU, where it never ran; tested on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._ranks import Ranks

__all__ = ["LossScale"]

_FIRST = 2.0**16
_PATIENCE = 2000


class LossScale:
    """The factor, and what it takes to move it.

    Parameters
    ----------
    flow : module
        The framework.
    """

    def __init__(self, flow: Any) -> None:
        self._flow = flow
        self.factor = _FIRST
        self._since = 0  # steps without an overflow

    def step(self, loss: Any, optimizer: Any, parameters: Sequence[Any], ranks: Ranks) -> None:
        """Take the optimizer's step, or leave it out where a gradient overflowed.

        The one question to the device, whether gradients are finite, waits for the step.
        """
        (loss * self.factor).backward()
        gradients = [one.grad for one in parameters]
        ranks.totals(gradients)
        total = self._flow.stack([gradient.sum() for gradient in gradients]).sum()
        if not math.isfinite(total.item()):
            self.factor, self._since = self.factor / 2, 0
            return
        for gradient in gradients:
            gradient.mul_(1 / self.factor)
        optimizer.step()
        self._since += 1
        if self._since == _PATIENCE:
            self.factor, self._since = self.factor * 2, 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the state: two arrays of one number."""
        return {"factor": np.array([self.factor]), "since": np.array([self._since])}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` returned."""
        self.factor, self._since = float(arrays["factor"][0]), int(arrays["since"][0])
