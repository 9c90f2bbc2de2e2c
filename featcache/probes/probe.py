"""`featcache.probe`: choose a penalty, train a linear head, test it, check it, save it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheMismatchError, RecipeError
from ..files import check_writable, user_path
from ..metrics import METRICS, Evaluation, evaluate_scores, wilson_interval
from ..notebook import ShownAsTable
from ..options import check_choice, with_options
from ..progress import OnProgress, silent
from ..runs import cache_facts, new_run, runs_folder, save_predictions, save_run
from ..store.cache import Cache
from .blocks import Features, in_memory, loaded
from .cross_check import CheckResult, check_with_sklearn
from .folds import probe_in_folds
from .head import Head, save_head
from .ingredients import (
    class_differences,
    feature_differences,
    feature_ingredients,
    rounding_differences,
)
from .job import Job
from .labels_and_numbers import probe_targets
from .outcomes import outcomes_of_scores
from .question import Question, ask, cut_names, opened
from .recipes import PROBE_RECIPES, ExactRecipe, ProbeRecipe
from .scaling import SCALINGS, Scaling
from .sweep import Sweep, grid_of
from .weights import sample_weights, total_weight
from .zero_shot import Encode, ZeroShotResult, beside_probe, zero_shot_head

SOLVERS = ("lbfgs", "ridge", "sgd")
DEVICES = ("auto", "cpu", "cuda")
_OF_SGD = ("epochs", "batch_size", "lr", "momentum", "schedule")

# scikit-learn copies the features into one float32 array. Larger mapped features are not checked.
_CHECKED_BYTES = 2 << 30


@dataclass(frozen=True)
class ProbeOptions(Question):
    """Options of `probe`, which also takes each of them as a keyword argument.

    The options of `Question` say what is asked of which images.

    Parameters
    ----------
    solver : str, optional
        ``"lbfgs"``: the exact optimum of multinomial logistic regression, the default.
        ``"ridge"``: least squares on one-hot labels, in closed form. ``"sgd"``: stochastic
        gradient descent in OneFlow, the default where a recipe or one of its values is given.
    recipe : str or ProbeRecipe
        Only for SGD. ``"default"`` trains to the optimum, ``"tutorial"`` for the tutorial's 3
        epochs.
    epochs, batch_size, lr, momentum, schedule : optional
        Only for SGD: each replaces one value of the recipe. ``epochs`` trains for exactly that
        many.
    weight_decay, C : float, optional
        The penalty, as lambda or in scikit-learn's terms: C = 1 / (N * lambda).
    sweep : bool, optional
        Choose C on held-out training images: a stratified fifth, or each fifth in turn where it
        is less than 100 images. The default is to do so where no penalty is given, and never for
        SGD.
    grid : str or sequence of float, optional
        The values of C to choose from: numbers, or ``"1e-6:1e5:45"`` for so many from the first
        to the second at equal ratios. By default 20 from 1e-4 to 100, and those beyond as long as
        the score rises.
    tolerance : float, optional
        Only for lbfgs: stop when the objective is at most this fraction above its optimum; 1e-6
        by default.
    budget_s : float, optional
        Only for lbfgs on classes: seconds for sweep and training, after which the best head so far
        is taken. Passes over the features that have begun end first, and one more computes the
        objective. The penalty is chosen on a part of many images. scikit-learn does not check it.
    cut : str or sequence of str, optional
        Where the features were taken; several, also as ``"cls,mean"``, stand side by side. The
        cache's first cut by default.
    scale : str
        ``"none"``, ``"standardize"`` (by the training split) or ``"l2"``.
    metric : str
        What the sweep maximises: ``"top1"``, ``"balanced"`` or ``"f1"``.
    class_weight : "balanced" or mapping, optional
        How much each class counts in training: ``"balanced"`` gives every class the same total
        weight, a mapping from class names the weight of each image of a class.
    cv : int, optional
        Cross-validate with so many folds instead: all images of the cache, whatever their split,
        are tested once by a head that saw none of their fold, nor of their group.
    repeats : int
        Only for ``cv``: how many times the folds are drawn.
    test : str, Path or Cache, optional
        Another cache whose test split is used: same features, same classes.
    train_limit, test_limit : int, optional
        Use a stratified sample of this size, the same one as `featcache.finetune`.
    seed : int
        For the holdout; for SGD also for the order of images, the views and the initial head.
    device : str
        Only for SGD: ``"auto"`` takes a GPU that OneFlow can use; ``"cpu"``, ``"cuda"``.
    mmap : bool
        Leave the features on disk and read them in every pass, for a cache larger than memory.
        Their checksums are then not verified. Has no effect on a `Cache` that is already loaded.
    check : bool
        Fit scikit-learn to the same objective and compare. Mapped features of more than 2 GiB
        are not checked; a note says so.
    save_head_to : str or Path, optional
        Save the head to this file too, besides the run's own.
    zero_shot : array, mapping, str or Path, optional
        Test a head without training too: vectors (K, D), a row for each class, or a mapping from
        classes to vectors (D,) or (P, D), or a ``.npy`` or ``.npz`` file of these. Or a text file:
        on each line a class, a class with a prompt after a tab, or a template with ``{}`` for all.
    encode : callable, optional
        What makes vectors of the texts of ``zero_shot``: `featcache.text_features`.
    runs : str or Path, optional
        Folder for the record; ``cache/runs`` by default.

    Raises
    ------
    RecipeError
        An option out of range, an unknown name, or options that contradict each other.
    """

    solver: str | None = None
    recipe: str | ProbeRecipe = "default"
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float | None = None
    schedule: str | None = None
    weight_decay: float | None = None
    C: float | None = None
    sweep: bool | None = None
    grid: str | Sequence[float] | None = None
    tolerance: float | None = None
    budget_s: float | None = None
    cut: str | Sequence[str] | None = None
    scale: str = "none"
    metric: str = "top1"
    class_weight: str | Mapping[str, float] | None = None
    cv: int | None = None
    repeats: int = 1
    test: str | Path | Cache | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    seed: int = 0
    device: str = "auto"
    mmap: bool = False
    check: bool = True
    save_head_to: str | Path | None = None
    zero_shot: Any = None
    encode: Encode | None = None
    runs: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("metric", self.metric, METRICS)
        check_choice("scale", self.scale, SCALINGS)
        check_choice("device", self.device, DEVICES)
        if self.C is not None and not (math.isfinite(self.C) and self.C > 0):
            raise RecipeError(f"C: expected a positive number, found {self.C}")
        if self.C is not None and self.weight_decay is not None:
            raise RecipeError("penalty: expected C or the weight decay, found both; give one")
        self.job()
        self._check_folds()

    def _check_folds(self) -> None:
        """Refuse what cross-validation has no use for."""
        if self.repeats < 1 or (self.cv is not None and self.cv < 2):
            raise RecipeError(
                f"cv: expected 2 folds or more and 1 repeat or more, found {self.cv} and "
                f"{self.repeats}"
            )
        if self.cv is None:
            if self.repeats > 1:
                raise RecipeError(f"repeats: expected it with cv, found {self.repeats} alone")
            return
        given = {
            "sgd": self.job().solver == "sgd",
            "test": self.test is not None,
            "limit": self.train_limit is not None or self.test_limit is not None,
            "split_column": self.split_column is not None,
            "grid": self.grid is not None,
            "budget": self.budget_s is not None,
            "save_head_to": self.save_head_to is not None,
            "zero_shot": self.zero_shot is not None,
        }
        useless = [name for name, is_given in given.items() if is_given]
        if useless:
            raise RecipeError(
                f"cv: expected no {', '.join(useless)}, found it; lbfgs or ridge test every image, "
                "and --where chooses images"
            )

    def job(self) -> Job:
        """Return the solver with its hyperparameters; raise RecipeError if they do not fit."""
        given = {name: getattr(self, name) for name in _OF_SGD if getattr(self, name) is not None}
        for_sgd = self.recipe != "default" or bool(given)
        solver = self.solver or ("sgd" if for_sgd else "lbfgs")
        check_choice("solver", solver, SOLVERS)
        if solver != "sgd" and for_sgd:
            raise RecipeError(
                f"solver {solver}: expected no {', '.join(given).replace('_', ' ') or 'recipe'}, "
                "an option of SGD; leave it out, or use --solver sgd"
            )
        if solver != "sgd" and self.device == "cuda":
            raise RecipeError(
                f"device: expected auto or cpu with {solver}, found 'cuda'; use --solver sgd"
            )
        has_penalty = self.C is not None or self.weight_decay is not None
        if self.sweep and (has_penalty or solver == "sgd"):
            raise RecipeError(
                "sweep: expected lbfgs or ridge and no given penalty, found "
                f"{'a given penalty' if has_penalty else 'SGD'}; leave one of them out"
            )
        for name, value in (("tolerance", self.tolerance), ("budget", self.budget_s)):
            if value is not None and solver != "lbfgs":
                raise RecipeError(f"{name}: expected it with lbfgs, found {solver}; leave it out")
        if self.budget_s is not None and not 0 < self.budget_s < math.inf:
            raise RecipeError(f"budget: expected a positive number, found {self.budget_s}")
        recipe = _sgd_recipe(self.recipe, given) if solver == "sgd" else ExactRecipe()
        if self.tolerance is not None:
            recipe = replace(recipe, tolerance=self.tolerance)
        if self.weight_decay is not None:
            recipe = replace(recipe, weight_decay=self.weight_decay)
        sweep = solver != "sgd" and not has_penalty if self.sweep is None else self.sweep
        if self.grid is not None and not sweep:
            raise RecipeError(
                "grid: expected it with a sweep, found SGD, --no-sweep or a given penalty; leave "
                "one of them out"
            )
        grid = None if self.grid is None else grid_of(self.grid)
        return Job(solver, recipe, self.C, sweep, self.metric, self.device, self.seed, grid)


def _sgd_recipe(recipe: str | ProbeRecipe, changes: dict[str, Any]) -> ProbeRecipe:
    if isinstance(recipe, str):
        check_choice("recipe", recipe, PROBE_RECIPES)
        recipe = PROBE_RECIPES[recipe]
    if "epochs" in changes:
        # A given number of epochs is exact: no minimum of steps, no further rounds.
        recipe = replace(recipe, min_steps=0, tolerance=None)
    return replace(recipe, **changes)


@with_options(ProbeOptions)
def probe(
    cache: str | Path | Cache | None = None,
    *,
    options: ProbeOptions,
    on_progress: OnProgress = silent,
) -> Any:
    """Train a linear head on cached features, test it, and check it with scikit-learn.

    Images without a label are left out of training and testing, and counted. Images of a val split
    choose C and nothing else.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features; the newest cache by default.
    options : ProbeOptions
        Or its fields as keyword arguments, as in ``probe(cache, scale="l2", C=0.1)``.
    on_progress : callable
        Called with the progress of sweep and training.

    Returns
    -------
    ProbeResult, MultilabelResult, RegressionResult or CrossValidationResult
        Of classes, of several labels an image, of numbers, or with ``cv``.

    Raises
    ------
    CacheError
        No cache, a damaged one, features that are not finite, or a test cache with other
        features or classes.
    RecipeError
        As `ProbeOptions`.
    TableError
        No table, no such column, or a target, split or group that does not fit.
    DatasetError
        No labelled images, fewer than 2 classes with training images, a limit that leaves a
        class without images, or a class too small for a holdout.
    EngineUnavailableError
        SGD without OneFlow, or on a GPU that it cannot use.
    OutputError
        The head or the record cannot be written.
    """
    job = options.job()
    cuts = cut_names(options.cut)
    cache = opened(cache, mmap=options.mmap, cuts=cuts)
    if options.cv is not None:
        return probe_in_folds(cache, options, cuts, on_progress)
    ingredients = feature_ingredients(cache.meta)
    if cuts:
        ingredients["head_cuts"] = list(cuts)
    tested, notes = _test_cache(cache, options, ingredients, cuts)
    asked = ask(
        cache,
        options,
        views=cache.views,
        cuts=cuts,
        train_limit=options.train_limit,
        test_limit=options.test_limit,
        test_cache=None if options.test is None else tested,
    )
    notes += asked.notes
    train, val, test = asked.train, asked.val, asked.test
    untrained = None
    if options.zero_shot is not None:
        names = asked.only_classes("zero_shot").names
        untrained = zero_shot_head(options.zero_shot, options.encode, names, cache, ingredients)
    save_to = None if options.save_head_to is None else user_path(options.save_head_to)
    if save_to is not None:
        check_writable(save_to)
    run = new_run(runs_folder(options.runs), "probe")
    paths = [run / "head.safetensors", *([save_to] if save_to else [])]
    if options.budget_s is not None and asked.task != "classes":
        raise RecipeError(f"budget: expected it with classes, found {asked.task}; leave it out")
    may_check = options.check and options.budget_s is None and _fits_memory(train.views)
    if options.check and options.budget_s is not None:
        notes += ("not checked: scikit-learn has no budget",)
    elif options.check and not may_check:
        notes += ("not checked: scikit-learn would need a copy of the mapped features in memory",)
    if asked.task != "classes":
        return probe_targets(
            cache,
            asked,
            options,
            cuts=cuts,
            check=may_check,
            notes=notes,
            ingredients=ingredients,
            paths=paths,
            run=run,
            on_progress=on_progress,
        )
    labels, n_classes = train.labels, len(asked.names)
    weights = sample_weights(labels, n_classes, options.class_weight, train.weights, asked.names)
    scaling = Scaling(options.scale, train.views)
    views = [loaded(scaling.lazily(features)) for features in train.views]

    started = time.perf_counter()
    holdout = None
    if val is not None and job.sweep:
        holdout = loaded(scaling.lazily(val.views[0])), val.labels
    elif val is not None:
        notes += (f"the {len(val):,} val images are not used: no penalty was chosen on them",)
    job, swept = job.within(options.budget_s).with_penalty(
        views,
        labels,
        n_classes,
        on_progress,
        weights=weights,
        groups=train.groups,
        holdout=holdout,
    )
    swept_at = time.perf_counter()
    solution = job.train(views, labels, n_classes, on_progress, weights=weights)
    ended = time.perf_counter()
    wall_s = ended - started

    head = Head(
        *scaling.fold(solution.weight, solution.bias),
        asked.names,
        cache.fingerprint,
        "l2" if options.scale == "l2" else "none",
        ingredients,
    )
    scores = head.scores(test.views[0])
    check: CheckResult | None = None
    if may_check:
        check = check_with_sklearn(
            [np.asarray(features[:], np.float32) for features in views],
            labels,
            n_classes,
            scaling.apply(np.asarray(test.views[0][:], np.float32)),
            test.labels,
            job.recipe,
            head_objective=solution.objective,
            head_predicted=scores.argmax(axis=1),
            weights=weights,
            ridge=job.solver == "ridge",
        )
    evaluation = evaluate_scores(scores, test.labels, calibrated=job.solver != "ridge")
    provenance = {
        "solver": job.solver,
        "seed": options.seed,
        "scale": options.scale,
        "recipe": asdict(job.recipe),
        "top1": evaluation.top1,
    }
    for path in paths:
        save_head(path, head, provenance)
    zero_shot = None
    if untrained is not None:
        place = run / "zero-shot.safetensors"
        zero_shot = beside_probe(*untrained, test, scores.argmax(axis=1), place)
        save_head(place, untrained[0], {"solver": "zero-shot", "top1": zero_shot.top1})
    decay = job.recipe.weight_decay
    result = ProbeResult(
        top1=evaluation.top1,
        top1_interval=wilson_interval(evaluation.top1, len(test.labels)),
        n_train=len(labels),
        n_test=len(test.labels),
        n_unlabelled=asked.n_unlabelled,
        solver=job.solver,
        wall_s=wall_s,
        head=paths[-1],
        check=check,
        C=1 / (decay * total_weight(views, weights)),
        weight_decay=decay,
        scale=options.scale,
        sweep=swept,
        metric=options.metric,
        evaluation=evaluation,
        recipe=job.recipe,
        seed=options.seed,
        gap=solution.gap,
        epochs=solution.epochs,
        steps=solution.steps,
        converged=solution.converged,
        objective=solution.objective,
        gradient_norm=solution.gradient_norm,
        views=cache.views[: len(views)],
        cuts=cuts or cache.cuts[:1],
        cache=cache.path,
        test_cache=tested.path,
        notes=notes,
        run=run,
        n_val=0 if holdout is None else len(holdout[1]),
        fit_s=ended - swept_at,
        zero_shot=zero_shot,
        **asked.describes,
    )
    record = {
        "kind": "probe",
        "method": f"probe {result.solver}",
        **asdict(result),
        **cache_facts(cache),
        "class_names": list(asked.names),
        "question": options.record(),
        "class_weight": options.class_weight,
        "run": run.name,
        "n_epochs": result.epochs,
        "epochs": [],
        "images_per_s": result.n_train * result.epochs / wall_s,
    }
    columns = outcomes_of_scores(
        test.ids, test.labels, scores, asked.names, calibrated=job.solver != "ridge"
    )
    save_predictions(run, columns)
    save_run(run, record)
    return result


def _test_cache(
    cache: Cache, options: ProbeOptions, ingredients: Mapping[str, Any], cuts: Sequence[str]
) -> tuple[Cache, tuple[str, ...]]:
    """Return the cache to test on, and how its features differ by rounding."""
    if options.test is None:
        return cache, ()
    test = opened(options.test, mmap=options.mmap, cuts=cuts)
    differing = feature_differences(ingredients, test.meta, "training")
    if test.feature_dim != cache.feature_dim:
        differing.append(f"length: training {cache.feature_dim}, here {test.feature_dim}")
    differing += class_differences(cache.class_names, test.class_names, "training")
    if differing:
        raise CacheMismatchError(
            f"{test.path}: expected the features and classes of {cache.path}, found "
            f"{'; '.join(differing)}; extract the test images as the training images were"
        )
    rounding = rounding_differences(ingredients, test.meta, "training")
    return test, tuple(f"test features: {difference}" for difference in rounding)


def _fits_memory(views: Sequence[Features]) -> bool:
    """Return whether scikit-learn may copy the features: they are small, or in memory anyway."""
    n_bytes = sum(4 * features.shape[0] * features.shape[1] for features in views)
    return n_bytes <= _CHECKED_BYTES or all(in_memory(features) for features in views)


@dataclass(frozen=True)
class ProbeResult(ShownAsTable):
    """A linear head on cached features, and its accuracy.

    Parameters
    ----------
    top1 : float
        Accuracy on the test split, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    n_train, n_test : int
        Images, all of them labelled.
    n_unlabelled : int
        Images of both splits whose label is -1: left out of training and testing.
    solver : str
        ``"lbfgs"``, ``"ridge"`` or ``"sgd"``.
    wall_s : float
        Duration of sweep and training, without the check and reading the cache.
    head : Path
        Where the head was saved.
    check : CheckResult or None
        scikit-learn on the same features and objective; None where it was switched off, or
        would not fit into memory, which a note then says.
    C, weight_decay : float
        The penalty, in scikit-learn's terms and as lambda: C = 1 / (N * lambda).
    scale : str
        ``"none"``, ``"standardize"`` or ``"l2"``.
    sweep : Sweep or None
        How C was chosen; None where the penalty was given.
    metric : str
        What the sweep maximised: ``"top1"``, ``"balanced"`` or ``"f1"``.
    evaluation : Evaluation
        Accuracy by class, confusion matrix, calibration and more, on the test split.
    recipe : ProbeRecipe or ExactRecipe
        The hyperparameters used.
    seed, epochs, steps : int
        The seed, passes over the features, updates of the head.
    converged : bool or None
        Whether the recipe's tolerance was reached; None where it only sets a number of epochs.
    objective, gradient_norm : float
        Of the head, on the training features.
    views : tuple of str
        The flip views that it was trained on.
    cuts : tuple of str
        Where the features were taken, in the order in which they stand side by side.
    cache : Path
        The features.
    test_cache : Path
        The cache of the test split: the same one, unless ``test`` was given.
    notes : tuple of str
        Further remarks: a check left out, another engine behind the test features.
    run : Path
        Folder of the record and the head.
    n_val : int
        Images of the val split, which chose C and nothing else; 0 where none did.
    target : str or None
        The column asked; None for the cache's own labels.
    task : str
        ``"classes"``.
    split : str
        What decides on which side an image is: ``"given"`` by the data set, drawn from its
        ``"content"`` or its ``"group"``, or ``"column NAME"``.
    group, where : str or None
        The column whose images stay on one side, and the condition for an image.
    table : str or None
        The source of the columns.
    fit_s : float
        Duration of the fit that became the head: ``wall_s`` without the sweep.
    zero_shot : ZeroShotResult or None
        A head without training on the same images, where it was asked for.
    gap : float or None
        A bound on how far the objective is above its optimum; None where none is known.
    """

    top1: float
    top1_interval: tuple[float, float]
    n_train: int
    n_test: int
    n_unlabelled: int
    solver: str
    wall_s: float
    head: Path
    check: CheckResult | None
    C: float
    weight_decay: float
    scale: str
    sweep: Sweep | None
    metric: str
    evaluation: Evaluation
    recipe: ProbeRecipe | ExactRecipe
    seed: int
    epochs: int
    steps: int
    converged: bool | None
    objective: float
    gradient_norm: float
    views: tuple[str, ...]
    cuts: tuple[str, ...]
    cache: Path
    test_cache: Path
    notes: tuple[str, ...]
    run: Path
    n_val: int = 0
    target: str | None = None
    task: str = "classes"
    split: str = "given"
    group: str | None = None
    where: str | None = None
    table: str | None = None
    fit_s: float = 0.0
    zero_shot: ZeroShotResult | None = None
    gap: float | None = None
