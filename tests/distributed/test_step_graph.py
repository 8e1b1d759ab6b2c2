"""Steps that replay what was recorded of a micro-batch are those that run it. What a recorder keeps here is
the function itself, on a card the kernels that it launched."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sinkbench.errors import RecipeError
from sinkbench.testing import RunDistributed
from tests.distributed.runs import LAYOUTS, SWIGLU, prepare
from tests.distributed.test_fusions import TINY, trained
from tests.distributed.test_saving import ENGINE, an_engine, batch_of, step

STEPS = 6


class Kept:
    """A recorder whose recordings call the function."""

    def __init__(self) -> None:
        self.replayed = 0

    def __call__(self, function: Callable[[], None]) -> Kept._Recording:
        return self._Recording(self, function)

    class _Recording:
        def __init__(self, recorder: Kept, function: Callable[[], None]) -> None:
            self.recorder, self.function = recorder, function

        def replay(self) -> None:
            self.recorder.replayed += 1
            self.function()


def replaying(recorder: Callable[..., Any], *, must: bool = True) -> Callable[[Any], None]:
    def hook(engine: Any) -> None:
        from sinkbench.megatron.step_graph import StepGraphs

        engine.graphs = StepGraphs(engine._pass, must=must, record=recorder)

    return hook


def rank_compares(rank: int, world_size: int, overrides: tuple[str, ...]) -> None:
    from sinkbench.megatron.step_graph import WARM_UP

    overrides = (*TINY, *overrides)
    recorder = Kept()
    plain = trained(overrides, steps=STEPS)
    replayed = trained(overrides, steps=STEPS, hook=replaying(recorder))
    data_parallel = world_size if not any("parallel" in o for o in overrides) else 1
    assert recorder.replayed == (STEPS - WARM_UP) * 4 // data_parallel
    assert plain[0][0] != plain[0][-1]
    assert replayed[:2] == plain[:2]
    assert all(torch.equal(mine, its) for mine, its in zip(replayed[2], plain[2], strict=True))


@pytest.mark.parametrize("layout", ["", "data", *(pytest.param(name, marks=pytest.mark.full) for name in (
    "sequence", "context"
))])  # fmt: skip
def test_replayed_steps_are_the_same(run_distributed: RunDistributed, layout: str) -> None:
    processes, overrides = LAYOUTS[layout] if layout else (1, ())
    run_distributed(processes, rank_compares, tuple(overrides), timeout=280)


def fails(function: Callable[[], None]) -> Any:
    function()  # some of the pass has run when the error comes
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


def rank_goes_on(rank: int, world_size: int) -> None:
    plain = trained(TINY, steps=5)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment,method-assign]
    log = logging.getLogger("sinkbench.megatron.step_graph")
    log.addHandler(handler)
    try:
        given_up = trained(TINY, steps=5, hook=replaying(fails, must=False))
    finally:
        log.removeHandler(handler)
    assert given_up[:2] == plain[:2]
    reason = "operation not permitted when stream is capturing"
    logged = f"train.cuda_graph: steps go on without, as the capture failed: {reason}"
    assert [record.getMessage() for record in records] == [logged]
    with pytest.raises(RecipeError, match=f"^train.cuda_graph: capture failed: {reason}; set it to auto"):
        trained(TINY, steps=5, hook=replaying(fails, must=True))


def test_a_failed_capture(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_goes_on, timeout=280)


def rank_fails_backwards(rank: int, world_size: int) -> None:
    """With a bucket's gradients under way, and another's not yet there."""
    from functools import partial

    from megatron.core.distributed import DistributedDataParallelConfig

    from sinkbench.megatron import training

    capturing = False

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            if capturing:
                raise RuntimeError("operation not permitted when stream is capturing")
            return grad

    def record(function: Callable[[], None]) -> Any:
        nonlocal capturing
        capturing = True
        try:
            function()
        finally:
            capturing = False

    def losses(graphs: bool) -> list[float]:
        with an_engine(ENGINE) as engine:
            assert len(engine.stages[0].bucket_groups) > 1
            if graphs:
                replaying(record, must=False)(engine)
            first = engine.networks[0].decoder.layers[0]
            waits: Callable[..., torch.Tensor] = Waits.apply
            first.register_forward_hook(lambda module, given, output: (waits(output[0]), *output[1:]))
            return [engine.train_step([batch_of(engine, number)]).loss for number in range(5)]

    small = partial(DistributedDataParallelConfig, bucket_size=2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "DistributedDataParallelConfig", small)
        assert losses(graphs=True) == losses(graphs=False)


def test_a_capture_that_fails_in_the_backward_pass(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_fails_backwards, timeout=280)


def nothing() -> None:
    """There is nothing to bring back."""


def rank_keeps_masks(rank: int, world_size: int) -> None:
    """Of documents: what makes a graph's mask is in that graph."""
    from sinkbench.attention import flex
    from sinkbench.megatron.step_graph import WARM_UP, StepGraphs

    masks = []

    def one(batch: Any, tokens: torch.Tensor, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(2):  # layers
            masks.append(flex.document_mask(batch["document_start"], None))
        return torch.zeros(2, dtype=torch.float64), tokens + 1

    def record(function: Callable[[], None]) -> Any:
        function()
        return function

    graphs = StepGraphs(one, must=True, record=record)
    batch = {"tokens": torch.zeros(1, 256), "document_start": torch.zeros(1, 256, dtype=torch.int)}
    assert [graphs.ready([batch, batch], nothing) for _ in range(WARM_UP + 1)][-1]
    first, again, other, other_again = masks
    assert first is again
    assert other is other_again
    assert first is not other


def test_each_graph_makes_its_own_masks(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_keeps_masks)


def rank_probes_later(rank: int, world_size: int) -> None:
    """More tokens than a micro-batch has lead megatron to larger buffers; replays have the smaller ones."""
    from weakref import ref

    from megatron.core import parallel_state

    overrides = [*ENGINE, "parallel={tensor: 2, sequence: true}"]
    with an_engine(overrides) as engine:
        replaying(Kept())(engine)
        for number in range(5):
            step(engine, number)
        buffers = parallel_state.get_global_memory_buffer().buffer
        recorded = [ref(tensor) for tensor in buffers.values()]
        assert recorded
        before = {name: tensor.numel() for name, tensor in buffers.items()}
        engine.forward([{"tokens": torch.randint(0, 65, (50, 64))}])
        assert any(tensor.numel() > before[name] for name, tensor in buffers.items())
        assert all(tensor() is not None for tensor in recorded)


def test_buffers_of_replays_stay(run_distributed: RunDistributed) -> None:
    run_distributed(2, rank_probes_later)


def rank_has_other_shapes(rank: int, world_size: int) -> None:
    from sinkbench.megatron.step_graph import WARM_UP, StepGraphs

    def one(batch: Any, tokens: torch.Tensor, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        count = torch.tensor(batch["tokens"].numel(), dtype=torch.int)
        return torch.stack([batch["tokens"].double().sum(), count.double()]), tokens + count

    graphs = StepGraphs(one, must=True, record=Kept())
    small, large = {"tokens": torch.ones(2, 3)}, {"tokens": torch.ones(2, 5)}
    assert [graphs.ready([small], nothing) for _ in range(WARM_UP + 1)] == [False] * WARM_UP + [True]
    assert not graphs.ready([small, large], nothing)
    assert not graphs.ready([small | {"document_start": torch.zeros(2, 3)}], nothing)
    two = {"tokens": torch.full((2, 3), 2.0)}
    assert graphs.ready([small, two, two], nothing)
    for _ in range(2):
        report, tokens = graphs.run([small, two, two])
        assert report.tolist() == [30.0, 18.0]
        assert tokens == 18


def test_other_shapes_are_not_replayed(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_has_other_shapes)


def rank_is_refused(rank: int, world_size: int, overrides: tuple[str, ...], text: str) -> None:
    from sinkbench.megatron import parallel, step_graph

    config, _ = prepare((*SWIGLU, *overrides))
    layout = parallel.start(config)
    assert not step_graph.wanted(config, layout)
    insistent = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": True})})
    with pytest.raises(RecipeError, match=text):
        step_graph.wanted(insistent, layout)


def test_a_processor_has_none(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_is_refused, (), "train.cuda_graph: is for CUDA cards; set it to auto or false")


def rank_chooses(rank: int, world_size: int) -> list[bool]:
    from sinkbench.megatron.step_graph import replays

    cases = [
        ((), "cuda", 1),
        ((), "cpu", 1),
        ((), "cuda", 2),
        (("parallel.tensor=2",), "cuda", 2),
        (("parallel={tensor: 2, sequence: true}",), "cuda", 2),
        (("parallel.tensor=2",), "cuda", 4),
        (("parallel={tensor: 2, pipeline: 2}", "model.num_layers=2"), "cuda", 4),
        (("parallel.tensor=2", "train.recompute=full"), "cuda", 2),
        (("parallel.tensor=2", "train.cuda_graph=false"), "cuda", 2),
        (("train.cuda_graph=true",), "cuda", 2),
        (("parallel={tensor: 2, sequence: true}", "model.megatron={hidden_dropout: 0.1}"), "cuda", 2),
        (("parallel={tensor: 2}", "model.megatron={hidden_dropout: 0.1}"), "cuda", 2),
    ]
    return [replays(prepare((*SWIGLU, *overrides))[0], device, size) for overrides, device, size in cases]


def test_one_replica_on_its_cards_is_replayed(run_distributed: RunDistributed) -> None:
    (found,) = run_distributed(1, rank_chooses)
    assert found == [True, False, False, True, True, False, False, False, False, True, False, True]


def rank_leaves(rank: int, world_size: int) -> None:
    from sinkbench.megatron import parallel, step_graph

    class Graph:
        alive = True

        def reset(self) -> None:
            assert torch.distributed.is_initialized()
            self.alive = False

    graph = Graph()
    step_graph._captured.add(graph)  # type: ignore[arg-type]
    with parallel.running(prepare(TINY)[0]):
        assert graph.alive
    assert not graph.alive


def test_graphs_end_before_the_process_group(run_distributed: RunDistributed) -> None:
    """NCCL would wait for them."""
    run_distributed(1, rank_leaves)
