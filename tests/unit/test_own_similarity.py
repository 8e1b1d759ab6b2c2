"""One more similarity is about ten lines in one file and an entry point: it trains and is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sinkbench.testing import RunDistributed
from tests.unit.conftest import Install

SOURCE = """\
from sinkbench.api import AttentionSpec, Elementwise, Params, Plugin, hookimpl

def squared_relu(score):
    return score.relu().square()

def build(params, context):
    return AttentionSpec(rule=Elementwise(function=squared_relu, normalize=True))

@hookimpl
def sinkbench_attention():
    return [Plugin(name="squared_relu", summary="relu(q.k / sqrt d)^2, normalised", build=build)]
"""
RECIPE = (
    "demo.yaml",
    "name=own",
    "model.attention=squared_relu",
    "train={steps: 30, global_batch_size: 16, micro_batch_size: 16}",
    "optim.warmup_steps=5",
    "measure={every: 30, count: 8}",
    "validation.every=0",
    "log={every: 1, progress: false}",
)


def rank_trains(rank: int, world_size: int, site: str, output_dir: str) -> tuple[dict[str, Any], Any]:
    from sinkbench.measure.runs import find_checkpoint, measure_run
    from sinkbench.measure.settings import Settings
    from sinkbench.trainer import train
    from tests.distributed.runs import prepare

    sys.path.insert(0, site)
    config, resolved = prepare((*RECIPE, f"output_dir={output_dir}"))
    summary = train(config, resolved)
    folder = Path(output_dir) / "own"
    found = measure_run(str(folder), find_checkpoint(folder, None), "natural", Settings(device="cpu"))
    return summary, found.metrics


def test_a_similarity_in_ten_lines(run_distributed: RunDistributed, install: Install, tmp_path: Path) -> None:
    assert len([line for line in SOURCE.splitlines() if line]) <= 10
    install("own-similarity", SOURCE)
    site, output = str(tmp_path / "site" / "own-similarity"), str(tmp_path / "runs")
    ((summary, measured),) = run_distributed(1, rank_trains, site, output)
    lines = map(json.loads, (tmp_path / "runs" / "own" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.1
    assert summary["attention"] == "squared_relu"
    assert measured["sink_1_raw"] == summary["sink_1_raw"]
    assert 0.5 < measured["row_sum"] <= 1.0
