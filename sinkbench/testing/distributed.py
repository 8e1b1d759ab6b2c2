"""Runs a function on several gloo ranks of this machine, for tests.

A template process imports torch and sinkbench once per session; every run forks its ranks from it,
which takes a tenth of a second. So each run starts from a clean interpreter state (no parallel state,
random state or environment left by the test before), and a failing or hanging rank costs the next
test nothing. The template is a fresh interpreter on the CPU: a caller that uses CUDA is not forked.
Linux only, as the fork server is.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

GRACE_SECONDS = 0.5
"""After a rank failed: the time the others have to fail too, before they are killed."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["sinkbench.testing.template"])


class RankFailure(AssertionError):
    """Some ranks raised, died or did not finish in time; the message holds every traceback."""


class RunDistributed(Protocol):
    """Type of ``run_distributed``, for tests that take it as a fixture."""

    def __call__(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = ...
    ) -> list[Any]: ...


@dataclass
class _Rank:
    process: ForkServerProcess
    connection: Connection
    log: Path


def warm_up() -> None:
    """Starts the template process, which imports for seconds, while the caller does something else."""
    forkserver.ensure_running()


def run_distributed(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Calls ``function(rank, world_size, *args)`` on every rank and returns the results by rank.

    The default process group (gloo) is initialised and lasts until the run ends: code under test
    reuses it. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as torchrun sets them.
    The ranks have the caller's environment and working folder. What they print is printed here once
    they have ended.

    Args:
        world_size: number of ranks.
        function: a function that the ranks can import (top level of its module).
        args: picklable arguments; tensors arrive as copies.
        timeout: seconds until all ranks must have returned.

    Raises:
        RankFailure: a rank raised, died or timed out. All ranks are gone by then.
    """
    call = pickle.dumps((function, args))
    environment = {**os.environ, **_rendezvous(world_size)}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for number in range(world_size):
                ranks.append(_start(number, environment, call, Path(folder), timeout))
            results, failures = _collect(ranks, timeout)
        finally:
            for rank in ranks:
                _kill(rank.process)
            _print_logs(ranks)
    if failures:
        raise RankFailure(_describe(failures, world_size, results))
    return [results[number] for number in range(world_size)]


def _rendezvous(world_size: int) -> dict[str, str]:
    # Below the ports the kernel hands out by itself, so that no connection can take it meanwhile.
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            break
    return {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _start(number: int, environment: dict[str, str], call: bytes, folder: Path, timeout: float) -> _Rank:
    ours, theirs = _context.Pipe()
    log = folder / f"rank_{number}.log"
    process = _context.Process(target=_rank_main, args=(number, environment, call, log, theirs, timeout))
    process.start()
    theirs.close()
    return _Rank(process, ours, log)


def _rank_main(
    number: int, environment: dict[str, str], call: bytes, log: Path, pipe: Connection, timeout: float
) -> None:
    """Life of a rank: run the call, send what came of it, wait to be killed.

    A rank waits because rank 0 keeps the store that the others may still need.
    """
    os.setpgid(0, 0)  # killed together with what it starts
    threading.Thread(target=_die_with_caller, daemon=True).start()
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    os.environ.clear()
    os.environ.update(environment, RANK=str(number), LOCAL_RANK=str(number))
    try:
        message = pickle.dumps((True, _call(number, call, timeout)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(message)
    signal.pause()


def _die_with_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    wait([caller.sentinel])
    os.killpg(0, signal.SIGKILL)


def _call(number: int, call: bytes, timeout: float) -> Any:
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    function, args = pickle.loads(call)
    return function(number, int(os.environ["WORLD_SIZE"]), *args)


def _collect(ranks: list[_Rank], timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and failures by rank; returns at the deadline, or soon after the first failure."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = {rank.connection: number for number, rank in enumerate(ranks)}
    deadline = time.monotonic() + timeout
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            number = pending.pop(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                ranks[number].process.join()
                succeeded, value = False, f"died, exit code {ranks[number].process.exitcode}"
            (results if succeeded else failures)[number] = value
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if pending and not failures:
        for number in pending.values():
            failures[number] = f"not finished after {timeout:g} s, at:\n{_stack(ranks[number])}"
    return results, failures


def _stack(rank: _Rank) -> str:
    """Where a hanging rank is."""
    printed = rank.log.stat().st_size
    assert rank.process.pid is not None
    os.kill(rank.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and rank.log.stat().st_size == printed:
        time.sleep(0.01)
    time.sleep(0.05)  # the dump is written in pieces
    return rank.log.read_text(errors="replace")[printed:]


def _kill(process: ForkServerProcess) -> None:
    with suppress(ProcessLookupError):
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have had the time to make its group
    process.join()


def _print_logs(ranks: list[_Rank]) -> None:
    for number, rank in enumerate(ranks):
        text = rank.log.read_text(errors="replace") if rank.log.exists() else ""
        if text:
            print(f"--- printed by rank {number} ---\n{text.rstrip()}")


def _describe(failures: dict[int, str], world_size: int, results: dict[int, Any]) -> str:
    parts = [f"rank {number} of {world_size}: {text.rstrip()}" for number, text in sorted(failures.items())]
    killed = sorted(set(range(world_size)) - failures.keys() - results.keys())
    if killed:
        parts.append(f"then killed, still running: ranks {', '.join(map(str, killed))}")
    return "\n".join(parts)
