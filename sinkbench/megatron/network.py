"""The language model of a recipe: embedding, megatron's TransformerBlock, output projection, loss.

One class for every variant. GPTModel, deprecated in megatron-core 0.19, chooses positions by if/elif;
here a plugin's declaration says what is added, rotated and normalised.

Shapes: b sequence, s local position, n hidden size, v local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sinkbench.api import Batch, LossSpec, PositionalSpec
from sinkbench.attention import reference
from sinkbench.megatron.first_value import FirstValue
from sinkbench.megatron.initialise import seeded
from sinkbench.megatron.layer import LayerParts, Read, layer_specs, make_norm, read_ahead
from sinkbench.megatron.sequence import local_positions
from sinkbench.megatron.vocabulary_loss import Setting, token_losses
from sinkbench.megatron.word_embeddings import WordEmbeddings


class Embedding(MegatronModule):  # type: ignore[misc]
    """Token embeddings, plus a positional plugin's embeddings if it has any."""

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        positional: PositionalSpec,
        sink_token: bool,
        tied: bool,
        seed: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.sink_token: torch.nn.Parameter | None = None
        if sink_token:
            data = torch.empty(
                config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
            )
            self.sink_token = torch.nn.Parameter(data)
        self.tp_group = pg_collection.tp
        self.word_embeddings = WordEmbeddings(
            vocab_size,
            config.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=pg_collection.tp,
            adds_gradients=(
                config.gradient_accumulation_fusion and not config.deterministic_mode and not tied
            ),
        )
        self.position_embeddings: torch.nn.Module | None = None
        if positional.embedding is not None:
            with seeded(seed, "embedding.position_embeddings"):
                module = positional.embedding()
            self.position_embeddings = module.to(torch.cuda.current_device(), config.params_dtype)
            for parameter in self.position_embeddings.parameters():
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, tokens_bs: Tensor, position_s: Tensor) -> Tensor:
        """Returns [s, b, n], a sink token in front if the model has one; under sequence parallelism
        this rank's share of s."""
        words: Tensor = self.word_embeddings(tokens_bs)
        if self.sink_token is not None:
            words = torch.cat([self.sink_token.expand(1, *words.shape[1:]), words])
        if self.position_embeddings is not None:
            if self.config.sequence_parallel:
                position_s = position_s.chunk(self.tp_group.size())[self.tp_group.rank()]
            words = words + self.position_embeddings(position_s)[:, None].to(words.dtype)
        return words


