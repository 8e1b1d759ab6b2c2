"""Weight decay shrinks every parameter, or matrices alone, and changes nothing else of an update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.reliability import whole_tensors
from sinkbench.testing import RunDistributed
from tests.distributed.runs import SWIGLU, Run, prepare

RATE, DECAY = 1e-2, 0.5
ONE_STEP = (*SWIGLU, "train.steps=1", "optim.warmup_steps=0", "measure.every=0", "validation.every=0")
RUNS = {
    "initial": "{lr: 1e-30, weight_decay: 0}",
    "none": f"{{lr: {RATE}, weight_decay: 0}}",
    "all": f"{{lr: {RATE}, weight_decay: {DECAY}, weight_decay_on: all}}",
    "matrices": f"{{lr: {RATE}, weight_decay: {DECAY}, weight_decay_on: matrices}}",
}


def rank_trains(rank: int, world_size: int, runs: Sequence[Sequence[str]]) -> None:
    from sinkbench.trainer import train

    for arguments in runs:
        train(*prepare(arguments))


def test_what_weight_decay_shrinks(run_distributed: RunDistributed, tmp_path: Path) -> None:
    runs = [(*ONE_STEP, f"optim={optim}", f"output_dir={tmp_path / name}") for name, optim in RUNS.items()]
    run_distributed(1, rank_trains, runs)
    found = {name: whole_tensors(Run(tmp_path / name / "short").checkpoint(1)) for name in RUNS}
    names = [name for name in found["none"] if not name.startswith("optimizer")]
    gains = {name for name in names if "norm" in name}
    assert gains
    assert gains < set(names)
    for name in names:
        shrunk = found["none"][name] - RATE * DECAY * found["initial"][name]
        kept = found["none"][name]
        torch.testing.assert_close(found["all"][name], shrunk, rtol=1e-5, atol=1e-7, msg=name)
        expected = kept if name in gains else shrunk
        torch.testing.assert_close(found["matrices"][name], expected, rtol=1e-5, atol=1e-7, msg=name)
        assert not torch.equal(shrunk, kept)
