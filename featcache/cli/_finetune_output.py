"""How a fine-tune looks on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ._output import counted, encoding, percent
from ._sparkline import sparkline

if TYPE_CHECKING:
    from ..finetuning import FinetuneResult

__all__ = ["finetune_summary"]

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
