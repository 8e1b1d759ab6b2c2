"""What a checkpoint holds of the optimizer: each parameter's fp32 copy and moments, whole, in host memory.

megatron-core 0.16.1 gathers them on every data-parallel rank, by way of several copies in host memory, and
has the first rank write them. Here each parameter has an owner among the data-parallel ranks, which alone
receives, copies and writes it. The files are the same: what reads one reads the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sinkbench.megatron.host_copies import HostCopies
from sinkbench.megatron.optimizer import distributed_optimizers

_STATES = ("param", "exp_avg", "exp_avg_sq")

Owners = Mapping[Tensor, int]
"""Parameter -> data-parallel rank that writes it."""


def choose_owners(optimizer: Any) -> dict[Tensor, int]:
    """Owners that have about as much to write as one another; the same on every data-parallel rank."""
    owners: dict[Tensor, int] = {}
    for part in distributed_optimizers(optimizer):
        load = [0] * part.data_parallel_group.size()
        for buffer in part.buffers:
            for parameter in buffer.param_index_map:
                owner = load.index(min(load))
                owners[parameter] = owner
                load[owner] += parameter.numel()
    return owners


def assign(state: Any, owners: Owners, group: dist.ProcessGroup) -> None:
    """Makes the owner of each parameter in a sharded state the one that writes it."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            *others, rank = entry.replica_id
            entry.replica_id = (*others, (rank - owners.get(entry.data, 0)) % group.size())


def copy_to_host(state: Any, copies: HostCopies, *, lasting: bool = True) -> Any:
    """Replaces what this rank writes of a sharded state by copies in host memory.

    Args:
        lasting: see ``HostCopies.copy``.
    """
    apply_factories(state)
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id):
            entry.data = copies.copy(entry.data, lasting=lasting)
    return state


@contextmanager
def gathered_by_owners(optimizer: Any, owners: Owners, copies: HostCopies) -> Iterator[None]:
    """Within, ``optimizer.sharded_state_dict`` gathers as described above."""
    parts = distributed_optimizers(optimizer)
    for part in parts:
        part.sharded_param_state_fully_reshardable = partial(_gather, part, owners, copies)
    try:
        yield
    finally:
        for part in parts:
            del part.sharded_param_state_fully_reshardable


def _gather(
    part: DistributedOptimizer,
    owners: Owners,
    copies: HostCopies,
    model_state: Any,
    is_loading: bool = False,
    metadata: Any = None,
) -> dict[int, dict[str, Any]]:
    """In the place of DistributedOptimizer.sharded_param_state_fully_reshardable, for saving. Parameters are
    numbered in the order of their buffers, as loading numbers them."""
    assert not is_loading
    described = {
        entry.data: entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    ranges = _local_ranges(part)
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    return {
        number: _states(
            part, parameter, described[parameter], owners[parameter], ranges.get(parameter), copies
        )
        for number, parameter in enumerate(parameters)
    }


def _local_ranges(part: DistributedOptimizer) -> dict[Tensor, tuple[int, int]]:
    """Which elements of each parameter this rank's optimizer holds."""
    return {
        parameter: (ranges["param"].start, ranges["param"].end)
        for buffer in part.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for parameter, ranges in bucket["param_map"].items()
    }


def _states(
    part: DistributedOptimizer,
    parameter: Tensor,
    described: ShardedTensor | ShardedTensorFactory,
    owner: int,
    local: tuple[int, int] | None,
    copies: HostCopies,
) -> dict[str, Any]:
    held = part._get_main_param_and_optimizer_states(parameter) if local is not None else {}
    # Where the first data-parallel replica is not the main one, another tensor-parallel rank or pipeline
    # stage writes the parameter.
    written = not any(described.replica_id[:-1])
    states = {}
    for name in _STATES:
        whole = None
        if written:
            whole = _whole(parameter, held.get(name), local, owner, part.data_parallel_group)
        if whole is None:
            whole = torch.empty(parameter.shape, dtype=torch.float32, device="meta")
        changes: dict[str, Any] = {"key": f"optimizer.state.{name}.{described.key}", "data": whole}
        if isinstance(described, ShardedTensor):
            changes["dtype"] = whole.dtype
        states[name] = replace(described, **changes)
    gathered = part.data_parallel_group.size() > 1
    copied: dict[str, Any] = copy_to_host(states, copies, lasting=not gathered)
    return copied


def _whole(
    parameter: Tensor,
    held: Tensor | None,
    local: Sequence[int] | None,
    owner: int,
    group: dist.ProcessGroup,
) -> Tensor | None:
    """A state of one parameter, put together on its owner; None elsewhere."""
    if group.size() == 1:
        assert held is not None
        assert held.dtype == torch.float32
        return held.detach().view(parameter.shape)
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if held is not None and local is not None:
        whole[slice(*local)].copy_(held.detach())
    # As integers, since -0.0 + 0.0 would be 0.0.
    dist.reduce(whole.view(torch.int32), dist.get_global_rank(group, owner), group=group)
    return whole.view(parameter.shape) if group.rank() == owner else None
