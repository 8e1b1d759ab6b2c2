"""A softmax's terms beside the keys in two kernels, against the plain-torch form: on a card, or in Triton's
interpreter where the package is there."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench.attention import flash, triton_terms  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
BATCH, HEADS, SCALE = 2, 3, 0.3
TERMS = {
    "key and value": (True, True, False),
    "key": (True, False, False),
    "sink": (False, False, True),
    "all": (True, True, True),
}
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def by_position(length: int, size: int) -> Tensor:
    """[b, h, t, d] that lies as [t, b, h, d], with a gap after each position."""
    return random(2 * length, BATCH, HEADS, size)[::2].permute(1, 2, 0, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", TERMS)
@pytest.mark.parametrize(("length", "size"), [(1, 16), (33, 96), (70, 128)])
def test_as_in_torch(names: str, length: int, size: int, dtype: torch.dtype) -> None:
    """The first row has no keys: all of its weight is on the terms."""
    has_key, has_value, has_sink = TERMS[names]
    terms: flash.Terms = (
        random(HEADS, size) if has_key else None,
        random(HEADS, size) if has_value else None,
        random(HEADS) if has_sink else None,
    )
    query, output, grad, grad_query = (by_position(length, size).to(dtype) for _ in range(4))
    lse = 3 * random(BATCH, HEADS, length)
    lse[:, :, 0] = float("-inf")
    output[:, :, 0] = 0.0
    wide = [x.double().cpu() for x in (query, output, grad, grad_query)]
    key, value, sink = (None if x is None else x.double().cpu() for x in terms)
    exact = (key, value, sink)
    lse_before = lse.clone()

    total = triton_terms.join(output, lse, query, terms, SCALE)
    expected = flash._join(wide[1], lse.double().cpu(), wide[0], exact, SCALE)
    allowed = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(total.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.double().cpu(), wide[1], rtol=allowed, atol=allowed)
    assert torch.equal(lse, lse_before)

    found = triton_terms.gradients(grad, output, total, query, grad_query, terms, SCALE)
    wanted = flash._gradients(wide[2], output.double().cpu(), expected, wide[0], wide[3], exact, SCALE)
    torch.testing.assert_close(grad_query.double().cpu(), wide[3], rtol=allowed, atol=allowed)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one.double().cpu(), other, rtol=1e-4, atol=1e-4)


def test_rows_without_anything() -> None:
    """Neither keys nor a sink that counts: zeros, and no gradient but a finite one."""
    output, lse = torch.zeros(1, 1, 4, 16, device=DEVICE), torch.full((1, 1, 4), float("-inf"), device=DEVICE)
    terms: flash.Terms = (None, None, torch.full((1,), float("-inf"), device=DEVICE))
    total = triton_terms.join(output, lse, output, terms, SCALE)
    assert total.isneginf().all()
    assert not output.any()
    grad = torch.ones_like(output)
    _, _, of_sink = triton_terms.gradients(grad, output, total, grad, grad.clone(), terms, SCALE)
    assert of_sink is not None
    assert not of_sink.any()
