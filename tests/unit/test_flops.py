"""What a card computes at most."""

from __future__ import annotations

import pytest

from sinkbench import flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_peak_of_a_card(name: str, tera: float) -> None:
    assert flops.peak(name, "bf16") == tera * 1e12


def test_no_peak_where_it_would_say_nothing() -> None:
    assert flops.peak("NVIDIA H100 PCIe", "fp32") is None
    assert flops.peak("cpu", "bf16") is None
