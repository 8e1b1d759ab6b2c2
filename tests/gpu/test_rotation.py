"""Rotation and the gradient of the fused projection on a card, in bf16, against the plain functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, Elementwise, Softmax, attention
from sinkbench.attention import flash_attn, gradient_room
from sinkbench.attention.reference import rotation
from sinkbench.megatron.rotation import HeadLayout, rotated, rotated_back, split_and_rotate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
HEADS = HeadLayout(groups=4, queries=2, size=96)
BATCH = 5
Three = tuple[Tensor, Tensor, Tensor]


def angles(length: int, dimensions: int) -> tuple[Tensor, Tensor]:
    cos, sin = rotation(torch.arange(length, device="cuda"), dimensions, 10000.0)[:, :, None, None]
    return cos, sin


def width(heads: HeadLayout) -> int:
    return heads.groups * (heads.queries + 2) * heads.size


def random(*shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def gradients(length: int) -> Three:
    """Of queries, keys and values."""
    query, key, value = (random(length, BATCH, number, HEADS.size) for number in (8, 4, 4))
    return query, key, value


def expected(mixed: Tensor, grads: Three, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Queries, keys, values and the projection's gradient; in float32 and rounded once."""
    query, key = rotated(mixed.float(), cos, sin, HEADS)
    of_query, of_key, of_value = (grad.float() for grad in grads)
    back = rotated_back(of_query, of_key, of_value, cos, sin, HEADS)
    return [query.bfloat16(), key.bfloat16(), HEADS.split(mixed)[2], back.bfloat16()]


def given(mixed: Tensor, grads: Three, cos: Tensor, sin: Tensor) -> list[Tensor]:
    mixed = mixed.detach().requires_grad_()
    parts = split_and_rotate(mixed, cos, sin, HEADS)
    return [*parts, *torch.autograd.grad(parts, mixed, grads)]


@pytest.mark.parametrize("dimensions", [96, 48, 10])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("length", [1, 700])
def test_against_the_plain_functions(length: int, heads_first: bool, dimensions: int) -> None:
    """To the last bit, and near those in bf16, which round the angles and each product."""
    cos, sin = angles(length, dimensions)
    mixed = random(length, BATCH, width(HEADS))
    of_query, of_key, of_value = gradients(length)
    if heads_first:  # in memory
        of_query, of_value = (
            x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for x in (of_query, of_value)
        )
    grads = (of_query, of_key, of_value)
    result = given(mixed, grads, cos, sin)
    torch.testing.assert_close(result, expected(mixed, grads, cos, sin), rtol=0, atol=0)
    assert [x.is_contiguous() for x in result] == [True, True, False, True]
    in_bf16 = [*rotated(mixed, cos, sin, HEADS), rotated_back(*grads, cos, sin, HEADS)]
    torch.testing.assert_close([*result[:2], result[3]], in_bf16, rtol=2e-2, atol=5e-2)


def test_replayed_from_a_graph() -> None:
    cos, sin = angles(64, 96)
    mixed = random(64, BATCH, width(HEADS))
    grads = gradients(64)
    given(mixed, grads, cos, sin)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = given(mixed, grads, cos, sin)
    mixed.copy_(mixed.flip(0))
    graph.replay()
    torch.testing.assert_close(result, expected(mixed, grads, cos, sin), rtol=0, atol=0)


def test_offsets_beyond_32_bits() -> None:
    """The last positions of a projection of more than 2^31 numbers, and of a gradient whose heads lie that
    far apart."""
    if torch.cuda.mem_get_info()[0] < 26 * 2**30:
        pytest.skip("needs 26 GiB of the card's memory")
    length = 2**31 // (BATCH * width(HEADS)) + 300
    cos, sin = angles(length, 96)
    mixed = random(length, BATCH, width(HEADS))
    assert mixed.numel() > 2**31
    parts = split_and_rotate(mixed, cos, sin, HEADS)
    wide = mixed.new_empty(BATCH, HEADS.groups * HEADS.queries, length, 2 * HEADS.size)
    of_query = wide.permute(2, 0, 1, 3)[..., : HEADS.size].copy_(parts[0])
    grads = (of_query, parts[1], parts[2])
    outputs = split_and_rotate(mixed.requires_grad_(), cos, sin, HEADS)
    (grad,) = torch.autograd.grad(outputs, mixed, grads)
    last_grads = (of_query[-4:], parts[1][-4:], parts[2][-4:])
    plain = expected(mixed[-4:], last_grads, cos[-4:], sin[-4:])
    torch.testing.assert_close([x[-4:] for x in (*parts, grad)], plain, rtol=0, atol=0)


def test_a_second_derivative_is_refused() -> None:
    cos, sin = angles(8, 96)
    mixed = random(8, BATCH, width(HEADS)).requires_grad_()
    query, _, _ = split_and_rotate(mixed, cos, sin, HEADS)
    (grad,) = torch.autograd.grad(query.float().square().sum(), mixed, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().sum().backward()


@pytest.mark.parametrize("backend", ["triton", "flash"])
def test_attention_writes_where_the_projection_reads(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients, to the last bit, as where they are copied, but for those that FlashAttention sums
    in another order each time."""
    if backend == "flash" and not flash_attn.has_four():
        pytest.skip("needs flash-attn-4")
    heads = HeadLayout(groups=8, queries=1, size=96)
    cos, sin = angles(700, 96)
    mixed = random(700, BATCH, width(heads)).requires_grad_()
    taken = []
    take = gradient_room.take

    def counted(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        taken.append(take(key, value))
        return taken[-1]

    def gradient() -> Tensor:
        inputs = (x.permute(1, 2, 0, 3) for x in split_and_rotate(mixed, cos, sin, heads))
        similarity = Softmax() if backend == "flash" else Elementwise(function=torch.sigmoid)
        output = attention(AttentionSpec(rule=similarity), *inputs, backend=backend)
        (grad,) = torch.autograd.grad(output, mixed, random(*output.shape))
        return grad

    monkeypatch.setattr(gradient_room, "take", counted)
    found = gradient()
    assert [room is not None for room in taken] == [True]
    monkeypatch.setattr(gradient_room, "take", lambda *_: None)
    for part, usual in zip(heads.split(found), heads.split(gradient()), strict=True):
        torch.testing.assert_close(part, usual, rtol=0, atol=1e-2 if backend == "flash" else 0)
