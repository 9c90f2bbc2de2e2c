"""`featcache.survey`: the same questions to several backbones, on the same images."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CacheMismatchError, FeatcacheError, RecipeError
from .extraction.extract import extract
from .extraction.options import ExtractOptions
from .metrics import PairedTest
from .notebook import Rows, ShownAsTable
from .options import with_options
from .probes.curves import check_shots, few_shot
from .probes.knn import knn
from .probes.probe import probe
from .probes.question import Asked, Question, ask, class_counts, opened
from .progress import OnNote, OnProgress, silent
from .runs import (
    cache_facts,
    compared_hits,
    hits_of,
    load_runs,
    new_run,
    runs_folder,
    save_run,
)
from .store.cache import Cache, cache_paths, load
from .version import __version__

Hits = dict[tuple[str, str], bool]  # whether a head is right, by id and label of the test image

OWN = "own"  # weights: those that a backbone has by default
SIGNIFICANT = 0.05  # p values below it
_OF_EXTRACTION = (
    *("engine", "device", "precision", "train_limit", "test_limit", "data_root", "output"),
)


@dataclass(frozen=True)
class SurveyOptions(Question):
    """Options of `survey`, which describes them."""

    backbones: Sequence[str] = ()
    weights: Sequence[str | Path] = ()
    size: Sequence[int] = ()
    caches: Sequence[str | Path | Cache] = ()
    concat: bool = False
    scale: str = "none"
    k: int = 20
    shots: Sequence[int] = (1, 5, 25)
    seeds: int = 5
    engine: str = "auto"
    device: str = "auto"
    precision: str = "f32"
    train_limit: int | None = None
    test_limit: int | None = None
    data_root: str | Path | None = None
    output: str | Path | None = None
    runs: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots:
            check_shots(self.shots)
        if self.k < 1:
            raise RecipeError(f"k: expected at least 1, found {self.k}")
        if len(self.backbones) + len(self.caches) < 2:
            raise RecipeError(
                "survey: expected two backbones or more, found "
                f"{len(self.backbones) + len(self.caches)}; give --backbone or --cache again"
            )
        self.extractions()

    def extractions(self) -> list[ExtractOptions]:
        """Return how the features of each backbone are made."""
        each: dict[str, Sequence[Any]] = {"weights": self.weights, "size": self.size}
        for name, values in each.items():
            if len(values) not in (0, 1, len(self.backbones)):
                raise RecipeError(
                    f"{name}: expected one for all backbones or one for each of "
                    f"{len(self.backbones)}, found {len(values)}"
                )
            every = values if len(values) > 1 else len(self.backbones) * (*values, None)[:1]
            each[name] = [None if value == OWN else value for value in every]
        shared = {name: getattr(self, name) for name in _OF_EXTRACTION}
        return [
            ExtractOptions(backbone=backbone, weights=weights, size=size, **shared)
            for backbone, weights, size in zip(self.backbones, *each.values(), strict=True)
        ]

    def question(self) -> dict[str, Any]:
        """Return the options of the question alone."""
        return {field.name: getattr(self, field.name) for field in fields(Question)}


@with_options(SurveyOptions)
def survey(
    dataset: str | Path | None = None,
    *,
    options: SurveyOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> SurveyResult:
    """Ask several backbones the same questions on the same images, and compare them in pairs.

    Features that are missing are extracted. A linear head, a vote of neighbours and heads on a few
    images of every class answer for each backbone. The heads are compared by which test images
    they classify correctly: a paired test finds smaller differences than intervals that may
    overlap. Each answer is kept as soon as it is there; the same call takes up an interrupted
    survey, and a later one asks nothing twice.

    Parameters
    ----------
    dataset : str or Path, optional
        As `featcache.load_dataset` takes it; not needed where only caches are compared.
    backbones : sequence of str
        As `featcache.extract` takes them.
    weights, size : sequence, optional
        One for all backbones, or one for each in their order; ``"own"`` stands for the weights
        that a backbone has by default.
    caches : sequence of str, Path or Cache
        Features that are there already, of the same images; imported ones too.
    concat : bool
        Whether to ask every pair too: the features of an image side by side, in memory. Each half
        is standardised by its training images, and both count the same in a distance.
    scale : str
        Of the features for the linear head, as in `featcache.probe`.
    k : int
        Neighbours; at most the number of training images are taken.
    shots : sequence of int
        Images of every class for the few-shot heads; numbers that a class lacks are left out.
    seeds : int
        Draws of each number of shots.
    engine, device, precision, train_limit, test_limit, data_root, output
        As in `featcache.extract`.
    target, task, separator, labels, by, split_column, group, where, weight_column
        As in `Question`; the target must be classes.
    runs : str or Path, optional
        Folder for the records; ``cache/runs`` by default.
    on_progress : callable
        Called with the progress of each part.
    on_note : callable
        Called with one-line notes, such as on a backbone that is left out because it cannot run
        here.

    Returns
    -------
    SurveyResult

    Raises
    ------
    FeatcacheError
        As `featcache.extract` and `featcache.probe`; where no backbone is left; where caches are
        of other test images.
    RecipeError
        An option out of range, fewer than two backbones, or a target that is no classes.
    """
    if options.backbones and dataset is None:
        raise RecipeError("survey: expected the data set of these backbones, found none; name it")
    notes: list[str] = []

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)
            on_note(text)

    def extracted(how: ExtractOptions) -> Cache:
        assert dataset is not None
        made = extract(dataset, options=how, on_progress=on_progress, on_note=on_note)
        return opened(made.load())

    work = _Work(options, on_progress, note)
    sources: list[Callable[[], Cache]] = [
        *(lambda how=how: extracted(how) for how in options.extractions()),
        *(lambda cache=cache: opened(cache) for cache in options.caches),
    ]
    names = [*options.backbones, *map(str, options.caches)]
    left_out: FeatcacheError | None = None
    seen: dict[str, Path] = {}  # fingerprints; the features themselves need not stay in memory
    for name, source in zip(names, sources, strict=True):
        try:
            cache = source()
        except FeatcacheError as error:  # one of many never stops the rest
            left_out = error
            note(f"warning: {name} is left out: {error}")
            continue
        if cache.fingerprint in seen:
            note(f"{name} is left out: it has the features of another one")
            continue
        seen[cache.fingerprint] = cache.path
        work.add(cache)
    if left_out is not None and not seen:
        raise left_out
    if options.concat:
        for first, second in combinations(seen.values(), 2):
            work.add(joined(opened(first), opened(second)))
    return work.result(notes)


class _Work:
    """One survey in the making: every answer is written as soon as it is there."""

    def __init__(self, options: SurveyOptions, on_progress: OnProgress, on_note: OnNote) -> None:
        self._options = options
        self._on_progress = on_progress
        self._on_note = on_note
        self._folder = runs_folder(options.runs)
        self._run = new_run(self._folder, "survey")
        self._started = time.perf_counter()
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self._known: dict[str, list[dict[str, Any]]] = {}
        for record in load_runs(self._folder)[0]:
            if record["kind"] == "survey":
                self._known.update(record["answers"])
        self._n_reused = 0
        self._asked: list[tuple[Surveyed, Hits]] = []
        self._facts: dict[str, Any] = {}
        self._describes: dict[str, Any] = {}

    def add(self, cache: Cache) -> None:
        """Ask a cache everything, and keep the row."""
        options, question = self._options, self._options.question()
        asked = ask(cache, Question(**question)).only_classes("survey")
        about = _digest(cache, asked)
        more: dict[str, Any] = {"runs": options.runs, "on_progress": self._on_progress, **question}
        if not self._facts:
            self._facts = {
                **{name: cache_facts(cache)[name] for name in ("dataset", "dataset_digest")},
                **{"n_train": len(asked.train), "n_test": len(asked.test)},
            }
            self._describes = asked.describes

        def of_head() -> list[Answer]:
            made = probe(cache, scale=options.scale, check=False, **more)
            return [Answer(made.top1, made.top1_interval, made.wall_s, run=made.run.name)]

        def of_neighbours() -> list[Answer]:
            (made,) = knn(cache, ks=[k], **{**more, "weight_column": None})
            return [Answer(made.top1, made.top1_interval, made.wall_s, k=k)]

        def of_few() -> list[Answer]:
            made = few_shot(cache, shots=shots, seeds=options.seeds, **more)
            return [Answer(one.mean, one.interval, one.wall_s, shots=one.shots) for one in made]

        hits: Hits = {}

        def has_hits(answers: Sequence[Answer]) -> bool:
            try:
                hits.update(hits_of(self._folder / Path(str(answers[0].run)).name))
            except FeatcacheError:  # the run's folder was removed or is damaged
                return False
            return True

        (head,) = self._answer([about, "probe", options.scale], 1, of_head, has_hits)
        self._check_images(cache, hits)
        k = min(options.k, len(asked.train))
        (votes,) = self._answer([about, "k-NN", k], 1, of_neighbours)
        scarcest = int(class_counts(cache, asked.train.labels, len(asked.names)).min())
        shots = [count for count in options.shots if count <= scarcest]
        if len(shots) < len(options.shots):
            self._on_note(f"shots: a class has {scarcest:,} training images; more are left out")
        few: list[Answer] = []
        if shots:
            few = self._answer([about, "few-shot", shots, options.seeds], len(shots), of_few)
        dim = int(asked.train.views[0].shape[1])
        row = Surveyed(
            name=_name(cache, [other.name for other, _ in self._asked]),
            cache=cache.path,
            fingerprint=cache.fingerprint,
            feature_dim=dim,
            bytes_per_image=dim * cache.train.features.dtype.itemsize,
            images_per_s=_rate(cache),
            engine=cache.meta["engine"],
            device=cache.meta["device"],
            probe=head,
            knn=votes,
            few_shot=tuple(few),
            vs_best=None,
        )
        self._asked.append((row, hits))
        self._save()

    def _answer(
        self,
        question: Sequence[Any],
        n: int,
        make: Callable[[], list[Answer]],
        is_usable: Callable[[Sequence[Answer]], bool] = bool,
    ) -> list[Answer]:
        """Return the n answers that an earlier survey kept, or make and keep them."""
        key = hashlib.sha256(json.dumps([__version__, *question]).encode()).hexdigest()
        known = [_as_answer(one) for one in self._known.get(key, ())]
        if len(known) == n and is_usable(known):
            self._n_reused += 1
        else:
            known = make()
            is_usable(known)
        self._answers[key] = self._known[key] = [asdict(one) for one in known]
        self._save()
        return known

    def _check_images(self, cache: Cache, hits: Hits) -> None:
        first, of_first = self._asked[0] if self._asked else (None, hits)
        if first is not None and hits.keys() != of_first.keys():
            raise CacheMismatchError(
                f"{cache.path}: expected the {len(of_first):,} test images of {first.cache} with "
                f"the same labels, found {len(hits.keys() & of_first.keys()):,} of them; compare "
                "caches of the same images"
            )

    def rows(self) -> list[Surveyed]:
        """Return the rows by accuracy, each compared with the best."""
        ordered = sorted(self._asked, key=lambda one: -one[0].probe.top1)
        return [
            row if number == 0 else replace(row, vs_best=compared_hits(ordered[0][1], hits))
            for number, (row, hits) in enumerate(ordered)
        ]

    def _save(self) -> None:
        rows, options = self.rows(), self._options
        record = {
            "kind": "survey",
            "method": "survey",
            **self._facts,
            **self._describes,
            "weights": ", ".join(row.name for row in rows),
            "size": 0,
            "wall_s": time.perf_counter() - self._started,
            "scale": options.scale,
            "seeds": options.seeds,
            "question": options.record(),
            "rows": [asdict(row) for row in rows],
            "answers": self._answers,
        }
        save_run(self._run, record)

    def result(self, notes: Sequence[str]) -> SurveyResult:
        """Return everything, with the best and the cheapest that is not significantly worse."""
        rows = self.rows()
        near = [row for row in rows if not row.is_worse]
        return SurveyResult(
            rows=Rows(rows),
            best=rows[0].name,
            cheapest=min(near, key=lambda row: row.cost).name,
            n_reused=self._n_reused,
            wall_s=time.perf_counter() - self._started,
            run=self._run,
            notes=tuple(notes),
            question=self._describes,
            **self._facts,
        )


def _as_answer(kept: Mapping[str, Any]) -> Answer:
    low, high = kept["interval"]
    more = {name: kept.get(name) for name in ("k", "shots", "run")}
    return Answer(kept["top1"], (low, high), kept["wall_s"], **more)


def _digest(cache: Cache, asked: Asked) -> str:
    """Return SHA-256 (hex) of the features, and of which images are asked what on which side."""
    digest = hashlib.sha256(cache.fingerprint.encode())
    digest.update(json.dumps(asked.names).encode())
    for part in (asked.train, asked.val, asked.test):
        arrays = () if part is None else (part.rows, part.labels, part.groups, part.weights)
        for array in arrays:
            digest.update(b"none" if array is None else array.tobytes())
        digest.update(b"end")
    return digest.hexdigest()


def _rate(cache: Cache) -> float | None:
    """Return images per second: where all rows were reused, those of a cache beside it."""
    folder = cache.path.parent
    others = (path for path in cache_paths(folder) if path != cache.path)
    metas = chain([cache.meta], _metas(others) if "joined" not in cache.meta else ())
    same = ("backbone", "weights_sha256", "preprocess", "engine", "device", "precision")
    for meta in metas:
        if all(meta.get(name) == cache.meta.get(name) for name in same) and (
            rate := meta.get("images_per_s")
        ):
            return float(rate)
    return None


def _metas(paths: Iterable[Path]) -> Iterator[Mapping[str, Any]]:
    for path in paths:
        with suppress(FeatcacheError):  # one damaged cache among many
            yield load(path).meta


def _name(cache: Cache, taken: Sequence[str]) -> str:
    """Return the backbone, its weights and the side of its input in pixels."""
    meta = cache.meta
    if "joined" in meta:
        return str(meta["joined"])
    module, colon, function = meta["backbone"].rpartition(":")
    short = module.rpartition(".")[2] + colon + function  # of a function, without its packages
    words = [short, meta.get("weights", "")]
    size = meta["preprocess"].get("size")
    name = " ".join(word for word in words if word not in ("", "pretrained", "unnamed"))
    name += f" {size} px" if size else ""
    return f"{name} {cache.fingerprint[:8]}" if name in taken else name


def joined(first: Cache, second: Cache) -> Cache:
    """Return the features of two caches side by side, float32, in memory.

    Each is standardised by its training images, and scaled so that both count the same in a
    distance.

    Raises
    ------
    CacheMismatchError
        The caches are not of the same images.
    """
    both = copy(first)
    both.attached_table = first.attached_table
    both.path = Path(f"{first.path} + {second.path.name}")
    total = first.feature_dim + second.feature_dim
    scales = []
    for cache in (first, second):
        features = cache.train.features
        mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        std = features.std(axis=0, dtype=np.float64).astype(np.float32)
        width = np.sqrt(np.float32(total / 2 / cache.feature_dim))
        scales.append((mean, width / np.where(std > 0, std, 1)))
    for (role, one), (_, other) in zip(first.splits(), second.splits(), strict=True):
        place = {name: row for row, name in enumerate(other.ids)}
        if place.keys() != set(one.ids):
            raise CacheMismatchError(
                f"{second.path}: expected the {len(one):,} images of {first.path} in {role}, found "
                f"others; leave out --concat"
            )
        order = np.fromiter((place[name] for name in one.ids), np.int64, len(one))
        split = copy(one)
        split.features = np.concatenate(
            [
                (features - mean) * scale
                for features, (mean, scale) in zip(
                    (one.features, other.features[order]), scales, strict=True
                )
            ],
            axis=1,
        )
        setattr(both, role, split)
    rates = [_rate(cache) for cache in (first, second)]
    both.meta = {
        **first.meta,
        **{
            name: f"{first.meta.get(name)} + {second.meta.get(name)}"
            for name in ("backbone", "weights", "weights_sha256")
        },
        "joined": f"{_name(first, ())} + {_name(second, ())}",
        "views": ["identity"],
        "wall_s": sum(cache.meta.get("wall_s") or 0.0 for cache in (first, second)),
        "images_per_s": 1 / sum(1 / rate for rate in rates if rate) if all(rates) else 0.0,
    }
    prints = f"{first.fingerprint} {second.fingerprint} side by side"
    both.fingerprint = hashlib.sha256(prints.encode()).hexdigest()
    return both


@dataclass(frozen=True)
class Answer(ShownAsTable):
    """One answer about the test images.

    Parameters
    ----------
    top1 : float
        In [0, 1]; of few-shot heads the mean over draws.
    interval : tuple of 2 floats
        95 %: Wilson's, of few-shot heads Student's over draws.
    wall_s : float
        Duration, without extraction.
    k, shots : int or None
        Neighbours; images of every class.
    run : str or None
        Name of the linear head's run.
    """

    top1: float
    interval: tuple[float, float]
    wall_s: float
    k: int | None = None
    shots: int | None = None
    run: str | None = None


@dataclass(frozen=True)
class Surveyed(ShownAsTable):
    """What a survey found out about one backbone, or about two side by side.

    Parameters
    ----------
    name : str
        Backbone, weights and pixels.
    cache : Path
        The features.
    fingerprint : str
        SHA-256 (hex) of everything that changes a feature.
    feature_dim, bytes_per_image : int
        Length of a feature, and what it takes in the cache.
    images_per_s : float or None
        Of the extraction, on the engine and device that made the cache; None where unknown, which
        counts as the slowest.
    engine, device : str
        What ran the backbone.
    probe, knn : Answer
        Of the linear head and the vote of neighbours.
    few_shot : tuple of Answer
        By increasing number of images of every class.
    vs_best : PairedTest or None
        The best head against this one on each test image; None for the best.
    """

    name: str
    cache: Path
    fingerprint: str
    feature_dim: int
    bytes_per_image: int
    images_per_s: float | None
    engine: str
    device: str
    probe: Answer
    knn: Answer
    few_shot: tuple[Answer, ...]
    vs_best: PairedTest | None

    @property
    def is_worse(self) -> bool:
        """Whether its head is significantly worse than the best: p < 0.05."""
        return self.vs_best is not None and self.vs_best.p_value < SIGNIFICANT

    @property
    def cost(self) -> tuple[float, int]:
        """Seconds that an image takes, infinite where unknown; and the length of its features."""
        return 1 / self.images_per_s if self.images_per_s else math.inf, self.feature_dim


@dataclass(frozen=True)
class SurveyResult(ShownAsTable):
    """Backbones compared on the same images.

    Parameters
    ----------
    rows : list of Surveyed
        The best linear head first.
    best, cheapest : str
        Names of rows: of the best linear head; and of the backbone that takes the least time for
        an image among those that are not significantly worse.
    dataset, dataset_digest : str
        The images.
    n_train, n_test : int
        Labelled images.
    n_reused : int
        Answers that an earlier survey had kept.
    wall_s : float
        Duration of this call in seconds.
    run : Path
        Folder of the record.
    notes : tuple of str
        What was left out and why.
    question : dict
        Target, task, split, group, where and table, as in a `ProbeResult`.
    """

    rows: list[Surveyed]
    best: str
    cheapest: str
    dataset: str
    dataset_digest: str
    n_train: int
    n_test: int
    n_reused: int
    wall_s: float
    run: Path
    notes: tuple[str, ...]
    question: dict[str, Any]
