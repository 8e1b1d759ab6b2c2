"""What benchmarks.attention times: variants, and the programs that compute them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, BuildContext, ParameterSpec, PositionalSpec
from sinkbench.attention import importance, reference
from sinkbench.attention.backends import BACKENDS, Use
from sinkbench.attention.reference import Problem
from sinkbench.config import Config
from sinkbench.plugins import discover

SHAPES = [
    (max(1, tokens // length), heads, length, head_size)
    for head_size, heads, tokens in ((64, 16, 2**15), (96, 8, 2**15), (128, 16, 2**13))
    for length in (2048, 8192, 16384, 32768)
]
"""Sequences, heads, length, head size."""
EAGER_ELEMENTS = 2**30
"""Larger score matrices are not computed eagerly here."""
KEYS = 64
"""Keys whose importance is summed: as many as metrics may ask for."""
Shape = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Attributes:
    prefix: share of the positions that see one another.
    document: positions of each document, which alone they see; 0 for one document.
    """

    attention: str
    params: dict[str, Any]
    positional: str = "none"
    prefix: float = 0.0
    document: int = 0


def variant(
    attention: str, positional: str = "none", prefix: float = 0.0, document: int = 0, **params: Any
) -> Variant:
    return Variant(
        attention=attention, params=params, positional=positional, prefix=prefix, document=document
    )


