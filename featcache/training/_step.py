"""One update of the parameters, as whoever asks for it hears of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["Step"]


@dataclass(frozen=True, eq=False)
class Step:
    """One update of the parameters.

    Parameters
    ----------
    step : int
        Steps taken in the whole run, this one included.
    n_seen : int
        Images of the epoch seen, this step's included.
    n_images : int
        Of this step.
    rates : mapping of str to float
        Learning rate of the head and of each stage that trains.
    read : callable
        Fetches the loss.
    """

    step: int
    n_seen: int
    n_images: int
    rates: Mapping[str, float]
    read: Callable[[], float] = field(repr=False)

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy over its images, before the update; waits for the device.

        Raises
        ------
        RecipeError
            It is not finite.
        """
        return self.read()
