"""Bits that flip and files that are cut short: caught, or harmless and shown to be so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from caches import FORMS, RICH, write_shards

READER = Path(__file__).with_name("damaged_reader.py")
slow = pytest.mark.slow


def damaged(path, flips, cuts):
    """Let a process of its own read damaged copies; return what came of them, by region."""
    child = subprocess.run(
        [sys.executable, str(READER), str(path), str(flips), str(cuts), "seed"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, f"the reader died of it: {child.stderr}"
    answer = json.loads(child.stdout)
    assert not answer["wrong"], answer["wrong"][0]
    assert sum(answer["tally"].values()) == flips + cuts
    return answer["tally"]


@pytest.mark.parametrize(("flips", "cuts"), [(40, 10), pytest.param(200, 40, marks=slow)])
@pytest.mark.parametrize("form", FORMS)
def test_damage_anywhere_in_a_cache_is_caught(tmp_path, form, flips, cuts):
    path = write_shards(tmp_path / "x.h5", RICH, n_train=40, skip=(3,), shard_rows=9, **FORMS[form])
    tally = damaged(path, flips, cuts)
    assert {name.partition(": ")[2] for name in tally} == {"caught"}, "every byte is accounted for"