class OutputLayer(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """The projection onto the vocabulary. It can give the losses at once; that is a call of this module too,
    so that what megatron hooks to modules with parameters holds."""

    def forward(
        self,
        input_: Tensor,
        weight: torch.nn.Parameter | None = None,
        runtime_gather_output: bool | None = None,
        losses_of: Callable[[Tensor, torch.nn.Parameter], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [s, b, v], or what ``losses_of`` makes of hidden states and weight."""
        if losses_of is not None:
            return losses_of(input_, self.weight if weight is None else weight), None
        projected: tuple[Tensor, Tensor | None] = super().forward(input_, weight, runtime_gather_output)
        return projected


class Network(LanguageModule):  # type: ignore[misc]
    """One pipeline stage of the model.

    Args:
        vocab_size: padded size of the vocabulary.
        pre_process, post_process: this stage embeds tokens; this stage computes the loss.
        vp_stage: number of the model chunk within the rank, for the interleaved schedule.
        fused_loss: the loss is computed without the logits of all tokens, see ``vocabulary_loss``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        parts: LayerParts,
        positional: PositionalSpec,
        loss: LossSpec,
        vocab_size: int,
        tie_embeddings: bool,
        seed: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        pg_collection: ProcessGroupCollection,
        fused_loss: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.fused_loss = fused_loss
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = tie_embeddings
        self.positional = positional
        self.loss = loss
        sink_token = parts.attention.spec.sink_token
        self.leading = int(sink_token)
        """Positions before the first token."""
        carries = parts.attention.spec.carries_first_value
        self.carried = FirstValue(config) if carries and config.pipeline_model_parallel_size > 1 else None
        self._first_value: Tensor | None = None
        if pre_process:
            self.embedding = Embedding(
                config, vocab_size, positional, sink_token, tie_embeddings, seed, pg_collection
            )
        count = get_num_layers_to_build(config, vp_stage, pg_collection.pp.rank())
        self.decoder = TransformerBlock(
            config,
            layer_specs(parts, count),
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self._final_read: Read | None = None
        if not post_process:
            self.decoder.layers[-1].to_next_stage = self.carried
        if post_process:
            post_norm = parts.normalization.location == "post"
            self.final_norm = None if post_norm else make_norm(parts, config)
            if self.final_norm is not None:
                self._final_read = Read(self.final_norm, parts.fused_norms)
            self.output_layer = OutputLayer(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and tie_embeddings,
                tp_group=pg_collection.tp,
            )
        read_ahead(self.decoder.layers, self._final_read)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    @property
    def sent_size(self) -> int:
        """Last dimension of what one pipeline stage sends to the next."""
        hidden_size: int = self.config.hidden_size
        return hidden_size + (self.carried.width if self.carried is not None else 0)

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Called by the pipeline schedule with what the previous stage sent."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self.carried is not None and received is not None:
            received, self._first_value = self.carried.split(received)
        self.decoder.set_input_tensor(received)

    def forward(self, batch: Batch) -> Tensor:
        """A stage's output: hidden states [s, b, n], or on the last stage the token losses times
        their weights, float32 [b, s] of the local positions. A batch without targets gives hidden
        states on the last stage too, normed, with the sink token's if there is one."""
        tokens = batch["tokens"]
        position = local_positions(tokens.shape[1], self.cp_group, tokens.device)
        place = local_positions(tokens.shape[1] + self.leading, self.cp_group, tokens.device)
        embedded = self.embedding(tokens[:, position], place) if self.pre_process else None
        first_value, self._first_value = self._first_value, None
        hidden: Tensor = self.decoder(
            hidden_states=embedded,
            attention_mask=batch.get("document_start"),
            context=first_value,
            rotary_pos_emb=self._rotation(place),
        )
        if not self.post_process:
            return hidden
        if self._final_read is not None:
            hidden = self._final_read.of(hidden)
        if "targets" not in batch:
            return hidden
        if self.leading:  # a slice of everything would have a gradient of its own, filled and copied
            hidden = hidden[self.leading :]
        targets, weights = batch["targets"][:, position], batch["weights"][:, position]
        if self.fused_loss:
            return self._fused_losses(hidden, targets, weights)
        return self._token_losses(self.logits(hidden), targets) * weights

    def logits(self, normed_hidden_sbn: Tensor) -> Tensor:
        """This rank's part of the vocabulary, [s, b, v]."""
        logits: Tensor = self.output_layer(normed_hidden_sbn, weight=self._tied_weight())[0]
        return logits

    def _tied_weight(self) -> torch.nn.Parameter | None:
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else None

    def _fused_losses(self, hidden_sbn: Tensor, targets_bs: Tensor, weights_bs: Tensor) -> Tensor:
        def losses_of(hidden: Tensor, weight: torch.nn.Parameter) -> Tensor:
            # A tied weight has another gradient, which megatron's hook adds with this one.
            tied = self.share_embeddings_and_output_weights
            own = self.config.gradient_accumulation_fusion and hasattr(weight, "main_grad") and not tied
            setting = Setting(
                group=self.tp_group,
                z_loss=self._z_loss,
                sequence_parallel=self.config.sequence_parallel,
                weight=weight if own else None,
            )
            return token_losses(hidden, weight, targets_bs, weights_bs, setting)

        losses: Tensor = self.output_layer(hidden_sbn, weight=self._tied_weight(), losses_of=losses_of)[0]
        return losses

    def _rotation(self, position: Tensor) -> Tensor | None:
        rotary = self.positional.rotary
        if rotary is None:
            return None
        rotated = int(self.config.kv_channels * rotary.fraction) // 2 * 2
        return reference.rotation(position, rotated, rotary.base)

    @property
    def _z_loss(self) -> float:
        """In training; validation is of the tokens' loss."""
        return self.loss.z_loss if self.training else 0.0

    def _token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not self._z_loss:
            losses: Tensor = self.compute_language_model_loss(targets, logits)
            return losses
        # megatron's cross entropy overwrites float32 logits.
        partition = self._log_partition(logits.to(torch.float32, copy=True))
        losses = self.compute_language_model_loss(targets, logits)
        return losses + self._z_loss * partition.square().transpose(0, 1)

    def _log_partition(self, logits: Tensor) -> Tensor:
        """log sum exp over the whole vocabulary, [s, b]."""
        local = logits.logsumexp(-1)
        gathered = tensor_parallel.gather_from_tensor_model_parallel_region(
            local.unsqueeze(-1), group=self.tp_group
        )
        return torch.logsumexp(gathered, -1)
