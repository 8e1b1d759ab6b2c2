"""Transformer Engine's linear maps, by megatron-core's wrappers, in the place of megatron's own.

Parameters have the same names, shapes and initial values, so that a checkpoint of one is one of the other.
The norm before a linear map stays a module of its own: fused into it, its gain would have another name.

fp8 has the recipes without a state: the scale of a tensor or block is that of its numbers. So a run resumes
as it would have gone on, and there is nothing to keep but the weights. Delayed scaling has a history, which
Transformer Engine keeps as a pickle; nothing that is in a checkpoint is run here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from megatron.core import tensor_parallel

from sinkbench.errors import HostError
from sinkbench.megatron import overlapped_linears

Fp8 = Literal["tensorwise", "blockwise"]


@dataclass(frozen=True)
class Linears:
    """Classes of linear maps whose outputs or inputs are split over tensor-parallel ranks."""

    column: type
    row: type


LOCAL = Linears(tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear)
OVERLAPPED = Linears(overlapped_linears.ColumnParallelLinear, overlapped_linears.RowParallelLinear)
"""The same, with communication beside their products."""


class _WithoutState:
    """What megatron's own linear maps say of a state beside their parameters."""

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        """One that was written elsewhere is passed over."""


def linears(whose: Literal["local", "te"], overlapped: bool = False) -> Linears:
    """
    Args:
        overlapped: communication runs beside products, of local maps; Transformer Engine has ways of its own.

    Raises:
        HostError: Transformer Engine cannot be used.
    """
    if whose == "local":
        return OVERLAPPED if overlapped else LOCAL
    load()
    from megatron.core.extensions import transformer_engine as wrappers

    # Named as megatron's are: by these names, measurements know linear maps.
    return Linears(
        *(
            type(local.__name__, (_WithoutState, wrapper), {})
            for local, wrapper in (
                (LOCAL.column, wrappers.TEColumnParallelLinear),
                (LOCAL.row, wrappers.TERowParallelLinear),
            )
        )
    )


def products_in(fp8: Fp8 | None) -> AbstractContextManager[Any]:
    """Within, linear maps of Transformer Engine compute in 8 bits."""
    if fp8 is None:
        return nullcontext()
    module, recipe = load(), _scaling(fp8)
    context: AbstractContextManager[Any]
    if hasattr(module, "autocast"):  # since 2.9
        context = module.autocast(enabled=True, recipe=recipe)
    else:
        context = module.fp8_autocast(enabled=True, fp8_recipe=recipe)
    return context


@cache
def _scaling(fp8: Fp8) -> Any:
    from transformer_engine.common import recipe

    return recipe.Float8CurrentScaling() if fp8 == "tensorwise" else recipe.Float8BlockScaling()


def load() -> Any:
    """The module transformer_engine.pytorch.

    Raises:
        HostError: it cannot be imported.
    """
    try:
        import transformer_engine.pytorch as module
    except (ImportError, OSError) as error:
        remedy = "install it for this torch and CUDA, or set what asks for te to local, auto or torch"
        raise HostError("transformer_engine", f"cannot be imported ({error})", remedy) from error
    return module
