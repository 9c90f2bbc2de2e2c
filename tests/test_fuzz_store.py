"""The reader against thousands of indices that nobody wrote, each sealed as if somebody had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from caches import FORMS, RICH, make_room, write_shards

FUZZER = Path(__file__).with_name("store_fuzzer.py")


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_no_index_does_worse_than_being_refused(tmp_path, form, seconds):
    path = write_shards(tmp_path / "x.h5", RICH, n_train=6, skip=(1,), **FORMS[form])
    if path.is_file():
        make_room(path)
    child = subprocess.run(
        [sys.executable, str(FUZZER), str(path), str(seconds), f"{form} {seconds}"],
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, f"the reader died of it: {child.stderr}"
    report = json.loads(child.stdout)
    assert not report["wrong"], report["wrong"][0]
    # It got somewhere: past the seal, into many checks, and through all of them at times.
    assert report["tried"] > 10 * seconds and report["read"] and report["messages"] > 10, report
    assert report["corpus"] > 5 and report["lines"] > 100, report
