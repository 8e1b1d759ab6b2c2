"""NVIDIA Apex on a card: its norms and its FusedAdam against torch's, and steps with both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sinkbench.megatron import norms
from sinkbench.packages import PACKAGES, is_installed
from tests.distributed.test_saving import an_engine, step
from tests.distributed.test_transformer_engine import ENGINE
from tests.gpu import test_adamw
from tests.gpu.test_transformer_engine import CARD, either_goes_on, losses

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
    pytest.mark.skipif(not is_installed(PACKAGES["apex"]), reason="needs NVIDIA Apex"),
]
BOTH = ("optim.implementation=apex", "model.norms=apex")
LAYERNORM = ("model.normalization=layernorm", "model.linear_bias=all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_norms(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """Outputs and gradients, against torch's in float32 of the same numbers."""
    torch.manual_seed(0)
    norm = kind(768, eps=1e-5)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    theirs = norms.made(norm, "apex").to("cuda", dtype)
    exact = kind(768, eps=1e-5).cuda()
    exact.load_state_dict(theirs.state_dict())
    x, gradient = (torch.randn(64, 768, 3, device="cuda").to(dtype).transpose(1, 2) for _ in range(2))

    def both(module: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = module(x)
        return [y, *torch.autograd.grad(y, (x, *module.parameters()), gradient)]

    found, expected = both(theirs, x, gradient), both(exact, x.float(), gradient.float())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), its, rtol=tolerance, atol=tolerance * float(its.std()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_update(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two groups, of which one has no weight decay. Its kernel is compiled with approximate divisions,
    and has 1 - beta in float32."""
    monkeypatch.setattr("sinkbench.megatron.fused_adam.has_kernel", lambda device: False)
    overrides = [f"train.precision={precision}"]
    expected_norms, expected = test_adamw.after(overrides, 1)
    its_norms, mine = test_adamw.after([*overrides, "optim.implementation=apex"], 1)
    assert its_norms == pytest.approx(expected_norms, rel=1e-5)
    for ours, its in zip(mine, expected, strict=True):
        close = {"rtol": 1e-5, "atol": 1e-8} if ours.dtype != torch.bfloat16 else {}
        # Apex counts steps on the host, and torch on the card.
        torch.testing.assert_close(ours, its, check_device=False, **close)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain() -> list[float]:
    found = losses(())
    assert found[-1] < found[0] - 0.05
    return found


@pytest.mark.parametrize("overrides", [
    ("optim.implementation=apex",),
    ("model.norms=apex",),
    BOTH,
    (*BOTH, *LAYERNORM),
    (*BOTH, "train.recompute=full"),
    (*BOTH, "train.fused=auto"),
], ids=str)  # fmt: skip
def test_the_same_training(overrides: tuple[str, ...], plain: list[float]) -> None:
    """After three steps a recorded micro-batch is replayed, but with ``train.recompute``."""
    expected = losses(LAYERNORM) if LAYERNORM[0] in overrides else plain
    assert losses(overrides) == pytest.approx(expected, rel=5e-3)


def test_either_goes_on_with_a_checkpoint_of_the_other(tmp_path: Path) -> None:
    either_goes_on(tmp_path, BOTH)


def test_its_kernels_run() -> None:
    from torch.profiler import ProfilerActivity, profile

    with an_engine([*ENGINE, *CARD, *BOTH, "train.cuda_graph=false"]) as engine:
        step(engine, 0)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step(engine, 1)
        names = [event.key for event in profiler.key_averages()]
    for kernel in ("AdamFunctor", "cuApplyRMSNorm", "cuComputeGradInput"):
        assert any(kernel in name for name in names), kernel
    assert not [name for name in names if "FusedAdamMathFunctor" in name], "torch's"
