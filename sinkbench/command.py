"""How every command starts and ends: one line and exit code 2 for a user's error, a traceback for ours."""

from __future__ import annotations

import argparse
import errno
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from sinkbench.errors import DEBUG, EXIT_CODE, STOPPED_EXIT_CODE, HostError, SinkbenchError, Stopped
from sinkbench.redaction import redact

REPORT_WAIT_S = 30.0
"""How long the other ranks leave the word to rank 0, which mostly has the same error. It may need long to
get there on a loaded host, and torchrun needs time to end the others."""

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors end a command as all others do."""

    def error(self, message: str) -> NoReturn:
        override = re.search(r"unrecognized arguments: .*?--([\w.]+\.[\w.]+=\S*)", message)
        remedy = f"write {override[1]}" if override else f"see {self.prog} --help"
        raise SinkbenchError(self.prog, message, remedy)


def run_command(function: Callable[[], int | None]) -> int:
    """Run a command's body and give its exit code.

    A SinkbenchError is printed as its one line, after its traceback if SINKBENCH_DEBUG is 1. Under
    torchrun that is done by rank 0; the other ranks wait to be ended, and speak only if their error turns
    out to be theirs alone.

    Returns:
        What the function returned (None is 0), 2 after a SinkbenchError, 75 if training was stopped and
        can go on, 130 after Ctrl-C, 141 if whoever reads the output went away.
    """
    try:
        code = function() or 0
        sys.stdout.flush()
        return code
    except SinkbenchError as error:
        return _report(error)
    except Stopped as stopped:
        if _rank() == 0:
            print(stopped, file=sys.stderr, flush=True)
        return STOPPED_EXIT_CODE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_has_left():
            raise  # a connection of the job, not our output
        # Python flushes again at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        where = "output" if error.filename is None else str(error.filename)
        problem = f"cannot be used ({error.strerror})"
        return _report(HostError(where, problem, "free space there, or choose another path"))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        first = " ".join((str(error).splitlines() or [""])[0].split())[:200]
        remedy = (
            "lower train.micro_batch_size or the model's sizes, set train.recompute, or use more processes"
        )
        return _report(HostError("memory", f"there is not enough ({first})", remedy))


def _out_of_memory(error: BaseException) -> bool:
    """On the host or on a card. torch, which may not be imported, has a class for the card alone."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: not enough memory" in str(error)
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _report(error: SinkbenchError) -> int:
    if _rank() != 0:
        leave_the_word_to_others()
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)
    print(redact(str(error)), file=sys.stderr, flush=True)
    return EXIT_CODE


def leave_the_word_to_others() -> None:
    """Waits for torchrun to end this process, so that the errors before its own are on top."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(REPORT_WAIT_S)


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0  # this may be the error to report


def _reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except OSError:  # not a file of the system
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
