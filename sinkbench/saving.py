"""Saves and restores checkpoints of a run, on all ranks together.

A save has three parts. All ranks copy what they write to host memory, which they keep for the next save, and
training goes on (1). Each writes and hashes its files in a thread meanwhile (2). Once every rank is known to
be done, which is noticed between two steps, the main rank writes the index and gives the folder its name, in
a thread again (3). Threads rather than processes: a fork of a process that uses CUDA is not safe, a new
process costs seconds and another copy, and writing and hashing need Python's interpreter lock for moments
only.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sinkbench.checkpoint import (
    RECIPE,
    Checkpoint,
    CheckpointStore,
    checked,
    newest_of,
    open_checkpoint,
    verify_files,
    write_info,
)
from sinkbench.checksums import FileSum, write_hashed
from sinkbench.config import CheckpointConfig
from sinkbench.errors import CheckpointError
from sinkbench.failpoints import failpoint

if TYPE_CHECKING:
    from sinkbench.megatron.parallel import Layout
    from sinkbench.megatron.state import Snapshot, Written
    from sinkbench.megatron.training import Engine

T = TypeVar("T")

WAIT_S = 0.05
"""How often the ranks that wait for a save agree on whether it is done. So a rank that is slow to write never
keeps the others in one collective call for long, which would time out."""

_log = logging.getLogger(__name__)


class Saver:
    """Saves a run's checkpoints, at most one at a time. All ranks call each method at the same point.

    A save that fails because of the disk is reported in one line and dropped, with the checkpoints before
    it untouched: training goes on, and the next save is another attempt. Only ``finish`` raises.
    """

    def __init__(self, store: CheckpointStore, layout: Layout, keep: CheckpointConfig) -> None:
        self.store = store
        self.layout = layout
        self.keep = keep
        self.longest_s = 0.0
        """The longest that a save took until it was complete; 0 before the first."""
        self._flight: _Flight | None = None
        self._failure: CheckpointError | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save is not complete."""
        return self._flight is not None

    def save(self, engine: Engine, step: int, recipe: str) -> None:
        """Begins to save a checkpoint, after the one before is complete. One of the same step is replaced;
        older ones are pruned once the new one is complete.

        Args:
            recipe: the resolved recipe, of the main rank.
        """
        from sinkbench.megatron import state

        self.wait()
        began = time.monotonic()
        self._failure = None
        folder = _from_main(self.layout, lambda: self.store.begin(step))
        if isinstance(folder, _Failed):
            self._report(step, folder)
            return
        snapshot = state.Snapshot(engine)
        layout = state.layout_of(engine)
        task = _Task(lambda: snapshot.write(folder))
        self._flight = _Flight(step, folder, recipe, layout, snapshot, task, began)
        if not self.keep.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Goes on with a save whose next part can begin. While there is one, it costs a reduction of one
        number over the ranks."""
        if self._flight is not None and _all(self.layout, self._flight.task.is_done()):
            self._advance(self._flight)

    def wait(self) -> None:
        """Returns once no save is in flight."""
        while self._flight is not None:
            if _all(self.layout, self._flight.task.is_done(timeout=WAIT_S)):
                self._advance(self._flight)

    def finish(self) -> None:
        """Waits for the last save.

        Raises:
            CheckpointError: it failed.
        """
        self.wait()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Gives up a save in flight, when ranks can no longer act together. No collective call; once it
        returns, this rank writes no more."""
        if self._flight is not None:
            self._flight.snapshot.cancel()
            self._flight.task.join()
            self._flight = None

    def _advance(self, flight: _Flight) -> None:
        outcomes = _collect(self.layout, flight.task.outcome)
        failed = next((outcome for outcome in outcomes if isinstance(outcome, _Failed)), None)
        if failed is not None:
            self._flight = None
            if self.layout.is_main:
                shutil.rmtree(flight.folder, ignore_errors=True)  # what is left goes at the next save
            self._report(flight.step, failed)
        elif flight.committing:
            self._flight = None
            self.longest_s = max(self.longest_s, time.monotonic() - flight.began)
            if outcomes[0] is not None and self.layout.is_main:
                _log.warning("%s", outcomes[0])
        else:
            flight.committing = True
            main = self.layout.is_main
            flight.task = _Task(lambda: self._commit(flight, outcomes) if main else None)

    def _report(self, step: int, failed: _Failed) -> None:
        """
        Raises:
            RuntimeError: it is a fault of ours, not of the disk.
        """
        if failed.traceback is not None:
            raise RuntimeError(f"saving step {step} failed on a rank:\n{failed.traceback}")
        problem = f"could not be saved ({failed.problem}); the checkpoints before it are untouched"
        self._failure = CheckpointError(str(self.store.folder / f"step_{step}"), problem, "free the disk")
        if self.layout.is_main:
            _log.warning("%s; the next checkpoint that is due will be tried", self._failure)

    def _commit(self, flight: _Flight, written: list[Written]) -> CheckpointError | None:
        """What the main rank does once all files are there.

        Returns:
            Why an old checkpoint could not be deleted.
        """
        files = {name: file for part in written for name, file in part.files.items()}
        contents = {**flight.snapshot.index(written), RECIPE: flight.recipe.encode()}
        files |= {name: write_hashed(flight.folder / name, data) for name, data in contents.items()}
        failpoint("save.info")
        write_info(flight.folder, step=flight.step, layout=flight.layout, files=files)
        self.store.commit(flight.folder, flight.step)
        try:
            for step in self.store.superseded(self.keep.keep_last, self.keep.keep_every):
                self.store.delete(step)
        except OSError as error:
            problem = f"an old checkpoint could not be deleted ({_words(error)})"
            return CheckpointError(str(self.store.folder), problem, "delete it by hand, or free the folder")
        return None


