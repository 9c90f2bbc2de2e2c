"""The command line with training steps that take their time, to be killed by the tests.

    python long_finetune.py STEP_S CHECKPOINT_EVERY_S LIMIT_BYTES ARGUMENTS...

Each step takes STEP_S longer, a checkpoint is due after CHECKPOINT_EVERY_S, and no file may
grow beyond LIMIT_BYTES (0: as large as it likes) while training runs. "ready" is printed before
the first step.
"""

from __future__ import annotations

import numpy_first  # noqa: F401

# isort: split
import resource
import sys
import time

from featcache import cli
from featcache.finetuning import run as run_module
from featcache.finetuning.trainer import Trainer


def main(step_s, checkpoint_every_s, limit_bytes, *arguments):
    step, train = Trainer._update, run_module.Run.train

    def slow_step(*arguments):
        time.sleep(float(step_s))
        return step(*arguments)

    def announced_train(run):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if int(limit_bytes):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), before[1]))
        print("ready", flush=True)
        train(run)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    Trainer._update = slow_step
    run_module.Run.train = announced_train
    run_module.CHECKPOINT_EVERY_S = float(checkpoint_every_s)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
