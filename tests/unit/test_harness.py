"""The distributed test harness itself: what comes back, what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from sinkbench.testing import RankFailure, RunDistributed

STATE: list[int] = []


def all_reduce(rank: int, world_size: int, start: float) -> tuple[int, int, float]:
    value = torch.tensor(start + rank)
    dist.all_reduce(value)
    return rank, world_size, value.item()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_by_rank(run_distributed: RunDistributed, world_size: int) -> None:
    total = sum(10.0 + rank for rank in range(world_size))
    expected = [(rank, world_size, total) for rank in range(world_size)]
    assert run_distributed(world_size, all_reduce, 10.0) == expected


def returns_tensor(rank: int, world_size: int, given: torch.Tensor) -> torch.Tensor:
    given += rank
    return given


def test_tensors_are_copied(run_distributed: RunDistributed) -> None:
    given = torch.zeros(3)
    first, second = run_distributed(2, returns_tensor, given)
    assert first.tolist() == [0, 0, 0]
    assert second.tolist() == [1, 1, 1]
    assert given.tolist() == [0, 0, 0]


def leaves_state(rank: int, world_size: int) -> int:
    STATE.append(rank)
    os.environ["LEFT"] = "behind"
    torch.set_default_dtype(torch.float64)
    return len(STATE)


def finds_state(rank: int, world_size: int) -> tuple[int, str | None, torch.dtype]:
    return len(STATE), os.environ.get("LEFT"), torch.get_default_dtype()


def test_runs_share_no_state(run_distributed: RunDistributed) -> None:
    assert run_distributed(2, leaves_state) == [1, 1]
    assert run_distributed(2, finds_state) == [(0, None, torch.float32)] * 2


def sees(rank: int, world_size: int) -> tuple[str | None, str]:
    return os.environ.get("HARNESS_TEST"), os.getcwd()


def test_ranks_have_the_callers_environment_and_folder(
    run_distributed: RunDistributed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HARNESS_TEST", "yes")
    monkeypatch.chdir(tmp_path)
    assert run_distributed(1, sees) == [("yes", str(tmp_path))]


def has_imported(rank: int, world_size: int, names: list[str]) -> list[str]:
    return [name for name in names if name in sys.modules]


def test_ranks_start_with_torch_and_megatron_imported(run_distributed: RunDistributed) -> None:
    names = ["torch.distributed", "megatron.core", "sinkbench.megatron.training"]
    assert run_distributed(1, has_imported, names) == [names]


def fails_on_one(rank: int, world_size: int) -> None:
    print(f"rank {rank} was here")
    if rank == 1:
        raise ValueError("no such head")
    dist.barrier()


def test_a_failing_rank_is_reported_and_the_others_are_killed(
    run_distributed: RunDistributed, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailure) as failure:
        run_distributed(4, fails_on_one)
    assert time.monotonic() - started < 100
    message = str(failure.value)
    assert "rank 1 of 4: Traceback" in message
    assert "in fails_on_one" in message
    assert "ValueError: no such head" in message
    assert "then killed, still running: ranks 0, 2, 3" in message
    assert "--- printed by rank 1 ---\nrank 1 was here\n" in capsys.readouterr().out
    assert run_distributed(2, all_reduce, 0.0)[0][2] == 1.0


def hangs_on_one(rank: int, world_size: int) -> int:
    if rank == 1:
        time.sleep(1000)
    return rank


def test_a_hanging_rank_is_reported_with_the_place(run_distributed: RunDistributed) -> None:
    with pytest.raises(RankFailure) as failure:
        run_distributed(2, hangs_on_one, timeout=10)
    assert "rank 1 of 2: not finished after 10 s" in str(failure.value)
    assert "in hangs_on_one" in str(failure.value)
    assert run_distributed(2, all_reduce, 0.0)[0][2] == 1.0


def dies(rank: int, world_size: int) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_dying_rank_is_reported(run_distributed: RunDistributed) -> None:
    with pytest.raises(RankFailure, match="rank 0 of 1: died, exit code -11"):
        run_distributed(1, dies)


def returns_unpicklable(rank: int, world_size: int) -> object:
    return lambda: rank


def test_an_unpicklable_result_is_a_failure(run_distributed: RunDistributed) -> None:
    with pytest.raises(RankFailure, match="pickle"):
        run_distributed(1, returns_unpicklable)


def starts_a_child(rank: int, world_size: int) -> tuple[int, int]:
    child = subprocess.Popen(["sleep", "1000"])
    return os.getpid(), child.pid


def test_nothing_is_left_running(run_distributed: RunDistributed) -> None:
    pids = [pid for pair in run_distributed(2, starts_a_child) for pid in pair]
    assert all(_is_gone(pid) for pid in pids)


def writes_pid(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    time.sleep(1000)


def test_ranks_die_with_the_test_process(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from sinkbench.testing import run_distributed;"
        "from tests.unit.test_harness import writes_pid;"
        f"run_distributed(2, writes_pid, Path({str(tmp_path)!r}))"
    )
    session = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 120
        while len(pids := [int(text) for f in tmp_path.iterdir() if (text := f.read_text())]) < 2:
            assert session.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        session.kill()
        session.wait()
    deadline = time.monotonic() + 100
    while not all(_is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
