"""One training step of the same model by three implementations: sinkbench's, megatron-core's local layers,
and plain PyTorch. Weights and tokens are random; only time and memory are of interest.

Shapes: b sequence, s position, n hidden size, h head, d head size.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkbench import plugins
from sinkbench.attention import reference
from sinkbench.config import Config, ModelConfig, padded_vocab_size
from sinkbench.measure.probe import Probe, build_metrics
from sinkbench.megatron import parallel
from sinkbench.megatron.parallel import Layout

TINY = (
    "model={num_layers: 2, hidden_size: 64, ffn_hidden_size: 96}",
    "model={seq_length: 64, vocab_size: 512}",
    "train.precision=fp32",
)
"""Overrides that let a step take a moment on a CPU."""


class Subject(Protocol):
    """What is timed."""

    def step(self, tokens_bs: Sequence[Tensor]) -> float:
        """Trains on micro-batches of s + 1 tokens and returns their mean loss, which the host has waited
        for."""

    def close(self) -> None:
        """Frees its memory."""


def random_tokens(config: Config, count: int, layout: Layout) -> list[Tensor]:
    """Micro-batches [b, s + 1] for one step of this data-parallel rank."""
    assert config.model.vocab_size is not None
    assert config.train.micro_batch_size is not None
    size = (config.train.micro_batch_size, config.model.seq_length + 1)
    device = layout.device
    generator = torch.Generator(device).manual_seed(config.seed + layout.data_rank)
    high = config.model.vocab_size
    return [torch.randint(high, size, device=device, generator=generator) for _ in range(count)]


def any_weights(stage: nn.Module, model: ModelConfig, **_: Any) -> None:
    """Random weights where only time and memory are of interest, drawn where they are. They take the place of
    ``sinkbench.megatron.initialise.initialise``, which draws a billion numbers on the host."""
    with torch.no_grad():
        for parameter in stage.parameters():
            if hasattr(parameter, "initial"):
                mean, std = parameter.initial
                parameter.normal_(mean, std)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)


def without_initial_weights() -> AbstractContextManager[Any]:
    """Models made within the block have ``any_weights``."""
    return mock.patch("sinkbench.megatron.initialise.initialise", any_weights)


class Ours:
    """The engine that the trainer runs."""

    def __init__(self, config: Config, layout: Layout) -> None:
        from sinkbench.megatron.training import Engine
        from sinkbench.model import build_stages, declare

        resolved = plugins.resolve(config, plugins.discover())
        assert config.model.vocab_size is not None
        self.declared = declare(config, resolved, config.model.vocab_size)
        with without_initial_weights():
            stages = build_stages(config, self.declared, layout)
        self.engine = Engine(config, stages, layout)

    def step(self, tokens_bs: Sequence[Tensor]) -> float:
        transform = self.declared.loss.transform
        return self.engine.train_step([transform({"tokens": tokens}) for tokens in tokens_bs]).loss

    def close(self) -> None:
        _free(self.engine.stages, self.engine.optimizer)

    def probe(self, config: Config) -> Probe:
        """The sink probe of a recipe, of random tokens."""
        resolved = plugins.resolve(config, plugins.discover())
        measure = config.measure
        size = (measure.count, measure.length)
        tokens = np.random.default_rng(0).integers(self.declared.context.vocab_size, size=size)
        metrics = build_metrics(resolved.metrics, self.declared.context)
        return Probe(metrics, {"tokens": tokens}, self.engine, self.declared.transforms)


class MegatronLocal:
    """megatron-core's GPTModel of local layers as it comes, but for SDPA where it would hold all scores."""

    def __init__(self, config: Config, layout: Layout) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

        from sinkbench.megatron.settings import optimizer_config

        assert config.model.vocab_size is not None
        transformer = _local_config(config)
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = _sdpa_core()
        # Its own choice of a last norm would be Apex's, where that is installed, which has no RMSNorm.
        layers = TransformerBlockSubmodules([spec] * config.model.num_layers, layer_norm=WrappedTorchNorm)
        model = GPTModel(
            transformer,
            layers,
            vocab_size=padded_vocab_size(config.model.vocab_size),
            max_sequence_length=config.model.seq_length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        ).to(layout.device)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(transformer, ddp, model)
        self.optimizer = get_megatron_optimizer(optimizer_config(config), [self.model])
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = self.optimizer.scale_loss
        self._forward_backward = get_forward_backward_func()

    def step(self, tokens_bs: Sequence[Tensor]) -> float:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        size, length = tokens_bs[0].shape
        reports: list[Tensor] = self._forward_backward(
            forward_step_func=_local_forward,
            data_iterator=iter(tokens_bs),
            model=self.model,
            num_microbatches=len(tokens_bs),
            seq_length=length - 1,
            micro_batch_size=size,
            forward_only=False,
        )
        self.optimizer.step()
        return float(torch.stack(reports).mean())

    def close(self) -> None:
        _free([self.model], self.optimizer)


