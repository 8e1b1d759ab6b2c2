"""Training jobs that scripts and tests start, watch and kill from outside."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

LONG_S = 300.0
"""No start of a job takes longer."""


class Job:
    """A start of a run: torchrun with its ranks, or one process.

    Args:
        folder: where the run's folder is.
        recipe: its name and overrides, ``name=`` among them.
        processes: ranks; 1: without torchrun.
        options: of torchrun.
        environment: further variables.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Sequence[str],
        processes: int = 2,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        name = next(text.removeprefix("name=") for text in recipe if text.startswith("name="))
        self.folder = folder / name
        self.processes = processes
        self.options = options
        self.arguments = [*recipe, f"output_dir={folder}"]
        self.environment = {"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})}
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self.log.touch()
        self.said_before = self.log.stat().st_size
        self.began = time.time()
        self.start()

    def start(self) -> None:
        """Starts the processes."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        command = [*launcher, *self.options] if self.processes > 1 else []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, "-m", "sinkbench.pretrain", *self.arguments],
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit code, once the job has ended."""
        return self.process.poll()

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
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()

    def wait(self, timeout: float = LONG_S) -> int:
        """The exit code."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder}: still there after {timeout:.0f} s\n{self.output()}")
            time.sleep(0.01)
        return code

    def output(self) -> str:
        """What this start has printed."""
        return self.log.read_bytes()[self.said_before :].decode(errors="replace")

    def lines(self) -> int:
        """Lines of metrics.jsonl that are there now."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def in_steps(self) -> bool:
        """Whether this start trains: it has cut metrics.jsonl back."""
        path = self.folder / "metrics.jsonl"
        return path.exists() and path.stat().st_mtime > self.began

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Waits until something holds; False if the job ended before."""
        deadline = time.monotonic() + LONG_S
        while self.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder}: nothing within {LONG_S:.0f} s\n{self.output()}")
            time.sleep(0.005)
        return False


class WarmJob(Job):
    """Ranks without a launcher, forked from a process that has imported torch: their start takes a tenth."""

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        rendezvous = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.processes),
        }
        self.ranks_started = [
            _forks.Process(
                target=_warm_rank,
                args=(rank, {**self.environment, **rendezvous}, self.log, self.arguments),
            )
            for rank in range(self.processes)
        ]
        for rank in self.ranks_started:
            rank.start()

    def poll(self) -> int | None:
        codes = [rank.exitcode for rank in self.ranks_started]
        return None if None in codes else max((abs(code) for code in codes if code), default=0)

    def tree(self) -> list[psutil.Process]:
        return self.ranks()

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(rank.pid) for rank in self.ranks_started if rank.is_alive()]


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["sinkbench.testing.template"])


def _warm_rank(rank: int, environment: dict[str, str], log: Path, arguments: Sequence[str]) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    from sinkbench import pretrain

    sys.exit(pretrain.main(arguments))
