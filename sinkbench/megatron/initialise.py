"""Initial weights that depend on the recipe's seed and the parameter's name, on nothing else.

Each tensor is drawn whole, from a generator seeded by its name, and every rank keeps its share: the
same model starts under every tensor, pipeline and data-parallel layout and on every device.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sinkbench.config import ModelConfig

_TABLES = ("embedding.word_embeddings.weight", "embedding.sink_token", "output_layer.weight")


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Makes a plugin module's own initialisation reproducible."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, name))
        yield


def initial_std(name: str, fan_in: int, model: ModelConfig) -> float:
    """Standard deviation of a weight matrix.

    paper: as the code of Gu et al. (2410.10781): sqrt(2/5/fan_in); the down projection of a SwiGLU block
    alone 1/(sqrt(fan_in) num_layers). normal: init_std, and init_std/sqrt(2 num_layers) where a layer
    writes to the residual stream (GPT-2).
    """
    writes = name.endswith(("attention.linear_proj.weight", "mlp.linear_fc2.weight"))
    if model.init == "normal":
        return model.init_std / math.sqrt(2 * model.num_layers) if writes else model.init_std
    if model.ffn == "swiglu" and name.endswith("mlp.linear_fc2.weight"):
        return 1 / (math.sqrt(fan_in) * model.num_layers)
    return math.sqrt(0.4 / fan_in)


def global_name(name: str, first_layer: int) -> str:
    """The parameter's name in the whole model, from its name within a pipeline stage whose first
    layer is number ``first_layer``, from 1; the tied output projection is the embedding."""
    return re.sub(
        r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + first_layer - 1}.", name
    )


@torch.no_grad()
def initialise(
    stage: torch.nn.Module, model: ModelConfig, *, seed: int, first_layer: int, tp_rank: int, tp_size: int
) -> None:
    """Fills every weight matrix and declared attention parameter of a pipeline stage. Norms and
    positional embeddings are initialised by the modules of their plugins."""
    for local_name, parameter in stage.named_parameters():
        name = global_name(local_name, first_layer)
        if model.tie_embeddings and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        sharded = getattr(parameter, "tensor_model_parallel", False) and tp_size > 1
        dim = getattr(parameter, "partition_dim", 0) if sharded else 0
        shape = list(parameter.shape)
        if sharded:
            shape[dim] *= tp_size
        if hasattr(parameter, "initial"):
            mean, std = parameter.initial
        elif ".linear_" in name and name.endswith(".bias"):
            mean, std = 0.0, 0.0
        elif ".linear_" in name or name in _TABLES:
            mean, std = 0.0, initial_std(name, shape[-1], model)
        else:
            continue
        generator = torch.Generator().manual_seed(_seed(seed, name))
        whole = torch.empty(shape).normal_(mean, std, generator=generator)
        gated = name.endswith("mlp.linear_fc1.weight") and model.ffn in ("swiglu", "geglu", "reglu")
        ours = share(whole, dim, tp_rank, tp_size, gated) if sharded else whole
        parameter.copy_(ours.to(parameter.dtype))


def share(whole: Tensor, dim: int, rank: int, size: int, gated: bool) -> Tensor:
    """A tensor-parallel rank's rows or columns; a gated projection holds the gate's and the value's side by
    side."""
    if not gated:
        return whole.chunk(size, dim)[rank]
    return torch.cat([half.chunk(size, dim)[rank] for half in whole.chunk(2, dim)], dim)
