"""Precisions by evidence: a few images of the training split run in float32 and in others.

``--precision auto`` takes the fastest that the device computes in natively and that leaves the
features of these images as they are: it neither turns one nor changes what its neighbours say of
an image. ``--precision int8`` is scaled by half of such images, and measured on the other half.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from ..backbones.choice import INT8, EngineChoice, choose_engine, native_precisions
from ..backbones.conversion import agreement
from ..backbones.engine import Engine, build_engine, settled
from ..datasets.batches import decoded_batches
from ..datasets.dataset import UNLABELLED
from ..datasets.images import FileImages, reading_threads
from ..errors import CacheError, DatasetError, FeatcacheError
from ..preprocess import upscale
from ..progress import OnNote, OnProgress, Progress
from ..sampling import drawn_sides
from ..store.cache import load
from ..store.shards import read_ingredients
from .plan import Plan, same_but_images

N_IMAGES = 256
LEAST_COSINE = 0.9999
LEAST_SAME_VOTES = 0.99  # share of the images
_LEAST_GAIN = 1.05  # times as fast as f32, or the choice would change from run to run
_LEAST_IMAGES = 16
_NEIGHBOURS, _TEMPERATURE = 10, 0.07
_MEASURED_S = 1.0


def with_precision(plan: Plan, force: bool, on_progress: OnProgress, on_note: OnNote) -> Plan:
    """Return the plan in the precision that its images allow, and with the evidence."""
    native = native_precisions(plan.work.choice)
    evidence = None if force else _decided_before(plan, native)
    if evidence is None:
        evidence = _measured(plan, on_progress, on_note)
        on_note(evidence["why"])
    return _in(plan, evidence["chosen"], evidence)


def calibrated(plan: Plan) -> tuple[Plan, np.ndarray, np.ndarray]:
    """Return the plan with the pixels that scale int8, and others with their labels to test it."""
    pixels, labels = _images(plan, 2 * N_IMAGES)
    if len(pixels) < 2 * _LEAST_IMAGES:
        raise DatasetError(
            f"{plan.dataset.name}: expected at least {2 * _LEAST_IMAGES} training images that "
            f"decode, of which half scale the layers for int8, found {len(pixels)}; use another "
            "--precision"
        )
    scaling = upscale(pixels[::2], plan.work.weights.preprocess)
    choice = replace(plan.work.choice, calibration=scaling)
    return replace(plan, work=replace(plan.work, choice=choice)), pixels[1::2], labels[1::2]


def with_int8(plan: Plan, force: bool, on_progress: OnProgress, on_note: OnNote) -> Plan:
    """Return the plan with the pixels that scale int8, and how its features are beside f32's."""
    plan, pixels, labels = calibrated(plan)
    evidence = None if force else _decided_before(plan, (INT8,))
    if evidence is None:
        tried = _tried(plan, ("f32", INT8), pixels, labels, on_progress, on_note)
        evidence = _evidence(INT8, len(pixels), tried, _compared(INT8, tried))
        on_note(evidence["why"])
    return _in(plan, INT8, evidence)


def _in(plan: Plan, precision: str, evidence: dict[str, Any] | None = None) -> Plan:
    """Return the plan in another precision."""
    return replace(
        plan, work=replace(plan.work, choice=_choice(plan, precision), evidence=evidence)
    )


def _choice(plan: Plan, precision: str) -> EngineChoice:
    weights, options = plan.work.weights, plan.options
    choice = choose_engine(options.engine, options.device, precision, weights.engines)
    choice = settled(choice, weights, options.cuts)
    return replace(choice, calibration=plan.work.choice.calibration if precision == INT8 else None)


def _decided_before(plan: Plan, precisions: Sequence[str]) -> dict[str, Any] | None:
    """Return the evidence by which a cache there, or an unfinished run, was made."""
    for meta in _metas_there(plan):
        evidence = meta.get("precision_evidence")
        chosen: Any = evidence.get("chosen") if isinstance(evidence, dict) else None
        if chosen in precisions and same_but_images(meta, _in(plan, chosen).meta("")):
            return evidence
    return None


def _metas_there(plan: Plan) -> Iterator[dict[str, Any]]:
    for path in plan.caches_there():
        try:
            yield load(path).meta
        except CacheError:
            continue  # whoever opens it says what is wrong
    for folder in plan.unfinished_there():
        content = read_ingredients(folder)
        if content is not None:
            yield content["meta"]


def _measured(plan: Plan, on_progress: OnProgress, on_note: OnNote) -> dict[str, Any]:
    """Run each precision on the images, and choose."""
    native = native_precisions(plan.work.choice)
    if len(native) == 1:
        return _evidence("f32", 0, {}, "this device computes in f32 alone")
    pixels, labels = _images(plan, N_IMAGES)
    if len(pixels) < _LEAST_IMAGES:
        why = f"{len(pixels)} images of train decode, {_LEAST_IMAGES} are needed to compare others"
        return _evidence("f32", len(pixels), {}, why)
    return chosen_of(_tried(plan, native, pixels, labels, on_progress, on_note), len(pixels))


