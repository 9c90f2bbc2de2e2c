"""What a fit can try: how each is done, and what it is expected to cost here."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..backbone import get_backbone
from ..datasets import Dataset, Split
from ..extraction import ExtractResult, extract
from ..finetuning import FinetuneResult, finetune
from ..metrics import top1
from ..probes import Head, feature_ingredients
from ..probing import ProbeResult, probe
from ..progress import OnProgress
from ..solving import Job
from ..store import Cache
from ._climb import Option, Outcome

__all__ = ["Work"]

FREEZE = "layer3"
# From a probe's head on, gentle steps: at the tutorial's rates, or with BatchNorm's statistics
# moving, the first epochs undo what the probe found (Kumar et al., ICLR 2022, have the reason).
GENTLY = {"lr": 1e-4, "bn": "eval", "schedule": "cosine", "patience": 2}
_TIMED_IMAGES = 192  # three of the tutorial's batches: some seconds
# A forward pass alone against one with its gradients: 80 and 30 images per second at 64 px.
_EVALUATION_SPEED = 2.5
_DISK_SHARE = 0.5  # of the free space, that a cache of feature maps may take


class Work:
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

    def probe(self) -> tuple[Head, Outcome]:
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
        return head, Outcome(top1(head.predict(features[self._held]), labels[self._held]))

    def refit(self) -> ProbeResult:
        """Fit the head to all training images, now that it won; read the test split."""
        return probe(self._cache, seed=self._seed, runs=self._runs, on_progress=self._on_progress)

    def options(
        self,
        head: Head,
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
        try:
            return finetune(
                self._dataset,
                method,
                runs=self._runs,
                on_progress=self._on_progress,
                **arguments,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # what it says of --resume holds for finetune alone

    def _outcome(self, result: FinetuneResult) -> Outcome:
        val = result.epochs[result.best_epoch - 1].top1
        return Outcome(val, result.top1, result.run / "head.safetensors", result.run)
