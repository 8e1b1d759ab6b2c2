"""Whole jobs that are killed and signalled from outside: what they leave, and how they go on.

Most need torchrun, which takes long to start. benchmarks/reliability.py does the same many times over.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from benchmarks.jobs import Job, WarmJob
from benchmarks.reliability import ENDED_S, RECIPE, STEPS, kill_and_resume, metrics, reference
from sinkbench.failpoints import NAMES
from tests.distributed.runs import Run


@pytest.mark.full
def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    campaign = kill_and_resume(tmp_path, job=WarmJob, kills=3, parts=0, failpoints=False)
    assert campaign.counts["runs compared, all equal"] >= 1


@pytest.mark.full
@pytest.mark.timeout(900)
def test_every_stage_of_a_write_can_be_the_last(tmp_path: Path) -> None:
    campaign = kill_and_resume(tmp_path, job=WarmJob, kills=0, parts=0, failpoints=True)
    assert campaign.counts["kills at a failpoint"] == len(NAMES)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_jobs_are_killed_and_go_on(tmp_path: Path) -> None:
    campaign = kill_and_resume(tmp_path, kills=2, parts=2, failpoints=False, seed=1)
    assert campaign.counts["runs compared, all equal"] >= 3
    assert campaign.slowest_end_s < ENDED_S


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_one_process_ends_with_75(tmp_path: Path, number: signal.Signals) -> None:
    job = Job(tmp_path, RECIPE, processes=1)
    assert job.wait_for(lambda: job.lines() > 20)
    job.process.send_signal(number)
    assert job.wait() == 75
    saved = json.loads((job.folder / "stopped.json").read_text())
    assert saved["reason"] == number.name
    said = job.output().splitlines()
    assert said[-1] == (
        f"{job.folder}: stopped after step {saved['step']} of {STEPS}, which is saved ({number.name}); "
        "the same command goes on"
    )
    assert Run(job.folder).checkpoint(saved["step"]).is_dir()


@pytest.mark.full
def test_torchrun_names_the_code(tmp_path: Path) -> None:
    """A signal that one rank alone got."""
    job = Job(tmp_path, RECIPE)
    assert job.wait_for(lambda: job.lines() > 20)
    job.ranks()[1].send_signal(signal.SIGUSR1)
    assert job.wait() != 0
    assert (job.folder / "stopped.json").exists()
    assert "exitcode  : 75" in job.output()
    assert "Traceback" not in job.output().split("torch/distributed")[0]


@pytest.mark.full
def test_torchrun_passes_sigterm_on(tmp_path: Path) -> None:
    job = Job(tmp_path, RECIPE)
    assert job.wait_for(lambda: job.lines() > 20)
    ranks = job.ranks()
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(ENDED_S) != 0
    assert not any(rank.is_running() for rank in ranks)
    assert json.loads((job.folder / "stopped.json").read_text())["reason"] == "SIGTERM"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_torchrun_restarts_a_job_that_lost_a_rank(tmp_path: Path) -> None:
    expected, _ = reference(tmp_path / "expected", 2)
    job = Job(tmp_path, RECIPE, options=["--max-restarts=1"])
    assert job.wait_for(lambda: job.lines() > 40)
    job.ranks()[1].kill()
    assert job.wait() == 0, job.output()
    assert metrics(job.folder) == metrics(expected)


@pytest.mark.full
def test_the_killed_rank_is_on_top(tmp_path: Path) -> None:
    job = Job(tmp_path, RECIPE)
    assert job.wait_for(lambda: job.lines() > 20)
    victim = job.ranks()[1]
    victim.kill()
    assert job.wait(ENDED_S) != 0
    _, _, cause = job.output().partition("Root Cause")
    assert f"exitcode  : -9 (pid: {victim.pid})" in cause
    assert "Connection" not in job.output()
