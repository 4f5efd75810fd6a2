"""Tests use small tensors, for which one thread is fastest, and steadiest where other work shares the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
