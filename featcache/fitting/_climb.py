"""Deciding what to try: the cheapest first, until the target or the budget is reached."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["Attempt", "Option", "Outcome", "best_of", "climb"]


@dataclass(frozen=True)
class Outcome:
    """What trying an option gave.

    Parameters
    ----------
    val_top1 : float
        Accuracy on the validation split.
    top1 : float or None
        Accuracy on the test split, read once, when the option was done; None of the probe,
        which is fitted anew to all training images, and measured, if it wins.
    head : Path or None
        What `featcache.predict` takes; None of the probe, as ``top1``.
    run : Path or None
        Folder of the record; None of the probe, as ``top1``.
    """

    val_top1: float
    top1: float | None = None
    head: Path | None = None
    run: Path | None = None


@dataclass(frozen=True)
class Option:
    """Something to try.

    Parameters
    ----------
    name : str
        For people and records.
    estimated_s : float
        What it is expected to take here.
    run : callable
        Does it.
    obstacle : str
        Why it cannot be tried at all; empty where it can.
    """

    name: str
    estimated_s: float
    run: Callable[[], Outcome]
    obstacle: str = ""


@dataclass(frozen=True)
class Attempt:
    """What became of an option.

    Parameters
    ----------
    name : str
        The option's.
    status : str
        ``"done"``, ``"not needed"``, ``"over budget"`` or ``"not possible"``.
    why : str
        The reason, in a sentence.
    estimated_s : float
        What it was expected to take, in seconds.
    wall_s : float or None
        What it took.
    outcome : Outcome or None
        What it gave; None where it was not tried.
    """

    name: str
    status: str
    why: str
    estimated_s: float
    wall_s: float | None = None
    outcome: Outcome | None = None


def climb(
    first: Attempt,
    options: Sequence[Option],
    target: float,
    budget_s: float | None,
    spent_s: float,
    *,
    on_attempt: Callable[[Attempt], None] = lambda attempt: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Attempt]:
    """Try options by increasing cost; return what became of each, ``first`` in front.

    Parameters
    ----------
    first : Attempt
        What was done already: the probe.
    options : sequence of Option
        In any order; of equal cost the earlier goes first.
    target : float
        Accuracy on the validation split at which to stop.
    budget_s : float or None
        Seconds that everything may take; what is expected to go beyond is not begun.
    spent_s : float
        Seconds gone already.
    on_attempt : callable
        Hears of each as it is decided.
    clock : callable
        Seconds.
    """
    begun = clock() - spent_s
    attempts = [first]
    for option in sorted(options, key=lambda option: option.estimated_s):
        best = best_of(attempts)
        reached = best.outcome is not None and best.outcome.val_top1 >= target
        left_s = float("inf") if budget_s is None else budget_s - (clock() - begun)
        attempt = Attempt(option.name, "done", "", option.estimated_s)
        if reached:
            attempt = replace(attempt, status="not needed", why=f"{best.name} reached the target")
        elif option.obstacle:
            attempt = replace(attempt, status="not possible", why=option.obstacle)
        elif option.estimated_s > left_s:
            attempt = replace(
                attempt,
                status="over budget",
                why=f"about {option.estimated_s:,.0f} s, and {max(left_s, 0):,.0f} s are left",
            )
        else:
            started = clock()
            outcome = option.run()
            attempt = replace(
                attempt,
                why=f"the cheapest left, {best.name} stopped at {100 * _val(best):.2f} %",
                wall_s=clock() - started,
                outcome=outcome,
            )
        attempts.append(attempt)
        on_attempt(attempt)
    return attempts


def best_of(attempts: Sequence[Attempt]) -> Attempt:
    """Return the attempt with the highest accuracy on the validation split; of equals the first."""
    return max((attempt for attempt in attempts if attempt.outcome), key=_val)


def _val(attempt: Attempt) -> float:
    return attempt.outcome.val_top1 if attempt.outcome else 0.0
