"""The vocabulary loss in parts: its values and gradients, alone and split over two ranks; what it holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinkbench.testing import RunDistributed
from tests.distributed.runs import DEMO, prepare
from tests.largest_tensor import LargestTensor

LENGTH, BATCH, HIDDEN, VOCABULARY = 10, 3, 8, 64
Z_LOSS = 0.01
CASES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets (one of them outside the vocabulary), factors (some 0)."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(LENGTH, BATCH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    factors = torch.rand(BATCH, LENGTH, generator=generator)
    targets[1, 4], factors[1, 4], factors[2, :5] = -100, 0.0, 0.0
    return hidden, weight, targets, factors


def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and gradients of three times their sum, all in float64."""
    hidden, weight, targets, factors = inputs(dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.t()).transpose(0, 1)
    at_target = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    partition = logits.logsumexp(-1)
    losses = factors * (partition - at_target + Z_LOSS * partition**2)
    for_hidden, for_weight = torch.autograd.grad(3 * losses.sum(), (hidden, weight))
    return losses.detach(), for_hidden, for_weight


def rank_computes(
    rank: int, world_size: int, dtype: torch.dtype, sequence_parallel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from sinkbench.megatron import parallel, vocabulary_loss

    config, _ = prepare((*DEMO, f"parallel.tensor={world_size}"))
    place = parallel.start(config)
    hidden, weight, targets, factors = inputs(dtype)
    weight = weight.chunk(world_size)[rank].clone().requires_grad_()
    if sequence_parallel:
        hidden = hidden.chunk(world_size)[rank].clone()
    hidden.requires_grad_()
    setting = vocabulary_loss.Setting(
        group=place.groups.tp, z_loss=Z_LOSS, sequence_parallel=sequence_parallel
    )
    arguments = (hidden, weight, targets, factors, setting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_loss, "PART_BYTES", 5 * weight.numel() // HIDDEN * dtype.itemsize)
        losses = vocabulary_loss.token_losses(*arguments)
        with torch.no_grad():
            without = vocabulary_loss.token_losses(*arguments)
    assert torch.equal(losses, without)
    (3 * losses.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("dtype", "tolerance"), CASES, ids=str)
@pytest.mark.parametrize("layout", ["alone", "tensor", "sequence"])
def test_losses_and_gradients_are_those_of_the_formula(
    run_distributed: RunDistributed, layout: str, dtype: torch.dtype, tolerance: float
) -> None:
    world_size = 1 if layout == "alone" else 2
    found = run_distributed(world_size, rank_computes, dtype, layout == "sequence")
    losses, for_hidden, for_weight = expected(dtype)
    hidden_shares = [share for _, share, _ in found]
    hidden = torch.cat(hidden_shares) if layout == "sequence" else hidden_shares[0]
    pairs = [
        *((of_rank, losses) for of_rank, _, _ in found),
        (hidden, for_hidden),
        (torch.cat([share for _, _, share in found]), for_weight),
    ]
    for computed, true in pairs:
        absolute = tolerance * float(true.abs().max())
        torch.testing.assert_close(computed.double(), true, rtol=tolerance, atol=absolute)


def rank_watches(rank: int, world_size: int, fused: str) -> tuple[int, int]:
    """Elements of the largest tensor of a training step, and of all logits."""
    from sinkbench.data.source import open_source
    from sinkbench.megatron import parallel, vocabulary_loss
    from sinkbench.megatron.training import Engine
    from sinkbench.model import build_stages, declare

    overrides = (
        "model={vocab_size: 4096, seq_length: 64}",
        "train.global_batch_size=32",
        "log.progress=false",
    )
    config, resolved = prepare((*DEMO, *overrides, f"train.fused={fused}"))
    source = open_source(config)
    declared = declare(config, resolved, source.vocab_size)
    place = parallel.start(config)
    engine = Engine(config, build_stages(config, declared, place), place)
    batch = declared.loss.transform({"tokens": torch.from_numpy(source.sequences(0, 32)["tokens"])})
    with pytest.MonkeyPatch.context() as patch, LargestTensor() as sizes:
        patch.setattr(vocabulary_loss, "PART_BYTES", 64 * 4096 * 4)
        engine.train_step([batch])
    return sizes.elements, 32 * 64 * 4096


@pytest.mark.parametrize("fused", ["[loss]", "[]"])
def test_logits_of_all_tokens_are_never_held(run_distributed: RunDistributed, fused: str) -> None:
    ((largest, logits),) = run_distributed(1, rank_watches, fused)
    assert (largest < logits) is (fused == "[loss]")


def rank_sizes(rank: int, world_size: int) -> list[int]:
    from sinkbench.megatron.vocabulary_loss import part_size

    return [part_size(32768, 50432 * 2, 2**30), part_size(100, 50432 * 2, 2**30), part_size(100, 10, 1)]


def test_a_part_is_a_power_of_two_or_all(run_distributed: RunDistributed) -> None:
    assert run_distributed(1, rank_sizes) == [[8192, 100, 1]]
