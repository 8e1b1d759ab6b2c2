"""Process groups, megatron's parallel state and seeds: from the launcher's environment to a layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sinkbench.config import Config, ParallelConfig
from sinkbench.errors import HostError
from sinkbench.megatron import host

TIMEOUT = timedelta(minutes=10)
"""After this a rank that waits for one it has a connection to, but that does not answer, gives up. The end of
a process is noticed at once: by gloo from the connection, and by torchrun, which then ends the others."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where this process stands. Context-parallel ranks share sequences; data-parallel ranks do not."""

    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    data_size: int
    tensor_rank: int
    pipeline_rank: int
    groups: Any
    """megatron's ProcessGroupCollection."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_world_size(parallel: ParallelConfig, processes: int) -> None:
    """Raises HostError if the model-parallel sizes do not divide the number of processes."""
    if processes % parallel.model_size:
        raise HostError(
            "parallel",
            f"{processes} processes are not divisible by tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} x context {parallel.context} = {parallel.model_size}",
            f"start a multiple of {parallel.model_size} processes (torchrun --nproc-per-node), or "
            "change parallel",
        )


def start(config: Config) -> Layout:
    """Joins the process group and lays out megatron's parallel groups over it.

    Uses torchrun's environment; without one, a single process. Repeated calls with another layout
    rebuild the groups, so that one process can train, convert and measure in turn.
    """
    parallel = config.parallel
    check_world_size(parallel, world_size())
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise HostError("train.device", "cuda is not available here", "write auto or cpu")
    device = host.prepare(config.train.device)
    if not dist.is_initialized():
        _init_process_group(device)
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )
    _seed(config.seed, parallel_state, tensor_parallel)
    if config.train.deterministic:
        _be_deterministic(device)
    return Layout(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def _init_process_group(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=TIMEOUT, **_after_a_restart())
        except (dist.DistError, ValueError) as error:
            where = (
                f"MASTER_ADDR {os.environ.get('MASTER_ADDR')}, MASTER_PORT {os.environ.get('MASTER_PORT')}"
            )
            problem = f"the processes do not find one another ({(str(error).splitlines() or [''])[0][:200]})"
            raise HostError(where, problem, "start with torchrun, or correct these") from error
        return
    alone = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=TIMEOUT)


def _after_a_restart() -> dict[str, Any]:
    """Where the ranks find one another: in a part of torchrun's store of their own, since it still has the
    addresses of the ranks before a restart."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
    part = dist.PrefixStore(f"restart_{restarts}", store)  # type: ignore[attr-defined]
    return {"store": part, "rank": rank, "world_size": world_size}


def _seed(seed: int, parallel_state: Any, tensor_parallel: Any) -> None:
    """Dropout outside tensor-parallel regions is the same on all tensor-parallel ranks, differs
    between pipeline stages and data-parallel replicas."""
    seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    seed += 10000 * parallel_state.get_data_parallel_rank(with_context_parallel=True)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _be_deterministic(device: torch.device) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False


def shutdown(*, keep_process_group: bool = False) -> None:
    """Takes megatron's groups down and leaves the process group; ``start`` can be called again.

    Args:
        keep_process_group: the caller made it, and goes on using it.
    """
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if not keep_process_group:
        dist.destroy_process_group()


@contextmanager
def running(config: Config) -> Iterator[Layout]:
    """A layout for the duration of a block. A process group that was there before is there afterwards."""
    given = dist.is_initialized()
    layout = start(config)
    try:
        yield layout
    except BaseException:
        if layout.device.type == "cuda" and layout.world_size > 1 and not given:
            # Leaving in order would wait for what other ranks, or this one's own kernels, will not finish.
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        shutdown(keep_process_group=given)


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: that rank has the error to look at."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)
