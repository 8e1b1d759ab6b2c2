"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from sinkbench.errors import HostError

NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
"""Error numbers of ``flock`` on file systems that have none."""


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text under a temporary name beside ``path``, then rename it; folders are made.

    Raises:
        HostError: the folder or the file cannot be written. A file that was there is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise HostError(str(path), problem, "choose a writable path") from error
