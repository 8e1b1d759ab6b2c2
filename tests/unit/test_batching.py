"""How large a micro-batch is where the recipe leaves it open."""

from __future__ import annotations

import pytest
import torch

from sinkbench import recipe
from sinkbench.batching import CARD_TOKENS, DEFAULT_TOKENS, micro_batch_size
from sinkbench.config import Config
from sinkbench.model import most_tokens

DATA = "data={source: bigram_backcopy}"


def load(name: str, *overrides: str) -> Config:
    return recipe.to_config(recipe.load(f"{name}.yaml", [DATA, *overrides]))


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
    assert micro_batch_size(load(name, *overrides), ranks) == size


@pytest.mark.parametrize(("name", "size"), [("default_60m", 32), ("default_1b", 8)])
def test_size_on_a_card(name: str, size: int) -> None:
    assert micro_batch_size(load(name), 1, CARD_TOKENS) == size


@pytest.mark.parametrize(
    ("card", "backend", "overrides", "tokens"),
    [
        (True, "sdpa", (), CARD_TOKENS),
        (True, "eager", (), DEFAULT_TOKENS),
        (True, "sdpa", ("train.fused=[layer]",), DEFAULT_TOKENS),
        (True, "sdpa", ("train.device=cpu",), DEFAULT_TOKENS),
        (False, "sdpa", ("train.fused=[loss]",), DEFAULT_TOKENS),
    ],
)
def test_more_tokens_where_little_is_held(
    monkeypatch: pytest.MonkeyPatch, card: bool, backend: str, overrides: tuple[str, ...], tokens: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    assert most_tokens(load("default_60m", *overrides), backend) == tokens
