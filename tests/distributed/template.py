"""What the template process of the harness imports, so that the ranks it forks have it."""

from __future__ import annotations

import pytest  # noqa: F401
import torch._dynamo  # which the first optimizer of a process imports
import torch.distributed  # noqa: F401

from sinkbench.megatron import host

host.prepare("cpu")

from sinkbench import config, model, pretrain, trainer  # noqa: E402, F401
from sinkbench.megatron import network, state, training  # noqa: E402, F401
