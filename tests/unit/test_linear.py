"""Which program computes kernel attention, and in which order its feature maps see memory."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sinkbench.attention import fused, linear


def test_why_the_kernels_do_not_compute_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "is_installed", lambda: True)
    small, large = torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 257)
    assert linear.kernels_lack(small, small, small) == []
    assert linear.kernels_lack(large, large, small) == ["its features or heads have 257 dimensions"]
    assert linear.kernels_lack(small.double(), small.double(), small.double()) == [
        "its tensors are torch.float64"
    ]
    assert linear.kernels_lack(small, small, small.half()) == [
        "its tensors are torch.float16 and torch.float32"
    ]
    monkeypatch.setattr(fused, "is_installed", lambda: False)
    assert linear.kernels_lack(small, small, small) == ["the package triton is not installed"]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_a_map_sees_features_as_they_lie_in_memory(order: tuple[int, int, int]) -> None:
    """A product would copy what is transposed."""
    seen = []

    def doubled(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        seen.append(x)
        return torch.cat([x, parameters["factor"] * x], -1)

    x = torch.randn(2, 3, 5, 4).permute(*order, -1)
    factor = {"factor": torch.tensor(2.0)}
    result = linear._in_memory_order(doubled)(x, factor)
    assert torch.equal(result, doubled(x, factor))
    assert seen[0].is_contiguous()


def test_a_map_sees_a_single_vector() -> None:
    vector = torch.randn(4)
    assert torch.equal(linear._in_memory_order(lambda x, _: 2 * x)(vector, {}), 2 * vector)
