"""Training a network: what moves, at which rate, on which draws; steps and their state."""

from __future__ import annotations

from ._checkpoint import load_checkpoint, save_checkpoint
from ._framework import Framework, oneflow_framework
from ._network import HeadArrays, Network
from ._schedule import STAGES, frozen_cut, group_rates, rate_factor, warmup_steps
from ._sources import AUGMENT_VIEWS, CachedSource, Draw, ImageSource, Source
from ._trainer import Step, Trainer

__all__ = [
    "AUGMENT_VIEWS",
    "STAGES",
    "CachedSource",
    "Draw",
    "Framework",
    "HeadArrays",
    "ImageSource",
    "Network",
    "Source",
    "Step",
    "Trainer",
    "frozen_cut",
    "group_rates",
    "load_checkpoint",
    "oneflow_framework",
    "rate_factor",
    "save_checkpoint",
    "warmup_steps",
]
