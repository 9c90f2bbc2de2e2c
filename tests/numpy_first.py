"""NumPy as the commands import it, with the kernels that suit the processor: import this first."""

from featcache.process import import_numpy

import_numpy()
