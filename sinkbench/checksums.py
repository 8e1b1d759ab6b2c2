"""Files that are known by their size and SHA-256, computed while they are written.

SHA-256 is in the standard library, `sha256sum` checks it, and processors compute it faster than most disks
write; hashlib and file writes release Python's interpreter lock, so that threads run beside training.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileSum:
    """Attributes:
    size: bytes.
    sha256: in hexadecimal; None where it is not known.
    """

    size: int
    sha256: str | None


class HashedFile:
    """A new file, written from the beginning to the end.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._sha256 = hashlib.sha256()
        self.error: OSError | None = None
        """Why a write failed. Some callers of ``write`` lose the exception."""

    def write(self, data: bytes | memoryview) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._sha256.update(data)
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> FileSum:
        """Has everything on the disk before it returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileSum(self._file.tell(), self._sha256.hexdigest())

    def close(self) -> None:
        self._file.close()


def write_hashed(path: Path, data: bytes) -> FileSum:
    """Writes a new file and synchronises it to the disk.

    Raises:
        OSError: it exists, or cannot be written.
    """
    file = HashedFile(path)
    try:
        file.write(data)
        return file.sync()
    finally:
        file.close()


def sync_folder(folder: Path) -> None:
    """Has the names in a folder on the disk before it returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
