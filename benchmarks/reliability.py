"""Kills training runs at random moments and goes on with them, or trains long and watches memory.

    python benchmarks/reliability.py               # 60 kills of the whole job, and others
    python benchmarks/reliability.py --soak        # 2,000 steps with a checkpoint every 50

After every kill the same command goes on with the run. Each run that reaches its end is compared with one
that was never killed: metrics.jsonl without times, every weight and optimizer moment, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from sinkbench.failpoints import NAMES, VARIABLE

STEPS, EVERY = 240, 5
RECIPE = (
    "demo",
    "name=killed",
    f"train={{steps: {STEPS}, global_batch_size: 8}}",
    "model={num_layers: 2, num_attention_heads: 2, ffn: swiglu, ffn_hidden_size: 96}",
    "optim.warmup_steps=5",
    f"checkpoint={{every: {EVERY}, keep_last: 2, keep_every: 60}}",
    "log={every: 1, progress: false}",
    "measure={every: 60, count: 8}",
    "validation={every: 60, sequences: 8}",
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
SOAK_WARM_UP = 500
"""Steps before memory is compared: allocators and caches fill."""
TIMES = {"tokens_per_second", "mfu", "seconds"}
ENDED_S = 60.0
"""Within so long the rest of a job must end once a part of it is gone."""
LONG_S = 300.0
"""No single start takes longer."""


class Job:
    """A start of a run: torchrun with its ranks, or one process.

    Args:
        folder: where the run's folder is.
        processes: ranks; 1: without torchrun.
        options: of torchrun.
        environment: further variables.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Sequence[str] = RECIPE,
        processes: int = 2,
        options: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "sinkbench.pretrain"]
        name = next(text.removeprefix("name=") for text in recipe if text.startswith("name="))
        self.folder = folder / name
        self.processes = processes
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        with self.log.open("ab") as log:
            self.began_at = log.tell()
            self.process = subprocess.Popen(
                [*command, *recipe, f"output_dir={folder}"],
                stdout=log,
                stderr=log,
                env={"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})},
                start_new_session=True,
            )

    def tree(self) -> list[psutil.Process]:
        """The launcher and all that it started."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def ranks(self) -> list[psutil.Process]:
        """By rank; empty until all have started."""
        found = []
        for process in self.tree()[1:] if self.processes > 1 else self.tree():
            try:
                if "sinkbench.pretrain" in process.cmdline():
                    rank = process.environ().get("RANK", "0")
                    found.append((int(rank), process))
            except psutil.NoSuchProcess:
                continue
        ranks = [process for _, process in sorted(found, key=lambda item: item[0])]
        return ranks if len(ranks) == self.processes else []

    def kill(self) -> None:
        """SIGKILL to every process of the job."""
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def wait(self, timeout: float = LONG_S) -> int:
        """The exit code."""
        return self.process.wait(timeout)

    def output(self) -> str:
        """What this start has printed."""
        return self.log.read_bytes()[self.began_at :].decode(errors="replace")

    def lines(self) -> int:
        """Lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Waits until something holds; False if the job ended before."""
        deadline = time.monotonic() + LONG_S
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder}: nothing within {LONG_S:.0f} s")
            time.sleep(0.01)
        return False


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, without what depends on the time."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer moments of a checkpoint, whole."""
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
    expected: Path
    train_s: float
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
        found, wanted = (tensors(f / "checkpoints" / f"step_{STEPS}") for f in (folder, self.expected))
        different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
        assert found.keys() == wanted.keys(), f"{folder}: other tensors"
        assert not different, f"{folder}: {different} differ"
        self.counts["runs compared, all equal"] += 1

    def new_folder(self) -> Path:
        self.runs += 1
        return self.folder / f"run_{self.runs}"

    def start(self, folder: Path, environment: dict[str, str] | None = None) -> Job:
        return Job(folder, processes=self.processes, environment=environment)

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
            self.counts[f"kills {self._moment(job)}"] += 1
            job.kill()
            count -= 1
            print(f"{count} kills to go", file=sys.stderr)
        self.finish(folder)

    def _wait_for_a_random_moment(self, job: Job) -> bool:
        """False if the job came to its end."""
        if self.random.random() < 0.25:
            until = time.monotonic() + self.random.uniform(0, self.start_s)
            return job.wait_for(lambda: time.monotonic() >= until)
        begun = time.time()
        metrics_file = job.folder / "metrics.jsonl"
        if not job.wait_for(lambda: metrics_file.exists() and metrics_file.stat().st_mtime > begun):
            return False
        until = time.monotonic() + self.random.uniform(0, self.train_s)
        return job.wait_for(lambda: time.monotonic() >= until)

    def _moment(self, job: Job) -> str:
        if "steps" not in self._phase(job):
            return self._phase(job)
        names = {path.name for path in (job.folder / "checkpoints").glob(".step_*")}
        if any(name.endswith(".deleting") for name in names):
            return "while a checkpoint was pruned"
        return "while a checkpoint was written" if names else "between checkpoints"

    def _phase(self, job: Job) -> str:
        manifest = job.folder / "manifest.json"
        started = (
            manifest.exists() and manifest.stat().st_mtime > psutil.Process(job.process.pid).create_time()
        )
        return "in steps" if started else "during the start"

    def part_kills(self, count: int) -> None:
        """SIGKILL to the launcher alone, and to one rank alone, in turn; the rest must end by itself."""
        for number in range(count):
            self._kill_a_part(launcher=number % 2 == 0)

    def _kill_a_part(self, *, launcher: bool) -> None:
        folder = self.new_folder()
        job, at = self.start(folder), self.random.randrange(1, STEPS - EVERY)
        assert job.wait_for(lambda: job.lines() > at), job.output()
        ranks = job.ranks()
        victim = job.tree()[0] if launcher else self.random.choice(ranks)
        victim.kill()
        self.counts[f"kills of {'the launcher' if launcher else 'one rank'} alone"] += 1
        self._rest_ends(job, ranks)
        self.finish(folder)

    def _rest_ends(self, job: Job, ranks: list[psutil.Process]) -> None:
        began = time.monotonic()
        job.wait(ENDED_S)
        _, alive = psutil.wait_procs(ranks, timeout=ENDED_S - (time.monotonic() - began))
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


def reference(folder: Path, processes: int) -> tuple[Path, float, float]:
    """A run that nothing happens to, and how long its start and its training took."""
    began = time.monotonic()
    job = Job(folder, processes=processes)
    job.wait_for(lambda: job.lines() > 0)
    start_s = time.monotonic() - began
    code = job.wait()
    assert code == 0, job.output()
    return job.folder, start_s, time.monotonic() - began - start_s


def kill_and_resume(
    folder: Path, *, kills: int, parts: int, failpoints: bool, processes: int, seed: int
) -> Campaign:
    """Runs all kinds of kills and prints how many there were of each.

    Args:
        kills: of the whole job.
        parts: of the launcher or a rank alone.

    Raises:
        AssertionError: a run did not go on, or came to another end.
    """
    expected, start_s, train_s = reference(folder / "expected", processes)
    campaign = Campaign(
        folder=folder,
        random=random.Random(seed),
        processes=processes,
        expected=expected,
        train_s=train_s,
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
    files: open files, each count that was seen after it.
    """

    slope: float
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
    while job.process.poll() is None:
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
    slope = 1000 * np.polyfit(step[late], memory[late], 1)[0]
    return Soak(
        float(slope), sorted(set(files[late].tolist())), float(memory.max()), time.monotonic() - began
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--soak", action="store_true", help="train long instead of killing")
    parser.add_argument("--kills", type=int, default=60, help="of the whole job (default: 60)")
    parser.add_argument("--parts", type=int, default=6, help="of the launcher or one rank (default: 6)")
    parser.add_argument("--no-failpoints", action="store_true", help="no kills at the stages of a write")
    parser.add_argument("--processes", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.soak:
            print(soak(folder))
            return
        kill_and_resume(
            folder,
            kills=arguments.kills,
            parts=arguments.parts,
            failpoints=not arguments.no_failpoints,
            processes=arguments.processes,
            seed=arguments.seed,
        )


if __name__ == "__main__":
    main()
