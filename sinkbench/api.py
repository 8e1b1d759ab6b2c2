"""All that a plugin author imports.

A plugin module imports this module, torch, megatron and its own kernels, and nothing else of
sinkbench. This module does not import torch, so that plugins can be listed in no time: import torch
inside ``build`` (or in the module that ``build`` imports), not beside the ``Plugin`` declaration.

Shape suffixes: b sequence of the batch, s position, h head, q query position, k key position,
d head size, n hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import pluggy
from pydantic import BaseModel, ConfigDict

from sinkbench.deprecation import ApiDeprecationWarning
from sinkbench.errors import PluginError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sinkbench.config import Config

__all__ = [
    "API_VERSION",
    "KINDS",
    "PROJECT",
    "ApiDeprecationWarning",
    "AttentionSpec",
    "Batch",
    "BuildContext",
    "DataTransform",
    "Elementwise",
    "ExtraSlot",
    "FeatureMap",
    "ForwardMetric",
    "Forwards",
    "HeadTransform",
    "Heads",
    "LayerCapture",
    "LossSpec",
    "Metric",
    "NormalizationSpec",
    "Observation",
    "OutputGate",
    "ParameterSpec",
    "Params",
    "Plugin",
    "PluginError",
    "PositionalSpec",
    "Rotary",
    "Rows",
    "ScoreBias",
    "Softmax",
    "WeightRule",
    "attention",
    "hookimpl",
]

API_VERSION = "1.3"
"""Version of this module. The second number grows when something is added, the first when something that
plugins use is changed or taken away; that is announced by an ApiDeprecationWarning for one version before. A
package names the version it was written for as an entry point: ``"1.0" = "sinkbench.api"`` in the group
``sinkbench.api``."""

PROJECT = "sinkbench"
"""The pluggy project name and the entry-point group."""

KINDS = ("attention", "normalization", "positional", "loss", "data_transform", "metric")

hookimpl = pluggy.HookimplMarker(PROJECT)


class Params(BaseModel):
    """Base class of a plugin's parameters: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What a plugin may know of the model it is built into. Sizes are those of the whole model,
    never of one rank: the core shards what a plugin declares."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    seq_length: int
    num_positions: int
    """seq_length, and one more with a sink token."""
    vocab_size: int
    config: Config


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One variant, registered by a hook.

    Attributes:
        name: the name a recipe uses; unique within its kind.
        summary: one line for ``sinkbench plugins list``.
        build: called with the validated parameters and the model's sizes; what it returns depends on
            the kind (AttentionSpec, NormalizationSpec, PositionalSpec, LossSpec, DataTransform, Metric).
        params: the pydantic model of the parameters.
        provides: capabilities such as "tp", "cp", "cpu" that others may require.
        requires: capabilities that another part of the recipe must provide. "forward_passes" is provided by
            ``sinkbench measure`` alone: for metrics that run the model again.
        check: returns the problems of a recipe that uses this plugin, one line each.
    """

    name: str
    summary: str
    build: Callable[[Any, BuildContext], object]
    params: type[Params] = Params
    provides: frozenset[str] = frozenset()
    requires: frozenset[str] = frozenset()
    check: Callable[[Any, Config], list[str]] | None = None


# --- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """A learned parameter that a plugin declares.

    Attributes:
        shape: sizes, or the names "heads", "kv_heads", "head_size", "hidden"; () for a single number. The
            core splits a leading "heads" or "kv_heads" over tensor-parallel ranks and replicates the rest.
        mean: mean of the initial value.
        std: standard deviation of the normal initial value; 0 gives a constant.
    """

    shape: tuple[int | str, ...]
    mean: float = 0.0
    std: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """A = exp(s) / (sum exp(s) + exp(sink_logit)), over the keys a query may see.

    Attributes:
        sink_logit: None for the plain softmax; 0 for off-by-one; the name of a declared parameter of
            shape ("heads",) for a learned sink.
    """

    sink_logit: float | str | None = None


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """A = f(s) M / Z, with M the 0/1 mask, applied after f (Gu et al. 2410.10781).

    Attributes:
        function: f in plain torch, elementwise, float32 in and out.
        normalize: False for Z = 1; True for Z = the row's sum + eps; "abs" for Z = max(|sum|, 1),
            which similarities that may be negative need.
        eps: the normaliser's constant.
        fused: dtype of the inputs -> the Triton functions s -> f(s) and (s, f(s)) -> f'(s), float32,
            for the fused kernel. By default they are written from the function, if each of its
            operations has a Triton form; else the eager backend computes the attention, and says so.
    """

    function: Callable[[Tensor], Tensor]
    normalize: bool | Literal["abs"] = False
    eps: float = 1e-8
    fused: Callable[[torch.dtype], tuple[Any, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Any rule that needs whole rows.

    Attributes:
        function: (score_bhqk float32, allowed bool broadcastable to it) -> weights of the same
            shape, zero where not allowed. The extra slot of a spec that has one is the last key.
    """

    function: Callable[[Tensor, Tensor], Tensor]


