"""What the Triton kernels of attention share: loads, masks, biases, and which blocks see one another.

What a variant does not need is switched off at compile time. WINDOW: a query sees the newest ``window`` keys
only. PREFIX: the first ``prefix`` positions, at most the length, see one another. DOCUMENTS, not together
with PREFIX: a query sees keys of its own document only. POSITION: 0 for no bias by distance, 1 for
-slope |i - j|, 2 for a table over the distances from ``-ahead`` on, which goes on beyond all blocks. WIDE:
offsets within a tensor exceed 32 bits. UNIT: factor on scores and their biases, log2 e for a softmax, whose
weights are powers of two, else 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinkbench.triton_math import exp2

SLOPE = 1
TABLE = 2
ROW_BLOCK = 128
"""The largest block of rows. What the backward kernels read by row has room for a multiple of it, so that
they need no mask."""

if triton.knobs.runtime.interpret:

    @triton.jit
    def look_up(table_ptr, at):
        """Numbers of a table."""
        return tl.load(table_ptr + at)

else:

    @triton.jit
    def look_up(table_ptr, at):
        """Numbers of a table. The compiler would send those of a ``tl.load`` through shared memory, like
        blocks of keys, which takes longer than to read them from the cache; and it would keep the address of
        each in two registers."""
        return tl.inline_asm_elementwise(
            "{ .reg .u64 at; cvt.u64.u32 at, $2; add.u64 at, at, $1; ld.global.nc.f32 $0, [at]; }",
            "=f,l,r",
            [table_ptr, at * 4],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def rows_of(pair, length):
    """Where the rows of a sequence's head begin in what has room for whole blocks of them."""
    return tl.cast(pair, tl.int64) * (tl.cdiv(length, 128) * 128)


@triton.jit
def place(blocks, pairs, together):
    """Number of the block and the pair of a program, one of ``blocks * pairs`` along the first axis, where a
    pair is a sequence's head. For ``together`` pairs the first blocks come before the second ones and so on:
    kernels number blocks from the longest on, so that the last programs of a launch are short, and what
    these pairs read again and again fits the cache (``triton_tensors.pairs_in_cache``)."""
    first = tl.program_id(0) // (blocks * together) * together
    within = tl.program_id(0) % (blocks * together)
    size = tl.minimum(pairs - first, together)
    return within // size, first + within % size


@triton.jit
def at_rows(rows, stride, WIDE: tl.constexpr):
    """Offsets of the rows of a matrix, [t, 1]."""
    if WIDE:
        rows = rows.to(tl.int64)
    return rows[:, None] * stride


