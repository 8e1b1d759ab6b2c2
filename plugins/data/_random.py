"""Random numbers that follow from a sequence's own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB
"""2^64 / golden ratio, odd, as an int64: the increment of splitmix64."""


def uniform_tokens(tokens_bs: Tensor, vocab_size: int, seed: int) -> Tensor:
    """A token id below ``vocab_size`` for every position, int64 [b, s], the same on every device."""
    position_s = torch.arange(1, tokens_bs.shape[1] + 1, device=tokens_bs.device)
    # Integer products wrap around modulo 2^64; the odd factors tell equal tokens at other places apart.
    sequence_b1 = _mixed((tokens_bs + 1) * (2 * _mixed(position_s) + 1)).sum(1, keepdim=True)
    start = (seed * _GOLDEN + 2**63) % 2**64 - 2**63
    drawn = _mixed(_mixed(sequence_b1 + start) + position_s * _GOLDEN)
    return (drawn >> 1 & 0x7FFFFFFFFFFFFFFF) % vocab_size


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection of int64 that looks random."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right with zeros, where torch repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
