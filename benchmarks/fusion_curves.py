"""Loss curves without and with each fusion, and from CUDA graphs: how far apart they come.

    python -m benchmarks.fusion_curves [key=value ...] [--steps 200] [--json FILE] [--curves loss ...]
    python -m benchmarks.fusion_curves --tiny

Four layers of the 60M model in bf16, the same weights and sequences for each curve; whatever the data, they
are the recipe's. The first row is rounding by itself: nothing is fused, gradients are summed over smaller
micro-batches. ``--tiny`` is a model for a CPU, in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_subjects import TINY, free
from sinkbench import plugins, recipe
from sinkbench.config import FUSIONS
from sinkbench.data.source import open_source
from sinkbench.files import write_atomically
from sinkbench.megatron import parallel

SEQUENCES = 8
"""Of a step."""
MICRO_BATCH = 4
TOLERANCES = {"bf16": 1e-2, "fp32": 1e-5}
"""Largest relative difference of a loss."""
PLAIN = ("train.fused=[]", "train.cuda_graph=false")
CURVES: dict[str, tuple[str, ...]] = {
    "rounding alone": (*PLAIN, f"train.micro_batch_size={MICRO_BATCH // 2}"),
    **{name: (f"train.fused=[{name}]", "train.cuda_graph=false") for name in FUSIONS},
    "all": (f"train.fused=[{', '.join(FUSIONS)}]", "train.cuda_graph=false"),
    "all, CUDA graphs": (f"train.fused=[{', '.join(FUSIONS)}]", "train.cuda_graph=auto"),
}


def curve(overrides: Sequence[str], options: argparse.Namespace) -> tuple[list[float], str]:
    """Losses of the steps, and the precision."""
    given = [
        "data={source: bigram_backcopy}",
        f"train={{steps: {options.steps}, global_batch_size: {SEQUENCES}, micro_batch_size: {MICRO_BATCH}}}",
        "model.num_layers=4",
        f"optim.warmup_steps={min(20, options.steps)}",
        "measure.every=0",
        "validation.every=0",
        *(TINY if options.tiny else ()),
        *options.overrides,
        *overrides,
    ]
    config = recipe.to_config(recipe.load("default_60m.yaml", given))
    resolved = plugins.resolve(config, plugins.discover())
    layout = parallel.start(config)
    from sinkbench.megatron.training import Engine
    from sinkbench.model import build_stages, declare

    source = open_source(config)
    declared = declare(config, resolved, source.vocab_size)
    engine = Engine(config, build_stages(config, declared, layout), layout)
    assert config.train.micro_batch_size is not None
    losses = []
    for step in range(options.steps):
        tokens = torch.from_numpy(source.sequences(step * SEQUENCES, SEQUENCES)["tokens"]).to(layout.device)
        parts = tokens.split(config.train.micro_batch_size)
        losses.append(engine.train_step([declared.loss.transform({"tokens": part}) for part in parts]).loss)
    del engine
    free()
    return losses, config.train.precision


def compared(name: str, losses: Sequence[float], plain: Sequence[float], tolerance: float) -> dict[str, Any]:
    relative = [abs(a - b) / b for a, b in zip(losses, plain, strict=True)]
    largest = max(relative)
    return {
        "curve": name,
        "largest": largest,
        "at_step": 1 + relative.index(largest),
        "mean": sum(relative) / len(relative),
        "passed": largest <= tolerance,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="where the rows go, with all losses, after each")
    parser.add_argument("overrides", nargs="*", help="of the recipe, as in sinkbench.pretrain")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    plain, precision = curve(PLAIN, options)
    tolerance = TOLERANCES[precision]
    print(f"plain, {precision}: loss {plain[0]:.4f} to {plain[-1]:.4f} in {options.steps} steps", flush=True)
    rows = []
    for name in options.curves:
        losses, _ = curve(CURVES[name], options)
        row = compared(name, losses, plain, tolerance)
        rows.append(row | {"losses": losses, "plain": plain})
        print(
            f"{name:18} relative difference at most {row['largest']:.1e} at step {row['at_step']}, mean "
            f"{row['mean']:.1e}  bar {tolerance:.0e} {'pass' if row['passed'] else 'FAIL'}",
            flush=True,
        )
        if options.json is not None:
            write_atomically(options.json, json.dumps(rows, indent=1))
    parallel.shutdown()
    return rows


if __name__ == "__main__":
    main()
