"""From a target to a model: what is tried, in which order, and why the rest is not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import TRAINERS, colour_image

import featcache
from featcache.errors import DatasetError, EngineUnavailableError, RecipeError
from featcache.finetuning import fit as fitting
from featcache.finetuning.fit import Attempt, Option, Outcome, best_of, climb
from featcache.finetuning.ingredients import gather
from featcache.finetuning.recipes import FinetuneOptions, finetune_recipe
from featcache.progress import Progress, silent

STARTER = {"weights": "tinyimagenet32", "size": 32}


@pytest.fixture(params=TRAINERS)
def small(request):
    """What makes a fit small, in each engine that trains."""
    return {**STARTER, "engine": request.param}


@pytest.fixture
def torch_small():
    """What makes a fit small, where the framework does not matter."""
    return {**STARTER, "engine": "torch"}


class Clock:
    """Time that passes only when something is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def made_up(clock, tried, name, cost_s, val_top1, obstacle="", expected_s=None):
    def run():
        clock.now += cost_s
        tried.append(name)
        return Outcome(val_top1, val_top1 - 0.01, None, None)

    return Option(name, cost_s if expected_s is None else expected_s, run, obstacle)


def climbed(options, *, probe=0.80, target=0.9, budget_s=None, spent_s=5.0):
    clock, tried = Clock(), []
    first = Attempt("probe", "done", "", spent_s, spent_s, Outcome(probe, probe, None, None))
    made = [made_up(clock, tried, *option) for option in options]
    return climb(first, made, target, budget_s, spent_s, clock=clock), tried


def test_the_cheapest_that_is_enough_ends_the_climb():
    attempts, tried = climbed([("full", 300, 0.99), ("cut", 20, 0.85), ("split", 100, 0.93)])
    assert tried == ["cut", "split"]
    assert [attempt.status for attempt in attempts] == ["done", "done", "done", "not needed"]
    assert attempts[-1].why == "split reached the target" and best_of(attempts).name == "split"


def test_a_probe_that_is_enough_needs_nothing_else():
    attempts, tried = climbed([("cut", 20, 0.85)], probe=0.95)
    assert tried == [] and attempts[1].status == "not needed"


def test_what_exceeds_the_budget_is_not_started_and_its_cost_is_given():
    options = [("cut", 20, 0.85), ("split", 100, 0.93), ("full", 300, 0.99)]
    attempts, tried = climbed(options, budget_s=60)
    assert tried == ["cut"]
    assert [attempt.status for attempt in attempts[2:]] == ["over budget", "over budget"]
    assert attempts[2].why == "about 100 s, and 35 s are left"
    assert best_of(attempts).name == "cut"


def test_an_estimate_that_was_too_low_leaves_less_for_the_rest():
    options = [("cut", 90, 0.85, "", 20), ("split", 50, 0.93)]
    attempts, tried = climbed(options, budget_s=120)
    assert tried == ["cut"] and attempts[2].why == "about 50 s, and 25 s are left"


def test_what_cannot_be_done_is_passed_over_with_its_reason():
    attempts, tried = climbed([("cut", 20, 0.85, "no room"), ("split", 100, 0.93)])
    assert tried == ["split"]
    assert (attempts[1].status, attempts[1].why) == ("not possible", "no room")


def test_the_best_need_not_be_the_last():
    attempts, _ = climbed([("cut", 20, 0.70), ("split", 100, 0.75)])
    assert best_of(attempts).name == "probe"


@pytest.mark.parametrize("arguments", [{"target": 0}, {"target": 1.5}, {"budget_s": 0}])
def test_wrong_arguments(arguments):
    with pytest.raises(RecipeError, match=f"{next(iter(arguments)).removesuffix('_s')}: expected"):
        featcache.fit("digits", **arguments)


def test_images_without_labels_are_told_before_the_long_work(image_folder, tmp_path):
    with pytest.raises(DatasetError, match=r"blue train: .* all have a label, found \d+ of \d+ w"):
        featcache.fit(image_folder / "train" / "blue", **STARTER)
    assert not list(tmp_path.rglob("*.h5"))