def _free(wrapped: Sequence[Any], optimizer: Any) -> None:
    """Frees the memory of a model and its optimizer. The model itself may stay: hooks in the gradient's graph
    hold it and are held by it, which Python's garbage collector does not see."""
    tensors = [x for one in wrapped for part in one.buffers for x in (part.param_data, part.grad_data)]
    for one in optimizer.chained_optimizers:
        tensors += [x for group in one.optimizer.param_groups for x in group["params"]]
        tensors += [x for state in one.optimizer.state.values() for x in state.values()]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            tensor.untyped_storage().resize_(0)


def _local_config(config: Config) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from sinkbench.megatron.settings import dtype

    model = config.model
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=config.train.precision == "bf16",
        params_dtype=dtype(config),
        pipeline_dtype=dtype(config),
    )


def _sdpa_core() -> type[nn.Module]:
    from megatron.core.transformer.module import MegatronModule

    class SdpaCore(MegatronModule):  # type: ignore[misc]
        def __init__(self, config: Any, **_: Any) -> None:
            super().__init__(config=config)

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return output.permute(2, 0, 1, 3).flatten(2)

    return SdpaCore


def _local_forward(tokens_bs: Any, model: Any) -> tuple[Tensor, Any]:
    tokens = next(tokens_bs)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return model(inputs, positions, None, labels=labels), _mean_loss


def _mean_loss(losses_bs: Tensor) -> tuple[Tensor, Tensor]:
    loss = losses_bs.float().mean()
    return loss, loss.detach().clone()


class _Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        n, f = config.model.hidden_size, config.model.ffn_hidden_size
        assert f is not None
        self.heads = config.model.num_attention_heads
        self.norm_1, self.norm_2 = nn.RMSNorm(n), nn.RMSNorm(n)
        self.qkv, self.out = nn.Linear(n, 3 * n, bias=False), nn.Linear(n, n, bias=False)
        self.up, self.down = nn.Linear(n, 2 * f, bias=False), nn.Linear(f, n, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, n = x.shape
        qkv = self.qkv(self.norm_1(x)).view(b, s, 3, self.heads, n // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, s, n))
        gate, linear = self.up(self.norm_2(x)).chunk(2, -1)
        added: Tensor = self.down(F.silu(gate) * linear)
        return x + added


class _PlainModel(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        assert model.vocab_size is not None
        vocabulary = padded_vocab_size(model.vocab_size)
        self.embedding = nn.Embedding(vocabulary, model.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(model.hidden_size)
        self.head = nn.Linear(model.hidden_size, vocabulary, bias=False)
        self.head_size = model.head_dim
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_bs: Tensor) -> Tensor:
        inputs, labels = tokens_bs[:, :-1], tokens_bs[:, 1:]
        position = torch.arange(inputs.shape[1], device=inputs.device)
        cos, sin = reference.rotation(position, self.head_size, 10000.0)
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


class Plain:
    """A PyTorch model as one writes it, compiled, with bf16 autocast over float32 weights and fused AdamW."""

    def __init__(self, config: Config, layout: Layout, *, compiled: bool) -> None:
        self.model = _PlainModel(config).to(layout.device)
        self._loss: Any = torch.compile(self.model) if compiled else self.model
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            optim.lr,
            optim.betas,
            optim.eps,
            optim.weight_decay,
            fused=compiled or None,
        )
        self.clip = optim.clip_grad
        bf16 = config.train.precision == "bf16"
        self._autocast = partial(torch.autocast, layout.device.type, torch.bfloat16, enabled=bf16)

    def step(self, tokens_bs: Sequence[Tensor]) -> float:
        total = torch.zeros((), device=tokens_bs[0].device)
        for tokens in tokens_bs:
            with self._autocast():
                loss = self._loss(tokens) / len(tokens_bs)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)

    def close(self) -> None:
        """It goes with the last reference."""


def make(name: str, config: Config, layout: Layout) -> Subject:
    """ours, megatron or plain; the last compiled on a card alone."""
    if name == "ours":
        return Ours(config, layout)
    if name == "megatron":
        return MegatronLocal(config, layout)
    return Plain(config, layout, compiled=layout.device.type == "cuda")


def start(config: Config) -> Layout:
    """The layout of the one process, and its random state."""
    layout = parallel.start(config)
    torch.manual_seed(config.seed)
    return layout


def free() -> None:
    """After the last reference to a subject is gone."""
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
