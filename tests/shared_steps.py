"""The first steps of every recipe, by as many processes as a launcher started, or by one.

    torchrun --nproc-per-node 2 tests/shared_steps.py RESULT.json
    python -m oneflow.distributed.launch --nproc_per_node 2 tests/shared_steps.py RESULT.json

`test_distributed.py` holds what several processes write against `shared_steps` by one. The last
batch has 9 of the 24 images, the first 15: shares are uneven.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
from first_steps import CASES, CLASSES, SIZE, source

from featcache import load_weights
from featcache.finetuning.framework import get_framework
from featcache.finetuning.joining import joined
from featcache.finetuning.recipes import finetune_recipe
from featcache.finetuning.trainer import Trainer

BATCH = 15


def shared_steps(case, ranks, engine):
    """Return losses, predictions and tensors after an epoch of one recipe."""
    method, changes = CASES[case]
    weights = load_weights("tinyimagenet32", size=SIZE)
    recipe = finetune_recipe(method, batch_size=BATCH, epochs=1, **changes)
    framework = get_framework(engine)
    trainer = Trainer(weights, CLASSES, recipe, seed=1, framework=framework, ranks=ranks)
    images = source(case, weights.preprocess)
    with closing(trainer.steps(images, 0)) as steps:
        taken = [(step.loss, step.n_images, step.n_seen) for step in steps]
    state = trainer.network.state()
    return {
        "losses": [loss for loss, _, _ in taken],
        "counts": [[n_images, n_seen] for _, n_images, n_seen in taken],
        "predicted": trainer.predict(images).tolist(),
        "norms": {name: float(np.linalg.norm(value)) for name, value in state.items()},
        "same everywhere": bool(_same(ranks, state)),
    }


def _same(ranks, state):
    """Say whether all ranks have the same bytes as rank 0."""
    mine = np.concatenate([array.ravel() for array in state.values()]).astype(np.float32)
    return ranks.total_array(np.array([ranks.from_first(mine.tobytes()) != mine.tobytes()])) == 0


if __name__ == "__main__":
    with joined("auto") as (RANKS, ENGINE):
        found = {case: shared_steps(case, RANKS, ENGINE) for case in CASES}
        if RANKS.is_first:
            Path(sys.argv[1]).write_text(json.dumps({"size": RANKS.size, **found}))
