"""Recipes: every hyperparameter, once, with its source.

The constants of the tutorial ("Transfer Learning in Computer Vision", OneFlow)
are those of its text and code. What differs from it on purpose is said where
it differs.
"""

from __future__ import annotations

from ._finetune import (
    AUGMENTATIONS,
    FINETUNE_RECIPES,
    METHODS,
    PUBLISHED,
    SCHEDULES,
    STEP_FACTOR,
    STEP_MILESTONES,
    FinetuneRecipe,
    finetune_recipe,
)
from ._probe import MAX_ROUNDS, PROBE_RECIPES, PROBE_SCHEDULES, ExactRecipe, ProbeRecipe

__all__ = [
    "AUGMENTATIONS",
    "FINETUNE_RECIPES",
    "MAX_ROUNDS",
    "METHODS",
    "PROBE_RECIPES",
    "PROBE_SCHEDULES",
    "PUBLISHED",
    "SCHEDULES",
    "STEP_FACTOR",
    "STEP_MILESTONES",
    "ExactRecipe",
    "FinetuneRecipe",
    "ProbeRecipe",
    "finetune_recipe",
]
