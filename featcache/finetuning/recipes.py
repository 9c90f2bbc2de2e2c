"""Recipes, options and learning rates of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones.architectures import BACKBONES, CUTS
from ..errors import OutputError, RecipeError
from ..options import check_choice
from ..probes.recipes import check_common

if TYPE_CHECKING:
    from ..probes.head import Head

# The engines that train.
TRAINERS = ("oneflow", "torch")
# From the pixels to the features; a stage trains at one rate.
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")

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
    "bn": ("train", "eval"),
    "schedule": SCHEDULES,
}


@dataclass(frozen=True)
class FinetuneRecipe:
    """Hyperparameters of training a backbone and its head.

    Parameters
    ----------
    head_lr : float
        Learning rate of the head.
    backbone_lr : float or None
        Learning rate of the backbone; None freezes it: eval mode, no gradients.
    pretrained : bool
        Whether the backbone starts from the weights, or from random ones.
    epochs, batch_size, momentum, weight_decay
        As in `ProbeRecipe`; the penalty is on every trained parameter, as in the tutorial.
    augment : str
        One of `AUGMENTATIONS`. ``"tutorial"``: each image is flipped horizontally and
        vertically with probability 1/2 each. ``"flip"``: horizontally alone. ``"crop-flip"``:
        shifted by up to an eighth of its side, black beyond its border, and flipped
        horizontally (He et al. 2016, section 4.2: 4 of 32 pixels). ``"none"``.
    freeze_until : str or None
        Freeze this block and all before it: eval mode, no gradients, no moving statistics. A
        stage of the ResNets, ``"layer1"`` to ``"layer4"``, or the path of a block in a library's
        model, such as ``"blocks.5"``.
    bn : str
        ``"train"``: batch normalisation uses the statistics of each batch and updates its
        running statistics, as in the tutorial. ``"eval"``: it keeps those of the weights.
    layer_decay : float
        In (0, 1]: each stage trains at this fraction of the rate of the stage after it, the
        head at ``head_lr`` (Clark et al., "ELECTRA", ICLR 2020, section 3.1). 1: all alike. The
        stages of a library's model are its blocks, or timm's own groups.
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
        Stop after this many epochs without a better accuracy on a validation split, and keep
        the best epoch. None: run every epoch and keep the last.
    val_fraction : float
        In (0, 1): with ``patience``, the share of the training images held out, stratified
        by class.
    lora : int or None
        Train matrices of this rank beside every linear layer of a library's model, at
        ``backbone_lr``, instead of its weights (Hu et al., "LoRA", ICLR 2022): W + B A. Frozen are
        all other parts, and they are in eval mode. The saved network has the products added in.
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
    lora: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, and pairs that contradict each other."""
        check_common(self, least_batch=_LEAST_BATCH, may_lack_penalty=True)
        for name, known in _FINETUNE_CHOICES.items():
            check_choice(name, getattr(self, name), known)
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
        if self.lora is not None and self.lora < 1:
            raise RecipeError(f"lora: expected a rank of at least 1, found {self.lora}")
        for name in ("freeze_until", "lora"):
            if getattr(self, name) and (self.backbone_lr is None or not self.pretrained):
                what = "frozen as a whole" if self.backbone_lr is None else "a random draw"
                raise RecipeError(
                    f"{name.replace('_', ' ')}: expected a pretrained backbone of which a part "
                    f"trains, found one that is {what}; use --method full or --method split"
                )


# The tutorial's methods 1, 2 and 3, and its comparison without transfer.
FINETUNE_RECIPES = {
    "full": FinetuneRecipe(),
    "split": FinetuneRecipe(backbone_lr=1e-4),
    "frozen": FinetuneRecipe(backbone_lr=None),
    "scratch": FinetuneRecipe(pretrained=False),
}
METHODS = tuple(FINETUNE_RECIPES)


def finetune_recipe(
    method: str, base: FinetuneRecipe | None = None, *, lr: float | None = None, **changes: Any
) -> FinetuneRecipe:
    """Return a method's recipe, or ``base``, with some values replaced; None replaces nothing.

    ``lr`` is the head's rate; the backbone's keeps its proportion to it unless it is given too.
    """
    check_choice("method", method, METHODS)
    known = [field.name for field in fields(FinetuneRecipe)]
    for name in changes:
        check_choice("recipe", name, known)
    recipe = base or FINETUNE_RECIPES[method]
    changes = {name: value for name, value in changes.items() if value is not None}
    if "backbone_lr" in changes and recipe.backbone_lr is None:
        raise RecipeError(
            f"backbone lr: expected none with method {method}, whose backbone is frozen, found "
            f"{changes['backbone_lr']}; use --method split"
        )
    if lr is not None:
        changes.setdefault("head_lr", lr)
        if recipe.backbone_lr is not None:
            changes.setdefault("backbone_lr", lr * (recipe.backbone_lr / recipe.head_lr))
    return replace(recipe, **changes)


@dataclass(frozen=True)
class FinetuneOptions:
    """What to train, with what, and where the result goes: the options of `featcache.finetune`.

    Parameters
    ----------
    method : str
        ``"full"`` (everything at one rate), ``"split"`` (the backbone at 0.1 x the head's
        learning rate), ``"frozen"`` (the head alone, end to end) or ``"scratch"`` (everything
        from random weights).
    recipe : FinetuneRecipe, optional
        The hyperparameters; the method's by default.
    backbone, weights, size, data_root
        As in `featcache.extract`; with ``cache`` those of the cache by default. ``"scratch"``
        uses only the input size of the weights. A file of a network (.onnx, .xml, .pt2) or a
        function that returns no PyTorch module cannot be trained.
    engine : str
        What trains: ``"torch"``, ``"oneflow"``, or ``"auto"``: PyTorch where it is installed,
        else OneFlow; on a GPU the one that can use it.
    device : str
        ``"cpu"``, ``"cuda"``, ``"mps"`` (PyTorch only), or ``"auto"``: the best one that the
        engine can use.
    precision : str
        What convolutions and matrix products compute in: ``"f32"``, or with PyTorch ``"bf16"``.
        Everything else stays float32.
    cache : str or Path, optional
        Train on these features instead of images: a cache of the cut that ``freeze_until``
        names (``"avgpool"`` for method frozen), with the flip views of the augmentation. The
        run uses the same images in the same order as one on the images. With a library's model
        ``"pooled"``, for method frozen alone.
    init_head : str, Path or Head, optional
        Start with this probe's head (LP-FT: Kumar et al., ICLR 2022).
    train_limit, test_limit : int, optional
        Use a stratified draw of this many images (seed 0, whatever ``seed`` is).
    seed : int
        Seed of every random draw of the training.
    resume : str, Path or bool
        Resume a stopped run: its folder, or True for the newest unfinished one of this method.
        All other options must be the same.
    save : str or Path, optional
        Another ``.safetensors`` file for the network.
    tensorboard : bool
        Also write TensorBoard event files into the run's folder.
    runs : str or Path, optional
        Folder for checkpoints and records; ``cache/runs`` by default.

    Raises
    ------
    RecipeError
        No such method or engine.
    OutputError
        ``save`` does not end in ``.safetensors``.
    """

    method: str = "split"
    recipe: FinetuneRecipe = None  # type: ignore[assignment]  # __post_init__ sets the method's
    backbone: str | None = None
    weights: str | Path | None = None
    size: int | None = None
    engine: str = "auto"
    device: str = "auto"
    precision: str = "f32"
    cache: str | Path | None = None
    init_head: str | Path | Head | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    seed: int = 0
    resume: str | Path | bool = False
    save: str | Path | None = None
    tensorboard: bool = False
    data_root: str | Path | None = None
    runs: str | Path | None = None

    def __post_init__(self) -> None:
        """Fill in the method's recipe, and refuse values that mean nothing."""
        if vars(self)["recipe"] is None:
            object.__setattr__(self, "recipe", finetune_recipe(self.method))
        check_choice("engine", self.engine, ("auto", *TRAINERS))
        known = self.backbone or (None if self.cache else "resnet18")
        if known in BACKBONES:
            check_resnet_recipe(self.recipe, str(known))
        if self.save is not None and Path(self.save).suffix != ".safetensors":
            raise OutputError(
                f"{self.save}: expected a name that ends in .safetensors, found "
                f"{Path(self.save).suffix!r}; rename it"
            )


