"""Run folders for tests, without training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml


def make_run(
    path: Path,
    *,
    attention: str | dict[str, Any] = "softmax",
    label: str | None = None,
    sink: float = 90.0,
    lr: float = 4e-4,
    layers: int = 4,
    heads: int = 3,
    steps: int = 200,
    probes: bool = True,
    triggers: bool = True,
    seed: int = 0,
    others: Mapping[str, float] | None = None,
) -> Path:
    """A run folder as training writes it, with numbers that only look like a run's.

    Args:
        others: further numbers of every probe.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    recipe = {
        "name": "demo",
        "label": label,
        "output_dir": "runs",
        "model": {"num_layers": layers, "attention": attention},
        "optim": {"lr": lr, "betas": [0.9, 0.95]},
        "train": {"steps": steps},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    manifest = {"versions": {"torch": "2.13.0", "megatron-core": "0.16.1"}, "backend": "sdpa"}
    (path / "manifest.json").write_text(json.dumps(manifest))

    rise = sink / (1 + np.exp(-(np.arange(0, steps + 1) - steps / 3) / (steps / 20)))
    lines: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        loss = 2.1 + 2.2 * math.exp(-step / (steps / 4)) + rng.normal(0, 0.02)
        numbers = {"lr": lr, "grad_norm": 0.4, "tokens": step * 4096}
        speed = {"tokens_per_second": rng.normal(51000, 900), "mfu": 21.4}
        lines.append({"step": step, "event": "train", "time": step / 10, "loss": loss, **numbers, **speed})
        if step % 50 == 0:
            validation = {"loss": loss + 0.05, "loss/books": loss + 0.2, "loss/web": loss - 0.1}
            lines.append({"step": step, "event": "validation", "time": step / 10, **validation})
    final: dict[str, float] = {}
    for step in range(0, steps + 1, 20) if probes else ():
        share = rise[step] / 100
        final = {"sink_1_raw": rise[step], "sink_1_proxy": min(100, rise[step] + 2.0), "row_sum": 1.0}
        final |= {"value_drain": 1 - 0.95 * share, "activation_ratio": 1 + 30 * share}
        if triggers:
            final["first_token_attention_trigger"] = 0.02
            final["first_token_attention_nontrigger"] = share
        final |= others or {}
        lines.append({"step": step, "event": "probe", "time": step / 10, **final})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps({"loss": 2.0825, **final}))
    if probes:
        raw = rng.uniform(0, 1, (layers, heads, 8)) * sink / 100
        depth = np.arange(layers) / max(1, layers - 1)
        metrics = {
            "importance_raw": raw.tolist(),
            "importance_proxy": np.clip(raw + 0.05, 0, 1).tolist(),
            "activation_ratio_layers": (1 + sink * np.sin(np.pi * depth)).tolist(),
            "value_drain_heads": (1 - raw[:, :2, 0]).tolist(),
            **final,
        }
        (path / "measure").mkdir()
        for step, content in ((steps // 2, {}), (steps, metrics)):
            document = {"step": step, "metrics": content}
            (path / "measure" / f"step_{step}.json").write_text(json.dumps(document))
    return path
