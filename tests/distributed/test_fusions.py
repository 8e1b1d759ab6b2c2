"""What runs fused gives what the plain form gives: losses, gradient norms and weights, under every layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sinkbench.config import FUSIONS
from sinkbench.testing import RunDistributed
from tests.distributed.runs import LAYOUTS, SWIGLU, prepare

BATCH, STEPS = 8, 3
TINY = (*SWIGLU, f"train.steps={STEPS}", "optim.warmup_steps=1", "train.micro_batch_size=2")
PRE = ("model.normalization={name: rmsnorm, location: pre}",)
SANDWICH = ("model.normalization={name: layernorm, location: sandwich}", "model.ffn=geglu")
POST = ("model.normalization={name: layernorm, location: post}", "model={ffn: relu, linear_bias: all}")
PARALLEL = ("model={parallel_residual: true, tie_embeddings: true, ffn: reglu}",)


def trained(
    overrides: Sequence[str],
    z_loss: float = 0.0,
    steps: int = STEPS,
    hook: Callable[[Any], None] = lambda engine: None,
) -> tuple[list[float], list[float], list[Tensor]]:
    """Losses, gradient norms, and this rank's weights after a few steps of an engine that has hooks."""
    from dataclasses import replace

    from sinkbench.data.source import open_source
    from sinkbench.megatron import parallel
    from sinkbench.megatron.training import Engine
    from sinkbench.model import build_stages, declare

    config, resolved = prepare(overrides)
    source = open_source(config)
    declared = declare(config, resolved, source.vocab_size)
    declared = replace(declared, loss=replace(declared.loss, z_loss=z_loss))
    place = parallel.start(config)
    engine = Engine(config, build_stages(config, declared, place), place)
    hook(engine)
    losses, norms, share = [], [], BATCH // place.data_size
    for step in range(steps):
        tokens = torch.from_numpy(source.sequences(step * BATCH + place.data_rank * share, share)["tokens"])
        result = engine.train_step([declared.loss.transform({"tokens": part}) for part in tokens.split(2)])
        assert result.updated
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = [p.detach().clone() for stage in engine.networks for p in stage.parameters()]
    return losses, norms, weights


