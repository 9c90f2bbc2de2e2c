"""Backbones on the same images: pairs, the cheapest that is good enough, and nothing twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import write_gaussian_cache

from featcache import load, report, survey
from featcache.cli import main
from featcache.errors import CacheMismatchError, FeatcacheError, RecipeError
from featcache.runs import load_runs
from featcache.store.cache import Cache
from featcache.surveying import joined

QUICK = {"shots": (1, 5), "seeds": 2, "k": 5}


def cache_of(path, name, *, rate, **more):
    facts = {"backbone": name, "images_per_s": rate}
    return write_gaussian_cache(path / f"{name}.h5", n_test=600, **facts, **more)


@pytest.fixture
def caches(tmp_path):
    """A slow backbone, a fast one that is about as good, and one that is the fastest and bad."""
    return [
        cache_of(tmp_path, "large", rate=10.0, dim=32, spread=2.6),
        cache_of(tmp_path, "small", rate=100.0, dim=32, spread=2.6, seed=1),
        cache_of(tmp_path, "tiny", rate=1000.0, dim=2, spread=4.0),
    ]


def test_the_cheapest_that_is_not_significantly_worse_is_named(caches):
    result = survey(caches=caches, **QUICK)
    rows = {row.name.split()[0]: row for row in result.rows}
    assert [row.probe.top1 for row in result.rows] == sorted(
        (row.probe.top1 for row in result.rows), reverse=True
    )
    assert rows["tiny"].is_worse and rows["tiny"].vs_best.p_value < 0.001
    good = [row for row in result.rows if not row.is_worse]
    assert result.cheapest == max(good, key=lambda row: row.images_per_s).name
    assert result.best == result.rows[0].name and result.rows[0].vs_best is None
    assert result.cheapest.startswith("small") and not rows["large"].is_worse
    small = rows["small"]
    assert (small.feature_dim, small.bytes_per_image) == (32, 128)
    assert [one.shots for one in small.few_shot] == [1, 5] and small.knn.k == 5
    versus = rows["tiny"].vs_best
    assert versus.difference == pytest.approx(result.rows[0].probe.top1 - rows["tiny"].probe.top1)


def test_answers_that_are_there_are_not_asked_again(caches, tmp_path):
    first = survey(caches=caches[:2], **QUICK)
    n_runs = len(list((tmp_path / "cache" / "runs").iterdir()))
    again = survey(caches=caches[:2], **QUICK)
    assert (first.n_reused, again.n_reused) == (0, 6)
    assert again.rows == first.rows
    assert len(list((tmp_path / "cache" / "runs").iterdir())) == n_runs + 1, "only its own record"
    more = survey(caches=caches, **{**QUICK, "k": 3})
    assert more.n_reused == 4, "of the first two, only k-NN is another question"
    # Without its run's predictions a head cannot be compared: it is trained again.
    (tmp_path / "cache" / "runs" / first.rows[0].probe.run / "predictions.parquet").unlink()
    assert survey(caches=caches[:2], **QUICK).n_reused == 5


def test_an_interrupted_survey_keeps_its_answers(caches, tmp_path):
    def stop(progress):
        if progress.stage == "few-shot":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survey(caches=caches[:2], **QUICK, on_progress=stop)
    (record,) = [
        one for one in load_runs(tmp_path / "cache" / "runs")[0] if one["kind"] == "survey"
    ]
    assert len(record["answers"]) == 2 and record["rows"] == []
    assert survey(caches=caches[:2], **QUICK).n_reused == 2


def test_a_cache_of_reused_rows_has_the_rate_of_the_one_beside_it(caches, tmp_path):
    reused = write_gaussian_cache(
        tmp_path / "again.h5", dim=32, backbone="large", images_per_s=0.0, n_train=90, n_test=600
    )
    rows = survey(caches=[reused, caches[1]], **QUICK).rows
    assert {row.name.split()[0]: row.images_per_s for row in rows} == {"large": 10, "small": 100}


def test_another_labelling_is_another_question(caches, tmp_path):
    ids = [name for _, split in load(caches[0]).splits() for name in split.ids]
    table = tmp_path / "labels.csv"

    def write(parity):
        lines = [f"{name},{'odd' if row % 2 == parity else 'even'}" for row, name in enumerate(ids)]
        table.write_text("id,kind\n" + "\n".join(lines) + "\n")

    write(0)
    asked = {"caches": caches[:2], "labels": table, "target": "kind", **QUICK}
    result = survey(**asked)
    assert result.question["target"] == "kind" and max(row.probe.top1 for row in result.rows) < 0.65
    assert survey(**asked).n_reused == 6
    write(1)
    assert survey(**asked).n_reused == 0, "the table has other labels now"


def test_pairs_side_by_side(caches):
    result = survey(caches=caches[:2], concat=True, **QUICK)
    assert len(result.rows) == 3
    (pair,) = [row for row in result.rows if " + " in row.name]
    assert pair.feature_dim == 64 and pair.images_per_s == pytest.approx(1 / (1 / 10 + 1 / 100))
    assert result.best == pair.name, "independent noise: two see more than one"
    assert all(row.is_worse for row in result.rows if row is not pair)


def test_joined_features_are_matched_by_id_and_count_the_same(caches, tmp_path):
    first = load(caches[0])
    generator = np.random.default_rng(3)
    names = [name for _, split in first.splits() for name in split.ids]
    labels = np.concatenate([split.labels for _, split in first.splits()])
    sides = [role for role, split in first.splits() for _ in split.ids]
    order = generator.permutation(len(names))
    other = Cache.from_arrays(
        (np.arange(len(names))[:, None] * [1.0, -50.0] + 7)[order],
        labels[order],
        ids=[names[row] for row in order],
        splits=[sides[row] for row in order],
        class_names=first.class_names,
        path=tmp_path / "other.h5",
    )
    both = joined(first, other)
    assert both.train.features.dtype == np.float32
    ours, theirs = np.split(both.train.features, [32], axis=1)
    assert np.allclose((ours**2).sum(axis=1).mean(), 17, rtol=1e-4)
    assert np.allclose((theirs**2).sum(axis=1).mean(), 17, rtol=1e-4)
    rows = np.arange(len(first.train))
    standard = (rows - rows.mean()) / rows.std() * np.sqrt(17 / 2)
    assert np.allclose(theirs[:, 0], standard, atol=1e-4)
    assert np.allclose(theirs[:, 1], -standard, atol=1e-4)
    assert first.train.features.shape[1] == 32, "the caches themselves are as they were"


def test_other_test_images_do_not_compare(caches, tmp_path):
    other = write_gaussian_cache(tmp_path / "other.h5", n_test=30, backbone="other")
    with pytest.raises(CacheMismatchError, match=r"expected the 600 test images .* found 30 of"):
        survey(caches=[caches[0], other], **QUICK)


def test_backbones_are_extracted_and_one_that_cannot_run_is_left_out(
    image_folder, fake_engine, tmp_path
):
    notes = []
    result = survey(
        image_folder,
        backbones=("resnet18", "resnet18", "resnet18"),
        weights=("random:1", "tinyimagenet32", tmp_path / "none.safetensors"),
        size=(32,),
        shots=(1, 100),
        k=50,
        on_note=notes.append,
    )
    assert sorted(row.name for row in result.rows) == [
        "resnet18 random:1 32 px",
        "resnet18 tinyimagenet32 32 px",
    ]
    assert result.rows[0].knn.k == 36, "there are no more training images"
    assert [one.shots for one in result.rows[0].few_shot] == [1]
    assert any("none.safetensors" in one and "left out" in one for one in notes)
    assert any("has 12 training images" in one for one in result.notes)
    with pytest.raises(FeatcacheError, match=r"none\.safetensors"):
        survey(image_folder, backbones=("resnet18",) * 2, weights=(tmp_path / "none.safetensors",))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbones": ("resnet18",)}, "two backbones or more, found 1"),
        ({"backbones": ("resnet18", "resnet34")}, "the data set of these backbones, found none"),
        ({"backbones": ("resnet18",) * 3, "size": (32, 64)}, "one for each of 3, found 2"),
        ({"backbones": ("resnet18", "resnet19")}, "resnet19"),
        ({"caches": ("a", "b"), "k": 0}, "k: expected at least 1"),
        ({"caches": ("a", "b"), "shots": (0,)}, "shots: expected numbers from 1"),
    ],
)
def test_wrong_options_are_said_first(options, words):
    with pytest.raises(RecipeError, match=words):
        survey(**options)


def test_command_figure_and_report(caches, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "80")
    words = ["survey", "--knn", "5", "--shots", "1,5", "--seeds", "2"]
    for cache in caches:
        words += ["--cache", str(cache)]
    assert main([*words, "--plot", str(tmp_path / "survey.png")]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-2])) <= 80, shown
    assert "5-shot" in shown and "<0.001" in shown
    assert "small none 64 px: the cheapest that is not significantly worse than large none 64" in (
        " ".join(shown.split())
    )
    assert (tmp_path / "survey.png").stat().st_size > 1000
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 3 and result["n_reused"] == 9
    pytest.importorskip("bokeh")
    made = report(caches[0], runs=tmp_path / "cache" / "runs", health=False, thumbnails="none")
    assert "survey.svg" in [path.name for path in made.figures]
    assert "Backbones on the same test images" in made.page.read_text()


ODD = [None, True, -1, 10**400, float("nan"), "\0", [], {}, [1], {"top1": "x"}]


def test_no_field_of_a_record_stops_those_who_draw_it(caches, tmp_path):
    pytest.importorskip("matplotlib")
    from featcache.reporting.figures import backbones_compared

    survey(caches=caches[1:], **QUICK)
    runs = tmp_path / "cache" / "runs"
    (whole,) = [one for one in load_runs(runs)[0] if one["kind"] == "survey"]
    path = tmp_path / "odd" / "1" / "run.json"
    path.parent.mkdir(parents=True)
    n_left_out = 0
    for name in whole["rows"][1]:
        for odd in ODD:
            rows = [whole["rows"][0], {**whole["rows"][1], name: odd}]
            path.write_text(json.dumps({**whole, "rows": rows}))
            records, problems = load_runs(path.parents[1])
            n_left_out += len(problems)
            if records and name in ("name", "knn", "probe", "few_shot", "vs_best", "images_per_s"):
                assert backbones_compared(records[0]["rows"])
    assert n_left_out > 40


def test_a_damaged_record_is_asked_again(caches, tmp_path):
    result = survey(caches=caches[:2], **QUICK)
    path = result.run / "run.json"
    record = json.loads(path.read_text())
    for answers in record["answers"].values():
        answers[0]["top1"] = "high"
    path.write_text(json.dumps(record))
    assert survey(caches=caches[:2], **QUICK).n_reused == 0
