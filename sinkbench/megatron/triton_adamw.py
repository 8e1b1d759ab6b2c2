"""AdamW over all shards of parameters in one Triton kernel, which reads where they are from a table.

With the gradient g, the divisor c, step t, rate r, decay w and decay rates b1, b2 it is torch's fused AdamW
(``adam_math`` in aten/src/ATen/native/cuda/fused_adam_utils.cuh, mode ADAMW):

    g <- g / c          m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    p <- p - r w p - r / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

in float32, where torch's goes by way of float64. b m is m - (1 - b) m, so that weights add up to 1 whatever
their rounding; the factors with b^t are computed in float64, once for each shard. Gradients are only read. In
the same pass the model's parameter is written in its own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Elements of a program: 8 a thread, two loads of 16 bytes from each of the four arrays."""
WARPS = 8
COLUMNS = tl.constexpr(8)
"""Of the table, int64: addresses of the shard's parameter, gradient, two moments and place in the model, its
elements, its first program, and whether it counts in the norm."""
NUMBERS = tl.constexpr(8)
"""Of a shard in this step, float32: r / (1 - b1^t), 1 / sqrt(1 - b2^t), r w, eps, 1 - b1, 1 - b2, and two
that are not used."""
ROOM = tl.constexpr(256)
"""Shards whose numbers one program computes."""
WIDTH = tl.constexpr(4)
"""Elements that one thread reads or writes at once: 16 bytes of float32, 8 of bf16. More of bf16 would have
to go to other threads first."""


@triton.jit(do_not_specialize=["begin", "end"])
def _advance(
    steps_ptr, numbers_ptr, refused_ptr, begin, end, rate, decay, eps, weight_1, weight_2,
    LOG_1: tl.constexpr, LOG_2: tl.constexpr,
):  # fmt: skip
    """Counts a step that is not refused, and computes the numbers of shards ``begin`` to ``end``.

    LOG_1 and LOG_2 are log2 of b1 and b2, and None for 0.
    """
    shard = begin + tl.program_id(0) * ROOM + tl.arange(0, ROOM)
    mask = shard < end
    step = tl.load(steps_ptr + shard, mask=mask, other=0.0)
    step = tl.where(tl.load(refused_ptr) == 0.0, step + 1.0, step)
    tl.store(steps_ptr + shard, step, mask=mask)
    t = tl.maximum(step, 1.0).to(tl.float64)  # 0: refused before the first, when nothing reads what follows
    left_1 = tl.full([ROOM], 1.0, tl.float64)
    left_2 = left_1
    if LOG_1 is not None:
        left_1 -= tl.exp2(t * LOG_1)
    if LOG_2 is not None:
        left_2 -= tl.exp2(t * LOG_2)
    row = numbers_ptr + shard * NUMBERS
    tl.store(row, (rate / left_1).to(tl.float32), mask=mask)
    tl.store(row + 1, (1.0 / tl.sqrt(left_2)).to(tl.float32), mask=mask)
    tl.store(row + 2, decay, mask=mask)
    tl.store(row + 3, eps, mask=mask)
    tl.store(row + 4, weight_1, mask=mask)
    tl.store(row + 5, weight_2, mask=mask)