def rank_compares(rank: int, world_size: int, overrides: Sequence[str], fused: str, tolerance: float) -> None:
    plain = trained((*TINY, *overrides, "train.fused=[]"), z_loss=1e-2)
    other = trained((*TINY, *overrides, f"train.fused={fused}"), z_loss=1e-2)
    assert plain[0][0] != plain[0][-1]
    torch.testing.assert_close(other[0], plain[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(other[1], plain[1], rtol=10 * tolerance, atol=0)
    for mine, its in zip(other[2], plain[2], strict=True):
        torch.testing.assert_close(mine, its, rtol=100 * tolerance, atol=100 * tolerance)


def compare(run_distributed: RunDistributed, layout: str, *arguments: Any) -> None:
    processes, overrides = LAYOUTS[layout] if layout else (1, ())
    run_distributed(processes, rank_compares, (*overrides, *arguments[0]), *arguments[1:], timeout=280)


@pytest.mark.parametrize("layout", ["sequence", *(pytest.param(name, marks=pytest.mark.full) for name in (
    "", "tensor", "pipeline", "interleaved", "context", "data", "tensor pipeline"
))])  # fmt: skip
def test_the_loss_and_the_optimizer(run_distributed: RunDistributed, layout: str) -> None:
    compare(run_distributed, layout, (), "[loss,optimizer]", 1e-5)


@pytest.mark.parametrize("layout", ["sequence", *(pytest.param(name, marks=pytest.mark.full) for name in (
    "", "tensor", "pipeline", "interleaved", "context", "data", "tensor pipeline"
))])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_the_sum_of_gradients(run_distributed: RunDistributed, layout: str, tied: bool) -> None:
    compare(run_distributed, layout, (f"model.tie_embeddings={tied}",), "[loss,gradients]", 1e-5)


@pytest.mark.parametrize("clip", [0.05, pytest.param(0.0, marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", ["", *(pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS)])
def test_division_and_clipping_by_the_optimizer(
    run_distributed: RunDistributed, layout: str, clip: float
) -> None:
    """With a large eps: otherwise AdamW hardly sees a gradient's scale."""
    compare(run_distributed, layout, (f"optim={{eps: 0.01, clip_grad: {clip}}}",), "[optimizer]", 1e-5)


@pytest.mark.parametrize("layout", ["", pytest.param("pipeline", marks=pytest.mark.full)])
def test_tied_embeddings(run_distributed: RunDistributed, layout: str) -> None:
    compare(run_distributed, layout, ("model.tie_embeddings=true",), "[loss,optimizer]", 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["", "sequence"])
def test_bf16_is_near(run_distributed: RunDistributed, layout: str) -> None:
    compare(run_distributed, layout, ("train.precision=bf16",), "[loss,optimizer]", 2e-3)


@pytest.mark.full
def test_the_sum_of_gradients_without_the_fused_loss(run_distributed: RunDistributed) -> None:
    compare(run_distributed, "", ("model.tie_embeddings=true",), "[gradients]", 1e-5)


@pytest.mark.parametrize("form", [PRE, *(pytest.param(form, marks=pytest.mark.full) for form in (
    SANDWICH, POST, PARALLEL, ("train.recompute=full",)
))])  # fmt: skip
def test_norms_and_activations(run_distributed: RunDistributed, form: tuple[str, ...]) -> None:
    compare(run_distributed, "", form, "[layer]", 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_of_the_next_layer(run_distributed: RunDistributed, layout: str) -> None:
    compare(run_distributed, layout, PRE, "[layer]", 1e-5)


def rank_looks_ahead(rank: int, world_size: int, overrides: Sequence[str]) -> set[int]:
    """The layers (5 the final norm) whose first norm is there when the layer before ends. A hook changes what
    the second one returns, which no layer may miss."""
    found: set[int] = set()

    def watch(read: Any, number: int) -> Any:
        return lambda *_: found.add(number) if read is not None and read._ahead is not None else None

    def change(layer: Any, arguments: Any, output: Any) -> Any:
        hidden, context = output
        return hidden.flip(-1), context

    def hook(engine: Any) -> None:
        network = engine.networks[0]
        layers = network.decoder.layers
        layers[1].register_forward_hook(change)
        reads = [getattr(layer, "first_read", None) for layer in layers[1:]] + [network._final_read]
        for number, (layer, read) in enumerate(zip(layers, reads, strict=True), 2):
            layer.register_forward_hook(watch(read, number))

    plain = trained((*TINY, *overrides, "train.fused=[]"), hook=hook)
    assert not found
    other = trained((*TINY, *overrides, "train.fused=[layer]"), hook=hook)
    torch.testing.assert_close(other[0], plain[0], rtol=1e-5, atol=0)
    return found


@pytest.mark.parametrize(("form", "ahead"), [
    (PRE, {2, 3, 4, 5}),
    pytest.param((*PRE, "model.ffn=none"), {2, 3, 4, 5}, marks=pytest.mark.full),
    pytest.param((*PRE, "train.recompute=full"), set(), marks=pytest.mark.full),
    pytest.param(SANDWICH, set(), marks=pytest.mark.full),
    pytest.param(PARALLEL, set(), marks=pytest.mark.full),
])  # fmt: skip
def test_a_layer_norms_for_the_next_one(
    run_distributed: RunDistributed, form: tuple[str, ...], ahead: set[int]
) -> None:
    (found,) = run_distributed(1, rank_looks_ahead, form, timeout=280)
    assert found == ahead


def rank_counts_graphs(rank: int, world_size: int) -> dict[str, int]:
    """Graphs that dynamo makes of each compiled function for the shapes and modules of a run. A break in one
    raises."""
    from torch._dynamo.testing import CompileCounter

    from sinkbench.megatron import feed_forward, layer, rotation, vocabulary_loss

    x, added = torch.randn(2, 4, 2, 16, requires_grad=True)
    logits, target, factor = torch.randn(32, 64), torch.randint(64, (32,)), torch.rand(32)
    heads = rotation.HeadLayout(groups=2, queries=1, size=8)
    mixed, angle = torch.randn(4, 2, 48), torch.randn(2, 4, 1, 1, 4)
    rows, halves = torch.randn(8, 32), torch.empty(8, 32).chunk(2, -1)
    norms = [(norm, x, added) for norm in (torch.nn.RMSNorm(16) for _ in range(12))]
    arguments: dict[Any, list[tuple[Any, ...]]] = {
        layer.normed: [case[:2] for case in norms],
        layer.sum_and_normed: norms,
        layer.sum_normed: norms,
        layer.sum_with_normed: norms,
        feed_forward.gated_activation: [(x, None, torch.nn.functional.silu)] * 3,
        feed_forward.write_gradient: [(rows, rows[:, :16], *halves, torch.nn.functional.silu)] * 3,
        feed_forward.plain_activation: [(x, added, torch.nn.functional.relu)] * 3,
        rotation.rotated: [(mixed, *angle, heads)] * 3,
        rotation.rotated_back: [(*heads.split(mixed), *angle, heads)] * 3,
        vocabulary_loss._alone: [(logits, target, factor, 1e-4)] * 3,
        vocabulary_loss._statistics: [(logits, target)] * 3,
        vocabulary_loss._gradient: [(logits, factor, target, factor, 0.0)] * 3,
    }
    counts = {}
    for function, calls in arguments.items():
        counter = CompileCounter()
        compiled: Any = torch.compile(function, backend=counter, fullgraph=True)
        for call in calls:
            torch.testing.assert_close(compiled(*call), function(*call))
        counts[function.__name__] = counter.frame_count
    return counts


def test_layers_share_one_graph_without_breaks(run_distributed: RunDistributed) -> None:
    """Otherwise deep models would run into dynamo's limit, and go on uncompiled in silence."""
    (counts,) = run_distributed(1, rank_counts_graphs)
    assert counts == dict.fromkeys(counts, 1)


@pytest.mark.full
def test_everything_at_once(run_distributed: RunDistributed) -> None:
    compare(run_distributed, "tensor pipeline", SANDWICH, "[loss,layer,gradients,optimizer]", 1e-5)


def rank_draws_curves(rank: int, world_size: int) -> dict[str, list[float]]:
    """Losses of 200 steps without any fusion, and with each alone."""
    steps = 200
    overrides = (*TINY, *PRE, f"train.steps={steps}", "optim.lr=0.003")
    return {name: trained((*overrides, f"train.fused=[{name}]"), steps=steps)[0] for name in ("", *FUSIONS)}


@pytest.mark.full
def test_the_curve_is_the_same_with_each_fusion(run_distributed: RunDistributed) -> None:
    (curves,) = run_distributed(1, rank_draws_curves, timeout=580)
    plain = curves.pop("")
    assert plain[-1] < plain[0]
    assert set(curves) == set(FUSIONS)
    for name, curve in curves.items():
        assert curve == pytest.approx(plain, rel=1e-5), name
