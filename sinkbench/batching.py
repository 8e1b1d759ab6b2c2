"""How the processes of a job share a global batch, and how it is cut into micro-batches."""

from __future__ import annotations

from sinkbench.config import Config, ParallelConfig
from sinkbench.errors import HostError, RecipeError

DEFAULT_TOKENS = 2**15
"""Most tokens of a micro-batch when the recipe leaves its size open."""
CARD_TOKENS = 2**16
"""The same on a card that holds neither attention's scores nor all logits. At 60M parameters an H100 trains
590 k tokens/s with this, 523 k with half of it."""
DEFAULT_ACTIVATIONS = 2**30
"""Most tokens x layers x hidden size of one: at 1.1B parameters 23,800 tokens. 16,384 take 50 GiB of a card
in all, 32,768 more than 80."""


def data_parallel_size(parallel: ParallelConfig, processes: int) -> int:
    """Replicas of the model.

    Raises:
        HostError: the model-parallel sizes do not divide the number of processes.
    """
    if processes % parallel.model_size:
        raise HostError(
            "parallel",
            f"{processes} processes are not divisible by tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} x context {parallel.context} = {parallel.model_size}",
            f"start a multiple of {parallel.model_size} processes (torchrun --nproc-per-node), or "
            "change parallel",
        )
    return processes // parallel.model_size


def micro_batch_size(config: Config, data_size: int, most_tokens: int = DEFAULT_TOKENS) -> int:
    """Sequences per forward pass on one data-parallel rank: the recipe's, or the largest divisor of the
    rank's share that has at most 2^30 tokens x layers x hidden size, and keeps the pipeline filled.

    Args:
        most_tokens: of a micro-batch whose size the recipe leaves open.

    Raises:
        RecipeError: the global batch does not divide.
    """
    total, stages = config.train.global_batch_size, config.parallel.pipeline
    share, rest = divmod(total, data_size)
    if rest:
        raise RecipeError(
            "train.global_batch_size",
            f"{total} is not divisible by the data-parallel size {data_size}",
            "change it, or the number of processes",
        )
    interleaved = config.parallel.virtual_pipeline > 1
    if interleaved and share % stages:
        raise RecipeError(
            "train.global_batch_size",
            f"the interleaved pipeline needs a multiple of {stages} micro-batches, which {share} sequences "
            "on one data-parallel rank do not give",
            "change it",
        )
    size = config.train.micro_batch_size
    if size is None:
        model = config.model
        tokens = min(most_tokens, DEFAULT_ACTIVATIONS // (model.num_layers * model.hidden_size))
        most = max(1, min(tokens // model.seq_length, share // stages))
        unit = stages if interleaved else 1
        size = max(n for n in range(1, most + 1) if share % (n * unit) == 0)
    if share % size:
        raise RecipeError(
            "train.micro_batch_size",
            f"{size} does not divide the {share} sequences of one data-parallel rank",
            f"write a divisor of {share}",
        )
    if interleaved and (share // size) % stages:
        raise RecipeError(
            "train.micro_batch_size",
            f"the interleaved pipeline needs a multiple of {stages} micro-batches, not {share // size}",
            "change train.micro_batch_size or train.global_batch_size",
        )
    return size