@pytest.mark.parametrize("kept", [1, 2])
def test_a_class_of_too_few_images_is_told_before_the_long_work(image_folder, tmp_path, kept):
    few = tmp_path / "few"
    shutil.copytree(image_folder, few)
    for file in sorted((few / "train" / "green").iterdir())[kept:]:
        file.unlink()
    with pytest.raises(DatasetError, match=rf"at least 3 images .* found {kept} of 'green'; add"):
        featcache.fit(few, **STARTER)
    assert not list(tmp_path.rglob("*.h5"))
    (few / "train" / "green" / "more.png").symlink_to(image_folder / "train" / "green" / "10.png")
    if kept == 2:
        assert featcache.fit(few, 0.01, **STARTER).reached


def test_ctrl_c_says_nothing_of_options_that_fit_has_not(image_folder, small, monkeypatch, capsys):
    from featcache.cli import main

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt("add --resume folder to the same command to resume")

    monkeypatch.setattr(fitting, "top1", lambda predicted, labels: 0.5)
    monkeypatch.setattr(fitting._Work, "_rates", lambda *_: {"whole": 9.0, "cut": 9.0})
    monkeypatch.setattr(fitting, "finetune", interrupted)
    words = ["--weights", "tinyimagenet32", "--size", "32", "--engine", small["engine"]]
    assert main(["fit", str(image_folder), *words]) == 130
    err = capsys.readouterr().err
    assert "again: featcache fit" in err and "--resume" not in err


def test_a_probes_head_under_moving_statistics_is_warned_of(image_folder, small, tmp_path):
    cache = featcache.extract(image_folder, **STARTER, output=tmp_path / "colours.h5").load()
    head = featcache.probe(cache, C=1.0, check=False).head
    for method, changes, warned in (
        ("split", {}, True),
        ("split", {"bn": "eval"}, False),
        ("full", {"lr": 0.01}, False),  # large steps soon leave it behind
        ("frozen", {}, False),
    ):
        recipe = finetune_recipe(method, epochs=1, **changes)
        options = FinetuneOptions(method, recipe, **small, init_head=head)
        notes = []
        gather(image_folder, options, 1, silent, notes.append)
        warnings = [note for note in notes if note.startswith("warning: ")]
        assert len(warnings) == warned, notes
        assert all("for 1 step: add --bn eval --lr 1e-4" in it for it in warnings)


@pytest.fixture
def noisy_folder(tmp_path):
    """Three classes whose training labels are mostly noise: no target is reached."""
    generator = np.random.default_rng(0)
    for role, count in (("train", 12), ("test", 4)):
        for index, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / "noisy" / role / name
            folder.mkdir(parents=True)
            for number in range(count):
                shown = int(generator.integers(3)) if role == "train" else index
                colour_image(shown, 100 * index + number).save(folder / f"{number:02d}.png")
    return tmp_path / "noisy"


def test_a_target_that_the_probe_reaches(image_folder, small, tmp_path):
    notes = []
    runs = tmp_path / "runs"
    result = featcache.fit(image_folder, 0.3, **small, runs=runs, on_note=notes.append)
    assert result.reached and result.winner == "probe" and len(result.attempts) == 1
    assert (result.n_train, result.n_val, result.n_test) == (36, 4, 18)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "run.json").is_file(), "what was tried on the way leaves nothing half-made"
    found = featcache.predict(image_folder / "test", result.head)
    assert len(found) == 18 and any("validation images" in note for note in notes)


@pytest.mark.torch
def test_everything_is_tried_and_the_winner_predicts(noisy_folder, torch_small):
    notes = []
    result = featcache.fit(noisy_folder, 1.0, epochs=1, **torch_small, on_note=notes.append)
    assert result.attempts[0].name == "probe"
    assert {attempt.status for attempt in result.attempts} == {"done"}
    assert len(result.attempts) == 4 and result.next_step == ""
    for attempt in result.attempts[1:]:
        assert attempt.wall_s > 0 and attempt.estimated_s > 0
        predicted = featcache.predict(noisy_folder / "test", attempt.outcome.head)
        right = [item.path.split("/")[-2] == item.class_name for item in predicted]
        assert np.mean(right) == pytest.approx(attempt.outcome.top1)
    assert not result.reached
    winner = next(item for item in result.attempts if item.name == result.winner)
    assert winner.outcome.val_top1 == max(item.outcome.val_top1 for item in result.attempts)


