"""The model of an exported folder: any variant, from what its plugins declare.

A fixed file: variants differ in the plugins' source beside it and in config.json alone. Attention is the
plain-torch reference that the model was trained and measured with, or torch's fused softmax where that is
the same.

Shapes: b sequence, s position, n hidden size, h head, q query, k key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sinkbench.attention.reference import of_tokens, rotation
from sinkbench.export.configuration import SinkbenchConfig
from sinkbench.export.declared import Declared, declare
from sinkbench.export.layers import Attention, Layer, built, real_tokens, refuse_part_of_prefix

NO_LABEL = -100
"""What transformers leaves out of a loss."""


@dataclass
class SinkbenchOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """Beside what causal language models return, with ``output_attentions``:

    Attributes:
        slot_attentions: of each layer the weights [b, h, q] of the extra slot and the sink token together,
            which are not in ``attentions``; None for models without either.
    """

    slot_attentions: tuple[Tensor, ...] | None = None


class Decoder(nn.Module):
    """From tokens to the last hidden states."""

    def __init__(self, config: SinkbenchConfig, declared: Declared) -> None:
        super().__init__()
        self.config = config
        self.rotary = declared.positional.rotary
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        embedding = declared.positional.embedding
        self.embed_positions = built(embedding) if embedding is not None else None
        self.sink_token = (
            nn.Parameter(torch.empty(config.hidden_size)) if declared.attention.sink_token else None
        )
        self.layers = nn.ModuleList(Layer(config, declared, i) for i in range(config.num_hidden_layers))
        norm, post = declared.normalization.norm, declared.normalization.location == "post"
        self.norm = None if post else built(lambda: norm(config.hidden_size))
        self.gradient_checkpointing = False

    def forward(
        self,
        embedded_bsn: Tensor,
        mask_bk: Tensor | None,
        position_bs: Tensor | None,
        cache: Any,
        output_attentions: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None], list[Tensor | None]]:
        """Returns the last hidden states, those before every layer, weights and slot weights."""
        past = cache.get_seq_length() if cache is not None else 0
        leading = int(self.sink_token is not None)
        if self.sink_token is not None:
            if mask_bk is not None:
                mask_bk = torch.cat([mask_bk.new_ones(len(mask_bk), 1), mask_bk], 1)
            if position_bs is not None:
                position_bs = position_bs + 1
            if not past:
                first = self.sink_token.expand(len(embedded_bsn), 1, -1)
                embedded_bsn = torch.cat([first.to(embedded_bsn.dtype), embedded_bsn], 1)
                if position_bs is not None:
                    position_bs = torch.cat([position_bs.new_zeros(len(position_bs), 1), position_bs], 1)
        batch, length = embedded_bsn.shape[:2]
        tokens = real_tokens(mask_bk, batch, length, past + length, embedded_bsn.device)
        refuse_part_of_prefix(tokens, self.config.bidirectional_prefix, leading)
        if position_bs is None:
            position_bs = _positions(mask_bk, past, length, embedded_bsn.device)
        hidden, rotary = self._placed(embedded_bsn, position_bs)
        before, attentions, slots = [], [], []
        first_value = None
        for layer in self.layers:
            before.append(hidden)
            arguments = (hidden, rotary, tokens, cache, output_attentions, first_value)
            if self.gradient_checkpointing and self.training:
                recomputed: Any = self._gradient_checkpointing_func
                hidden, attention, slot, first_value = recomputed(layer.__call__, *arguments)
            else:
                hidden, attention, slot, first_value = layer(*arguments)
            if attention is not None:
                attention, slot = of_tokens(attention, slot, leading)
            attentions.append(attention)
            slots.append(slot)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if leading and not past:
            hidden, before = hidden[:, 1:], [x[:, 1:] for x in before]
            attentions = [x if x is None else x[:, :, 1:] for x in attentions]
            slots = [x if x is None else x[:, :, 1:] for x in slots]
        return hidden, before, attentions, slots

    def _placed(self, embedded_bsn: Tensor, position_bs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The embeddings with those of positions added, and cosine and sine [2, b, s, r/2]."""
        batch, length = position_bs.shape
        if self.embed_positions is not None:
            added = self.embed_positions(position_bs.flatten()).unflatten(0, (batch, length))
            embedded_bsn = embedded_bsn + added.to(embedded_bsn.dtype)
        if self.rotary is None:
            return embedded_bsn, None
        rotated = int(self.config.head_dim * self.rotary.fraction) // 2 * 2
        angles = rotation(position_bs.flatten(), rotated, self.rotary.base)
        return embedded_bsn, angles.unflatten(1, (batch, length))


