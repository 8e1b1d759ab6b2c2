"""One layer of an exported model, and the attention of padded and cached sequences.

Shapes: b sequence, s position, n hidden size, h head, g kv head, d head size, q query, k key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sinkbench.api import Heads, ParameterSpec
from sinkbench.attention.reference import Problem, attend, rotate, weights
from sinkbench.attention.sdpa import run as fused_softmax
from sinkbench.export.configuration import SinkbenchConfig
from sinkbench.export.declared import Declared
from sinkbench.feed_forward import ACTIVATIONS


@dataclass(frozen=True)
class Tokens:
    """Real tokens of one sequence, or of all at once where no sequence is padded.

    Attributes:
        sequence: its number; None for all.
        at_q, at_k: where queries and keys lie in the tensors; None for everywhere.
        position_q, position_k: int64, from 0.
    """

    sequence: int | None
    at_q: Tensor | None
    at_k: Tensor | None
    position_q: Tensor
    position_k: Tensor


def real_tokens(mask_bk: Tensor | None, batch: int, queries: int, keys: int, device: Any) -> list[Tokens]:
    """Padding is cut away, so that every sequence attends as if it were alone.

    Args:
        mask_bk: true for tokens, the cached ones included; None if nothing is padded.
    """
    if mask_bk is None or bool(mask_bk.all()):
        position = torch.arange(keys, device=device)
        return [Tokens(None, None, None, position[keys - queries :], position)]
    found = []
    for number in range(batch):
        at_k = mask_bk[number].nonzero()[:, 0]
        position = torch.arange(at_k.numel(), device=device)
        new = at_k >= keys - queries
        found.append(Tokens(number, at_k[new] - (keys - queries), at_k, position[new], position))
    return found


def refuse_part_of_prefix(tokens: list[Tokens], prefix: int, leading: int) -> None:
    """The first ``prefix`` tokens see one another, so they are computed together.

    Args:
        leading: positions before the first token: 1 with a sink token.

    Raises:
        ValueError: a cache ends within them, so that what it holds has not seen the new ones.
    """
    for t in tokens:
        new = t.position_q.numel()
        cached = t.position_k.numel() - new
        if prefix and new and 0 < cached < leading + prefix:
            raise ValueError(
                f"the cache holds {cached - leading} of the first {prefix} tokens, which see one another; "
                f"give all {prefix} in one call, or set use_cache=False"
            )


class Attention(nn.Module):
    """Projections, rotary embedding and cache around the declared attention."""

    def __init__(self, config: SinkbenchConfig, declared: Declared, number: int) -> None:
        super().__init__()
        self.config = config
        self.number = number
        spec = self.spec = declared.attention
        self.position_bias = declared.positional.score_bias
        n, d = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        bias = config.linear_bias != "none"
        self.q_proj = nn.Linear(n, heads * d, bias=bias)
        self.k_proj = nn.Linear(n, groups * d, bias=bias)
        self.v_proj = nn.Linear(n, groups * d, bias=bias)
        summed = spec.combine == "sum"
        self.o_proj = nn.Linear(
            d if summed else heads * d, n, bias=config.linear_bias == "all" and not summed
        )
        self.scale = d**-0.5 if spec.scale is None else spec.scale
        self.declared = {**spec.parameters}
        if self.position_bias is not None:
            self.declared |= {f"position_{k}": v for k, v in self.position_bias.parameters.items()}
        empty = {name: nn.Parameter(torch.empty(self._shape(p))) for name, p in self.declared.items()}
        self.core = nn.ParameterDict(empty)

    def _shape(self, parameter: ParameterSpec) -> list[int]:
        config = self.config
        sizes = {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_size": config.head_dim,
            "hidden": config.hidden_size,
        }
        return [sizes[size] if isinstance(size, str) else size for size in parameter.shape]

    def forward(
        self,
        hidden_bsn: Tensor,
        rotary: Tensor | None,
        tokens: list[Tokens],
        cache: Any,
        output_attentions: bool,
        first_value: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Returns the output [b, s, n]; if wanted, the weights [b, h, q, k] and those of the extra slot
        [b, h, q], where padding has zeros; and the values of layer 1, if the attention uses them.

        Args:
            rotary: cosine and sine [2, b, s, r/2].
            first_value: the values of layer 1 [b, s, g, d], for layers after it.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        projected = [p(hidden_bsn).unflatten(-1, (-1, self.config.head_dim)) for p in projections]
        if self.number == 0 and self.spec.carries_first_value:
            first_value = projected[2]
        query, key, value = (x.transpose(1, 2) for x in self._transformed(projected, first_value))
        if rotary is not None:
            cos, sin = rotary[:, :, None]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        problems = [self._problem(query, key, value, t) for t in tokens]
        heads_bhsd = self._placed([self.attend(p) for p in problems], tokens, query.shape)
        if self.spec.output_gate is not None:
            gate = self.spec.output_gate
            factor = gate.function(hidden_bsn, self._declared_values(gate.parameters)).to(heads_bhsd.dtype)
            factor = factor[..., None] if factor.dim() == hidden_bsn.dim() else factor
            heads_bhsd = heads_bhsd * factor.transpose(1, 2)
        if self.spec.combine == "sum":
            output: Tensor = self.o_proj(heads_bhsd.sum(1))
        else:
            output = self.o_proj(heads_bhsd.transpose(1, 2).flatten(2))
        if not output_attentions:
            return output, None, None, first_value
        measured = [weights(p) for p in problems]
        shape = (*query.shape[:3], key.shape[2])
        attention = self._placed([w for w, _ in measured], tokens, shape, over_keys=True)
        slots = [slot[..., None] for _, slot in measured if slot is not None]
        slot = self._placed(slots, tokens, (*query.shape[:3], 1))[..., 0] if slots else None
        return output, attention, slot, first_value

    def _transformed(self, projected: list[Tensor], first_value: Tensor | None) -> tuple[Tensor, ...]:
        """Query, key and value [b, s, ., d], as the declaration changes them."""
        query, key, value = projected
        transform = self.spec.head_transform
        if transform is None:
            return query, key, value
        heads = Heads(query=query, key=key, value=value, first_value=first_value)
        changed = transform.function(heads, self._declared_values(transform.parameters))
        return tuple(x.to(query.dtype) for x in (changed.query, changed.key, changed.value))

    def _declared_values(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.core[name] for name in names}

    def attend(self, problem: Problem) -> Tensor:
        """O = A V, [b, h, q, d]. ``sinkbench measure`` watches here."""
        run = fused_softmax if self.config._attn_implementation == "sdpa" else attend
        return run(problem)

    def _problem(self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens) -> Problem:
        if tokens.sequence is not None:
            number = tokens.sequence
            query = query[number : number + 1, :, tokens.at_q]
            key, value = (x[number : number + 1, :, tokens.at_k] for x in (key, value))
        of_position = {} if self.position_bias is None else self.position_bias.parameters
        return Problem(
            spec=self.spec,
            query_bhqd=query,
            key_bgkd=key,
            value_bgkd=value,
            position_q=tokens.position_q,
            position_k=tokens.position_k,
            aligned=tokens.position_q.numel() == tokens.position_k.numel(),
            scale=self.scale,
            heads=torch.arange(self.config.num_attention_heads, device=query.device),
            parameters=self._declared_values(self.spec.parameters),
            position_bias=self.position_bias,
            position_parameters={name: self.core[f"position_{name}"] for name in of_position},
            prefix=self._prefix(),
        )

    def _prefix(self) -> int:
        """A sink token stands before a prefix and belongs to it."""
        prefix: int = self.config.bidirectional_prefix
        return prefix + int(self.spec.sink_token) if prefix else 0

    @staticmethod
    def _placed(
        parts: list[Tensor], tokens: list[Tokens], shape: tuple[int, ...], over_keys: bool = False
    ) -> Tensor:
        """The sequences' results [1, h, q, ...] where their tokens lie."""
        if tokens[0].sequence is None:
            return parts[0]
        rows = []
        for part, t in zip(parts, tokens, strict=True):
            assert t.at_q is not None
            assert t.at_k is not None
            row = part[0]
            if over_keys:
                row = row.new_zeros(*row.shape[:2], shape[3]).index_copy(2, t.at_k, row)
            rows.append(row.new_zeros(shape[1], shape[2], row.shape[2]).index_copy(1, t.at_q, row))
        return torch.stack(rows)


