"""Sums over the rows and columns of attention weights that are never held, for softmax and elementwise rules.

    S = scale Q K^T + b + t_{i-j};  softmax: L_i = log sum_j exp S_ij;  elementwise: z_i = sum_j f(S_ij)
    column k: sum_{i >= max(k, n)} w_i f(S_ik), and the same of |f|, with exp(S - L) in the place of w f

One kernel goes along the rows and one, for the first columns alone, along the columns: a matrix product each,
without values and without a gradient. No sum depends on the order of programs.

Shapes: b sequence of the batch, h head, g kv head, t and q query, k key, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sinkbench.attention import hopper
from sinkbench.attention.tiles import Tiles
from sinkbench.attention.triton_blocks import ROW_BLOCK, SLOPE, TABLE, itself
from sinkbench.attention.triton_importance_kernels import column_sums, row_sums
from sinkbench.attention.triton_tensors import (
    is_wide,
    padded_table,
    pairs_in_cache,
    precision,
    split_head_size,
    whole_blocks,
)

TILES = {
    "rows": Tiles(128, 128, 8, 2),
    "short rows": Tiles(64, 64, 4, 3),
    "rows with distances": Tiles(128, 64, 8, 2),
    "columns": Tiles(128, 128, 8, 2),
    "columns with more": Tiles(64, 128, 8, 2),
    "few columns": Tiles(64, 64, 4, 3),
}
"""Of half precision and heads up to 128; more is a function or a bias by distance. The queries of the rows
and the keys of the columns stay: how many they are decides how often the rest is read, at 64 with 4.6 TB/s of
an H100's cache. The largest that do not spill with 16 warps on a multiprocessor; for short rows, which have
few of them, others were faster on an H200 (0.152 for 0.163 ms at head size 96, 0.095 for 0.098 at 128)."""
SHORT_ROWS = 4096
FEW_COLUMNS = 64
TILES_LARGE = Tiles(64, 64, 4, 2)
"""Of half precision and larger heads."""
TILES_FLOAT32 = Tiles(32, 32, 4, 2)
UNIT = math.log2(math.e)
"""A softmax's weights are powers of two in the kernels."""
COLUMN_PARTS = 8
"""Programs that may share the queries of a block of columns, where there are few blocks."""
COLUMN_PROGRAMS = 1024
"""As many as keep a card busy."""


