"""Micro-batches: every layout reads the one stream, and the thread goes when its reader does."""

from __future__ import annotations

import gc
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch

from sinkbench.config import BigramBackcopyConfig
from sinkbench.data.bigram_backcopy import BigramBackcopy
from sinkbench.data.loader import micro_batches
from sinkbench.data.source import Arrays

SOURCE = BigramBackcopy(BigramBackcopyConfig(source="bigram_backcopy"), seq_length=16, seed=3)


def read(
    steps: int, micro: int, rank: int = 0, ranks: int = 1, start: int = 0
) -> list[dict[str, torch.Tensor]]:
    batches = micro_batches(
        SOURCE,
        start_step=start,
        global_batch_size=12,
        micro_batch_size=micro,
        dp_rank=rank,
        dp_size=ranks,
    )
    return list(islice(batches, steps * 12 // (micro * ranks)))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read ahead"]


@pytest.mark.parametrize(("micro", "ranks"), [(12, 1), (4, 1), (3, 2), (1, 4), (2, 3)])
def test_every_layout_reads_the_one_stream(micro: int, ranks: int) -> None:
    steps = 3
    whole = SOURCE.sequences(0, steps * 12)
    found = [read(steps, micro, rank, ranks) for rank in range(ranks)]
    assert all(batch["tokens"].shape == (micro, 17) for batches in found for batch in batches)
    per_step = 12 // (micro * ranks)
    for name in ("tokens", "trigger"):
        ordered = [
            batch[name]
            for step in range(steps)
            for batches in found
            for batch in batches[step * per_step : (step + 1) * per_step]
        ]
        np.testing.assert_array_equal(torch.cat(ordered).numpy(), whole[name])


def test_resumed_stream_goes_on() -> None:
    whole = read(5, 4, rank=0, ranks=3)
    resumed = read(2, 4, rank=0, ranks=3, start=3)
    for name in ("tokens", "trigger"):
        assert torch.equal(torch.stack([b[name] for b in whole[3:]]), torch.stack([b[name] for b in resumed]))


def test_training_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    read(2, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_thread_ends_with_its_reader() -> None:
    batches = micro_batches(
        SOURCE, start_step=0, global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1
    )
    next(batches)
    assert len(readers()) == 1
    del batches
    gc.collect()
    deadline = time.monotonic() + 60
    while readers() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not readers()


def test_error_of_the_source_reaches_the_reader() -> None:
    class Broken(BigramBackcopy):
        def sequences(self, start: int, count: int) -> Arrays:
            if start >= 8:
                raise OSError("the disk went away")
            return super().sequences(start, count)

    source = Broken(BigramBackcopyConfig(source="bigram_backcopy"), seq_length=16, seed=3)
    batches = micro_batches(
        source, start_step=0, global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1
    )
    next(batches)
    next(batches)
    with pytest.raises(OSError, match="the disk went away"):
        next(batches)


def test_batches_are_made_ahead() -> None:
    made = []

    class Counting(BigramBackcopy):
        def sequences(self, start: int, count: int) -> Arrays:
            made.append(start)
            return super().sequences(start, count)

    source = Counting(BigramBackcopyConfig(source="bigram_backcopy"), seq_length=16, seed=3)
    batches = micro_batches(
        source, start_step=0, global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1
    )
    next(batches)
    deadline = time.monotonic() + 60
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(made) >= 4
