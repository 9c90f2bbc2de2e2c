"""Handing a file that libhdf5 must open to a child process.

libhdf5 can crash the process that opens a damaged file; nobody's notebook should die of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CacheCorruptError, CacheError, CacheMismatchError, CacheMissError
from ._format import seal, unseal
from ._index import AGAIN

__all__ = ["answer_parent", "run_in_child"]

# As ``python -m`` does, but without the folder that one happens to be in: what lies there, beside
# a file from a stranger perhaps, is not to be imported.
_RUN = (
    "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__')"
)
_TIMEOUT_S = 60
_MEMORY_BYTES = 4 << 30
_ERRORS = {kind.__name__: kind for kind in (CacheCorruptError, CacheMismatchError, CacheMissError)}


def run_in_child(module: str, path: Path) -> dict[str, Any]:
    """Run a module of this package on a file; return the JSON object that it prints.

    Raises
    ------
    CacheError
        As the child says; `CacheCorruptError` where it died or hung.
    """
    root = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{before}" if before else root,
        # Each thread of a BLAS reserves memory, which is limited in the child.
        "OPENBLAS_NUM_THREADS": "1",
    }
    try:
        child = subprocess.run(
            [sys.executable, "-c", _RUN, module, os.fspath(path)],
            capture_output=True,
            timeout=_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        answer = unseal(child.stdout)
    except subprocess.TimeoutExpired:
        found = f"one that libhdf5 was not done with after {_TIMEOUT_S} s"
    except ValueError:
        last = (child.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        found = f"one that ended libhdf5 with exit code {child.returncode} ({last})"
    else:
        if "error" in answer:
            raise _ERRORS[answer["error"]](answer["message"])
        return answer
    raise CacheCorruptError(f"{path}: expected a readable HDF5 file, found {found}; {AGAIN}")


def answer_parent(describe: Any) -> None:
    """Be the child: print what ``describe(path)`` returns, or its error, sealed."""
    _limit_this_process()
    try:
        answer: dict[str, Any] = describe(Path(sys.argv[1]))
    except CacheError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.buffer.write(seal(answer))


def _limit_this_process() -> None:
    """Bound the memory and time that a rigged file can take, where the system can."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CPU, _TIMEOUT_S),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(OSError, ValueError):  # macOS refuses some
            _, hard = resource.getrlimit(limit)
            resource.setrlimit(limit, (value if hard == -1 else min(value, hard), hard))
