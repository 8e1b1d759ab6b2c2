"""Which tensors and which Triton the kernels for Hopper take, and that they compile: without a card."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench.attention import hopper  # noqa: E402


def test_tensors_of_a_processor_are_not_for_them() -> None:
    assert not hopper.can_read(torch.zeros(1, 2, 64, 96, dtype=torch.bfloat16))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "version", lambda _: "3.5.1")
    assert hopper.missing() == "Triton is 3.5.1, and they need 3.6"

    def lacks() -> None:
        raise ImportError("no name 'warpgroup_mma'")

    monkeypatch.setattr(hopper, "version", lambda _: "4.0.0+git1")
    monkeypatch.setattr(hopper, "call", lacks)
    assert "4.0.0+git1 lacks" in hopper.missing()
    monkeypatch.setenv("SINKBENCH_HOPPER", "0")
    assert hopper.missing() == "SINKBENCH_HOPPER is 0"


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries", "table", "rows", "columns"])
def test_products_are_under_way_beside_one_another(kernel: str) -> None:
    """The compiler for the card runs each alone, and says so, where it finds their sums touched meanwhile. In
    a process of its own, as the interpreter may be on in this one."""
    compiled = subprocess.run(
        [sys.executable, "-m", "tests.unit.hopper_compiled", kernel],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if compiled.returncode == 77:
        pytest.skip(compiled.stdout.strip())
    assert compiled.returncode == 0, compiled.stderr
    assert "serialized" not in compiled.stdout, compiled.stdout
    assert ", 0 bytes spill stores" in compiled.stdout, compiled.stdout
