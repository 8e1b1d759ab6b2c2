"""Time of ``sinkbench measure``'s default metrics against bare forward passes with output_attentions.

python benchmarks/measure_overhead.py MODEL [--count 100] [--length 64] [--repeats 3]

MODEL is a Hugging Face folder or a .gguf file. Both run the same batches in float32 on the CPU; they take
turns, and the fastest turn of each, in processor time, counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from sinkbench.measure.hf import measure_open_model
from sinkbench.measure.hf_load import open_model
from sinkbench.measure.hf_place import Trust, find_place
from sinkbench.measure.inputs import from_python_documentation
from sinkbench.measure.settings import Settings

TARGET = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    place = find_place(arguments.model, Trust())
    opened = open_model(place, device=torch.device("cpu"), dtype="float32", trust=Trust())
    settings = Settings(length=arguments.length, count=arguments.count, device="cpu")
    tokens = torch.as_tensor(
        from_python_documentation(opened.encode(), length=arguments.length, count=arguments.count, seed=0)
    )

    @torch.no_grad()
    def bare() -> None:
        for batch in tokens.split(settings.open_batch_size):
            opened.model(input_ids=batch, output_attentions=True, use_cache=False)

    def measured() -> None:
        list(measure_open_model(opened, ["natural"], settings, lambda done, total: None))

    times = [(seconds(bare), seconds(measured)) for _ in range(arguments.repeats)]
    forward, measure = (min(column) for column in zip(*times, strict=True))
    ratio = f"{measure / forward:.3f}x (target {TARGET}x)"
    print(f"forward passes {forward:.2f} s, measure {measure:.2f} s: {ratio}")


def seconds(function: Callable[[], None]) -> float:
    """Processor time of this process, which other processes on the machine disturb less than the clock."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
