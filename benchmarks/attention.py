"""Attention variants and backends against torch's softmax, on one card in one run.

    python benchmarks/attention.py [--json FILE]

Times are medians over replays of a CUDA graph, so that they hold the card's work and not Python's launches;
forward, and forward with backward, bf16, causal. The ratio is to torch SDPA softmax of the same shape.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench_cudagraph

from sinkbench.api import AttentionSpec, BuildContext, ParameterSpec
from sinkbench.attention.backends import BACKENDS, Use
from sinkbench.attention.reference import Problem
from sinkbench.config import Config
from sinkbench.plugins import discover

SHAPES = [(16, 8, 2048, 96), (4, 16, 2048, 128), (1, 16, 16384, 128)]
"""Sequences, heads, length, head size."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "off by one": ("softmax_off_by_one", {}),
    "softmax, sink logit": ("softmax", {"sink_logit": "learned"}),
    "softmax, KV bias": ("softmax", {"kv_bias": "kv"}),
    "softmax, K bias": ("softmax", {"kv_bias": "k"}),
    "softmax, V bias": ("softmax", {"kv_bias": "v"}),
    "softmax, window 128": ("softmax", {"window": 128}),
    "sigmoid, unnormalised": ("sigmoid", {"normalize": False}),
    "sigmoid, normalised": ("sigmoid", {"normalize": True}),
    "sigmoid, learned bias": ("sigmoid", {"normalize": False, "bias": "learned"}),
    "elu+1, unnormalised": ("elu", {"normalize": False}),
    "elu+1, normalised": ("elu", {"normalize": True}),
    "sigmoid, window 128": ("sigmoid", {"normalize": False, "window": 128}),
}
EAGER_ELEMENTS = 2**30
"""Larger score matrices are not computed eagerly here."""


def declare(name: str, params: dict[str, Any], heads: int, length: int, head_size: int) -> AttentionSpec:
    plugin = discover().get("attention", name).plugin
    values = {"num_layers": 1, "hidden_size": heads * head_size, "num_attention_heads": heads, "ffn": "none"}
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
    context = BuildContext(
        num_layers=1,
        hidden_size=heads * head_size,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=head_size,
        seq_length=length,
        num_positions=length,
        vocab_size=64,
        config=config,
    )
    spec = plugin.build(plugin.params(**params), context)
    assert isinstance(spec, AttentionSpec)
    return spec


def problem(spec: AttentionSpec, batch: int, heads: int, length: int, head_size: int) -> Problem:
    def random() -> torch.Tensor:
        x = torch.randn(length, batch, heads, head_size, device="cuda", dtype=torch.bfloat16)
        return x.permute(1, 2, 0, 3).requires_grad_()

    def parameter(declared: ParameterSpec) -> torch.Tensor:
        sizes = {"heads": heads, "kv_heads": heads, "head_size": head_size}
        shape = [sizes[size] if isinstance(size, str) else size for size in declared.shape]
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        return x.normal_(declared.mean, declared.std).requires_grad_()

    position = torch.arange(length, device="cuda")
    return Problem(
        spec=spec,
        query_bhqd=random(),
        key_bgkd=random(),
        value_bgkd=random(),
        position_q=position,
        position_k=position,
        aligned=True,
        scale=head_size**-0.5,
        heads=torch.arange(heads, device="cuda"),
        parameters={name: parameter(declared) for name, declared in spec.parameters.items()},
    )


def times(run: Callable[[Problem], torch.Tensor], p: Problem) -> tuple[float, float, float]:
    """Forward ms, forward and backward ms, peak GiB beyond the inputs."""
    inputs = (p.query_bhqd, p.key_bgkd, p.value_bgkd, *p.parameters.values())
    grad = torch.randn_like(p.query_bhqd)

    def both() -> None:
        torch.autograd.grad(run(p), inputs, grad)

    def forward() -> None:
        with torch.no_grad():
            run(p)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        return (
            do_bench_cudagraph(forward, rep=60, return_mode="median"),
            do_bench_cudagraph(both, rep=120, return_mode="median"),
            memory,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the rows here too")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for shape in SHAPES:
        baseline = None
        for variant, (name, params) in VARIANTS.items():
            batch, heads, length, head_size = shape
            spec = declare(name, params, heads, length, head_size)
            for backend in BACKENDS:
                if backend.missing(spec, Use(device="cuda", head_size=head_size)):
                    continue
                if backend.name == "eager" and batch * heads * length**2 > EAGER_ELEMENTS:
                    continue
                forward, both, memory = times(backend.run, problem(spec, *shape))
                baseline = baseline or both
                row = {"shape": shape, "variant": variant, "backend": backend.name, "forward_ms": forward}
                rows.append(row | {"both_ms": both, "ratio": both / baseline, "peak_gib": memory})
                print(
                    f"{shape!s:22} {variant:22} {backend.name:7} forward {forward:7.3f} ms  "
                    f"both {both:7.3f} ms  ratio {both / baseline:5.2f}  {memory:5.2f} GiB",
                    flush=True,
                )
    if arguments.json:
        with open(arguments.json, "w") as stream:
            json.dump(rows, stream, indent=1)


if __name__ == "__main__":
    main()