WeightRule: TypeAlias = Softmax | Elementwise | Rows


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """phi of a kernel attention: q and k become phi(q) and phi(k), after rotary, before the product.

    Attributes:
        function: (x [..., d], parameters by name) -> [..., d'], the same for queries and keys.
        parameters: names of declared parameters that it needs.
    """

    function: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExtraSlot:
    """One more key and value, visible to every query: not rotated and without a position, but mapped,
    scaled and biased as the other keys are. Its weight is the paper's alpha_*.

    Attributes:
        key: name of a declared parameter of shape ("kv_heads", "head_size") or ("head_size",).
        value: such a name, a constant vector of the head size, or None for a value of zero.
    """

    key: str
    value: str | tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """One layer's heads on a tensor-parallel rank, as its projections give them, before rotary.

    Attributes:
        query: [..., h, d].
        key, value: [..., g, d], one per kv head.
        first_value: the values [..., g, d] of layer 1, as its projection gave them (in layer 1 these are
            ``value``), if the transform asks for them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    first_value: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class HeadTransform:
    """A change to queries, keys and values, position by position: a norm of them, a mix with the values of
    the first layer. An extra slot is not changed.

    Attributes:
        function: (heads, parameters by name) -> heads of the same shapes; ``first_value`` is not read.
        parameters: names of declared parameters that it needs.
        first_value: it needs the values of layer 1.
    """

    function: Callable[[Heads, Mapping[str, Tensor]], Heads]
    parameters: tuple[str, ...] = ()
    first_value: bool = False


@dataclass(frozen=True, kw_only=True)
class OutputGate:
    """A factor on the output of each head, from the layer's input at the same position.

    Attributes:
        function: (input [..., n], parameters by name) -> [..., h] or [..., h, d]. The input is what the
            projections read, after the norm if there is one before them. A parameter whose shape begins with
            "heads" comes with this rank's heads.
        parameters: names of declared parameters that it needs.
    """

    function: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The declaration of an attention variant: O = A V with A = output_scale rule(scale q.k + bias).

    The core makes from it the megatron module, the choice of kernel and the measured weights; the
    one truth is the plain-torch reference ``sinkbench.attention.reference``.

    Attributes:
        rule: how a row of scores becomes a row of weights.
        parameters: learned parameters by name.
        scale: factor on q.k; None means 1/sqrt(head_size).
        score_bias: a constant added to every score, or the name of a declared parameter of shape
            ("heads",).
        window: a query sees this many newest keys, itself included; None means all.
        head_transform: changes queries, keys and values before rotary.
        feature_map: maps queries and keys before their product.
        extra_slot: one more key and value.
        output_scale: factor on the weights, so that softmax rows sum to it.
        output_bias: name of a declared parameter of shape ("heads", "head_size") or ("head_size",),
            added to the output of each head.
        output_gate: factor on the output of each head, after the bias.
        combine: "concat" projects the concatenated heads; "sum" adds them and projects the sum.
        sink_token: a learned token stands before every sequence, at position 0: a window may leave it out.
    """

    rule: WeightRule
    parameters: Mapping[str, ParameterSpec] = field(default_factory=dict)
    scale: float | None = None
    score_bias: float | str | None = None
    window: int | None = None
    head_transform: HeadTransform | None = None
    feature_map: FeatureMap | None = None
    extra_slot: ExtraSlot | None = None
    output_scale: float = 1.0
    output_bias: str | None = None
    output_gate: OutputGate | None = None
    combine: Literal["concat", "sum"] = "concat"
    sink_token: bool = False

    @property
    def carries_first_value(self) -> bool:
        """Layers need the values of layer 1."""
        return self.head_transform is not None and self.head_transform.first_value

    def __post_init__(self) -> None:
        undeclared = sorted(self._named() - self.parameters.keys())
        if undeclared:
            raise PluginError(
                "AttentionSpec",
                f"names {', '.join(undeclared)}, which is not declared",
                "add it to parameters",
            )

    def _named(self) -> set[str]:
        """Declared parameters that the parts of this declaration speak of."""
        slot, rule = self.extra_slot, self.rule
        names: set[Any] = {self.score_bias, self.output_bias}
        names |= {rule.sink_logit} if isinstance(rule, Softmax) else set()
        names |= {slot.key, slot.value} if slot is not None else set()
        for part in (self.head_transform, self.feature_map, self.output_gate):
            names |= set(part.parameters) if part is not None else set()
        return {name for name in names if isinstance(name, str)}


