"""The command `fit`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from . import _output as out
from ._options import (
    BackboneOption,
    DataRootOption,
    DatasetArgument,
    DeviceOption,
    EngineOption,
    JsonOption,
    PrecisionOption,
    RunsOption,
    SeedOption,
    SizeOption,
    WeightsOption,
    app,
)

__all__ = ["fit"]

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

    Example: [bold]featcache fit digits --target 0.99 --weights tinyimagenet32[/bold]
    """
    from ..fitting import fit as run

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
