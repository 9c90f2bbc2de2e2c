"""The notebook: a small valid file whose cells run in order.

The cells run as plain code in one namespace. A kernel would add two dozen packages to
every environment. Lines for Jupyter alone, which start with ``%``, are skipped.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

import featcache
from featcache.frameworks import openvino_status

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "notebooks" / "featcache.ipynb"
STARTER = "cifar10-jpeg-resnet18-tinyimagenet32-64-fdac738c.h5"


@pytest.fixture(scope="module")
def cells():
    return json.loads(FILE.read_text(encoding="utf-8"))["cells"]


def code_of(cell):
    return "".join(line for line in cell["source"] if not line.startswith("%"))


def run_cell(source, names):
    """Run a cell, and return the value of its last line, which Jupyter would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, FILE.name, "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), FILE.name, "eval"), names)


def test_the_file_is_a_small_notebook(cells):
    book = json.loads(FILE.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    assert FILE.stat().st_size < 400_000


def test_outputs_contain_nothing_of_the_machine(cells):
    for cell in cells:
        shown = json.dumps(cell.get("outputs", []))
        assert not re.search(r"/(home|root|tmp|work|Users)/|Traceback|Warning", shown)
        assert "execution" not in cell["metadata"], "no times of execution"
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run it from the top before it is kept"


def test_imported_names_exist(cells):
    for cell in cells:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse(code_of(cell))):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "featcache":
                    assert hasattr(featcache, node.attr), node.attr
                if isinstance(node, ast.ImportFrom) and node.module.startswith("featcache"):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.slow
def test_cells_run_in_order(cells, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    if (ROOT / "PKG-INFO").exists():
        pytest.skip("this is a source distribution, which leaves the starter cache out")
    (tmp_path / "cache").mkdir()
    shutil.copy(ROOT / "cache" / STARTER, tmp_path / "cache")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv("FEATCACHE_DIR")
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            if "featcache.predict" in code_of(cell) and openvino_status()[0] is None:
                continue  # the one cell that needs an engine
            shown.append(run_cell(code_of(cell), names))
    pages = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert sum("<table" in (page or "") for page in pages) == 6
    assert sum(type(value).__name__ == "Figure" for value in shown) == 2
    assert names["result"].top1 > 0.72
    assert "scikit-learn predicts the same" in capsys.readouterr().out
    # Records beside the cache, as they would be in the clone; nothing beside the notebook.
    assert list((tmp_path / "cache" / "runs").glob("*/run.json"))
    assert not list((tmp_path / "notebooks").iterdir())
