"""Loaded before any test (pyproject.toml names this folder): one thread is fastest for tensors as
small as the tests'.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
