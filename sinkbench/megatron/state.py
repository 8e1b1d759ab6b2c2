"""What a checkpoint holds, in megatron's distributed format: readable under any parallel layout."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from sinkbench.checksums import FileSum, HashedFile
from sinkbench.errors import CheckpointError
from sinkbench.failpoints import failpoint
from sinkbench.megatron.optimizer import give_moments, keep_settings, prepare_for_loading, separate_steps
from sinkbench.megatron.optimizer_state import assign, choose_owners, copy_to_host, gathered_by_owners
from sinkbench.megatron.training import Engine
from sinkbench.safe_load import METADATA, SafeReader, weights_only

# The default of megatron-core 0.16.1 cannot be loaded; this one gathers a parameter's moments whole.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
_FILES_PER_RANK = 2
_Shard: TypeAlias = tuple[str, list[tuple[WriteItem, Any]]]


def _safe_reader(folder: str | Path, cache_metadata: bool = False) -> SafeReader:
    return SafeReader(folder)


# megatron has no other place to say how the index is read.
megatron_torch._get_filesystem_reader = _safe_reader


class Snapshot:
    """This rank's share of weights, optimizer, schedule and random states, in host memory: a copy, so that
    training can go on while it is written. There is one of an engine at a time: the next has its memory.

    All ranks make one at the same time; nothing is written then. ``write`` and ``index`` are no collective
    calls, and may run in a thread.
    """

    def __init__(self, engine: Engine) -> None:
        give_moments(engine.optimizer)
        owners, group = choose_owners(engine.optimizer), engine.layout.groups.dp_cp
        self._copies = engine.copies
        self._copies.begin()
        state = _model_state(engine.networks)
        assign(state, owners, group)
        with gathered_by_owners(engine.optimizer, owners, self._copies):
            optimizer = engine.optimizer.sharded_state_dict(state, metadata=_OPTIMIZER_FORMAT)
        copy_to_host(state, self._copies)
        self._copies.end()
        state["optimizer"] = optimizer
        state["scheduler"] = engine.scheduler.state_dict()
        state["health"] = engine.health.state_dict()
        state["random"] = _random_state_object(engine)
        sharded, common = save_preprocess(state)
        self._common = _serialised(common) if engine.layout.is_main else b""
        self._shards, self._metadata = _plan(sharded)
        self._cancelled = threading.Event()

    def write(self, folder: Path) -> Written:
        """Writes this rank's files, each by a thread.

        Raises:
            OSError: a file cannot be written, or ``cancel`` was called.
        """
        self._copies.wait()
        written = Written()
        with ThreadPoolExecutor(_FILES_PER_RANK) as threads:
            for name, file, results in threads.map(lambda shard: self._write(folder, *shard), self._shards):
                written.files[name] = file
                written.results += results
        return written

    def cancel(self) -> None:
        """Has ``write`` in another thread end soon."""
        self._cancelled.set()

    def _write(
        self, folder: Path, name: str, items: list[tuple[WriteItem, Any]]
    ) -> tuple[str, FileSum, list[WriteResult]]:
        results = []
        file = HashedFile(folder / name)
        try:
            while items:
                if self._cancelled.is_set():
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                item, data = items.pop(0)
                start = file.tell()
                _write_item(file, data)
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
                failpoint("save.shard")
            failpoint("save.fsync")
            return name, file.sync(), results
        finally:
            file.close()

    def index(self, written: Sequence[Written]) -> dict[str, bytes]:
        """On the main rank: the files that say what is where, from what every rank wrote."""
        assert self._metadata is not None
        metadata = self._metadata
        metadata.storage_data = {r.index: r.storage_data for part in written for r in part.results}
        config = CheckpointingConfig("torch_dist")
        return {
            COMMON_STATE_FNAME: self._common,
            CONFIG_FNAME: json.dumps(asdict(config)).encode(),
            METADATA: pickle.dumps(metadata),
        }


@dataclass
class Written:
    """What a rank wrote of a checkpoint.

    Attributes:
        files: by name.
        results: where each tensor and object is.
    """

    files: dict[str, FileSum] = field(default_factory=dict)
    results: list[WriteResult] = field(default_factory=list)


class _Planner(filesystem_async.FileSystemWriterAsync):  # type: ignore[misc]
    """Megatron's writer, of which only the plan is used: what goes into which file."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # without making the folder, which may fail on one rank and not on the others


def _plan(sharded: dict[str, Any]) -> tuple[list[_Shard], Metadata | None]:
    """The files of this rank, and on the main rank the index of all. A collective call."""
    by_key, *_ = megatron_torch._replace_state_dict_keys_with_sharded_keys(sharded, True)
    planner = megatron_torch.MCoreSavePlanner(flatten_state_dict=False)
    writer = _Planner("", thread_count=_FILES_PER_RANK)
    # megatron would start a process on every rank to pass results of a save in the background.
    filesystem_async._results_queue = queue.SimpleQueue()
    (_, metadata, _), *_ = save_state_dict_async_plan(
        megatron_torch.mcore_to_pyt_state_dict(by_key), writer, planner=planner
    )
    if metadata is not None:
        del metadata.all_local_plans  # megatron's, to save the plan of the next save; most of its size
    buckets = writer.write_buckets or []
    return [(name, [*objects, *tensors]) for _, name, (objects, tensors) in buckets], metadata


