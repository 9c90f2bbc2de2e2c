"""The HTML page: its words and numbers, and one file that fetches nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..auditing.findings import AuditResult
from ..files import check_writable
from ..runs import NOT_COMPARED, fold, price
from ..store.cache import Cache
from ..version import __version__
from .judged import Judged, Probe
from .pictures import Place
from .provenance import duration, in_words, sizes
from .selection import Group
from .style import percent, require, stylesheet

LISTED = 24  # lines of each list of an audit
_NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Map:
    """The map: its points as `map.encode` returns them, and what stands beside it."""

    data: str
    kinds: dict[str, Any]
    axes: tuple[str, str]
    said: str


@dataclass
class View:
    """Everything that the page says about one data set."""

    key: str
    title: str
    lede: str
    classes: Sequence[str] = ()
    tiles: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    has_votes: bool = False  # whether k-NN is among them
    figures: dict[str, str] = field(default_factory=dict)  # an <svg>, or why there is none
    probe: Probe | None = None
    probe_said: str = ""
    probe_notes: list[str] = field(default_factory=list)
    judged: Judged | None = None
    map: Map | None = None
    health: AuditResult | None = None
    facts: list[tuple[str, list[str]]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    thumbs: dict[Place, str] = field(default_factory=dict)

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Return the sections that there are: the ends of their ids, and their names."""
        curves = self.figures.keys() & {"few-shot", "training-set-size"}
        there = {
            ("comparison", "Comparison"): self.rows,
            ("probe", "Probe"): self.probe or curves,
            ("features", "Features"): self.map,
            ("health", "Data health"): self.health,
            ("provenance", "Provenance"): True,
        }
        return [part for part, wanted in there.items() if wanted]


def render(views: Sequence[View]) -> bytes:
    """Return the page.

    Names of files, classes and data sets are data: jinja2 escapes them in HTML, the map's data are
    base64, and its script makes text of them. Should one slip through, the page's policy runs no
    script whose hash it does not name, and fetches nothing. Bokeh's WebGL assembles its shaders'
    code at run time, hence ``unsafe-eval``.
    """
    needed = (*scripts(), page_file("map.js")) if any(view.map for view in views) else ()
    single = views[0] if len(views) == 1 else None
    return _rendered(
        "page.html.j2",
        needed,
        views=views,
        level=2 + (len(views) > 1),
        title=single.title if single else f"{len(views)} data sets",
        lede=single.lede if single else "Runs on different data are not compared.",
        version=__version__,
        health_words=health_words,
        listed=LISTED,
    )


def render_sheet(verb: str, template: str, **facts: Any) -> bytes:
    """Return a page of pictures without scripts, from a template that extends sheet.html.j2."""
    return _rendered(template, verb=verb, **facts)


def _rendered(template: str, scripts: Sequence[str] = (), **facts: Any) -> bytes:
    from jinja2 import Environment, FunctionLoader

    environment = Environment(
        loader=FunctionLoader(page_file), autoescape=True, keep_trailing_newline=True
    )
    environment.filters.update(percent=percent, count=lambda n: f"{n:,}")
    page = environment.get_template(template).render(
        made=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        policy=_policy(scripts),
        style=stylesheet() + page_file("page.css"),
        scripts=scripts,
        **facts,
    )
    # A file name need not be text: what cannot be shown is spelt out.
    return page.encode("utf-8", "backslashreplace")


def page_file(name: str) -> str:
    """Return a text that ships beside this module."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _policy(needed: Sequence[str]) -> str:
    allowed = [f"'sha256-{_hash(script)}'" for script in needed]
    allowed += ["'unsafe-eval'"] if needed else ["'none'"]
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def check_sheet(verb: str, page: Path) -> None:
    """Refuse a sheet that cannot be made or written, before anything is computed for it."""
    require(f"{verb}: expected the package jinja2 for a page", "jinja2")
    check_writable(page)


def _hash(script: str) -> str:
    # What a browser hashes has its line ends normalised, as the parser does.
    text = script.replace("\r\n", "\n").replace("\r", "\n")
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def require_page() -> None:
    """Raise EngineUnavailableError unless bokeh and jinja2 are installed."""
    require("report: expected the packages bokeh and jinja2", "bokeh.embed", "jinja2")


@cache
def scripts() -> tuple[str, ...]:
    """Return Bokeh's own scripts, to stand in the page."""
    from bokeh.resources import Resources

    raw = Resources(mode="inline", components=["bokeh", "bokeh-gl"]).js_raw
    return tuple(raw[:2])  # the rest sets a log level, and logs that