@dataclass
class _Flight:
    """A save on its way.

    Attributes:
        task: what this rank does of it at present.
        committing: it is at part 3.
    """

    step: int
    folder: Path
    recipe: str
    layout: dict[str, int]
    snapshot: Snapshot
    task: _Task
    began: float
    committing: bool = False


@dataclass(frozen=True)
class _Failed:
    """Attributes:
    problem: what the system said.
    traceback: of an error that is none of the system's.
    """

    problem: str
    traceback: str | None = None


class _Task:
    """A function that runs in a thread. ``outcome`` is what it returned, or a _Failed."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        self.outcome = _attempt(self._function)

    def is_done(self, timeout: float = 0.0) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()


def _attempt(function: Callable[[], T]) -> T | _Failed:
    """Any error becomes a value that other ranks can be told."""
    try:
        return function()
    except OSError as error:
        return _Failed(_words(error))
    except Exception as error:
        return _Failed(repr(error), traceback.format_exc())


def _words(error: OSError) -> str:
    return error.strerror or str(error)


def newest_good(store: CheckpointStore, layout: Layout, verify: str) -> Checkpoint | None:
    """The newest checkpoint that is as it was written; newer ones are reported in a line each. All ranks
    call it, and each reads a share of the files.

    Args:
        verify: "full" compares checksums, "size" sizes only.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are some, and none is good.
        FormatError: the newest good one is of a format that this version does not read.
    """
    found = _from_main(layout, lambda: _recovered_steps(store))
    if isinstance(found, _Failed):
        raise _unusable(store.folder, found)
    report = _log.warning if layout.is_main else _log.debug
    return newest_of(found, lambda step: _examine(partial(store.open, step), layout, verify), report)


def _recovered_steps(store: CheckpointStore) -> list[int]:
    store.recover()
    return store.steps()


def _unusable(folder: Path, failed: _Failed) -> CheckpointError:
    return CheckpointError(str(folder), f"cannot be used ({failed.problem})", "make it readable and writable")


def open_good(folder: Path, layout: Layout, verify: str) -> Checkpoint:
    """A checkpoint by its folder, if it is as it was written. All ranks call it, and each reads a share of
    the files.

    Args:
        verify: "full" compares checksums, "size" sizes only.

    Raises:
        CheckpointError: it is not.
    """
    examined = _examine(partial(open_checkpoint, folder), layout, verify)
    if isinstance(examined, CheckpointError):
        raise examined
    return examined


def _examine(opener: Callable[[], Checkpoint], layout: Layout, verify: str) -> Checkpoint | CheckpointError:
    opened = _from_main(layout, partial(checked, opener))
    if isinstance(opened, _Failed):
        raise RuntimeError(opened.traceback or opened.problem)
    if not isinstance(opened, Checkpoint) or verify != "full":
        return opened
    share = _shares(opened.files, layout.world_size)[layout.rank]
    problems = _collect(layout, checked(lambda: verify_files(opened, share)))
    return next((problem for problem in problems if problem is not None), opened)


def _shares(files: dict[str, FileSum], ranks: int) -> list[list[str]]:
    """The files that each rank reads, of about the same size together."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name, file in sorted(files.items(), key=lambda item: -item[1].size):
        least = load.index(min(load))
        shares[least].append(name)
        load[least] += file.size
    return shares


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Restores model, optimizer, schedule and, under the same layout, random states. All ranks call it.

    Raises:
        CheckpointError: it cannot be read, or holds another model.
    """
    from sinkbench.megatron import state

    state.load(engine, checkpoint.folder, same_layout=checkpoint.layout == state.layout_of(engine))


def _all(layout: Layout, done: bool) -> bool:
    """Whether all ranks say so."""
    if layout.world_size == 1:
        return done
    import torch
    import torch.distributed as dist

    agreed = torch.tensor(int(done), device=layout.device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed.item())


def _collect(layout: Layout, value: Any) -> list[Any]:
    """What each rank gives, to all of them."""
    if layout.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * layout.world_size
    dist.all_gather_object(values, value)
    return values


def _from_main(layout: Layout, function: Callable[[], T]) -> T | _Failed:
    """What a function returns on the main rank, to all of them."""
    value: list[Any] = [_attempt(function) if layout.is_main else None]
    if layout.world_size > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(value, src=0)
    result: T | _Failed = value[0]
    return result
