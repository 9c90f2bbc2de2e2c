"""Learning rates: a pure function of the recipe and the step.

Nothing here remembers anything, so that a resumed run needs no more than the number of
its step, and so that every rate can be compared with its formula.
"""

from __future__ import annotations

import math

from ..backbones.architectures import CUTS
from .recipes import STEP_FACTOR, STEP_MILESTONES, FinetuneRecipe

# From the pixels to the features; a stage is what trains at one rate.
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


def frozen_cut(recipe: FinetuneRecipe) -> str | None:
    """Return the last cut below which nothing trains; None where everything does."""
    return CUTS[-1] if recipe.backbone_lr is None else recipe.freeze_until


def group_rates(recipe: FinetuneRecipe) -> dict[str, float]:
    """Return the learning rate of the head and of every stage that trains, before the schedule.

    Returns
    -------
    dict
        ``"head"`` first, then the stages from the last to the first. With
        ``layer_decay`` d, the k-th stage below the head trains at d ** k times
        ``backbone_lr``.
    """
    rates = {"head": recipe.head_lr}
    if recipe.backbone_lr is None:
        return rates
    trained = STAGES[STAGES.index(recipe.freeze_until) + 1 if recipe.freeze_until else 0 :]
    for stage in reversed(trained):
        depth = len(STAGES) - STAGES.index(stage)
        rates[stage] = recipe.backbone_lr * recipe.layer_decay**depth
    return rates


def warmup_steps(recipe: FinetuneRecipe, n_steps: int) -> int:
    """Return how many of all steps the rates rise."""
    steps = recipe.warmup if recipe.warmup >= 1 else round(recipe.warmup * n_steps)
    return min(int(steps), n_steps)


def rate_factor(recipe: FinetuneRecipe, step: int, n_steps: int) -> float:
    """Return what the schedule multiplies every rate by.

    Parameters
    ----------
    recipe : FinetuneRecipe
        Its schedule and warm-up.
    step : int
        From 0.
    n_steps : int
        Of the whole run.

    Returns
    -------
    float
        In [0, 1]. During a warm-up of w steps (step + 1) / w. After it, with
        t = (step - w) / (n_steps - w): 1, or (1 + cos(pi t)) / 2, or a tenth for
        every milestone that t has reached.
    """
    warmup = warmup_steps(recipe, n_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if recipe.schedule == "step":
        return float(STEP_FACTOR ** sum(done >= milestone for milestone in STEP_MILESTONES))
    return 1.0
