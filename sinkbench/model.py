"""Resolved plugins to a trainable model: this rank's pipeline stages, wrapped for data parallelism."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sinkbench import plugins
from sinkbench.api import (
    AttentionSpec,
    BuildContext,
    DataTransform,
    Elementwise,
    LossSpec,
    NormalizationSpec,
    PositionalSpec,
    ScoreBias,
)
from sinkbench.attention.backends import Backend, Use, choose
from sinkbench.batching import CARD_TOKENS, DEFAULT_TOKENS
from sinkbench.config import Config, has_document_mask, padded_vocab_size
from sinkbench.errors import PluginError, RecipeError

if TYPE_CHECKING:
    from sinkbench.megatron.parallel import Layout
    from sinkbench.plugins import Chosen, Resolved

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Declarations:
    """What the plugins of a recipe declare."""

    context: BuildContext
    attention: AttentionSpec
    normalization: NormalizationSpec
    positional: PositionalSpec
    loss: LossSpec
    backend: Backend
    norms: Literal["local", "te", "apex"]
    """whose modules, see ``model.norms``."""
    transforms: tuple[DataTransform, ...]
    padded_vocab_size: int


def build_context(config: Config, vocab_size: int) -> BuildContext:
    """What plugins may know of a recipe's model, before any of them has added to it."""
    model = config.model
    return BuildContext(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_kv_heads=model.kv_heads,
        head_size=model.head_dim,
        seq_length=model.seq_length,
        num_positions=model.seq_length,
        vocab_size=vocab_size,
        config=config,
    )


def declare(config: Config, resolved: Resolved, vocab_size: int) -> Declarations:
    """Builds every plugin of the recipe.

    Args:
        vocab_size: size of the data's vocabulary.

    Raises:
        RecipeError: the requested backend cannot do what the attention declares, the vocabulary does not
            divide over tensor-parallel ranks, or what two plugins declare does not go together.
        PluginError: a plugin built something that its kind does not allow.
    """
    from sinkbench.megatron import norms

    model = config.model
    padded = padded_vocab_size(model.vocab_size or vocab_size)
    if padded % config.parallel.tensor:
        raise RecipeError(
            "parallel.tensor",
            f"the padded vocabulary of {padded} is not divisible by {config.parallel.tensor}",
            "choose another tensor-parallel size",
        )
    context = build_context(config, vocab_size)
    attention = _built(resolved.attention, context, AttentionSpec)
    if attention.sink_token:
        _check_sink_token(config)
        context = replace(context, num_positions=model.seq_length + 1)
    if attention.combine == "sum" and model.linear_bias == "all":
        problem = "all: the projection of summed heads (combine: sum) has no bias"
        raise RecipeError("model.linear_bias", problem, "set it to qkv or none, or heads to combine: concat")
    normalization = _built(resolved.normalization, context, NormalizationSpec)
    if model.parallel_residual:
        _check_parallel_residual(normalization)
    positional = _built(resolved.positional, context, PositionalSpec)
    loss = _built(resolved.loss, context, LossSpec)
    if positional.score_bias is not None:
        _check_positive_sums(attention, positional.score_bias, context, loss.bidirectional_prefix)
    if has_document_mask(config):
        _check_documents(attention, loss)
    return Declarations(
        context=context,
        attention=attention,
        normalization=normalization,
        positional=positional,
        loss=loss,
        backend=choose(attention, _use(config, positional, loss), model.backend),
        norms=norms.choose(model.norms, model.backend, normalization, model.hidden_size),
        transforms=tuple(_built(chosen, context, DataTransform) for chosen in resolved.transforms),
        padded_vocab_size=padded,
    )


def _use(config: Config, positional: PositionalSpec, loss: LossSpec) -> Use:
    from sinkbench.megatron.parallel import world_size
    from sinkbench.megatron.step_graph import replays

    device = _device(config)
    return Use(
        device=device,
        head_size=config.model.head_dim,
        split_sequence=config.parallel.context > 1,
        position_bias=positional.score_bias is not None,
        learned_bias=positional.score_bias is not None and bool(positional.score_bias.parameters),
        prefix=loss.bidirectional_prefix > 0,
        documents=has_document_mask(config),
        half=config.train.precision == "bf16",
        deterministic=config.train.deterministic,
        replayed=replays(config, device, world_size()),
    )


def _device(config: Config) -> str:
    import torch

    return "cuda" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu"


def most_tokens(config: Config, backend: str) -> int:
    """Of a micro-batch whose size the recipe leaves open.

    Args:
        backend: which computes attention.
    """
    import torch

    from sinkbench.megatron import fusions

    device = torch.device(_device(config))
    holds_all = backend == "eager" or "loss" not in fusions.chosen(config, device)
    return DEFAULT_TOKENS if device.type == "cpu" or holds_all else CARD_TOKENS


