"""OneFlow and PyTorch, each in its own environment, against the same file of first steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TRAINERS
from first_steps import CASES, first_steps

EXPECTED = json.loads(
    Path(__file__).with_name("data").joinpath("first_steps.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("engine", TRAINERS)
@pytest.mark.parametrize("case", CASES)
def test_the_first_steps_are_the_same_in_every_framework(case, engine):
    """Losses to 1e-4; the network after three steps to 1e-3."""
    result, expected = first_steps(case, engine), EXPECTED[case]
    np.testing.assert_allclose(result["losses"], expected["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(result["scores"], expected["scores"], rtol=0, atol=1e-3)
    for what in ("means", "mean squares"):
        assert result[what].keys() == expected[what].keys()
        for name, value in expected[what].items():
            assert result[what][name] == pytest.approx(value, abs=1e-4, rel=1e-4), (what, name)


def test_the_cases_are_those_of_the_file():
    assert EXPECTED.keys() == CASES.keys()
    assert all(len(case["losses"]) == 3 for case in EXPECTED.values())