# Top-1 on CIFAR-10's test images that the tutorial's text reports, ImageNet weights, 224 px.
PUBLISHED = {"full": 0.9017, "scratch": 0.4957}


def check_resnet_recipe(recipe: FinetuneRecipe, backbone: str) -> None:
    """Refuse what a ResNet of ours does not have: a block of another name, linear layers."""
    check_choice("freeze until", recipe.freeze_until, (None, *STAGES[1:]))
    if recipe.lora is not None:
        raise RecipeError(
            f"lora: expected a library's model with linear layers, found {backbone}; use "
            "--backbone timm:vit_small_patch16_224, or leave out --lora"
        )


def frozen_cut(recipe: FinetuneRecipe) -> str | None:
    """Return the last cut of a ResNet below which nothing trains; None where everything does."""
    return CUTS[-1] if recipe.backbone_lr is None else recipe.freeze_until


def group_rates(
    recipe: FinetuneRecipe,
    stages: Sequence[str] = STAGES,
    trained: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the rate of the head and of every stage that trains, last stage first.

    With ``layer_decay`` d, the k-th stage below the head trains at d ** k times ``backbone_lr``.
    By default those of a ResNet train that come after ``freeze_until``.
    """
    rates = {"head": recipe.head_lr}
    if recipe.backbone_lr is None:
        return rates
    if trained is None:
        trained = stages[stages.index(recipe.freeze_until) + 1 if recipe.freeze_until else 0 :]
    for depth, stage in enumerate(reversed(stages), start=1):
        if stage in trained:
            rates[stage] = recipe.backbone_lr * recipe.layer_decay**depth
    return rates


def rate_factor(recipe: FinetuneRecipe, step: int, n_steps: int) -> float:
    """Return what the schedule multiplies every rate by at a step (from 0), in [0, 1].

    In a warm-up of w steps (step + 1) / w. After it, with t = (step - w) / (n_steps - w): 1, or
    (1 + cos(pi t)) / 2, or 0.1 for every milestone that t has reached.
    """
    steps = recipe.warmup if recipe.warmup >= 1 else round(recipe.warmup * n_steps)
    warmup = min(int(steps), n_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if recipe.schedule == "step":
        return float(STEP_FACTOR ** sum(done >= milestone for milestone in STEP_MILESTONES))
    return 1.0