def _check_sink_token(config: Config) -> None:
    if config.parallel.sequence or config.parallel.context > 1:
        raise RecipeError(
            "model.attention",
            "a sink token makes the sequence one longer, which sequence and context parallelism cannot split",
            "set parallel.sequence: false and parallel.context: 1",
        )
    if config.train.fp8 is not None:
        problem = "a sink token makes the sequence one longer, which products in fp8 cannot take"
        raise RecipeError("model.attention", problem, "remove train.fp8")


def _check_documents(attention: AttentionSpec, loss: LossSpec) -> None:
    """A prefix, and a sink token, are of a sequence and not of each of its documents."""
    lacks = {
        f"a prefix of {loss.bidirectional_prefix} positions that see one another": loss.bidirectional_prefix,
        "a sink token in front of the sequence": attention.sink_token,
    }
    for what, there in lacks.items():
        if there:
            problem = f"does not go together with {what}"
            raise RecipeError("data.document_mask", problem, "write false, or leave that out")


def _check_positive_sums(
    attention: AttentionSpec, bias: ScoreBias, context: BuildContext, prefix: int
) -> None:
    """Where a rule is the score itself, the sum that rows are divided by is above zero only as long as a
    feature map makes scores positive and no position bias takes from them."""
    import torch

    rule = attention.rule
    if not isinstance(rule, Elementwise) or rule.normalize is not True:
        return
    below = -torch.logspace(-3, 3, 64)
    if not bool((rule.function(below) < 0).any()):
        return
    if not bias.parameters:
        distance_qk = torch.arange(-prefix, context.num_positions)[None]
        if bool((bias.function(distance_qk, torch.arange(context.num_heads), {}) >= 0).all()):
            return
    raise RecipeError(
        "model.positional",
        "a position bias may make scores negative, and rows of this attention are divided by their sum, "
        "which may then be zero",
        "choose a positional plugin without one, such as rope, or an attention whose rows are not divided "
        "(normalize: false)",
    )


def _check_parallel_residual(normalization: NormalizationSpec) -> None:
    if normalization.location != "pre":
        raise RecipeError(
            "model.parallel_residual",
            f"needs norms before the sublayers, not {normalization.location}",
            "set the norm's location to pre, or write false",
        )


def _built(chosen: Chosen, context: BuildContext, kind: type[T]) -> T:
    built = plugins.build(chosen, context)
    if not isinstance(built, kind):
        raise PluginError(
            f"{chosen.path}: plugin {chosen.plugin.name} of {chosen.package}",
            f"build returned {type(built).__name__}",
            f"it must return {kind.__name__}",
        )
    return built


def _prefix(declared: Declarations) -> int:
    """Positions that see one another: a sink token stands before a prefix and belongs to it."""
    prefix = declared.loss.bidirectional_prefix
    return prefix + int(declared.attention.sink_token) if prefix else 0


def build_stages(config: Config, declared: Declarations, layout: Layout) -> list[Any]:
    """This rank's pipeline stages (one, unless the pipeline is interleaved) with their initial
    weights, on the layout's device: sinkbench.megatron.network.Network each."""
    from sinkbench.megatron import fusions
    from sinkbench.megatron.attention import AttentionParts
    from sinkbench.megatron.initialise import initialise
    from sinkbench.megatron.layer import LayerParts
    from sinkbench.megatron.network import Network
    from sinkbench.megatron.settings import transformer_config

    transformer = transformer_config(config, layout.device)
    attention = AttentionParts(
        spec=declared.attention,
        backend=declared.backend,
        position_bias=declared.positional.score_bias,
        prefix=_prefix(declared),
    )
    fused = fusions.chosen(config, layout.device)
    parts = LayerParts(
        attention=attention,
        fused="layer" in fused,
        normalization=declared.normalization,
        linears=config.model.linear_maps,
        overlapped="communication" in fused,
        norms=declared.norms,
        fp8=config.train.fp8,
        ffn=config.model.ffn != "none",
        parallel_residual=config.model.parallel_residual,
    )
    chunks, last_rank = config.parallel.virtual_pipeline, config.parallel.pipeline - 1
    stages = []
    for chunk in range(chunks):
        stage = Network(
            transformer,
            parts=parts,
            positional=declared.positional,
            loss=declared.loss,
            vocab_size=declared.padded_vocab_size,
            tie_embeddings=config.model.tie_embeddings,
            seed=config.seed,
            pre_process=layout.pipeline_rank == 0 and chunk == 0,
            post_process=layout.pipeline_rank == last_rank and chunk == chunks - 1,
            vp_stage=chunk if chunks > 1 else None,
            pg_collection=layout.groups,
            fused_loss="loss" in fused,
        )
        initialise(
            stage,
            config.model,
            seed=config.seed,
            first_layer=stage.decoder.layers[0].layer_number,
            tp_rank=layout.tensor_rank,
            tp_size=config.parallel.tensor,
        )
        stages.append(stage)
    return stages
