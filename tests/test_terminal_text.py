"""Foreign text on its way to a terminal: no escape sequence of a stranger's file gets there."""

from __future__ import annotations

import json

import numpy as np
import pytest
from caches import SplitArrays, write_cache

from featcache.cli import main
from featcache.errors import visible
from featcache.store.cache import load

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\r"


def test_visible_text_keeps_letters_and_lines():
    assert visible("кошка 猫\nnext") == "кошка 猫\nnext"
    assert visible(HOSTILE).isprintable()


@pytest.fixture
def hostile_cache(small_cache, tmp_path):
    """A sound cache all of whose texts are hostile."""
    cache = load(small_cache)
    names = [f"{name}{HOSTILE}" for name in cache.class_names]
    texts = {
        name: f"{value}{HOSTILE}"
        for name, value in cache.meta.items()
        if isinstance(value, str) and name not in ("fingerprint", "format", "dtype")
    }
    meta = {**cache.meta, **texts, "class_names": names}
    splits = {
        role: SplitArrays(
            np.array(split.features),
            np.array(split.labels),
            tuple(f"{name}{HOSTILE}" for name in split.ids),
        )
        for role, split in cache.splits()
    }
    path = tmp_path / "hostile.h5"
    write_cache(path, splits, meta)
    return path


COMMANDS = (
    ("info",),
    ("probe", "--no-check", "--per-class", "--confusion"),
    ("probe", "--knn", "3"),
    ("probe", "--shots", "2,full", "--seeds", "2"),
    ("audit",),
    ("verify",),
    ("export", "--to", "csv", "--output", "out.csv"),
    ("errors",),
    ("compare",),
)


def test_no_command_prints_an_escape_sequence(hostile_cache, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["probe", str(hostile_cache), "--no-check", "--runs", "cache/runs"])
    capfd.readouterr()
    for command, *options in COMMANDS:
        of_cache = [] if command in ("errors", "compare") else [str(hostile_cache)]
        main([command, *of_cache, *options])
        out, err = capfd.readouterr()
        assert out + err, command
        for text in (out, err):
            assert visible(text) == text, (command, options)


def test_a_hostile_record_and_an_unknown_name_are_shown_escaped(tmp_path, capfd):
    folder = tmp_path / "runs" / "1"
    folder.mkdir(parents=True)
    record = {
        "run": "1", "kind": "probe", "method": HOSTILE, "top1": 0.5, "top1_interval": [0.4, 0.6],
        "n_epochs": 0, "n_train": 1, "n_test": 1, "images_per_s": 1.0, "wall_s": 1.0,
        "dataset": HOSTILE, "dataset_digest": HOSTILE, "weights": HOSTILE, "size": 64,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    assert main(["compare", "--runs", str(tmp_path / "runs")]) == 0
    assert main(["compare", HOSTILE + "?", "--runs", str(tmp_path / "runs")]) == 1
    assert main(["probe", f"{tmp_path}/{HOSTILE}"]) == 1
    out, err = capfd.readouterr()
    assert visible(out) == out and "evil" in out
    assert visible(err) == err and "evil" in err
