"""What a run predicted, kept beside its record, and `featcache errors`, which shows the worst."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest

import featcache
from featcache.cli import main
from featcache.errors import FeatcacheError
from featcache.probes.outcomes import label_outcomes, number_outcomes, outcomes_of_scores
from featcache.runs import load_predictions, save_predictions


@pytest.fixture
def probed(small_cache, tmp_path):
    return featcache.probe(small_cache, C=0.1, check=False, runs=tmp_path / "runs")


def test_a_probe_keeps_every_prediction(probed, small_cache):
    columns = load_predictions(probed.run)
    cache = featcache.load(small_cache)
    assert columns["id"] == list(cache.test.ids)
    assert np.mean(columns["correct"]) == probed.top1
    head = featcache.load_head(probed.head)
    shares = head.probabilities(cache.test.features)
    np.testing.assert_allclose(columns["probability"], shares.max(axis=1), rtol=1e-5)
    own = shares[np.arange(len(shares)), cache.test.labels]
    np.testing.assert_allclose(columns["label_probability"], own, rtol=1e-5, atol=1e-12)
    assert columns["label"] == [cache.class_names[label] for label in cache.test.labels]


def test_the_worst_come_first(probed):
    found = featcache.worst_errors(probed.run, top=3)
    columns = load_predictions(probed.run)
    wrong = [e for e, right in zip(columns["error"], columns["correct"], strict=True) if not right]
    assert [one.error for one in found.worst] == sorted(wrong, reverse=True)[:3]
    assert found.n_wrong == len(wrong) == sum(n for *_, n in found.confused)
    assert found.n == probed.n_test


def test_without_pyarrow_it_is_a_csv_file_with_the_same_content(tmp_path, monkeypatch):
    scores = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    names = ["кошка", 'a "b", c', "d\ne"]
    ids = [f"{n}\udcff.jpg" for n in range(5)]
    columns = outcomes_of_scores(ids, np.arange(5) % 3, scores, names, calibrated=True)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert save_predictions(tmp_path / "one", columns).suffix == ".parquet"
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        assert save_predictions(tmp_path / "two", columns).suffix == ".csv"
    assert load_predictions(tmp_path / "two") == load_predictions(tmp_path / "one")


@pytest.mark.parametrize(
    "damage", [b"", b"PAR1", b"id,split\n1,2,3\n", b"\xff\xfe", b'id,"\x00'], ids=range(5)
)
@pytest.mark.parametrize("name", ["predictions.parquet", "predictions.csv"])
def test_a_damaged_file_is_one_line(tmp_path, damage, name):
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(FeatcacheError, match="expected the predictions of a run"):
        load_predictions(tmp_path)


def test_labels_and_numbers_have_an_error_too():
    targets = np.array([[1, 0], [0, -1]], np.int8)
    shares = np.array([[0.9, 0.2], [0.7, 0.5]])
    columns = label_outcomes(["a", "b"], targets, shares, np.array([0.5, 0.5]), ["x", "y"])
    assert columns["label"] == ["x", ""]
    assert columns["prediction"] == ["x", "x; y"]
    assert columns["correct"].tolist() == [True, False]
    np.testing.assert_allclose(columns["error"], [0.2, 0.7])
    numbers = number_outcomes(["a", "b"], np.array([[1.0], [2.0]]), np.array([[1.5], [2.0]]), ["x"])
    assert numbers["error"][0] > numbers["error"][1] == 0


def test_the_page_shows_images_and_escapes_names(probed, tmp_path, monkeypatch, capsys):
    columns = load_predictions(probed.run)
    columns["prediction"] = ["<script>alert(1)</script>"] * len(columns["id"])
    columns["correct"] = np.zeros(len(columns["id"]), bool)
    (probed.run / "predictions.parquet").unlink()
    save_predictions(probed.run, columns)
    page = tmp_path / "errors.html"
    assert main(["errors", str(probed.run), "--html", str(page), "--top", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["n_wrong"] == probed.n_test
    assert len(facts["worst"]) == 4
    text = page.read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4
    assert text.count("data:image/webp") == 4 or facts["notes"]


def test_wrong_arguments_are_one_line(probed, tmp_path):
    with pytest.raises(FeatcacheError, match="expected a run"):
        featcache.worst_errors(tmp_path / "nothing")
    with pytest.raises(FeatcacheError, match="expected images with the label 'zebra', found"):
        featcache.worst_errors(probed.run, label="zebra")
    with pytest.raises(FeatcacheError, match="expected a run with predictions, found none"):
        featcache.worst_errors(runs=tmp_path / "empty")
    assert featcache.worst_errors(runs=tmp_path / "runs").run == probed.run
