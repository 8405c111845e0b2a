"""One thread a process: tiny tensors gain nothing from more, and tests that run beside other work would stall."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