VARIANTS = {
    "softmax": variant("softmax"),
    "off by one": variant("softmax_off_by_one"),
    "softmax, sink logit": variant("softmax", sink_logit="learned"),
    "softmax, KV bias": variant("softmax", kv_bias="kv"),
    "softmax, K bias": variant("softmax", kv_bias="k"),
    "softmax, V bias": variant("softmax", kv_bias="v"),
    "softmax, ALiBi": variant("softmax", positional="alibi"),
    "softmax, T5 bias": variant("softmax", positional="t5"),
    "softmax, window 128": variant("softmax", window=128),
    "softmax, prefix": variant("softmax", prefix=0.25),
    "softmax, documents": variant("softmax", document=500),
    "softmax, one document": variant("softmax", document=2**20),
    "sigmoid, unnormalised": variant("sigmoid", normalize=False),
    "sigmoid, normalised": variant("sigmoid"),
    "sigmoid, learned bias": variant("sigmoid", normalize=False, bias="learned"),
    "sigmoid, ALiBi": variant("sigmoid", positional="alibi"),
    "sigmoid, T5 bias": variant("sigmoid", positional="t5"),
    "sigmoid, window 128": variant("sigmoid", normalize=False, window=128),
    "sigmoid, prefix": variant("sigmoid", prefix=0.25),
    "sigmoid, documents": variant("sigmoid", document=500),
    "sigmoid, one document": variant("sigmoid", document=2**20),
    "elu+1, unnormalised": variant("elu", normalize=False),
    "elu+1, normalised": variant("elu"),
    "kernel identity": variant("kernel_identity"),
    "kernel elu+1": variant("kernel_elu"),
    "kernel MLP": variant("kernel_mlp"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Attributes:
    missing: why the program does not run; empty if it does.
    backward: whether it has one.
    bar: the largest ratio that passes.
    """

    shape: Shape
    variant: str
    program: str
    run: Callable[[Problem], Any]
    device: str = "cuda"
    missing: str = ""
    backward: bool = True
    deterministic: bool = False
    bar: float | None = None


def context(heads: int, length: int, head_size: int) -> BuildContext:
    size = heads * head_size
    values = {"num_layers": 1, "hidden_size": size, "num_attention_heads": heads, "ffn": "none"}
    config = Config.model_validate(
        {
            "name": "benchmark",
            "model": values | {"seq_length": length},
            "data": {"source": "bigram_backcopy"},
            "optim": {"lr": 1.0, "warmup_steps": 1},
            "train": {"steps": 1, "global_batch_size": 1},
            "measure": {"every": 0},
        }
    )
    return BuildContext(
        num_layers=1,
        hidden_size=size,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=head_size,
        seq_length=length,
        num_positions=length,
        vocab_size=64,
        config=config,
    )


@cache
def declare(name: str, shape: Shape) -> tuple[AttentionSpec, PositionalSpec]:
    chosen, plugins, where = VARIANTS[name], discover(), context(*shape[1:])
    attention = plugins.get("attention", chosen.attention).plugin
    positional = plugins.get("positional", chosen.positional).plugin
    spec = attention.build(attention.params(**chosen.params), where)
    position = positional.build(positional.params(), where)
    assert isinstance(spec, AttentionSpec)
    assert isinstance(position, PositionalSpec)
    return spec, position


def problem(name: str, shape: Shape, device: str) -> Problem:
    batch, heads, length, head_size = shape
    spec, positional = declare(name, shape)
    bias = positional.score_bias

    def random() -> Tensor:
        x = torch.randn(length, batch, heads, head_size, device=device, dtype=torch.bfloat16)
        return x.permute(1, 2, 0, 3).requires_grad_()

    def parameter(declared: ParameterSpec) -> Tensor:
        sizes = {"heads": heads, "kv_heads": heads, "head_size": head_size}
        shape = [sizes[size] if isinstance(size, str) else size for size in declared.shape]
        x = torch.empty(shape, device=device, dtype=torch.bfloat16)
        return x.normal_(declared.mean, declared.std).requires_grad_()

    position = torch.arange(length, device=device)
    document = VARIANTS[name].document
    start = (position // document * document).int().expand(batch, -1) if document else None
    return Problem(
        spec=spec,
        query_bhqd=random(),
        key_bgkd=random(),
        value_bgkd=random(),
        position_q=position,
        position_k=position,
        aligned=True,
        scale=head_size**-0.5,
        heads=torch.arange(heads, device=device),
        parameters={name: parameter(declared) for name, declared in spec.parameters.items()},
        position_bias=bias,
        position_parameters={n: parameter(d) for n, d in bias.parameters.items()} if bias else {},
        prefix=int(VARIANTS[name].prefix * length),
        document_start_bk=start,
    )


def use_of(name: str, shape: Shape, device: str, *, deterministic: bool = False) -> Use:
    bias = declare(name, shape)[1].score_bias
    return Use(
        device=device,
        head_size=shape[-1],
        position_bias=bias is not None,
        learned_bias=bias is not None and bool(bias.parameters),
        prefix=VARIANTS[name].prefix > 0,
        documents=VARIANTS[name].document > 0,
        deterministic=deterministic,
        replayed=device == "cuda",
    )


def cases(shape: Shape, name: str, device: str) -> Iterator[Case]:
    """Every program for a variant."""
    batch, heads, length, head_size = shape
    spec, use = declare(name, shape)[0], use_of(name, shape, device)
    case = partial(Case, shape=shape, variant=name, device=device)
    too_large = "scores too large" if batch * heads * length**2 > EAGER_ELEMENTS else ""
    for backend in BACKENDS:
        missing = " or ".join(backend.missing(spec, use)) or (too_large if backend.name == "eager" else "")
        yield case(program=backend.name, run=backend.run, missing=missing)
    yield case(program="eager, compiled", run=compiled_eager, missing=too_large)
    if name == "softmax":
        yield case(program="flash-attn 4", run=flash_attn_4, missing=_not_installed("flash_attn.cute"))
        yield case(program="flash-attn 2", run=flash_attn_2, missing=_not_installed("flash_attn_2_cuda"))
    if name == "sigmoid, unnormalised":
        yield case(program="triton-sigmoid", run=triton_sigmoid, missing=_not_installed("triton_sigmoid"))
    missing = "documents" if use.documents else " or ".join(importance.missing(spec, head_size))
    for count in (KEYS, length):
        yield case(
            program=importance_of(count), run=partial(key_sums, count), missing=missing, backward=False
        )


def importance_of(count: int) -> str:
    return f"importance of {count}"


def key_sums(count: int, p: Problem) -> tuple[Tensor, Tensor]:
    """What a probe at full context sums over a layer's weights."""
    return importance.WeightSums(p).keys(count, 1e-8)


def triton_sigmoid(p: Problem) -> Tensor:
    function = importlib.import_module("triton_sigmoid").sigmoid_attention
    bias = p.spec.score_bias
    assert bias is None or isinstance(bias, float)
    query, key, value = (x.transpose(1, 2) for x in (p.query_bhqd, p.key_bgkd, p.value_bgkd))
    output: Tensor = function(query, key, value, is_causal=True, scale=p.scale, sigmoid_bias=bias or 0.0)
    return output.transpose(1, 2)


def _not_installed(module: str) -> str:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    return "" if found is not None else "not installed"


def compiled_eager(p: Problem) -> Tensor:
    return _compile_eager()(p)


@cache
def _compile_eager() -> Callable[[Problem], Tensor]:
    return torch.compile(reference.attend, dynamic=False)


def flash_attn_4(p: Problem) -> Tensor:
    return _flash_attn(importlib.import_module("flash_attn.cute").flash_attn_func, p)


def flash_attn_2(p: Problem) -> Tensor:
    return _flash_attn(importlib.import_module("flash_attn").flash_attn_func, p)


def _flash_attn(function: Callable[..., Any], p: Problem) -> Tensor:
    tensors = (x.transpose(1, 2) for x in (p.query_bhqd, p.key_bgkd, p.value_bgkd))
    result = function(*tensors, softmax_scale=p.scale, causal=True)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output.transpose(1, 2)