# --- normalization and position -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NormalizationSpec:
    """Where norms sit and how one is made.

    Attributes:
        norm: size -> module that normalises the last dimension of [..., size]; its parameters have
            shape [size].
        location: "pre" norms the input of each sublayer, and the end of the stack; "post" norms the
            sum after each residual addition, and nothing at the end; "sandwich" norms input and
            output of each sublayer, and the end.
    """

    norm: Callable[[int], torch.nn.Module]
    location: Literal["pre", "post", "sandwich"] = "pre"


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary embedding of q and k (Su et al. 2104.09864), halves rotated as in GPT-NeoX.

    Attributes:
        base: theta of the frequencies base^(-2i/d).
        fraction: the leading share of the head size that is rotated.
    """

    base: float = 10000.0
    fraction: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ScoreBias:
    """A bias on the scores from the distance of query and key, in every layer.

    Attributes:
        function: (distance_qk int64, heads int64, parameters by name) -> [h, q, k] float32, for the
            given heads of the model; a parameter split over heads comes with those heads' rows.
        parameters: learned parameters by name, one set a layer.
        slope: (heads int64, parameters by name) -> m [h] float32 of a bias that is -m |distance|, which the
            fused kernel then computes instead of looking it up; ``function`` gives the same.
        constant_from: from this distance on ``function`` gives the same, by the same parameters, for all, so
            that the fused kernel looks up nearer ones only.
    """

    function: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    parameters: Mapping[str, ParameterSpec] = field(default_factory=dict)
    slope: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None
    constant_from: int | None = None


@dataclass(frozen=True, kw_only=True)
class PositionalSpec:
    """Any of the places where a model can learn of positions.

    Attributes:
        embedding: makes a module position_ids_s int64 -> [s, n], added to the token embeddings. There
            are BuildContext.num_positions positions.
        rotary: rotary settings for q and k.
        score_bias: added to the attention scores.
    """

    embedding: Callable[[], torch.nn.Module] | None = None
    rotary: Rotary | None = None
    score_bias: ScoreBias | None = None


def attention(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    position_bias: ScoreBias | None = None,
    position_parameters: Mapping[str, Tensor] | None = None,
    prefix: int = 0,
    document_start: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention O = A V as declared, by the fastest program that can compute it here, as a model in
    training does; gradients of all tensors included. What a declaration says of the layer around it
    (``head_transform``, ``output_gate``, ``combine``, ``sink_token``) is not part of it, nor are the
    projections and the rotary embedding.

    Args:
        spec: the declaration, such as a plugin's ``build`` returns.
        query: [b, h, t, d]; any strides.
        key, value: [b, g, t, d], for h a multiple of g; query heads h/g i .. h/g (i + 1) - 1 use kv head i.
        parameters: a tensor for each parameter that the declaration names, of the declared shape.
        position_bias: added to the scores, such as a positional plugin's.
        position_parameters: a tensor for each of its parameters.
        prefix: the first so many positions see one another.
        document_start: int32 or int64 [b, t], for sequences of several documents: the position at which the
            document of each position begins. A query then sees keys of its own document only. Not together
            with ``prefix``.
        backend: "auto", or the backend that shall compute it: "flash", "flex", "sdpa", "linear", "triton" or
            "eager".

    Returns:
        [b, h, t, d] of the value's dtype.

    Raises:
        PluginError: shapes, dtypes or parameters do not fit the declaration or one another.
        RecipeError: the named backend cannot compute it; the message lists what it lacks.

    Example:
        >>> import torch
        >>> spec = AttentionSpec(rule=Softmax(sink_logit=0.0), window=128)
        >>> query, key, value = torch.randn(3, 1, 8, 256, 64)
        >>> attention(spec, query, key, value).shape
        torch.Size([1, 8, 256, 64])
    """
    from sinkbench.attention import operation

    return operation.attention(
        spec,
        query,
        key,
        value,
        parameters=parameters or {},
        position_bias=position_bias,
        position_parameters=position_parameters or {},
        prefix=prefix,
        document_start=document_start,
        backend=backend,
    )


