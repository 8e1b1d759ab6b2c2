"""An attention's inputs in another form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from sinkbench.attention.reference import Problem


def converted(p: Problem, convert: Callable[[Tensor], Tensor]) -> Problem:
    """With each input and parameter changed."""
    return replace(
        p,
        query_bhqd=convert(p.query_bhqd),
        key_bgkd=convert(p.key_bgkd),
        value_bgkd=convert(p.value_bgkd),
        parameters={name: convert(x) for name, x in p.parameters.items()},
        position_parameters={name: convert(x) for name, x in p.position_parameters.items()},
    )
