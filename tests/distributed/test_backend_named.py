"""A run says which backend computes its attention, and a backend that it names computes the same."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from sinkbench.testing import RunDistributed
from tests.distributed.runs import prepare

RECIPE = (
    "demo.yaml",
    "model.attention=kernel_elu",
    "train={steps: 3, global_batch_size: 4, micro_batch_size: 2}",
    "optim.warmup_steps=1",
    "measure.every=0",
    "validation.every=0",
    "log.every=1",
)


def rank_trains(rank: int, world_size: int, output_dir: str) -> list[str]:
    from sinkbench.trainer import train

    printed = []
    for name, pinned in (("chosen", "auto"), ("pinned", "eager")):
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            overrides = (f"name={name}", f"model.backend={pinned}", f"output_dir={output_dir}")
            train(*prepare((*RECIPE, *overrides)))
        printed.append(shown.getvalue())
    return printed


def test_the_backend_is_named(run_distributed: RunDistributed, tmp_path: Path) -> None:
    ((chosen, pinned),) = run_distributed(1, rank_trains, str(tmp_path))
    assert "chosen: attention by the linear backend\n" in chosen
    assert "pinned: attention by the eager backend\n" in pinned
    losses = []
    for name, backend in (("chosen", "linear"), ("pinned", "eager")):
        assert json.loads((tmp_path / name / "manifest.json").read_text())["attention_backend"] == backend
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["event"] == "train"])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
