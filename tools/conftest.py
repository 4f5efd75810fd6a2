"""Loaded before any test, as pyproject.toml says: one thread suits the tests' small tensors."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
