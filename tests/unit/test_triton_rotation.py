"""The kernel of rotation against the plain functions, bit for bit: on a card, or in Triton's interpreter
where the package is there."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench.attention.reference import rotation  # noqa: E402
from sinkbench.megatron import triton_rotation  # noqa: E402
from sinkbench.megatron.rotation import HeadLayout, rotated, rotated_back  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"

LAYOUTS = [
    HeadLayout(groups=2, queries=1, size=8),
    HeadLayout(groups=3, queries=4, size=96),
    HeadLayout(groups=1, queries=3, size=6),
    HeadLayout(groups=2, queries=2, size=128),
    HeadLayout(groups=1, queries=2, size=256),
]


def angles(length: int, dimensions: int, first: int = 3) -> tuple[Tensor, Tensor]:
    """Of positions that are not in one run, as a rank of context parallelism has them."""
    half = -(-length // 2)
    position = torch.cat([torch.arange(half) + first, torch.arange(length - half) + 100])
    cos, sin = rotation(position.to(DEVICE), dimensions, 10000.0)[:, :, None, None]
    return cos, sin


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def gradients(length: int, batch: int, heads: HeadLayout) -> list[Tensor]:
    """Of queries, keys and values."""
    rows = (heads.groups * heads.queries, heads.groups, heads.groups)
    return [random(length, batch, number, heads.size) for number in rows]


def assert_same_gradient(grads: list[Tensor], cos: Tensor, sin: Tensor, heads: HeadLayout) -> None:
    """Of the projection, from those of its parts."""
    query, key, value = grads
    result = triton_rotation.rotated_back(query, key, value, cos, sin, heads)
    wide = torch.promote_types(query.dtype, torch.float32)
    expected = rotated_back(query.to(wide), key.to(wide), value.to(wide), cos, sin, heads).to(query.dtype)
    assert_same(result, expected)
    for in_place in (False, True):
        filled = torch.full_like(expected, 7.0)
        _, key_place, value_place = heads.split(filled)
        value_place.copy_(value)
        if in_place:
            key = key_place.copy_(key)
        triton_rotation.rotate_back_into(filled, query, key, cos, sin, heads)
        assert_same(filled, expected)


def assert_same_parts(mixed: Tensor, cos: Tensor, sin: Tensor, heads: HeadLayout) -> None:
    wide = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
    for result, expected in zip(
        triton_rotation.rotated(mixed, cos, sin, heads), rotated(wide, cos, sin, heads), strict=True
    ):
        assert_same(result, expected.to(mixed.dtype))


def assert_same(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert result.is_contiguous()


@pytest.mark.parametrize("heads", LAYOUTS, ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.34, 1.0])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (2, 40), (5, 3)])
def test_forward_and_backward(length: int, batch: int, fraction: float, heads: HeadLayout) -> None:
    cos, sin = angles(length, int(heads.size * fraction) // 2 * 2)
    mixed = random(length, batch, heads.groups * (heads.queries + 2) * heads.size)
    assert_same_parts(mixed, cos, sin, heads)
    assert_same_gradient(gradients(length, batch, heads), cos, sin, heads)


def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """With its dimensions in this order in memory."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "bhsd": lambda x: laid_out(x, (1, 2, 0, 3)),
    "bshd": lambda x: laid_out(x, (1, 0, 2, 3)),
    "sbdh": lambda x: laid_out(x, (0, 1, 3, 2)),
    "positions and heads alike": lambda x: x[:1, :, :1].expand_as(x),
    "sequences alike": lambda x: x[:, :1].expand_as(x),
    "alike within a head": lambda x: x[..., :1].expand_as(x),
    "between others": lambda x: torch.cat([x, x], -1)[..., 1 : 1 + x.shape[-1]],
}


@pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("heads", LAYOUTS[:2], ids=str)
def test_gradients_with_any_strides(change: Callable[[Tensor], Tensor], heads: HeadLayout) -> None:
    cos, sin = angles(6, heads.size)
    plain = gradients(6, 3, heads)
    for changed in range(3):
        grads = [change(x) if at == changed else x for at, x in enumerate(plain)]
        assert grads[changed].stride() != plain[changed].stride()
        assert_same_gradient(grads, cos, sin, heads)


@pytest.mark.parametrize("dtype", [
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not CUDA, reason="the interpreter cuts bf16 off")),
    torch.float16,
    torch.float64,
], ids=str)  # fmt: skip
def test_each_result_is_rounded_once(dtype: torch.dtype) -> None:
    heads = LAYOUTS[1]
    cos, sin = angles(5, 48)
    mixed = random(5, 3, heads.groups * (heads.queries + 2) * heads.size).to(dtype)
    assert_same_parts(mixed, cos, sin, heads)
    assert_same_gradient([x.to(dtype) for x in gradients(5, 3, heads)], cos, sin, heads)


def test_a_projection_in_another_layout() -> None:
    heads = LAYOUTS[1]
    cos, sin = angles(5, 96)
    mixed = random(3, 5, heads.groups * (heads.queries + 2) * heads.size).transpose(0, 1)
    assert_same_parts(mixed, cos, sin, heads)


def test_angles_of_each_sequence_are_refused() -> None:
    heads = LAYOUTS[0]
    cos, sin = (x.expand(4, 3, 1, 4).contiguous() for x in angles(4, 8))
    with pytest.raises(RuntimeError, match="shape"):
        triton_rotation.rotated(random(4, 3, 48), cos, sin, heads)


def test_no_sequences() -> None:
    heads = LAYOUTS[0]
    cos, sin = angles(4, 8)
    query, key = triton_rotation.rotated(random(4, 0, 48), cos, sin, heads)
    assert query.shape == key.shape == (4, 0, 2, 8)
    assert triton_rotation.rotated_back(query, key, key, cos, sin, heads).shape == (4, 0, 48)
