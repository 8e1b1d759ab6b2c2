"""What the Gluon kernels of attention share: blocks by the copy engine, and products that are under way.

A head size that is no power of two has two parts, as in the Triton kernels. An operand is a tuple of its
parts: descriptors of blocks [1, 1, rows, columns], buffers in shared memory, or sums in registers.

What a loop reads lies in a ring of stages. The copy engine fills a stage and counts what has come on a
barrier, whose phase tells the rounds of the ring apart. A stage is filled again when the products that read
it have been waited for and all warps have met.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

STAGES = gl.constexpr(2)
"""Of a ring. Three were no faster at head size 96, and at 128 leave a multiprocessor one program of two."""

# Which Triton 3.6 calls otherwise.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def parts(first, second, COUNT: gl.constexpr):
    """An operand of a kernel's arguments; where there is one part, the second is None."""
    return (first, second) if COUNT == 2 else (first,)


@gluon.jit
def block_of(operand):
    """Room for a block of what descriptors describe."""
    return [gl.allocate_shared_memory(part.dtype, part.block_shape, part.layout) for part in operand]


@gluon.jit
def ring_of(operand):
    """Room for the stages of such blocks."""
    return [
        gl.allocate_shared_memory(part.dtype, [STAGES] + part.block_shape, part.layout)  # noqa: RUF005
        for part in operand
    ]


@gluon.jit
def stage_of(ring, stage):
    return [part.index(stage) for part in ring]


@gluon.jit
def matrices(block):
    """[1, 1, rows, columns] as [rows, columns]."""
    return [part.reshape([part.shape[2], part.shape[3]]) for part in block]


@gluon.jit
def turned(block):
    return [part.permute((1, 0)) for part in matrices(block)]


@gluon.jit
def in_registers(block, LAYOUT: gl.constexpr):
    """As the left side of products, which then do not read it from shared memory each time."""
    return [part.load(LAYOUT) for part in matrices(block)]


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """One for each block, or pair of blocks, that is waited for apart from others."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        mbarrier.init(made.index(n), count=1)
    return made


@gluon.jit
def release(made, COUNT: gl.constexpr):
    """Their memory for something else."""
    for n in gl.static_range(COUNT):
        mbarrier.invalidate(made.index(n))


@gluon.jit
def expect(operand, COUNT: gl.constexpr, MORE_BYTES: gl.constexpr, barrier):
    """Lets a barrier wait for so many blocks like those of an operand, and for so much else."""
    first = operand[0].block_type
    if len(operand) == 2:
        mbarrier.expect(barrier, COUNT * (first.nbytes + operand[1].block_type.nbytes) + MORE_BYTES)
    else:
        mbarrier.expect(barrier, COUNT * first.nbytes + MORE_BYTES)


@gluon.jit
def fetch(operand, batch, head, row, block, barrier):
    """Has the copy engine bring a head's rows from ``row`` on, and zeros beyond the end; the barrier has to
    expect them."""
    column = 0
    for n in gl.static_range(len(operand)):
        async_load(operand[n], [batch, head, row, column], barrier, block[n])
        column += operand[n].block_shape[3]


@gluon.jit
def fetch_one(operand, batch, head, row, block, barrier):
    expect(operand, 1, 0, barrier)
    fetch(operand, batch, head, row, block, barrier)


@gluon.jit
def fetch_two(one, other, batch, head, row, one_block, other_block, barrier):
    """Rows of two operands alike, which one barrier waits for."""
    expect(one, 2, 0, barrier)
    fetch(one, batch, head, row, one_block, barrier)
    fetch(other, batch, head, row, other_block, barrier)


@gluon.constexpr_function
def result(columns: int, warps: int) -> gl.NVMMADistributedLayout:
    """The layout of a product with so many columns. A warp has 16 rows of every 16 times the warps."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.jit
def product(left, right, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The sum of the products of the parts, [rows, columns] float32, under way: one group for each part."""
    total = gl.zeros([ROWS, COLUMNS], gl.float32, result(COLUMNS, gl.num_warps()))
    for n in gl.static_range(len(left)):
        total = warpgroup_mma(left[n], right[n], total, use_acc=n > 0, is_async=True)
    return total


@gluon.jit
def _zeros(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    return gl.zeros([ROWS, COLUMNS], gl.float32, result(COLUMNS, gl.num_warps()))


@gluon.jit
def nothing(operand, ROWS: gl.constexpr):
    """Sums [rows, columns of each part] to begin with. The wait is for no product: it keeps the compiler from
    making the zeros where products are under way, each of which would then run alone (C7515)."""
    return under_way(waited([_zeros(ROWS, part.block_shape[3]) for part in operand]))


@gluon.jit
def _add(left, right, total):
    operand: gl.constexpr = gl.DotOperandLayout(0, result(right.shape[1], gl.num_warps()), 2)
    return warpgroup_mma(gl.convert_layout(left, operand), right, total, is_async=True)


@gluon.jit
def add_product(left, right, sums):
    """sums + left right, under way: one group for each part.

    Args:
        left: [rows, k] in the registers of a product.
        right: parts [k, columns] in shared memory.
    """
    added = sums[:0]
    for n in gl.static_range(len(sums)):
        added += (_add(left, right[n], sums[n]),)
    return added


@gluon.jit
def waited(sums):
    """Sums when all that is under way is done."""
    return [warpgroup_mma_wait(0, [part]) for part in sums]


@gluon.jit
def under_way(sums):
    """As what products are added to."""
    return [warpgroup_mma_init(part) for part in sums]


@gluon.jit
def _store(pointer, stride, values, row, column, length):
    layout: gl.constexpr = values.type.layout
    rows = row + gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    at = rows.to(gl.int64)[:, None] * stride + columns[None, :]
    gl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=(rows < length)[:, None])


@gluon.jit
def store(pointer, stride, sums, row, length, factor):
    """Rows of a head from ``row`` on, those that exist, times a factor."""
    column = 0
    for n in gl.static_range(len(sums)):
        _store(pointer, stride, sums[n] * factor, row, column, length)
        column += sums[n].shape[1]
