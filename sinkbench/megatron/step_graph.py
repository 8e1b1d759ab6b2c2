"""The forward and backward pass of a micro-batch as CUDA graphs, which a step replays: the card does the same
work, and Python launches none of its kernels.

Two graphs share their memory: one adds a micro-batch to the gradients, the other is a step's last, which also
finishes them. So a step has any number of micro-batches. What is captured reads batches, parameters and
gradients where they lay then. Python's side of a model, a plugin's too, runs at the capture alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from sinkbench.api import Batch
from sinkbench.config import Config
from sinkbench.errors import RecipeError
from sinkbench.megatron import graph_fills
from sinkbench.megatron.parallel import Layout, before_leaving

_log = logging.getLogger(__name__)

WARM_UP = 3
"""Steps before the capture, in which kernels are compiled and block sizes tuned."""
WHERE = "train.cuda_graph"
Pass = Callable[[Batch, Tensor, bool], tuple[Tensor, Tensor]]
"""Adds the gradients of a micro-batch, and if it is the step's last finishes them. Takes the micro-batch, the
number of tokens before it, and whether it is the last; gives its report, float64 [2], and the number with its
own, or at last what the gradients are still to be divided by."""


class Recorded(Protocol):
    """What a recorder makes of a function: the same work again, on the same memory."""

    def replay(self) -> None: ...


Recorder = Callable[[Callable[[], None]], Recorded]


def replays(config: Config, device: str, world_size: int) -> bool:
    """Whether a run replays its steps: where its recipe says so, otherwise on one card, or on cards that are
    one tensor-parallel group.

    Args:
        device: "cpu" or "cuda".
    """
    asked = config.train.cuda_graph
    of_one_replica = world_size == config.parallel.tensor
    return not _lacks(config, device) and (of_one_replica if asked == "auto" else asked)


def wanted(config: Config, layout: Layout) -> bool:
    """As ``replays``, of this run.

    Raises:
        RecipeError: the recipe says that it does, and it cannot.
    """
    lacks = _lacks(config, layout.device.type)
    if config.train.cuda_graph is True and lacks:
        raise RecipeError(WHERE, lacks[0], "set it to auto or false")
    return replays(config, layout.device.type, layout.world_size)


def _lacks(config: Config, device: str) -> list[str]:
    parallel = config.parallel
    lacks = {
        "is for CUDA cards": device != "cuda",
        "does not go with train.recompute, which keeps a random state on the host": (
            config.train.recompute != "none"
        ),
        "does not go with pipeline parallelism, whose ranks wait for each other": parallel.pipeline > 1,
        "does not go with dropout under sequence parallelism, which has a random state on each rank": (
            parallel.sequence and bool(config.model.megatron.get("hidden_dropout"))
        ),
    }
    return [what for what, lacking in lacks.items() if lacking]


@dataclass(frozen=True)
class _Memory:
    """What graphs read and write from outside.

    Attributes:
        batch: a micro-batch.
        report: the sum of the step's reports, float64 [2].
        tokens: of the step so far, int; at its end what the gradients are to be divided by.
    """

    batch: Batch
    report: Tensor
    tokens: Tensor


_captured: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


def _forget() -> None:
    """NCCL leaves no group while there are graphs that hold its kernels: it would wait for ever."""
    for graph in _captured:
        graph.reset()


before_leaving(_forget)


class StepGraphs:
    """The graphs of a run's steps.

    Args:
        one: the pass that they record.
        must: an error is one of the run's; otherwise steps go on without graphs, with a line in the log.
        record: of the card; tests have another.
    """

    def __init__(self, one: Pass, *, must: bool, record: Recorder) -> None:
        self._one = one
        self._must = must
        self._record = record
        self._steps = 0
        self._memory: _Memory | None = None
        self._graphs: dict[bool, Recorded] = {}
        """By whether they are for a step's last micro-batch."""
        self.given_up = False

    def ready(self, micro_batches: Sequence[Batch], reset: Callable[[], None]) -> bool:
        """Whether this step is one to replay: it comes after the first few and has their shapes.

        Args:
            reset: brings gradients and their book-keeping back to a step's beginning.

        Raises:
            RecipeError: the pass could not be captured, and ``must`` be.
        """
        self._steps += 1
        if self.given_up or self._steps <= WARM_UP:
            return False
        memory = self._memory = self._memory or _memory_for(micro_batches[0])
        if any(_form(batch) != _form(memory.batch) for batch in micro_batches):
            return False
        needed = {True, len(micro_batches) == 1} - set(self._graphs)
        self.given_up = not all(self._captured(memory, last, reset) for last in needed)
        return not self.given_up

    def run(self, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """The sum of the reports, and what the gradients are to be divided by; both stay until the next."""
        assert self._memory is not None
        self._memory.report.zero_()
        self._memory.tokens.zero_()
        for left, batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            for name, tensor in batch.items():
                self._memory.batch[name].copy_(tensor)
            self._graphs[left == 0].replay()
        return self._memory.report, self._memory.tokens

    def _captured(self, memory: _Memory, last: bool, reset: Callable[[], None]) -> bool:
        def add() -> None:
            # As tensors of this graph alone: what an attention keeps by a batch's tensor, as a mask of its
            # documents, is then made by each graph for its own micro-batch.
            batch = {name: tensor.detach() for name, tensor in memory.batch.items()}
            report, tokens = self._one(batch, memory.tokens, last)
            memory.report.add_(report)
            memory.tokens.copy_(tokens)

        try:
            self._graphs[last] = self._record(add)
        except Exception as error:  # a model that waits for the card, out of memory, ...
            reason = " ".join(str(error).split())[:300]
            if self._must:
                raise RecipeError(WHERE, f"capture failed: {reason}", "set it to auto or false") from error
            _log.warning("%s: steps go on without, as the capture failed: %s", WHERE, reason)
            self._graphs.clear()
        reset()
        return last in self._graphs


class CudaRecorder:
    """Captures functions into CUDA graphs that share their memory, as they never run at once.

    Args:
        alone: there is no communication in them. Only then do their fills become kernels, as graphs with
            NCCL's have not been tried so.
    """

    def __init__(self, *, alone: bool) -> None:
        self._pool: Any = None
        self._driver = graph_fills.driver() if alone else None
        self._stream = torch.cuda.Stream()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks of gradients that are made within run on the stream of the captures: what autograd runs on
        the default stream cannot be captured, and on a third one it would be a branch of the graph at every
        parameter. Without branches a graph is one line of kernels, which drivers launch fastest."""
        usual = torch.cuda.current_stream()
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            yield
        usual.wait_stream(self._stream)

    def __call__(self, function: Callable[[], None]) -> Recorded:
        graph = torch.cuda.CUDAGraph(keep_graph=True) if self._driver is not None else torch.cuda.CUDAGraph()
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        before = random.clone_state()
        try:
            # Other threads copy batches and checkpoints meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                function()
        except Exception:
            random.graphsafe_set_state(before)  # its own would wait for this capture's end for ever
            raise
        self._pool = graph.pool()
        if self._driver is not None:
            graph_fills.as_kernels(self._driver, graph.raw_cuda_graph())
            graph.instantiate()
        _captured.add(graph)
        return graph


def _memory_for(batch: Batch) -> _Memory:
    device = batch["tokens"].device
    return _Memory(
        batch={name: tensor.clone() for name, tensor in batch.items()},
        report=torch.zeros(2, dtype=torch.float64, device=device),
        tokens=torch.zeros((), dtype=torch.int, device=device),
    )


def _form(batch: Batch) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()}
