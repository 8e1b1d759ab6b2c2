"""Reads the files of a distributed checkpoint without running anything that is in them.

torch.distributed.checkpoint keeps its index, .metadata, as a pickle, and its objects in files that
torch.load unpickles. Here the index is read by an unpickler that knows the few classes an index consists
of and no function, and every torch.load admits tensors and plain values alone.
"""

from __future__ import annotations

import pickle
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from sinkbench.environment import set_within
from sinkbench.errors import CheckpointError

METADATA = ".metadata"
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_DCP = "torch.distributed.checkpoint"
_INDEX_CLASSES = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"}
    | {"uint8", "bool", "float8_e4m3fn", "float8_e5m2"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # Python 3.13
}
"""Module -> what an index may name there: records of data and tables of constants. None of them does
anything when it is made but hold its arguments."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")
        return super().find_class(module, name)


def read_index(stream: IO[bytes], path: Path) -> Metadata:
    """The index of a distributed checkpoint.

    Raises:
        CheckpointError: it names anything else than an index does, points out of its folder, or is damaged.
    """
    try:
        metadata = _IndexUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(metadata).__name__}")
        for entry in metadata.storage_data.values():
            name = entry.relative_path
            if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
                raise pickle.UnpicklingError(f"it points out of the folder, to {name}")
    except Exception as error:  # a damaged pickle may raise anything
        problem = f"cannot be read as an index of tensors ({error})"
        raise CheckpointError(
            str(path), problem, "copy the checkpoint again from where it was made"
        ) from error
    return metadata


class SafeReader(FileSystemReader):
    """torch's reader, with ``read_index`` in the place of pickle. The index is read once."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            CheckpointError: see ``read_index``.
        """
        if self._index is None:
            path = Path(self.path) / METADATA
            with path.open("rb") as stream:
                self._index = read_index(stream, path)
        return self._index


def weights_only() -> AbstractContextManager[None]:
    """Every torch.load within loads tensors and plain values alone, whatever its caller asked for: megatron
    and torch.distributed.checkpoint ask for more than they need. For the time of loading only, since the
    setting is the whole process's."""
    return set_within(_WEIGHTS_ONLY, "1")
