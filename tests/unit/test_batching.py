"""How large a micro-batch is where the recipe leaves it open."""

from __future__ import annotations

import pytest

from sinkbench import recipe
from sinkbench.batching import micro_batch_size


@pytest.mark.parametrize(
    ("name", "overrides", "ranks", "size"),
    [
        ("default_60m", (), 1, 16),  # 2^15 tokens of 2,048 each
        ("default_60m", ("train.global_batch_size=24",), 2, 12),
        ("default_1b", ("train.global_batch_size=32",), 1, 8),  # 32,768 tokens do not fit a card of 80 GB
        ("default_1b", ("train.global_batch_size=32", "train.micro_batch_size=16"), 1, 16),
        ("default_60m", ("model.seq_length=65536", "train.global_batch_size=2"), 1, 1),
    ],
)
def test_default_size(name: str, overrides: tuple[str, ...], ranks: int, size: int) -> None:
    config = recipe.to_config(recipe.load(f"{name}.yaml", ["data={source: bigram_backcopy}", *overrides]))
    assert micro_batch_size(config, ranks) == size
