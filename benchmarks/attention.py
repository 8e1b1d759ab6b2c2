"""Attention variants and backends against torch's softmax, on one card in one run.

    python -m benchmarks.attention [--shapes 2048x96 ...] [--variants TEXT ...] [--backends NAME ...]
    python -m benchmarks.attention --list

Times are medians over replays of a CUDA graph, so that they hold the card's work and not Python's launches;
forward, and forward with backward, bf16, causal. The ratio is to torch SDPA softmax of the same shape.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, BuildContext, ParameterSpec, PositionalSpec
from sinkbench.attention import reference
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
USUAL = ["2048x96", "2048x128", "16384x128"]
EAGER_ELEMENTS = 2**30
"""Larger score matrices are not computed eagerly here."""
BASELINE = ("softmax", "sdpa")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Attributes:
    prefix: share of the positions that see one another.
    """

    attention: str
    params: dict[str, Any]
    positional: str = "none"
    prefix: float = 0.0


def variant(attention: str, positional: str = "none", prefix: float = 0.0, **params: Any) -> Variant:
    return Variant(attention=attention, params=params, positional=positional, prefix=prefix)


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
    "sigmoid, unnormalised": variant("sigmoid", normalize=False),
    "sigmoid, normalised": variant("sigmoid"),
    "sigmoid, learned bias": variant("sigmoid", normalize=False, bias="learned"),
    "sigmoid, ALiBi": variant("sigmoid", positional="alibi"),
    "sigmoid, T5 bias": variant("sigmoid", positional="t5"),
    "sigmoid, window 128": variant("sigmoid", normalize=False, window=128),
    "sigmoid, prefix": variant("sigmoid", prefix=0.25),
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
    """

    shape: tuple[int, int, int, int]
    variant: str
    program: str
    run: Callable[[Problem], Tensor]
    missing: str = ""


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
def declare(name: str, shape: tuple[int, int, int, int]) -> tuple[AttentionSpec, PositionalSpec]:
    chosen, plugins, where = VARIANTS[name], discover(), context(*shape[1:])
    attention = plugins.get("attention", chosen.attention).plugin
    positional = plugins.get("positional", chosen.positional).plugin
    spec = attention.build(attention.params(**chosen.params), where)
    position = positional.build(positional.params(), where)
    assert isinstance(spec, AttentionSpec)
    assert isinstance(position, PositionalSpec)
    return spec, position


def problem(name: str, shape: tuple[int, int, int, int]) -> Problem:
    batch, heads, length, head_size = shape
    spec, positional = declare(name, shape)
    bias = positional.score_bias

    def random() -> Tensor:
        x = torch.randn(length, batch, heads, head_size, device="cuda", dtype=torch.bfloat16)
        return x.permute(1, 2, 0, 3).requires_grad_()

    def parameter(declared: ParameterSpec) -> Tensor:
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
        position_bias=bias,
        position_parameters={n: parameter(d) for n, d in bias.parameters.items()} if bias else {},
        prefix=int(VARIANTS[name].prefix * length),
    )


def cases(shape: tuple[int, int, int, int], name: str) -> Iterator[Case]:
    batch, heads, length, head_size = shape
    spec, positional = declare(name, shape)
    bias = positional.score_bias
    use = Use(
        device="cuda",
        head_size=head_size,
        position_bias=bias is not None,
        learned_bias=bias is not None and bool(bias.parameters),
        prefix=VARIANTS[name].prefix > 0,
    )
    case = partial(Case, shape=shape, variant=name)
    too_large = "scores too large" if batch * heads * length**2 > EAGER_ELEMENTS else ""
    for backend in BACKENDS:
        missing = " or ".join(backend.missing(spec, use)) or (too_large if backend.name == "eager" else "")
        yield case(program=backend.name, run=backend.run, missing=missing)
    yield case(program="eager, compiled", run=compiled_eager, missing=too_large)
    if name == "softmax":
        yield case(program="flash-attn 4", run=flash_attn_4, missing=_not_installed("flash_attn.cute"))
        yield case(program="flash-attn 2", run=flash_attn_2, missing=_not_installed("flash_attn_2_cuda"))


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
    from flash_attn.cute import flash_attn_func

    return _flash_attn(flash_attn_func, p)


def flash_attn_2(p: Problem) -> Tensor:
    from flash_attn import flash_attn_func

    return _flash_attn(flash_attn_func, p)


def _flash_attn(function: Callable[..., Any], p: Problem) -> Tensor:
    tensors = (x.transpose(1, 2) for x in (p.query_bhqd, p.key_bgkd, p.value_bgkd))
    result = function(*tensors, softmax_scale=p.scale, causal=True)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output.transpose(1, 2)


def times(run: Callable[[Problem], Tensor], p: Problem) -> dict[str, float]:
    """Forward ms, forward and backward ms, peak GiB beyond the inputs."""
    from triton.testing import do_bench_cudagraph

    inputs = [p.query_bhqd, p.key_bgkd, p.value_bgkd, *p.parameters.values(), *p.position_parameters.values()]
    grad = torch.randn_like(p.query_bhqd)

    def both() -> None:
        torch.autograd.grad(run(p), inputs, grad)

    def forward() -> None:
        with torch.no_grad():
            run(p)

    forward()
    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.cuda.stream(torch.cuda.Stream()):
        return {
            "forward_ms": do_bench_cudagraph(forward, rep=60, return_mode="median"),
            "both_ms": do_bench_cudagraph(both, rep=120, return_mode="median"),
            "peak_gib": memory,
        }


def measure(case: Case) -> dict[str, Any]:
    """One row; what a program cannot do, or runs out of memory with, is its ``problem``."""
    row: dict[str, Any] = {"shape": case.shape, "variant": case.variant, "backend": case.program}
    if case.missing:
        return row | {"problem": case.missing}
    torch._dynamo.reset()  # which gives up on a function after a few shapes
    try:
        return row | times(case.run, problem(case.variant, case.shape))
    except Exception as error:  # whatever a library raises: the other rows are still wanted
        text = " ".join(str(error).split())[:200]
        return row | {"problem": f"{type(error).__name__}: {text}"}
    finally:
        torch.cuda.empty_cache()


def line(row: dict[str, Any], baseline: float | None) -> str:
    name = f"{row['shape']!s:22} {row['variant']:22} {row['backend']:15}"
    if "problem" in row:
        return f"{name} {row['problem']}"
    ratio = f"{row['both_ms'] / baseline:5.2f}" if baseline else "    -"
    return (
        f"{name} forward {row['forward_ms']:7.3f} ms  both {row['both_ms']:7.3f} ms  ratio {ratio}  "
        f"{row['peak_gib']:5.2f} GiB"
    )


def selected(arguments: argparse.Namespace) -> Iterator[Case]:
    """The chosen cases, of each shape the baseline first."""
    for shape in SHAPES:
        if arguments.shapes != ["all"] and f"{shape[2]}x{shape[3]}" not in arguments.shapes:
            continue
        found = [
            case
            for name in VARIANTS
            if not arguments.variants or any(text in name for text in arguments.variants)
            for case in cases(shape, name)
            if not arguments.backends or case.program in arguments.backends
        ]
        first = next(case for case in cases(shape, BASELINE[0]) if case.program == BASELINE[1])
        yield first
        yield from (case for case in found if (case.variant, case.program) != BASELINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=USUAL, help=f"length x head size, or all: {USUAL}")
    parser.add_argument("--variants", nargs="+", help="those whose names hold one of these texts")
    parser.add_argument("--backends", nargs="+", help="these alone, beside the baseline")
    parser.add_argument("--list", action="store_true", help="print what would be measured, without a card")
    parser.add_argument("--json", help="write the rows here too, after each")
    arguments = parser.parse_args()
    if arguments.list:
        for case in selected(arguments):
            print(f"{case.shape!s:22} {case.variant:22} {case.program:15} {case.missing}")
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    rows: list[dict[str, Any]] = []
    baseline: dict[Any, float | None] = {}
    for case in selected(arguments):
        row = measure(case)
        row["ratio"] = None
        if (case.variant, case.program) == BASELINE:
            baseline[case.shape] = row.get("both_ms")
        reference_ms = baseline[case.shape]
        if reference_ms and "both_ms" in row:
            row["ratio"] = row["both_ms"] / reference_ms
        rows.append(row)
        print(line(row, reference_ms), flush=True)
        if arguments.json:
            with open(arguments.json, "w") as stream:
                json.dump(rows, stream, indent=1)


if __name__ == "__main__":
    main()
