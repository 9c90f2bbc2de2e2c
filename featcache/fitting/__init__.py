"""From a data set and a target to a model: the probe first, fine-tuning where it is not enough.

Everything is decided on a validation split of the training images, the same for all
that is tried; the test split is read when an option is done, and decides nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backbone import get_backbone
from ..datasets import Dataset, Split, load_dataset
from ..errors import RecipeError
from ..extraction import ExtractResult, extract
from ..finetuning import FinetuneResult, finetune
from ..metrics import top1, wilson_interval
from ..probes import Head, feature_ingredients, save_head
from ..probing import ProbeResult, probe
from ..progress import OnNote, OnProgress, silent
from ..recipe import FINETUNE_RECIPES
from ..runs import new_run, runs_folder
from ..sampling import validation_rows
from ..solving import Job
from ..store import Cache
from ._climb import Attempt, Option, Outcome, best_of, climb

__all__ = ["Attempt", "FitResult", "Outcome", "fit"]

FREEZE = "layer3"
# From a probe's head on, gentle steps: at the tutorial's rates, or with BatchNorm's statistics
# moving, the first epochs undo what the probe found (Kumar et al., ICLR 2022, have the reason).
GENTLY = {"lr": 1e-4, "bn": "eval", "schedule": "cosine", "patience": 2}
_TIMED_IMAGES = 192  # three of the tutorial's batches: some seconds
# A forward pass alone against one with its gradients: 80 and 30 images per second at 64 px.
_EVALUATION_SPEED = 2.5
_DISK_SHARE = 0.5  # of the free space, that a cache of feature maps may take


@dataclass(frozen=True)
class FitResult:
    """What was tried, and what came out of it.

    Parameters
    ----------
    target : float
        As asked for.
    reached : bool
        Whether the winner's accuracy on the validation split is at least the target.
    winner : str
        The attempt with the best accuracy on the validation split.
    val_top1 : float
        That accuracy.
    top1 : float
        The winner's accuracy on the test split.
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval of it.
    n_train, n_val, n_test : int
        Images; the validation split is a part of the training images.
    head : Path
        The model: what `featcache.predict` takes. A fine-tuned network lies beside its head.
    attempts : tuple of Attempt
        Everything that was considered, the probe first, then by cost.
    next_step : str
        What could still be tried, and what it would cost; empty where nothing is left.
    wall_s : float
        All in all.
    """

    target: float
    reached: bool
    winner: str
    val_top1: float
    top1: float
    top1_interval: tuple[float, float]
    n_train: int
    n_val: int
    n_test: int
    head: Path
    attempts: tuple[Attempt, ...]
    next_step: str
    wall_s: float


def fit(
    dataset: str | Path | Dataset = "cifar10",
    target: float = 0.9,
    *,
    budget_s: float | None = None,
    backbone: str = "resnet18",
    weights: str | Path = "imagenet",
    size: int | None = None,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "f32",
    epochs: int | None = None,
    seed: int = 0,
    data_root: str | Path | None = None,
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> FitResult:
    """Reach an accuracy at the least cost.

    Extracts features (or reuses a cache) and probes them. Where the target is missed,
    what each fine-tune would cost here is estimated from a few timed steps, and they are
    tried by cost: the last stage from a cache of the cut before it, then the whole
    network at split rates, then at one rate; each begins with the probe's head.

    Parameters
    ----------
    dataset, backbone, weights, size, engine, device, precision, data_root
        As in `featcache.extract`.
    target : float
        Accuracy on the validation split, above 0 and at most 1.
    budget_s : float, optional
        Seconds that everything may take. What is expected to go beyond is not begun; what
        is begun is finished.
    epochs : int, optional
        Of each fine-tune; the tutorial's 3 by default.
    seed : int
        Of every draw.
    runs : str or Path, optional
        Folder for records and models; ``cache/runs`` by default.
    on_progress, on_note : callable
        Hear of the work, and of each decision with its reason.

    Returns
    -------
    FitResult

    Raises
    ------
    RecipeError
        A target outside 0 to 1, or a budget that is not positive.
    FeatcacheError
        As `featcache.extract`, `featcache.probe` and `featcache.finetune`.
    """
    started = time.monotonic()
    if not 0 < target <= 1:
        raise RecipeError(f"target: expected a fraction above 0 and up to 1, found {target}")
    if budget_s is not None and not budget_s > 0:
        raise RecipeError(f"budget: expected seconds above 0, found {budget_s}")
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset, data_root=data_root, on_progress=on_progress)
    made: dict[str, Any] = {"backbone": backbone, "weights": weights, "size": size}
    extracting = {**made, "engine": engine, "device": device, "precision": precision}
    heard: dict[str, Any] = {"on_progress": on_progress, "on_note": on_note}
    extracted = extract(dataset, **extracting, **heard)
    cache = extracted.load()
    recipe = FINETUNE_RECIPES["split"]
    # What a fine-tune holds out too, so that all are measured on the same images.
    held = validation_rows(dataset.train.labels, recipe.val_fraction, seed)
    work = _Work(dataset, cache, held, seed, runs_folder(runs), on_progress)
    outcome = work.probe()
    probe_s = time.monotonic() - started
    first = Attempt("probe", "done", "the cheapest of all", probe_s, probe_s, outcome)
    on_note(f"probe: {100 * outcome.val_top1:.2f} % on {len(held):,} validation images")
    options: list[Option] = []
    if outcome.val_top1 < target:
        training: dict[str, Any] = {
            **made,
            "device": device,
            "epochs": epochs or recipe.epochs,
        }
        options = work.options(outcome.head, extracted, extracting, training)

    def told(attempt: Attempt) -> None:
        found = f"{100 * attempt.outcome.val_top1:.2f} %: " if attempt.outcome else ""
        on_note(f"{attempt.name}: {attempt.status}, {found}{attempt.why}")

    spent_s = time.monotonic() - started
    attempts = climb(first, options, target, budget_s, spent_s, on_attempt=told)
    winner = best_of(attempts)
    won = winner.outcome
    assert won is not None
    test_top1, model = won.top1, won.head
    if test_top1 is None:
        refitted = work.refit()
        test_top1, model = refitted.top1, refitted.head
    left = [attempt for attempt in attempts if attempt.status == "over budget"]
    return FitResult(
        target=target,
        reached=won.val_top1 >= target,
        winner=winner.name,
        val_top1=won.val_top1,
        top1=test_top1,
        top1_interval=wilson_interval(test_top1, len(dataset.test)),
        n_train=len(dataset.train),
        n_val=len(held),
        n_test=len(dataset.test),
        head=model,
        attempts=tuple(attempts),
        next_step=f"{left[0].name}, about {left[0].estimated_s:,.0f} s" if left else "",
        wall_s=time.monotonic() - started,
    )


class _Work:
    """What the options share: the data, its validation split, and how each is done."""

    def __init__(
        self,
        dataset: Dataset,
        cache: Cache,
        held: np.ndarray,
        seed: int,
        runs: Path,
        on_progress: OnProgress,
    ) -> None:
        self._dataset = dataset
        self._cache = cache
        self._held = held
        self._seed = seed
        self._runs = runs
        self._on_progress = on_progress

    def probe(self) -> Outcome:
        """Fit the head to all but the validation split, and measure it there."""
        features = np.asarray(self._cache.train.features, np.float32)
        labels = self._cache.train.labels
        fitted = np.delete(np.arange(len(labels)), self._held)
        n_classes = len(self._cache.class_names)
        job = Job.of()
        views = [features[fitted]]
        more = (views, labels[fitted], n_classes, self._seed, self._on_progress)
        job, _ = job.with_penalty(*more)
        solution = job.train(*more)
        head = Head(
            solution.weight,
            solution.bias,
            self._cache.class_names,
            self._cache.fingerprint,
            "none",
            feature_ingredients(self._cache.meta),
        )
        run = new_run(self._runs, "fit-probe")
        path = run / "head.safetensors"
        save_head(path, head, {"solver": job.solver, "seed": self._seed})
        accuracy = top1(head.predict(features[self._held]), labels[self._held])
        return Outcome(accuracy, None, path, run)

    def refit(self) -> ProbeResult:
        """Fit the head to all training images, now that it won; read the test split."""
        return probe(self._cache, seed=self._seed, runs=self._runs, on_progress=self._on_progress)

    def options(
        self,
        head: Path,
        extracted: ExtractResult,
        extracting: dict[str, Any],
        training: dict[str, Any],
    ) -> list[Option]:
        """Time a few steps of each kind; return what can be tried and its expected cost."""
        n_train = len(self._dataset.train) - len(self._held)
        n_seen = training["epochs"] * (n_train + len(self._held) / _EVALUATION_SPEED)
        n_seen += len(self._dataset.test) / _EVALUATION_SPEED
        common = {**training, **GENTLY, "init_head": head, "seed": self._seed}
        cutting = {**extracting, "cut": FREEZE, "views": "flips"}
        rates = self._rates(cutting, training)
        passes = 4 * len(self._dataset.train) + len(self._dataset.test)
        cut_s = passes / max(extracted.images_per_s, 1e-9) + n_seen / rates["cut"]

        def train_cut() -> FinetuneResult:
            maps = extract(self._dataset, **cutting, on_progress=self._on_progress)
            return self._finetune("split", cache=maps.cache, freeze_until=FREEZE, **common)

        whole_s = n_seen / rates["whole"]
        return [
            Option(
                f"layer4 from cached {FREEZE}",
                cut_s,
                lambda: self._outcome(train_cut()),
                self._obstacle(passes),
            ),
            Option("split", whole_s, lambda: self._outcome(self._finetune("split", **common))),
            Option("full", whole_s, lambda: self._outcome(self._finetune("full", **common))),
        ]

    def _obstacle(self, passes: int) -> str:
        """Say why the maps cannot be cached, if they cannot."""
        meta = self._cache.meta
        shape = get_backbone(meta["backbone"]).cut_shape(FREEZE, meta["preprocess"]["size"])
        wanted = passes * int(np.prod(shape)) * 4
        free = shutil.disk_usage(self._cache.path.parent).free
        if wanted <= _DISK_SHARE * free:
            return ""
        return (
            f"a cache of {FREEZE} would take {wanted / 1e9:,.1f} GB of the {free / 1e9:,.1f} GB "
            "that are free"
        )

    def _rates(self, cutting: dict[str, Any], training: dict[str, Any]) -> dict[str, float]:
        """Return images per second of a few steps: of the whole network, and above the cut."""
        part = self._part()
        with tempfile.TemporaryDirectory() as folder:
            timed = {**training, "epochs": 1, "runs": folder, "on_progress": self._on_progress}
            whole = finetune(part, "split", **timed)
            maps = extract(part, output=folder, **cutting)
            cut = finetune(part, "split", cache=maps.cache, freeze_until=FREEZE, **timed)
        return {"whole": whole.images_per_s, "cut": cut.images_per_s}

    def _part(self) -> Dataset:
        """Return a few images to time the steps on."""

        def some(split: Split, count: int) -> Split:
            drawn = np.random.default_rng(self._seed).permutation(len(split))[:count]
            return split.take(np.sort(drawn))

        count = max(_TIMED_IMAGES, len(self._dataset.class_names))
        train, test = some(self._dataset.train, count), some(self._dataset.test, 1)
        return Dataset(self._dataset.name, train, test, "a few images")

    def _finetune(self, method: str, **arguments: Any) -> FinetuneResult:
        return finetune(
            self._dataset,
            method,
            runs=self._runs,
            on_progress=self._on_progress,
            **arguments,
        )

    def _outcome(self, result: FinetuneResult) -> Outcome:
        val = result.epochs[result.best_epoch - 1].top1
        return Outcome(val, result.top1, result.run / "head.safetensors", result.run)