class FeedForward(nn.Module):
    """Down(activation(Up x)), or gated: Down(activation(Gate x) * Up x)."""

    def __init__(self, config: SinkbenchConfig) -> None:
        super().__init__()
        self.activation, gated = ACTIVATIONS[config.ffn]
        assert config.intermediate_size is not None
        n, width, bias = config.hidden_size, config.intermediate_size, config.linear_bias == "all"
        self.gate_proj = nn.Linear(n, width, bias=bias) if gated else None
        self.up_proj = nn.Linear(n, width, bias=bias)
        self.down_proj = nn.Linear(width, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            output: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        else:
            output = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return output


class Layer(nn.Module):
    """Attention and feed-forward, each around the residual stream x:

    pre: x + f(norm(x)); post: norm(x + f(x)); sandwich: x + norm(f(norm(x))). With a parallel residual both
    read the same x.
    """

    def __init__(self, config: SinkbenchConfig, declared: Declared, number: int) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        location = self.location = declared.normalization.location
        self.self_attn = Attention(config, declared, number)
        self.mlp = None if config.ffn == "none" else FeedForward(config)
        sublayers = ("attention",) if self.mlp is None else ("attention", "mlp")
        places = {"pre": ("input",), "post": ("output",), "sandwich": ("input", "output")}[location]
        names = [f"{sublayer}_{place}" for sublayer in sublayers for place in places]
        norm = declared.normalization.norm
        self.norms = nn.ModuleDict({name: built(lambda: norm(config.hidden_size)) for name in names})

    def forward(self, x: Tensor, *attention_arguments: Any) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """x [b, s, n] -> the same shape, and what ``Attention`` returns beside its output."""
        attended, *beside = self.self_attn(self._read(x, "attention"), *attention_arguments)
        after = self._write(x, attended, "attention")
        if self.mlp is not None:
            read = x if self.parallel_residual else after
            after = self._write(after, self.mlp(self._read(read, "mlp")), "mlp")
        return after, *beside

    def _read(self, x: Tensor, sublayer: str) -> Tensor:
        return x if self.location == "post" else self.norms[f"{sublayer}_input"](x)

    def _write(self, x: Tensor, added: Tensor, sublayer: str) -> Tensor:
        if self.location == "post":
            normed: Tensor = self.norms[f"{sublayer}_output"](x + added)
            return normed
        return x + (self.norms[f"{sublayer}_output"](added) if self.location == "sandwich" else added)


def built(factory: Callable[[], nn.Module]) -> nn.Module:
    """A plugin's module, which remembers how it was made: transformers makes models without memory for
    their tensors, and loads all of them but buffers that are not saved."""
    module = factory()
    for name, part in module.named_modules():
        if part._non_persistent_buffers_set:
            part.make_again = lambda name=name: factory().get_submodule(name)
    return module
