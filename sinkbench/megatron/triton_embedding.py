"""The gradient of a table of embeddings, added to where gradients are summed up, in a Triton kernel.

Shapes: t token, n hidden size, v row of the table.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 1024
"""Of a program."""


@triton.jit
def _add_rows(total_ptr, rows_ptr, gradient_ptr, stride, count, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """One token's columns. Tokens of one row meet in the cache, in any order."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token).to(tl.int64)
    if (row >= 0) & (row < count):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        values = tl.load(gradient_ptr + token * stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.atomic_add(total_ptr + row * WIDTH + columns, values, mask=inside, sem="relaxed")


def add_rows(total_vn: Tensor, rows_t: Tensor, gradient_tn: Tensor) -> None:
    """Adds each gradient to its row of the total, which is float32 and contiguous; there is none for a row
    outside of it."""
    if gradient_tn.stride(-1) != 1:
        gradient_tn = gradient_tn.contiguous()
    tokens, width = gradient_tn.shape
    columns = min(triton.next_power_of_2(width), MOST_COLUMNS)
    _add_rows[(tokens, triton.cdiv(width, columns))](
        total_vn, rows_t.contiguous(), gradient_tn, gradient_tn.stride(0), total_vn.shape[0],
        WIDTH=width, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
