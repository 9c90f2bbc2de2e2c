"""End-to-end training: full, split, frozen, scratch; or from a cached cut on.

``full``
    Train everything at one rate: the tutorial's method 1.
``split``
    The backbone at a tenth of the head's rate: its method 2.
``frozen``
    Train the head alone, on features computed anew for every batch: its method 3.
    Frozen means frozen: the backbone is in eval mode and without gradients, so
    that no parameter and no batch statistic moves. (The tutorial leaves it in
    train mode, where BatchNorm's running statistics drift.)
``scratch``
    Train everything from a random backbone.

Every epoch sets the mode it means; the tutorial's loop stays in eval mode after
its first evaluation. The test split is evaluated after each epoch and the last
epoch's accuracy is the result: nothing is ever chosen on it. With ``patience`` an epoch is
chosen, on a validation split of the training images, and the test split is read once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..datasets.dataset import Dataset
from ..files import user_path
from ..metrics import top1, wilson_interval
from ..probes.head import Head
from ..progress import OnNote, OnProgress, silent
from ..runs import runs_folder
from .folder import RunFolder, find_resumable, shared_folder, shared_state
from .framework import get_framework
from .ingredients import Ingredients, Request, gather
from .joining import check_alike, joined, take_gpu
from .ranks import Ranks
from .recipes import finetune_recipe
from .run import EventLog, FinetuneResult, Run, check_tensorboard, ctrl_c_noted
from .saving import check_place, save_network, write_result
from .trainer import Trainer


def finetune(
    dataset: str | Path | Dataset | None = None,
    method: str = "split",
    *,
    backbone: str | None = None,
    weights: str | Path | None = None,
    size: int | None = None,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "f32",
    cache: str | Path | None = None,
    init_head: str | Path | Head | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    backbone_lr: float | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    resume: str | Path | bool = False,
    save: str | Path | None = None,
    tensorboard: bool = False,
    data_root: str | Path | None = None,
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
    **changes: Any,
) -> FinetuneResult:
    """Train a network end to end, or above a cached cut, on a data set.

    Started by ``torchrun`` or ``oneflow.distributed.launch``, several processes do one run: each
    takes its part of every batch, losses and result are those of one process to rounding, and
    rank 0 alone writes and reports. All of them return the result.

    Parameters
    ----------
    dataset : str, Path or Dataset, optional
        As `featcache.load_dataset` takes it; by default ``"cifar10"``, or what ``cache`` was
        made of.
    method : str
        ``"full"``, ``"split"``, ``"frozen"`` or ``"scratch"``.
    backbone, weights, size, data_root
        As in `featcache.extract`; with ``cache`` its own by default. ``"scratch"`` takes the
        size alone from the weights.
    engine : str
        What trains: ``"oneflow"``, ``"torch"``, or ``"auto"``: OneFlow where it is installed
        and can use the device, unless PyTorch can use a GPU that OneFlow cannot; else PyTorch.
    device : str
        ``"cpu"``, ``"cuda"``, ``"mps"`` (PyTorch's alone), or ``"auto"``: the best that the
        engine can use here.
    precision : str
        What convolutions and products compute in: ``"f32"``; with PyTorch ``"bf16"``; on a
        GPU ``"f16"``. Everything else stays float32.
    cache : str or Path, optional
        Features to train on in place of images: a cache of the cut that ``freeze_until``
        names (``"avgpool"`` for method frozen), with the flip views that the augmentation
        draws from. The run sees what a run on the images would have seen, in the same order.
    init_head : str, Path or Head, optional
        Begin with this probe's head (LP-FT).
    epochs, batch_size : int, optional
        Replace the recipe's 3 and 64.
    lr : float, optional
        Of the head; the backbone's keeps its proportion to it.
    backbone_lr : float, optional
        Of the backbone.
    train_limit, test_limit : int, optional
        Use a stratified draw of so many images (seed 0, whatever ``seed`` is).
    seed : int
        Of every draw of the training.
    resume : str, Path or bool
        Go on with a run that was stopped: its folder, or True for the newest unfinished one
        of this method. Everything else must be as it was.
    save : str or Path, optional
        A ``.safetensors`` file for the network besides the run's own.
    tensorboard : bool
        Write TensorBoard's event files into the run's folder too.
    runs : str or Path, optional
        Folder for checkpoint and record; ``cache/runs`` by default.
    on_progress : callable
        Hears of images, with the running loss.
    on_note : callable
        Hears what trains and why, of a checkpoint that could not be written, and of rounding
        differences.
    **changes
        Any other field of `FinetuneRecipe`: ``augment``, ``freeze_until``, ``bn``,
        ``layer_decay``, ``schedule``, ``warmup``, ``label_smoothing``, ``patience``,
        ``val_fraction``, ``momentum``, ``weight_decay``.

    Returns
    -------
    FinetuneResult

    Raises
    ------
    DatasetError, WeightsError, CacheError, EngineUnavailableError, RecipeError, OutputError
        An ingredient is missing or unfit, before the long work begins; WeightsError also
        for a checkpoint of another run; RecipeError also where the loss stopped being
        finite, with the step, the rates and the last good checkpoint.
    RankError
        Another process of the launcher found an error. Where one is killed, this process writes a
        line to standard error and exits, unless it can raise this.
    KeyboardInterrupt
        Ctrl-C; the state is saved, and the text says how to go on.
    """
    named = {"lr": lr, "backbone_lr": backbone_lr, "epochs": epochs, "batch_size": batch_size}
    with joined(engine) as (ranks, engine):
        recipe = ranks.agreed(lambda: finetune_recipe(method, **named, **changes))
        request = Request(
            dataset=dataset,
            method=method,
            recipe=recipe,
            backbone=backbone,
            weights=weights,
            size=size,
            engine=engine,
            device=device,
            precision=precision,
            cache=cache,
            init_head=init_head,
            train_limit=train_limit,
            test_limit=test_limit,
            seed=seed,
            data_root=data_root,
        )
        place = None if save is None else user_path(save)
        if not ranks.is_first:
            on_progress = on_note = silent
        return _trained(
            ranks, request, resume, place, tensorboard, runs_folder(runs), on_progress, on_note
        )


def _trained(
    ranks: Ranks,
    request: Request,
    resume: str | Path | bool,
    save: Path | None,
    tensorboard: bool,
    runs: Path,
    on_progress: OnProgress,
    on_note: OnNote,
) -> FinetuneResult:
    """Do what was asked for, by all ranks together; the first alone writes."""
    recipe, method = request.recipe, request.method

    def found_fit() -> tuple[Ingredients, Path | None]:
        if save is not None and ranks.is_first:
            check_place(save)
        if tensorboard:
            check_tensorboard()
        wanted = resume and ranks.is_first
        found = find_resumable(resume, runs, method) if wanted else None
        made = gather(request, ranks.size, on_progress, on_note)
        take_gpu(get_framework(made.choice.name), made.choice.device)
        return made, found

    made, found = ranks.agreed(found_fit)
    check_alike(ranks, made.identity)

    def own_folder() -> RunFolder:
        if found is None:
            return RunFolder.create(runs, method, made.identity, made.facts, on_note)
        return RunFolder(found, made.identity, on_note)

    folder = shared_folder(ranks, own_folder)
    state = shared_state(ranks, folder) if resume else None
    trainer = Trainer(
        made.weights,
        len(made.class_names),
        recipe,
        device=made.choice.device,
        precision=made.choice.precision,
        compiled=made.compiled,
        seed=request.seed,
        head=made.head,
        framework=get_framework(made.choice.name),
        ranks=ranks,
    )
    curve_split = "test" if made.val is None else "val"
    measured = made.test if made.val is None else made.val
    events = EventLog(folder.path) if tensorboard and ranks.is_first else None
    run = Run(trainer, recipe, folder, made.train, measured, curve_split, on_progress, events)
    with ctrl_c_noted(launched=ranks.size > 1) as stop:
        ranks.heed(stop, run.advice)
        if state is not None:
            run.go_on(*state)
            on_note(f"{folder.path}: going on after step {run.step} of {run.n_steps}")
            folder.note_processes(ranks.size)
        try:
            run.train()
        finally:
            if events is not None:
                events.close()
    result = _finished(trainer, run, made, request, folder, on_progress, resumed=state is not None)
    if ranks.is_first:
        write_result(result, trainer, made)
        if save is not None:
            save_network(save, trainer, made, result)
        folder.remove_checkpoint()
    return result


def _finished(
    trainer: Trainer,
    run: Run,
    made: Ingredients,
    request: Request,
    folder: RunFolder,
    on_progress: OnProgress,
    *,
    resumed: bool,
) -> FinetuneResult:
    """Measure what has to be measured still, and put the result together."""
    accuracy = run.curve[-1].top1
    if made.val is not None:
        accuracy = top1(trainer.predict(made.test, on_progress), made.test.labels)
    return FinetuneResult(
        method=request.method,
        top1=accuracy,
        top1_interval=wilson_interval(accuracy, len(made.test)),
        epochs=tuple(run.curve),
        curve_split="test" if made.val is None else "val",
        best_epoch=run.best_epoch,
        images_per_s=len(made.train) * len(run.curve) / run.trained_s,
        wall_s=run.wall_s,
        checkpoint=folder.path / "model.safetensors",
        n_train=len(made.train),
        n_val=0 if made.val is None else len(made.val),
        n_test=len(made.test),
        seed=request.seed,
        recipe=request.recipe,
        engine=made.choice.name,
        device=made.choice.device,
        precision=made.choice.precision,
        cache=made.cache,
        init_head=None if request.init_head is None else _name(request.init_head),
        resumed=resumed,
        run=folder.path,
    )


def _name(head: str | Path | Head) -> str:
    return "a head" if isinstance(head, Head) else str(head)
