"""What the template process of ``run_distributed`` imports, so that the ranks it forks have it."""

from __future__ import annotations

import importlib.util

import torch._dynamo  # which the first optimizer of a process imports
import torch.distributed

from sinkbench.megatron import host

torch.set_num_threads(1)  # the ranks are the parallelism
host.prepare("cpu")

from sinkbench import config, model, pretrain, trainer  # noqa: E402, F401
from sinkbench.megatron import network, state, training  # noqa: E402, F401

if importlib.util.find_spec("pytest") is not None:
    import pytest  # noqa: F401
