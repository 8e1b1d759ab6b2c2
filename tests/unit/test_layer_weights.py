"""A layer's attention weights in a probe: held whole, computed when asked for, or only summed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sinkbench.api import AttentionSpec, Elementwise, ExtraSlot, ParameterSpec, Softmax, WeightRule
from sinkbench.attention import importance
from sinkbench.attention.reference import Problem
from sinkbench.measure import capture
from sinkbench.measure.capture import LayerWeights

LENGTH, HEADS, HEAD_SIZE = 13, 2, 4


def problem(rule: WeightRule, *, slot: bool) -> Problem:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, HEADS, LENGTH, HEAD_SIZE, generator=generator) for _ in range(3))
    position = torch.arange(LENGTH)
    spec = AttentionSpec(rule=rule, parameters={"slot": ParameterSpec(shape=("head_size",))})
    return Problem(
        spec=replace(spec, extra_slot=ExtraSlot(key="slot") if slot else None),
        query_bhqd=query,
        key_bgkd=key,
        value_bgkd=value,
        position_q=position,
        position_k=position,
        aligned=True,
        scale=0.5,
        heads=torch.arange(HEADS),
        parameters={"slot": torch.ones(HEAD_SIZE)},
        prefix=3,
    )


@pytest.mark.parametrize(
    "rule", [Softmax(), Elementwise(function=torch.sigmoid, normalize=True)], ids=["softmax", "sigmoid"]
)
@pytest.mark.parametrize(("slot", "leading"), [(False, 0), (True, 0), (False, 1), (True, 1)])
def test_rows_that_are_computed_are_those_that_are_held(
    rule: WeightRule, slot: bool, leading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(rule, slot=slot)
    held = LayerWeights(p, leading, lambda x: x)
    monkeypatch.setattr(capture, "HELD_WEIGHTS", 0)
    monkeypatch.setattr(capture, "BLOCK_ELEMENTS", 5 * 2 * HEADS * LENGTH)
    computed = LayerWeights(p, leading, lambda x: x)
    length = LENGTH - leading
    assert held.rows(0, length).shape == (2, HEADS, length, length)
    for start, end in ((0, length), (4, 7)):
        torch.testing.assert_close(computed.rows(start, end), held.rows(start, end), rtol=1e-6, atol=1e-7)
    assert (held.slot_bhq is not None) == (computed.slot_bhq is not None) == (slot or leading == 1)
    if held.slot_bhq is not None and computed.slot_bhq is not None:
        torch.testing.assert_close(computed.slot_bhq, held.slot_bhq, rtol=1e-6, atol=1e-7)
        row = held.rows(0, length).sum(-1) + held.slot_bhq
        torch.testing.assert_close(row, torch.ones_like(row))


def test_the_kernel_leaves_an_extra_slot_beside_a_sink_token_to_blocks() -> None:
    """Its sums of absolute values are of each by itself, and the slot's weight is of both."""
    spec = problem(Softmax(), slot=True).spec
    what = "an extra slot beside a sink token"
    assert what not in importance.missing(spec, HEAD_SIZE)
    assert what in importance.missing(replace(spec, sink_token=True), HEAD_SIZE)
