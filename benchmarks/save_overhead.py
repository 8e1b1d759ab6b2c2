"""What a checkpoint costs a run: 100 steps without one, with one in the background, with one that waits.

    python -m benchmarks.save_overhead recipes/default_1b.yaml train.global_batch_size=32 [key=value ...]
    torchrun --nproc-per-node 8 -m benchmarks.save_overhead ...

The runs take turns in one process. The clock runs from the beginning of a step to the beginning of another,
so that what a save holds up is counted, and the fastest run of each kind counts. Whatever the data, the model
is the recipe's: `data={source: bigram_backcopy}` needs none prepared.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sinkbench import plugins, recipe

WARM_UP, COUNTED = 10, 100
STEPS = WARM_UP + COUNTED + 1
SAVED = WARM_UP + 10
TARGET = 1.05
MODES = {
    "no save": "checkpoint.every=0",
    "in the background": f"checkpoint={{every: {SAVED}, async: true}}",
    "waiting": f"checkpoint={{every: {SAVED}, async: false}}",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for repeat in range(arguments.repeats):
        for mode, override in MODES.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                own = [*arguments.overrides, override, f"output_dir={folder}", f"name=save_{repeat}"]
                seconds[mode].append(timed(arguments.recipe, own))
    if int(os.environ.get("RANK", "0")) == 0:
        base = min(seconds["no save"])
        for mode, found in seconds.items():
            print(f"{COUNTED} steps, {mode}: {min(found):.2f} s, {min(found) / base:.3f}x (target {TARGET}x)")


def timed(name: str, overrides: list[str]) -> float:
    """Seconds of the counted steps of a run. A save, if any, follows the tenth of them."""
    from sinkbench.megatron import host

    fixed = [f"train.steps={STEPS}", "optim.warmup_steps=1", "measure.every=0", "validation.every=0"]
    fixed += ["log={every: 50, progress: false}", "label=null"]
    config = recipe.to_config(recipe.load(name, [*fixed, *overrides]))
    host.prepare(config.train.device)
    from sinkbench.megatron.training import Engine
    from sinkbench.saving import Saver
    from sinkbench.trainer import train

    begun: list[float] = []
    step, save = Engine.train_step, Saver.save

    def clocked(self: Engine, *arguments: Any, **options: Any) -> Any:
        begun.append(time.perf_counter())
        return step(self, *arguments, **options)

    def once(self: Saver, *arguments: Any) -> None:
        if len(begun) in (SAVED, STEPS):
            save(self, *arguments)

    with mock.patch.object(Engine, "train_step", clocked), mock.patch.object(Saver, "save", once):
        train(config, plugins.resolve(config, plugins.discover()))
    gc.collect()
    torch.cuda.empty_cache()
    return begun[WARM_UP + COUNTED] - begun[WARM_UP]


if __name__ == "__main__":
    main()
