"""Kills training runs at random moments and goes on with them, or trains long and watches memory.

    python -m benchmarks.reliability               # 60 kills of the whole job, and others
    python -m benchmarks.reliability --soak        # 2,000 steps with a checkpoint every 50

After every kill the same command goes on with the run. Each run that reaches its end is compared with one
that was never killed: metrics.jsonl without times, every weight and optimizer moment, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from benchmarks.jobs import LONG_S, Job, WarmJob
from sinkbench.failpoints import NAMES, VARIABLE

STEPS, EVERY = 120, 5
RECIPE = (
    "demo",
    "name=killed",
    f"train={{steps: {STEPS}, global_batch_size: 8}}",
    "model={num_layers: 2, num_attention_heads: 2, ffn: swiglu, ffn_hidden_size: 96}",
    "optim.warmup_steps=5",
    f"checkpoint={{every: {EVERY}, keep_last: 2, keep_every: 30}}",
    "log={every: 1, progress: false}",
    "measure={every: 30, count: 8}",
    "validation={every: 30, sequences: 8}",
)
SOAK_STEPS, SOAK_EVERY = 2000, 50
SOAK = (
    "demo",
    "name=soak",
    f"train={{steps: {SOAK_STEPS}, global_batch_size: 8}}",
    f"checkpoint.every={SOAK_EVERY}",
    "log={every: 10, progress: false}",
    "measure={every: 500, count: 8}",
    "validation={every: 500, sequences: 8}",
)
SOAK_WARM_UP = 1000
"""Steps before memory is compared: allocators and caches fill."""
TIMES = {"tokens_per_second", "mfu", "seconds"}
BETWEEN_LINES_S = 0.1
"""A step and a save last about so long."""
ENDED_S = 60.0
"""Within so long the rest of a job must end once a part of it is gone."""


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, without what depends on the time."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer moments of a checkpoint, put together from the shards of all ranks. Layers
    lie along the first dimension."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(found, checkpoint_id=checkpoint, no_dist=True)
    return found


@dataclass
class Campaign:
    """Kills and resumes, each finished run compared with ``expected``."""

    folder: Path
    random: random.Random
    processes: int
    job: type[Job]
    expected: Path
    start_s: float
    counts: Counter[str] = field(default_factory=Counter)
    slowest_end_s: float = 0.0
    runs: int = 0

    def compare(self, folder: Path) -> None:
        """
        Raises:
            AssertionError: a line or a number differs.
        """
        assert metrics(folder) == metrics(self.expected), f"{folder}/metrics.jsonl differs"
        found, wanted = (whole_tensors(f / "checkpoints" / f"step_{STEPS}") for f in (folder, self.expected))
        different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
        assert found.keys() == wanted.keys(), f"{folder}: other tensors"
        assert not different, f"{folder}: {different} differ"
        self.counts["runs compared, all equal"] += 1

    def new_folder(self) -> Path:
        self.runs += 1
        return self.folder / f"run_{self.runs}"

    def start(self, folder: Path, environment: Mapping[str, str] | None = None) -> Job:
        return self.job(folder, RECIPE, self.processes, environment=environment)

    def finish(self, folder: Path) -> None:
        """Goes on with a run to its end."""
        job = self.start(folder)
        code = job.wait()
        assert code == 0, f"exit code {code}:\n{job.output()}"
        self.compare(job.folder)

    def random_kills(self, count: int) -> None:
        """SIGKILL to the whole job at random moments of its start and of its training."""
        folder = self.new_folder()
        while count:
            job = self.start(folder)
            if not self._wait_for_a_random_moment(job):
                assert job.wait() == 0, job.output()
                self.compare(job.folder)
                folder = self.new_folder()
                continue
            job.kill()
            self.counts[f"kills {self._moment(job)}"] += 1
            count -= 1
            print(f"{count} kills to go", file=sys.stderr)
        self.finish(folder)

    def _wait_for_a_random_moment(self, job: Job) -> bool:
        """False if the job came to its end."""
        if self.random.random() < 0.25:
            until = time.monotonic() + self.random.uniform(0, self.start_s)
            return job.wait_for(lambda: time.monotonic() >= until)
        if not job.wait_for(job.in_steps):
            return False
        line = self.random.randrange(job.lines(), len(metrics(self.expected)))
        if not job.wait_for(lambda: job.lines() >= line):
            return False
        until = time.monotonic() + self.random.uniform(0, BETWEEN_LINES_S)
        return job.wait_for(lambda: time.monotonic() >= until)

    def _moment(self, job: Job) -> str:
        """What a job that has been killed was doing."""
        if not job.in_steps():
            return "during the start"
        left = {path.suffix for path in (job.folder / "checkpoints").glob(".step_*")}
        if ".deleting" in left:
            return "while a checkpoint was pruned"
        return "while a checkpoint was written" if left else "between checkpoints"

    def part_kills(self, count: int) -> None:
        """SIGKILL to the launcher alone, if there is one, and to one rank alone, in turn; the rest must end
        by itself."""
        for number in range(count):
            self._kill_a_part(launcher=self.job is Job and number % 2 == 0)

    def _kill_a_part(self, *, launcher: bool) -> None:
        folder = self.new_folder()
        job, at = self.start(folder), self.random.randrange(1, STEPS - EVERY)
        assert job.wait_for(lambda: job.in_steps() and job.lines() > at), job.output()
        ranks = job.ranks()
        victim = job.tree()[0] if launcher else self.random.choice(ranks)
        victim.kill()
        self.counts[f"kills of {'the launcher' if launcher else 'one rank'} alone"] += 1
        self._rest_ends(job, ranks)
        self.finish(folder)

    def _rest_ends(self, job: Job, ranks: list[psutil.Process]) -> None:
        began = time.monotonic()
        job.wait(ENDED_S)
        _, alive = psutil.wait_procs(ranks, timeout=max(0.0, ENDED_S - (time.monotonic() - began)))
        assert not alive, f"still there after {ENDED_S:.0f} s: {alive}"
        self.slowest_end_s = max(self.slowest_end_s, time.monotonic() - began)

    def failpoint_kills(self) -> None:
        """SIGKILL to one rank at every stage of a write."""
        for number, name in enumerate(NAMES):
            folder = self.new_folder()
            everywhere = "every rank" in NAMES[name]
            if name == "save.replace":
                self._leave_a_damaged_checkpoint(folder)
            rank = number % self.processes if everywhere else 0
            job = self.start(folder, {VARIABLE: f"{name}@{rank}:{1 if name == 'save.replace' else 2}"})
            code = job.wait(LONG_S)
            assert code != 0, f"{name} was not reached"
            self.counts["kills at a failpoint"] += 1
            self.finish(folder)

    def _leave_a_damaged_checkpoint(self, folder: Path) -> None:
        """One that a resumed run passes over and writes again."""
        job = self.start(folder)
        job.wait_for(lambda: len(list((job.folder / "checkpoints").glob("step_*"))) >= 2)
        job.kill()
        newest = max((job.folder / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
        shard = next(newest.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])


def reference(folder: Path, processes: int, kind: type[Job] = Job) -> tuple[Path, float]:
    """A run that nothing happens to, and how long its start took."""
    began = time.monotonic()
    job = kind(folder, RECIPE, processes)
    job.wait_for(job.in_steps)
    start_s = time.monotonic() - began
    code = job.wait()
    assert code == 0, job.output()
    return job.folder, start_s


def kill_and_resume(
    folder: Path,
    *,
    job: type[Job] = Job,
    kills: int,
    parts: int,
    failpoints: bool,
    processes: int = 2,
    seed: int = 0,
) -> Campaign:
    """Runs all kinds of kills and prints how many there were of each.

    Args:
        kills: of the whole job.
        parts: of the launcher or a rank alone.

    Raises:
        AssertionError: a run did not go on, or came to another end.
    """
    expected, start_s = reference(folder / "expected", processes, job)
    campaign = Campaign(
        folder=folder,
        random=random.Random(seed),
        processes=processes,
        job=job,
        expected=expected,
        start_s=start_s,
    )
    try:
        campaign.random_kills(kills)
        campaign.part_kills(parts)
        if failpoints:
            campaign.failpoint_kills()
    finally:
        for what, count in sorted(campaign.counts.items()):
            print(f"{count:4d} {what}")
        print(f"     the rest of a job ended within {campaign.slowest_end_s:.1f} s", flush=True)
    return campaign


@dataclass(frozen=True)
class Soak:
    """Attributes:
    slope: MiB of memory per 1,000 steps after the warm-up.
    memory_mib: median of each hundred steps.
    files: open files, each count that was seen after the warm-up.
    """

    slope: float
    memory_mib: list[float]
    files: list[int]
    peak_mib: float
    seconds: float


def soak(folder: Path) -> Soak:
    """Trains in one process and watches it from outside."""
    began = time.monotonic()
    job = Job(folder, SOAK, processes=1)
    process = psutil.Process(job.process.pid)
    samples: list[tuple[int, float, int]] = []
    logged = job.lines()
    while job.poll() is None:
        time.sleep(0.2)
        if job.lines() == logged:
            continue
        logged = job.lines()
        last = (job.folder / "metrics.jsonl").read_text().splitlines()[-1]
        try:
            sample = json.loads(last)["step"], process.memory_info().rss / 2**20, process.num_fds()
        except psutil.Error:
            break
        samples.append(sample)
    code = job.wait()
    assert code == 0, job.output()
    step, memory, files = (np.array(column) for column in zip(*samples, strict=True))
    late = step > SOAK_WARM_UP
    hundreds = [round(float(np.median(memory[step // 100 == n])), 1) for n in np.unique(step // 100)]
    return Soak(
        slope=float(1000 * np.polyfit(step[late], memory[late], 1)[0]),
        memory_mib=hundreds,
        files=sorted(set(files[late].tolist())),
        peak_mib=float(memory.max()),
        seconds=time.monotonic() - began,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--soak", action="store_true", help="train long instead of killing")
    parser.add_argument("--kills", type=int, default=60, help="of the whole job (default: 60)")
    parser.add_argument("--parts", type=int, default=6, help="of the launcher or one rank (default: 6)")
    parser.add_argument("--warm", action="store_true", help="fork ranks that have torch, without torchrun")
    parser.add_argument("--no-failpoints", action="store_true", help="no kills at the stages of a write")
    parser.add_argument("--processes", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary folder)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the counts so far are printed
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.soak:
            print(soak(folder))
            return
        kill_and_resume(
            folder,
            job=WarmJob if arguments.warm else Job,
            kills=arguments.kills,
            parts=arguments.parts,
            failpoints=not arguments.no_failpoints,
            processes=arguments.processes,
            seed=arguments.seed,
        )


if __name__ == "__main__":
    main()
