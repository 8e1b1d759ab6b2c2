"""Transformer Engine on a card: against the eager attention, megatron's layers and torch's optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sinkbench.attention import transformer_engine
from tests.distributed.test_saving import an_engine, batch_of
from tests.distributed.test_transformer_engine import ENGINE, go_on, save
from tests.unit.test_attention_backends import compare, make_problem
from tests.unit.test_transformer_engine import ABLE

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
    pytest.mark.skipif(transformer_engine._module() is None, reason="needs transformer_engine"),
]
CARD = (
    "train={precision: bf16, device: cuda, fused: [gradients]}",
    "model={hidden_size: 256, num_attention_heads: 4, ffn_hidden_size: 768, seq_length: 256}",
    "optim={lr: 1e-3, warmup_steps: 1}",
)
TE = ("model={linears: te, norms: te}",)


@pytest.mark.parametrize("length", [37, 512])
@pytest.mark.parametrize("name", ABLE)
def test_attention(name: str, length: int) -> None:
    p = make_problem(name, length=length, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    compare(p, "te", 1e-2, 1e-4)


def losses(overrides: Sequence[str], steps: int = 6) -> list[float]:
    """Of steps of two micro-batches each, on few sequences."""
    with an_engine([*ENGINE, *CARD, *overrides]) as engine:
        batches = [batch_of(engine, number) for number in range(4)]
        return [engine.train_step(batches[:2] if number % 2 else batches[2:]).loss for number in range(steps)]


@pytest.fixture(scope="module")
def plain() -> list[float]:
    found = losses(())
    assert found[-1] < found[0] - 0.05
    return found


@pytest.mark.parametrize("overrides", [
    TE,
    ("model.backend=te",),
    ("model.backend=te", "model.normalization=layernorm", "model.linear_bias=all"),
    (*TE, "train.recompute=full"),
    ("optim.implementation=te",),
], ids=str)  # fmt: skip
def test_the_same_training(overrides: tuple[str, ...], plain: list[float]) -> None:
    changed = [x for x in overrides if "normalization" in x or "bias" in x]
    assert losses(overrides) == pytest.approx(losses(changed) if changed else plain, rel=5e-3)


def either_goes_on(folder: Path, package: tuple[str, ...]) -> None:
    """With a checkpoint of the other, and a package with its own bit for bit."""
    exact = (*CARD, "train.deterministic=true")
    with_it = (*exact, *package)
    ours, its = save(folder / "ours", exact), save(folder / "its", with_it)
    assert its.names == ours.names
    # AdamW may change a weight by the learning rate one way or the other, however small its gradient.
    for found, expected in (
        (go_on(folder / "ours", ours, with_it), ours.later),
        (go_on(folder / "its", its, exact), its.later),
    ):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=3e-3)
    assert all(map(torch.equal, go_on(folder / "its", its, with_it), its.later))


def test_either_goes_on_with_a_checkpoint_of_the_other(tmp_path: Path) -> None:
    either_goes_on(tmp_path, (*TE, "optim.implementation=te"))


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_fp8_is_near(fp8: str, plain: list[float]) -> None:
    found = losses((*TE, f"train.fp8={fp8}"))
    assert found != plain
    assert found == pytest.approx(plain, rel=2e-2)
