"""Gradients against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import gradcheck

from sinkbench.testing.session import Failed

STEP, RELATIVE, ABSOLUTE = 1e-6, 1e-3, 1e-5


def check_gradients(
    what: str,
    function: Callable[[Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    names: Sequence[str],
) -> None:
    """Checks the gradient with respect to each named input.

    Args:
        what: the function's value, for the message.
        inputs: float64 tensors by name.

    Raises:
        Failed: the gradient of an input is missing or differs.
    """
    for name in names:

        def of(x: Tensor, name: str = name) -> Tensor:
            return function({**inputs, name: x})

        leaf = inputs[name].detach().clone().requires_grad_()
        if not of(leaf).requires_grad:
            raise Failed(f"{what} has no gradient with respect to {name}")
        if not gradcheck(of, (leaf,), eps=STEP, rtol=RELATIVE, atol=ABSOLUTE, raise_exception=False):
            raise Failed(_worst(what, of, leaf, name))


def _worst(what: str, function: Callable[[Tensor], Tensor], leaf: Tensor, name: str) -> str:
    """The element of the input for which the gradient of a weighted sum of the outputs is most wrong."""
    output = function(leaf)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad((output * weight).sum(), leaf)
    expected = torch.empty_like(found)
    with torch.no_grad():
        for index in range(leaf.numel()):
            shift = torch.zeros_like(leaf)
            shift.view(-1)[index] = STEP
            change = function(leaf + shift) - function(leaf - shift)
            expected.view(-1)[index] = (change * weight).sum() / (2 * STEP)
    error = (found - expected).abs()
    at = int(error.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), error.shape)]
    return (
        f"d ({what}) / d {name} at {place} is {found.flatten()[at].item():.6g}, finite differences give "
        f"{expected.flatten()[at].item():.6g}"
    )
