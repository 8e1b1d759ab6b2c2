"""The attention kernels for Hopper, in Gluon, Triton's language of layouts.

They compute what the Triton kernels do, for 16-bit tensors of head sizes up to 128. Blocks come by the copy
engine, and products are under way while weights are made, where Triton's compiler waits for one product after
another. The products are wgmma, which this generation of cards alone has. SINKBENCH_HOPPER=0 leaves them
out.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkbench.attention.triton_tensors import split_head_size

if TYPE_CHECKING:
    from sinkbench.attention.triton_call import Call

LARGEST_HEAD = 128
"""More leaves a thread too few registers."""
SINCE = (3, 6)
"""Of Triton: they were run with 3.6, and 3.7 to 3.9 compile them. Gluon is experimental; see ``missing``."""

_log = logging.getLogger(__name__)


def can_read(*tensors_bhtd: Tensor) -> bool:
    """Whether the kernels are for such a card, and can take these tensors [b, h, t, d] as they lie."""
    first = tensors_bhtd[0]
    half = first.dtype in (torch.bfloat16, torch.float16)
    if not first.is_cuda or not half or first.shape[-1] > LARGEST_HEAD:
        return False
    return is_for(first.device) and all(_has_descriptor(x) for x in tensors_bhtd)


def _has_descriptor(x_bhtd: Tensor) -> bool:
    """The copy engine addresses 16 bytes at a time and steps of less than 2^40."""
    step = 16 // x_bhtd.element_size()
    strides = [stride for size, stride in zip(x_bhtd.shape, x_bhtd.stride(), strict=True) if size > 1][:-1]
    aligned = x_bhtd.data_ptr() % 16 == 0 and x_bhtd.stride(-1) == 1
    return aligned and all(0 < s < 2**40 // x_bhtd.element_size() and s % step == 0 for s in strides)


@cache
def is_for(device: torch.device) -> bool:
    """Whether the kernels run on a card; why they do not, on one that they are made for, is logged once."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    obstacle = missing()
    if obstacle:
        _log.info("attention does without the kernels for Hopper: %s", obstacle)
    return not obstacle


def missing() -> str:
    """Why the kernels cannot be compiled, or are not wanted; empty if they can."""
    if os.environ.get("SINKBENCH_HOPPER", "1") == "0":
        return "SINKBENCH_HOPPER is 0"
    import triton

    found: str = triton.__version__
    if tuple(int(part) for part in found.split(".")[:2]) < SINCE:
        return f"Triton is {found}, and they need {'.'.join(map(str, SINCE))}"
    try:
        call()
    except (ImportError, AttributeError) as error:
        return f"Triton {found} lacks what they are written with: {error}"
    return ""


def takes(function: Any, derivative: Any) -> bool:
    """Whether Triton functions of a similarity can be part of the kernels."""
    from sinkbench.attention.hopper_call import compiles

    return compiles(function, derivative)


def call() -> type[Call]:
    """
    Raises:
        ImportError, AttributeError: this Triton's Gluon is another.
    """
    from sinkbench.attention.hopper_call import HopperCall

    return HopperCall


def importance() -> ModuleType:
    """Importance's kernels; as ``call``."""
    from sinkbench.attention import hopper_importance

    return hopper_importance


def parts(head_size: int) -> tuple[int, ...]:
    """The parts that a head size is taken in."""
    return tuple(size for size in split_head_size(head_size) if size > 1)
