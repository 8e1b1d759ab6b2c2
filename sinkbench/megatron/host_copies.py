"""Copies of tensors in host memory that is kept from one save to the next.

On CUDA the memory is pinned and the copies run on a stream of their own, beside the forward and backward pass
of the next step: the host goes on at once, and only the update of the parameters waits (``hold_back``). On a
CPU a copy is done when the call returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 28
"""Memory is taken in pieces of so much, a power of two, to which torch rounds pinned memory up."""
ALIGNMENT = 64


class HostCopies:
    """The copies of one save at a time.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._chunks: list[Tensor] = []
        self._chunk = self._used = 0
        self._copied: torch.cuda.Event | None = None
        self._update_waits = False

    @property
    def allocated(self) -> int:
        """Bytes of host memory that are kept."""
        return sum(chunk.numel() for chunk in self._chunks)

    def begin(self) -> None:
        """Starts a save anew in the same memory. The copies of the one before must have been written."""
        self._chunk = self._used = 0

    def copy(self, tensor: Tensor, *, lasting: bool) -> Tensor:
        """A contiguous copy with a storage of its own. On CUDA it may be read after ``wait``.

        Args:
            lasting: nothing but the update of the parameters changes the tensor. Whatever follows on the
                device's current stream waits for the copy of another one, so that a model's worth of such
                tensors is never there at a time.
        """
        target = self._take(tensor)
        source = tensor.detach()
        if self._stream is None or not source.is_cuda:
            return target.copy_(source)
        current = torch.cuda.current_stream(source.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._stream)  # freed, its memory is not used before that
        if not lasting:
            current.wait_stream(self._stream)
        return target

    def end(self) -> None:
        """No more copies of this save follow."""
        if self._stream is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
            self._update_waits = True

    def hold_back(self) -> None:
        """What follows on the device's current stream waits until all copies are made. To be called before
        parameters or optimizer state change."""
        if self._copied is not None and self._update_waits:
            torch.cuda.current_stream().wait_event(self._copied)
            self._update_waits = False

    def wait(self) -> None:
        """Returns once all copies are made; in any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _take(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        while self._chunk < len(self._chunks) and self._used + size > self._chunks[self._chunk].numel():
            self._chunk, self._used = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            length = max(CHUNK_BYTES, size)
            self._chunks.append(torch.empty(length, dtype=torch.uint8, pin_memory=self._stream is not None))
        part = self._chunks[self._chunk].numpy()[self._used : self._used + size]
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        # By way of numpy, so that it has a storage of its own: torch.save writes whole storages.
        return torch.from_numpy(part).view(like.dtype).view(like.shape)
