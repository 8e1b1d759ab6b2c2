"""Results that are kept as soon as they are there, so that an interrupted call goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sinkbench import __version__
from sinkbench.errors import DataError
from sinkbench.measure.results import Result, Results, read, write

CACHE = Path("~/.cache/sinkbench/measure")


class Finished:
    """A folder with one file a result.

    Args:
        folder: is made when the first result is kept.
        again: keep results, but never look them up.
    """

    def __init__(self, folder: Path, *, again: bool = False) -> None:
        self.folder = folder.expanduser()
        self.again = again

    def get(self, key: str) -> Result | None:
        """A result that was kept; None if there is none, or one of another version."""
        path = self._path(key)
        if self.again or not path.exists():
            return None
        try:
            return read(path, Results).results[0]
        except DataError:
            return None  # an older schema, or a file that was damaged: measured again

    def put(self, key: str, result: Result) -> None:
        """
        Raises:
            HostError: the folder cannot be written.
        """
        write(self._path(key), Results(results=[result]))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def key(files: Iterable[Path], **settings: Any) -> str:
    """Names a result: equal for the same files (their paths, sizes and times), the same settings and the
    same version of sinkbench."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    text = json.dumps([__version__, stats, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
