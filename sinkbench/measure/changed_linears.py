"""Linear maps that compute with a changed weight or input for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


def change(module: nn.Module, weight: Change | None, inputs: Change | None) -> list[Any]:
    """From now on the map's forward uses a changed weight and first argument; returns the hooks to remove. A
    weight is changed when it is needed, so that there is never more than one copy."""
    parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    exact: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if weight:
            exact.append(parameter.data)
            parameter.data = weight(parameter.data)
        return (inputs(args[0]), *args[1:]) if inputs else args

    def after(_: nn.Module, args: Any, output: Any) -> None:
        if weight:
            parameter.data = exact.pop()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
