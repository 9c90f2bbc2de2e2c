"""The program as a process: a real terminal, signals, streams that are closed or full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from terminals import on_a_terminal

from featcache.cli import main

STARTER = ["--weights", "tinyimagenet32"]
FEW = ["--train-limit", "20", "--test-limit", "10"]


def program(*arguments):
    return [sys.executable, "-m", "featcache", *(str(argument) for argument in arguments)]


def environment(home):
    return {**os.environ, "FEATCACHE_DIR": str(home / "cache"), "TERM": "xterm", "COLUMNS": "100"}


def test_bars_on_a_real_terminal(home, small_cache):
    """A stage that starts again, such as the second epoch, gets a new bar."""
    code, shown = on_a_terminal(
        program("probe", small_cache, "--shots", "1,2,5", "--seeds", 3), environment(home)
    )
    assert code == 0 and "few-shot" in shown and "Traceback" not in shown


@pytest.mark.oneflow
def test_epochs_on_a_real_terminal(home, image_folder):
    options = [*STARTER, "--size", 32, "--epochs", 3, "--train-limit", 24, "--method", "frozen"]
    code, shown = on_a_terminal(program("finetune", image_folder, *options), environment(home))
    assert code == 0 and "epoch 3/3" in shown and "img/s" in shown and "Traceback" not in shown


@pytest.mark.oneflow
@pytest.mark.parametrize(
    "delay",
    [
        0.1,
        0.8,
        pytest.param(0.4, marks=pytest.mark.long),
        pytest.param(1.2, marks=pytest.mark.long),
    ],
)
def test_ctrl_c_while_things_are_loaded(home, small_cache, delay):
    arguments = program("probe", small_cache, "--solver", "sgd", "--epochs", 20000)
    process = subprocess.Popen(
        arguments, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # Before main starts, only the interpreter can report the signal; and for part of a second
    # OneFlow's own handler ends the process, if another thread takes the signal.
    assert process.returncode != 0 and "doctor" not in err
    if "interrupted" in err:
        # With -m, Python ends by the signal itself if it arrives inside exec, as in the making of a
        # dataclass; to a shell that is 130 too.
        assert process.returncode in (130, -signal.SIGINT)
        assert err.count("again") == 1 and "Traceback" not in err
    else:
        assert process.returncode != 130, "never without a word"


INTERRUPTED_AT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            sys.meta_path.remove(self)
            for _ in range(TIMES):
                os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from featcache.cli import run
run()
"""


