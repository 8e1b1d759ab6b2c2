"""Writes a checkpoint's weights without a model or a process group. Of the layers' tensors one layer is in
memory at a time; torch keeps the others, the vocabulary's tables, until its file is closed.

Any parallel layout reads it: a tensor of the layers is stored layer by layer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

_MEGATRON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""How megatron reads the folder."""


@dataclass(frozen=True)
class Weight:
    """A tensor to write.

    Attributes:
        shape: of one layer, for a tensor of the layers.
        layers: how many; None for a tensor that is not of the layers.
        read: number of the layer or None -> the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layers: int | None
    read: Callable[[int | None], Tensor]


def write_weights(folder: Path, weights: Sequence[Weight]) -> None:
    """Writes the files that ``sinkbench.megatron.state.load_weights`` reads into an empty folder."""
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_MEGATRON), encoding="utf-8")
    writer = FileSystemWriter(folder, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save({}, storage_writer=writer, planner=_Planner(weights), no_dist=True)


class _Planner(DefaultSavePlanner):
    """Plans from shapes alone, and reads each tensor when it is written."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(flatten_state_dict=False)
        self.weights = {weight.name: weight for weight in weights}

    def create_local_plan(self) -> SavePlan:
        plan = SavePlan([item for weight in self.weights.values() for item in _items(weight)])
        self.plan = plan
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        weight = self.weights[write_item.index.fqn]
        assert write_item.index.offset is not None
        layer = write_item.index.offset[0] if weight.layers is not None else None
        tensor = weight.read(layer).to(weight.dtype)
        assert tuple(tensor.shape) == weight.shape, (weight.name, tensor.shape, weight.shape)
        return tensor.contiguous() if layer is None else tensor.contiguous()[None]


def _items(weight: Weight) -> list[WriteItem]:
    stacked = weight.layers is not None
    size = torch.Size([weight.layers, *weight.shape] if weight.layers is not None else weight.shape)
    shape = torch.Size([1, *weight.shape] if stacked else weight.shape)
    properties = TensorProperties(dtype=weight.dtype)
    items = []
    for number in range(weight.layers or 1):
        offset = torch.Size([number if stacked else 0, *[0] * (len(size) - 1)])
        chunk = ChunkStorageMetadata(offsets=offset, sizes=shape)
        items.append(
            WriteItem(
                index=MetadataIndex(weight.name, offset, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
            )
        )
    return items
