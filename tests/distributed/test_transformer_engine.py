"""Layers and optimizers by Transformer Engine, for which a stand-in is here, against those of megatron and
torch: losses, weights, and checkpoints that either goes on with. tests/gpu tries the real one on a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sinkbench import recipe
from sinkbench.checkpoint import CheckpointStore
from sinkbench.config import CheckpointConfig
from sinkbench.testing import RunDistributed
from tests import transformer_engine as stand_in
from tests.distributed.runs import LAYOUTS, SWIGLU
from tests.distributed.test_fusions import TINY, trained
from tests.distributed.test_saving import an_engine, batch_of, step

LOCAL = ("train.fused=[loss]",)
TE = (
    "model={linears: te, norms: te}",
    "optim.implementation=te",
    "train.fused=[loss,gradients]",
)
BIASED = ("model={ffn: relu, linear_bias: all, normalization: layernorm}",)
ENGINE = (*SWIGLU, "model={num_layers: 2, seq_length: 64}", "train.precision=fp32")


def rank_compares(rank: int, world_size: int, overrides: Sequence[str], te: Sequence[str] = TE) -> int:
    """The number of Transformer Engine's products."""
    plain = trained((*TINY, *overrides, *LOCAL))
    stand_in.install()
    other = trained((*TINY, *overrides, *te))
    assert plain[0][0] != plain[0][-1]
    torch.testing.assert_close(other[0], plain[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(other[1], plain[1], rtol=1e-4, atol=0)
    for mine, its in zip(other[2], plain[2], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3)
    return len(stand_in.products)


@pytest.mark.parametrize("layout", ["", *(pytest.param(name, marks=pytest.mark.full) for name in (
    "sequence", "tensor", "pipeline", "interleaved", "context", "data"
))])  # fmt: skip
@pytest.mark.parametrize("form", [(), pytest.param(BIASED, marks=pytest.mark.full)], ids=["swiglu", "biased"])
def test_the_same_training(run_distributed: RunDistributed, layout: str, form: tuple[str, ...]) -> None:
    processes, overrides = LAYOUTS[layout] if layout else (1, ())
    products = run_distributed(processes, rank_compares, (*overrides, *form), timeout=280)
    steps, micro_batches, layers, maps = 3, 4, 4, 4
    whole = steps * micro_batches * layers * maps
    shared = layout in ("data", "pipeline", "interleaved")
    assert products == [whole // 2 if shared else whole] * processes


@pytest.mark.full
def test_the_same_training_with_everything_else_fused(run_distributed: RunDistributed) -> None:
    fused = "train.fused=[loss,gradients,layer,optimizer]"
    run_distributed(1, rank_compares, (), (*TE, fused), timeout=280)


def rank_clips(rank: int, world_size: int) -> None:
    """megatron-core scales gradients by a kernel of Transformer Engine or Apex wherever it can import one."""

    def refuse(*_: object) -> None:
        raise RuntimeError("expected input to be on cuda")

    with pytest.MonkeyPatch.context() as patch:

        def install(_: object) -> None:
            patch.setattr("megatron.core.optimizer.clip_grads.multi_tensor_applier", refuse)

        norms = trained((*TINY, "train.fused=[]", "optim.clip_grad=0.01"), hook=install)[1]
    assert min(norms) > 0.01


def test_a_cpu_needs_no_kernels_of_an_installed_package(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_clips)


@dataclass(frozen=True)
class Saved:
    """Attributes:
    names: of what a checkpoint holds.
    weights: that it holds; later: after a step more.
    """

    names: list[str]
    weights: list[Tensor]
    later: list[Tensor]


def save(folder: Path, overrides: Sequence[str]) -> Saved:
    from sinkbench.safe_load import SafeReader
    from sinkbench.saving import Saver

    store = CheckpointStore(folder)
    with an_engine([*ENGINE, *overrides]) as engine:
        step(engine, 1)
        saver = Saver(store, engine.layout, CheckpointConfig())
        saver.save(engine, 1, recipe.dump(engine.config))
        saver.finish()
        weights = weights_of(engine)
        step(engine, 2)
        stored = SafeReader(store.open(1).folder).read_metadata().state_dict_metadata
        return Saved(names=sorted(stored), weights=weights, later=weights_of(engine))


def go_on(folder: Path, saved: Saved, overrides: Sequence[str]) -> list[Tensor]:
    """The weights after a step more."""
    from sinkbench.saving import load

    with an_engine([*ENGINE, *overrides, "seed=4321"]) as engine:
        load(engine, CheckpointStore(folder).open(1))
        assert all(map(torch.equal, weights_of(engine), saved.weights))
        step(engine, 2)
        return weights_of(engine)


def weights_of(engine: Any) -> list[Tensor]:
    return [p.detach().clone() for p in engine.networks[0].parameters()]


def rank_goes_on(rank: int, world_size: int, folder: Path) -> None:
    stand_in.install()
    local, te = save(folder / "local", ()), save(folder / "te", TE)
    assert te.names == local.names
    assert any(name.startswith("optimizer.state.exp_avg.decoder.layers.norms.") for name in te.names)
    assert stand_in.products
    torch.testing.assert_close(go_on(folder / "local", local, TE), local.later, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(go_on(folder / "te", te, ()), te.later, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, go_on(folder / "te", te, TE), te.later))


def test_either_goes_on_with_a_checkpoint_of_the_other(
    run_distributed: RunDistributed, tmp_path: Path
) -> None:
    run_distributed(1, rank_goes_on, tmp_path)


def rank_looks_at_products(rank: int, world_size: int) -> dict[str, set[tuple[str, ...]]]:
    """The recipes that were in force at products of linear maps while a model trained, and otherwise."""
    stand_in.install()
    found = {}
    fp8 = (
        "model={linears: te, hidden_size: 64, ffn_hidden_size: 96}",
        "train={precision: bf16, fp8: tensorwise}",
    )
    for recompute in ("none", "full"):
        stand_in.products.clear()
        with an_engine([*ENGINE, *fp8, f"train.recompute={recompute}"]) as engine:
            step(engine, 1)
            found[recompute] = set(stand_in.products)
            stand_in.products.clear()
            engine.evaluate([batch_of(engine, 2)])
            found[f"{recompute}, evaluated"] = set(stand_in.products)
    return found


def test_products_in_fp8_are_those_of_training(run_distributed: RunDistributed) -> None:
    (found,) = run_distributed(1, rank_looks_at_products)
    trains, other = {("Float8CurrentScaling",)}, {()}
    assert found == {"none": trains, "none, evaluated": other, "full": trains, "full, evaluated": other}
