"""One transformer layer for megatron's TransformerBlock, from the plugins' declarations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    get_transformer_layer_offset,
)
from torch import Tensor

from sinkbench.api import NormalizationSpec
from sinkbench.megatron import transformer_engine
from sinkbench.megatron.attention import AttentionParts, SelfAttention
from sinkbench.megatron.feed_forward import FeedForward
from sinkbench.megatron.first_value import FirstValue
from sinkbench.megatron.fusions import compiled
from sinkbench.megatron.norms import By, made
from sinkbench.megatron.transformer_engine import Fp8


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What the plugins of a recipe contribute to a layer."""

    attention: AttentionParts
    normalization: NormalizationSpec
    ffn: bool
    parallel_residual: bool = False
    fused: bool = False
    """norms with the residual addition before them, activations, and rotation are compiled."""
    linears: Literal["local", "te"] = "local"
    overlapped: bool = False
    """local linear maps' communication runs beside their products."""
    norms: By = "local"
    fp8: Fp8 | None = None
    """of products while training."""

    @property
    def fused_norms(self) -> bool:
        """Other packages' norms are kernels of their own already."""
        return self.fused and self.norms == "local"


def make_norm(parts: LayerParts, config: TransformerConfig) -> torch.nn.Module:
    """A norm on the model's device and dtype; its gradients are partial sums under sequence parallelism,
    where each rank sees its share of the positions."""
    norm = made(parts.normalization.norm(config.hidden_size), parts.norms)
    norm = norm.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def normed(norm: torch.nn.Module, x: Tensor) -> Tensor:
    result: Tensor = norm(x)
    return result