@pytest.mark.parametrize("times", [1, 10])
@pytest.mark.parametrize(
    "module",
    [
        *(
            "featcache.process",
            "importlib.metadata",
            "featcache.cli.commands",
            "typer",
            "rich.table",
        ),
        *("numpy", "numpy.linalg", "featcache.store.cache", "scipy.optimize", "sklearn"),
    ],
)
def test_ctrl_c_inside_an_import_is_one_line(home, small_cache, module, times):
    """Whatever is imported at that moment, also where C code makes another error of it."""
    program = INTERRUPTED_AT.replace("MODULE", repr(module)).replace("TIMES", str(times))
    words = [sys.executable, "-c", program, "probe", small_cache]
    done = subprocess.run(words, env=environment(home), capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 130 and lines[-1].startswith("interrupted"), done.stderr
    assert done.stderr.count("interrupted") == 1 and "Traceback" not in done.stderr


def test_streams_that_are_closed_full_or_ascii(home, small_cache):
    def shell(redirection, *arguments):
        line = f'exec "$@" {redirection}'
        return subprocess.run(
            ["sh", "-c", line, "sh", *program(*arguments)],
            env=environment(home),
            capture_output=True,
            text=True,
        )

    assert shell(">&-", "--help").returncode == 0
    assert shell(">&-", "info", small_cache).returncode == 0
    assert shell("2>&-", "info", home / "none.h5").returncode == 1
    full = shell(">/dev/full", "info", small_cache)
    assert full.returncode == 1 and full.stderr.count("\n") == 1 and "disk is full" in full.stderr
    piped = subprocess.run(
        ["sh", "-c", '"$@" | head -c 10', "sh", *program("info", small_cache)],
        env=environment(home),
        capture_output=True,
        text=True,
    )
    assert piped.stderr == ""


def test_what_a_cache_holds_fits_where_it_is_read(home, small_cache):
    def shown(**more):
        variables = {name: value for name, value in environment(home).items() if name != "COLUMNS"}
        answer = subprocess.run(
            program("info", small_cache), env=variables | more, capture_output=True, check=True
        )
        return answer.stdout.decode()

    digest = "0" * 64
    assert digest in shown() and max(map(len, shown().splitlines())) <= 100
    narrow = shown(COLUMNS="80")
    assert max(map(len, narrow.splitlines())) <= 80
    assert digest in narrow.replace(" ", "").replace("\n", "")


def test_file_names_that_are_not_utf_8(home, capsys, fake_engine, image_folder):
    import shutil

    root = home / "big set"
    shutil.copytree(image_folder, root)
    (root / "test/red/00.png").rename(os.fsdecode(os.fsencode(root / "test/red/b") + b"\xff.png"))
    assert main(["extract", str(root), *STARTER, "--json"]) == 0
    from featcache import load

    ids = load(json.loads(capsys.readouterr().out)["cache"]).test.ids
    assert os.fsdecode(b"test/red/b\xff.png") in ids


def test_the_command_to_run_again_can_be_pasted(capsys, monkeypatch):
    from featcache.extraction import extract as extraction

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction, "extract", interrupted)
    assert main(["extract", "big  set"]) == 130
    assert "again: featcache extract 'big  set'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract", "a" * 300, *STARTER), "expected a folder"),
        (("extract", "~nobody-of-that-name/x", *STARTER), "expected a folder"),
        (("extract", "digits", *STARTER, *FEW, "-o", "b" * 300 + ".h5"), "name too long"),
        (("extract", "digits", *STARTER, "--force", "-o", "here.h5"), "a folder has that name"),
        (("extract", "/dev/null", *STARTER), "found a device or a socket"),
        (("extract", "digits", "--weights", "~nobody-of-that-name/x.pth"), "no such file"),
        (("info", "here.h5"), "found a folder"),
    ],
)
def test_odd_paths_are_one_line(capsys, fake_engine, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.h5").mkdir()
    assert main(list(arguments)) == 1
    err = capsys.readouterr().err
    # Notes about the work may come before the error.
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    assert err.count("error: ") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", "no json", '{"top1": null}', "[" * 100_000], ids=range(6)
)
def test_an_invalid_record_is_skipped_and_named(capsys, small_cache, home, text):
    assert main(["probe", str(small_cache), "--C", "1", "--no-check"]) == 0
    odd = home / "cache" / "runs" / "odd"
    odd.mkdir()
    (odd / "run.json").write_text(text)
    capsys.readouterr()
    assert main(["compare", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 1
    assert "odd/run.json: left out" in captured.err


@pytest.mark.oneflow
def test_json_is_json_and_a_diverged_probe_is_an_error(capsys, small_cache):
    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    assert main(["probe", str(small_cache), "--epochs", "2", "--json"]) == 0
    assert strict(capsys.readouterr().out)["epochs"] == 2
    assert main(["compare", "--json"]) == 0
    strict(capsys.readouterr().out)
    assert main(["probe", str(small_cache), "--recipe", "tutorial", "--lr", "1e38"]) == 1
    assert "expected a finite objective" in capsys.readouterr().err


def test_a_failed_run_leaves_no_folder(capsys, small_cache, home):
    assert main(["probe", str(small_cache), "--train-limit", "1"]) == 1
    assert not list((home / "cache").rglob("*probe*"))


@pytest.mark.parametrize("form", [[], ["--knn", "3"], ["--shots", "1,5"]])
def test_ctrl_c_in_a_probe_leaves_no_folder(capsys, small_cache, home, monkeypatch, form):
    from featcache.probes import curves as _fits
    from featcache.probes import job as solving
    from featcache.probes import knn as neighbours

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    for room, work in ((solving, "sweep"), (neighbours, "knn_probe"), (_fits, "train_lbfgs")):
        monkeypatch.setattr(room, work, interrupted)
    assert main(["probe", str(small_cache), *form]) == 130
    assert "again: featcache probe" in capsys.readouterr().err
    assert not list((home / "cache").rglob("*-*"))


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_a_device_or_a_pipe_is_not_replaced_by_a_file(capsys, small_cache, tmp_path, kind):
    """Root may rename a file onto /dev/null, and it would be gone for everybody."""
    place = tmp_path / "place.safetensors"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/null")
    before = place.lstat().st_ino
    assert main(["probe", str(small_cache), "--C", "1", "--save-head", str(place)]) == 1
    assert "a device, a pipe or a socket has that name" in capsys.readouterr().err
    assert place.lstat().st_ino == before


def test_many_ctrl_c_at_once_are_one(home, small_cache):
    """A key that bounces: the first is answered, and the others do not interrupt the answer."""
    arguments = program("probe", small_cache, "--shots", "2,full", "--seeds", "999")
    process = subprocess.Popen(
        arguments, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(1.5)
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        time.sleep(0.003)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    if "interrupted" in err:  # else Python was still starting, and nobody else can answer
        assert err.count("interrupted") == 1 and "Traceback" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux alone")
@pytest.mark.parametrize(("command", "needed"), [("extract", 2.0), ("probe", 1.1)])
def test_too_little_address_space_is_told_before_anything_hangs(command, needed):
    limited = "import resource as r, sys; r.setrlimit(r.RLIMIT_AS, (5 * 10**8,) * 2); "
    limited += f"from featcache.cli import main; sys.exit(main(['{command}', 'x']))"
    child = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert child.returncode == 1 and child.stderr.count("\n") == 1, child.stderr
    assert child.stderr.startswith("error: memory: expected at least ")
    assert float(child.stderr.split()[5]) >= needed and "raise it: ulimit -v " in child.stderr


def test_advice_about_memory_names_options_that_the_command_has():
    from featcache.cli import _smaller
    from featcache.process import ran_out_of_memory

    assert _smaller("extract") == "; use a smaller --batch-size or a smaller --size"
    assert _smaller("probe") == "; use a smaller --batch-size or --mmap"
    assert "--" not in _smaller("compare")
    assert ran_out_of_memory(RuntimeError("x.cpp:257:\nFailed to allocate 2621440 bytes of memory"))
    assert ran_out_of_memory(ImportError("libx.so: failed to map segment from shared object"))
    assert not ran_out_of_memory(ValueError("expected 1"))
