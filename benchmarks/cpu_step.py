"""The cost of a CPU step beside the model's own arithmetic: sinkbench's and plain PyTorch's, in turns.

    python -m benchmarks.cpu_step [--pairs 30] [--threads 1] [key=value ...]

Prints the median of both and of their ratio in each pair; load on the machine falls on both of a pair alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import step_subjects, step_variants
from benchmarks.step_subjects import Subject

SHAPE = (
    "model={num_layers: 4, hidden_size: 256, num_attention_heads: 4, ffn_hidden_size: 512}",
    "model={seq_length: 256, vocab_size: 4096}",
    "train={precision: fp32, device: cpu, micro_batch_size: 4, global_batch_size: 8}",
)
MICRO_BATCHES = 2
WARMUP = 2


def seconds(subject: Subject, tokens: Sequence[Tensor]) -> float:
    began = time.process_time()
    subject.step(tokens)
    return time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> float:
    """Returns the median ratio. Time is the process's own, of all its threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="of the recipe, as in sinkbench.pretrain")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = step_variants.load("60m", [*SHAPE, *options.overrides])
    layout = step_subjects.start(config)
    ours, plain = (step_subjects.make(name, config, layout) for name in ("ours", "plain"))
    tokens = step_subjects.random_tokens(config, MICRO_BATCHES, layout)
    for _ in range(WARMUP):
        for subject in (ours, plain):
            subject.step(tokens)
    pairs = [(seconds(ours, tokens), seconds(plain, tokens)) for _ in range(options.pairs)]
    ratio = statistics.median(mine / its for mine, its in pairs)
    mine, its = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"sinkbench {mine:.3f} s, plain {its:.3f} s, ratio {ratio:.3f} ({options.pairs} pairs)")
    return ratio


if __name__ == "__main__":
    main()
