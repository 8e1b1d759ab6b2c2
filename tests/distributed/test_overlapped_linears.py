"""Linear maps whose communication runs beside their products, against the formula and megatron's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sinkbench.measure.run_forwards import LINEAR
from sinkbench.testing import RunDistributed
from tests.distributed.runs import LAYOUTS, SWIGLU, prepare
from tests.distributed.test_fusions import POST, TINY, trained

LENGTH, BATCH, INPUT, OUTPUT = 20, 3, 16, 24
"""Of all positions: the share of a rank has 15 tokens of four ranks' or 30 of two, which are cut unevenly."""
CASES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
FOUR = (4, ("parallel={tensor: 4, sequence: true}", "model.num_attention_heads=4"))
SEQUENCE: dict[str, tuple[int, tuple[str, ...]]] = {
    "two": LAYOUTS["sequence"],
    "four": FOUR,
    "pipeline": (4, ("parallel={tensor: 2, sequence: true, pipeline: 2}",)),
}


@dataclass(frozen=True)
class Found:
    """What a rank has of a map: its output, and gradients of the sum of squares over all ranks. That of a
    row-parallel map's bias is to be summed over ranks."""

    output: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor | None


def values(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input [s, b, n], weight [m, n] and bias [m] of the whole map."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(LENGTH, BATCH, INPUT), draw(OUTPUT, INPUT) / INPUT**0.5, draw(OUTPUT)


def expected(dtype: torch.dtype, biased: bool) -> Found:
    """Of the whole map, in float64."""
    x, weight, bias = (tensor.double().requires_grad_() for tensor in values(dtype))
    output = x @ weight.t() + (bias if biased else 0.0)
    output.square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return Found(output.detach(), x.grad, weight.grad, bias.grad)


@contextmanager
def small_pieces(count: int = 4) -> Iterator[None]:
    from sinkbench.megatron import overlapped_linears

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlapped_linears, "SMALLEST_PIECE", 1)
        patch.setattr(overlapped_linears, "SCATTERED_PIECES", count)
        yield


def a_map(kind: str, whose: Any, dtype: torch.dtype, biased: bool, **options: Any) -> tuple[Any, Tensor]:
    """A column- or row-parallel map with this rank's part of the weight, and its part of the input."""
    from megatron.core.model_parallel_config import ModelParallelConfig

    size, rank = dist.get_world_size(), dist.get_rank()
    x, weight, bias = values(dtype)
    split = 0 if kind == "column" else 1
    if kind == "column":
        bias = bias.chunk(size)[rank]
        own: dict[str, Any] = {"gather_output": False}
    else:
        own = {"input_is_parallel": True}
    config = ModelParallelConfig(
        tensor_model_parallel_size=size,
        sequence_parallel=True,
        params_dtype=dtype,
        perform_initialization=False,
    )
    made = getattr(whose, kind)(
        INPUT,
        OUTPUT,
        config=config,
        init_method=None,
        bias=biased,
        **({"skip_bias_add": False} | own | options),
    )
    with torch.no_grad():
        made.weight.copy_(weight.chunk(size, split)[rank])
        if biased:
            made.bias.copy_(bias)
    return made, x.chunk(size, 0 if kind == "column" else 2)[rank].clone().requires_grad_()


def run(made: Any, x: Tensor) -> Found:
    output, left_bias = made(x)
    if left_bias is not None:
        output = output + left_bias
    (output.square().sum()).backward()
    assert x.grad is not None
    bias = None if made.bias is None else made.bias.grad
    return Found(output.detach(), x.grad, made.weight.grad, bias)