def _positions(mask_bk: Tensor | None, past: int, length: int, device: Any) -> Tensor:
    """int64 [b or 1, s] of the new tokens, from 0; padding has any."""
    if mask_bk is None:
        return torch.arange(past, past + length, device=device)[None]
    return (mask_bk.long().cumsum(1) - 1).clamp(min=0)[:, past:]


class SinkbenchForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """An exported model; the subclass in modeling_sinkbench.py names its plugins' hooks."""

    config_class = SinkbenchConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _skip_keys_device_placement = "past_key_values"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SinkbenchConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config, declare(config, self.hooks()))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def hooks() -> Mapping[str, Callable[[], list[Any]]]:
        """Kind of plugin -> the hook of its module."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        """Of a model that is not loaded: normal matrices; a plugin's modules as they come."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif module is self.model.embed_tokens:
            module.weight.data.normal_(0.0, std)
        elif isinstance(module, Attention):
            for name, parameter in module.declared.items():
                module.core[name].data.normal_(parameter.mean, parameter.std)
        elif module is self.model and self.model.sink_token is not None:
            self.model.sink_token.data.normal_(0.0, std)
        elif hasattr(module, "make_again"):
            make_again: Any = module.make_again
            with torch.device("cpu"):
                again = make_again()
            for name in module._non_persistent_buffers_set:
                module.get_buffer(name).copy_(again.get_buffer(name))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> SinkbenchOutput | tuple[Any, ...]:
        """As other causal language models of transformers.

        Args:
            attention_mask: [b, s], 1 for tokens and 0 for padding, those in the cache included.
            labels: [b, s], the tokens, -100 where there is none to predict. Those of a prefix that sees
                itself are not predicted.
            cache: what transformers calls ``past_key_values`` since 5.24.

        Raises:
            ValueError: arguments do not fit together; or a cache ends within a prefix that sees itself.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask must be [batch, length], 1 for tokens and 0 for padding")
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if output_attentions is None:
            output_attentions = bool(config.output_attentions)
        if self.model.gradient_checkpointing and self.training:
            use_cache = False
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        embedded = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None if attention_mask is None else attention_mask.bool()
        past = cache.get_seq_length() if cache is not None else 0
        hidden, before, attentions, slots = self.model(embedded, mask, position_ids, cache, output_attentions)
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        logits = self.lm_head(kept)
        loss = None
        if labels is not None:
            if config.bidirectional_prefix and not past:  # a cache holds the whole prefix
                labels = self._predicted(labels, _positions(mask, 0, embedded.shape[1], labels.device))
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        output = SinkbenchOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=(*before, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            slot_attentions=tuple(slots) if output_attentions and slots[0] is not None else None,
        )
        as_tuple = return_dict is False or (return_dict is None and config.return_dict is False)
        return output.to_tuple() if as_tuple else output

    def _predicted(self, labels_bs: Tensor, position_bs: Tensor) -> Tensor:
        """The labels after a prefix whose positions see one another."""
        seen_bs = position_bs[:, -labels_bs.shape[1] :] < self.config.bidirectional_prefix
        return labels_bs.masked_fill(seen_bs, NO_LABEL)
