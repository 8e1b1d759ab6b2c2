"""Steps that replay CUDA graphs, on a card: the same as those that launch their kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sinkbench.megatron.step_graph import WARM_UP
from tests.distributed.test_saving import an_engine, batch_of
from tests.distributed.test_transformer_engine import ENGINE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
CARD = (
    "train={precision: bf16, device: cuda, deterministic: true}",
    "model={hidden_size: 256, num_attention_heads: 4, ffn_hidden_size: 768, seq_length: 256}",
)
STEPS = WARM_UP + 4


def losses(engine: Any) -> list[float]:
    """Of steps of two, one and three micro-batches."""
    batches = [batch_of(engine, number) for number in range(6)]
    parts = [batches[:2], batches[2:3], batches[3:]]
    return [engine.train_step(parts[step % 3]).loss for step in range(STEPS)]


@pytest.mark.parametrize(
    "attention",
    [
        "softmax",
        "{name: sigmoid, normalize: false}",
        "{name: softmax, kv_bias: k, value_norm: 5}",
        "{name: softmax, combine: sum}",
    ],
)
def test_the_same_steps(attention: str) -> None:
    overrides = [*ENGINE, *CARD, f"model.attention={attention}"]
    with an_engine([*overrides, "train.cuda_graph=false"]) as engine:
        launched = losses(engine)
    with an_engine([*overrides, "train.cuda_graph=true"]) as engine:
        assert losses(engine) == launched
        assert not engine.graphs.given_up


def test_summed_heads_have_one_gradient() -> None:
    """Which all heads read: cuDNN's kernels do not know that."""
    summed = [*ENGINE, *CARD, "model.attention={name: softmax, combine: sum}", "train.cuda_graph=false"]
    with an_engine([*summed, "train.deterministic=false", "model.backend=sdpa"]) as engine:
        fused = losses(engine)
    with an_engine([*summed, "model.backend=eager"]) as engine:
        assert losses(engine) == pytest.approx(fused, rel=2e-3)


def test_a_model_that_waits_for_the_card() -> None:
    """It goes on without graphs, and so do random numbers, whose state a capture holds."""
    with an_engine([*ENGINE, *CARD, "train.cuda_graph=false"]) as engine:
        launched = losses(engine)

    def wait(_: Any, __: Any, output: Any) -> None:
        output[0].sum().item()

    with an_engine([*ENGINE, *CARD]) as engine:
        engine.networks[0].decoder.layers[0].register_forward_hook(wait)
        assert losses(engine) == launched
        assert engine.graphs.given_up
    assert torch.rand(8, device="cuda").unique().numel() > 1