# ---- words and numbers


def lede(group: Group) -> str:
    """Describe the features in a line."""
    if group.cache is None:
        return f"{_count(len(group.runs), 'run')}. {group.why[:1].upper()}{group.why[1:]}."
    meta = group.cache.meta
    size = meta["preprocess"].get("size")  # of imported features it is unknown
    pixels = "" if size is None else f", at {size} pixels"
    val = f", {len(group.cache.val):,} validation" if group.cache.val is not None else ""
    return (
        f"{group.cache.feature_dim:,} features of {meta['backbone']}, weights "
        f"{meta.get('weights', 'unnamed')}{pixels}; "
        f"{len(group.cache.train):,} training{val} and {len(group.cache.test):,} test images of "
        f"{_count(len(group.cache.class_names), 'class', 'classes')}."
    )


def tiles_of(
    group: Group, probe: Probe | None, judged: Judged | None, audit: AuditResult | None
) -> list[tuple[str, str, str]]:
    """Return the numbers at the top."""
    tiles: list[tuple[str, str, str]] = []
    if judged is not None or probe is not None:
        record = probe.run.record if probe else {}
        top1 = judged.evaluation.top1 if judged else record["top1"]
        low, high = record["top1_interval"]
        tiles.append(("top-1 of the probe", percent(top1), _between(low, high)))
    tuned = [run.record for run in group.runs if run.record["kind"] == "finetune"]
    if tuned:
        best = max(tuned, key=lambda record: record["top1"])
        more = f"{best['method']}, {duration(best['wall_s'])}"
        tiles.append(("top-1 of the best fine-tune", percent(best["top1"]), more))
    cache = group.cache
    if cache is not None:
        n = sum(len(split) for _, split in cache.splits())
        val = "" if cache.val is None else f"{len(cache.val):,} to choose, "
        more = f"{len(cache.train):,} to train, {val}{len(cache.test):,} to test"
        tiles.append(("images", f"{n:,}", more))
        if cache.meta.get("wall_s"):
            rate = f"{cache.meta.get('images_per_s', 0):,.0f} images per second"
            tiles.append(("extraction time", duration(cache.meta["wall_s"]), rate))
    if judged is not None and judged.evaluation.calibration_error is not None:
        error = percent(judged.evaluation.calibration_error)
        tiles.append(("calibration error", error, "mean gap between confidence and accuracy"))
    if audit is not None and audit.n_test:
        n = audit.n_test_with_duplicate
        more = f"{percent(n / audit.n_test)} of the test images"
        tiles.append(("test images with a near-duplicate in train", f"{n:,}", more))
    return tiles


def rows(group: Group) -> list[dict[str, str]]:
    """Return the table of runs, by time per point gained, then by top-1."""
    records = [run.record for run in group.runs if run.record["kind"] not in NOT_COMPARED]
    named = fold(records)
    priced = [price(record, records) for record, _ in named]

    def rank(at: int) -> tuple[bool, float, float]:
        cost = priced[at]
        return cost is None, cost or 0.0, -named[at][0]["top1"]

    table = []
    for at in sorted(range(len(named)), key=rank):
        (record, label), cost = named[at], priced[at]
        low, high = record["top1_interval"]
        features = record.get("features_wall_s")
        table.append(
            dict(
                label=label,
                run=Path(record["run"]).name,
                top1=percent(record["top1"], 2),
                interval=_between(low, high),
                images=f"{record['n_train'] + (record.get('n_val') or 0):,} / {record['n_test']:,}",
                epochs=f"{record['n_epochs']:,}" if record["kind"] == "finetune" else _NONE,
                wall=duration(record["wall_s"]),
                features=f"+ {duration(features)} extraction" if features else "",
                price=duration(cost) if cost is not None else _NONE,
            )
        )
    return table


