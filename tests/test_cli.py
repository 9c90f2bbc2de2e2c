"""The command line: JSON, exit codes, one line for every bad input, Ctrl-C."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from caches import SplitArrays, write_cache

import featcache
from featcache.cli import main
from featcache.cli.options import _ORDER
from featcache.cli.output import show, sparkline
from featcache.store.cache import load

STARTER = ("--weights", "tinyimagenet32")


def run(capsys, *arguments):
    """Run a command in this process: exit code, standard output, standard error."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments, code=1, begun=0):
    """Run a command that must fail with one line, after ``begun`` about its work; return it."""
    found, out, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.strip()]
    assert found == code, err
    assert out == "" and len(lines) == 1 + begun and lines[-1].startswith("error: "), err
    return lines[-1]


def test_version_and_help(capsys):
    assert run(capsys, "--version") == (0, f"featcache {featcache.__version__}\n", "")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in _ORDER:
        assert command in out
        assert run(capsys, command, "--help")[0] == 0
    code, out, err = run(capsys)
    assert code == 2 and "Usage" in out + err


def test_extract_json(capsys, image_folder, fake_engine):
    code, out, _ = run(capsys, "extract", image_folder, *STARTER, "--json")
    result = json.loads(out)
    assert code == 0
    assert {
        "cache", "reused", "n_rows", "feature_dim", "engine", "precision", "wall_s",
        "images_per_s", "fingerprint",
    } <= set(result)  # fmt: skip
    assert result["reused"] is False and result["n_rows"] == 54
    assert load(result["cache"]).fingerprint == result["fingerprint"]
    again = json.loads(run(capsys, "extract", image_folder, *STARTER, "--json")[1])
    assert again["reused"] is True and again["cache"] == result["cache"]
    code, out, _ = run(capsys, "extract", image_folder, *STARTER)
    assert code == 0 and "already there" in out