@triton.jit
def load_rows(base, rows, columns, stride, length, PRESENT: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a [t, d] matrix as a block, zero beyond the end and for a part that is not present."""
    inside = (rows < length)[:, None] & PRESENT
    return tl.load(base + at_rows(rows, stride, WIDE) + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_block(
    base, at, columns, stride, length, MASK: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of a [t, d] matrix from ``at`` on, for a loop over blocks: where they lie from the first one on is
    the same for each, and without MASK, where all of them exist, none is compared with the end, beyond which
    there are zeros. ``load_rows`` takes up to two instructions a score more. The kernel for keys has no
    register left for this."""
    rows = tl.arange(0, BLOCK)
    inside = (rows < length - at)[:, None]
    if WIDE:  # the offset of a block as one number of 64 bits makes the compiler run each wgmma alone (C7515)
        offsets = at_rows(at + rows, stride, WIDE) + columns[None, :]
    else:
        offsets = at * stride + (rows[:, None] * stride + columns[None, :])
    return tl.load(base + offsets, mask=inside, other=0.0) if MASK else tl.load(base + offsets)


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def load_position(position_ptr, POSITION: tl.constexpr, BY_KEY: tl.constexpr, UNIT: tl.constexpr):
    """A head's slope m, and which of two forms its bias has. A softmax does not see what is added to a whole
    row, so where m < 0 favours far keys, the bias of row i and key j is m (j - n) in the place of -m (i - j),
    with n where the row's document begins: what has weight then has a small bias, and what rounds a large one
    has no weight. In a window no key is far. A table is read by distance."""
    slope = 0.0
    if POSITION == 1:
        slope = tl.load(position_ptr) * UNIT
    by_key = False
    if BY_KEY:
        by_key = slope < 0.0
    return slope, by_key


@triton.jit
def distance_of(row, key, begin, by_key, PREFIX: tl.constexpr):
    """What a slope is the negative factor of; ``row`` and ``key`` broadcast to the shape of the scores."""
    behind = row - key
    if PREFIX:  # keys may lie ahead
        behind = tl.abs(behind)
    return (behind - tl.where(by_key, row - begin, 0)).to(tl.float32)


@triton.jit
def scores(
    s, scale, bias, level, row, key, begin, origin, table_ptr, slope, by_key, ahead,
    BIAS: tl.constexpr, LEVEL: tl.constexpr, POSITION: tl.constexpr, PREFIX: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Scores of products q.k, with a head's bias and the one by distance. What is the same in a row is added
    up before, which is one operation for all keys.

    Args:
        level: with LEVEL, taken off each row's scores; broadcasts to their shape, like what follows.
        row, key: numbers of queries and keys.
        begin: of ``load_documents``.
        origin: a position of the block. From there a slope takes one step for rows and one for keys, exact
            where they are near, which is less work than a distance of each pair.
        slope, by_key: of ``load_position``.
    """
    if BIAS and LEVEL:
        level = level - bias
    s = s * scale
    if POSITION == 1 and not PREFIX:
        of_row = slope * tl.where(by_key, begin - origin, row - origin).to(tl.float32)
        if LEVEL:
            of_row += level
        s += slope * (key - origin).to(tl.float32)
        s -= of_row
    elif LEVEL:
        s -= level
    if BIAS and not LEVEL:  # adding 0 would be an instruction
        s += bias
    if POSITION == 1 and PREFIX:
        s -= slope * distance_of(row, key, begin, by_key, PREFIX)
    if POSITION == 2:
        s += UNIT * look_up(table_ptr, row - key + ahead)
    return s


@triton.jit
def power_of_two(s):
    """A softmax's weight of a score less the logarithm of the row's sum, in powers of two."""
    return exp2(s)


@triton.jit
def itself(s, p):
    """The derivative of an exponential."""
    return p


@triton.jit
def load_documents(documents_ptr, rows, DOCUMENTS: tl.constexpr):
    """Where the documents of rows begin; 0 without documents.

    Args:
        documents_ptr: of a sequence: where the document of each position begins, then where it ends.
    """
    since = rows * 0
    if DOCUMENTS:
        since = tl.load(documents_ptr + rows)
    return since


@triton.jit
def visible(
    row, key, since, window, prefix, WINDOW: tl.constexpr, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Whether a query sees a key. ``row``, ``key`` and ``since``, of ``load_documents``, broadcast to the
    shape of the scores."""
    allowed = row >= key
    if DOCUMENTS:
        allowed = allowed & (key >= since)
    if WINDOW:
        allowed = allowed & (row - key < window)
    if PREFIX:
        allowed = allowed | ((row < prefix) & (key < prefix))
    return allowed


@triton.jit
def weigh(s, seen, r, largest, F: tl.constexpr, NORMALIZE: tl.constexpr, MASK: tl.constexpr):
    """Weights of a block of scores [q, k], the rows' sums with them, their largest scores, and with a softmax
    (NORMALIZE 3) what outputs so far fade by.

    Args:
        seen: with MASK, which keys the rows see.
    """
    fade = r
    if NORMALIZE == 3:
        if MASK:
            s = tl.where(seen, s, float("-inf"))
        now = tl.maximum(largest, tl.max(s, 1))
        # A row may have seen no key yet: then it has no largest score to be compared with.
        level = tl.where(now == float("-inf"), 0.0, now)
        p = F(s - level[:, None])
        fade = F(largest - level)
        r = r * fade + tl.sum(p, 1)
        largest = now
    else:
        p = F(s)
        if MASK:
            p = tl.where(seen, p, 0.0)
        if NORMALIZE:
            r += tl.sum(p, 1)
    return p, r, largest, fade


@triton.jit
def derive(
    s, row, key, since, window, prefix,
    F: tl.constexpr, DF: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """f and f' of scores, with MASK 0 where a query does not see a key; the rest as for ``visible``."""
    p = F(s)
    slope = DF(s, p)
    if MASK:
        seen = visible(row, key, since, window, prefix, WINDOW, PREFIX, DOCUMENTS)
        p = tl.where(seen, p, 0.0)
        slope = tl.where(seen, slope, 0.0)
    return p, slope


@triton.jit
def divisor(r, largest, eps, target, inside, NORMALIZE: tl.constexpr, UNIT: tl.constexpr):
    """What the outputs of rows are divided by: 1 for the sum + eps, 2 for max(|sum|, 1), of which the sum is
    stored, 3 for the sum of a softmax, of which the logarithm is stored."""
    if NORMALIZE == 3:
        tl.store(target, (largest + tl.log2(r)) / UNIT, mask=inside)
        r = tl.where(r == 0.0, 1.0, r)
    elif NORMALIZE == 2:
        tl.store(target, r, mask=inside)
        r = tl.maximum(tl.abs(r), 1.0)
    else:
        r += eps
        tl.store(target, r, mask=inside)
    return r


@triton.jit
def key_range(
    block, length, window, prefix, documents_ptr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """First and last key that a block of queries sees; in between, the first and the end of the keys that
    every query of the block sees. Without documents they begin with the first."""
    row = block * BLOCK_Q
    start = row * 0
    unmasked = row // BLOCK_K * BLOCK_K
    end = tl.minimum(length, row + BLOCK_Q)
    if WINDOW:
        start = tl.maximum(0, row - window + 1) // BLOCK_K * BLOCK_K
        unmasked = start
    if PREFIX:
        start = tl.where(row < prefix, 0, start)
        end = tl.where(row < prefix, tl.maximum(end, prefix), end)
        if WINDOW:
            unmasked = start
        else:
            unmasked = tl.where(row + BLOCK_Q <= prefix, prefix // BLOCK_K * BLOCK_K, unmasked)
    seen_by_all = start
    if DOCUMENTS:  # later rows' documents begin later
        start = tl.maximum(start, tl.load(documents_ptr + row) // BLOCK_K * BLOCK_K)
        last = tl.load(documents_ptr + tl.minimum(row + BLOCK_Q, length) - 1)
        seen_by_all = tl.minimum(unmasked, tl.cdiv(last, BLOCK_K) * BLOCK_K)
        if WINDOW:
            seen_by_all = start
            unmasked = start
    return start, seen_by_all, unmasked, end


@triton.jit
def far_keys(block, start, unmasked, constant_from, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the keys that all queries of a block see, the end of those so far that the bias is constant."""
    end = tl.maximum(block * BLOCK_Q - constant_from + 1, 0) // BLOCK_K * BLOCK_K
    return tl.maximum(start, tl.minimum(unmasked, end))


@triton.jit
def query_range(
    block, length, window, prefix, documents_ptr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """First and last query that sees some key of a block; in between, the first and the end of those that see
    every key of it. Without documents they go on to the last."""
    key = block * BLOCK_K
    start = key // BLOCK_Q * BLOCK_Q
    end = length
    if WINDOW:
        end = tl.minimum(length, key + BLOCK_K + window)
    masked_end = tl.minimum(end, tl.cdiv(key + BLOCK_K, BLOCK_Q) * BLOCK_Q)
    if PREFIX:
        start = tl.where(key < prefix, 0, start)
        end = tl.where(key < prefix, tl.maximum(end, prefix), end)
        masked_end = tl.where(key + BLOCK_K <= prefix, 0, masked_end)
    if DOCUMENTS:
        ends_ptr = documents_ptr + rows_of(1, length)
        end = tl.minimum(end, tl.load(ends_ptr + tl.minimum(key + BLOCK_K, length) - 1))
        masked_end = tl.minimum(end, masked_end)
    if WINDOW:
        masked_end = end
    unmasked_end = end
    if DOCUMENTS and not WINDOW:
        unmasked_end = tl.maximum(masked_end, tl.load(ends_ptr + key) // BLOCK_Q * BLOCK_Q)
    return start, masked_end, unmasked_end, end


@triton.jit
def far_queries(block, masked_end, end, constant_from, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the queries that see all keys of a block, the first so far that the bias is constant."""
    first = tl.maximum((block + 1) * BLOCK_K + constant_from - 1, 0)
    return tl.minimum(end, tl.maximum(masked_end, tl.cdiv(first, BLOCK_Q) * BLOCK_Q))


@triton.jit
def store_by_distance(target, values, behind, steps, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of a block's values at each distance of query and key, without atomics.

    With the rows turned by as many places as they lie down the block, a column c holds the distances that are
    c modulo BLOCK_K, in BLOCK_Q / BLOCK_K + 1 runs of rows, each of one distance.

    Args:
        target: [steps, BLOCK_Q / BLOCK_K + 1, BLOCK_K] of a block of queries. The sum at (n, r, c) is of the
            distance (n + r - BLOCK_Q / BLOCK_K) BLOCK_K + c.
        behind: of the block's first query, the distance of its first key, a multiple of BLOCK_K.
        steps: what is so far that it has no place is left out.
    """
    tl.static_assert(BLOCK_Q % BLOCK_K == 0)
    step = behind // BLOCK_K + BLOCK_Q // BLOCK_K - 1
    column = tl.arange(0, BLOCK_K)
    distance = tl.arange(0, BLOCK_Q)[:, None] - column[None, :]
    turned = tl.gather(values, distance & (BLOCK_K - 1), 1)
    for run in tl.static_range(BLOCK_Q // BLOCK_K + 1):
        of_run = (distance >= (run - 1) * BLOCK_K) & (distance < run * BLOCK_K)
        total = tl.sum(tl.where(of_run, turned, 0.0), 0)
        tl.store(target + step * (BLOCK_Q + BLOCK_K) + run * BLOCK_K + column, total, mask=step < steps)
