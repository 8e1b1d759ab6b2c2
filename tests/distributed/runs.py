"""Short training runs on gloo ranks, and what is in their folders afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkbench import plugins, recipe
from sinkbench.config import Config
from sinkbench.plugins import Resolved
from sinkbench.testing import RunDistributed

SHORT = (
    "name=short",
    "label=null",
    "train.steps=20",
    "train.global_batch_size=8",
    "train.micro_batch_size=null",
    "optim.warmup_steps=5",
    "log={every: 1, progress: false}",
    "measure={every: 20, count: 20, eps: 0.08}",
    "validation={every: 20, sequences: 10}",
)
"""Overrides of the shipped recipes for twenty quick steps."""

DEMO = ("demo.yaml", *SHORT, "model={num_layers: 4, num_attention_heads: 2}")
"""The demo with four layers and two heads: learned positions, no feed-forward block."""

SWIGLU = (*DEMO, "model={ffn: swiglu, ffn_hidden_size: 96, positional: rope}")
"""The same with rotary positions and feed-forward blocks."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tensor": (2, ("parallel.tensor=2",)),
    "sequence": (2, ("parallel={tensor: 2, sequence: true}",)),
    "pipeline": (2, ("parallel.pipeline=2",)),
    "interleaved": (2, ("parallel={pipeline: 2, virtual_pipeline: 2}",)),
    "context": (2, ("parallel.context=2",)),
    "data": (2, ()),
    "tensor pipeline": (4, ("parallel={tensor: 2, pipeline: 2}",)),
}
"""Name -> processes, overrides."""


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def series(self, event: str, key: str) -> dict[int, float]:
        """A number by step."""
        lines = [line for line in self.lines() if line["event"] == event]
        steps = [line["step"] for line in lines]
        assert len(set(steps)) == len(steps), f"steps logged twice: {steps}"
        return {line["step"]: line[key] for line in lines}

    def measured(self, step: int) -> dict[str, Any]:
        """Every number of a probe."""
        document = json.loads((self.folder / "measure" / f"step_{step}.json").read_text())
        metrics: dict[str, Any] = document["metrics"]
        return metrics

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step}"


def prepare(recipe_and_overrides: Sequence[str]) -> tuple[Config, Resolved]:
    """A recipe by name with overrides, validated and resolved."""
    name, *overrides = recipe_and_overrides
    config = recipe.to_config(recipe.load(name, overrides))
    return config, plugins.resolve(config, plugins.discover())


def rank_trains(rank: int, world_size: int, recipe_and_overrides: Sequence[str]) -> dict[str, Any]:
    from sinkbench.trainer import train

    return train(*prepare(recipe_and_overrides))


def train(
    run_distributed: RunDistributed,
    output_dir: Path,
    recipe_and_overrides: Sequence[str],
    layout: str = "",
    processes: int = 1,
) -> Run:
    """Trains a recipe under a layout of ``LAYOUTS`` (default: one process)."""
    overrides: tuple[str, ...] = ()
    if layout:
        processes, overrides = LAYOUTS[layout]
    arguments = [*recipe_and_overrides, *overrides, f"output_dir={output_dir}"]
    run_distributed(processes, rank_trains, arguments, timeout=240)
    return Run(output_dir / "short")
