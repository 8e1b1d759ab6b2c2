"""Sequences of several documents: attention within each is that of the document alone, by every backend that
takes a document mask, outputs and all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from sinkbench.api import AttentionSpec, Rows, Softmax, attention
from sinkbench.attention import flex, fused, reference
from sinkbench.attention.backends import choose
from sinkbench.attention.reference import Problem
from sinkbench.errors import PluginError
from sinkbench.measure import capture
from tests.unit.test_attention_backends import (
    CARD,
    VARIANTS,
    _flex_on_a_cpu,  # noqa: F401
    blocks_of,
    card_or_skip,
    compare,
    declared,
    in_float64,
    make_problem,
    results,
)

SHORT = ((1, 5, 1, 1, 19, 10), (37,))
"""Lengths of the documents of two sequences."""
LONG = ((1, 200, 55, 44), (128, 1, 171))
"""Within blocks of 128, over their edges, at them, and longer than one."""


def starts(*sequences: Sequence[int]) -> Tensor:
    """Where the document of each position begins, int32 [b, t]."""
    rows = []
    for lengths in sequences:
        count = torch.tensor(lengths)
        rows.append((count.cumsum(0) - count).repeat_interleave(count))
    return torch.stack(rows).int()


def each_alone(p: Problem) -> Tensor:
    """The attention of every document as a sequence of its own."""
    assert p.document_start_bk is not None
    sequences = []
    for row, start in enumerate(p.document_start_bk):
        begins = [*start.unique().tolist(), len(start)]
        parts = []
        for first, end in pairwise(begins):
            tensors = (p.query_bhqd, p.key_bgkd, p.value_bgkd)
            query, key, value = (x[row : row + 1, :, first:end] for x in tensors)
            position = torch.arange(end - first, device=query.device)
            alone = replace(p, query_bhqd=query, key_bgkd=key, value_bgkd=value, document_start_bk=None)
            parts.append(reference.attend(replace(alone, position_q=position, position_k=position)))
        sequences.append(torch.cat(parts, 2))
    return torch.cat(sequences)


def packed(name: str, lengths: Sequence[Sequence[int]] = SHORT, **more: Any) -> Problem:
    p = make_problem(name, length=sum(lengths[0]), kv_heads=2, **more)
    return replace(p, document_start_bk=starts(*lengths).to(p.query_bhqd.device))


def cases() -> list[Any]:
    """Every variant without a prefix, by all backends that can; flex, slow here, in the full suite."""
    return [
        pytest.param(name, backend, marks=[pytest.mark.full] if backend == "flex" else [])
        for name, variant in VARIANTS.items()
        for backend in variant.backends
        if not variant.prefix and backend != "linear"
    ]


@pytest.mark.parametrize(("name", "backend"), cases())
def test_each_document_is_as_it_is_alone(name: str, backend: str) -> None:
    compare(packed(name, device=card_or_skip(backend)), backend, 1e-5, truth=each_alone)


@pytest.mark.full
@pytest.mark.parametrize(("name", "backend"), cases())
def test_documents_longer_than_a_block(name: str, backend: str) -> None:
    compare(packed(name, LONG, device=card_or_skip(backend)), backend, 1e-5, truth=each_alone)


def test_flex_as_a_sample() -> None:
    p = packed("window, sink logit", ((1, 100, 59), (130, 30)), device=card_or_skip("flex"))
    compare(p, "flex", 1e-5, truth=each_alone)


@pytest.mark.parametrize("name", ["softmax", "sigmoid, normalised", "alibi"])
def test_one_document_is_no_mask(name: str) -> None:
    p = in_float64(make_problem(name))
    whole = replace(p, document_start_bk=torch.zeros(2, 37, dtype=torch.int32))
    for one, other in zip(
        results(p, reference.attend).values(), results(whole, reference.attend).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few queries at a time, computed again in the backward pass."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 5 * 2 * 4 * 37)
    compare(packed("key-value slot of 20"), "eager", 1e-5, truth=each_alone)


def test_a_part_of_the_queries() -> None:
    """As under context parallelism: the queries' positions are not those of the keys."""
    p = packed("sigmoid, normalised")
    chosen = torch.tensor([3, 4, 30, 36, 5])
    part = replace(p, query_bhqd=p.query_bhqd[:, :, chosen], position_q=chosen, aligned=False)
    torch.testing.assert_close(reference.attend(part), each_alone(p)[:, :, chosen])
    softmax = replace(part, spec=AttentionSpec(rule=Softmax()))
    whole = replace(p, spec=softmax.spec)
    torch.testing.assert_close(reference.attend(softmax), each_alone(whole)[:, :, chosen])


