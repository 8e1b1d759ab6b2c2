"""The feed-forward block with its activation, gate and gradient in compiled functions.

Shapes: s position, b sequence, n hidden size, f feed-forward size, t = s b tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from sinkbench.megatron.fusions import compiled

Activation = Callable[[Tensor], Tensor]


class FeedForward(MLP):  # type: ignore[misc]
    """megatron's block, with the activation and its gate in one kernel."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, n] -> the same shape, and a bias to add to it, if it has one."""
        projected, bias = self.linear_fc1(hidden_states)
        function = self.activation_func
        if not self.config.gated_linear_unit:
            activated = compiled(plain_activation)(projected, bias, function)
        elif bias is None:
            activated = _Gated.apply(projected, function)  # type: ignore[no-untyped-call]
        else:
            activated = compiled(gated_activation)(projected, bias, function)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(activated)
        return output


def plain_activation(x: Tensor, bias: Tensor | None, function: Activation) -> Tensor:
    return function(x if bias is None else x + bias)


def gated_activation(x: Tensor, bias: Tensor | None, function: Activation) -> Tensor:
    """The first half of the last dimension through the function, times the second half."""
    gate, linear = (x if bias is None else x + bias).chunk(2, -1)
    return function(gate) * linear


class _Gated(torch.autograd.Function):
    """``gated_activation`` whose gradient is written where it belongs. Autograd's joins the gradients of both
    halves, and the compiler's kernel of that loads and computes both for every element and drops one."""

    @staticmethod
    def forward(ctx: Any, x_sbf: Tensor, function: Activation) -> Tensor:
        ctx.save_for_backward(x_sbf)
        ctx.function = function
        activated: Tensor = compiled(gated_activation)(x_sbf, None, function)
        return activated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x_sbf,) = ctx.saved_tensors
        x_tf = x_sbf.flatten(0, 1)
        grad_tf = grads[0].flatten(0, 1)
        result_tf = torch.empty_like(x_tf)
        of_gate_tf, of_linear_tf = result_tf.chunk(2, -1)
        compiled(write_gradient)(x_tf, grad_tf, of_gate_tf, of_linear_tf, ctx.function)
        return result_tf.view_as(x_sbf), None


def write_gradient(
    x_tf: Tensor, grad_tf: Tensor, of_gate_tf: Tensor, of_linear_tf: Tensor, function: Activation
) -> None:
    """The gradient of ``gated_activation`` into two matrices, which may be columns of one."""

    def gated(gate: Tensor, linear: Tensor) -> Tensor:
        return function(gate) * linear

    pull: Callable[[Tensor], tuple[Tensor, Tensor]]
    _, pull = torch.func.vjp(gated, *x_tf.chunk(2, -1))  # type: ignore[misc]
    gate_grad_tf, linear_grad_tf = pull(grad_tf)
    of_gate_tf.copy_(gate_grad_tf)
    of_linear_tf.copy_(linear_grad_tf)
