"""Steps whose update is one Triton kernel, in Triton's interpreter, give what torch's AdamW gives: under
every layout, with refused steps between, and after either has loaded what the other saved."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sinkbench import recipe
from sinkbench.checkpoint import CheckpointStore
from sinkbench.config import CheckpointConfig
from sinkbench.testing import RunDistributed
from tests.distributed.runs import LAYOUTS
from tests.distributed.test_fusions import TINY, trained
from tests.distributed.test_saving import an_engine, batch_of, step

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
ENGINE = (*TINY, "model.num_layers=2", "train.precision=fp32")
KERNEL, TORCH = "train.fused=[optimizer]", "train.fused=[]"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the processes of ranks."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def use_kernel() -> None:
    """As on a card."""
    from sinkbench.megatron import fused_adam

    fused_adam.has_kernel = lambda device: True


def updates(engine: Any) -> list[Any]:
    return [part.optimizer.step for part in engine.optimizer.chained_optimizers]


def rank_compares(rank: int, world_size: int, overrides: Sequence[str], tolerance: float) -> None:
    from sinkbench.megatron.fused_adam import KernelUpdate

    used: list[Any] = []
    plain = trained((*TINY, *overrides, TORCH), hook=lambda e: used.extend(updates(e)))
    assert not any(isinstance(update, KernelUpdate) for update in used)
    use_kernel()
    used.clear()
    other = trained((*TINY, *overrides, KERNEL), hook=lambda e: used.extend(updates(e)))
    assert all(isinstance(update, KernelUpdate) for update in used)
    assert plain[0][0] != plain[0][-1]
    torch.testing.assert_close(other[0], plain[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(other[1], plain[1], rtol=10 * tolerance, atol=0)
    for mine, its in zip(other[2], plain[2], strict=True):
        torch.testing.assert_close(mine, its, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("optim", ["{eps: 0.01, clip_grad: 0.05}", "weight_decay_on: matrices"])
@pytest.mark.parametrize("layout", ["data", *(pytest.param(name, marks=pytest.mark.full) for name in (
    "", "sequence", "pipeline", "interleaved", "context", "tensor pipeline"
))])  # fmt: skip
def test_the_same_steps(run_distributed: RunDistributed, layout: str, optim: str) -> None:
    processes, overrides = LAYOUTS[layout] if layout else (1, ())
    run_distributed(processes, rank_compares, (*overrides, f"optim={optim}"), 1e-5, timeout=280)


@pytest.mark.full
def test_tied_embeddings(run_distributed: RunDistributed) -> None:
    run_distributed(2, rank_compares, ("parallel.pipeline=2", "model.tie_embeddings=true"), 1e-5, timeout=280)


def rank_refuses(rank: int, world_size: int, precision: str) -> None:
    """A step with a loss that is not finite leaves weights and state as they are; the next one goes on."""
    use_kernel()
    with an_engine([*ENGINE, KERNEL, f"train.precision={precision}"]) as engine:
        for number in range(2):
            step(engine, number)
        before = everything(engine)
        batch = batch_of(engine, 2)
        result = engine.train_step([{**batch, "weights": batch["weights"] * torch.inf}])
        assert not result.updated
        after = everything(engine)
        assert all(map(torch.equal, after, before))
        assert {int(state["step"]) for state in states(engine)} == {2}
        assert engine.train_step([batch_of(engine, 3)]).updated
        assert {int(state["step"]) for state in states(engine)} == {3}
        assert not any(map(torch.equal, everything(engine), before))


def states(engine: Any) -> list[dict[str, Tensor]]:
    return [state for part in engine.optimizer.chained_optimizers for state in part.optimizer.state.values()]


def everything(engine: Any) -> list[Tensor]:
    """Weights, and the state of the optimizer."""
    kept = [p.detach().clone() for stage in engine.networks for p in stage.parameters()]
    return kept + [value.clone() for state in states(engine) for value in state.values()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_refused_step(run_distributed: RunDistributed, precision: str) -> None:
    run_distributed(1, rank_refuses, precision)


def save(folder: Path, form: str) -> list[Tensor]:
    """The weights after a step more."""
    from sinkbench.saving import Saver

    with an_engine([*ENGINE, form]) as engine:
        step(engine, 1)
        saver = Saver(CheckpointStore(folder), engine.layout, CheckpointConfig())
        saver.save(engine, 1, recipe.dump(engine.config))
        saver.finish()
        step(engine, 2)
        return everything(engine)


def go_on(folder: Path, form: str) -> list[Tensor]:
    """The weights and state after loading and a step more; some steps were there before."""
    from sinkbench.saving import load

    with an_engine([*ENGINE, form, "seed=4321"]) as engine:
        for number in range(3):
            step(engine, number)
        load(engine, CheckpointStore(folder).open(1))
        step(engine, 2)
        return everything(engine)


def rank_goes_on(rank: int, world_size: int, folder: Path) -> None:
    use_kernel()
    by_kernel, by_torch = save(folder / "kernel", KERNEL), save(folder / "torch", TORCH)
    for source, saved in (("kernel", by_kernel), ("torch", by_torch)):
        for form in (KERNEL, TORCH):
            for mine, its in zip(go_on(folder / source, form), saved, strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, go_on(folder / "kernel", KERNEL), by_kernel))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_going_on_with_the_other_form(
    run_distributed: RunDistributed, tmp_path: Path, processes: int
) -> None:
    run_distributed(processes, rank_goes_on, tmp_path, timeout=280)