def _options(tiles: Tiles) -> dict[str, int]:
    """Of 8 warps, two programs fit a multiprocessor: one computes products while the other sums."""
    return tiles.options() | ({"maxnreg": 128} if tiles.num_warps == 8 else {})


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one layer.

    Attributes:
        query_bhtd, key_bgtd: of bf16, fp16 or float32, the same positions.
        function: Triton function f, float32; None for softmax.
        bias_h: added to the scores of each head.
        window, prefix: as in AttentionSpec and Problem.
        slope_h, table_hn: the bias by distance, as in ``triton_elementwise.attend``.
    """

    query_bhtd: Tensor
    key_bgtd: Tensor
    scale: float
    function: Any = None
    bias_h: Tensor | None = None
    window: int | None = None
    prefix: int = 0
    slope_h: Tensor | None = None
    table_hn: Tensor | None = None

    def row_sums(self, tiles: Tiles | None = None) -> tuple[Tensor, Tensor | None]:
        """float32 [b, h, t]: for softmax log sum exp of each row; else the sums of f and of |f|.

        Args:
            tiles: sizes of the blocks in the place of ``TILES``.
        """
        batch, heads, length, _ = self.query_bhtd.shape
        shape, device = (batch, heads, length), self.query_bhtd.device
        total = torch.empty(shape, dtype=torch.float32, device=device)
        absolute = None if self.function is None else torch.empty_like(total)
        query, key, arguments, switches = self._arguments(total)
        into = (total, total if absolute is None else absolute)
        if tiles is None and self._on_hopper:
            hopper.importance().launch_rows(query, key, into, arguments, switches)
            return total, absolute
        bias, position, *numbers = arguments
        kernel = "short rows" if length <= SHORT_ROWS and self.function is None else "rows"
        chosen = tiles or self._tiles("rows with distances" if self._by_distance else kernel)
        row_sums[(triton.cdiv(length, chosen.block_q) * batch * heads,)](
            query, key, *into, bias, position,
            *query.stride()[:3], *key.stride()[:3], heads, heads // key.shape[1], length, batch * heads,
            pairs_in_cache(key), *numbers,
            **switches, **_options(chosen),
        )  # fmt: skip
        return total, absolute

    def column_sums(
        self,
        raw_bht: Tensor,
        proxy_bht: Tensor | None,
        columns: int,
        offset: int,
        tiles: Tiles | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sums [b, h, columns] of the columns from ``offset`` on over queries from the column's own on.

        Args:
            raw_bht: for softmax, what is added to a row's scores before the exponential, -inf for a row that
                does not count; else the factor of a row in the first sum.
            proxy_bht: factor of a row in the second sum, which is of absolute values; None for none.
            tiles: as in ``row_sums``; of at most ROW_BLOCK queries.
        """
        batch, heads, length, _ = self.query_bhtd.shape
        softmax = self.function is None
        kernel = "columns" if softmax and not self._by_distance else "columns with more"
        on_hopper = tiles is None and self._on_hopper
        chosen = tiles or self._tiles(kernel if columns > FEW_COLUMNS else "few columns")
        if on_hopper:
            more = self.bias_h is not None or proxy_bht is not None
            chosen = hopper.importance().COLUMNS["columns with more" if more else kernel]
        blocks = triton.cdiv(columns, chosen.block_k)
        parts = min(COLUMN_PARTS, triton.cdiv(length, chosen.block_q))
        parts = min(parts, max(COLUMN_PROGRAMS // (blocks * batch * heads), 1))
        shape = (1 if proxy_bht is None else 2, parts, batch, heads, columns)
        out = torch.empty(shape, dtype=torch.float32, device=raw_bht.device)
        raw = whole_blocks(raw_bht * UNIT if softmax else raw_bht, float("-inf") if softmax else 0.0)
        query, key, arguments, switches = self._arguments(raw)
        bias, position, *numbers = arguments
        proxy = None if proxy_bht is None else whole_blocks(proxy_bht, 0.0)
        if on_hopper:
            hopper.importance().launch_columns(
                query, key, raw, proxy, out, offset, arguments, switches, chosen
            )
        else:
            column_sums[(blocks * batch * heads, parts)](
                query, key, raw, raw if proxy is None else proxy,
                bias, position, out, *query.stride()[:3], *key.stride()[:3],
                heads, heads // key.shape[1], length, batch * heads, pairs_in_cache(query), columns, offset,
                *numbers,
                PROXY=proxy is not None, EVEN=length % chosen.block_q == 0,
                **switches, **_options(chosen),
            )  # fmt: skip
        sums = out.sum(1) if parts > 1 else out[:, 0]
        return sums[0], None if proxy_bht is None else sums[1]

    @property
    def _on_hopper(self) -> bool:
        f = self.function
        return hopper.can_read(self.query_bhtd, self.key_bgtd) and (f is None or hopper.takes(f, itself))

    @property
    def _by_distance(self) -> bool:
        return self.slope_h is not None or self.table_hn is not None

    def _tiles(self, kernel: str) -> Tiles:
        if self.query_bhtd.dtype == torch.float32:
            return TILES_FLOAT32
        return TILES_LARGE if self.query_bhtd.shape[-1] > 128 else TILES[kernel]

    def _arguments(self, unused: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Any]]:
        query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.query_bhtd, self.key_bgtd))
        prefix = min(self.prefix, query.shape[2])
        position, kind, count = unused, 0, 1
        if self.slope_h is not None:
            position, kind = self.slope_h.float().contiguous(), SLOPE
        if self.table_hn is not None:
            position = padded_table(self.table_hn.float(), max(prefix - 1, 0), query.shape[2])
            kind, count = TABLE, position.shape[1]
        bias = unused if self.bias_h is None else self.bias_h.float().contiguous()
        d0, d1 = split_head_size(query.shape[-1])
        switches = {
            "F": self.function,
            "SOFTMAX": self.function is None,
            "BIAS": self.bias_h is not None,
            "POSITION": kind,
            "WINDOW": self.window is not None,
            "PREFIX": prefix > 0,
            "PRECISION": precision(query),
            "WIDE": is_wide(query, key),
            "UNIT": UNIT if self.function is None else 1.0,
            "D0": d0,
            "D1": d1,
        }
        at_zero = max(prefix - 1, 0) + ROW_BLOCK
        numbers = (bias, position, self.scale, self.window or 0, prefix, at_zero, count)
        return query, key, numbers, switches
