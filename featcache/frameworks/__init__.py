"""The one place that imports frameworks, and that knows what they can do here.

OneFlow 0.9.0 changes the process that imports it: it takes over Ctrl-C with a
plain C ``exit``, writes five variables of distributed training into the
environment, prints to the raw standard error, and falls back to 2004's BLAS
kernels on processors its OpenBLAS does not know. `import_oneflow` undoes all of
that. What could abort the process (a GPU without kernels, a missing driver) is
tried in a child process first, by `cuda_status`.

OpenVINO's Python package reports every import to an analytics server and keeps an
identifier in the home folder; `import_openvino` leaves that part of it out.

PyTorch changes nothing by being imported. What it can use of a GPU is tried in a child
process too.

NumPy is imported by `import_numpy` before any other room is: NumPy 1's BLAS has kernels for
recent processors, but does not find them by itself.
"""

from __future__ import annotations

from ._launch import LAUNCH_VARIABLES, Launch, launched
from ._numpy import import_numpy, old_openblas
from ._oneflow import (
    cuda_status,
    import_flowvision,
    import_oneflow,
    oneflow_status,
)
from ._openvino import import_openvino, openvino_precisions, openvino_status
from ._process import deaf_threads, last_words, process_environment, run_in_child
from ._processor import openblas_core_type
from ._torch import (
    import_torch,
    may_have_gpu,
    torch_gpu_status,
    torch_precisions,
    torch_status,
)

__all__ = [
    "LAUNCH_VARIABLES",
    "Launch",
    "cuda_status",
    "deaf_threads",
    "import_flowvision",
    "import_numpy",
    "import_oneflow",
    "import_openvino",
    "import_torch",
    "last_words",
    "launched",
    "may_have_gpu",
    "old_openblas",
    "oneflow_status",
    "openblas_core_type",
    "openvino_precisions",
    "openvino_status",
    "process_environment",
    "run_in_child",
    "torch_gpu_status",
    "torch_precisions",
    "torch_status",
]
