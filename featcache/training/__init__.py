"""Training a network: what moves, at which rate, on which draws; steps and their state."""

from __future__ import annotations

from ._checkpoint import load_checkpoint, save_checkpoint
from ._framework import (
    TRAINERS,
    Framework,
    get_framework,
    oneflow_framework,
    torch_framework,
)
from ._network import HeadArrays, Network, initial_backbone
from ._ranks import JoinedRanks, Ranks, Stopped
from ._schedule import STAGES, frozen_cut, group_rates, rate_factor, warmup_steps
from ._sources import AUGMENT_VIEWS, CachedSource, Draw, ImageSource, Source
from ._step import Step
from ._trainer import Trainer
from ._watch import open_watch

__all__ = [
    "AUGMENT_VIEWS",
    "STAGES",
    "TRAINERS",
    "CachedSource",
    "Draw",
    "Framework",
    "HeadArrays",
    "ImageSource",
    "JoinedRanks",
    "Network",
    "Ranks",
    "Source",
    "Step",
    "Stopped",
    "Trainer",
    "frozen_cut",
    "get_framework",
    "group_rates",
    "initial_backbone",
    "load_checkpoint",
    "oneflow_framework",
    "open_watch",
    "rate_factor",
    "save_checkpoint",
    "torch_framework",
    "warmup_steps",
]