def _tried(
    plan: Plan,
    precisions: Sequence[str],
    pixels: np.ndarray,
    labels: np.ndarray,
    on_progress: OnProgress,
    on_note: OnNote,
) -> dict[str, dict[str, Any]]:
    """Run each precision, f32 first, on the images; measure its speed and compare its features."""
    engines: dict[str, Engine] = {}
    for n_done, precision in enumerate(precisions):
        on_progress(Progress("try precisions", n_done, len(precisions)))
        choice = _choice(plan, precision)
        try:
            engines[precision] = build_engine(choice, plan.work.weights, plan.options.cuts)
        except FeatcacheError as error:
            if precision in ("f32", INT8):
                raise
            on_note(f"precision {precision}: left out: {error}")
    features = {name: engine.extract(pixels) for name, engine in engines.items()}
    tried: dict[str, dict[str, Any]] = {
        name: {"images_per_s": rate} for name, rate in _rates(engines, pixels).items()
    }
    first = plan.options.cuts[0]
    for name in tried.keys() - {"f32"}:
        tried[name] |= {
            "least_cosine": agreement(features[name], features["f32"]).cosine,
            "same_votes": _same_votes(features[name][first], features["f32"][first], labels),
        }
    on_progress(Progress("try precisions", len(precisions), len(precisions)))
    return tried


def _compared(name: str, tried: dict[str, dict[str, Any]]) -> str:
    """Say how a precision is beside f32."""
    found, slow = tried[name], tried["f32"]["images_per_s"]
    fast, votes = found["images_per_s"], found["same_votes"]
    return (
        f"{name}: {fast / slow:.2f} times as fast as f32 ({fast:,.0f} images per second against "
        f"{slow:,.0f}), least cosine {found['least_cosine']:.5f}"
        + ("" if votes is None else f", {votes:.1%} of the {_NEIGHBOURS}-NN votes the same")
    )


def chosen_of(tried: dict[str, dict[str, Any]], n_images: int) -> dict[str, Any]:
    """Choose among what was measured of each precision, and say why."""
    slow = tried["f32"]["images_per_s"]
    reasons: list[str] = []
    for name in sorted(tried, key=lambda name: -tried[name]["images_per_s"]):
        found = tried[name]
        if name == "f32":
            continue
        gain, votes = found["images_per_s"] / slow, found["same_votes"]
        measured = _compared(name, tried)
        problems = [
            problem
            for problem, is_one in (
                (f"less than {_LEAST_GAIN:g} times as fast", gain < _LEAST_GAIN),
                (f"a cosine below {LEAST_COSINE:g}", found["least_cosine"] < LEAST_COSINE),
                ("votes that differ", votes is not None and votes < LEAST_SAME_VOTES),
            )
            if is_one
        ]
        if not problems:
            return _evidence(name, n_images, tried, "; ".join([measured, *reasons]))
        reasons.append(f"not {measured}: {' and '.join(problems)}")
    return _evidence("f32", n_images, tried, "; ".join(reasons) or "nothing else runs here")


def _evidence(
    chosen: str, n_images: int, tried: dict[str, dict[str, Any]], why: str
) -> dict[str, Any]:
    text = f"precision {chosen}, by {n_images} of the images: {why}"
    return {"chosen": chosen, "n_images": n_images, "tried": tried, "why": text}


def _images(plan: Plan, n_most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels uint8 (n, s, s, 3) and labels (n,) of images that are spread over train."""
    split = plan.dataset.listed()[0]
    undivided = plan.dataset.undivided is not None
    # Of images without a test split, a quarter or less is for testing.
    n = min(len(split), n_most * 3 // 2 if undivided else n_most)
    rows = np.unique(np.linspace(0, len(split) - 1, n).astype(np.int64)) if n else np.empty(0, int)
    batches = decoded_batches(
        split.images,
        [rows],
        plan.work.weights.preprocess,
        workers=reading_threads(split.images),
        on_error="skip",
        max_pixels=plan.options.max_pixels,
        hashed=undivided and isinstance(split.images, FileImages),
    )
    with closing(batches):
        decoded = next(batches)
    keep = np.ones(len(decoded.rows), bool)
    if decoded.hashes is not None:  # the test split chooses nothing
        keep = ~drawn_sides(decoded.hashes)[np.isin(rows, decoded.rows)]
    kept = np.flatnonzero(keep)[:n_most]
    return decoded.pixels[kept], split.labels[decoded.rows[kept]]


def _rates(engines: dict[str, Engine], pixels: np.ndarray) -> dict[str, float]:
    """Return the best images per second of each engine, in turn, so that other load hits all."""
    best = dict.fromkeys(engines, np.inf)
    began, least = time.perf_counter(), _MEASURED_S * len(engines)
    while np.inf in best.values() or time.perf_counter() - began < least:
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.extract(pixels)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(pixels) / took for name, took in best.items()}


def _same_votes(ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the share of labelled images whose neighbours vote alike; None without labels."""
    labelled = np.flatnonzero(labels != UNLABELLED)
    if len(labelled) <= _NEIGHBOURS:
        return None
    our_votes, their_votes = (_votes(one[labelled], labels[labelled]) for one in (ours, theirs))
    return float((our_votes == their_votes).mean())


def _votes(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the class that the nearest of the other images vote for, weighted by similarity."""
    features = features.reshape(len(features), -1)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    directions = features / np.where(lengths == 0, 1, lengths)
    similarity = directions @ directions.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argpartition(-similarity, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]
    tally = np.zeros((len(labels), labels.max() + 1))
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / _TEMPERATURE)
    np.add.at(tally, (np.arange(len(labels))[:, None], labels[nearest]), weights)
    return tally.argmax(axis=1)
