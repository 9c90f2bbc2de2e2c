"""The commands that train: ``finetune`` and ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from ..process import torchrun_rank
from ..progress import silent
from . import output as out
from . import plot as _plot
from .help import ENGINE
from .options import (
    BackboneOption,
    DataRootOption,
    DatasetArgument,
    DeviceOption,
    EngineOption,
    JsonOption,
    PlotOption,
    Precision,
    PrecisionOption,
    RunsOption,
    SeedOption,
    SizeOption,
    TestLimitOption,
    TrainedBackboneOption,
    TrainedDatasetArgument,
    TrainedWeightsOption,
    TrainerOption,
    TrainLimitOption,
    WeightsOption,
    app,
    cache_place,
    seconds,
    without,
)
from .output import counted, encoding, percent, sparkline

if TYPE_CHECKING:
    from ..finetuning.run import FinetuneResult


@app.command()
def finetune(
    dataset: TrainedDatasetArgument = None,
    method: Annotated[
        Literal["full", "split", "frozen", "scratch"],
        typer.Option(
            help="What trains: everything, all at split rates, the head alone, all from scratch."
        ),
    ] = "split",
    backbone: TrainedBackboneOption = None,
    weights: TrainedWeightsOption = None,
    size: SizeOption = None,
    engine: TrainerOption = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            help="What convolutions compute in; bf16 with PyTorch.",
            rich_help_panel=ENGINE,
        ),
    ] = "f32",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Train on the features of this cache; the layers below are frozen.",
            metavar="PATH",
            parser=cache_place,
        ),
    ] = None,
    freeze_until: Annotated[
        str | None,
        typer.Option(
            help="Freeze this block and all before it: layer1 to layer4 of the ResNets, blocks.5 "
            "and the like of a library's model.",
            metavar="BLOCK",
        ),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train matrices of this rank beside the linear layers of a library's model, not "
            "its weights.",
            metavar="RANK",
        ),
    ] = None,
    init_head: Annotated[
        Path | None, typer.Option(help="Start with the head that a probe saved (LP-FT).")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the training images.", show_default="the tutorial's 3"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Images per step.", show_default="the tutorial's 64")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the head; the backbone's keeps its proportion.",
            show_default="the tutorial's 0.001",
        ),
    ] = None,
    backbone_lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of the backbone.", show_default="the method's"),
    ] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(help="Each stage trains at this times the rate of the next one."),
    ] = None,
    schedule: Annotated[
        Literal["constant", "cosine", "step"],
        typer.Option(
            help="Of the learning rates. cosine: to 0. step: x 0.1 after 1/2 and 3/4 of the steps."
        ),
    ] = "constant",
    warmup: Annotated[
        float,
        typer.Option(help="Steps over which the rates rise; below 1: a fraction of all steps."),
    ] = 0.0,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of the target spread over all classes.")
    ] = 0.0,
    augment: Annotated[
        Literal["tutorial", "flip", "none", "crop-flip"],
        typer.Option(help="tutorial: flips both ways. flip: left-right. crop-flip: shifts too."),
    ] = "tutorial",
    bn: Annotated[
        Literal["train", "eval"],
        typer.Option(help="eval: keep the weights' batch-norm statistics."),
    ] = "train",
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop this many epochs after the best one on a validation split; keep that one.",
        ),
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(help="With --patience: share of training images held out.")
    ] = 0.1,
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    seed: SeedOption = 0,
    resume: Annotated[
        str | None,
        typer.Option(help="Resume a stopped run: its folder, or latest.", metavar="RUN"),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Also save the network as a .safetensors file, for --weights."),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard event files.")
    ] = False,
    plot: PlotOption = None,
    data_root: DataRootOption = None,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> Any:
    """Train the network, end to end or above a cached cut.

    Without options these are the tutorial's recipes.

    Example: featcache finetune digits --method split --weights tinyimagenet32
    """
    given = without(locals(), "plot", "json")
    _plot.checked(plot)
    from ..finetuning.finetune import finetune as run

    is_first = not torchrun_rank()
    with out.progress() if is_first else nullcontext(silent) as report:
        result = run(**{**given, "resume": resume or False}, on_progress=report, on_note=out.note)
    if is_first:
        out.show(result, json, finetune_summary)
        _plot.save(plot, lambda: _figure(result))
    return result


def _figure(result: FinetuneResult) -> Any:
    from ..reporting.figures import learning_curves

    record = {"kind": "finetune", "n_epochs": len(result.epochs), **asdict(result)}
    return learning_curves([record])


_LISTED = 12  # epochs up to which each has its line


def finetune_summary(result: FinetuneResult) -> list[Any]:
    """Return the curve, and the accuracy of the epoch that is kept."""
    table = Table(title=f"fine-tune, method {result.method}", title_justify="left")
    for column in ("epoch", "train loss", f"{result.curve_split} top-1", "wall"):
        table.add_column(column, justify="right")
    for index in _listed(len(result.epochs), result.best_epoch):
        epoch = result.epochs[index]
        table.add_row(
            str(epoch.epoch),
            f"{epoch.train_loss:.4f}",
            f"{100 * epoch.top1:.2f} %",
            f"{epoch.wall_s:.1f} s",
        )
    chosen = f" (epoch {result.best_epoch})" if result.curve_split == "val" else ""
    return [
        table,
        *_curves(result),
        f"top-1 {percent(result.top1, result.top1_interval)} on "
        f"{counted(result.n_test, 'test image')}{chosen}, trained on {result.n_train:,} at "
        f"{result.images_per_s:.0f} img/s",
        f"checkpoint: {result.checkpoint}",
    ]


def _listed(n_epochs: int, best: int) -> Sequence[int]:
    """Return the epochs to list: all of a few, else some, with the best and the last."""
    if n_epochs <= _LISTED:
        return range(n_epochs)
    stride = -(-n_epochs // (_LISTED - 2))
    return sorted({*range(0, n_epochs, stride), best - 1, n_epochs - 1})


def _curves(result: FinetuneResult) -> list[str]:
    """Return loss and accuracy as a line each; a single epoch has no curve."""
    if len(result.epochs) < 2:
        return []
    losses = [epoch.train_loss for epoch in result.epochs]
    accuracies = [100 * epoch.top1 for epoch in result.epochs]
    return [
        f"train loss {sparkline(losses, encoding())} {losses[0]:.3f} to {losses[-1]:.3f}",
        f"{result.curve_split} top-1 {sparkline(accuracies, encoding())} {accuracies[0]:.1f} to "
        f"{accuracies[-1]:.1f} %",
    ]


@app.command()
def fit(
    dataset: DatasetArgument = "cifar10",
    target: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Accuracy to reach on validation images.")
    ] = 0.9,
    budget: Annotated[
        str | None,
        typer.Option(help="Time that everything may take: 90s, 10m, 2h.", show_default="no limit"),
    ] = None,
    backbone: BackboneOption = "resnet18",
    weights: WeightsOption = None,
    size: SizeOption = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "f32",
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs of each fine-tune.", show_default="the tutorial's 3"),
    ] = None,
    seed: SeedOption = 0,
    data_root: DataRootOption = None,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> None:
    """Reach an accuracy at the least cost: the probe, then fine-tunes, the cheapest first.

    Example: featcache fit digits --target 0.99 --weights tinyimagenet32
    """
    given = without(locals(), "budget", "json")
    from ..finetuning.fit import fit as run

    budget_s = None if budget is None else seconds(budget)
    with out.progress() as report:
        result = run(**given, budget_s=budget_s, on_progress=report, on_note=out.note)
    out.show(result, json, out.fit_summary)
