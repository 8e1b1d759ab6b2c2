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
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert hopper.missing() == "Triton is 3.5.1, and they need 3.6"

    def lacks() -> None:
        raise ImportError("no name 'warpgroup_mma'")

    monkeypatch.setattr("triton.__version__", "4.0.0+git1")
    monkeypatch.setattr(hopper, "call", lacks)
    assert "4.0.0+git1 lacks" in hopper.missing()
    monkeypatch.setenv("SINKBENCH_HOPPER", "0")
    assert hopper.missing() == "SINKBENCH_HOPPER is 0"


def compiled(what: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as the interpreter may be on in this one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.hopper_compiled", what],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries", "table", "rows", "columns"])
def test_products_are_under_way_beside_one_another(kernel: str) -> None:
    """The compiler for the card runs each alone, and says so, where it finds their sums touched meanwhile."""
    said = compiled(kernel).stdout
    assert "serialized" not in said, said
    assert ", 0 bytes spill stores" in said, said


def test_functions_that_they_cannot_take_are_left_to_triton() -> None:
    done = compiled("functions")
    assert done.stdout.split() == ["[True,", "False]"]
    assert "makes_a_tensor is not computed by the kernels for Hopper" in done.stderr
