"""`precision="auto"`: decided by the user's own images, recorded, and decided once."""

from __future__ import annotations

import json

import numpy as np
import pytest

import featcache
from featcache.backbones.choice import choose_engine, native_precisions
from featcache.errors import RecipeError
from featcache.extraction import extract as extraction
from featcache.extraction import precision
from featcache.extraction.precision import _same_votes, chosen_of
from featcache.frameworks import openvino_status

needs_openvino = pytest.mark.skipif(openvino_status()[0] is None, reason="needs OpenVINO")
SMALL = {"weights": "tinyimagenet32", "size": 32, "train_limit": 60, "test_limit": 30}


def found(images_per_s, least_cosine=0.99999, same_votes=1.0):
    return {
        "images_per_s": images_per_s,
        "least_cosine": least_cosine,
        "same_votes": same_votes,
    }


@pytest.mark.parametrize(
    ("bf16", "f16", "chosen"),
    [
        (found(200), found(190), "bf16"),
        (found(200, 0.9998), found(190), "f16"),
        (found(200, same_votes=0.98), found(104), "f32"),
        (found(200, same_votes=None), None, "bf16"),
        (None, None, "f32"),
    ],
)
def test_the_fastest_precision_that_changes_nothing_is_taken(bf16, f16, chosen):
    others = {name: one for name, one in (("bf16", bf16), ("f16", f16)) if one}
    evidence = chosen_of({"f32": {"images_per_s": 100.0}, **others}, 256)
    assert evidence["chosen"] == chosen
    assert evidence["why"].startswith(f"precision {chosen}, by 256 of the images: ")
    if chosen == "bf16":
        assert "2.00 times as fast as f32 (200 images per second against 100)" in evidence["why"]
    if chosen == "f16":
        assert evidence["why"].endswith("100.0% of the 10-NN votes the same: a cosine below 0.9999")


def test_votes_are_of_labelled_images_alone():
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = np.eye(3)[labels] + generator.normal(0, 0.1, (60, 3))
    assert _same_votes(features, 2 * features, labels) == 1
    turned = features.copy()
    turned[0] = features[1]
    assert _same_votes(turned, features, labels) == pytest.approx(59 / 60)
    assert _same_votes(features, features, np.full(60, -1)) is None


@needs_openvino
def test_auto_is_recorded_and_decided_once(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_MEASURED_S", 0.0)
    notes = []
    options = {**SMALL, "engine": "openvino", "precision": "auto", "on_note": notes.append}
    made = featcache.extract("digits", output=tmp_path / "auto", **options)
    evidence = made.precision_evidence
    assert evidence["why"] in notes and evidence["chosen"] == made.precision
    assert json.loads(json.dumps(evidence)) == made.load().meta["precision_evidence"]
    native = native_precisions(choose_engine("openvino"))
    if len(native) > 1:
        assert evidence["n_images"] == 60 and set(evidence["tried"]) == set(native)
    notes.clear()
    again = featcache.extract("digits", output=tmp_path / "auto", **options)
    assert again.reused and again.precision_evidence == evidence
    assert evidence["why"] not in notes
    options["precision"] = made.precision
    plain = featcache.extract("digits", output=tmp_path / "plain", **options)
    assert plain.precision_evidence is None and plain.fingerprint == made.fingerprint
    same = plain.load().train.features == made.load().train.features
    assert np.all(same)


def test_jobs_are_told_to_name_a_precision():
    with pytest.raises(RecipeError, match="expected f32, bf16, f16 or int8 for one of many jobs"):
        featcache.extract_share("digits", share=(1, 2), precision="auto")


@needs_openvino
def test_a_long_run_in_f32_suggests_bf16_where_it_is_native(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "_LONG_S", 0.0)
    notes = []
    options = {**SMALL, "engine": "openvino", "on_note": notes.append, "output": tmp_path}
    featcache.extract("digits", **options)
    native = "bf16" in native_precisions(choose_engine("openvino"))
    assert any("bf16 is native here: --precision auto" in note for note in notes) == native
    notes.clear()
    featcache.extract("digits", **options)
    assert not any("--precision auto" in note for note in notes)
