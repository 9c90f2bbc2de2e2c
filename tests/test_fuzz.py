"""Every reader of files from strangers, on inputs altered in their structure."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import outcome

TESTS = Path(__file__).parent
READERS = {
    path.stem.removeprefix("fuzz_"): importlib.import_module(path.stem)
    for path in sorted(TESTS.glob("fuzz_*.py"))
}
SEEDS = [(reader, name) for reader, module in READERS.items() for name in module.SEEDS]


@pytest.mark.parametrize(("reader", "name"), SEEDS)
def test_what_once_went_wrong_is_read_or_refused_in_one_line(tmp_path, reader, name):
    place = tmp_path / "room" / "input"  # a reader may keep originals above the input
    place.mkdir(parents=True)
    module = READERS[reader]
    message, fault = outcome(module.read, module.SEEDS[name](place))
    assert fault is None, fault
    assert message is None or str(message)


@pytest.mark.parametrize(
    "seconds",
    [2, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
@pytest.mark.parametrize("reader", READERS)
def test_no_altered_file_does_worse_than_being_refused(tmp_path, reader, seconds):
    child = subprocess.run(
        [sys.executable, str(TESTS / "fuzzing.py"), reader, str(seconds), str(seconds), tmp_path],
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    left = [str(path) for path in sorted(tmp_path.glob("*/*"))][:3]
    assert child.returncode == 0, f"the reader died of one of {left}: {child.stderr}"
    report = json.loads(child.stdout.splitlines()[-1])
    first = next(iter(report["wrong"]), None)
    assert first is None, f"{first['input']}: {first['why']}"
    assert report["messages"], report
    if seconds > 2:  # past the first check, and through all of them at times
        assert report["read"] and len(report["messages"]) > 2, report
