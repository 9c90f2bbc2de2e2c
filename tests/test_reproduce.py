"""The tutorial's experiment: the script, its records in docs/results and the tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "tinyimagenet32-64"
SCRIPT = ROOT / "benchmarks" / "reproduce.py"


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import results

    return results


@pytest.fixture
def records(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import reproduce

    records = {
        row.name: [
            json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{row.name}-?.json"))
        ]
        for row in reproduce.PLAN
    }
    return {name: runs for name, runs in records.items() if runs}


def test_the_readme_table_matches_the_records(results, records):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    folder = RESULTS.relative_to(ROOT).as_posix() + "/"
    assert results.table(records, folder, results.BRIEF) in readme
    assert results.table(records) in (RESULTS / "README.md").read_text(encoding="utf-8")


def test_records_cover_all_test_images_and_contain_no_paths(records):
    assert {"probe", "knn", "frozen", "full", "scratch"} <= set(records)
    for path in RESULTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert json.loads(text)["n_test"] == 10_000
        assert not re.search(r'"(/|[A-Z]:)|\\\\', text), f"{path.name} contains a path"


def test_method_3_is_the_same_from_the_cache_and_end_to_end(records):
    cached = [record["top1"] for record in records["probe-tutorial"]]
    (end_to_end,) = (record["top1"] for record in records["frozen"])
    assert abs(cached[0] - end_to_end) < 0.005  # one in f32, the other in bf16


def test_both_engines_reach_the_same_accuracy(records):
    """OneFlow in f32, PyTorch in bf16: seeds differ more than engines."""
    (oneflow,) = records["full-part"]
    same_seed, *others = records["full-part-torch"]
    assert len(others) == 2 and {oneflow["seed"], same_seed["seed"]} == {0}
    spread = max(abs(other["top1"] - same_seed["top1"]) for other in others)
    assert abs(oneflow["top1"] - same_seed["top1"]) <= max(spread, 0.003)
    for ours, theirs in zip(oneflow["epochs"], same_seed["epochs"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=2e-3)


def test_a_finished_trial_does_not_run_again(image_folder, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("openvino")
    command = [
        sys.executable,
        SCRIPT,
        image_folder,
        "--only",
        "features,probe,knn",
        "--images",
        "18",
    ]
    command += ["--size", "32", "--work", tmp_path / "work", "--results", tmp_path / "results"]

    def run():
        return subprocess.run(command, capture_output=True, text=True, check=True)

    first = run()
    assert [line.split(",")[0] for line in first.stderr.splitlines() if ", seed " in line] == [
        "features",
        "probe",
        "knn",
    ]
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"README.md", "features-0.json", "knn-0.json", "methods.svg", "probe-0.json"}
    second = run()
    assert second.stderr == "" and second.stdout == first.stdout
    assert "10 nearest neighbours" in first.stdout


def test_an_unknown_row_is_refused(tmp_path):
    command = [sys.executable, SCRIPT, "x.zip", "--only", "prob", "--work", tmp_path]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "found prob" in answer.stderr
