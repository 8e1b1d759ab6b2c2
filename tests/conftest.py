"""What holds for every test. The fixtures run_distributed and check_plugin are sinkbench's pytest plugin."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts; the ranks are the parallelism