# --- loss and data ------------------------------------------------------------------------------

Batch: TypeAlias = "dict[str, Tensor]"
"""tokens_bs int64. A data source gives s = seq_length + 1 tokens; a loss's transform gives
``tokens`` and ``targets`` of seq_length, and ``weights`` float32 of the same shape. Other entries
ride along: ``trigger`` bool of Bigram-Backcopy; ``loss_mask`` bool of chat data, true for the tokens of
responses; under data.document_mask ``document_start`` int32, at which position each position's document
begins, which attention has from the data, whatever a transform makes of it."""


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """The token loss: sum(weights * cross entropy) / (number of weights above 0) over the global batch.

    Attributes:
        transform: Batch with tokens [b, seq_length + 1] -> Batch with tokens, targets, weights.
        z_loss: factor on log(Z)^2 (0 turns it off).
        bidirectional_prefix: the first so many positions of a sequence see one another (prefix LM).
        needs: entries of the batch beside tokens that the data must give.
    """

    transform: Callable[[Batch], Batch]
    z_loss: float = 0.0
    bidirectional_prefix: int = 0
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class DataTransform:
    """A change to token sequences, before the loss's transform. It depends on the batch alone, row by
    row, so that a sequence is the same under every parallel layout and after a resume.

    Attributes:
        transform: Batch with tokens [b, s] -> Batch of the same shapes; training and validation have
            s = seq_length + 1.
        on_probes: probe sequences are changed too, rather than natural.
    """

    transform: Callable[[Batch], Batch]
    on_probes: bool = False


# --- measurement --------------------------------------------------------------------------------

BLOCK_ELEMENTS = 2**24
"""Attention weights that a metric holds at once, 64 MiB of them."""


