"""The index of a checkpoint is read, and nothing else is done for it."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from sinkbench.errors import CheckpointError
from sinkbench.safe_load import read_index, weights_only

PATH = Path("step_5/.metadata")


def an_index() -> Metadata:
    """With all that megatron-core 0.16.1 puts there."""
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([3]))
    properties = TensorProperties(dtype=torch.bfloat16)
    tensor = TensorStorageMetadata(properties=properties, size=torch.Size([3]), chunks=[chunk])
    index = MetadataIndex("weight", [0], 0)
    write = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size([3]))
    metadata: Any = Metadata(
        state_dict_metadata={"weight": tensor, "random/shard_0_1": BytesStorageMetadata()},
        planner_data={},
        storage_data={index: _StorageInfo("__0_0.distcp", 0, 100)},
        storage_meta=StorageMeta(checkpoint_id=Path("runs/a/.step_5.writing"), save_id="1"),
        version="1.0.0",
    )
    item = WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=write)
    metadata.all_local_plans = [SavePlan([item], storage_data=_StoragePrefix("__0_"))]
    index_of_all: Metadata = metadata
    return index_of_all


def read(value: Any) -> Metadata:
    return read_index(io.BytesIO(value if isinstance(value, bytes) else pickle.dumps(value)), PATH)


def test_an_index_is_read() -> None:
    assert read(an_index()) == an_index()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn]
)
def test_dtypes(dtype: torch.dtype) -> None:
    metadata = an_index()
    entry = metadata.state_dict_metadata["weight"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.properties.dtype = dtype
    assert read(metadata) == metadata


class Foreign:
    """Of a module that nobody has declared safe."""


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
        (type, "builtins.type"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("within", [True, False])
def test_nothing_is_called(function: Any, name: str, within: bool) -> None:
    value: Any = Calls(function, "1")
    if within:
        metadata = an_index()
        metadata.planner_data = value
        value = metadata
    with pytest.raises(CheckpointError, match=f"it names {name}, which no index of tensors needs"):
        read(value)


def test_a_name_with_dots_reaches_nothing_within_a_class() -> None:
    """As protocol 4 writes it: an attribute of an attribute of what is known."""
    module, name = b"torch.distributed.checkpoint.metadata", b"Metadata.__init__.__globals__"
    code = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93."
    with pytest.raises(CheckpointError, match=r"it names torch\S+Metadata.__init__.__globals__"):
        read(code)


@pytest.mark.parametrize("name", ["../other/file", "/etc/passwd", "a/b", "..", "", b"bytes"])
def test_no_file_elsewhere_is_named(name: Any) -> None:
    metadata = an_index()
    metadata.storage_data[MetadataIndex("weight", [0], 0)].relative_path = name
    with pytest.raises(CheckpointError, match="it points out of the folder"):
        read(metadata)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(an_index())[:-9]]
)
def test_what_is_no_index(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^step_5/\.metadata: cannot be read as an index of tensors"):
        read(content)


def test_torch_load_admits_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller asks for more; and as before afterwards."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(variable, raising=False)
    stream = io.BytesIO()
    torch.save({"a": Foreign()}, stream)
    with weights_only():
        stream.seek(0)
        with pytest.raises(pickle.UnpicklingError, match="Foreign"):
            torch.load(stream, weights_only=False)
    assert variable not in os.environ
    stream.seek(0)
    assert isinstance(torch.load(stream, weights_only=False)["a"], Foreign)
    monkeypatch.setenv(variable, "0")
    with weights_only():
        assert os.environ[variable] == "1"
    assert os.environ[variable] == "0"