def rank_computes(rank: int, world_size: int, kind: str, dtype: torch.dtype, biased: bool) -> list[Found]:
    """Of megatron's map, and of ours whole, in pieces, and in pieces without its bias."""
    from sinkbench.megatron import parallel

    parallel.start(prepare((*TINY, *FOUR[1], f"parallel.tensor={world_size}"))[0])
    from sinkbench.megatron.transformer_engine import LOCAL, linears

    ours = linears("local", overlapped=True)
    found = [run(*a_map(kind, LOCAL, dtype, biased)), run(*a_map(kind, ours, dtype, biased))]
    with small_pieces():
        found += [run(*a_map(kind, ours, dtype, biased)) for _ in range(2)]
        found.append(run(*a_map(kind, ours, dtype, biased, skip_bias_add=True)))
    for name in ("output", "input", "weight"):
        assert torch.equal(getattr(found[2], name), getattr(found[3], name))  # not by what comes first
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), CASES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_outputs_and_gradients_are_those_of_the_formula(
    run_distributed: RunDistributed,
    world_size: int,
    kind: str,
    biased: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    whole = expected(dtype, biased)
    # Where the parts of the ranks lie in the whole.
    output, given, weight = (2, 0, 0) if kind == "column" else (0, 2, 1)
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=10 * tolerance)
    by_rank = run_distributed(world_size, rank_computes, kind, dtype, biased)
    for one in zip(*by_rank, strict=True):
        close(torch.cat([found.output for found in one], output).double(), whole.output)
        close(torch.cat([found.input for found in one], given).double(), whole.input)
        close(torch.cat([found.weight for found in one], weight).double(), whole.weight)
        if biased:
            parts = [found.bias for found in one]
            joined = torch.cat(parts) if kind == "column" else torch.stack(parts).double().sum(0)
            close(joined.double(), whole.bias)


def rank_keeps(rank: int, world_size: int) -> dict[str, list[int]]:
    """The numbers of elements that a map's forward pass keeps for its backward pass, without the weight; a
    weight that is not trained is megatron's own affair."""
    from sinkbench.megatron import overlapped_linears, parallel

    parallel.start(prepare((*TINY, *LAYOUTS["sequence"][1]))[0])
    from sinkbench.megatron.transformer_engine import LOCAL, OVERLAPPED

    kept: dict[str, list[int]] = {"column": [], "row": []}
    for kind, sizes in kept.items():
        made, x = a_map(kind, OVERLAPPED, torch.float32, False)

        def note(tensor: Tensor, made: Any = made, sizes: list[int] = sizes) -> Tensor:
            if tensor is not made.weight:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made(x)
        frozen, its = a_map(kind, OVERLAPPED, torch.float32, False), a_map(kind, LOCAL, torch.float32, False)
        for module, x in (frozen, its):
            module.weight.requires_grad_(False)
            module(x)[0].square().sum().backward()
        assert torch.equal(frozen[1].grad, its[1].grad)  # type: ignore[arg-type]
        assert frozen[0].weight.grad is None
        assert type(made).__name__ in LINEAR
        assert type(made).__module__ == overlapped_linears.__name__
    return kept


def test_a_rank_keeps_its_own_part_alone(run_distributed: RunDistributed) -> None:
    part = LENGTH * BATCH * INPUT // 2
    assert run_distributed(2, rank_keeps) == [{"column": [part], "row": [part]}] * 2


class _Watched:
    """A collective under way."""

    def __init__(self, work: Any, log: list[str]) -> None:
        self._work, self._log = work, log

    def wait(self) -> None:
        self._log.append("wait")
        self._work.wait()


def rank_orders(rank: int, world_size: int, pieces: bool) -> dict[str, list[str]]:
    """Collectives, waits and products, as each pass launches them."""
    from sinkbench.megatron import parallel

    parallel.start(prepare((*TINY, *FOUR[1], f"parallel.tensor={world_size}"))[0])
    from sinkbench.megatron.transformer_engine import OVERLAPPED

    log: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            log.append(name)
            result = function(*args, **options)
            return _Watched(result, log) if options.get("async_op") else result

        return call

    passes = {}
    with pytest.MonkeyPatch.context() as patch, small_pieces(2 if pieces else 1):
        patch.setattr(dist, "all_gather_into_tensor", watched("gather", dist.all_gather_into_tensor))
        patch.setattr(dist, "reduce_scatter_tensor", watched("scatter", dist.reduce_scatter_tensor))
        for name in ("mm", "addmm"):
            patch.setattr(torch, name, watched("product", getattr(torch, name)))
        patch.setattr(Tensor, "addmm_", watched("product", Tensor.addmm_))
        for kind in ("column", "row"):
            made, x = a_map(kind, OVERLAPPED, torch.float32, False)
            output, _ = made(x)
            passes[f"{kind} forward"], log[:] = list(log), []
            output.sum().backward()
            passes[f"{kind} backward"], log[:] = list(log), []
    return passes