def sum_and_normed(norm: torch.nn.Module, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after an addition, and what the next sublayer reads of it."""
    x = x + added
    return x, norm(x)


def sum_normed(norm: torch.nn.Module, x: Tensor, added: Tensor) -> Tensor:
    result: Tensor = norm(x + added)
    return result


def sum_with_normed(norm: torch.nn.Module, x: Tensor, added: Tensor) -> Tensor:
    result: Tensor = x + norm(added)
    return result


class Read:
    """What a norm makes of the residual stream. Fused, it may be made ahead, in one kernel with the addition
    that ends the layer before; so is their gradient then. These are four passes over the residual stream
    forward and four backward, where apart they are five and six.

    The layer before returns the sum all the same, for whatever else reads or changes it.
    """

    def __init__(self, norm: torch.nn.Module, fused: bool) -> None:
        self.norm = norm
        self._fused = fused
        self._ahead: tuple[Tensor, Tensor] | None = None
        """Hidden states, and what is read of them."""

    def of(self, x: Tensor) -> Tensor:
        ahead, self._ahead = self._ahead, None
        # A hook may have put other hidden states in the place of those that the layer before returned.
        if ahead is not None and ahead[0] is x:
            return ahead[1]
        return compiled(normed)(self.norm, x) if self._fused else normed(self.norm, x)

    def of_sum(self, x: Tensor, added: Tensor) -> Tensor:
        """The sum, of which is read next."""
        x, read = compiled(sum_and_normed)(self.norm, x, added)
        self._ahead = (x, read)
        return x


class Layer(MegatronModule, BaseTransformerLayer):  # type: ignore[misc]
    """Attention and feed-forward, each around the residual stream x:

    pre: x + f(norm(x)); post: norm(x + f(x)); sandwich: x + norm(f(norm(x))). With a parallel residual both
    read the same x.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerParts,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, pg_collection.pp.rank()
        )
        self.location = submodules.normalization.location
        self.parallel_residual = submodules.parallel_residual
        self.fused_norms = submodules.fused_norms
        self.fp8 = submodules.fp8
        linears = transformer_engine.linears(submodules.linears, submodules.overlapped)
        self.attention = SelfAttention(
            config, submodules.attention, self.layer_number, pg_collection, submodules.fused, linears
        )
        self.to_next_stage: FirstValue | None = None
        """Set on the last layer of a stage whose followers need the values of layer 1."""
        self.next_read: Read | None = None
        """Set where this layer's last addition is one kernel with the norm that follows."""
        maps = MLPSubmodules(linear_fc1=linears.column, linear_fc2=linears.row)
        block = FeedForward if submodules.fused else MLP
        self.mlp = block(config, maps, tp_group=pg_collection.tp) if submodules.ffn else None
        sublayers = ("attention", "mlp") if submodules.ffn else ("attention",)
        self.norms = torch.nn.ModuleDict(
            {
                name: make_norm(submodules, config)
                for sublayer in sublayers
                for name in self._norm_names(sublayer)
            }
        )
        if self.location == "pre":
            self.first_read = Read(self.norms["attention_input"], submodules.fused_norms)

    def _norm_names(self, sublayer: str) -> list[str]:
        before, after = f"{sublayer}_input", f"{sublayer}_output"
        return {"pre": [before], "post": [after], "sandwich": [before, after]}[self.location]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, n] -> the same shape. TransformerBlock passes more arguments than a
        decoder needs; masks follow from positions, but for documents: ``attention_mask`` is where that of
        each position begins, int32 [b, s] of the whole sequence. What it carries from layer to layer for
        cross-attention carries the values of layer 1 here."""
        with transformer_engine.products_in(self.fp8 if self.training else None):
            return self._forward(hidden_states, attention_mask, context, rotary_pos_emb)

    def _forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        first_value: Tensor | None,
        rotary_pos_emb: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        def attention(x: Tensor) -> Tensor:
            nonlocal first_value
            attended: Tensor
            attended, first_value = self.attention(x, rotary_pos_emb, first_value, attention_mask)
            return attended

        if self.parallel_residual:
            added = self._after_norm(hidden_states, attention, "attention")
            hidden_states = hidden_states + added + self._after_norm(hidden_states, self._mlp, "mlp")
        elif self.location == "pre":
            added = self._dropout(attention(self.first_read.of(hidden_states)))
            if self.mlp is not None:
                norm = self.norms["mlp_input"]
                hidden_states, read = self._fuse(sum_and_normed)(norm, hidden_states, added)
                added = self._dropout(self._mlp(read))
            ends = self.next_read
            hidden_states = hidden_states + added if ends is None else ends.of_sum(hidden_states, added)
        else:
            hidden_states = self._around(hidden_states, attention, "attention")
            if self.mlp is not None:
                hidden_states = self._around(hidden_states, self._mlp, "mlp")
        if self.to_next_stage is not None:
            assert first_value is not None
            hidden_states = self.to_next_stage.join(hidden_states, first_value)
        return hidden_states, first_value

    def _mlp(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        output, bias = self.mlp(x)
        biased: Tensor = output if bias is None else output + bias
        return biased

    def _around(self, x: Tensor, sublayer: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """Norms after the sublayer."""
        norm = self.norms[f"{name}_output"]
        result: Tensor
        if self.location == "post":
            result = self._fuse(sum_normed)(norm, x, self._dropout(sublayer(x)))
        else:
            result = self._fuse(sum_with_normed)(norm, x, self._after_norm(x, sublayer, name))
        return result

    def _after_norm(self, x: Tensor, sublayer: Callable[[Tensor], Tensor], name: str) -> Tensor:
        return self._dropout(sublayer(self._fuse(normed)(self.norms[f"{name}_input"], x)))

    def _fuse(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function) if self.fused_norms else function

    def _dropout(self, x: Tensor) -> Tensor:
        probability = self.config.hidden_dropout
        return torch.nn.functional.dropout(x, probability, self.training) if probability else x


def read_ahead(layers: Sequence[Layer], last: Read | None) -> None:
    """Lets each layer of a stage make what is read next, where one kernel does that with its last addition.
    Not where a layer is computed again in the backward pass: that knows of a layer's arguments alone.

    Args:
        last: of the last layer's sum; None if another stage reads it.
    """
    for layer, following in zip_longest(layers, layers[1:]):
        apart = layer.parallel_residual or layer.config.recompute_granularity == "full"
        if layer.fused_norms and layer.location == "pre" and not apart:
            layer.next_read = last if following is None else following.first_read


def layer_specs(parts: LayerParts, count: int) -> TransformerBlockSubmodules:
    """What TransformerBlock builds its layers from."""
    return TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=Layer, submodules=parts)] * count, layer_norm=None
    )
