"""Process groups, megatron's parallel state and seeds: from the launcher's environment to a layout."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sinkbench.batching import data_parallel_size
from sinkbench.config import Config
from sinkbench.errors import EXIT_CODE, HostError
from sinkbench.megatron import host
from sinkbench.stopping import START_TIMEOUT, start_timeout_s

TIMEOUT = timedelta(minutes=10)
"""After this a rank that waits for one it has a connection to, but that does not answer, gives up. The end of
a process is noticed at once: by gloo from the connection, and by torchrun, which then ends the others."""

_GRACE_S = 5
"""For torch's own time-out to come first."""


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


def start(config: Config) -> Layout:
    """Joins the process group and lays out megatron's parallel groups over it.

    Uses torchrun's environment; without one, a single process. Repeated calls with another layout
    rebuild the groups, so that one process can train, convert and measure in turn.
    """
    parallel = config.parallel
    data_parallel_size(parallel, world_size())
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise HostError("train.device", "cuda is not available here", "write auto or cpu")
    if parallel.tensor > 1:
        # Read when CUDA starts. With more, a product launched after a collective takes the card before it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
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
    if "RANK" not in os.environ:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=TIMEOUT)
        return
    try:
        store, rank, size = _rendezvous(start_timeout_s())
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        store.set_timeout(TIMEOUT)
    except (dist.DistError, OSError, ValueError) as error:
        raise _not_found((str(error).splitlines() or [""])[0][:200]) from error


def _rendezvous(limit_s: int) -> tuple[Any, int, int]:
    """Where the ranks find one another, this one's number, and how many there are. After a restart it is
    another part of torchrun's store, which still has the addresses of the ranks before."""
    if os.environ["RANK"] != "0":
        _wait_for(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), limit_s)
    # torch waits without a limit for what answers no request.
    silent = threading.Timer(limit_s + _GRACE_S, _end, [_not_found("what listens there does not answer")])
    silent.daemon = True
    silent.start()
    try:
        limit = timedelta(seconds=limit_s)
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
    finally:
        silent.cancel()
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start_{restarts}", store), rank, size  # type: ignore[attr-defined]


def _wait_for(host_name: str, port: int, limit_s: int) -> None:
    """Returns once something listens there: torch's own attempts print a stack trace each.

    Raises:
        OSError: nothing does within the limit.
    """
    until = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection((host_name, port), timeout=limit_s).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _not_found(reason: str) -> HostError:
    where = f"MASTER_ADDR {os.environ.get('MASTER_ADDR')}, MASTER_PORT {os.environ.get('MASTER_PORT')}"
    problem = f"the processes do not find one another within {start_timeout_s()} s ({reason})"
    return HostError(where, problem, f"start with torchrun, correct these, or raise {START_TIMEOUT}")


def _end(error: HostError) -> None:
    print(error, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def _seed(seed: int, parallel_state: Any, tensor_parallel: Any) -> None:
    """Dropout outside tensor-parallel regions is the same on all tensor-parallel ranks, differs
    between pipeline stages and data-parallel replicas."""
    seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    seed += 10000 * parallel_state.get_data_parallel_rank(with_context_parallel=True)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    _let_captures_be(tensor_parallel.get_cuda_rng_tracker())


def _let_captures_be(tracker: Any) -> None:
    """Under sequence parallelism megatron's block runs its layers with the random state of this rank, which
    cannot be set while a CUDA graph is captured. What is captured has no dropout (``step_graph``)."""
    fork = tracker.fork

    def unless_capturing(*name: str) -> AbstractContextManager[None]:
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        forked: AbstractContextManager[None] = nullcontext() if capturing else fork(*name)
        return forked

    tracker.fork = unless_capturing


def _be_deterministic(device: torch.device) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False


_before_leaving: list[Callable[[], None]] = []


def before_leaving(do: Callable[[], None]) -> None:
    """Has something done whenever a process is about to leave its groups."""
    _before_leaving.append(do)


def shutdown(*, keep_process_group: bool = False) -> None:
    """Takes megatron's groups down and leaves the process group; ``start`` can be called again.

    Args:
        keep_process_group: the caller made it, and goes on using it.
    """
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    for do in _before_leaving:
        do()
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
