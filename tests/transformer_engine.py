"""A stand-in for Transformer Engine in this process: its modules as far as sinkbench and megatron-core's
wrappers call them, in plain torch, with its names of parameters and its pickled state."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

VERSION = "2.6.0"
in_fp8: list[str] = []
"""The recipe that is in force, if any, and before it those around it."""
products: list[tuple[str, ...]] = []
"""What was in force at each product of a linear map."""


class WithState(torch.nn.Module):
    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(pickle.dumps({"recipe": "of some class"})), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("would unpickle what is in a checkpoint")


class Linear(WithState):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        return_bias: bool,
        parallel_mode: str,
        params_dtype: torch.dtype,
        device: Any,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
    ) -> None:
        from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

        super().__init__()
        self.parallel_mode, self.group, self.return_bias = parallel_mode, tp_group, return_bias
        self.split_sequence = sequence_parallel and tp_size > 1
        self.adds_to_sum = fuse_wgrad_accumulation
        column = parallel_mode == "column"
        shape = (out_features // tp_size, in_features) if column else (out_features, in_features // tp_size)
        like: dict[str, Any] = {"dtype": params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.empty(shape, **like))
        init_method(self.weight)
        set_tensor_model_parallel_attributes(self.weight, True, 0 if column else 1, 1)
        self.bias = torch.nn.Parameter(torch.zeros(shape[0], **like)) if bias else None
        if self.bias is not None and column:
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)
        elif self.bias is not None:
            self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        from megatron.core import tensor_parallel as tp

        assert is_first_microbatch is None, "its gradient would replace what is in the sum"
        products.append(tuple(in_fp8))
        column, group = self.parallel_mode == "column", self.group
        if column and self.split_sequence:
            x = tp.gather_from_sequence_parallel_region(x, group=group)
        elif column:
            x = tp.copy_to_tensor_model_parallel_region(x, group=group)
        weight = self.weight
        if self.adds_to_sum:
            weight = AddedToSum.apply(self.weight)  # type: ignore[no-untyped-call]
        y = x @ weight.t()
        if not column and self.split_sequence:
            y = tp.reduce_scatter_to_sequence_parallel_region(y, group=group)
        elif not column:
            y = tp.reduce_from_tensor_model_parallel_region(y, group=group)
        if self.return_bias:
            return y, self.bias
        return y if self.bias is None else y + self.bias


class AddedToSum(torch.autograd.Function):
    """The weight's gradient goes to its float32 sum, and what autograd gets for it means nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        ctx.weight.main_grad.add_(grads[0])
        ctx.weight.grad_added_to_main_grad = True
        return torch.full_like(grads[0], float("nan"))


class RMSNorm(torch.nn.RMSNorm, WithState): ...


class LayerNorm(torch.nn.LayerNorm, WithState): ...


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        softmax_scale: float = 1.0,
        softmax_type: str = "vanilla",
    ) -> None:
        super().__init__()
        assert (qkv_format, attn_mask_type, attention_dropout) == ("sbhd", "causal", 0.0)
        self.heads, self.groups, self.size = num_attention_heads, num_gqa_groups, kv_channels
        self.window, self.scale = window_size, softmax_scale
        self.softmax_offset: Tensor | None = None
        if softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.zeros(num_attention_heads))

    def forward(self, query_sbhd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor) -> Tensor:
        assert os.environ["NVTE_UNFUSED_ATTN"] == "0"
        assert query_sbhd.shape[2:] == (self.heads, self.size)
        assert key_sbgd.shape[2] == self.groups
        per_group = self.heads // key_sbgd.shape[2]
        key, value = (x.repeat_interleave(per_group, 2) for x in (key_sbgd, value_sbgd))
        score = self.scale * torch.einsum("qbhd,kbhd->bhqk", query_sbhd, key)
        distance = torch.arange(len(query_sbhd))[:, None] - torch.arange(len(query_sbhd))
        left = len(query_sbhd) if self.window is None else self.window[0]
        assert self.window is None or self.window[1] == 0
        score = score.masked_fill((distance < 0) | (distance > left), float("-inf"))
        if self.softmax_offset is not None:
            offset = self.softmax_offset.reshape(1, -1, 1, 1).expand(*score.shape[:3], 1)
            weight = torch.cat([score, offset], -1).softmax(-1)[..., :-1]
        else:
            weight = score.softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weight, value).flatten(2)


class FusedAdam(torch.optim.Optimizer):
    """AdamW with a step count for each group, on the moments that it finds."""

    def __init__(self, params: Any, lr: float = 1e-3, *, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert type(group["step"]) is int
            assert group["bias_correction"]
            group["step"] += 1
            first, second = (1 - beta ** group["step"] for beta in group["betas"])
            for parameter in group["params"]:
                state, grad = self.state[parameter], parameter.grad
                state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
                state["exp_avg_sq"].lerp_(grad.square(), 1 - group["betas"][1])
                update = state["exp_avg"] / first / ((state["exp_avg_sq"] / second).sqrt() + group["eps"])
                parameter -= group["lr"] * (update + group["weight_decay"] * parameter)


@contextmanager
def autocast(enabled: bool, recipe: Any) -> Iterator[None]:
    assert enabled
    in_fp8.append(type(recipe).__name__)
    try:
        yield
    finally:
        in_fp8.pop()


class _Package(ModuleType):
    """A module in which any other name is a class without content."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (), {})


def install() -> None:
    """Puts the stand-in where imports find it, also for megatron-core's wrappers."""
    package, pytorch, fp8, common, optimizers = (
        _Package(f"transformer_engine{name}")
        for name in ("", ".pytorch", ".pytorch.fp8", ".common", ".pytorch.optimizers")
    )
    classes = (Linear, RMSNorm, LayerNorm, DotProductAttention, WithState)
    vars(pytorch).update({c.__name__: c for c in classes}, fp8=fp8, autocast=autocast)
    vars(pytorch).update(ops=_Package("ops"), distributed=_Package("distributed"), optimizers=optimizers)
    vars(pytorch).update(LayerNormLinear=torch.nn.Module, GroupedLinear=torch.nn.Module)
    vars(fp8).update(FP8GlobalStateManager=SimpleNamespace(is_fp8_enabled=lambda: bool(in_fp8)))
    vars(common).update(recipe=_Package("recipe"))
    vars(optimizers).update(FusedAdam=FusedAdam)
    vars(package).update(pytorch=pytorch, common=common, __version__=VERSION, __path__=[])
    for module in (package, pytorch, fp8, common, optimizers):
        sys.modules[module.__name__] = module
    if (wrappers := sys.modules.get("megatron.core.extensions.transformer_engine")) is not None:
        importlib.reload(wrappers)