@dataclass(frozen=True, kw_only=True)
class LayerCapture:
    """What one layer did on a batch of probe sequences: all heads, all positions, one pipeline
    stage's layer, whatever the parallel layout. Tensors are float32 on the model's device.

    Attributes:
        layer: number of the layer, from 1. Layers without attention are numbered too, but not captured.
        weight_rows: (start, end) -> attention weights A of the queries start .. end - 1 (from 0) as the
            model used them, [b, h, end - start, k]; zero where masked. Whether they were kept or are
            computed when asked for depends on the length; ``weight_blocks`` works at any.
        slot_bhq: weight of the extra slot and of the sink token together, if the model has one; the sink
            token is in none of the other tensors.
        query_bhsd, key_bhsd, value_bhsd: after a head transform and rotary; keys and values one per kv head.
        input_bsn, output_bsn: the residual stream before and after the layer.
        batch: the probe batch (tokens_bs, and what the data source added).
        key_sums: (count, eps) -> of each of the first keys, summed over the queries from it on, A and
            |A| / (sum of the row's |A| + eps), both [b, h, count]; and the sum of each row [b, h, q]. The
            extra slot is part of its row. None where there is no kernel for it: then sum ``weight_blocks``.
    """

    layer: int
    weight_rows: Callable[[int, int], Tensor]
    slot_bhq: Tensor | None = None
    query_bhsd: Tensor
    key_bhsd: Tensor
    value_bhsd: Tensor
    input_bsn: Tensor
    output_bsn: Tensor
    batch: Batch
    key_sums: Callable[[int, float], tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def weights_bhqk(self) -> Tensor:
        """The whole matrix A: only for sequences short enough to hold it."""
        return self.weight_rows(0, self.query_bhsd.shape[2])

    def weight_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All of A, the rows of a few queries at a time: the number of the first query, from 0, and
        A [b, h, q, k] of it and the following ones."""
        batch, heads, length, _ = self.query_bhsd.shape
        rows = max(1, BLOCK_ELEMENTS // (batch * heads * length))
        for start in range(0, length, rows):
            yield start, self.weight_rows(start, min(start + rows, length))


Observation: TypeAlias = "dict[str, Tensor]"


class Metric(Protocol):
    """A measurement, stateless so that layers may live on different pipeline stages.

    ``observe`` reduces one layer's capture to small tensors whose first dimension is the sequence;
    the core concatenates batches and gathers layers. ``result`` gets one such dict per layer, in
    order, and returns floats (which go to metrics.jsonl) or nested lists of floats (which go to the
    run's measure folder): by layer, then by head or kv head, then by position; a list whose name ends
    in ``_tokens`` has the position last. A key that two metrics of a recipe return is an error.
    """

    def observe(self, capture: LayerCapture) -> Observation: ...

    def result(self, layers: Sequence[Observation]) -> dict[str, float | list[Any]]: ...


class Forwards(Protocol):
    """Forward passes of the model under measurement over all probe sequences, as it is or changed."""

    @property
    def length(self) -> int:
        """Tokens of a probe sequence."""

    @property
    def first_query(self) -> int:
        """The first query, from 0, that does not see the token it predicts: p - 1 where the first p tokens
        see one another (prefix LM). Losses of those before it belong in no mean."""

    def losses(
        self,
        *,
        visible: Callable[[Tensor, Tensor], Tensor] | None = None,
        linear_weight: Callable[[Tensor], Tensor] | None = None,
        linear_input: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Cross entropy in nats of every token but the first, float32 [b, s - 1], on the CPU: of the token
        that each query but the last predicts.

        Args:
            visible: (query positions, key positions), int64 from 0 and broadcastable -> bool: which of
                the keys that the model lets a query see it shall still see, in every layer.
            linear_weight: replaces the weight of every linear map within the layers.
            linear_input: replaces the inputs [b, s, n] of these maps.
        """


class ForwardMetric(Protocol):
    """A measurement that needs forward passes of its own, and so is made only by ``sinkbench measure``,
    when asked for by name."""

    def measure(self, model: Forwards) -> dict[str, float | list[Any]]: ...
