"""The command that trains a network, and its options."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..progress import silent
from . import _launch, _plot
from . import _output as out
from ._finetune_output import finetune_summary
from ._help import ENGINE
from ._options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    PlotOption,
    Precision,
    RunsOption,
    SeedOption,
    SizeOption,
    TestLimitOption,
    TrainedBackboneOption,
    TrainedDatasetArgument,
    TrainedWeightsOption,
    TrainerOption,
    TrainLimitOption,
    app,
)
from ._places import cache_place

if TYPE_CHECKING:
    from ..finetuning import FinetuneResult

__all__ = ["finetune"]

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

    Example: [bold]featcache finetune digits --method split --weights tinyimagenet32[/bold]
    """
    _plot.checked(plot)
    from ..finetuning import finetune as run

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
    from ..figures import learning_curves

    record = {"kind": "finetune", "n_epochs": len(result.epochs), **asdict(result)}
    return learning_curves([record])
