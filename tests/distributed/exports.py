"""Checkpoints with random weights, their logits, and what a process without sinkbench makes of an export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinkbench import recipe
from sinkbench.config import Config
from tests.distributed.runs import prepare

if TYPE_CHECKING:
    from sinkbench.megatron.parallel import Layout
    from sinkbench.megatron.training import Engine

CHECKS = Path(__file__).with_name("export_checks.py")
SMALL = (
    "demo.yaml",
    "train={steps: 1, global_batch_size: 4, micro_batch_size: null}",
    "optim.warmup_steps=0",
    "log.progress=false",
    "measure.every=0",
    "validation.every=0",
    "model={num_layers: 4, hidden_size: 32, num_attention_heads: 4, seq_length: 48}",
)
LLAMA = "model={ffn: swiglu, ffn_hidden_size: 48, positional: rope}"


def rank_writes(
    rank: int, world_size: int, recipe_and_overrides: Sequence[str], folder: Path, start: Path | None
) -> torch.Tensor | None:
    """Writes a checkpoint step_0 there: of random weights, or of those of another checkpoint. One process
    returns the logits [b, s, v] of ``probe_tokens``."""
    from sinkbench.megatron import parallel, state
    from sinkbench.model import build_stages, declare

    config, resolved = prepare(recipe_and_overrides)
    declared = declare(config, resolved, 65)
    with parallel.running(config) as layout:
        stages = build_stages(config, declared, layout)
        if start is not None:
            state.load_weights(stages, start)
        else:
            disturb(stages[0])
        logits = None
        if world_size == 1:
            logits = logits_of(stages[0].eval())
        save(config, stages, layout, folder)
    return logits


def save(config: Config, stages: list[Any], layout: Layout, folder: Path) -> Engine:
    """Writes a checkpoint step_0 there; returns the engine that it is of."""
    from sinkbench.checkpoint import CheckpointStore
    from sinkbench.megatron.training import Engine
    from sinkbench.saving import Saver

    engine = Engine(config, stages, layout)
    saver = Saver(CheckpointStore(folder), layout, config.checkpoint)
    saver.save(engine, 0, recipe.dump(config))
    saver.finish()
    return engine


@torch.no_grad()
def disturb(network: torch.nn.Module) -> None:
    """Norms and biases too, whose initial values would hide that they are mixed up."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits_of(network: Any) -> torch.Tensor:
    """Of ``probe_tokens``, [b, s, v]."""
    hidden = network({"tokens": probe_tokens()})
    logits: torch.Tensor = network.logits(hidden[network.leading :]).transpose(0, 1)
    return logits.clone()


def probe_tokens() -> torch.Tensor:
    return torch.randint(0, 65, (3, 40), generator=torch.Generator().manual_seed(1))


def check_exports(
    folders: Sequence[Path], cache: Path, python: str | None = None
) -> dict[str, dict[str, Any]]:
    """What ``export_checks.py`` finds in each folder, in a process that cannot import sinkbench.

    Args:
        folders: exports, each with ``expected.pt``: tokens and logits, and if they are to be
            compared ``attentions`` and ``slots`` of each layer.
        cache: where transformers copies the source to.
        python: an interpreter that has transformers; default: this one.
    """
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    python = python or os.environ.get("SINKBENCH_TEST_HF_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-I", str(CHECKS), *map(str, folders)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
