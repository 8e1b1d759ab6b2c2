"""The kernels of kernel attention; see ``triton_linear`` for the formulas and shapes.

A program takes one chunk, C positions, of a head. Features are read in blocks of BLOCK, those of the result
are in one block of COLUMNS. ROWS: rows have a normaliser. WIDE: offsets within a head exceed 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinkbench.attention.triton_blocks import at_rows, dot


@triton.jit
def _load(base, rows, length, columns, size, stride, WIDE: tl.constexpr):
    """A block of a [t, d] matrix, zero beyond its ends."""
    inside = (rows < length)[:, None] & (columns < size)[None, :]
    return tl.load(base + at_rows(rows, stride, WIDE) + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, length, columns, size, stride, value, WIDE: tl.constexpr):
    inside = (rows < length)[:, None] & (columns < size)[None, :]
    place = base + at_rows(rows, stride, WIDE) + columns[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _terms(factor_ptr, delta_ptr, rows, length, scale, ROWS: tl.constexpr):
    """c and c D of rows, 0 beyond the end where they are stored; else the scale and 0."""
    factor = tl.zeros_like(rows).to(tl.float32) + scale
    delta = tl.zeros_like(factor)
    if ROWS:
        inside = rows < length
        factor = tl.load(factor_ptr + rows, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
    return factor, delta


@triton.jit
def _scores(
    x_ptr, y_ptr, stride_x, stride_y, rows, length,
    SIZE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_i.y_j of a chunk, [C, C]."""
    s = tl.zeros([C, C], tl.float32)
    for at in range(0, SIZE, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        x = _load(x_ptr, rows, length, columns, SIZE, stride_x, WIDE)
        y = _load(y_ptr, rows, length, columns, SIZE, stride_y, WIDE)
        s = dot(x, tl.trans(y), s, PRECISION)
    return s


@triton.jit
def _scores_and_past(
    x_ptr, y_ptr, state_ptr, stride_x, stride_y, rows, length, columns,
    SIZE: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x_i.y_j of a chunk, and columns of x times a state [SIZE, OUT], or times a transposed one [OUT, SIZE].
    Read together, so that none waits for the other's product."""
    s = tl.zeros([C, C], tl.float32)
    past = tl.zeros([C, COLUMNS], tl.float32)
    for at in range(0, SIZE, BLOCK):
        features = at + tl.arange(0, BLOCK)
        x = _load(x_ptr, rows, length, features, SIZE, stride_x, WIDE)
        y = _load(y_ptr, rows, length, features, SIZE, stride_y, WIDE)
        if TRANSPOSED:
            state = tl.trans(_load(state_ptr, columns, OUT, features, SIZE, SIZE, False))
        else:
            state = _load(state_ptr, features, SIZE, columns, OUT, OUT, False)
        s = dot(x, tl.trans(y), s, PRECISION)
        past = dot(x, state, past, PRECISION)
    return s, past


@triton.jit
def running_sums(
    x_ptr, y_ptr, factor_ptr, delta_ptr, state_ptr, sum_ptr,
    stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt,
    groups, group, length, chunks, scale,
    D: tl.constexpr, E: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the states before each chunk, the sums of k v^T; or, as a further block, of the sums of k
    alone. BACKWARD: of those after each chunk, the sums of q (c dO)^T and of c D q over the heads of a group.

    The chunks of all heads are one loop, which the compiler can pipeline.
    """
    part, pair = tl.program_id(0), tl.program_id(1)
    batch, first = (pair // groups).to(tl.int64), (pair % groups * group).to(tl.int64)
    x_ptr += batch * stride_xb + first * stride_xh
    y_ptr += batch * stride_yb + first * stride_yh
    row = (pair.to(tl.int64) * group) * length
    state_ptr += pair.to(tl.int64) * chunks * D * E
    sum_ptr += pair.to(tl.int64) * chunks * D
    across = tl.cdiv(E, BLOCK)
    if part < tl.cdiv(D, BLOCK) * across:
        features = part // across * BLOCK + tl.arange(0, BLOCK)
        columns = part % across * BLOCK + tl.arange(0, BLOCK)
        state = tl.zeros([BLOCK, BLOCK], tl.float32)
        for step in range(chunks * group):
            chunk, head = step // group, (step % group).to(tl.int64)
            if BACKWARD:
                chunk = chunks - 1 - chunk
            size = tl.where(head == 0, D, 0)  # written before the first head's
            _store(state_ptr + chunk.to(tl.int64) * D * E, features, size, columns, E, E, state, False)
            rows = chunk * C + tl.arange(0, C)
            x = _load(x_ptr + head * stride_xh, rows, length, features, D, stride_xt, WIDE)
            y = _load(y_ptr + head * stride_yh, rows, length, columns, E, stride_yt, WIDE)
            if BACKWARD:
                at = row + head * length
                factor, _ = _terms(factor_ptr + at, delta_ptr + at, rows, length, scale, ROWS)
                y = (y.to(tl.float32) * factor[:, None]).to(y.dtype)
            state = dot(tl.trans(x), y, state, PRECISION)
    else:
        features = (part - tl.cdiv(D, BLOCK) * across) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        # Stages are named here: by itself the compiler pipelines only what products read.
        for step in tl.range(chunks * group, num_stages=4):
            chunk, head = step // group, (step % group).to(tl.int64)
            if BACKWARD:
                chunk = chunks - 1 - chunk
            place = sum_ptr + chunk.to(tl.int64) * D + features
            tl.store(place, total, mask=(features < D) & (head == 0))
            rows = chunk * C + tl.arange(0, C)
            x = _load(x_ptr + head * stride_xh, rows, length, features, D, stride_xt, WIDE).to(tl.float32)
            if BACKWARD:
                at = row + head * length
                _, delta = _terms(factor_ptr + at, delta_ptr + at, rows, length, scale, ROWS)
                x *= delta[:, None]
            total += tl.sum(x, 0)


@triton.jit
def outputs(
    q_ptr, k_ptr, v_ptr, o_ptr, total_ptr, state_ptr, keys_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    heads, group, length, scale, eps,
    D: tl.constexpr, E: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """O of a chunk, and with ROWS the sums of its weights. NORMALIZE: 1 divides by the sum + eps, 2 by
    max(|sum|, 1)."""
    chunk, pair = tl.program_id(0), tl.program_id(1)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    o_ptr += batch * stride_ob + head.to(tl.int64) * stride_oh
    place = (batch * (heads // group) + kv_head) * tl.num_programs(0) + chunk
    local = tl.arange(0, C)
    rows = chunk * C + local
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    v = _load(v_ptr, rows, length, columns, E, stride_vt, WIDE)
    s, out = _scores_and_past(
        q_ptr, k_ptr, state_ptr + place * D * E, stride_qt, stride_kt, rows, length, columns,
        D, E, False, PRECISION, WIDE, C, BLOCK, COLUMNS,
    )  # fmt: skip
    s = tl.where(local[:, None] >= local[None, :], s, 0.0)
    out = dot(s.to(v.dtype), v, out, PRECISION) * scale
    if ROWS:
        total = tl.sum(s, 1)
        for at in range(0, D, BLOCK):
            features = at + tl.arange(0, BLOCK)
            q = _load(q_ptr, rows, length, features, D, stride_qt, WIDE).to(tl.float32)
            keys = tl.load(keys_ptr + place * D + features, mask=features < D, other=0.0)
            total += tl.sum(q * keys[None, :], 1)
        total *= scale
        first = tl.program_id(2) == 0
        tl.store(total_ptr + pair.to(tl.int64) * length + rows, total, mask=(rows < length) & first)
        if NORMALIZE == 1:
            out = out / (total + eps)[:, None]
        if NORMALIZE == 2:
            out = out / tl.maximum(tl.abs(total), 1.0)[:, None]
    _store(o_ptr, rows, length, columns, E, stride_ot, out, WIDE)


@triton.jit
def row_terms(
    do_ptr, o_ptr, total_ptr, factor_ptr, delta_ptr,
    stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot, heads, length, scale, eps,
    E: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """c and c D of a block of rows."""
    pair = tl.program_id(1)
    head, batch = (pair % heads).to(tl.int64), (pair // heads).to(tl.int64)
    rows = tl.program_id(0) * C + tl.arange(0, C)
    columns = tl.arange(0, COLUMNS)
    do = _load(
        do_ptr + batch * stride_dob + head * stride_doh, rows, length, columns, E, stride_dot, WIDE
    ).to(tl.float32)
    o = _load(o_ptr + batch * stride_ob + head * stride_oh, rows, length, columns, E, stride_ot, WIDE)
    at, inside = pair.to(tl.int64) * length + rows, rows < length
    total = tl.load(total_ptr + at, mask=inside, other=1.0)
    delta = tl.sum(do * o.to(tl.float32), 1)
    if NORMALIZE == 1:
        factor = scale / (total + eps)
    else:
        factor = scale / tl.maximum(tl.abs(total), 1.0)
        delta = tl.where(total >= 1.0, delta, tl.where(total <= -1.0, -delta, 0.0))
    tl.store(factor_ptr + at, factor, mask=inside)
    tl.store(delta_ptr + at, factor * delta, mask=inside)


@triton.jit
def _gradient_of_keys(
    x_ptr, y_ptr, w_ptr, state_ptr, factor_ptr, delta_ptr,
    stride_x, stride_yh, stride_y, stride_wh, stride_w, group, rows, length, columns, scale,
    SIZE: tl.constexpr, OUT: tl.constexpr, OF_KEYS: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns of dK + u for x = v, y = dO and w = q, or of dV for x = k, y = q and w = dO, summed over the
    heads of a group."""
    factor, delta = _terms(factor_ptr, delta_ptr, rows, length, scale, ROWS)
    w = _load(w_ptr, rows, length, columns, OUT, stride_w, WIDE)
    s, out = _scores_and_past(
        x_ptr, y_ptr, state_ptr, stride_x, stride_y, rows, length, columns,
        SIZE, OUT, OF_KEYS, PRECISION, WIDE, C, BLOCK, COLUMNS,
    )  # fmt: skip
    out = _add_queries(s, w, factor, delta, out, OF_KEYS, PRECISION, C)
    for _ in range(1, group):
        y_ptr += stride_yh
        w_ptr += stride_wh
        factor_ptr += length
        delta_ptr += length
        factor, delta = _terms(factor_ptr, delta_ptr, rows, length, scale, ROWS)
        w = _load(w_ptr, rows, length, columns, OUT, stride_w, WIDE)
        s = _scores(x_ptr, y_ptr, stride_x, stride_y, rows, length, SIZE, PRECISION, WIDE, C, BLOCK)
        out = _add_queries(s, w, factor, delta, out, OF_KEYS, PRECISION, C)
    return out


@triton.jit
def _add_queries(
    s, w, factor, delta, out, OF_KEYS: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    s *= factor[None, :]
    if OF_KEYS:
        s -= delta[None, :]
    local = tl.arange(0, C)
    s = tl.where(local[:, None] <= local[None, :], s, 0.0)
    return dot(s.to(w.dtype), w, out, PRECISION)


@triton.jit
def gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, factor_ptr, delta_ptr,
    before_ptr, keys_ptr, after_ptr, queries_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dqb, stride_dqh, stride_dqt, stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    heads, group, length, scale,
    D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of columns of dQ, dK or dV of a chunk. The programs of a chunk are neighbours, so that what
    one reads the others find in the cache. dK and dV are those of a group's first head."""
    task, chunk, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
    do_ptr += batch * stride_dob + head.to(tl.int64) * stride_doh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    factor_ptr += pair.to(tl.int64) * length
    delta_ptr += pair.to(tl.int64) * length
    place = (batch * (heads // group) + kv_head) * tl.num_programs(1) + chunk
    before_ptr += place * D * E
    after_ptr += place * D * E
    local = tl.arange(0, C)
    rows = chunk * C + local
    blocks = tl.cdiv(D, COLUMNS)
    columns = task % blocks * COLUMNS + tl.arange(0, COLUMNS)
    if task < blocks:
        factor, delta = _terms(factor_ptr, delta_ptr, rows, length, scale, ROWS)
        k = _load(k_ptr, rows, length, columns, D, stride_kt, WIDE)
        s, out = _scores_and_past(
            do_ptr, v_ptr, before_ptr, stride_dot, stride_vt, rows, length, columns,
            E, D, True, PRECISION, WIDE, C, BLOCK, COLUMNS,
        )  # fmt: skip
        s = s * factor[:, None] - delta[:, None]
        s = tl.where(local[:, None] >= local[None, :], s, 0.0)
        out *= factor[:, None]
        if ROWS:
            keys = tl.load(keys_ptr + place * D + columns, mask=columns < D, other=0.0)
            out -= delta[:, None] * keys[None, :]
        out = dot(s.to(k.dtype), k, out, PRECISION)
        dq_ptr += batch * stride_dqb + head.to(tl.int64) * stride_dqh
        _store(dq_ptr, rows, length, columns, D, stride_dqt, out, WIDE)
    elif head % group == 0:
        if task < 2 * blocks:
            out = _gradient_of_keys(
                v_ptr, do_ptr, q_ptr, after_ptr, factor_ptr, delta_ptr,
                stride_vt, stride_doh, stride_dot, stride_qh, stride_qt, group, rows, length, columns, scale,
                E, D, True, ROWS, PRECISION, WIDE, C, BLOCK, COLUMNS,
            )  # fmt: skip
            if ROWS:
                out -= tl.load(queries_ptr + place * D + columns, mask=columns < D, other=0.0)[None, :]
            dk_ptr += batch * stride_dkb + kv_head * stride_dkh
            _store(dk_ptr, rows, length, columns, D, stride_dkt, out, WIDE)
        else:
            columns = (task - 2 * blocks) * COLUMNS + tl.arange(0, COLUMNS)
            out = _gradient_of_keys(
                k_ptr, q_ptr, do_ptr, after_ptr, factor_ptr, delta_ptr,
                stride_kt, stride_qh, stride_qt, stride_doh, stride_dot, group, rows, length, columns, scale,
                D, E, False, ROWS, PRECISION, WIDE, C, BLOCK, COLUMNS,
            )  # fmt: skip
            dv_ptr += batch * stride_dvb + kv_head * stride_dvh
            _store(dv_ptr, rows, length, columns, E, stride_dvt, out, WIDE)
