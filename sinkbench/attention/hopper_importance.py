"""The launches of importance's kernels for Hopper; see ``triton_importance``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor

from sinkbench.attention.hopper_call import described, switches_for
from sinkbench.attention.hopper_importance_kernels import column_sums, row_sums
from sinkbench.attention.tiles import Tiles
from sinkbench.attention.triton_tensors import pairs_in_cache

ROWS = Tiles(64, 64, 4, 2, 96)
LONG_ROWS = Tiles(128, 128, 8, 2)
COLUMNS = {"columns": Tiles(64, 64, 4, 2, 96), "columns with more": Tiles(64, 64, 4, 2)}
"""More than one sum of a softmax without biases takes more than 96 registers."""


def tiles_of_rows(query: Tensor) -> Tiles:
    """Measured on an H200 (benchmarks/LOG.md), as the columns' are."""
    return ROWS if query.shape[2] <= 4096 else LONG_ROWS


def launch_rows(
    query: Tensor, key: Tensor, into: Sequence[Tensor], numbers: Sequence[Any], switches: dict[str, Any]
) -> None:
    """Sums [b, h, t] of rows into two tensors, as ``Scores.row_sums`` says.

    Args:
        numbers, switches: of ``Scores``.
    """
    batch, heads, length, _ = query.shape
    bias, position, *others = numbers
    chosen = tiles_of_rows(query)
    row_sums[(triton.cdiv(length, chosen.block_q) * batch * heads,)](
        *described(query, chosen.block_q), *described(key, chosen.block_k), *into, bias, position,
        heads, heads // key.shape[1], length, batch * heads, pairs_in_cache(key), *others,
        **switches_for(switches, query.shape[3], chosen),
    )  # fmt: skip


def launch_columns(
    query: Tensor, key: Tensor, raw: Tensor, proxy: Tensor | None, out: Tensor, offset: int,
    numbers: Sequence[Any], switches: dict[str, Any], chosen: Tiles,
) -> None:  # fmt: skip
    """Sums of columns from ``offset`` on into [1 or 2, parts, b, h, columns], as ``Scores.column_sums`` says.

    Args:
        raw, proxy: [b, h, t] with room for whole blocks.
        chosen: of ``COLUMNS``.
    """
    batch, heads, length, _ = query.shape
    columns = out.shape[-1]
    bias, position, *others = numbers
    column_sums[(triton.cdiv(columns, chosen.block_k) * batch * heads, out.shape[1])](
        *described(query, chosen.block_q), *described(key, chosen.block_k),
        raw, proxy, bias, position, out, raw.shape[-1],
        heads, heads // key.shape[1], length, batch * heads, pairs_in_cache(query), columns, offset, *others,
        PROXY=proxy is not None, REGISTERS=chosen.registers > 0,
        **switches_for(switches, query.shape[3], chosen),
    )  # fmt: skip