def probe_words(probe: Probe, judged: Judged | None) -> tuple[str, list[str]]:
    """Return a sentence about the probe, and notes."""
    record = probe.run.record
    said = f"A linear head ({record.get('solver', record['method'])}"
    if isinstance(record.get("C"), (int, float)):
        said += f", C = {record['C']:.3g}"
    if record.get("scale", "none") != "none":
        said += f", features {record['scale']}"
    said += f"), trained on {record['n_train']:,} images in {duration(record['wall_s'])}"
    sweep, fit_s = record.get("sweep"), record.get("fit_s")
    if sweep and fit_s is not None:
        said += f": {len(sweep['points'])} values of C on a part, then one fit of {duration(fit_s)}"
    said += "."
    if judged is not None:
        measured = judged.evaluation
        said += (
            f" Balanced accuracy {percent(measured.balanced_accuracy)}, macro F1 "
            f"{percent(measured.macro_f1)}"
        )
        said += f", top-5 {percent(measured.top5)}." if measured.top5 is not None else "."
    check = record.get("check")
    if isinstance(check, Mapping) and isinstance(check.get("agreement"), (int, float)):
        said += f" It agrees with scikit-learn on {percent(check['agreement'])} of the test images."
    notes = []
    if probe.n_others:
        notes.append(
            f"This is {probe.run.name}, one of {probe.n_others + 1} probes; to see another one, "
            "run featcache report RUN."
        )
    if probe.head is None:
        notes.append(f"No confusion matrix, mistakes or predictions: {probe.why}.")
    elif judged is None:
        notes.append("No confusion matrix or mistakes: the cache has no labelled test images.")
    elif record["n_test"] != judged.n_test or abs(record["top1"] - judged.evaluation.top1) > 1e-9:
        notes.append(
            f"The run reached {percent(record['top1'], 2)} on {record['n_test']:,} test images; "
            f"this page shows its head on all {judged.n_test:,} of this cache."
        )
    return said, notes


def health_words(audit: AuditResult, judged: Judged | None) -> tuple[str, str, str]:
    """Return a sentence about each list of an audit; accuracies are of the probe shown."""
    n = audit.n_test_with_duplicate
    duplicates = (
        f"{_count(len(audit.duplicates), 'pair')} with a cosine similarity of "
        f"{audit.threshold:.4g} or more, "
        f"{audit.n_label_conflicts:,} of them with different labels. "
        f"{_count(n, 'test image')} of {audit.n_test:,} {'has' if n == 1 else 'have'} a "
        "near-duplicate in the training split"
    )
    whose, top1, without = "a head of the audit's own", audit.top1, audit.top1_without_duplicates
    if judged is not None:
        whose, top1 = "the probe", judged.evaluation.top1
        without = judged.top1_without(
            image.row
            for pair in audit.duplicates
            for image, other in ((pair.first, pair.second), (pair.second, pair.first))
            if image.split == "test" and other.split == "train"
        )
    if top1 is not None and without is not None:
        duplicates += (
            f": top-1 of {whose} is {percent(top1, 2)} on all test images, and "
            f"{percent(without, 2)} without these"
        )
    wrong = (
        f"{_count(len(audit.mislabelled), 'image')} of {audit.n_judged:,} that a head trained "
        "without them assigns to another class than their label; the most suspect first"
    )
    far = (
        f"{_count(len(audit.outliers), 'image')} far from all training images, the farthest first. "
        f"Distance: 1 minus the mean cosine similarity to the {audit.n_neighbours} nearest"
    )
    return f"{duplicates}.", f"{wrong}.", f"{far}."


def _between(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {percent(high)}"


def _count(n: int, one: str, several: str = "") -> str:
    return f"{n:,} {one if n == 1 else several or one + 's'}"


def facts(cache: Cache) -> list[tuple[str, list[str]]]:
    """Return all the metadata of a cache: names, and texts, one or several each."""
    return [in_words(name, value) for name, value in {**sizes(cache), **cache.meta}.items()]
