"""Shared settings: two workers share two cores, so BLAS must not start threads of its own.

OpenBLAS threads that wait for a busy core spin, and a decomposition takes ten times as long.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