def test_info(capsys, small_cache):
    code, out, _ = run(capsys, "info", small_cache, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["n_train"] == 120 and facts["preprocess"]["size"] == 64
    code, out, _ = run(capsys, "info", small_cache)
    # Folded where there are fewer columns than it has digits.
    assert code == 0 and facts["fingerprint"] in "".join(out.split())


@pytest.mark.oneflow
def test_probe_finetune_and_compare_json(capsys, image_folder):
    assert run(capsys, "extract", image_folder, *STARTER, "--size", 32)[0] == 0
    probed = json.loads(run(capsys, "probe", "--json")[1])
    assert {
        "top1", "top1_interval", "n_train", "n_test", "solver", "wall_s", "head", "check",
    } <= set(probed)  # fmt: skip
    assert {"top1", "agreement", "wall_s"} <= set(probed["check"])
    code, out, _ = run(capsys, "probe", "--recipe", "tutorial")
    assert code == 0 and "Under-trained" in out and "scikit-learn" in out

    options = ("--size", 32, "--epochs", 1, "--train-limit", 24, "--method", "frozen", "--json")
    tuned = json.loads(run(capsys, "finetune", image_folder, *STARTER, *options)[1])
    assert {
        "method", "top1", "top1_interval", "epochs", "images_per_s", "wall_s", "checkpoint",
    } <= set(tuned)  # fmt: skip
    assert set(tuned["epochs"][0]) == {"epoch", "train_loss", "top1", "wall_s"}

    runs = json.loads(run(capsys, "compare", "--json")[1])
    methods = sorted(entry["method"] for entry in runs)
    assert methods == ["frozen", "probe lbfgs", "probe sgd"]
    assert [entry["top1"] for entry in runs] == sorted((e["top1"] for e in runs), reverse=True)
    for entry in runs:
        assert {"top1_interval", "images_per_s", "wall_s", "weights", "dataset"} <= set(entry)
    code, out, _ = run(capsys, "compare", "colours")
    assert code == 0 and "frozen" in out and "colours" in out


@pytest.mark.oneflow
def test_demo_is_the_whole_job(capsys, image_folder, tmp_path):
    limits = ("--train-limit", 18, "--test-limit", 9)
    folders = ("--runs", tmp_path / "my runs", "--data-root", tmp_path / "data")
    code, out, _ = run(capsys, "demo", image_folder, *limits, *folders)
    assert code == 0
    for command in ("extract", "probe", "finetune", "compare"):
        assert f"$ featcache {command}" in out
    table = out[out.index("$ featcache compare") :]
    assert "probe" in table and "split above layer3" in table and "LP-FT" in table
    assert f"compare colours --runs '{tmp_path / 'my runs'}'" in table
    assert len(list((tmp_path / "my runs").glob("*/run.json"))) == 3
    *_, split, lp_ft, fallback = table.splitlines()
    assert split.startswith("split ends ") and ", and takes 3 steps at the tutorial's rate" in split
    assert lp_ft.startswith("LP-FT ends ") and "at the probe's head" in lp_ft
    assert fallback.startswith("Fine-tuning is the fallback")


def test_the_demo_leaves_out_what_nothing_here_can_train(
    capsys, image_folder, fake_engine, monkeypatch
):
    from featcache import frameworks

    monkeypatch.setattr(frameworks, "oneflow_status", lambda: (None, "not here"))
    monkeypatch.setattr(frameworks, "torch_status", lambda: (None, "not here"))
    code, out, err = run(capsys, "demo", image_folder)
    assert code == 0 and "$ featcache compare colours" in out and "finetune" not in out
    lines = err.splitlines()
    (left_out,) = [line for line in lines if line.startswith("fine-tuning is left out")]
    (more,) = [line for line in lines if line.startswith("OneFlow would add")]
    assert "pip install 'featcache[torch]'" in left_out
    assert "pip install 'featcache[oneflow]'" in more


def test_doctor_says_what_is_there(capsys):
    code, out, _ = run(capsys, "doctor", "--no-network", "--json")
    findings = {finding["topic"]: finding for finding in json.loads(out)}
    topics = {"python", "cores", "packages", "oneflow", "openvino", "torch", "gpu", "blas"}
    assert code == 0 and set(findings) == {*topics, "engine"}
    assert sys.version.split()[0] in findings["python"]["detail"]
    assert all(finding["detail"] for finding in findings.values())


def test_doctor_tries_the_network():
    from featcache.doctor import examine

    (finding,) = [f for f in examine(urls=["http://127.0.0.1:9/x"]) if f.topic == "network"]
    assert not finding.usable and "127.0.0.1:9 does not answer" in finding.detail


def test_the_forms_of_a_probe(capsys, small_cache):
    code, out, _ = run(capsys, "probe", small_cache, "--per-class", "--confusion")
    assert code == 0 and "class 1" in out and "calibration error" in out
    assert "in 5 folds" in " ".join(out.split())
    code, out, _ = run(capsys, "probe", small_cache, "--knn", "1,5", "--json")
    assert code == 0 and [item["k"] for item in json.loads(out)] == [1, 5]
    code, out, _ = run(capsys, "probe", small_cache, "--shots", "1,5,full", "--seeds", 2, "--json")
    points = json.loads(out)
    assert code == 0 and [point["n_train"] for point in points] == [3, 15, 120]
    few = ("--shots", "2,full", "--seeds", 2, "--temperature", "inf", "--distance", "euclidean")
    code, out, _ = run(capsys, "probe", small_cache, "--knn", "1", "--mmap", *few)
    assert code == 0 and "shots" in out and "full" in out
    code, out, _ = run(capsys, "probe", small_cache, "--shots", "2", "--solver", "ridge", "--json")
    assert code == 0 and json.loads(out)[0]["weight_decays"]
    code, out, _ = run(capsys, "probe", small_cache, "--shots", "2", "--metric", "balanced")
    assert code == 0 and "balanced" in out
    code, out, _ = run(capsys, "probe", small_cache, "--no-check", "--C", 1, "--json")
    assert code == 0 and json.loads(out)["check"] is None


@pytest.mark.parametrize("columns", ["40", "120"])
def test_a_curve_is_shown_in_the_terminals_own_characters(small_cache, columns):
    assert sparkline([0, 1], "utf-8").startswith("▁")
    assert sparkline([0, 1], "cp1252").startswith("0")
    answer = subprocess.run(
        [sys.executable, "-m", "featcache", "probe", small_cache, "--shots", "1,5,full"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "COLUMNS": columns},
        check=True,
    )
    shown = answer.stdout.decode("ascii")
    (line,) = [line for line in shown.splitlines() if line.startswith("top1 ")]
    assert line.split()[1].startswith("0") and "\\u" not in shown and "\x1b" not in shown


def test_strict_refuses_an_under_trained_head_and_no_other(capsys, small_cache):
    assert run(capsys, "probe", small_cache, "--strict")[0] == 0
    if sys.version_info < (3, 11):
        code, out, _ = run(capsys, "probe", small_cache, "--recipe", "tutorial", "--strict")
        assert code == 1 and "Under-trained" in out


def test_a_head_is_measured_and_used(capsys, image_folder, fake_engine, monkeypatch, tmp_path):
    from featcache import prediction
    from featcache.extraction import extract as extraction

    monkeypatch.setattr(prediction, "choose_engine", extraction.choose_engine)
    monkeypatch.setattr(prediction, "build_engine", extraction.build_engine)
    head = tmp_path / "colours.safetensors"
    assert run(capsys, "extract", image_folder, *STARTER)[0] == 0
    trained = json.loads(run(capsys, "probe", "--save-head", head, "--json")[1])
    measured = json.loads(run(capsys, "probe", "--head", head, "--json")[1])
    assert measured["top1"] == trained["top1"] and measured["own_cache"] is True
    code, out, _ = run(capsys, "predict", image_folder / "test", "--head", head, "--json")
    answers = json.loads(out)
    assert (
        code == 0
        and len(answers) == 18
        and {"path", "class_name", "probability"} <= set(answers[0])
    )
    code, out, _ = run(capsys, "predict", image_folder / "test/red/00.png", "--head", head)
    assert code == 0 and "red" in out
    code, out, _ = run(capsys, "predict", image_folder / "test", "--head", head, "--format", "csv")
    assert (
        code == 0
        and out.splitlines()[0] == "path,class,probability"
        and len(out.splitlines()) == 19
    )
    said = refused(capsys, "predict", tmp_path / "none.png", "--head", head)
    assert "none.png" in said
    assert "expected a head" in refused(capsys, "predict", image_folder, "--head", tmp_path / "no")


# Each bad input of the project's list: one line, its exit code, nothing half-written.


def bad_folders(tmp_path, image_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    hollow = tmp_path / "hollow"
    shutil.copytree(image_folder, hollow)
    for file in (hollow / "train" / "red").iterdir():
        file.unlink()
    torn = tmp_path / "torn"
    shutil.copytree(image_folder, torn)
    (torn / "test" / "red" / "02.png").write_bytes(b"not an image")
    return empty, hollow, torn


def test_bad_data_sets(capsys, tmp_path, image_folder, fake_engine, home):
    empty, hollow, torn = bad_folders(tmp_path, image_folder)
    assert "nowhere: expected" in refused(capsys, "extract", tmp_path / "nowhere", *STARTER)
    assert "expected class folders" in refused(capsys, "extract", empty, *STARTER)
    assert "of which train/ has no image" in refused(capsys, "extract", hollow, *STARTER)
    kept = ("--on-error", "skip", "-o", tmp_path / "kept.h5")
    code, out, _ = run(capsys, "extract", torn, *STARTER, *kept)
    assert code == 0 and out.rstrip().endswith("; 1 image left out")
    code, out, err = run(capsys, "extract", torn, *STARTER)
    assert code == 1 and out == ""
    assert "torn/test/red/02.png: expected an image" in err.splitlines()[-1]
    assert not list((home / "cache").glob("*.h5"))


def test_bad_caches(capsys, tmp_path, small_cache):
    assert "expected a feature cache" in refused(capsys, "info", tmp_path / "none.h5")
    assert "found none; make one with" in refused(capsys, "info")
    small_cache.write_bytes(small_cache.read_bytes().replace(b"featcache 1 ", b"featcache 9 ", 1))
    said = refused(capsys, "probe", small_cache)
    assert "expected format version 1, found 9" in said and str(small_cache) in said


def test_a_label_outside_the_classes(capsys, small_cache, tmp_path):
    cache = load(small_cache)
    wrong = SplitArrays(cache.test.features, np.full(60, 3), cache.test.ids)
    meta = {**cache.meta, "views": ["identity"]}
    write_cache(tmp_path / "wrong.h5", {"train": wrong, "test": wrong}, meta)
    assert "from 0 to 2, found 3 to 3" in refused(capsys, "probe", tmp_path / "wrong.h5")


class Trap:
    """Runs a command when it is unpickled by a reader that trusts its input."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def test_bad_weights(capsys, tmp_path, image_folder, fake_engine):
    trap = tmp_path / "trap.pth"
    with zipfile.ZipFile(trap, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"conv1": Trap(tmp_path / "sprung")}))
        archive.writestr("archive/version", "3\n")
    said = refused(capsys, "extract", image_folder, "--weights", trap)
    assert "system" in said and not (tmp_path / "sprung").exists()
    said = refused(capsys, "extract", image_folder, *STARTER, "--backbone", "resnet50")
    assert "not a resnet50" in said and "use --backbone resnet18" in said
    assert "found 'vgg16'" in refused(
        capsys, "extract", image_folder, *STARTER, "--backbone", "vgg16", code=2
    )
    assert "no such file" in refused(capsys, "extract", image_folder, "--weights", "a.pth")


def test_outputs_that_cannot_be_written(capsys, tmp_path, image_folder, fake_engine):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "x.h5"
    said = refused(capsys, "extract", image_folder, *STARTER, "-o", output, begun=1)
    assert "expected a file that can be written" in said and "name another place" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("extract", "digits", "--size", "0"), "--size"),
        (("extract", "digits", "--size", "big"), "--size"),
        (("extract", "--device", "tpu"), "--device"),
        (("extract", "--batch-size", "0"), "--batch-size"),
        (("finetune", "--method", "half"), "--method"),
        (("probe", "--recipe", "mine"), "--recipe"),
        (("probe", "--epoch", "3"), "--epochs"),
        (("probe", "a", "b"), "b"),
        (("probe", "--solver", "newton"), "--solver"),
        (("probe", "--shots", "1,many"), "--shots"),
        (("probe", "--knn", "x"), "--knn"),
        (("probe", "--knn", "5", "--learning-curve"), "at most"),
        (("predict", "a.png"), "--head"),
        (("extrct",), "extrct"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments, said):
    line = refused(capsys, *arguments, code=2)
    assert said in line and "--help" in line


@pytest.mark.parametrize("value", ["0", "nan", "-1"])
def test_rates_out_of_range(capsys, small_cache, value):
    said = refused(capsys, "probe", small_cache, "--lr", value, code=2)
    assert "lr: expected a positive number" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(capsys, tmp_path, image_folder, fake_engine):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "Permission denied" in refused(capsys, "extract", image_folder, *STARTER, "-o", locked)


RUN_FILES = {"checkpoint.safetensors", "config.json", "environment.json", "metrics.jsonl"}


@pytest.mark.oneflow
@pytest.mark.parametrize("command", ["extract", "finetune"])
def test_ctrl_c_ends_the_work_with_130_and_no_half_file(tmp_path, command):
    slowly = ["--engine", "oneflow"] if command == "extract" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "featcache", command, "digits", *STARTER, *slowly],
        cwd=tmp_path,
        env={**os.environ, "FEATCACHE_DIR": "cache", "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # The writer's lock appears when the long work is about to start, the log after a step.
        sign = "metrics.jsonl" if command == "finetune" else "*"
        deadline = time.monotonic() + 60
        while not list((tmp_path / "cache").rglob(sign)) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert f"again: featcache {command} digits" in err
    visible = {
        path.name
        for path in tmp_path.rglob("*")
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(tmp_path).parts)
    }
    if command == "finetune":  # its run can be resumed
        assert "add --resume " in err and visible <= RUN_FILES
    else:
        assert not visible


def test_json_has_null_for_what_json_cannot_say(capsys):
    result = {"a": float("nan"), "b": [1.5, (float("inf"), "x")], "c": {"d": -float("inf")}}
    show(result, True, str)
    assert capsys.readouterr().out == '{"a": null, "b": [1.5, [null, "x"]], "c": {"d": null}}\n'