def _write_item(file: HashedFile, data: Tensor | io.BytesIO) -> None:
    try:
        if isinstance(data, io.BytesIO):
            file.write(data.getbuffer())
        else:
            torch.save(data, cast(IO[bytes], file))
    except RuntimeError as error:
        if file.error is not None:  # torch says only that it could not write
            raise file.error from error
        raise


def _serialised(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load(engine: Engine, folder: Path, *, same_layout: bool) -> None:
    """Restores what a ``Snapshot`` wrote; all ranks call it. Its checksums are the caller's to verify.

    Args:
        same_layout: the checkpoint was written by the same parallel layout, so that each rank's random
            states can be restored too.

    Raises:
        CheckpointError: it cannot be read, or holds another model.
    """
    prepare_for_loading(engine.optimizer)
    state = _model_state(engine.networks)
    _check_shapes(state, folder)
    state["optimizer"] = engine.optimizer.sharded_state_dict(
        state, is_loading=True, metadata=_OPTIMIZER_FORMAT
    )
    if same_layout:
        state["random"] = _random_state_object(engine)
    loaded = _load(state, folder)
    _set_model_state(engine.networks, loaded)
    keep_settings(engine.optimizer, loaded["optimizer"])
    engine.optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(engine.optimizer)
    engine.scheduler.num_steps = 0
    engine.scheduler.load_state_dict(loaded["scheduler"])
    if "health" in loaded:  # not in format 1
        engine.health.load_state_dict(loaded["health"])
    if same_layout:
        _set_random_state(loaded["random"])


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        with weights_only():
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError, RuntimeError) as error:
        # Of torch's report for all ranks, what went wrong on the first.
        cause = next((e for e, _ in getattr(error, "failures", {}).values()), error)
        if isinstance(cause, CheckpointError):
            raise cause from error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise CheckpointError(
            str(folder), f"cannot be loaded ({reason})", "copy it again, or use the recipe in it"
        ) from error
    return loaded


def load_weights(networks: Sequence[Any], folder: Path, *, other_attention: bool = False) -> list[str]:
    """Restores the weights alone, into bare networks of any layout; all ranks call it.

    Args:
        other_attention: parameters that the attention declares may be absent; they keep their values.

    Returns:
        The names of those that are.

    Raises:
        CheckpointError: a weight is absent or of another shape.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    state = _model_state(networks)
    missing: set[str] = set()
    for part in state.values():
        for name, value in list(part.items()):
            if name.endswith("_extra_state"):
                del part[name]
                continue
            for tensor in _tensors(value):
                if tensor.key not in stored and other_attention and ".attention.core." in tensor.key:
                    missing.add(tensor.key)
                    part.pop(name, None)
                else:
                    _check_shape(tensor, stored, folder)
    loaded = _load(state, folder)
    for index, network in enumerate(networks):
        network.load_state_dict({**network.state_dict(), **loaded[_key(networks, index)]}, strict=True)
    return sorted(missing)


def _tensors(value: Any) -> list[ShardedTensor]:
    """A gated projection is stored by a factory that makes two."""
    return list(nested_values(value.build())) if isinstance(value, ShardedTensorFactory) else [value]


def _check_shapes(state: dict[str, Any], folder: Path) -> None:
    """megatron itself lets the vocabulary's size be another, and fills up what is missing."""
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    for part in state.values():
        for name, value in part.items():
            if not name.endswith("_extra_state"):
                for tensor in _tensors(value):
                    _check_shape(tensor, stored, folder)


def _check_shape(tensor: ShardedTensor, stored: dict[str, ShardedTensor], folder: Path) -> None:
    found = stored.get(tensor.key)
    if found is None or found.global_shape != tensor.global_shape:
        what = "is absent" if found is None else f"has shape {list(found.global_shape)}"
        problem = f"{tensor.key} {what}, where the recipe's model has {list(tensor.global_shape)}"
        raise CheckpointError(str(folder), problem, "use the recipe in that folder, or change model")


def _model_state(networks: Sequence[Any]) -> dict[str, Any]:
    return {_key(networks, index): network.sharded_state_dict() for index, network in enumerate(networks)}


def _set_model_state(networks: Sequence[Any], loaded: dict[str, Any]) -> None:
    for index, network in enumerate(networks):
        network.load_state_dict(loaded[_key(networks, index)], strict=True)


def _key(networks: Sequence[Any], index: int) -> str:
    return "model" if len(networks) == 1 else f"model{index}"


def _random_state_object(engine: Engine) -> ShardedObject:
    groups = engine.layout.groups
    shape = (groups.pp.size(), groups.tp.size(), groups.dp_cp.size())
    offset = (groups.pp.rank(), groups.tp.rank(), groups.dp_cp.rank())
    state = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random", state, shape, offset, replica_id=0)


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["device"].numel() != torch.cuda.get_rng_state().numel():
        return  # a card's, and this is a CPU, or the other way: their random numbers are others
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def layout_of(engine: Engine) -> dict[str, int]:
    """The sizes that must agree for random states to be restored rank by rank."""
    parallel = engine.config.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "data": engine.layout.data_size,
    }
