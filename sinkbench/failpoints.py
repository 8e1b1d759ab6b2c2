"""Faults on purpose, to test that a run survives them: ``SINKBENCH_FAILPOINT=NAME[@RANK][:N[+]][:ACTION]``.

NAME is one of ``NAMES``; @RANK arms it on one rank of the job only. It acts when it is reached for the Nth
time in a process (default 1), with + every time from then on. ACTION is one of

    kill         end the process at once by SIGKILL (default)
    enospc       raise OSError(ENOSPC), as a full disk does
    sleep=S      wait S seconds

For example ``SINKBENCH_FAILPOINT=save.shard@1:2:kill`` kills rank 1 in the middle of its second shard.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter

from sinkbench.errors import HostError

VARIABLE = "SINKBENCH_FAILPOINT"
NAMES = {
    "save.folder": "the temporary folder of a checkpoint is made and empty (main rank)",
    "save.shard": "a tensor or object was written to a shard, which is not complete (every rank)",
    "save.fsync": "a shard is written, but not synchronised to the disk (every rank)",
    "save.info": "all files are there but checkpoint.json (main rank)",
    "save.rename": "the temporary folder is complete, but has its temporary name (main rank)",
    "save.replace": "the checkpoint of the same step is moved away, the new one not yet there (main rank)",
    "save.done": "the new checkpoint is in its place, older ones are not yet pruned (main rank)",
    "prune.delete": "a checkpoint to prune is moved away and not yet deleted (main rank)",
}
"""Name -> what has happened when it is reached."""

_SPEC = re.compile(r"(?P<name>[\w.]+)(@(?P<rank>\d+))?(:(?P<n>\d+)(?P<on>\+)?)?(:(?P<action>[\w=.]+))?")
_reached: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Does what SINKBENCH_FAILPOINT says, if that is about ``name``; else nothing.

    Raises:
        OSError: with the action enospc.
        HostError: the variable cannot be read.
    """
    spec = os.environ.get(VARIABLE)
    if not spec:
        return
    assert name in NAMES, name
    match = _SPEC.fullmatch(spec)
    if match is None or match["name"] not in NAMES:
        problem, names = f"{spec!r} is no failpoint", ", ".join(NAMES)
        raise HostError(VARIABLE, problem, f"write NAME[@RANK][:N[+]][:ACTION] with a name of {names}")
    if match["name"] != name or match["rank"] not in (None, os.environ.get("RANK", "0")):
        return
    _reached[name] += 1
    at = int(match["n"] or 1)
    if _reached[name] == at or (match["on"] and _reached[name] > at):
        _act(match["action"] or "kill")


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action.startswith("sleep="):
        time.sleep(float(action.removeprefix("sleep=")))
    else:
        raise HostError(VARIABLE, f"{action!r} is no action", "write kill, enospc or sleep=SECONDS")
