"""The tensors of a checkpoint, read one at a time by name: no process group, no model, no device.

A checkpoint holds the layers' tensors stacked along a first dimension, in chunks of whatever layout wrote
them; one layer is read without the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from sinkbench.errors import CheckpointError
from sinkbench.safe_load import SafeReader

LAYERS = "decoder.layers."
_NOT_WEIGHTS = ("optimizer.", "random/")


@dataclass(frozen=True)
class Stored:
    """Attributes:
    shape: with the layers first, for a tensor of the layers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredTensors:
    """The weights in a checkpoint's folder.

    Attributes:
        tensors: their shapes by name, the optimizer's left out.

    Raises:
        CheckpointError: the metadata cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: tuple[tuple[str, int | None], Tensor] | None = None
        self._reader = SafeReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.tensors = {
            name: Stored(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_WEIGHTS)
        }

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A tensor, or one layer of a tensor of the layers (without the first dimension). The last one is
        kept, since several parts of it are asked for in turn.

        Raises:
            CheckpointError: a file is damaged.
        """
        if self._last is None or self._last[0] != (name, layer):
            self._last = (name, layer), self._read(name, layer)
        return self._last[1]

    def _read(self, name: str, layer: int | None) -> Tensor:
        stored = self.tensors[name]
        offset, shape = [0] * len(stored.shape), list(stored.shape)
        if layer is not None:
            offset[0], shape[0] = layer, 1
        target = torch.empty(shape, dtype=stored.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        items = create_read_items_for_chunk_list(name, entry, [chunk])
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        except Exception as error:  # torch.load of a damaged file may raise anything
            problem = f"{name} cannot be read ({type(error).__name__}: {error})"
            raise CheckpointError(str(self.folder), problem, "copy the checkpoint again") from error
        return target if layer is None else target[0]


class _IntoTensor(LoadPlanner):
    """Puts what is read where it belongs in one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.type is LoadItemType.TENSOR
        part = self.target
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, size)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return None

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        raise AssertionError("no bytes were asked for")

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        return None

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the plan is made by hand")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan
