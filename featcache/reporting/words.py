"""What the page says of a data set, in words and numbers: tiles, table, sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..auditing.findings import AuditResult
from ..runs import CURVES, price, run_labels
from .judged import Judged, Probe
from .page import Row, Tile, duration, percent
from .selection import Group

_NONE = "\N{EN DASH}"


def lede(group: Group) -> str:
    """Return what the features are, in a line."""
    if group.cache is None:
        return f"{_count(len(group.runs), 'run')}. {group.why[:1].upper()}{group.why[1:]}."
    meta = group.cache.meta
    return (
        f"{group.cache.feature_dim:,} features of {meta['backbone']}, weights "
        f"{meta.get('weights', 'unnamed')}, at {meta['preprocess']['size']} pixels; "
        f"{len(group.cache.train):,} training and {len(group.cache.test):,} test images of "
        f"{_count(len(group.cache.class_names), 'class', 'classes')}."
    )


def tiles(
    group: Group, probe: Probe | None, judged: Judged | None, audit: AuditResult | None
) -> list[Tile]:
    """Return the numbers at the top."""
    found = []
    if judged is not None or probe is not None:
        record = probe.run.record if probe else {}
        top1 = judged.evaluation.top1 if judged else record["top1"]
        low, high = record["top1_interval"]
        found.append(Tile("top-1 of the probe", percent(top1), _between(low, high)))
    tuned = [run.record for run in group.runs if run.record["kind"] == "finetune"]
    if tuned:
        best = max(tuned, key=lambda record: record["top1"])
        more = f"{best['method']}, {duration(best['wall_s'])}"
        found.append(Tile("top-1 of the best fine-tune", percent(best["top1"]), more))
    cache = group.cache
    if cache is not None:
        n = len(cache.train) + len(cache.test)
        more = f"{len(cache.train):,} to train, {len(cache.test):,} to test"
        found.append(Tile("images", f"{n:,}", more))
        if cache.meta.get("wall_s"):
            rate = f"{cache.meta.get('images_per_s', 0):,.0f} images per second, once"
            found.append(Tile("time of the features", duration(cache.meta["wall_s"]), rate))
    if judged is not None and judged.evaluation.calibration_error is not None:
        error = percent(judged.evaluation.calibration_error)
        found.append(Tile("calibration error", error, "confidence against accuracy"))
    if audit is not None and audit.n_test:
        n = audit.n_test_with_duplicate
        more = f"{percent(n / audit.n_test)} of the test images"
        found.append(Tile("test images with a twin in train", f"{n:,}", more))
    return found


def rows(group: Group) -> list[Row]:
    """Return the table: by what a point has cost, then by top-1."""
    runs = [run for run in group.runs if run.record["kind"] not in CURVES]
    records = [run.record for run in runs]
    priced = [price(record, records) for record in records]
    labels = run_labels(records)

    def rank(at: int) -> tuple[bool, float, float]:
        cost = priced[at]
        return cost is None, cost or 0.0, -records[at]["top1"]

    table = []
    for at in sorted(range(len(runs)), key=rank):
        record, cost = records[at], priced[at]
        low, high = record["top1_interval"]
        features = record.get("features_wall_s")
        table.append(
            Row(
                label=labels[at],
                run=runs[at].name,
                top1=percent(record["top1"], 2),
                interval=_between(low, high),
                images=f"{record['n_train'] + (record.get('n_val') or 0):,} / {record['n_test']:,}",
                epochs=f"{record['n_epochs']:,}" if record["kind"] != "knn" else _NONE,
                wall=duration(record["wall_s"]),
                features=f"+ {duration(features)} features" if features else "",
                price=duration(cost) if cost is not None else _NONE,
            )
        )
    return table


def probe_words(probe: Probe, judged: Judged | None) -> tuple[str, list[str]]:
    """Return a sentence on the probe, and what else to know."""
    record = probe.run.record
    said = f"A linear head ({record.get('solver', record['method'])}"
    if isinstance(record.get("C"), (int, float)):
        said += f", C = {record['C']:.3g}"
    if record.get("scale", "none") != "none":
        said += f", features {record['scale']}"
    said += f"), trained on {record['n_train']:,} images in {duration(record['wall_s'])}."
    if judged is not None:
        measured = judged.evaluation
        said += (
            f" Balanced accuracy {percent(measured.balanced_accuracy)}, macro F1 "
            f"{percent(measured.macro_f1)}"
        )
        said += f", top-5 {percent(measured.top5)}." if measured.top5 is not None else "."
    check = record.get("check")
    if isinstance(check, Mapping) and isinstance(check.get("agreement"), (int, float)):
        said += f" scikit-learn's head agrees on {percent(check['agreement'])} of the test images."
    notes = []
    if probe.n_others:
        notes.append(
            f"{probe.run.name} is shown, one of {probe.n_others + 1} probes; featcache report RUN "
            "shows another."
        )
    if probe.head is None:
        notes.append(f"No confusion, mistakes or predictions on the map: {probe.why}.")
    elif judged is None:
        notes.append("No confusion or mistakes: the cache has no labelled test images.")
    elif _differs(record, judged):
        notes.append(
            f"The run had {percent(record['top1'], 2)} on {record['n_test']:,} test images; what "
            f"is shown is its head on all {judged.n_test:,} of this cache."
        )
    return said, notes


def health_words(audit: AuditResult) -> tuple[str, str, str]:
    """Return a sentence on each of the lists of an audit."""
    n = audit.n_test_with_duplicate
    twins = (
        f"{_count(len(audit.duplicates), 'pair')} with a cosine of {audit.threshold:g} or more, "
        f"{_count(audit.n_label_conflicts, 'of them', 'of them')} with labels that differ. "
        f"{_count(n, 'test image')} of {audit.n_test:,} {'has' if n == 1 else 'have'} one in train"
    )
    if audit.top1 is not None and audit.top1_without_duplicates is not None:
        twins += (
            f": top-1 is {percent(audit.top1, 2)} on all test images, and "
            f"{percent(audit.top1_without_duplicates, 2)} without these"
        )
    wrong = (
        f"{_count(len(audit.mislabelled), 'image')} of {audit.n_judged:,} whose label a head that "
        "never saw them finds less likely than another class; the most suspect first"
    )
    far = (
        f"{_count(len(audit.outliers), 'image')} far from all training images: 1 minus the mean "
        f"cosine to the {audit.n_neighbours} nearest; the furthest first"
    )
    return f"{twins}.", f"{wrong}.", f"{far}."


def _differs(record: Mapping[str, Any], judged: Judged) -> bool:
    return bool(
        record["n_test"] != judged.n_test or abs(record["top1"] - judged.evaluation.top1) > 1e-9
    )


def _between(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {percent(high)}"


def _count(n: int, one: str, several: str = "") -> str:
    return f"{n:,} {one if n == 1 else several or one + 's'}"
