"""NumPy as the commands import it, with the kernels that suit the processor: import this first."""

import os

# Where tests run side by side, threads that wait in a loop keep the cores from others: BLAS's with
# more than one, OpenMP's by default. Probes take two thirds of the time without, PyTorch's tests
# too. Commands that tests start inherit this.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from featcache.process import import_numpy

import_numpy()
