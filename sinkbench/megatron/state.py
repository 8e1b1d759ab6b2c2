"""What a checkpoint holds, in megatron's distributed format: readable under any parallel layout."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async

from sinkbench.errors import CheckpointError
from sinkbench.megatron.optimizer import prepare_for_loading, separate_steps
from sinkbench.megatron.training import Engine

# The default of megatron-core 0.16.1 cannot be loaded; this one gathers a parameter's moments whole.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(engine: Engine, folder: Path) -> None:
    """Writes weights, optimizer, schedule and random states; all ranks call it. The folder exists and
    is empty."""
    state = _model_state(engine.networks)
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, metadata=_OPTIMIZER_FORMAT)
    state["scheduler"] = engine.scheduler.state_dict()
    state["random"] = _random_state_object(engine)
    # megatron would start a process on every rank, which imports torch, to pass results from a save in
    # the background; this save is not.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(state, str(folder))


def load(engine: Engine, folder: Path, *, same_layout: bool) -> None:
    """Restores what ``save`` wrote; all ranks call it.

    Args:
        same_layout: the checkpoint was written by the same parallel layout, so that each rank's random
            states can be restored too.
    """
    prepare_for_loading(engine.optimizer)
    state = _model_state(engine.networks)
    state["optimizer"] = engine.optimizer.sharded_state_dict(
        state, is_loading=True, metadata=_OPTIMIZER_FORMAT
    )
    if same_layout:
        state["random"] = _random_state_object(engine)
    loaded = dist_checkpointing.load(state, str(folder))
    _set_model_state(engine.networks, loaded)
    engine.optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(engine.optimizer)
    engine.scheduler.num_steps = 0
    engine.scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        _set_random_state(loaded["random"])


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
    loaded = dist_checkpointing.load(state, str(folder))
    for index, network in enumerate(networks):
        network.load_state_dict({**network.state_dict(), **loaded[_key(networks, index)]}, strict=True)
    return sorted(missing)


def _tensors(value: Any) -> list[ShardedTensor]:
    """A gated projection is stored by a factory that makes two."""
    return list(nested_values(value.build())) if isinstance(value, ShardedTensorFactory) else [value]


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