def test_measured_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are held or computed when asked for, keys of other documents have none."""
    p = packed("softmax")
    assert p.document_start_bk is not None
    for held in (capture.HELD_WEIGHTS, 0):
        monkeypatch.setattr(capture, "HELD_WEIGHTS", held)
        rows = capture.LayerWeights(p, 0, lambda x: x).rows(6, 20)
        key, start = torch.arange(37), p.document_start_bk[:, 6:20]
        outside = (key < start[..., None])[:, None].expand_as(rows)
        assert not rows[outside].any()
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:3]))


@pytest.mark.parametrize(("lengths", "window"), [(LONG, None), (LONG, 100), (((300,), (1,) * 300), None)])
def test_blocks_of_the_mask(lengths: Sequence[Sequence[int]], window: int | None) -> None:
    """Every pair that is seen is in some block, a block is whole only if all its pairs are seen, and none is
    computed of which none is."""
    start, length = starts(*lengths), sum(lengths[0])
    mask = flex._document_mask(start, window)
    assert mask.mask_mod is not None
    position = torch.arange(length)
    causal = reference.allowed_qk(position, position, window)
    seen = causal & (position >= start[:, :, None])
    whole = flex_attention.create_mask(mask.mask_mod, 2, 1, length, length, "cpu")
    assert torch.equal(whole[:, 0], seen)
    expected = flex_attention.create_block_mask(mask.mask_mod, 2, None, length, length, "cpu", flex.BLOCK)
    for row in range(2):
        for kind in ("kv", "full_kv", "q", "full_q"):
            assert blocks_of(mask, kind, row) == blocks_of(expected, kind, row)


def test_a_mask_is_made_once_a_batch() -> None:
    start = starts((3, 4))
    mask = flex.document_mask(start, None)
    assert flex.document_mask(start, None) is mask
    assert flex.document_mask(start.clone(), None) is not mask
    start[:, 4:] = 4
    changed = flex.document_mask(start, None)
    assert changed is not mask
    assert flex.document_mask(start, 2) is not changed
    with torch.inference_mode():
        flex.document_mask(starts((3, 4)), None)
    before = len(flex._document_masks)
    del start
    assert len(flex._document_masks) == before - 1


def test_flex_is_not_compiled_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "COMPILER", "eager")
    flex._compile.cache_clear()
    x = torch.randn(2, 4, 40, 16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in (((3, 37), (40,)), ((1, 38, 1), (20, 20))):
            mask = flex.document_mask(starts(*lengths), None)
            flex.compiled(x, x, x, None, None, mask, 0.25, False)
    flex._compile.cache_clear()


@pytest.mark.parametrize(
    ("name", "change", "chosen"),
    [
        ("softmax", {}, "triton"),
        ("softmax", {"head_size": 72}, "flex"),
        ("softmax", {"split_sequence": True}, "sdpa"),
        ("softmax", {"device": "cpu"}, "sdpa"),
        ("sigmoid", {}, "triton"),
        ("sigmoid", {"split_sequence": True}, "eager"),
        ("kernel_mlp", {}, "eager"),
    ],
)
def test_choice(name: str, change: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "is_installed", lambda: True)
    spec, _ = declared(VARIANTS[name].attention, "none")
    assert choose(spec, replace(CARD, documents=True, **change), "auto").name == chosen


def test_the_public_operation() -> None:
    query, key, value = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    start = starts((4, 5), (9,))

    def softmax_of_sums(score: Tensor, allowed: Tensor) -> Tensor:
        return score.masked_fill(~allowed, float("-inf")).softmax(-1)

    for spec in (AttentionSpec(rule=Softmax()), AttentionSpec(rule=Rows(function=softmax_of_sums))):
        output = attention(spec, query, key, value, document_start=start.long())
        first = attention(spec, query[:1, :, :4], key[:1, :, :4], value[:1, :, :4])
        second = attention(spec, query[:1, :, 4:], key[:1, :, 4:], value[:1, :, 4:])
        torch.testing.assert_close(output[:1], torch.cat([first, second], 2))
        torch.testing.assert_close(output[1:], attention(spec, query[1:], key[1:], value[1:]))


@pytest.mark.parametrize(
    ("start", "more", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int32), {}, "document_start has shape [2, 8], torch.int32 on cpu; "),
        (torch.zeros(2, 9), {}, "torch.float32 on cpu; give int32 of shape [2, 9] on cpu"),
        (torch.tensor([[0] * 9, [0, 0, 3] + [3] * 6]), {}, "of sequence 1 is 3 at position 2; write the"),
        (torch.tensor([[0, 1, 0] + [0] * 6] * 2), {}, "of sequence 0 is 0 at position 2; write the"),
        (torch.full((2, 9), -1), {}, "of sequence 0 is -1 at position 0; write the"),
        (torch.zeros(2, 9, dtype=torch.int64), {"prefix": 3}, "a prefix whose positions see one another is"),
    ],
)
def test_documents_that_are_none(start: Tensor, more: dict[str, Any], message: str) -> None:
    query = torch.randn(2, 2, 9, 8)
    with pytest.raises(PluginError) as caught:
        attention(AttentionSpec(rule=Softmax()), query, query, query, document_start=start, **more)
    assert message in str(caught.value)
