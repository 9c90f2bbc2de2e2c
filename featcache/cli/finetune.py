"""The command that trains a network, and its options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from ..progress import silent
from . import launch as _launch
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
)
from .output import counted, encoding, percent, sparkline

if TYPE_CHECKING:
    from ..finetuning.run import FinetuneResult


Stage = Literal["layer1", "layer2", "layer3", "layer4"]


@app.command()
def finetune(
    dataset: TrainedDatasetArgument = None,
    method: Annotated[
        Literal["full", "split", "frozen", "scratch"],
        typer.Option(help="What is trained: everything, at split rates, the head, from scratch."),
    ] = "split",
    backbone: TrainedBackboneOption = None,
    weights: TrainedWeightsOption = None,
    size: SizeOption = None,
    engine: TrainerOption = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            help="What convolutions compute in; bf16 with PyTorch, f16 on a GPU.",
            rich_help_panel=ENGINE,
        ),
    ] = "f32",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Train on this cache's features; the layers below are frozen.",
            metavar="PATH",
            parser=cache_place,
        ),
    ] = None,
    freeze_until: Annotated[
        Stage | None, typer.Option(help="Leave this stage and all before it as they are.")
    ] = None,
    init_head: Annotated[
        Path | None, typer.Option(help="Begin with the head that a probe saved (LP-FT).")
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
            help="Of the head; the backbone's rate keeps its proportion.",
            show_default="the tutorial's 0.001",
        ),
    ] = None,
    backbone_lr: Annotated[
        float | None, typer.Option(help="Of the backbone.", show_default="the method's")
    ] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(help="Each stage trains at this times the rate of the one after it."),
    ] = None,
    schedule: Annotated[
        Literal["constant", "cosine", "step"],
        typer.Option(help="cosine: to 0. step: a tenth after 1/2 and 3/4 of the steps."),
    ] = "constant",
    warmup: Annotated[
        float, typer.Option(help="Steps that the rates rise; below 1: a fraction of all steps.")
    ] = 0.0,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of the target spread over all classes.")
    ] = 0.0,
    augment: Annotated[
        Literal["tutorial", "flip", "none", "crop-flip"],
        typer.Option(help="tutorial: flips both ways. flip: left and right."),
    ] = "tutorial",
    bn: Annotated[
        Literal["train", "eval"],
        typer.Option(help="eval: keep the batch-norm statistics of the weights."),
    ] = "train",
    patience: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop so many epochs after the best one on a validation split; keep that."
        ),
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(help="With --patience: the share of training images held out.")
    ] = 0.1,
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    seed: SeedOption = 0,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with a run that was stopped: its folder, or latest.", metavar="RUN"
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="A .safetensors file for the network, fit for --weights.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard's event files too.")
    ] = False,
    plot: PlotOption = None,
    data_root: DataRootOption = None,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> None:
    """Train the network, end to end or above a cached cut.

    Without options these are the tutorial's recipes.

    Example: featcache finetune digits --method split --weights tinyimagenet32
    """
    _plot.checked(plot)
    from ..finetuning.finetune import finetune as run

    is_first = _launch.is_first(_launch.place())
    with out.progress() if is_first else nullcontext(silent) as report:
        result = run(
            dataset,
            method,
            backbone=backbone,
            weights=weights,
            size=size,
            engine=engine,
            device=device,
            precision=precision,
            cache=cache,
            freeze_until=freeze_until,
            init_head=init_head,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            backbone_lr=backbone_lr,
            layer_decay=layer_decay,
            schedule=schedule,
            warmup=warmup,
            label_smoothing=label_smoothing,
            augment=augment,
            bn=bn,
            patience=patience,
            val_fraction=val_fraction,
            train_limit=train_limit,
            test_limit=test_limit,
            seed=seed,
            resume=resume or False,
            save=save,
            tensorboard=tensorboard,
            data_root=data_root,
            runs=runs,
            on_progress=report,
            on_note=out.note,
        )
    if not is_first:
        return
    out.show(result, json, finetune_summary)
    _plot.save(plot, lambda: _figure(result))


def _figure(result: FinetuneResult) -> Any:
    from ..reporting.curve_figures import learning_curves

    record = {"kind": "finetune", "n_epochs": len(result.epochs), **asdict(result)}
    return learning_curves([record])


_LISTED = 12  # epochs up to which each has its line


def finetune_summary(result: FinetuneResult) -> list[Any]:
    """Return the curve, and the accuracy of the epoch that counts."""
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
    """Return which epochs have a line: all of a few, else every so many, with the best and last."""
    if n_epochs <= _LISTED:
        return range(n_epochs)
    stride = -(-n_epochs // (_LISTED - 2))
    return sorted({*range(0, n_epochs, stride), best - 1, n_epochs - 1})


def _curves(result: FinetuneResult) -> list[str]:
    """Return loss and accuracy as a line each; of a single epoch there is no curve."""
    if len(result.epochs) < 2:
        return []
    losses = [epoch.train_loss for epoch in result.epochs]
    accuracies = [100 * epoch.top1 for epoch in result.epochs]
    return [
        f"train loss {sparkline(losses, encoding())} {losses[0]:.3f} to {losses[-1]:.3f}",
        f"{result.curve_split} top-1 {sparkline(accuracies, encoding())} {accuracies[0]:.1f} to "
        f"{accuracies[-1]:.1f} %",
    ]


_UNITS = {"s": 1, "m": 60, "h": 3600}


def _seconds(text: str) -> float:
    """Return the seconds of ``90``, ``90s``, ``10m`` or ``1.5h``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not found or not float(found[1]):
        raise typer.BadParameter(
            f"expected a duration such as 90s, 10m or 2h, found {text!r}", param_hint="--budget"
        )
    return float(found[1]) * _UNITS[found[2] or "s"]


@app.command()
def fit(
    dataset: DatasetArgument = "cifar10",
    target: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Accuracy on validation images to reach.")
    ] = 0.9,
    budget: Annotated[
        str | None,
        typer.Option(help="Time that everything may take: 90s, 10m, 2h.", show_default="no limit"),
    ] = None,
    backbone: BackboneOption = "resnet18",
    weights: WeightsOption = "imagenet",
    size: SizeOption = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "f32",
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Of each fine-tune.", show_default="the tutorial's 3"),
    ] = None,
    seed: SeedOption = 0,
    data_root: DataRootOption = None,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> None:
    """Reach an accuracy at the least cost: the probe, then fine-tunes, the cheapest first.

    Example: featcache fit digits --target 0.99 --weights tinyimagenet32
    """
    from ..finetuning.fit import fit as run

    budget_s = None if budget is None else _seconds(budget)
    with out.progress() as report:
        result = run(
            dataset,
            target,
            budget_s=budget_s,
            backbone=backbone,
            weights=weights,
            size=size,
            engine=engine,
            device=device,
            precision=precision,
            epochs=epochs,
            seed=seed,
            data_root=data_root,
            runs=runs,
            on_progress=report,
            on_note=out.note,
        )
    out.show(result, json, out.fit_summary)
