"""Training a network end to end, or above a cached cut.

Every epoch sets train or eval mode itself; the tutorial's loop stays in eval mode after its first
evaluation, and leaves the "frozen" backbone in train mode. The test split chooses nothing: the
last epoch counts, or with ``patience`` the best one on a validation split.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..backbones.engine import computed_by
from ..backbones.loading import load_weights
from ..backbones.network import POOLED
from ..backbones.weights import save_weights
from ..datasets.dataset import Dataset
from ..files import check_writable, user_path
from ..metrics import top1, wilson_interval
from ..options import with_options
from ..probes.head import Head, save_head
from ..progress import OnNote, OnProgress, silent
from ..runs import runs_folder, save_run
from ..store.format import FORMAT_VERSION, fingerprint
from .folder import FolderElsewhere, RunFolder, find_resumable
from .framework import get_framework
from .ingredients import Ingredients, gather
from .processes import Processes, joined, take_gpu
from .recipes import FinetuneOptions, finetune_recipe
from .run import EventLog, FinetuneResult, Run, ctrl_c_noted, tensorboard_modules
from .trainer import Trainer


@with_options(FinetuneOptions)
def finetune(
    dataset: str | Path | Dataset | None = None,
    method: str | None = None,
    *,
    options: FinetuneOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
    **changes: Any,
) -> FinetuneResult:
    """Train a network end to end, or above a cached cut, on a data set.

    Under ``torchrun`` several processes train one network in PyTorch: each takes its part of
    every batch, rank 0 alone writes files, and all return the result.

    Parameters
    ----------
    dataset : str, Path or Dataset, optional
        As `featcache.load_dataset` takes it; by default ``"cifar10"``, or the data set of
        ``cache``.
    method : str, optional
        ``"full"``, ``"split"`` (the default), ``"frozen"`` or ``"scratch"``.
    options : FinetuneOptions, optional
        Its fields can also be given by name, as keyword arguments.
    on_progress : callable
        Called with the progress of images, and the running loss.
    on_note : callable
        Receives one-line notes, such as which engine was chosen, a checkpoint that could not be
        written, or rounding differences.
    **changes
        ``lr``, the head's learning rate (the backbone's keeps its proportion to it), and any
        field of `FinetuneRecipe`, such as ``epochs``, ``augment`` or ``freeze_until``.

    Returns
    -------
    FinetuneResult

    Raises
    ------
    DatasetError, WeightsError, CacheError, EngineUnavailableError, RecipeError, OutputError
        An ingredient is missing or unsuitable, before the long work starts; WeightsError also
        for a checkpoint of another run; RecipeError also where the loss is no longer finite,
        with the step, the rates and the last good checkpoint.
    RankError
        Another process of torchrun ended, or does another run.
    KeyboardInterrupt
        Ctrl-C; the state is saved, and the text says how to resume.
    """
    with joined(options.engine) as (processes, engine):
        method = method or options.method
        base = options.recipe if method == options.method else None
        recipe = finetune_recipe(method, base, **changes)
        options = replace(options, method=method, recipe=recipe, engine=engine)
        if not processes.is_first:
            on_progress = on_note = silent
        return _train(processes, dataset, options, on_progress, on_note)


def _train(
    processes: Processes,
    dataset: str | Path | Dataset | None,
    options: FinetuneOptions,
    on_progress: OnProgress,
    on_note: OnNote,
) -> FinetuneResult:
    runs = runs_folder(options.runs)
    save = None if options.save is None else user_path(options.save)
    stopped = None
    if processes.is_first:
        if save is not None:
            check_writable(save)
        if options.resume:
            stopped = find_resumable(options.resume, runs, options.method)
    if options.tensorboard:
        tensorboard_modules()
    made = gather(dataset, options, processes.size, on_progress, on_note)
    take_gpu(made.choice.device)
    processes.check_alike(made.identity)
    if not processes.is_first:
        folder: RunFolder = FolderElsewhere(Path(), {}, on_note)
    elif stopped is None:
        folder = RunFolder.create(runs, options.method, made.identity, made.facts, on_note)
    else:
        folder = RunFolder(stopped, made.identity, on_note)
    folder.path = processes.from_first(lambda: folder.path)
    state = processes.from_first(folder.load) if options.resume else None
    trainer = Trainer(
        get_framework(made.choice.name),
        made.weights,
        len(made.class_names),
        options.recipe,
        device=made.choice.device,
        precision=made.choice.precision,
        seed=options.seed,
        head=made.head,
        processes=processes,
    )
    measured, name = (made.test, "test") if made.val is None else (made.val, "val")
    events = EventLog(folder.path) if options.tensorboard and processes.is_first else None
    run = Run(trainer, options.recipe, folder, made.train, measured, name, on_progress, events)
    with ctrl_c_noted(launched=processes.size > 1) as run.stop:
        if state is not None:
            run.load(*state)
            on_note(f"{folder.path}: resuming after step {run.step} of {run.n_steps}")
            folder.note_processes(processes.size)
        try:
            run.train()
        finally:
            if events is not None:
                events.close()
    result = _finish(trainer, run, made, options, folder.path, on_progress)
    if processes.is_first:
        _write_result(result, trainer, made, save)
        folder.remove_checkpoint()
    return result


def _finish(
    trainer: Trainer,
    run: Run,
    made: Ingredients,
    options: FinetuneOptions,
    folder: Path,
    on_progress: OnProgress,
) -> FinetuneResult:
    """Measure on the test split unless the last epoch did, and return the result."""
    accuracy = run.curve[-1].top1
    if made.val is not None:
        accuracy = top1(trainer.predict(made.test, on_progress), made.test.labels)
    head = options.init_head
    return FinetuneResult(
        method=options.method,
        top1=accuracy,
        top1_interval=wilson_interval(accuracy, len(made.test)),
        epochs=tuple(run.curve),
        curve_split="test" if made.val is None else "val",
        best_epoch=run.best_epoch,
        images_per_s=len(made.train) * len(run.curve) / run.trained_s,
        wall_s=run.wall_s,
        checkpoint=folder / "model.safetensors",
        n_train=len(made.train),
        n_val=0 if made.val is None else len(made.val),
        n_test=len(made.test),
        seed=options.seed,
        recipe=options.recipe,
        engine=made.choice.name,
        device=made.choice.device,
        precision=made.choice.precision,
        cache=made.cache,
        init_head="a head" if isinstance(head, Head) else str(head) if head else None,
        resumed=bool(options.resume),
        run=folder,
    )


def _write_result(
    result: FinetuneResult, trainer: Trainer, made: Ingredients, save: Path | None
) -> None:
    """Write network, head and record into the folder of the run, and the network to ``save``."""
    state = trainer.network.checkpoint()
    for path in (result.checkpoint, *([save] if save else [])):
        save_weights(
            path,
            state,
            backbone=made.weights.backbone,
            preprocess=made.weights.preprocess,
            metadata={
                "method": result.method,
                "epoch": str(result.best_epoch),
                "dataset": made.facts["dataset"],
            },
        )
    ingredients = {
        **computed_by(made.choice, load_weights(result.checkpoint, made.backbone)),
        "cuts": ["avgpool" if made.weights.network is None else POOLED],
        "dataset_digest": made.facts["dataset_digest"],
        "dtype": "float32",
        "format_version": FORMAT_VERSION,
        "views": ["identity"],
        "weights": result.checkpoint.name,
    }
    head = Head(
        *trainer.network.head_arrays(),
        made.class_names,
        fingerprint(ingredients),
        "none",
        ingredients,
    )
    save_head(result.run / "head.safetensors", head, {"method": result.method})
    record = {"run": result.run.name, "n_epochs": len(result.epochs), **made.facts}
    save_run(result.run, {"kind": "finetune", **asdict(result), **record})
