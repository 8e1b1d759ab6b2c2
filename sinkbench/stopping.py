"""How a run is asked to end early: by a signal, or because its time is nearly up or its start takes too long.

Signals reach single processes; that all ranks stop at the same step is the training loop's affair.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import psutil

from sinkbench.errors import HostError, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SLURM sends SIGTERM, or what --signal names, before it ends a job."""
TOGETHER_S = 2.0
"""Signals within so long are one request: a terminal and a launcher both pass Ctrl-C on."""
SLURM_END = "SLURM_JOB_END_TIME"
FIRST_SAVE_S = 30.0
"""What a save is taken to last until one has been seen, unless the limit itself is short."""
SAFETY = 1.5
"""By how much the next step and save may take longer than the longest so far."""
START_TIMEOUT = "SINKBENCH_START_TIMEOUT"
"""Environment variable: seconds after which a start whose processes do not find one another ends."""
_START_S = 300
_NO_SIGNAL = 0
_PR_SET_PDEATHSIG = 1


@contextmanager
def outside_steps(where: str) -> Iterator[None]:
    """A signal ends the block at once with ``Stopped``: there is nothing to save. Within it, a ``Request``
    takes its place while steps are running.

    Args:
        where: what is being started, for the message.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(where, f"stopped by {signal.Signals(number).name} while no step was running")

    before = _install(stop)
    try:
        yield
    finally:
        _restore(before)


class Request:
    """Whether this process was asked to end the run. Within a ``with`` block a signal is a request, and
    a second one ends the process at once, even while it waits for other ranks."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    def __enter__(self) -> Request:
        self._before = _install(lambda number, frame: None)
        if self._before:
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writing, bytes([_NO_SIGNAL]))  # ends the thread
        self._thread.join()
        os.close(self._writing)
        # Once the run has been stopped, torchrun ends ranks that are about to leave by themselves.
        _restore(dict.fromkeys(self._before, signal.SIG_IGN) if self.signal else self._before)

    def _listen(self) -> None:
        """Python runs signal handlers between the main thread's bytecodes, which may wait in a collective
        for ever; the number of a signal is in the pipe at once."""
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, args=(reading,), name="signals", daemon=True)
        self._thread.start()

    def _read(self, pipe: int) -> None:
        while (number := os.read(pipe, 1)[0]) != _NO_SIGNAL:
            if number in SIGNALS:
                self._received(signal.Signals(number))
        os.close(pipe)

    def _received(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
            print(f"{number.name}: stopping after this step; again to exit at once", file=sys.stderr)
        elif now - self._since > TOGETHER_S:
            os._exit(128 + number)


class Deadline:
    """When the run must have ended. Times are seconds since the epoch.

    Args:
        minutes: most wall-clock time of this start, launcher included; None: no limit.
        environment: SLURM_JOB_END_TIME is the end of the job, if that comes earlier.

    Raises:
        HostError: SLURM_JOB_END_TIME is no number.
    """

    def __init__(self, minutes: float | None, environment: Mapping[str, str] = os.environ) -> None:
        ends: dict[float, str] = {}
        if minutes is not None:
            ends[_launched() + 60 * minutes] = f"train.max_minutes {minutes:g}"
        if SLURM_END in environment:
            ends[_slurm_end(environment[SLURM_END])] = "the end of the SLURM job"
        self.end = min(ends, default=None)
        self.reason = ends[self.end] if self.end is not None else ""
        self._last: float | None = None
        self._step_s = 0.0
        self._guess_s = 0.0 if self.end is None else min(FIRST_SAVE_S, max(0.0, self.end - time.time()) / 10)

    def near(self, save_s: float, now: float | None = None) -> bool:
        """Whether one more step and a save could exceed the limit. Called once a step.

        Args:
            save_s: how long a save took at most; 0: none has been seen.
        """
        if self.end is None:
            return False
        now = time.time() if now is None else now
        if self._last is not None:
            self._step_s = max(self._step_s, now - self._last)
        self._last = now
        return now + SAFETY * (self._step_s + (save_s or self._guess_s)) >= self.end


def _launched() -> float:
    """When this process started, or its torchrun, which may start it again."""
    process = psutil.Process(os.getppid() if under_torchrun() else os.getpid())
    return process.create_time()


def _slurm_end(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise HostError(SLURM_END, f"{text!r} is no time", "unset it, or give seconds since 1970") from None


def start_timeout_s(environment: Mapping[str, str] = os.environ) -> int:
    """How long the processes of a job have to find one another, in seconds."""
    return int(environment.get(START_TIMEOUT, _START_S))


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_launcher() -> None:
    """A rank of torchrun is killed when its torchrun ends, however that ends (Linux only)."""
    if sys.platform != "linux" or not under_torchrun():
        return
    launcher = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if os.getppid() != launcher:  # it ended meanwhile
        os._exit(128 + signal.SIGKILL)


Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


def _install(handler: Handler) -> dict[signal.Signals, Handler]:
    """Handles the signals that are not ignored, as those of a background job may be; what was before.
    Only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def _restore(handlers: Mapping[signal.Signals, Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
