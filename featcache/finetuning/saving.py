"""What is kept of a run that has ended: its network, and its head beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..backbones.engine import computed_by
from ..backbones.weights import load_weights, save_weights
from ..errors import OutputError
from ..files import check_writable
from ..probes.head import Head, save_head
from ..runs import save_run
from ..store.format import FORMAT_VERSION, fingerprint
from .ingredients import Ingredients
from .run import FinetuneResult
from .trainer import Trainer


def save_network(path: Path, trainer: Trainer, made: Ingredients, result: FinetuneResult) -> None:
    """Write the trained network as safetensors that `load_weights` reads."""
    save_weights(
        path,
        trainer.network.state(),
        backbone=made.weights.backbone,
        preprocess=made.weights.preprocess,
        metadata={
            "method": result.method,
            "epoch": str(result.best_epoch),
            "dataset": made.facts["dataset"],
        },
    )


def _save_network_head(result: FinetuneResult, trainer: Trainer, made: Ingredients) -> None:
    """Write the head beside the network, so that `featcache.predict` can be given it.

    Its features are those of the network that was just trained.
    """
    network = load_weights(result.checkpoint, made.weights.backbone)
    ingredients = {
        **computed_by(made.choice, network),
        "cuts": ["avgpool"],
        "dataset_digest": made.facts["dataset_digest"],
        "dtype": "float32",
        "format_version": FORMAT_VERSION,
        "views": ["identity"],
        "weights": result.checkpoint.name,
    }
    arrays = trainer.network.state()
    head = Head(
        np.asarray(arrays["fc.weight"]),
        np.asarray(arrays["fc.bias"]),
        made.class_names,
        fingerprint(ingredients),
        "none",
        ingredients,
    )
    save_head(result.run / "head.safetensors", head, {"method": result.method})


def write_result(result: FinetuneResult, trainer: Trainer, made: Ingredients) -> None:
    """Write network, head and record into the folder of the run."""
    save_network(result.checkpoint, trainer, made, result)
    _save_network_head(result, trainer, made)
    save_run(
        result.run,
        {
            "kind": "finetune",
            **asdict(result),
            "run": result.run.name,
            "n_epochs": len(result.epochs),
            **made.facts,
        },
    )


def check_place(path: Path) -> None:
    """Find out before the long work that a network can be written there."""
    if path.suffix != ".safetensors":
        raise OutputError(
            f"{path}: expected a name that ends in .safetensors, found {path.suffix!r}; rename it"
        )
    check_writable(path)
