"""Documents in the fused kernels against the plain-torch reference in float64: on a card, or in Triton's
interpreter where the package is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench.api import Elementwise, ScoreBias  # noqa: E402
from sinkbench.attention import fused, triton_tensors  # noqa: E402
from sinkbench.attention.reference import Problem  # noqa: E402
from sinkbench.attention.triton_blocks import ROW_BLOCK  # noqa: E402
from tests.unit.test_document_mask import starts  # noqa: E402
from tests.unit.test_triton_masks import (  # noqa: E402
    DEVICE,
    IDENTITY,
    SIGMOID,
    SLOPE,
    TABLE,
    assert_as_reference,
    make_problem,
    output_and_gradients,
)
from tests.unit.test_triton_softmax import ENDING, problem  # noqa: E402

SHORT = ((1, 70, 1, 1, 19, 58), (150,))
"""Lengths of the documents of two sequences: within blocks of 32 and over many."""
ENDS = ((32, 64, 32, 22), (31, 1, 1, 96, 21))
"""Documents that begin and end with blocks, and beside them."""
LONG = ((1, 500, 76, 300, 23), (900,))


def packed(p: Problem, lengths: Sequence[Sequence[int]]) -> Problem:
    """Two sequences of documents: a problem of one, and the same reversed."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.flip(2)])

    return replace(
        p,
        query_bhqd=twice(p.query_bhqd),
        key_bgkd=twice(p.key_bgkd),
        value_bgkd=twice(p.value_bgkd),
        document_start_bk=starts(*lengths).to(DEVICE),
    )


def test_similarity_with_table() -> None:
    assert_as_reference(packed(make_problem(SIGMOID, 150, 32, bias=ENDING), SHORT))


def test_softmax_with_window_slot_and_sink() -> None:
    assert_as_reference(packed(problem(150, more=True, window=20), ENDS))


def test_softmax_with_slopes_of_both_signs() -> None:
    p = packed(problem(150, bias=SLOPE), SHORT)
    slope = torch.tensor([-0.3, 0.2], device=DEVICE)
    assert_as_reference(replace(p, position_parameters={"slope": slope}))


@pytest.mark.full
@pytest.mark.parametrize("rule", ["softmax", SIGMOID, IDENTITY], ids=["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("bias", [None, SLOPE, TABLE, ENDING], ids=["none", "slope", "table", "ending"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("lengths", [LONG] if CUDA else [SHORT, ENDS], ids=str)
def test_every_mask(
    rule: Elementwise | str, bias: ScoreBias | None, window: int | None, lengths: Sequence[Sequence[int]]
) -> None:
    length = sum(lengths[0])
    if isinstance(rule, str):
        p = problem(length, window=window, bias=bias)
    else:
        p = make_problem(rule, length, 32, window=window, bias=bias)
    assert_as_reference(packed(p, lengths))
    if CUDA:
        assert_as_reference(packed(p, lengths), torch.bfloat16, 2e-2)


@pytest.mark.full
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("lengths", [((1,), (1,)), ((65,), (1,) * 65)], ids=["one", "many"])
def test_every_size(head_size: int, lengths: Sequence[Sequence[int]]) -> None:
    """A document of one position has a weight of 1 and no gradient of its score."""
    for p in (problem(sum(lengths[0]), head_size), make_problem(SIGMOID, sum(lengths[0]), head_size)):
        assert_as_reference(packed(p, lengths), tolerance=3e-4)


def test_one_document_is_no_mask() -> None:
    p = packed(problem(40), ((40,), (40,)))
    masked = output_and_gradients(fused.run, p, torch.float32)
    plain = output_and_gradients(fused.run, replace(p, document_start_bk=None), torch.float32)
    for what, value in masked.items():
        torch.testing.assert_close(value, plain[what], msg=what)


def test_bounds() -> None:
    """Where documents begin and end, with room for whole blocks."""
    found = triton_tensors.bounds(starts((2, 1, 3), (6,)).to(DEVICE))
    assert found.shape == (2, 2, ROW_BLOCK)
    assert found.dtype == torch.int32
    assert found[:, :, :6].tolist() == [
        [[0, 0, 2, 3, 3, 3], [2, 2, 3, 6, 6, 6]],
        [[0] * 6, [6] * 6],
    ]