@triton.jit
def _array(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The array whose address stands in a column of the table."""
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [WIDTH * (dtype.primitive_bitwidth // 8)])
    return pointer


@triton.jit
def _place(row, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's elements of its shard, and which of them exist."""
    count = tl.load(row + 5)
    if ALIGNED:
        count = tl.multiple_of(count, [WIDTH])
    at = (tl.program_id(0) - tl.load(row + 6)) * TILE + tl.arange(0, TILE)
    return at, at < count


@triton.jit
def _update(
    table_ptr, shard_ptr, numbers_ptr, divisor_ptr, refused_ptr,
    MODEL: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The update of one program's elements. MODEL is the dtype in the model; None: nothing goes there."""
    if tl.load(refused_ptr) == 0.0:
        shard = tl.load(shard_ptr + tl.program_id(0)).to(tl.int64)
        row, numbers = table_ptr + shard * COLUMNS, numbers_ptr + shard * NUMBERS
        at, mask = _place(row, TILE, ALIGNED)
        parameter_ptr = _array(row, 0, tl.float32, ALIGNED) + at
        mean_ptr = _array(row, 2, tl.float32, ALIGNED) + at
        square_ptr = _array(row, 3, tl.float32, ALIGNED) + at
        g = tl.load(_array(row, 1, tl.float32, ALIGNED) + at, mask=mask)
        m = tl.load(mean_ptr, mask=mask)
        v = tl.load(square_ptr, mask=mask)
        p = tl.load(parameter_ptr, mask=mask)
        g *= tl.div_rn(1.0, tl.load(divisor_ptr))
        weight = tl.load(numbers + 4)
        m = (m - weight * m) + weight * g
        weight = tl.load(numbers + 5)
        v = (v - weight * v) + weight * g * g
        p -= tl.load(numbers + 2) * p
        root = tl.sqrt_rn(v) * tl.load(numbers + 1) + tl.load(numbers + 3)
        p -= tl.div_rn(tl.load(numbers) * m, root)
        tl.store(mean_ptr, m, mask=mask)
        tl.store(square_ptr, v, mask=mask)
        tl.store(parameter_ptr, p, mask=mask)
        if MODEL is not None:
            tl.store(_array(row, 4, MODEL, ALIGNED) + at, p.to(MODEL), mask=mask)


@triton.jit
def _squares(table_ptr, shard_ptr, sum_ptr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """The sum of the squares of one program's gradients, 0 where they do not count."""
    row = table_ptr + tl.load(shard_ptr + tl.program_id(0)).to(tl.int64) * COLUMNS
    at, mask = _place(row, TILE, ALIGNED)
    counts = tl.load(row + 7) != 0
    g = tl.load(_array(row, 1, tl.float32, ALIGNED) + at, mask=mask & counts, other=0.0)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(g * g, 0))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part of a parameter with its gradient and moments: float32, each contiguous, of one size.

    Attributes:
        model: its place in the model, of any floating dtype that Triton has; None: it is in the model itself.
        counts: in the gradient's norm.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    model: Tensor | None = None
    counts: bool = True

    def arrays(self) -> list[Tensor]:
        own = [self.parameter, self.gradient, self.exp_avg, self.exp_avg_sq]
        return own if self.model is None else [*own, self.model]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Consecutive shards, of which there are ``count``, with one setting of AdamW."""

    count: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class _Launch:
    """Attributes:
    model: the dtype in the model; None: not written.
    aligned: all arrays begin at multiples of WIDTH elements, and sizes are such multiples.
    shards: of each program, int32.
    """

    model: torch.dtype | None
    aligned: bool
    shards: Tensor


class Table:
    """Where shards are, on their device. It holds addresses: whoever has it keeps the tensors, and makes a
    new one when any of them moves.

    Args:
        shards: in the order of their groups.
        steps: updates of each so far, float32 [shards].
    """

    def __init__(self, shards: Sequence[Shard], steps: Tensor) -> None:
        rows: list[list[int]] = []
        programs: dict[tuple[torch.dtype | None, bool], list[tuple[int, int]]] = {}
        begun: dict[tuple[torch.dtype | None, bool], int] = {}
        for number, shard in enumerate(shards):
            arrays, size = shard.arrays(), shard.parameter.numel()
            assert all(x.dtype == torch.float32 for x in arrays[:4])
            assert all(x.is_contiguous() and x.numel() == size for x in arrays)
            addresses = [x.data_ptr() for x in arrays]
            misplaced = [x.data_ptr() % (WIDTH.value * x.element_size()) for x in arrays]
            aligned = not any(misplaced) and size % WIDTH.value == 0
            key = (None if shard.model is None else shard.model.dtype, aligned)
            first, count = begun.get(key, 0), triton.cdiv(size, TILE)
            begun[key] = first + count
            programs.setdefault(key, []).append((number, count))
            rows.append([*(*addresses, 0)[:5], size, first, int(shard.counts)])
        self._steps = steps
        self._rows = torch.tensor(rows, dtype=torch.int64, device=steps.device)
        self._numbers = steps.new_empty(len(rows), NUMBERS.value)
        self._launches = [
            _Launch(*key, _repeated(found, steps.device)) for key, found in programs.items() if begun[key]
        ]

    def squares(self) -> Tensor:
        """The sum of the squares of all gradients that count, float32 []."""
        sums = self._numbers.new_empty(sum(len(launch.shards) for launch in self._launches))
        parts = sums.split([len(launch.shards) for launch in self._launches])
        for launch, part in zip(self._launches, parts, strict=True):
            _squares[(len(part),)](
                self._rows, launch.shards, part, ALIGNED=launch.aligned, TILE=TILE, num_warps=WARPS
            )
        return sums.sum()

    def update(self, groups: Sequence[Group], divisor: Tensor, refused: Tensor) -> None:
        """One update of all shards, in a launch for each group and one for all (one more for those that are
        not aligned).

        Args:
            divisor: of the gradients, float32 [].
            refused: not 0: neither shards nor steps change, float32 [].
        """
        begin = 0
        for group in groups:
            if group.count:
                self._advance(begin, group, refused)
                begin += group.count
        assert begin == len(self._rows)
        for launch in self._launches:
            _update[(len(launch.shards),)](
                self._rows, launch.shards, self._numbers, divisor, refused,
                MODEL=None if launch.model is None else getattr(tl, str(launch.model).removeprefix("torch.")),
                ALIGNED=launch.aligned, TILE=TILE, num_warps=WARPS,
            )  # fmt: skip

    def _advance(self, begin: int, group: Group, refused: Tensor) -> None:
        log_1, log_2 = (math.log2(beta) if beta else None for beta in group.betas)
        _advance[(triton.cdiv(group.count, ROOM.value),)](
            self._steps, self._numbers, refused, begin, begin + group.count, group.lr,
            group.lr * group.weight_decay, group.eps, 1 - group.betas[0], 1 - group.betas[1],
            LOG_1=log_1, LOG_2=log_2,
        )  # fmt: skip


def _repeated(programs: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    numbers, counts = torch.tensor(programs).unbind(1)
    return numbers.repeat_interleave(counts).to(device, torch.int32)
