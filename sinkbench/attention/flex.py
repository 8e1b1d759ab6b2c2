"""Softmax attention by torch's FlexAttention: position biases, windows and prefixes without T x T scores.

It is compiled for each shape. Uncompiled it would compute T x T scores, and after a few recompilations of a
function dynamo leaves it so in silence; here such an overflow is an error.

A position bias is a function of the distance alone, so that it is computed once for all distances and looked
up; where it is learned, its gradient is gathered by distance and goes on through the function that made it.
One that falls evenly with the distance is computed from its slopes instead, unless these are learned.

Shapes: b sequence of the batch, h head, q query, k key, t position, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from sinkbench.api import AttentionSpec
from sinkbench.attention import sdpa
from sinkbench.attention.reference import Problem, scaled_and_biased

BLOCK = 128
"""Queries and keys of a block of the mask, and a multiple of the kernel's."""
COMPILED_SHAPES = 512
"""Shapes, masks and modes that may be compiled in a process."""
COMPILER = "inductor"


def missing(spec: AttentionSpec, head_size: int) -> list[str]:
    """What a declaration asks for that FlexAttention cannot do; empty if it can."""
    lacks = {
        "a log-sum-exp, which FlexAttention gives from torch 2.9 on": not hasattr(flex, "AuxRequest"),
        f"a head size of {head_size}": not 16 <= head_size <= 256,
    }
    return [*sdpa.missing(spec), *(what for what, wanted in lacks.items() if wanted)]


def run(p: Problem) -> Tensor:
    """O [b, h, q, d]. As in sdpa, a score bias only counts against a sink, and extra terms join the sum of
    the softmax afterwards."""
    length = p.query_bhqd.shape[2]
    if p.document_start_bk is None:
        mask = block_mask(length, p.spec.window, min(p.prefix, length), p.query_bhqd.device)
    else:
        mask = document_mask(p.document_start_bk, p.spec.window)
    tensors = (p.query_bhqd, p.key_bgkd, p.value_bgkd)
    attend = compiled if p.query_bhqd.is_cuda else _attend
    slope = _slope(p)
    table = _bias_by_distance(p, length) if slope is None else None
    stages = None if table is None else _stages(p.query_bhqd)
    output, lse = attend(*tensors, table, slope, mask, p.scale, sdpa.has_more(p.spec), stages)
    return scaled_and_biased(p, output if lse is None else sdpa.with_more(p, output, lse))


def compiled(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """``_attend``, compiled for these arguments' shapes.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: there were COMPILED_SHAPES others in this process.
    """
    from torch._dynamo import config

    with config.patch(recompile_limit=COMPILED_SHAPES, accumulated_recompile_limit=COMPILED_SHAPES):
        result: tuple[Tensor, Tensor | None] = _compile()(*arguments)
    return result


@cache
def _compile() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_attend, dynamic=False, fullgraph=True, backend=COMPILER)