def test_communication_begins_before_products_and_is_waited_for_after(
    run_distributed: RunDistributed,
) -> None:
    """Two ranks: gathered rows come whole, and what is scattered is in two pieces of both ranks' rows."""
    both = ["product", "product"]
    passes = {
        "column forward": ["gather", "product", "wait", "product"],
        "column backward": ["gather", "product", "wait", "scatter", "product", "wait"],
        "row forward": [*both, "scatter", *both, "scatter", "wait", "wait"],
        "row backward": ["gather", *both, "wait", *both],
    }
    assert run_distributed(2, rank_orders, True) == [passes] * 2


def test_more_ranks_gather_in_pieces(run_distributed: RunDistributed) -> None:
    others = ["product"] * 3
    forward = ["gather", "product", "gather", "wait", *others, "wait", *others]
    for passes in run_distributed(4, rank_orders, False):
        assert passes["column forward"] == forward
        assert passes["row forward"] == ["product"] * 4 + ["scatter", "wait"]


def rank_trains(
    rank: int, world_size: int, overrides: Sequence[str], fused: str, tolerance: float
) -> set[str]:
    """Whose linear maps the layers had."""
    modules: set[str] = set()

    def note(engine: Any) -> None:
        found = engine.networks[0].decoder.modules()
        modules.update(type(module).__module__ for module in found if type(module).__name__ in LINEAR)

    plain = trained((*TINY, *overrides, "train.fused=[]"))
    with small_pieces():
        other = trained((*TINY, *overrides, f"train.fused={fused}"), hook=note)
    assert plain[0][0] != plain[0][-1]
    torch.testing.assert_close(other[0], plain[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(other[1], plain[1], rtol=10 * tolerance, atol=0)
    for mine, its in zip(other[2], plain[2], strict=True):
        torch.testing.assert_close(mine, its, rtol=100 * tolerance, atol=100 * tolerance)
    return modules


@pytest.mark.parametrize(("layout", "form", "fused"), [
    ("two", (), "[gradients,communication]"),
    ("four", (), "[communication]"),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ("four", (), "[gradients,communication]"),
        ("two", (), "[communication]"),
        ("two", POST, "[gradients,communication]"),
        ("four", POST, "[communication]"),
        ("two", ("train.recompute=full",), "[gradients,communication]"),
        ("two", ("model.tie_embeddings=true",), "[loss,gradients,communication]"),
        ("pipeline", (), "[gradients,communication]"),
        ("two", (), "[loss,layer,gradients,optimizer,communication]"),
    )),
])  # fmt: skip
def test_the_same_training(
    run_distributed: RunDistributed, layout: str, form: tuple[str, ...], fused: str
) -> None:
    """Losses, gradients' norms and weights over steps of several micro-batches."""
    processes, overrides = SEQUENCE[layout]
    for modules in run_distributed(processes, rank_trains, (*form, *overrides), fused, 1e-5, timeout=280):
        assert modules == {"sinkbench.megatron.overlapped_linears"}


@pytest.mark.full
def test_bf16_is_near(run_distributed: RunDistributed) -> None:
    processes, overrides = SEQUENCE["two"]
    precise = (*overrides, "train.precision=bf16")
    run_distributed(processes, rank_trains, precise, "[gradients,communication]", 2e-3, timeout=280)


def rank_lists(rank: int, world_size: int, fused: str) -> tuple[list[str], dict[str, Tensor]]:
    """What a checkpoint holds, and initial weights."""
    from sinkbench.megatron import parallel
    from sinkbench.model import build_stages, declare

    config, resolved = prepare((*SWIGLU, *LAYOUTS["sequence"][1], "model.linear_bias=all", fused))
    place = parallel.start(config)
    (stage,) = build_stages(config, declare(config, resolved, 65), place)
    sharded = stage.sharded_state_dict(metadata={"dp_cp_group": place.groups.dp_cp})
    return sorted(f"{k} {getattr(v, 'global_shape', '')}" for k, v in sharded.items()), {
        name: parameter.detach().clone() for name, parameter in stage.named_parameters()
    }


def test_checkpoints_and_initial_weights_are_the_same(run_distributed: RunDistributed) -> None:
    plain = run_distributed(2, rank_lists, "train.fused=[]")
    ours = run_distributed(2, rank_lists, "train.fused=[communication]")
    for (its_names, its_weights), (names, weights) in zip(plain, ours, strict=True):
        assert names == its_names
        assert list(weights) == list(its_weights)
        assert all(torch.equal(weights[name], its_weights[name]) for name in weights)
