"""Help pages, completion, messages about wrong usage, progress in a log file."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer
from terminals import on_a_terminal

from featcache.cli import main
from featcache.cli import output as _output
from featcache.cli.commands import app
from featcache.cli.options import _CONTENTS
from featcache.progress import Progress
from featcache.store.cache import load

GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands
COMPLETE = {"_FEATCACHE_COMPLETE": "complete_bash"}


def program(*arguments):
    return [sys.executable, "-m", "featcache", *arguments]


def page(capsys, *arguments):
    assert main([*arguments, "--help"]) == 0
    return capsys.readouterr().out


def options_of(name):
    return {option.name: option for option in COMMANDS[name].params}


# The table of contents


def test_every_command_has_a_section():
    listed = [name for names in _CONTENTS.values() for name in names]
    assert sorted(listed) == sorted(COMMANDS), "a new command needs its place in _CONTENTS"


def test_the_contents_show_each_command_with_an_example(capsys):
    lines = page(capsys).splitlines()
    places = [lines.index(f"{section}:") for section in _CONTENTS]
    assert places == sorted(places)
    for name in COMMANDS:
        (row,) = [row for row, line in enumerate(lines) if line.startswith(f"  {name} ")]
        after = next(line for line in lines[row:] if line.lstrip().startswith("$ "))
        assert after.split()[:3] == ["$", "featcache", name]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_an_example_can_be_typed(capsys, name):
    example = re.search(r"Example: featcache (.+?)\n\n", page(capsys, name), re.DOTALL)
    command, *words = shlex.split(example[1])
    assert command == name
    COMMANDS[name].make_context(name, words)  # raises on an unknown option


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_help_fits_the_width_of_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in (None, *COMMANDS):
        shown = page(capsys, *filter(None, [name]))
        assert "…" not in shown and "[bold]" not in shown
        lines = shown.splitlines()
        # An option with its choices is one word, and may be longer than a narrow screen.
        assert all(len(line) <= min(columns, 100) or "|" in line for line in lines), name


def test_the_bare_name_shows_the_contents(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("Usage: featcache") and captured.err == ""
    assert page(capsys) == captured.out
    assert main(["help", "verify"]) == 0
    assert capsys.readouterr().out == page(capsys, "verify")


# Options are spelt alike


def test_an_option_is_the_same_in_every_command():
    seen = {}
    for name in COMMANDS:
        for option in options_of(name).values():
            if option.param_type_name == "option":
                seen.setdefault(option.opts[0].lstrip("-"), []).append((name, option))
    for spelling in ("data-root", "device", "json", "mmap", "plot", "seed", "train-limit"):
        kinds = {(tuple(it.opts), it.default, it.rich_help_panel) for _, it in seen[spelling]}
        assert len(kinds) == 1 < len(seen[spelling]), spelling
    # These need it only where a record names none.
    recorded = ("predict", "probe", "search", "serve", "ship")
    for spelling in ("backbone", "weights"):
        shared = [option for name, option in seen[spelling] if name not in recorded]
        assert len({(option.help, option.rich_help_panel) for option in shared}) == 1 < len(shared)
    for spelling in ("output", "runs", "force", "on-error"):
        assert len({tuple(option.opts) for _, option in seen[spelling]}) == 1, spelling
    assert list(seen["output"][0][1].opts) == ["--output", "-o"]


def test_which_commands_take_an_option():
    takes = {name: {*options_of(name)} for name in COMMANDS}
    for name in ("probe", "finetune", "fit", "compare", "report", "demo"):
        assert "runs" in takes[name], f"{name} reads or writes runs"
    for name in ("extract", "finetune", "fit", "report", "demo"):
        assert "data_root" in takes[name], f"{name} reads images"
    assert {name for name in COMMANDS if "json" not in takes[name]} == {"demo"}


def test_runs_are_written_to_and_read_from_the_folder_given(capsys, small_cache, tmp_path):
    runs = tmp_path / "elsewhere"
    for form in (["--C", "1", "--no-check"], ["--knn", "3"], ["--shots", "1", "--seeds", "1"]):
        assert main(["probe", str(small_cache), "--runs", str(runs), *form]) == 0
    capsys.readouterr()
    assert len(list(runs.glob("*/run.json"))) == 3
    assert main(["compare", "--runs", str(runs)]) == 0
    assert "gaussian" in capsys.readouterr().out


# Wrong usage: one line, what was expected, exit code 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # In the parser's own words, which differ between its versions.
        ("prob", "no such command 'prob'; try featcache probe (see featcache --help)"),
        ("infer", "try featcache predict --head HEAD IMAGE"),
        ("knn", "try featcache probe --knn 10"),
        ("trian", "try featcache probe, or featcache finetune"),
        ("ls", "try featcache info"),
        ("xyzzy", "'xyzzy' (see featcache --help)"),
        ("probe --scal l2", "--scal; did you mean --scale? (see featcache probe --help)"),
        ("--verison", "--verison; did you mean --version? (see featcache --help)"),
        ("probe --zzz", "--zzz (see featcache probe --help)"),
        ("probe --scale big", "--scale: 'big' is not one of 'none', 'standardize', 'l2' (see"),
        ("probe --solver it's", "is not one of 'lbfgs', 'ridge', 'sgd' (see"),
        ("export --to xls", "--to: 'xls' is not one of 'npz', 'parquet'"),
        ("extract --size big", "error: --size: "),
        ("extract --size 0", "1"),
        ("audit --duplicates 2", "error: --duplicates: "),
        ("probe --lr x", "'x'"),
        ("probe --seed", "'--seed' requires an argument (see featcache probe --help)"),
        ("probe a.h5 b.h5", "b.h5"),
        ("predict a.png", "missing option '--head' (see featcache predict --help)"),
        ("predict --head h", "missing argument 'image...' (see"),
        ("merge a.h5 b.h5", "missing option '--output'"),
        ("diff a.h5", "missing argument 'b'"),
        # In our words.
        (
            "predict a.png --head h --format csv --json",
            "error: --format: has no effect with --json",
        ),
        (
            "probe --knn 3 --learning-curve",
            "error: expected at most one of them, found --knn and --learning-curve",
        ),
        ("probe --temperature 1", "--temperature: has no effect without --knn"),
        ("probe --shots 1 --distance cosine", "--distance: has no effect without --knn"),
        ("fit --budget soon", "--budget: expected a duration such as 90s, 10m or 2h, found 'soon'"),
        ("probe --knn 5 --scale l2", "--scale: has no effect with --knn"),
        ("probe --shots 1 --train-limit 9", "--train-limit: has no effect with --shots"),
        ("probe --head h --save-head i", "--save-head: has no effect with --head"),
        ("probe --seeds 3", "--seeds: has no effect without --shots"),
        ("probe --knn 5 --plot p.png", "--plot: has no effect with --knn"),
        ("help prob", "try featcache probe"),
        ("extract --views flip", "did you mean flips?"),
        ("extract --engine openvin", "did you mean openvino?"),
        ("probe --task clasification", "did you mean classification?"),
        ("fit digits --target 95", "a percentage is written as a fraction: 0.95"),
        ("extract --size 0", "--size: expected at least 1, found '0'"),
        ("probe --C big", "--C: expected a number, found 'big'"),
    ],
)
def test_wrong_usage_says_what_to_type(capsys, line, message):
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert message.casefold() in captured.err.casefold(), captured.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("probe CACHE --knn 0", "found 0"),
        ("probe CACHE --C -1", "C: expected a positive number"),
        ("probe CACHE --C 0.1 --sweep", "leave one of them out"),
        ("probe CACHE --lr 0 --solver sgd", "lr: expected a positive number"),
        ("probe CACHE --shots 0", "expected numbers from 1"),
        ("probe CACHE --cv 1", "--cv: expected at least 2"),
        ("probe CACHE --cut avgpol", "did you mean avgpool?"),
        ("probe CACHE --labels TABLE --target lable", "did you mean label?"),
        ("probe CACHE --labels TABLE --target label --where lable=='a'", "did you mean label?"),
        ("probe CACHE --labels TABLE --target label --where (", "the condition"),
        ("audit CACHE --outliers 1", "below 1"),
        ("merge CACHE -o new.h5", "expected two or more caches"),
        ("extract IMAGES --weights tinyimagenet32 --cut avgpol", "did you mean avgpool?"),
        ("extract IMAGES --weights tinyimagenet32 --size 8", "size: expected 32"),
        ("extract IMAGES --backbone resnet81", "did you mean resnet18?"),
        ("extract IMAGES --backbone tim:vit", "did you mean timm?"),
        ("extract IMAGES --weights random:x", "random:SEED"),
        ("extract IMAGES --workers 2", "--executor ray"),
    ],
)
def test_a_value_that_the_library_refuses_is_wrong_usage_too(
    capsys, small_cache, image_folder, tmp_path, line, message
):
    table = tmp_path / "t.csv"
    ids = [*load(small_cache).train.ids, *load(small_cache).test.ids]
    table.write_text("\n".join(["id,label", *(f"{one},{one[-5]}" for one in ids)]))
    places = {"CACHE": str(small_cache), "IMAGES": str(image_folder), "TABLE": str(table)}
    assert main([places.get(word, word) for word in line.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last, last


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("probe photos", "if it holds images, run featcache extract photos first"),
        ("probe photos.zip", "if it holds images, run featcache extract photos.zip first"),
        ("probe features.npy", "if it holds features, run featcache import features.npy first"),
        ("probe feature.npy", "found no such file; did you mean features.npy?"),
        ("extract photoz", "did you mean photos?"),
        ("extract digit", "did you mean digits?"),
        ("extract photos --weights imagnet", "did you mean imagenet?"),
        ("extract photos --weights tinyimagenet", "did you mean tinyimagenet32?"),
    ],
)
def test_a_name_that_is_not_there_is_exit_code_1(capsys, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for name in ("photos.zip", "features.npy", "photos/cat/1.jpg"):
        (tmp_path / name).write_bytes(b"anything")
    assert main(line.split()) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last, last


def loaded_by(*arguments):
    """Return exit code, last line on standard error and the modules of one call."""
    command = [sys.executable, "-X", "importtime", "-m", "featcache", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True)
    lines = answer.stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    messages = [line for line in lines if not line.startswith("import time")]
    return answer.returncode, messages, modules


@pytest.mark.parametrize("arguments", [("proeb",), ("probe", "--scale", "12l2"), ("fit", "--help")])
def test_help_and_usage_errors_come_before_anything_slow_is_imported(arguments):
    code, messages, modules = loaded_by(*arguments)
    assert code == (0 if "--help" in arguments else 2) and len(messages) == (code == 2)
    assert "featcache.cli" in modules and modules.isdisjoint({"numpy", "h5py", "PIL", "sklearn"})


def test_choices_are_those_of_the_library():
    from typing import get_args, get_type_hints

    from featcache.backbones.choice import DEVICES, ENGINES, PRECISIONS
    from featcache.cli.commands import extract
    from featcache.cli.finetune import finetune
    from featcache.cli.probe import probe
    from featcache.cli.store import export
    from featcache.finetuning.recipes import AUGMENTATIONS, METHODS, SCHEDULES, TRAINERS
    from featcache.metrics import METRICS
    from featcache.probes.probe import SOLVERS
    from featcache.probes.recipes import PROBE_RECIPES, PROBE_SCHEDULES
    from featcache.store import export as exporting

    def offered(command, name):
        kind = get_type_hints(command)[name]
        plain = [it for it in get_args(kind) if it is not type(None)] or [kind]
        return {*get_args(plain[0])} if get_args(plain[0]) else {*plain}

    for command, name, known in (
        (extract, "engine", {"auto", *ENGINES}),
        (extract, "device", {"auto", *DEVICES}),
        (extract, "precision", {"auto", *PRECISIONS}),
        (finetune, "engine", {"auto", *TRAINERS}),
        (finetune, "method", METHODS),
        (finetune, "schedule", SCHEDULES),
        (finetune, "augment", AUGMENTATIONS),
        (probe, "solver", SOLVERS),
        (probe, "recipe", PROBE_RECIPES),
        (probe, "schedule", PROBE_SCHEDULES),
        (probe, "metric", METRICS),
        (export, "to", exporting.FORMATS),
        (export, "split", exporting.SPLITS),
    ):
        assert offered(command, name) == {*known}, f"{command.__name__} --{name}"


# Completion


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("pr", ["probe", "predict"]),
        ("probe --sc", ["--schedule", "--scale"]),
        ("probe --solver ", ["lbfgs", "ridge", "sgd"]),
        ("extract --weights t", ["tinyimagenet32"]),
        ("extract d", ["digits"]),
        ("info c", []),  # files: the shell completes them
    ],
)
def test_completion_is_quick_and_loads_no_numpy(words, offered):
    asked = {"COMP_WORDS": f"featcache {words}", "COMP_CWORD": str(words.count(" ") + 1)}
    command = [sys.executable, "-X", "importtime", "-m", "featcache"]
    answer = subprocess.run(
        command, env={**os.environ, **COMPLETE, **asked}, capture_output=True, text=True
    )
    assert answer.stdout.split() == offered
    modules = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert "featcache.cli" in modules and modules.isdisjoint({"numpy", "h5py", "PIL", "sklearn"})


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion_can_be_installed(tmp_path):
    line = shlex.join(program("--install-completion"))
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit $?"],  # keeps bash running, to be detected as the shell
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert "_FEATCACHE_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()


# Colours and progress


def shown_on_a_terminal(variables):
    """Return a help page as printed to a pseudo-terminal with these variables."""
    code, shown = on_a_terminal(program("info", "--help"), {**os.environ, **variables})
    assert code == 0
    return shown


def test_help_is_coloured_unless_the_environment_forbids_it():
    coloured = re.compile("\x1b\\[[0-9;]*3[0-7]m")
    assert coloured.search(shown_on_a_terminal({"TERM": "xterm-256color", "NO_COLOR": ""}))
    assert not coloured.search(shown_on_a_terminal({"TERM": "xterm-256color", "NO_COLOR": "1"}))
    assert "\x1b" not in shown_on_a_terminal({"TERM": "dumb"})


def test_progress_in_a_log_is_a_line_every_few_seconds(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(_output.time, "monotonic", lambda: clock[0])
    with _output.progress() as report:
        report(Progress("a moment", 0, 1))
        report(Progress("a moment", 1, 1))
        for stage, total, unit in (("images", 1, "img"), ("exporting", 900_000, "B")):
            report(Progress(stage, 0, total, unit))
            clock[0] += 9  # long, but a single unit
            report(Progress(stage, total, total, unit))
        clock[0] = 0.0
        for done in range(0, 601):  # a minute of ten messages a second
            clock[0] = done / 10
            report(Progress("train images", done, 600))
        report(Progress("saving", 1, 2, ""))
        clock[0] += 9
        report(Progress("saving", 2, 2, ""))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 13
    assert lines[0] == "train images: 50/600, 10 img/s, 55 s left"
    assert lines[-2:] == ["train images: 600/600, 10 img/s", "saving: 2/2"]