def _attend(
    query_bhqd: Tensor,
    key_bgkd: Tensor,
    value_bgkd: Tensor,
    bias_hn: Tensor | None,
    slope_h: Tensor | None,
    mask: flex.BlockMask,
    scale: float,
    with_lse: bool,
    stages: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """O [b, h, q, d], and log sum exp(s) [b, h, q].

    Args:
        bias_hn: of ``_bias_by_distance``.
        slope_h: how fast scores fall with the distance.
        stages: of the backward kernel's loops; None for torch's choice.
    """
    # Few queries would otherwise go to the kernel for decoding.
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if stages is not None:
        options["bwd_num_stages"] = stages
    score_mod: Callable[..., Tensor] | None = None
    if bias_hn is not None:
        zero = bias_hn.shape[1] // 2

        def looked_up(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + bias_hn[h, q - k + zero]

        score_mod = looked_up
    elif slope_h is not None:

        def falling(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score - slope_h[h] * (q - k).abs()

        score_mod = falling
    operation = partial(
        flex.flex_attention,
        query_bhqd,
        key_bgkd,
        value_bgkd,
        score_mod=score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=query_bhqd.shape[1] != key_bgkd.shape[1],
        kernel_options=options,
    )
    if not with_lse:
        return operation(), None
    output, more = operation(return_aux=flex.AuxRequest(lse=True))
    return output, more.lse


def _stages(query_bhqd: Tensor) -> int | None:
    """With a table of biases, the three stages that torch takes at these head sizes are a kilobyte more than
    the shared memory of these cards."""
    if not query_bhqd.is_cuda or query_bhqd.dtype not in (torch.bfloat16, torch.float16):
        return None
    major, _ = torch.cuda.get_device_capability(query_bhqd.device)
    return 2 if major in (9, 10) and 64 < query_bhqd.shape[-1] <= 128 else None


def _slope(p: Problem) -> Tensor | None:
    """The slopes of the position bias [h], if it has some that are not learned: all pairs would add to the
    few gradients of learned ones."""
    if p.position_bias is None or p.position_bias.slope is None:
        return None
    slope = p.position_bias.slope(p.heads, p.position_parameters)
    return None if slope.requires_grad else slope


def _bias_by_distance(p: Problem, length: int) -> Tensor | None:
    """The position bias [h, 2 n - 1] of the distances 1 - n .. n - 1, zero where no query and key are so far
    apart. The kernel looks up what lies in the last block beyond the end too, so n is a multiple of it."""
    if p.position_bias is None:
        return None
    distance = torch.arange(1 - length, length, device=p.query_bhqd.device)[None]
    bias = p.position_bias.function(distance, p.heads, p.position_parameters)[:, 0]
    beyond = -length % BLOCK
    return pad(bias.to(torch.promote_types(bias.dtype, torch.float32)), (beyond, beyond)).contiguous()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def block_mask(length: int, window: int | None, prefix: int, device: torch.device) -> flex.BlockMask:
    """What ``reference.allowed_qk`` allows, by blocks: torch would look at all T x T pairs for it."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= k
        if window is not None:
            seen = seen & (q - k < window)
        if prefix:
            seen = seen | ((q < prefix) & (k < prefix))
        return seen

    first, last, some, every = _blocks(length, window, device)
    if prefix:
        some |= (first < prefix)[:, None] & (first < prefix)[None]
        every |= (last < prefix)[:, None] & (last < prefix)[None]
    return _by_blocks(some[None], every[None], last < length, allowed, length)


_document_masks = WeakTensorKeyDictionary()
"""By the tensor of documents, which all layers of a step share: its version, the window, and the mask."""


def document_mask(start_bt: Tensor, window: int | None) -> flex.BlockMask:
    """As ``block_mask``, within documents. It is kept as long as the tensor that says where they begin."""
    if start_bt.is_inference():  # has no version
        return _document_mask(start_bt, window)
    made_for = (start_bt._version, window)
    kept = _document_masks.get(start_bt)
    if kept is None or kept[0] != made_for:
        kept = _document_masks[start_bt] = (made_for, _document_mask(start_bt, window))
    mask: flex.BlockMask = kept[1]
    return mask


@torch.inference_mode(False)
def _document_mask(start_bt: Tensor, window: int | None) -> flex.BlockMask:
    length = start_bt.shape[1]
    # The kernel reads what lies in the last block beyond the end too.
    start = torch.cat([start_bt, start_bt[:, -1:].expand(-1, -length % BLOCK)], 1)

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q >= k) & (k >= start[b, q])
        if window is not None:
            seen = seen & (q - k < window)
        return seen

    first, last, some, every = _blocks(length, window, start.device)
    # Documents begin later and later, so that a block's first query sees most keys and its last query fewest.
    some = some & (last >= start[:, first, None])
    every = every & (first >= start[:, last, None])
    return _by_blocks(some, every, last < length, allowed, length)


def _blocks(length: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last position of each block [n], and of which blocks of keys [n, n] some pair, and every
    pair, is in reach of a causal mask."""
    first = torch.arange(0, length, BLOCK, device=device)
    last = first + BLOCK - 1
    nearest, farthest = first[:, None] - last[None], last[:, None] - first[None]
    reach = length if window is None else window
    return first, last, (farthest >= 0) & (nearest < reach), (nearest >= 0) & (farthest < reach)


def _by_blocks(
    some: Tensor, every: Tensor, inside: Tensor, allowed: Callable[..., Tensor], length: int
) -> flex.BlockMask:
    """Args:
    some, every: [b, n, n]; the latter counts for blocks that lie ``inside`` the sequence.
    """
    every = every & inside[:, None] & inside[None]
    partly, whole = _in_order(some & ~every), _in_order(every)
    return flex.BlockMask.from_kv_blocks(
        *partly, *whole, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of a row's blocks [b, 1, rows], and theirs, before those of the others [b, 1, rows, all]."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[:, None], order.int()[:, None]
