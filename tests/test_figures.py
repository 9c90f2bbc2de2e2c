"""Figures: what is drawn is what was given, in any script, the same every time."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import write_gaussian_cache
from test_comparison import record_of

pytest.importorskip("matplotlib", reason="the extra report is not installed")

from matplotlib.text import Text

from featcache import load
from featcache.cli import main
from featcache.errors import EngineUnavailableError, FeatcacheError, OutputError, ShapeMismatchError
from featcache.metrics import evaluate_scores, expected_calibration_error
from featcache.probes.curves import CurvePoint
from featcache.probes.sweep import Sweep, SweepPoint
from featcache.reporting.figures import (
    accuracy_over_time,
    confused_pairs,
    confusion,
    learning_curves,
    per_class,
    probe_overview,
    published,
    regularisation_path,
    reliability,
    shots_curve,
    worst_classes,
)
from featcache.reporting.style import (
    COLOURS,
    check_plot,
    save_figure,
    short,
    spread,
    stylesheet,
    svg,
)

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "<script>alert(1)</script>",
    r"$\frac{1}{2}$ costs $5",
    "_hidden",
    "שלום עולם",
    "مرحبا بالعالم",
    "日本語",
    "\N{GRINNING FACE}\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}",
    "a" * 299 + "z",
    "\"quoted\" & 'single'",
    "tab\there\nand\x00there\u202e",
    "",
    "e" + "\u0301" * 60,
)


def texts(figure):
    """Return the text of every artist that is shown, as it is drawn."""
    shown = [text for text in figure.findobj(Text) if text.get_visible()]
    return [text.get_text().strip().replace("\n", " ") for text in shown]


def lines(axes):
    """Return the points of every line of more than two points."""
    return [line.get_xydata() for line in axes.get_lines() if len(line.get_xydata()) > 2]


def xml(figure):
    return ElementTree.fromstring(svg(figure))


def shown(element):
    """Return the texts of an SVG that are drawn."""
    return ["".join(text.itertext()) for text in element.iter(f"{SVG}text")]


@pytest.fixture
def sweep():
    points = [SweepPoint(10.0**power, 0.5 + 0.01 * power, power != -4) for power in range(-4, 3)]
    return Sweep(100.0, tuple(points), 800, 200, "highest")


def points_of(*sizes):
    return [
        CurvePoint(3 * size, size, (0.3, 0.4), 0.35, (0.3, 0.4), True, 1.0) for size in sizes
    ] + [CurvePoint(900, None, (0.8,), 0.8, (0.78, 0.82), True, 1.0)]


def tuned(run, accuracies, **more):
    epochs = [
        {"epoch": number, "train_loss": 2.0 / number, "top1": top1, "wall_s": 1.0}
        for number, top1 in enumerate(accuracies, 1)
    ]
    return record_of(run, top1=accuracies[-1], epochs=epochs, n_epochs=len(epochs), **more)


# Accuracy over time.


def test_a_method_stands_at_its_time_and_accuracy():
    records = [
        record_of("a", "probe", 0.7, 10.0, features_wall_s=90.0),
        record_of("b", "finetune", 0.8, 1000.0),
    ]
    (axes,) = accuracy_over_time(records).axes
    marks = {tuple(bar[0].get_xydata()[0]) for bar in axes.containers}
    assert marks == {(10.0, 0.7), (1000.0, 0.8)} and axes.get_xscale() == "log"
    intervals = [bar[2][0].get_segments()[0] for bar in axes.containers]
    assert sorted(segment[0][1] for segment in intervals) == pytest.approx([0.69, 0.79])
    ring = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert ring == [[[10.0, 0.7], [100.0, 0.7]]]


def test_of_a_method_the_newest_run_is_drawn_and_not_the_best():
    records = [
        record_of("1", "probe", 0.9, created="2026-01-01"),
        record_of("2", "probe", 0.7, created="2026-01-02"),
        record_of("3", "probe", 0.6, created="2026-01-01", n_train=90),
    ]
    figure = accuracy_over_time(records)
    assert len(figure.axes[0].containers) == 2
    words = [text for text in texts(figure) if "lbfgs" in text]
    assert words == [
        "70.0\u00a0%  probe lbfgs, 900 images",
        "60.0\u00a0%  probe lbfgs, 90 images",
    ]


def test_data_sets_do_not_share_axes():
    records = [
        record_of("a", "probe", 0.7),
        record_of("b", "probe", 0.8, dataset_digest="e" * 64),
        record_of("c", "probe", 0.9, dataset="others"),
    ]
    figure = accuracy_over_time(records)
    assert [len(axes.containers) for axes in figure.axes] == [1, 1, 1]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["colours (dddddddd)", "colours (eeeeeeee)", "others (dddddddd)"]
    many = [record_of(str(n), "probe", dataset=str(n)) for n in range(9)]
    with pytest.raises(FeatcacheError, match="at most 8 data sets, found 9"):
        accuracy_over_time(many)


def test_labels_do_not_overlap_however_close_their_points():
    records = [record_of(str(n), "probe", 0.7 + n / 1e5, 10.0, method=f"m{n}") for n in range(30)]
    figure = accuracy_over_time(records)
    renderer = figure.canvas.get_renderer()
    boxes = [
        Text.get_window_extent(text, renderer)  # an annotation's has its line in it
        for text in figure.findobj(Text)
        if re.search(r"  m\d+$", text.get_text())
    ]
    assert len(boxes) == 30
    for one, other in pairwise(boxes):
        assert not one.overlaps(other)
    whole = figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 for box in boxes)
    assert all(whole.y0 <= box.y0 and box.y1 <= whole.y1 for box in boxes)


def test_spread_moves_as_little_as_it_can():
    assert spread([0.5, 0.1], 0.1).tolist() == [0.5, 0.1]
    assert spread([0.2, 0.2], 0.1).tolist() == pytest.approx([0.15, 0.25])
    assert spread([0.0, 0.0, 0.0], 0.1).tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert spread([1.0, 1.0], 0.1).tolist() == pytest.approx([0.9, 1.0])
    assert spread([], 0.1).tolist() == []
    assert np.diff(np.sort(spread(np.zeros(50), 0.1))) == pytest.approx(0.1)


CIFAR = {"dataset": "cifar10-jpeg", "backbone": "resnet18", "size": 224}
FULL = {"n_train": 50_000, "n_test": 10_000}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (record_of("a", **CIFAR | FULL), {"full": 0.9017}),
        (record_of("a", **CIFAR | FULL | {"dataset": "cifar10"}), {"full": 0.9017}),
        (record_of("a", n_val=5_000, **CIFAR | FULL | {"n_train": 45_000}), {"full": 0.9017}),
        (
            record_of("a", **CIFAR | FULL | {"weights": "none", "method": "scratch"}),
            {"scratch": 0.4957},
        ),
        (record_of("a", **CIFAR | FULL | {"dataset": "cifar100"}), {}),
        (record_of("a", **CIFAR | FULL | {"dataset": "mycifar10"}), {}),
        (record_of("a", **CIFAR | FULL | {"weights": "tinyimagenet32"}), {}),
        (record_of("a", **CIFAR | FULL | {"backbone": "resnet50"}), {}),
        (record_of("a", **CIFAR | FULL | {"size": 64}), {}),
        (record_of("a", **CIFAR), {}),
        (record_of("a", **CIFAR | FULL | {"n_test": 2_000}), {}),
    ],
)
def test_the_tutorial_is_a_reference_for_its_own_setting_alone(record, expected):
    assert published([record]) == expected
    said = " ".join(texts(accuracy_over_time([record])))
    assert ("tutorial, full" in said) == ("full" in expected)
    assert ("tutorial, scratch" in said) == ("scratch" in expected)


# Learning curves.


def test_learning_curves_are_those_of_the_epochs():
    records = [
        tuned("a", (0.3, 0.5, 0.6), method="split"),
        tuned("b", (0.2, 0.4, 0.3), method="full", curve_split="val", best_epoch=2),
        record_of("c", "probe", epochs=[]),
    ]
    figure = learning_curves(records)
    loss, accuracy = figure.axes
    assert [line[:, 1].tolist() for line in lines(loss)] == [[2.0, 1.0, 2 / 3]] * 2
    assert [line.tolist() for line in lines(accuracy)] == [
        [[1.0, 0.3], [2.0, 0.5], [3.0, 0.6]],
        [[1.0, 0.2], [2.0, 0.4], [3.0, 0.3]],
    ]
    (ring,) = [line for line in accuracy.get_lines() if len(line.get_xydata()) == 1]
    assert ring.get_xydata().tolist() == [[2.0, 0.4]]
    assert {"60.0\u00a0%  split", "30.0\u00a0%  full, val"} <= set(texts(figure))


def test_records_without_epochs_have_no_curves():
    broken = [record_of("a", epochs=3), record_of("b", epochs=[{"epoch": 1}]), record_of("c")]
    with pytest.raises(FeatcacheError, match="expected fine-tunes with epochs, found none"):
        learning_curves(broken)


# A probe.


def test_the_path_marks_the_chosen_c_and_says_that_it_is_at_the_edge(sweep):
    figure = regularisation_path(sweep, metric="balanced")
    (axes,) = figure.axes
    (line,) = lines(axes)
    assert line.tolist() == [[point.C, point.score] for point in sweep.points]
    chosen = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert [[100.0, pytest.approx(0.52)]] in chosen, "the mark of the choice"
    assert [[1e-4, pytest.approx(0.46)]] in chosen, "the hollow mark of a fit that stopped"
    said = " ".join(texts(figure))
    assert "the highest one tried" in said and "Hollow" in said and "C = 100: 52.0\u00a0%" in said
    assert "balanced accuracy" in said
    inside = Sweep(1.0, sweep.points, 800, 200, "")
    assert "tried" not in " ".join(texts(regularisation_path(inside)))
    with pytest.raises(FeatcacheError, match="found none"):
        regularisation_path(None)


def test_a_curve_has_its_means_its_band_and_its_draws():
    figure = shots_curve(points_of(1, 5, 20)[::-1])
    (axes,) = figure.axes
    (line,) = lines(axes)
    assert line.tolist() == [[3, 0.35], [15, 0.35], [60, 0.35], [900, 0.8]]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.3 and band[:, 1].max() == 0.82
    draws = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert [[3.0, 0.3], [3.0, 0.4]] in draws
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["1", "5", "20", "all"]
    fractions = [CurvePoint(n, None, (0.5,), 0.5, (0.4, 0.6), True, 1.0) for n in (10, 1000)]
    (axes,) = shots_curve(fractions).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "1,000"]
    with pytest.raises(FeatcacheError, match="expected points, found none"):
        shots_curve([])


def test_crowded_sizes_lose_ticks_and_no_points():
    (axes,) = shots_curve(points_of(*range(1, 40))).axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[0] == "1" and labels[-1] == "all" and 5 < len(labels) < 25
    assert len(lines(axes)[0]) == 40
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def shaded(axes):
    """Return the cells that are filled, with their opacity: {(row, column): alpha}."""
    cells = {}
    for patch in axes.patches:
        corners = patch.get_path().vertices.reshape(-1, 5, 2)
        for column, row in corners[:, :4].mean(axis=1).round().astype(int).tolist():
            cells[row, column] = (patch.get_facecolor()[:3], patch.get_alpha())
    return cells


def test_a_confusion_shades_each_cell_by_its_share():
    matrix = np.array([[90, 10, 0], [0, 60, 40], [0, 0, 0]])
    figure = confusion(matrix, ["ant", "bee", "cat"])
    (axes,) = figure.axes
    cells = shaded(axes)
    assert set(cells) == {(0, 0), (0, 1), (1, 1), (1, 2)}
    assert cells[0, 0][0] == cells[1, 1][0] != cells[0, 1][0] == cells[1, 2][0]
    assert cells[0, 0][1] > cells[1, 1][1] and cells[1, 2][1] == 1 > cells[0, 1][1]
    numbers = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "90", (1, 0): "10", (1, 1): "60", (2, 1): "40"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant", "bee", "cat"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first label is at the top"
    assert "75.0\u00a0% of 200" in " ".join(texts(figure))


@pytest.mark.parametrize(("n_classes", "panels"), [(2, 1), (30, 1), (31, 2), (100, 2)])
def test_a_confusion_of_any_size(n_classes, panels):
    matrix = np.eye(n_classes, dtype=int) * 9
    matrix[1, 0] = 3
    names = [f"class {index}" for index in range(n_classes)]
    figure = confusion(matrix, names)
    assert len(figure.axes) == panels
    said = texts(figure)
    pairs = [text for text in said if " as class" in text]
    assert pairs == (["class 1 as class 0"] if n_classes > 30 else [])
    assert ("3 of 12" in said) == (n_classes > 30)
    renderer = figure.canvas.get_renderer()
    for label in (figure.axes[0].xaxis.label, figure.axes[0].yaxis.label):
        box = label.get_window_extent(renderer)
        assert figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max), "not cut"


def test_of_more_than_a_hundred_classes_the_worst_are_drawn():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(2000), 3)
    scores = generator.normal(size=(6000, 2000)).astype(np.float32)
    scores[np.arange(6000), labels] += 9
    scores[:3, 7] += 99  # class 0 as class 7
    scores[15:17, 8] += 99
    measured = evaluate_scores(scores, labels, calibrated=False)
    names = [f"class {index}" for index in range(2000)]
    said = texts(confused_pairs(measured.most_confused, names))
    assert "class 0 as class 7" in said and "3 of 3" in said and "class 5 as class 8" in said
    figure = worst_classes(measured, names)
    (axes,) = figure.axes
    labelled = [label.get_text() for label in axes.get_yticklabels()]
    assert labelled[:2] == ["class 0", "class 5"] and len(labelled) == 10
    assert {"0 of 3", "1 of 3"} <= set(texts(figure))
    assert "1 classes have no image right" in " ".join(texts(figure))
    with pytest.raises(FeatcacheError, match="at most 100 classes"):
        confusion(np.eye(101), names[:101])
    assert "no mistakes" in texts(confused_pairs((), names))


def test_a_confusion_without_a_mistake_and_one_without_counts():
    said = " ".join(texts(confusion(np.eye(40, dtype=int), ["x"] * 40)))
    assert "There are no mistakes" in said and "no mistakes" in said
    with pytest.raises(FeatcacheError, match="at most 100 classes"):
        confusion((), ["a", "b"])
    with pytest.raises(ShapeMismatchError, match=r"expected an array of shape \(3, 3\)"):
        confusion(np.eye(2), ["a", "b", "c"])


def test_classes_are_sorted_bars():
    figure = per_class((0.5, None, 0.9), ["ant", "bee", "cat"])
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.9, 0.5, 0.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "ant", "bee"]
    assert [text.get_text() for text in axes.texts] == [
        "90.0\u00a0%",
        "50.0\u00a0%",
        "no test image",
    ]
    tops = [bar.get_y() for bar in axes.patches]
    assert tops == sorted(tops) and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert "70.0\u00a0%" in " ".join(texts(figure))
    with pytest.raises(FeatcacheError, match="found none"):
        per_class((), ["a"])
    with pytest.raises(ShapeMismatchError):
        per_class((0.5,), ["a", "b"])


def test_of_many_classes_the_best_and_the_worst_are_bars():
    recalls = np.linspace(0, 1, 1000)
    recalls[500] = np.nan
    figure = per_class(recalls, [f"c{index}" for index in range(1000)])
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"c{index}" for index in (*range(999, 989, -1), *range(19, -1, -1))]
    assert "999 classes" in " ".join(texts(figure))


def test_a_reliability_diagram_has_the_bins_that_were_measured():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(3), 500)
    labels = generator.integers(3, size=500)
    error, bins = expected_calibration_error(probabilities, labels)
    figure = reliability(bins)
    above, below = figure.axes
    filled = [entry for entry in bins if entry.n]
    drawn = above.collections[1].get_offsets()
    assert np.allclose(drawn, [(entry.confidence, entry.accuracy) for entry in filled])
    assert [bar.get_height() for bar in below.patches] == [entry.n for entry in bins]
    assert f"{100 * error:.1f}\u00a0% on 500" in " ".join(texts(figure))
    with pytest.raises(FeatcacheError, match="are no probabilities"):
        reliability(())


# Names.


@pytest.mark.parametrize("draw", ["confusion", "per_class", "time", "curves"])
def test_hostile_names_are_text(draw, tmp_path):
    count = len(HOSTILE)
    if draw == "confusion":
        figure = confusion(np.eye(count, dtype=int), HOSTILE)
    elif draw == "per_class":
        figure = per_class(np.linspace(0, 1, count), HOSTILE)
    elif draw == "time":
        records = [record_of(str(n), method=name, wall_s=n + 1.0) for n, name in enumerate(HOSTILE)]
        figure = accuracy_over_time(records)
    else:
        records = [tuned(str(n), (0.1, 0.2), method=name) for n, name in enumerate(HOSTILE)]
        figure = learning_curves([{**record, "dataset": HOSTILE[0]} for record in records])
    save_figure(figure, tmp_path / "figure")  # warnings, as of glyphs, are errors
    text = svg(figure)
    written = shown(ElementTree.fromstring(text))
    for name in HOSTILE:
        columns = {"confusion": 18, "per_class": 22}.get(draw, 38)
        assert [line for line in written if short(name, columns) in line], name
    assert any("\u200d" in line for line in written), "an emoji stays whole in an SVG"
    assert "<script" not in text and text.count("&lt;script&gt;") >= 1


def test_a_name_is_shortened_in_its_middle():
    assert short("short") == "short"
    assert short("a" * 299 + "z", 10) == "aaaaaa…aaz"
    assert short("日" * 50, 10) == "日日日…日"
    assert len(short("e" + "\u0301" * 60)) < 25
    assert short("") == "(no name)" == short(" \u200d")
    assert short("a\tb\x00") == r"a\tb\x00"


def test_figures_do_not_depend_on_the_fonts_of_the_machine(tmp_path):
    """A fallback that is installed in one weight only used to bring a warning of its glyphs."""
    from matplotlib.font_manager import FontEntry, findfont, fontManager

    names = ("日本語", "\N{GRINNING FACE}", "latin")
    (before,) = save_figure(per_class((0.5, 0.6, 0.7), names), tmp_path / "before.png")
    other = FontEntry(findfont("STIXGeneral"), "Droid Sans Fallback", weight=400)
    fontManager.ttflist.append(other)
    try:
        figure = per_class((0.5, 0.6, 0.7), names)
        (after,) = save_figure(figure, tmp_path / "after.png")
    finally:
        fontManager.ttflist.remove(other)
    assert before.read_bytes() == after.read_bytes()
    assert {text.get_fontname() for text in figure.findobj(Text)} == {"DejaVu Sans"}
    assert set(names) <= set(shown(xml(figure))), "whatever a PNG can draw, an SVG has the name"


# SVG within a page.


@pytest.fixture
def some_figures(sweep):
    return [
        regularisation_path(sweep),
        shots_curve(points_of(1, 5)),
        confusion(np.eye(3, dtype=int) * 5 + 1, HOSTILE[:3]),
        accuracy_over_time([record_of("a", "probe", features_wall_s=3.0)]),
        learning_curves([tuned("a", (0.1, 0.2))]),
    ]


def test_an_svg_refers_to_nothing_outside_and_holds_no_script(some_figures):
    for figure in some_figures:
        text = svg(figure)
        root = ElementTree.fromstring(text)
        assert text.startswith("<svg") and "http" not in text.replace(SVG[1:-1], "")
        assert not {"script", "style", "image", "foreignObject", "metadata"} & {
            element.tag.removeprefix(SVG) for element in root.iter()
        }
        for element in root.iter():
            assert not [name for name in element.attrib if name.startswith("on")]
            assert element.get("href", "#").startswith("#")


def test_an_svg_takes_its_colours_from_the_page(some_figures):
    sheet = stylesheet()
    for figure in some_figures:
        text = svg(figure)
        colours = re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})\b", text)
        assert not colours, "a colour that the page cannot change"
        used = set(re.findall(r"--fc-\w+", text))
        assert {"--fc-text", "--fc-muted", "--fc-1"} <= used
        assert all(f"{name}:" in sheet for name in used)
    assert COLOURS["light"].keys() == COLOURS["dark"].keys()
    assert "prefers-color-scheme:dark" in sheet
    values = list(COLOURS["light"].values())
    assert len(set(values)) == len(values), "a colour says which property it is"


def test_a_saved_svg_has_plain_colours_and_a_dark_form(tmp_path, sweep):
    (path,) = save_figure(regularisation_path(sweep), tmp_path / "path.svg")
    text = path.read_text(encoding="utf-8")
    light, dark = (COLOURS[scheme]["--fc-1"] for scheme in ("light", "dark"))
    assert f"stroke: {light}" in text and "var(" not in text
    assert "@media screen and (prefers-color-scheme:dark)" in text
    assert f'[style*="stroke: {light}"]{{stroke:{dark} !important}}' in text
    root = ElementTree.parse(path).getroot()
    surface = COLOURS["light"]["--fc-surface"]
    assert any(f"fill: {surface}" in (one.get("style") or "") for one in root.iter()), "and paper"


def test_no_line_crosses_the_numbers_of_bars():
    figure = per_class((0.72, 0.74, 0.76), ["ant", "bee", "cat"])
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    right = axes.transData.transform((1, 0))[0]
    assert all(text.get_window_extent(renderer).x0 > right for text in axes.texts)


def test_screen_readers_get_title_and_words(some_figures):
    for figure in some_figures:
        root = xml(figure)
        title, _, words = root.get("aria-label").partition(". ")
        assert root.get("role") == "img" and "viewBox" in root.attrib
        assert len(words) > 20 and title.split(":")[0] in " ".join(shown(root))


def test_ids_of_figures_in_one_page_do_not_meet(some_figures):
    seen = set()
    for figure in some_figures:
        root = xml(figure)
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids)) and not seen & set(ids)
        seen |= set(ids)
        referred = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg(figure)))
        assert referred <= set(ids)


# Files.


def test_files_are_the_same_every_time(tmp_path, sweep):
    import matplotlib

    def digests(folder):
        figure = regularisation_path(sweep)
        written = save_figure(figure, tmp_path / folder / "path")
        assert [path.name for path in written] == ["path.png", "path.svg"]
        again = save_figure(figure, tmp_path / folder / "again")
        for one, other in zip(written, again, strict=True):
            assert one.read_bytes() == other.read_bytes()
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in written]

    first = digests("a")
    theirs = {"axes.facecolor": "red", "savefig.bbox": "tight", "font.size": 30, "lines.color": "y"}
    with matplotlib.rc_context(theirs):
        assert digests("b") == first, "what a user has set for figures of their own"
        assert matplotlib.rcParams["font.size"] == 30, "and it stays set"
    svg = (tmp_path / "a" / "path.svg").read_text(encoding="utf-8")
    assert "<dc:date>" not in svg and "var(" not in svg and "#ffffff" in svg
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]


def test_the_suffix_says_the_format(tmp_path, sweep):
    figure = regularisation_path(sweep)
    (png,) = save_figure(figure, tmp_path / "new" / "a.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    (svg,) = save_figure(figure, tmp_path / "a.SVG")
    assert ElementTree.parse(svg).getroot().tag == f"{SVG}svg"
    assert len(save_figure(figure, tmp_path / "resnet-0.5")) == 2
    with pytest.raises(OutputError, match=r"ends in \.png or \.svg"):
        save_figure(figure, tmp_path / "a.pdf")
    with pytest.raises(OutputError, match="found a folder"):
        check_plot(tmp_path)
    (tmp_path / "file").write_text("")
    for attempt in (check_plot, lambda place: save_figure(figure, place)):
        with pytest.raises(OutputError):
            attempt(tmp_path / "file" / "a.png")


def test_figures_need_no_pyplot_and_no_display():
    code = (
        "import sys\n"
        "from featcache.reporting.figures import per_class\n"
        "from featcache.reporting.style import svg\n"
        "assert 'matplotlib' not in sys.modules\n"
        "svg(per_class((0.5, 0.6), ['a', 'b']))\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


# On the command line.


@pytest.fixture
def matplotlib_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def test_without_matplotlib_the_line_says_what_to_install(matplotlib_missing, capsys, tmp_path):
    with pytest.raises(EngineUnavailableError, match=r"pip install 'featcache\[report\]'"):
        per_class((0.5,), ["a"])
    for command in (["probe", "no.h5"], ["compare"], ["finetune", "no-such-data"]):
        assert main([*command, "--plot", str(tmp_path / "a.png")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "featcache[report]" in line, "before anything else is done, or found missing"
    assert not list(tmp_path.glob("*.png"))


def test_a_path_that_cannot_be_written_is_an_error_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for command in (["probe", "no.h5"], ["compare"], ["finetune", "no-such-data"]):
        assert main([*command, "--plot", str(tmp_path / "file" / "a.png")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "a.png" in line and "name another place" in line


def test_probe_plots_its_penalty_and_its_classes(capsys, tmp_path):
    cache = write_gaussian_cache(tmp_path / "g.h5", spread=2.0)
    plot = tmp_path / "probe.svg"
    assert main(["probe", str(cache), "--plot", str(plot), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("{") and captured.err.splitlines()[-1] == f"figure: {plot}"
    written = shown(ElementTree.parse(plot).getroot())
    for words in ("Confusion matrix", "Choosing C", "Reliability diagram"):
        assert words in written
    assert written.count("class 1") == 3, "on both sides of the matrix and at its bar"
    assert main(["probe", str(cache), "--solver", "ridge", "--plot", str(plot)]) == 0
    assert "Reliability diagram" not in shown(ElementTree.parse(plot).getroot())


def test_curves_and_comparisons_are_plotted(capsys, tmp_path):
    cache = write_gaussian_cache(tmp_path / "g.h5", spread=2.0)
    for form in (("--shots", "1,5,full"), ("--learning-curve",)):
        plot = tmp_path / "curve"
        assert main(["probe", str(cache), *form, "--seeds", "2", "--plot", str(plot)]) == 0
        assert plot.with_suffix(".svg").exists() and plot.with_suffix(".png").exists()
    assert main(["probe", str(cache), "--no-check"]) == 0
    assert main(["compare", "--plot", str(tmp_path / "c.svg")]) == 0
    assert "probe lbfgs" in " ".join(shown(ElementTree.parse(tmp_path / "c.svg").getroot()))
    assert main(["probe", str(cache), "--knn", "3", "--plot", str(plot)]) == 2
    assert "--plot: has no effect with --knn" in capsys.readouterr().err


@pytest.mark.oneflow
def test_finetune_plots_its_epochs(capsys, tmp_path, image_folder):
    options = ("--weights", "tinyimagenet32", "--size", "32", "--epochs", "2", "--method", "frozen")
    plot = tmp_path / "f.svg"
    assert main(["finetune", str(image_folder), *options, "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train loss [▁█]{2} \d\.\d+ to \d", out) and "test top-1 " in out
    written = shown(ElementTree.parse(plot).getroot())
    assert "training loss" in written and "frozen" in " ".join(written)


def test_an_overview_has_what_the_record_has(tmp_path):
    from featcache import probe

    cache = load(write_gaussian_cache(tmp_path / "g.h5", spread=2.0))
    result = probe(cache, C=1.0, check=False)
    assert len(probe_overview(result, cache.class_names).axes) == 4, "no sweep"
    from featcache.runs import load_runs

    (record,), _ = load_runs(result.run.parent)
    assert record["class_names"] == list(cache.class_names)
    assert svg(probe_overview(record, record["class_names"])) == svg(
        probe_overview(result, cache.class_names)
    )
    bare = {**record, "evaluation": {}}
    with pytest.raises(FeatcacheError, match="there is only the top-1"):
        probe_overview(bare, record["class_names"])
