"""Micro-batches of one data-parallel rank, read ahead of the training loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sinkbench.api import Batch
from sinkbench.data.source import SequenceSource

Item = TypeVar("Item")

_AHEAD = 4
"""Micro-batches kept ready."""


class _Starts(Sampler[int]):
    """The first sequence of every micro-batch of one rank, forever."""

    def __init__(self, start_step: int, global_batch: int, micro_batch: int, rank: int, ranks: int) -> None:
        share = global_batch // ranks
        self._first = start_step * global_batch + rank * share
        self._global_batch = global_batch
        self._offsets = range(0, share, micro_batch)

    def __iter__(self) -> Iterator[int]:
        first = self._first
        while True:
            yield from (first + offset for offset in self._offsets)
            first += self._global_batch


class _MicroBatches(Dataset[Batch]):
    """Micro-batches by the index of their first sequence."""

    def __init__(self, source: SequenceSource, size: int) -> None:
        self._source = source
        self._size = size

    def __getitem__(self, start: int) -> Batch:
        arrays = self._source.sequences(start, self._size)
        return {name: torch.from_numpy(rows) for name, rows in arrays.items()}


def micro_batches(
    source: SequenceSource,
    *,
    start_step: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> Generator[Batch]:
    """Endless micro-batches of one data-parallel rank: tensors [micro_batch_size, seq_length + 1].

    Step t uses sequences t * global_batch_size .. (t + 1) * global_batch_size - 1 of the run, of which
    each rank takes a contiguous share in order. Batches are made ahead by a thread, which ends when the
    iterator is closed or collected; on a CUDA host they are in pinned memory.

    Args:
        start_step: steps done before.
        global_batch_size: divisible by micro_batch_size x dp_size.
    """
    assert global_batch_size % (micro_batch_size * dp_size) == 0
    starts = _Starts(start_step, global_batch_size, micro_batch_size, dp_rank, dp_size)
    loader: DataLoader[Batch] = DataLoader(
        _MicroBatches(source, micro_batch_size),
        sampler=starts,
        batch_size=None,
        generator=torch.Generator(),  # making the iterator would draw from the training's random state
        pin_memory=torch.cuda.is_available(),
    )
    return _read_ahead(iter(loader), _AHEAD)


def _read_ahead(items: Iterator[Item], ahead: int) -> Generator[Item]:
    """The same endless items, made by a thread while the last ones are used."""
    ready: queue.Queue[Item | BaseException] = queue.Queue(ahead)
    stopped = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def put(item: Item | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # of this thread, or pinning would start a context on card 0
        try:
            while not stopped.is_set():
                put(next(items))
        except BaseException as error:  # handed to the training loop, which raises it
            put(error)

    thread = threading.Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()  # a thread that is in torch when the interpreter exits aborts the process
