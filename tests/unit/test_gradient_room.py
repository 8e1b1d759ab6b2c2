"""Gradients of keys and values in memory of the projection's."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from sinkbench.attention import gradient_room
from sinkbench.attention.gradient_room import Room
from sinkbench.megatron.rotation import HeadLayout

HEADS = HeadLayout(groups=3, queries=2, size=4)
LENGTH, BATCH = 5, 2


def projection() -> Tensor:
    return torch.randn(LENGTH, BATCH, HEADS.groups * (HEADS.queries + 2) * HEADS.size)


def heads_first(*tensors_sbgd: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.permute(1, 2, 0, 3) for x in tensors_sbgd)


def offered(mixed: Tensor) -> tuple[Room, tuple[Tensor, ...]]:
    """The room, and the key and value that attention sees: the first is another tensor, as when rotated."""
    _, key, value = HEADS.split(mixed)
    return Room(mixed, key, value), heads_first(key.clone(), value)


def test_what_is_written_is_in_the_projection() -> None:
    mixed = projection()
    room, (key, value) = offered(mixed)
    taken = gradient_room.take(key, value)
    assert taken is not None
    of_key, of_value = taken
    assert of_key.shape == of_value.shape == value.shape
    of_key.copy_(key)
    of_value.copy_(value)
    filled = room.filled(of_value.permute(2, 0, 1, 3))
    assert filled is not None
    assert filled.shape == mixed.shape
    assert filled.is_contiguous()
    assert filled.data_ptr() != mixed.data_ptr()
    for part, whole in zip(HEADS.split(filled)[1:], HEADS.split(mixed)[1:], strict=True):
        assert torch.equal(part, whole)


def test_it_is_taken_once_until_it_is_filled() -> None:
    room, inputs = offered(projection())
    taken = gradient_room.take(*inputs)
    assert taken is not None
    assert gradient_room.take(*inputs) is None
    assert room.filled(taken[1].permute(2, 0, 1, 3)) is not None
    assert gradient_room.take(*inputs) is not None


def test_a_gradient_that_lies_elsewhere() -> None:
    room, inputs = offered(projection())
    assert room.filled(inputs[1].permute(2, 0, 1, 3)) is None
    taken = gradient_room.take(*inputs)
    assert taken is not None
    assert room.filled((taken[1] + 1).permute(2, 0, 1, 3)) is None
    taken = gradient_room.take(*inputs)
    assert taken is not None
    assert room.filled(taken[0].permute(2, 0, 1, 3)) is None


def test_other_values_have_none() -> None:
    mixed = projection()
    _room, (key, value) = offered(mixed)
    query, own_key, own_value = HEADS.split(mixed)
    for others in (
        (key, value.clone()),
        (key, heads_first(own_key)[0]),
        heads_first(query, query),
        heads_first(own_key[1:], own_value[1:]),
        (key[:, :1].expand_as(key)[:, :2], value),
    ):
        assert gradient_room.take(*others) is None
    assert gradient_room.take(key, value) is not None


def test_it_goes_with_its_projection() -> None:
    room, inputs = offered(projection())
    del room
    gc.collect()
    assert gradient_room.take(*inputs) is None
