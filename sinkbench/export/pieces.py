"""How tensors of a checkpoint correspond to those of a Hugging Face model, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of a checkpoint and the tensors that it becomes.

    Attributes:
        stored: name in the checkpoint; of one layer where it begins with ``decoder.layers.``.
        names: in the model's files, ``{}`` for the layer's number from 0.
        split: the stored tensor -> the model's, one for each name.
        join: the inverse.
    """

    stored: str
    names: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


def whole(stored: str, name: str) -> Piece:
    """The same tensor."""
    return Piece(stored=stored, names=(name,), split=lambda x: [x], join=lambda x: x[0])


def transposed(stored: str, name: str) -> Piece:
    """A matrix that GPT-2 keeps as [in, out]."""
    return Piece(stored=stored, names=(name,), split=lambda x: [x.T], join=lambda x: x[0].T)


def halves(stored: str, first: str, second: str) -> Piece:
    """Gate and up projection, side by side."""
    return Piece(
        stored=stored, names=(first, second), split=lambda x: x.chunk(2), join=lambda x: torch.cat(list(x))
    )


def beginning(stored: str, name: str, rows: int) -> Piece:
    """A table whose first rows stand for no position (OPT's padding)."""

    def split(x: Tensor) -> list[Tensor]:
        return [torch.cat([x.new_zeros(rows, *x.shape[1:]), x])]

    return Piece(stored=stored, names=(name,), split=split, join=lambda x: x[0][rows:])


@dataclass(frozen=True)
class Heads:
    """Sizes of the fused projection: each kv head's queries, key and value lie together."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    def split(self, fused: Tensor) -> list[Tensor]:
        """Queries, keys and values, heads in order; the first dimension is that of the projection."""
        per_group = self.num_heads // self.num_kv_heads
        grouped = fused.unflatten(0, (self.num_kv_heads, per_group + 2, self.head_size))
        return [part.flatten(0, 2) for part in grouped.split([per_group, 1, 1], 1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.unflatten(0, (self.num_kv_heads, -1, self.head_size)) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 2)


def separate_heads(stored: str, names: tuple[str, str, str], heads: Heads) -> Piece:
    """The fused projection as three."""
    return Piece(stored=stored, names=names, split=heads.split, join=heads.join)


def queries_keys_values(stored: str, name: str, heads: Heads) -> Piece:
    """The fused projection with all queries first, transposed where it is a matrix (GPT-2)."""
    assert heads.num_heads == heads.num_kv_heads

    def split(fused: Tensor) -> list[Tensor]:
        return [torch.cat(heads.split(fused)).movedim(0, -1)]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return heads.join(parts[0].movedim(-1, 0).chunk(3))

    return Piece(stored=stored, names=(name,), split=split, join=join)
