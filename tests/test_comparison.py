"""Runs side by side: their order, and the price of each point gained over a probe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from featcache import compare
from featcache.cli import commands as _comparison_output
from featcache.cli.output import sparkline
from featcache.errors import FeatcacheError
from featcache.reporting.commands import run_command
from featcache.reporting.judged import Probe
from featcache.reporting.page import probe_words, rows, tiles_of
from featcache.reporting.selection import Group, Run
from featcache.runs import (
    CURVES,
    epochs_of,
    fold,
    load_runs,
    price,
    run_labels,
    save_predictions,
)


def record_of(run, kind="finetune", top1=0.5, wall_s=100.0, **more):
    return {
        "run": run,
        "kind": kind,
        "method": "full" if kind == "finetune" else "probe lbfgs",
        "top1": top1,
        "top1_interval": [top1 - 0.01, top1 + 0.01],
        "n_epochs": 3,
        "n_train": 900,
        "n_test": 1000,
        "images_per_s": 50.0,
        "wall_s": wall_s,
        "dataset": "colours",
        "dataset_digest": "d" * 64,
        "weights": "imagenet",
        "size": 64,
        **more,
    }


@pytest.fixture
def runs(tmp_path):
    def write(*records):
        for record in records:
            folder = tmp_path / record["run"]
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps(record))
        return tmp_path

    return write


def prices(folder):
    return {record["run"]: record["s_per_point"] for record in compare(runs=folder)}


def test_the_price_is_seconds_per_point_over_the_best_probe(runs):
    folder = runs(
        record_of("a probe", "probe", 0.50, 2.0, features_wall_s=30.0),
        record_of("better probe", "probe", 0.60, 2.0),
        record_of("full", top1=0.65, wall_s=100.0),
        record_of("cached", top1=0.62, wall_s=10.0, features_wall_s=30.0),
        record_of("worse", top1=0.59),
        record_of("patient", top1=0.70, n_train=800, n_val=100),
        record_of("of fewer images", top1=0.9, n_train=90),
        record_of("of other pixels", top1=0.9, size=224),
    )
    result = prices(folder)
    assert result.pop("full") == pytest.approx(20.0)
    assert result.pop("cached") == pytest.approx(20.0), "features belong to its price"
    assert result.pop("patient") == pytest.approx(10.0), "its validation images are the probe's too"
    assert set(result.values()) == {None}


def test_runs_are_ordered_by_data_and_then_accuracy(runs):
    folder = runs(
        record_of("1", top1=0.5), record_of("2", top1=0.7), record_of("3", dataset="a", top1=0.1)
    )
    assert [record["run"] for record in compare(runs=folder)] == ["3", "2", "1"]
    assert [record["run"] for record in compare("a", runs=folder)] == ["3"]
    with pytest.raises(FeatcacheError, match="data set 'b', found those on a, colours; give one"):
        compare("b", runs=folder)
    with pytest.raises(FeatcacheError, match=r"found none; make one .*, or give another --runs"):
        compare("b", runs=folder / "1")


def test_the_table_fits_80_columns_and_labels_each_run(runs):
    more = {"recipe": {"freeze_until": "layer3"}, "cache": "c.h5", "init_head": "h.safetensors"}
    folder = runs(
        record_of("1", "probe", 0.5, n_train=50_000, n_test=10_000, features_wall_s=123.4),
        record_of("2", top1=0.7, n_train=50_000, n_test=10_000, wall_s=12345.6, **more),
    )
    console = Console(width=80, record=True, force_terminal=False)
    for table in _comparison_output.comparison_tables(compare(runs=folder)):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "617" in text and "123 + 100" in text and " - " in text
    assert "- for probes, without such a probe, and where nothing was gained" in " ".join(
        text.split()
    )
    for word in ("above", "layer3", "cached", "LP-FT"):
        assert word in text


def test_identical_runs_are_one_line_and_others_say_what_tells_them_apart(runs, monkeypatch):
    monkeypatch.setattr(_comparison_output, "width", lambda: 80)

    def probed(run, top1=0.5, **more):
        points = [{"C": 1.0, "score": 0.5, "converged": True}]
        sweep = {"C": 1.0, "points": points, "n_holdout": 9}
        return record_of(run, "probe", top1, created=run, sweep=sweep, seed=0, **more)

    records = compare(
        runs=runs(
            probed("1", C=1.0),
            probed("2", C=1.0),
            probed("3", C=1.0, top1=0.6),
            probed("4", C=0.1) | {"sweep": None},
            probed("5") | {"seed": 1},
            record_of("6", "knn", 0.4, method="knn, k = 5", distance="cosine"),
            record_of("7", "knn", 0.4, method="knn, k = 5", distance="euclidean"),
        )
    )
    assert sorted((label, record["run"]) for record, label in fold(records)) == [
        ("knn, k = 5, distance cosine", "6"),
        ("knn, k = 5, distance euclidean", "7"),
        ("probe lbfgs, C = 0.1", "4"),
        ("probe lbfgs, seed 0", "3"),
        ("probe lbfgs, seed 0 (2 runs)", "2"),
        ("probe lbfgs, seed 1", "5"),
    ]
    table, *_, legend = _comparison_output.comparison_tables(records)
    assert table.row_count == 6
    shown = [column.header for column in table.columns]
    assert shown == ["method", "top-1 % (95 %)", "wall s"], "no column is empty"
    assert "s/point" not in legend.plain


def test_a_wide_table_has_the_curve_of_each_fine_tune(runs, monkeypatch):
    epochs = [{"epoch": n, "train_loss": 1.0, "top1": n / 30} for n in range(1, 30)]
    folder = runs(record_of("1", "probe", epochs=[]), record_of("2", epochs=epochs, top1=0.7))

    def shown(width):
        monkeypatch.setattr(_comparison_output, "width", lambda: width)
        console = Console(width=width, record=True, force_terminal=False)
        for table in _comparison_output.comparison_tables(compare(runs=folder)):
            console.print(table)
        return console.export_text()

    assert "▁▁▂▃▄▅▅▆▇█" in shown(100) and "curve" in shown(100)
    assert "curve" not in shown(80)


def test_a_record_whose_interval_is_none_is_left_out_with_a_note(runs):
    folder = runs(record_of("1"), record_of("2", top1_interval=[None, 0.5]))
    notes = []
    assert [record["run"] for record in compare(runs=folder, on_note=notes.append)] == ["1"]
    assert len(notes) == 1 and "no usable top1_interval" in notes[0]


def test_labels_say_where_runs_differ():
    alike = [record_of("1", "probe"), record_of("2")]
    assert run_labels(alike) == ["probe lbfgs", "full"]
    scratch = record_of("3", weights="none", method="scratch")
    assert run_labels([*alike, scratch])[-1] == "scratch", "of weights it has none to differ in"
    differing = [
        record_of("1", "probe", scale="l2"),
        record_of("2", "probe", n_train=90, n_val=10),
        record_of("3", n_epochs=3),
        record_of("4", n_epochs=9),
        record_of("5", n_epochs=9, n_test=7),
    ]
    assert run_labels(differing) == [
        "probe lbfgs, 900 images",
        "probe lbfgs, 100 images",
        "full, 900 images, 3 epochs",
        "full, 900 images, 9 epochs, 1,000 test",
        "full, 900 images, 9 epochs, 7 test",
    ]
    scaled = [record_of("1", "probe", scale="l2"), record_of("2", "probe", size=224)]
    assert run_labels(scaled) == ["probe lbfgs, 64 px", "probe lbfgs, 224 px"]
    scaled = [record_of("1", "probe", scale="l2"), record_of("2", "probe")]
    assert run_labels(scaled) == ["probe lbfgs, l2", "probe lbfgs"]


def test_epochs_are_those_with_numbers():
    epoch = {"epoch": 1, "train_loss": 2.0, "top1": 0.5}
    assert epochs_of({"epochs": [epoch]}) == [epoch]
    for broken in (None, 3, [3], [{**epoch, "top1": "high"}], [{"epoch": 1}]):
        assert epochs_of({"epochs": broken}) == []


def test_a_sparkline_fits_what_it_is_written_to():
    assert sparkline([0, 1, 2], "utf-8") == "▁▄█"
    assert sparkline([0, 1, 2], "ascii") == "049" == sparkline([0, 1, 2], "latin-1")
    assert sparkline([0, 1, 2], "no such encoding") == "049"
    assert sparkline([3, 3], "utf-8") == "▁▁"
    assert sparkline([0, float("nan"), 1], "utf-8") == "▁ █"
    assert sparkline([], "utf-8") == "" == sparkline([float("nan")], "utf-8")
    assert sparkline(range(100), "utf-8", 8) == "▁▁▂▃▅▆▇█"


ODD = [
    None,
    True,
    -1,
    0,
    10**400,
    float("nan"),
    float("inf"),
    "x",
    "\0",
    [],
    {},
    [[]],
    [1],
    {"a": []},
]


@pytest.mark.parametrize("kind", ["finetune", "probe", "knn", "few-shot"])
def test_no_field_of_a_record_stops_those_who_read_it(kind, tmp_path):
    """Each field in turn has each odd value: the record is left out with a note, or is usable."""
    more = {
        "C": 0.1, "scale": "l2", "metric": "top1", "seed": 1, "seeds": 2, "k": 3, "n_val": 0,
        "recipe": {"lr": 0.1}, "check": {"agreement": 1.0}, "cuts": ["avgpool"], "target": "x",
        "sweep": {"C": 1.0, "n_holdout": 3, "points": [{"C": 1.0, "score": 0.6}]},
        "features_wall_s": 1.0, "cache": "a.h5", "test_cache": "a.h5", "created": "2026",
        "epochs": [{"epoch": 1, "train_loss": 1.0, "top1": 0.5}], "best_epoch": 1,
        "points": [{"interval": [0.1, 0.2], "mean": 0.1, "n_train": 3, "scores": [0.1]}],
        "curve_split": "val", "solver": "lbfgs", "init_head": None, "backbone": "resnet18",
    }  # fmt: skip
    whole = record_of("1", kind, **more)
    for name in whole:
        for odd in ODD:
            folder = tmp_path / f"{name}-{ODD.index(odd)}" / "1"
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps({**whole, name: odd}))
            records, problems = load_runs(folder.parent)
            assert len(records) + len(problems) == 1
            for record in records:
                use(record)


def use(record):
    """Do with a record what compare and report do."""
    run_command(record, None)
    run_labels([record])
    if record["kind"] in CURVES:
        return
    group = Group("x", "y", [Run(record, Path("1"))])
    rows(group)
    tiles_of(group, Probe(group.runs[0], None, "", 0), None, None)
    probe_words(Probe(group.runs[0], None, "", 0), None)
    price(record, [record])
    assert list(_comparison_output.comparison_tables([{**record, "s_per_point": None}]))


def keep_hits(folder, run, correct, ids=None, label="cat"):
    """Write predictions of test images, as a probe does."""
    n = len(correct)
    columns = {
        "id": ids or [f"{number}.png" for number in range(n)],
        "split": ["test"] * n,
        "label": [label] * n,
        "prediction": ["cat" if hit else "dog" for hit in correct],
        "correct": [bool(hit) for hit in correct],
        "error": [0.0 if hit else 1.0 for hit in correct],
    }
    save_predictions(folder / run, columns)


def test_runs_on_the_same_test_images_are_compared_image_by_image(runs):
    folder = runs(
        record_of("best", "probe", 0.9),
        record_of("near", "knn", 0.8, method="knn, k = 5"),
        record_of("other images", "probe", 0.7, scale="l2"),
        record_of("other labels", "probe", 0.7, scale="standardize"),
        record_of("tuned", top1=0.6),
    )
    keep_hits(folder, "best", [1, 1, 1, 1, 1, 1, 1, 1, 1, 0])
    keep_hits(folder, "near", [1, 1, 1, 1, 1, 0, 0, 0, 0, 1])
    keep_hits(folder, "other images", [1] * 10, ids=[f"{n}.jpg" for n in range(10)])
    keep_hits(folder, "other labels", [1] * 10, label="dog")
    records = compare(runs=folder)
    versus = {record["run"]: record["vs_best"] for record in records}
    near = versus.pop("near")
    assert (near["n_only_first"], near["n_only_second"], near["n"]) == (4, 1, 10)
    assert near["difference"] == pytest.approx(0.3)
    assert near["p_value"] == pytest.approx(2 * 6 / 32 - 5 / 32)
    assert set(versus.values()) == {None}, "no pairs without the same images and labels"
    console = Console(width=80, record=True, force_terminal=False)
    for shown in _comparison_output.comparison_tables(records):
        console.print(shown)
    text = console.export_text()
    assert "against probe lbfgs, on the same 10 test images (McNemar):" in text
    assert "  knn, k = 5: -30.00 points (" in text and "p = 0.219" in text
    assert "3 runs without predictions of these images" in text


def test_damaged_predictions_are_no_pairs(runs):
    folder = runs(record_of("best", "probe", 0.9), record_of("near", "probe", 0.8))
    keep_hits(folder, "best", [1, 0])
    (folder / "near" / "predictions.parquet").write_bytes(b"PAR1 but no table")
    assert [record["vs_best"] for record in compare(runs=folder)] == [None, None]


def test_a_copied_record_goes_by_the_name_of_its_folder(runs):
    folder = runs(record_of("a"), record_of("b"))
    (folder / "b" / "run.json").write_text(json.dumps(record_of("../../elsewhere", top1=0.9)))
    assert [record["run"] for record in compare(runs=folder)] == ["b", "a"]


def test_a_sweep_without_its_choice_is_left_out(runs):
    sweep = {"points": [{"C": 1.0, "score": 0.5}]}
    folder = runs(record_of("a"), record_of("b", "probe", sweep=sweep))
    records, (problem,) = load_runs(folder)
    assert [record["run"] for record in records] == ["a"] and "no usable sweep" in problem
