"""Ways to compute one training step, by turns in one process.

    python -m benchmarks.step_turns --model 1b --shared model.num_layers=10 -- '-room -fills' -room ''
    python -m benchmarks.step_turns --model 60m -- '' 'train.cuda_graph=false model.backend=flash' plain
    python -m benchmarks.step_turns --device cpu --tiny -- '' train.fused=[gradients]

A way is overrides of the recipe, separated by spaces; -fills and -room leave out what is no setting of a
recipe, and plain is the compiled PyTorch model of ``train_step``. All ways are in memory together, so that a
large model has fewer layers here. Rates are to that of the first.

A card at its limit of power computes the same step 0.4 % faster or slower from one process to the next
(RESULTS.md); by turns it is warm alike for all, and 40 steps of each tell 0.1 %.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks import step_subjects, step_variants
from benchmarks.step_subjects import TINY, Subject
from benchmarks.train_step import MICRO_BATCH
from sinkbench.megatron import parallel

WARM_UP = 6
"""Steps of each way before the first turn, the capture of CUDA graphs among them."""
LEFT_OUT = {
    "-fills": "sinkbench.megatron.graph_fills.driver",
    "-room": "sinkbench.attention.gradient_room.take",
}
"""Functions whose None means: do without."""


@dataclass
class Way:
    name: str
    subject: Subject
    turns_s: list[float] = field(default_factory=list)
    """Seconds a step, of each turn."""


@contextmanager
def left_out(way: str) -> Iterator[None]:
    with ExitStack() as stack:
        for word in way.split():
            if word in LEFT_OUT:
                stack.enter_context(mock.patch(LEFT_OUT[word], return_value=None))
        yield


def overrides(way: str, options: argparse.Namespace) -> list[str]:
    size = options.micro_batch or MICRO_BATCH[options.model]
    batch = f"train={{micro_batch_size: {size}, global_batch_size: {size * options.micro_batches}}}"
    words = [word for word in way.split() if word not in LEFT_OUT and word != "plain"]
    tiny = TINY if options.tiny else ()
    return [f"train.device={options.device}", batch, *tiny, *options.shared, *words]


def measure(options: argparse.Namespace) -> list[Way]:
    configs = [step_variants.load(options.model, overrides(way, options)) for way in options.ways]
    layout = step_subjects.start(configs[0])
    tokens = step_subjects.random_tokens(configs[0], options.micro_batches, layout)

    def seconds(way: Way, steps: int) -> float:
        with left_out(way.name):
            began = time.perf_counter()
            for _ in range(steps):
                way.subject.step(tokens)
            if layout.device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - began) / steps

    ways = []
    for name, config in zip(options.ways, configs, strict=True):
        with left_out(name):
            subject = step_subjects.make("plain" if name == "plain" else "ours", config, layout)
        ways.append(Way(name, subject))
        seconds(ways[-1], WARM_UP)
    for turn in range(options.turns):
        for way in ways[:: -1 if turn % 2 else 1]:
            seconds(way, 1)
            way.turns_s.append(seconds(way, options.steps))
    return ways


def table(ways: Sequence[Way]) -> str:
    lines = ["| way | ms a step | rate | +- |", "|---|---|---|---|"]
    for way in ways:
        rates = [base / own for base, own in zip(ways[0].turns_s, way.turns_s, strict=True)]
        error = statistics.stdev(rates) / len(rates) ** 0.5
        mean = 1e3 * statistics.mean(way.turns_s)
        lines.append(
            f"| {way.name or 'as it is'} | {mean:.2f} | {statistics.mean(rates):.4f} | {error:.4f} |"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(MICRO_BATCH), default="60m")
    parser.add_argument("--shared", nargs="*", default=[], help="overrides of all ways")
    parser.add_argument("--micro-batch", type=int, help="sequences of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=5, help="of a turn, after one that does not count")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("ways", nargs="+", help="the first is what the others are compared with")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Way]:
    given = dist.is_initialized()
    ways = measure(parse(arguments))
    print(table(ways))
    parallel.shutdown(keep_process_group=given)
    return ways


if __name__ == "__main__":
    main()
