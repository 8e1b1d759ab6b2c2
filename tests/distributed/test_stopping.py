"""Runs that are asked to stop: all ranks stop after the same step, and the same command goes on."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sinkbench import stopping
from sinkbench.errors import HostError, Stopped
from sinkbench.stopping import Deadline, Request
from sinkbench.testing import RankFailure, RunDistributed
from tests.distributed.runs import DEMO, LAYOUTS, Run, prepare, train
from tests.distributed.test_resume import assert_identical

RECIPE = (
    *DEMO,
    "train.steps=30",
    "checkpoint.every=20",
    "validation={every: 13, sequences: 8}",
    "measure={every: 13, count: 8}",
)
AT = 13


def during_step(at: int, action: Callable[[], None]) -> Callable[..., Any]:
    """Engine.train_step, but something happens while step ``at`` of this start runs."""
    from sinkbench.megatron.training import Engine

    original, done = Engine.train_step, 0

    def train_step(self: Any, micro_batches: Any, **arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == at:
            action()
        return original(self, micro_batches, **arguments)

    return train_step


def rank_is_signalled(
    rank: int, world_size: int, arguments: Sequence[str], number: signal.Signals, reached: int
) -> str:
    """One rank gets a signal in step 13; what ``train`` then says."""
    from sinkbench.megatron.training import Engine
    from sinkbench.trainer import train

    def send() -> None:
        if rank == reached:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", during_step(AT, send))
        with pytest.raises(Stopped) as stopped:
            train(*prepare(arguments))
    return stopped.value.what


@pytest.mark.parametrize(
    ("layout", "number"),
    [
        ("data", signal.SIGTERM),
        pytest.param("", signal.SIGINT, marks=pytest.mark.full),
        pytest.param("pipeline", signal.SIGUSR1, marks=pytest.mark.full),
        pytest.param("tensor pipeline", signal.SIGUSR1, marks=pytest.mark.full),
        pytest.param("context", signal.SIGTERM, marks=pytest.mark.full),
    ],
)
def test_a_signal_to_one_rank_stops_all(
    run_distributed: RunDistributed, tmp_path: Path, layout: str, number: signal.Signals
) -> None:
    whole = train(run_distributed, tmp_path / "whole", RECIPE, layout)
    processes, overrides = LAYOUTS[layout] if layout else (1, ())
    arguments = [*RECIPE, *overrides, f"output_dir={tmp_path}"]
    last = processes - 1
    said = run_distributed(processes, rank_is_signalled, arguments, number, last)
    done = f"stopped after step {AT} of 30, which is saved"
    assert said[last] == f"{done} ({number.name})"
    assert all(text.startswith(done) for text in said)
    folder = tmp_path / "short"
    assert json.loads((folder / "stopped.json").read_text())["step"] == AT
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {f"step_{AT}"}
    assert not (folder / "summary.json").exists()

    assert_identical(train(run_distributed, tmp_path, RECIPE, layout), whole)
    assert not (folder / "stopped.json").exists()


def rank_runs_out_of_time(rank: int, world_size: int, arguments: Sequence[str]) -> str:
    """The limit is near in step 13, on the clock of the first rank, and no longer after a short save."""
    from sinkbench.megatron.training import Engine
    from sinkbench.trainer import Trainer, train

    usual = Trainer._save

    def forward() -> None:
        real = time.time
        patch.setattr(time, "time", lambda: real() + (3600 if rank == 0 else 0))

    def save(trainer: Trainer, step: int) -> None:
        usual(trainer, step)
        patch.setattr(Deadline, "near", lambda *_: False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", during_step(AT, forward))
        patch.setattr(Trainer, "_save", save)
        with pytest.raises(Stopped) as stopped:
            train(*prepare(arguments))
    return stopped.value.what


def test_a_time_limit_stops_all(run_distributed: RunDistributed, tmp_path: Path) -> None:
    arguments = [*RECIPE, "train.max_minutes=60", f"output_dir={tmp_path}"]
    first, _ = run_distributed(2, rank_runs_out_of_time, arguments)
    assert first == f"stopped after step {AT} of 30, which is saved (train.max_minutes 60)"
    assert Run(tmp_path / "short").checkpoint(AT).is_dir()


def rank_is_signalled_twice(rank: int, world_size: int) -> None:
    stopping.TOGETHER_S = math.inf
    with Request() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the same request, by another way
        time.sleep(0.1)
        assert request.signal is signal.SIGTERM
        stopping.TOGETHER_S = 0.0
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_a_second_signal_exits_at_once(run_distributed: RunDistributed) -> None:
    began = time.monotonic()
    with pytest.raises(RankFailure, match=f"exit code {128 + signal.SIGTERM}"):
        run_distributed(1, rank_is_signalled_twice)
    assert time.monotonic() - began < 60


def rank_restores_handlers(rank: int, world_size: int) -> list[Any]:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with Request() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
        assert request.signal is None  # ignored signals stay ignored
    return [signal.getsignal(number) == old for number, old in zip(stopping.SIGNALS, before, strict=True)]


def test_handlers_are_put_back(run_distributed: RunDistributed) -> None:
    assert run_distributed(1, rank_restores_handlers) == [[True, True, True]]


def test_a_signal_outside_steps_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Stopped) as stopped, stopping.outside_steps("r.yaml"):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert str(stopped.value) == (
        "r.yaml: stopped by SIGUSR1 while no step was running; the same command goes on"
    )
    assert signal.getsignal(signal.SIGUSR1) == before


def test_deadline_leaves_time_for_a_step_and_a_save() -> None:
    now = time.time()
    deadline = Deadline(None, {"SLURM_JOB_END_TIME": str(now + 100)})
    assert deadline.reason == "the end of the SLURM job"
    assert not deadline.near(10, now)
    assert not deadline.near(10, now + 20)
    assert not deadline.near(10, now + 40)  # 1.5 x (20 + 10) s are left, and more
    assert deadline.near(10, now + 60)
    assert deadline.near(60, now + 40)


def test_the_first_save_is_given_time() -> None:
    now = time.time()
    deadline = Deadline(None, {"SLURM_JOB_END_TIME": str(now + 1000)})
    assert not deadline.near(0, now + 950)
    assert deadline.near(0, now + 956)


def test_the_earlier_limit_counts() -> None:
    later = {"SLURM_JOB_END_TIME": str(time.time() + 1e6)}
    assert Deadline(5, later).reason == "train.max_minutes 5"
    assert Deadline(None, {}).end is None
    assert not Deadline(None, {}).near(1e9)
    with pytest.raises(HostError, match=r"^SLURM_JOB_END_TIME: 'soon' is no time; unset it"):
        Deadline(5, {"SLURM_JOB_END_TIME": "soon"})


def rank_uses_groups(rank: int, world_size: int) -> list[bool]:
    """Whether there is a process group: given before, after one block and after two; made by a block,
    after it."""
    import torch
    import torch.distributed as dist

    from sinkbench.megatron import parallel

    config, _ = prepare(RECIPE)
    seen = [dist.is_initialized()]
    for _ in range(2):
        with parallel.running(config):
            pass
        seen.append(dist.is_initialized())
    dist.all_reduce(torch.ones(1))  # it still works
    dist.destroy_process_group()
    with parallel.running(config):
        seen.append(dist.is_initialized())
    return [*seen, dist.is_initialized()]


def test_a_process_group_is_left_by_who_made_it(run_distributed: RunDistributed) -> None:
    assert run_distributed(1, rank_uses_groups) == [[True, True, True, True, False]]


def rank_loses_its_peer(rank: int, world_size: int) -> bool:
    import torch
    import torch.distributed as dist

    from sinkbench.megatron import parallel

    if rank == 1:
        os._exit(3)
    with pytest.raises(RuntimeError) as error:
        dist.all_reduce(torch.ones(1))
    assert not parallel.lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert parallel.lost_peer(error.value), error.value
    return True


def test_a_lost_peer_is_told_from_other_errors(run_distributed: RunDistributed) -> None:
    with pytest.raises(RankFailure) as failure:
        run_distributed(2, rank_loses_its_peer)
    assert str(failure.value) == "rank 1 of 2: died, exit code 3"
