"""Steps on a card whose update is one Triton kernel, against those with torch's fused AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.test_adamw import everything, states, updates
from tests.distributed.test_saving import an_engine, batch_of, step
from tests.distributed.test_transformer_engine import ENGINE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
CARD = (
    "train={device: cuda, deterministic: true, cuda_graph: false}",
    "model={hidden_size: 256, num_attention_heads: 4, ffn_hidden_size: 768, seq_length: 256}",
    "optim={weight_decay_on: matrices, clip_grad: 0.1, eps: 1.0e-4, warmup_steps: 0}",
)


def after(overrides: list[str], steps: int) -> tuple[list[float], list[Tensor]]:
    """Gradient norms; then weights and the optimizer's state with its main parameters."""
    with an_engine([*ENGINE, *CARD, *overrides]) as engine:
        norms = [engine.train_step([batch_of(engine, number)]).grad_norm for number in range(steps)]
        mains = [x.detach().clone() for part in parts(engine) for x in part.get_parameters()]
        return norms, [*everything(engine), *mains]


def parts(engine: Any) -> list[Any]:
    return list(engine.optimizer.chained_optimizers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_same_updates(precision: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step, whose gradients are the same to the last bit, float32 differs by its rounding, of at
    most a millionth of the learning rate. Later gradients are of models that differ by it."""
    overrides = [f"train.precision={precision}"]
    norms, mine = after(overrides, steps)
    monkeypatch.setattr("sinkbench.megatron.fused_adam.has_kernel", lambda device: False)
    expected_norms, expected = after(overrides, steps)
    assert norms == pytest.approx(expected_norms, rel=1e-5 if steps == 1 else 1e-2)
    for ours, its in zip(mine, expected, strict=True):
        if steps == 1:
            exact = ours.dtype != torch.bfloat16
            torch.testing.assert_close(ours, its, rtol=2e-6 if exact else None, atol=1e-8 if exact else None)
        else:
            difference = (ours.double() - its.double()).abs().mean()
            assert difference <= 1e-2 * its.double().abs().mean()


def test_what_the_model_has() -> None:
    """The main parameters, rounded to bf16."""
    with an_engine([*ENGINE, *CARD, "train.precision=bf16"]) as engine:
        for number in range(2):
            step(engine, number)
        for stage in engine.networks:
            for parameter in stage.parameters():
                assert torch.equal(parameter.detach().view(-1), parameter.main_param.to(torch.bfloat16))


def test_few_kernels() -> None:
    """One for the update and one for the norm, after one for each of the two groups; no copies."""
    from torch.profiler import ProfilerActivity, profile

    with an_engine([*ENGINE, *CARD, "train.precision=bf16"]) as engine:
        assert {type(update).__name__ for update in updates(engine)} == {"KernelUpdate"}
        step(engine, 0)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step(engine, 1)
        counts = {event.key: event.count for event in profiler.key_averages()}
        assert counts["_update"] == counts["_squares"] == 1
        assert counts["_advance"] == 2
        assert not [name for name in counts if "multi_tensor_apply" in name]


def test_a_refused_step() -> None:
    with an_engine([*ENGINE, *CARD, "train.precision=bf16"]) as engine:
        step(engine, 0)
        before = everything(engine)
        batch = batch_of(engine, 1)
        assert not engine.train_step([{**batch, "weights": batch["weights"] * torch.inf}]).updated
        assert all(map(torch.equal, everything(engine), before))
        assert engine.train_step([batch_of(engine, 2)]).updated
        assert {int(state["step"]) for state in states(engine)} == {2}
