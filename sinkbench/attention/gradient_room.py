"""Memory for the gradients of keys and values that is part of the gradient they go into.

Keys and values are slices of one projection. Where attention writes their gradients as slices of the
projection's, they need not be copied there, which is a third of what that copy reads and writes.

The projection offers a room when it is split. Attention finds it in its backward pass, by the memory of the
values that it was given, and may take it once. If what comes back as the gradient of the values lies there,
the projection has its gradient but for the queries. Otherwise it is put together as ever: values that
something else computed have no room, and gradients that something else added to are no longer in it.

Shapes: s position, b sequence, g kv head, d head size, w width of the projection.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Room:
    """For the gradient of one projection.

    Args:
        projection_sbw: contiguous, from the beginning of its memory.
        key_sbgd, value_sbgd: its slices.
    """

    def __init__(self, projection_sbw: Tensor, key_sbgd: Tensor, value_sbgd: Tensor) -> None:
        self._like = torch.empty_like(projection_sbw, device="meta")
        self._shape, self._stride = value_sbgd.shape, value_sbgd.stride()
        self._offsets = key_sbgd.storage_offset(), value_sbgd.storage_offset()
        self._gradient: Tensor | None = None
        _offered[projection_sbw.untyped_storage().data_ptr()] = self

    def take(self, key_sbgd: Tensor, value_sbgd: Tensor) -> tuple[Tensor, Tensor] | None:
        """Slices for the gradients of a key and a value, unless the value is not the projection's slice, or
        they are taken."""
        is_slice = value_sbgd.stride() == self._stride and value_sbgd.storage_offset() == self._offsets[1]
        if (
            self._gradient is not None
            or not is_slice
            or not key_sbgd.shape == value_sbgd.shape == self._shape
        ):
            return None
        self._gradient = torch.empty_like(self._like, device=value_sbgd.device)
        return self._slice(self._gradient, 0), self._slice(self._gradient, 1)

    def filled(self, grad_value_sbgd: Tensor) -> Tensor | None:
        """The projection's gradient, if this gradient of its values is a slice of it; those taken may be
        taken again."""
        gradient, self._gradient = self._gradient, None
        if gradient is None:
            return None
        part = self._slice(gradient, 1)
        same = grad_value_sbgd.data_ptr() == part.data_ptr() and grad_value_sbgd.stride() == part.stride()
        return gradient if same and grad_value_sbgd.shape == part.shape else None

    def _slice(self, gradient: Tensor, which: int) -> Tensor:
        return gradient.as_strided(self._shape, self._stride, self._offsets[which])


_offered: WeakValueDictionary[int, Room] = WeakValueDictionary()
"""By the address of the projection, while its gradient is still to come."""


def take(key_bgsd: Tensor, value_bgsd: Tensor) -> tuple[Tensor, Tensor] | None:
    """Empty tensors for the gradients of a key and a value where a projection will have them, or None."""
    room = _offered.get(value_bgsd.untyped_storage().data_ptr())
    if room is None:
        return None
    taken = room.take(key_bgsd.permute(2, 0, 1, 3), value_bgsd.permute(2, 0, 1, 3))
    if taken is None:
        return None
    key, value = (x.permute(1, 2, 0, 3) for x in taken)
    return key, value
