"""`precision="int8"`: scaled by training images, measured beside float32, one ingredient more."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
from engine_features import noise

import featcache
from featcache.backbones import choice as choosing
from featcache.backbones.choice import choose_engine
from featcache.backbones.conversion import agreement
from featcache.backbones.engine import build_engine
from featcache.datasets.dataset import Dataset
from featcache.errors import DatasetError, EngineUnavailableError
from featcache.extraction import precision
from featcache.preprocess import upscale

needs_nncf = pytest.mark.skipif(
    importlib.util.find_spec("nncf") is None or importlib.util.find_spec("openvino") is None,
    reason="needs nncf and OpenVINO",
)
SMALL = {"weights": "tinyimagenet32", "size": 32, "train_limit": 80, "test_limit": 30}


@pytest.fixture(scope="module")
def weights():
    return featcache.load_weights("tinyimagenet32")


def engine_of(weights, pixels, cuts=("avgpool",)):
    choice = choose_engine("openvino", precision="int8")
    return build_engine(replace(choice, calibration=pixels), weights, cuts)


def test_without_nncf_one_line_says_what_to_install(monkeypatch):
    missing = (None, "the package nncf is not installed; run pip install 'featcache[int8]'")
    monkeypatch.setattr(choosing, "nncf_status", lambda: missing)
    with pytest.raises(EngineUnavailableError, match=r"int8: .*featcache\[int8\]'"):
        featcache.extract("digits", precision="int8")


@pytest.mark.parametrize("engine", ["torch", "oneflow"])
def test_other_engines_do_not_offer_it(engine):
    with pytest.raises(EngineUnavailableError, match=r"int8: expected engine openvino, .* found"):
        choose_engine(engine, "cpu", "int8")


@needs_nncf
def test_an_image_gives_the_same_bytes_in_any_company(weights, capfd):
    scaled_by = noise(20)
    engine, another = (engine_of(weights, scaled_by, ("avgpool", "layer3")) for _ in range(2))
    images = noise(37)
    features = engine.extract(images)
    alone, again = engine.extract(images[5:6]), another.extract(images)
    for cut, array in features.items():
        np.testing.assert_array_equal(alone[cut], array[5:6])
        np.testing.assert_array_equal(again[cut], array)
    small = noise(3, 32)
    enlarged = upscale(small, weights.preprocess)
    np.testing.assert_array_equal(
        engine.extract(small)["avgpool"], engine.extract(enlarged)["avgpool"]
    )
    exact = build_engine(choose_engine("openvino"), weights, tuple(features)).extract(images)
    found = agreement(features, exact)
    assert 0.95 < found.cosine < 0.99999  # close, and not float32 by another name
    assert capfd.readouterr() == ("", "")  # nncf draws bars of progress


@needs_nncf
def test_extraction_says_what_it_changes_and_decides_once(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_MEASURED_S", 0.0)
    notes = []
    options = {**SMALL, "precision": "int8", "on_note": notes.append, "output": tmp_path}
    made = featcache.extract("digits", **options)
    evidence = made.precision_evidence
    assert made.precision == evidence["chosen"] == "int8" and evidence["why"] in notes
    assert 0.95 < evidence["tried"]["int8"]["least_cosine"] < 1 and evidence["n_images"] == 40
    meta = made.load().meta
    assert json.loads(json.dumps(evidence)) == meta["precision_evidence"]
    assert "nncf" in meta["engine_version"] and len(meta["calibration"]) == 64
    notes.clear()
    again = featcache.extract("digits", **options)
    assert again.reused and evidence["why"] not in notes


@needs_nncf
@pytest.mark.slow
def test_the_same_images_scale_alike_and_others_in_another_way(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_MEASURED_S", 0.0)
    options = {**SMALL, "precision": "int8", "output": tmp_path}
    made = featcache.extract("digits", **options)
    features = np.array(made.load().train.features)
    forced = featcache.extract("digits", **options, force=True, reuse=False)
    assert forced.fingerprint == made.fingerprint
    np.testing.assert_array_equal(forced.load().train.features[:], features)
    fewer = featcache.extract("digits", **{**options, "train_limit": 60})
    assert fewer.reused_rows == 0, "rows of another scale"
    assert fewer.load().meta["calibration"] != made.load().meta["calibration"]


@needs_nncf
@pytest.mark.slow
def test_jobs_make_what_one_process_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_MEASURED_S", 0.0)
    options = {**SMALL, "precision": "int8"}
    whole = featcache.extract("digits", **options, output=tmp_path / "whole.h5").load()
    for index in (1, 2):
        featcache.extract_share(
            "digits", share=(index, 2), **options, output=tmp_path / "jobs.shards"
        )
    packed = featcache.load(featcache.pack(tmp_path / "jobs.shards").cache)
    assert packed.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(packed.test.features[:], whole.test.features[:])


@needs_nncf
@pytest.mark.slow
def test_a_head_on_them_predicts_in_float32_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_MEASURED_S", 0.0)
    options = {"weights": "tinyimagenet32", "size": 32, "precision": "int8"}
    made = featcache.extract("digits", **options, output=tmp_path)
    run = featcache.probe(made.cache, check=False, runs=tmp_path / "runs")
    head = featcache.load_head(run.run / "head.safetensors")
    assert head.ingredients["calibration"] == made.load().meta["calibration"]
    exact = featcache.extract("digits", **{**options, "precision": "f32"}, output=tmp_path)
    found = featcache.evaluate_head(head, exact.cache)
    assert found.notes and any("precision: head 'int8', here 'f32'" in one for one in found.notes)
    assert abs(found.top1 - run.top1) < 0.02


@needs_nncf
def test_too_few_images_to_scale_by(tmp_path):
    data = featcache.load_dataset("digits")
    few = Dataset(data.name, data.train.take(np.arange(20)), data.test, "few")
    with pytest.raises(DatasetError, match=r"at least 32 training images that decode, .* found 20"):
        featcache.extract(few, weights="tinyimagenet32", precision="int8", output=tmp_path)
