"""How every command starts and ends: one line and exit code 2 for a user's error, a traceback for ours."""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from sinkbench.errors import EXIT_CODE, HostError, SinkbenchError

REPORT_WAIT_S = 10.0
"""How long the other ranks leave the word to rank 0, which mostly has the same error."""

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors end a command as all others do."""

    def error(self, message: str) -> NoReturn:
        raise SinkbenchError(self.prog, message, f"see {self.prog} --help")


def run_command(function: Callable[[], int | None]) -> int:
    """Run a command's body and give its exit code.

    A SinkbenchError is printed as its one line. Under torchrun that is done by rank 0; the other ranks
    wait to be ended, and speak only if their error turns out to be theirs alone.

    Returns:
        What the function returned (None is 0), 2 after a SinkbenchError, 130 after Ctrl-C, 141 if
        whoever reads the output went away.
    """
    try:
        code = function() or 0
        sys.stdout.flush()
        return code
    except SinkbenchError as error:
        return _report(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_has_left():
            raise  # a connection of the job, not our output
        # Python flushes again at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is None:
            raise
        problem = f"cannot be used ({error.strerror})"
        return _report(HostError(str(error.filename), problem, "free space there, or choose another path"))


def _report(error: SinkbenchError) -> int:
    if int(os.environ.get("RANK", "0")) != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends us once rank 0 has left
        time.sleep(REPORT_WAIT_S)
    print(error, file=sys.stderr, flush=True)
    return EXIT_CODE


def _reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except OSError:  # not a file of the system
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