def test_where_nothing_can_train_the_probe_is_all_there_is(image_folder, fake_engine, monkeypatch):
    def nothing(engine, device, **_):
        raise EngineUnavailableError("engine auto: found neither; install one")

    monkeypatch.setattr(fitting, "choose_trainer", nothing)
    # A target that no probe reaches: its validation split has two images of each class.
    monkeypatch.setattr(fitting, "top1", lambda predicted, labels: 0.5)
    result = featcache.fit(image_folder, 0.9, **STARTER)
    assert not result.reached and result.winner == "probe"
    _, other = result.attempts
    assert (other.status, other.why) == ("not possible", "engine auto: found neither; install one")
    assert result.next_step == "" and 0 <= result.top1 <= 1


def test_a_budget_that_is_spent_says_what_is_next(noisy_folder, capsys, small, monkeypatch):
    from featcache.cli import main

    monkeypatch.setattr(fitting._Work, "_rates", lambda *_: {"whole": 9.0, "cut": 9.0})
    featcache.extract(noisy_folder, **small)
    words = ["--target", "1", "--budget", "0.001s", "--weights", "tinyimagenet32", "--size", "32"]
    words += ["--engine", small["engine"]]
    assert main(["fit", str(noisy_folder), *words]) == 0
    out = capsys.readouterr().out
    assert "not reached: probe" in out and "over budget" in out and "next: " in out
    words[words.index("--target") + 1] = "0.01"  # the probe's
    assert main(["fit", str(noisy_folder), *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # JSON has no NaN
    assert said["attempts"][0]["outcome"]["top1"] is None and 0 <= said["top1"] <= 1
    assert main(["fit", str(noisy_folder), "--budget", "soon"]) == 2
    assert "--budget: expected a duration such as 90s, 10m or 2h" in capsys.readouterr().err


def test_features_that_exceed_the_budget_are_refused_once_their_speed_is_known(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(fitting.time, "monotonic", clock)
    report = fitting._Budget(10.0).watched(silent)
    for done in range(0, 30, 10):
        clock.now += 1.0
        report(Progress("train images", done, 1000))
    clock.now += 1.0
    with pytest.raises(RecipeError, match=r"budget: expected at least 101 s.* found 10 s; give a"):
        report(Progress("train images", 30, 1000))


def test_a_fine_tune_is_stopped_unless_it_is_in_its_last_epoch(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(fitting.time, "monotonic", clock)
    report = fitting._Budget(10.0).stopping(silent, 3)
    report(Progress("epoch 1/3", 64, 100))

    def run():
        clock.now = 11.0
        report(Progress("epoch 3/3", 64, 100))
        report(Progress("epoch 2/3", 64, 100))

    first = Attempt("probe", "done", "", 1.0, 1.0, Outcome(0.8))
    tried = climb(first, [Option("full", 5.0, run)], 0.9, 10.0, 0.0, clock=clock)
    assert (tried[1].status, tried[1].wall_s, tried[1].outcome) == ("over budget", 11.0, None)
    assert "stopped in epoch 2/3" in tried[1].why


@pytest.mark.torch
def test_nothing_is_timed_where_no_fine_tune_can_fit(noisy_folder, torch_small, monkeypatch):
    monkeypatch.setattr(fitting._Work, "_rates", lambda *_: pytest.fail("it was timed"))
    featcache.extract(noisy_folder, **torch_small)
    notes = []
    result = featcache.fit(noisy_folder, 1.0, budget_s=0.001, **torch_small, on_note=notes.append)
    assert [attempt.status for attempt in result.attempts] == ["done", "over budget"]
    assert result.over_s > 0 and result.next_step.startswith("fine-tuning, about")
    assert any("none is timed" in note for note in notes)
