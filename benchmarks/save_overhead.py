"""What a checkpoint costs a run: steps without one, as many with one in the background, and one that waits.

    python -m benchmarks.save_overhead default_1b train.global_batch_size=32 [key=value ...] [--steps 100]
    torchrun --nproc-per-node 8 -m benchmarks.save_overhead default_1b --folder DIR ...

It is one run. A save in its warm-up takes the host memory that the later ones use again, and is reported by
itself. The clock runs from the beginning of a step to the beginning of another, so that whatever a save holds
up is counted. Whatever the data, the model is the recipe's: `data={source: bigram_backcopy}` needs none
prepared.
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

from sinkbench import plugins, recipe
from sinkbench.files import write_atomically
from sinkbench.saving import Saver

WARM_UP, FIRST_SAVE, SAVED_STEP = 10, 3, 10
"""Steps that are not counted, the one of them that a save follows, and the one of the counted."""
TARGET = 1.05
_save = Saver.save


class Plan:
    """When the run saves, and the times that come of it.

    Args:
        steps: counted without, and with a save.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.total = WARM_UP + 2 * steps + 1
        self.background = (FIRST_SAVE, WARM_UP + steps + SAVED_STEP)
        self.begun: list[float] = []
        self.held_s: list[float] = []
        self.complete_s: list[float] = []
        self.waiting_s = 0.0
        self._flying: tuple[Saver, float] | None = None

    def begin_step(self) -> None:
        now = time.perf_counter()
        self.begun.append(now)
        if self._flying is not None and not self._flying[0].in_flight:
            self.complete_s.append(now - self._flying[1])
            self._flying = None

    def save(self, saver: Saver, engine: Any, step: int, recipe_text: str) -> None:
        """In the place of ``Saver.save``, after every step."""
        began = time.perf_counter()
        if step in self.background:
            _save(saver, engine, step, recipe_text)
            self._flying = (saver, began)
            self.held_s.append(time.perf_counter() - began)
        elif step == WARM_UP:
            saver.wait()
        elif step == self.total:
            _save(saver, engine, step, recipe_text)
            saver.wait()
            self.waiting_s = time.perf_counter() - began

    def result(self) -> dict[str, Any]:
        """Seconds."""
        marks = [self.begun[WARM_UP + part * self.steps] for part in range(3)]
        without, with_save = marks[1] - marks[0], marks[2] - marks[1]
        return {
            "steps": self.steps,
            "without_s": without,
            "in_background_s": with_save,
            "ratio": with_save / without,
            "waiting_s": self.waiting_s,
            "waiting_ratio": (without + self.waiting_s) / without,
            "held_s": dict(zip(("first", "second"), self.held_s, strict=True)),
            "complete_s": dict(zip(("first", "second"), self.complete_s, strict=False)),
        }


def timed(name: str, overrides: Sequence[str], plan: Plan) -> dict[str, Any]:
    """One run by the plan."""
    from sinkbench.megatron import host

    fixed = [f"train.steps={plan.total}", "optim.warmup_steps=1", "measure.every=0", "validation.every=0"]
    fixed += ["checkpoint={every: 1, keep_last: 1, async: true}", "log={every: 50, progress: false}"]
    config = recipe.to_config(recipe.load(name, [*fixed, *overrides]))
    host.prepare(config.train.device)
    from benchmarks.step_subjects import without_initial_weights
    from sinkbench.megatron.training import Engine
    from sinkbench.trainer import train

    step = Engine.train_step

    def clocked(self: Engine, *arguments: Any, **options: Any) -> Any:
        plan.begin_step()
        return step(self, *arguments, **options)

    def planned(self: Saver, engine: Engine, step: int, recipe_text: str) -> None:
        plan.save(self, engine, step, recipe_text)

    with (
        mock.patch.object(Engine, "train_step", clocked),
        mock.patch.object(Saver, "save", planned),
        without_initial_weights(),
    ):
        train(config, plugins.resolve(config, plugins.discover()))
    return plan.result()


def text(result: dict[str, Any]) -> str:
    steps, held = result["steps"], result["held_s"]
    complete = {name: f"complete after {seconds:.2f} s" for name, seconds in result["complete_s"].items()}
    late = "not complete by the last step"
    return "\n".join([
        f"{steps} steps without a save: {result['without_s']:.2f} s",
        f"{steps} steps with one in the background: {result['in_background_s']:.2f} s, "
        f"{result['ratio']:.3f}x (target {TARGET}x); it held a step up for {held['second']:.2f} s, "
        f"{complete.get('second', late)}",
        f"one that waits: {result['waiting_s']:.2f} s, which would be {result['waiting_ratio']:.3f}x",
        f"the first of the run, which takes host memory: held a step up for {held['first']:.2f} s, "
        f"{complete['first']}",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--steps", type=int, default=100, help="counted, of each kind; more than 10")
    parser.add_argument("--folder", type=Path, help="new; where the run goes and stays (default: temporary)")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(argv)
    if options.steps <= SAVED_STEP:
        parser.error(f"--steps {options.steps}: a save follows the {SAVED_STEP}th; give more")
    if options.folder is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("several processes need a folder that all of them see; give --folder")
    with tempfile.TemporaryDirectory() as temporary:
        own = f"output_dir={options.folder or temporary}"
        result = timed(options.recipe, [*options.overrides, own], Plan(options.steps))
    if int(os.environ.get("RANK", "0")) == 0:
        print(text(result), flush=True)
        if options.json is not None:
            write_atomically(options.json, json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
