"""What importing costs, what the public names are, and which way imports go."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import featcache
from featcache.process import openblas_core_type

PACKAGE = Path(featcache.__file__).parent
HEAVY = ("numpy", "h5py", "sklearn", "oneflow", "flowvision", "openvino", "PIL", "torch")
REMOTE = ("fsspec", "s3fs", "aiohttp", "botocore")


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after running this."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(answer.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import featcache").isdisjoint(HEAVY)


def test_help_loads_no_framework():
    code = "from featcache.cli import main\nassert main(['--help']) == 0"
    assert loaded_after(code).isdisjoint(HEAVY)


def test_opening_a_cache_loads_neither_h5py_nor_a_framework(small_cache):
    code = f"import featcache\nfeatcache.load({str(small_cache)!r}).train.features"
    assert loaded_after(code).isdisjoint({*HEAVY, "scipy"} - {"numpy"})


def test_numpy_1_is_told_which_kernels_suit_the_processor():
    """Of a family that its BLAS would not choose by itself on a recent processor; once only."""
    if openblas_core_type() is None:
        pytest.skip("this processor has no AVX2, or nobody can tell")
    script = """
import os, sys
from unittest import mock
import featcache
from featcache import process as _numpy
os.environ.pop("OPENBLAS_CORETYPE", None)
with (
    mock.patch.object(_numpy, "old_openblas", lambda: sys.argv[1] == "old"),
    mock.patch.object(_numpy, "openblas_core_type", lambda: "Sandybridge"),
):
    featcache.load
from threadpoolctl import threadpool_info
assert "OPENBLAS_CORETYPE" not in os.environ
print({one["architecture"] for one in threadpool_info() if "numpy.libs" in one["filepath"]})
"""
    found = {
        age: subprocess.run(
            [sys.executable, "-c", script, age], capture_output=True, text=True, check=True
        ).stdout.strip()
        for age in ("old", "new")
    }
    assert found["old"] == "{'Sandybridge'}" != found["new"]


def test_public_names_are_sorted_complete_and_resolve():
    assert featcache.__all__ == sorted(featcache.__all__)
    assert set(featcache.__all__) == set(featcache._HOME)
    for name in featcache.__all__:
        assert callable(getattr(featcache, name)), name
    assert set(featcache.__all__) <= set(dir(featcache))
    with pytest.raises(AttributeError, match="no attribute 'extrct'"):
        featcache.extrct  # noqa: B018


# Each room and the rooms of ours that it may import: a floor a row, the ground floor first.
GROUND = {"errors", "progress", "notebook", "options", "version", "metrics", "schema"}
MAY_IMPORT = {
    **{room: set() for room in GROUND - {"options"}},
    "options": {"errors"},
    **{room: {"errors"} for room in ("cores", "process", "sampling")},
    **{room: {"errors", "options"} for room in ("files", "preprocess")},
    "download": {"errors", "files", "progress"},
    "pickles": {"errors"},
    "frameworks": {"errors", "process"},
    "remote": {"errors", "files", "process"},
    "tables": {"errors", "files", "options", "progress", "remote"},
    "datasets": {
        "tables",
        "cores",
        "download",
        "errors",
        "options",
        "files",
        "pickles",
        "preprocess",
        "process",
    }
    | {"options", "progress", "remote", "sampling"},
    "backbones": {"cores", "download", "errors", "files", "frameworks", "pickles", "preprocess"}
    | {"options", "process", "progress"},
    "store": {"cores", "errors", "files", "notebook", "process", "progress", "remote", "tables"}
    | {"options", "sampling", "schema", "version"},
    "importing": {"backbones", "errors", "files", "progress", "remote", "store", "tables"},
    "runs": {"errors", "files", "metrics", "notebook", "progress", "schema", "store"},
    "extraction": GROUND
    | {"backbones", "cores", "datasets", "files", "preprocess", "remote", "sampling", "store"}
    | {"tables"},
    "probes": GROUND
    | {"cores", "files", "frameworks", "importing", "process", "runs", "sampling", "store"}
    | {"tables"},
    "auditing": {"errors", "files", "metrics", "notebook", "options", "probes", "progress"}
    | {"store", "tables"},
    "new_images": {"datasets", "errors", "files", "options", "preprocess", "remote"},
    "prediction": {
        "backbones",
        "datasets",
        "errors",
        "extraction",
        "files",
        "metrics",
        "new_images",
    }
    | {"options", "preprocess", "probes", "progress", "store"},
    "searching": GROUND
    | {"backbones", "files", "importing", "prediction", "probes", "remote", "store"},
    "finetuning": GROUND
    | {"backbones", "cores", "datasets", "extraction", "files", "frameworks", "prediction"}
    | {"preprocess", "probes", "process", "runs", "sampling", "store"},
    "reporting": GROUND
    | {"auditing", "backbones", "datasets", "files", "finetuning", "new_images", "preprocess"}
    | {"probes", "remote", "runs", "searching", "store"},
    "serving": GROUND
    | {"auditing", "cores", "datasets", "files", "prediction", "probes", "process", "reporting"}
    | {"store", "tables"},
    "shipping": GROUND
    | {
        "backbones",
        "files",
        "frameworks",
        "new_images",
        "prediction",
        "preprocess",
        "probes",
        "process",
    }
    | {"runs", "store"},
    "surveying": GROUND | {"extraction", "probes", "runs", "store"},
    "doctor": {"backbones", "cores", "datasets", "errors", "frameworks", "process"},
}


def our_imports(path: Path) -> set[str]:
    """Return the rooms that a module imports from, wherever in it the import stands."""
    depth = len(path.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            rooms |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or ""] + [alias.name for alias in node.names]
            assert not any(name.startswith("featcache") for name in names), f"{path}: use from ."
    return rooms


def test_imports_go_one_way():
    rooms = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir()}
    rooms -= {"__init__", "__main__", "__pycache__", "py", "cli"}
    assert rooms == set(MAY_IMPORT), "a new room needs its line in MAY_IMPORT"
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in MAY_IMPORT:
            assert our_imports(path) - {room} <= MAY_IMPORT[room], path
