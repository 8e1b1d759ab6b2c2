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
from sinkbench.plugin_sources import sources
from sinkbench.plugins import Chosen

CACHE = Path("~/.cache/sinkbench/measure")


class Finished:
    """A folder with one file a result.

    Args:
        folder: is made when the first result is kept.
        again: keep results, but never look them up.

    Attributes:
        taken: how many results were looked up and found.
    """

    def __init__(self, folder: Path, *, again: bool = False) -> None:
        self.folder = folder.expanduser()
        self.again = again
        self.taken = 0

    def get(self, key: str | None) -> Result | None:
        """A result that was kept; None if there is none, or one of another version, or no key for it."""
        if key is None or self.again or not self._path(key).exists():
            return None
        try:
            result = read(self._path(key), Results).results[0]
        except DataError:
            return None  # an older schema, or a file that was damaged: measured again
        self.taken += 1
        return result

    def put(self, key: str | None, result: Result) -> None:
        """Keeps a result, if there is a key for it.

        Raises:
            HostError: the folder cannot be written.
        """
        if key is not None:
            write(self._path(key), Results(results=[result]))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def key(files: Iterable[Path], plugins: Iterable[Chosen], **settings: Any) -> str:
    """Names a result: equal for the same files (their paths, sizes and times), the same plugins, the same
    settings and the same version of sinkbench. Plugins are the same with equal parameters, defaults among
    them, of the same version of their package, and with the same source."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    parts = [_identity(chosen) for chosen in plugins]
    text = json.dumps([__version__, stats, parts, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _identity(chosen: Chosen) -> list[Any]:
    names = [chosen.path, chosen.plugin.name, chosen.package.distribution, chosen.package.version]
    return [*names, chosen.params.model_dump(mode="json"), sources(chosen)]
