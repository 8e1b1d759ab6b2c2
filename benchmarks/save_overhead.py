"""What a checkpoint costs a run: steps without one, with one in the background, and one that is waited for.

    python -m benchmarks.save_overhead recipes/default_1b.yaml train.global_batch_size=32 [key=value ...]
    torchrun --nproc-per-node 8 -m benchmarks.save_overhead ...

One run: a few steps with a first save, whose host memory later ones use again; the steps that count without a
save; as many with one that begins after the tenth and is complete before the last; and a save that is waited
for, by which a run that saves in the foreground is longer. The clock runs from the beginning of a step to the
beginning of another, so that what a save holds up is counted. Whatever the data, the model is the recipe's:
`data={source: bigram_backcopy}` needs none prepared.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sinkbench import plugins, recipe

WARM_UP = 10
FIRST_SAVE = 5
TARGET = 1.05


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=100, help="that count, without and with a save")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments.recipe, [*arguments.overrides, f"output_dir={folder}"], arguments.steps)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"steps": arguments.steps, "target": TARGET, **found}, indent=1))


def measure(name: str, overrides: Sequence[str], steps: int) -> dict[str, float]:
    """Seconds of this rank, and their ratios to the steps without a save."""
    from sinkbench.megatron import host

    saved, last = WARM_UP + steps + 10, WARM_UP + 2 * steps + 1
    fixed = [f"train.steps={last}", "optim.warmup_steps=1", "measure.every=0", "validation.every=0"]
    fixed += ["log={every: 50, progress: false}", "label=null", "checkpoint={every: 1, async: true}"]
    config = recipe.to_config(recipe.load(name, [*fixed, *overrides]))
    host.prepare(config.train.device)
    from sinkbench.megatron.training import Engine
    from sinkbench.saving import Saver
    from sinkbench.trainer import train

    begun: list[float] = []
    waited: list[float] = []
    in_flight: list[bool] = []
    step, save = Engine.train_step, Saver.save

    def clocked(self: Engine, *arguments: Any, **options: Any) -> Any:
        begun.append(time.perf_counter())
        return step(self, *arguments, **options)

    def some(self: Saver, *arguments: Any) -> None:
        in_flight.append(self.in_flight)
        if len(begun) in (FIRST_SAVE, saved):
            save(self, *arguments)
        if len(begun) in (WARM_UP, last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            before = time.perf_counter()
            if len(begun) == last:
                save(self, *arguments)
            self.wait()
            waited.append(time.perf_counter() - before)

    with mock.patch.object(Engine, "train_step", clocked), mock.patch.object(Saver, "save", some):
        train(config, plugins.resolve(config, plugins.discover()))
    if in_flight[-1]:
        raise SystemExit("the save was not complete before the last step; take more --steps")
    without = begun[WARM_UP + steps] - begun[WARM_UP]
    background = begun[WARM_UP + 2 * steps] - begun[WARM_UP + steps]
    return {
        "without_s": without,
        "in_the_background_s": background,
        "waiting_s": without + waited[-1],
        "in_the_background": background / without,
        "waiting": 1 + waited[-1] / without,
    }


if __name__ == "__main__":
    main()
