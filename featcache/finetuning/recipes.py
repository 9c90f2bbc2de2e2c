"""Recipes of a network that trains, or of its upper part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import RecipeError
from ..probes.recipes import check_common

# Batch normalisation needs two images to have a variance.
_LEAST_BATCH = 2
# How training images are varied; `featcache.finetuning.batches` draws them.
AUGMENTATIONS = ("tutorial", "flip", "none", "crop-flip")
# What the learning rate does over the steps of a run.
SCHEDULES = ("constant", "cosine", "step")
# Shares of the steps after which "step" takes a tenth of the rate: 32,000 and 48,000 of 64,000
# in He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
STEP_MILESTONES = (0.5, 0.75)
STEP_FACTOR = 0.1

_FINETUNE_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "augment": AUGMENTATIONS,
    "freeze_until": (None, "layer1", "layer2", "layer3", "layer4"),
    "bn": ("train", "eval"),
    "schedule": SCHEDULES,
}


@dataclass(frozen=True)
class FinetuneRecipe:
    """How a backbone and its head are trained.

    Parameters
    ----------
    head_lr : float
        Learning rate of the head.
    backbone_lr : float or None
        Of the backbone; None leaves it frozen: eval mode, no gradients.
    pretrained : bool
        Whether the backbone starts from the weights, or from a random draw.
    epochs, batch_size, momentum, weight_decay
        As in `ProbeRecipe`; the penalty is on every trained parameter, as in the tutorial.
    augment : str
        One of `AUGMENTATIONS`. ``"tutorial"``: each image is flipped horizontally and
        vertically with probability 1/2 each. ``"flip"``: horizontally alone. ``"crop-flip"``:
        shifted by up to an eighth of its side either way, black beyond its border, and
        flipped horizontally (He et al. 2016, section 4.2: 4 of 32 pixels). ``"none"``.
    freeze_until : str or None
        This stage, ``"layer1"`` to ``"layer4"``, and all before it stay as they are: eval
        mode, no gradients, no moving statistics.
    bn : str
        ``"train"``: batch normalisation uses and updates the statistics of batches, as
        the tutorial means it. ``"eval"``: it keeps those of the weights.
    layer_decay : float
        In (0, 1]: each stage trains at this fraction of the rate of the stage after it, the
        head at ``head_lr`` (Clark et al., "ELECTRA", ICLR 2020, section 3.1). 1: all alike.
    schedule : str
        One of `SCHEDULES`. ``"constant"``: the tutorial's. ``"cosine"``: to 0 along half a
        cosine (Loshchilov and Hutter, ICLR 2017). ``"step"``: a tenth of the rate after
        `STEP_MILESTONES` of the steps.
    warmup : float
        Steps over which rates rise linearly to their value (Goyal et al. 2017, section
        2.2): a whole number of steps, or below 1 a fraction of all steps. 0: none.
    label_smoothing : float
        In [0, 1): the share of the target that is spread over all classes (Szegedy et
        al., CVPR 2016, section 7).
    patience : int or None
        Stop after so many epochs without a better accuracy on a validation split, and go
        back to the best epoch. None: every epoch runs, and the last one counts.
    val_fraction : float
        In (0, 1): with ``patience``, the share of the training images that is held out,
        drawn with the proportions of the classes.
    """

    head_lr: float = 1e-3
    backbone_lr: float | None = 1e-3
    pretrained: bool = True
    epochs: int = 3
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: str = "tutorial"
    freeze_until: str | None = None
    bn: str = "train"
    layer_decay: float = 1.0
    schedule: str = "constant"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    patience: int | None = None
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, and pairs that contradict each other."""
        check_common(self, least_batch=_LEAST_BATCH, may_lack_penalty=True)
        for name, known in _FINETUNE_CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                named = ", ".join(choice for choice in known if choice)
                raise RecipeError(
                    f"{name.replace('_', ' ')}: expected one of {named}, found {value!r}"
                )
        for name, low, high in (
            ("layer_decay", self.layer_decay > 0, self.layer_decay <= 1),
            ("label_smoothing", self.label_smoothing >= 0, self.label_smoothing < 1),
            ("val_fraction", self.val_fraction > 0, self.val_fraction < 1),
        ):
            if not (low and high):
                raise RecipeError(
                    f"{name.replace('_', ' ')}: expected a number from 0 to 1, found "
                    f"{getattr(self, name)}"
                )
        whole = self.warmup < 1 or float(self.warmup).is_integer()
        if not (math.isfinite(self.warmup) and self.warmup >= 0 and whole):
            raise RecipeError(
                "warmup: expected a whole number of steps or a fraction of them below 1, found "
                f"{self.warmup}"
            )
        if self.freeze_until and (self.backbone_lr is None or not self.pretrained):
            what = "frozen as a whole" if self.backbone_lr is None else "a random draw"
            raise RecipeError(
                f"freeze until: expected a pretrained backbone of which a part trains, found one "
                f"that is {what}; use --method full or --method split"
            )


# The tutorial's methods 1, 2 and 3, and its comparison without transfer.
FINETUNE_RECIPES = {
    "full": FinetuneRecipe(),
    "split": FinetuneRecipe(backbone_lr=1e-4),
    "frozen": FinetuneRecipe(backbone_lr=None),
    "scratch": FinetuneRecipe(pretrained=False),
}
METHODS = tuple(FINETUNE_RECIPES)


def finetune_recipe(method: str, *, lr: float | None = None, **changes: Any) -> FinetuneRecipe:
    """Return a method's recipe with some of its values replaced.

    Parameters
    ----------
    method : str
        One of `METHODS`.
    lr : float, optional
        Of the head; the backbone's keeps its proportion to it, unless it is given too.
    **changes
        Fields of `FinetuneRecipe`; None leaves the method's own value.

    Raises
    ------
    RecipeError
        No such method or field, or a value that means nothing.
    """
    if method not in FINETUNE_RECIPES:
        raise RecipeError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    known = [field.name for field in fields(FinetuneRecipe)]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise RecipeError(f"recipe: expected any of {', '.join(known)}, found {unknown[0]!r}")
    recipe = FINETUNE_RECIPES[method]
    wanted = {name: value for name, value in changes.items() if value is not None}
    if "backbone_lr" in wanted and recipe.backbone_lr is None:
        raise RecipeError(
            f"backbone lr: expected none with method {method}, whose backbone stays as it is, "
            f"found {wanted['backbone_lr']}; use --method split"
        )
    if lr is not None:
        wanted.setdefault("head_lr", lr)
        if recipe.backbone_lr is not None:
            wanted.setdefault("backbone_lr", lr * (recipe.backbone_lr / recipe.head_lr))
    return replace(recipe, **wanted)


# Top-1 on CIFAR-10's test images that the tutorial's text reports, ImageNet weights, 224 px.
PUBLISHED = {"full": 0.9017, "scratch": 0.4957}
