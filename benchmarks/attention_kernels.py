"""The kernels of attention one by one on a Hopper card, Triton's and those in Gluon, with fixed sizes of
blocks, against torch SDPA's softmax, forward with backward, of the same run.

    python -m benchmarks.attention_kernels [sigmoid softmax T5 importance ...] [--shapes 2048x96 ...]

Times are medians over replays of CUDA graphs, which take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_programs import SHAPES, Shape

USUAL = ["2048x96", "2048x128", "16384x128"]
LAUNCHES, ROUNDS = 4, 12
"""Of a graph, and of all graphs."""
Run = Callable[[], object]


def inputs(shape: Shape) -> tuple[Tensor, ...]:
    """Queries, keys, values and gradients [b, h, t, d], positions first in memory."""
    batch, heads, length, size = shape

    def one() -> Tensor:
        made = torch.randn(length, batch, heads, size, device="cuda", dtype=torch.bfloat16)
        return made.permute(1, 2, 0, 3)

    return one(), one(), one(), one()


def sdpa(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[tuple[str, Run]]:
    attend = torch.nn.functional.scaled_dot_product_attention
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = attend(*leaves, is_causal=True)
    return [
        ("SDPA forward", lambda: attend(q, k, v, is_causal=True)),
        ("SDPA backward", lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)),
    ]


def attention(kind: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[tuple[str, Run]]:
    """The kernels of one kind, in both families."""
    from sinkbench_plugins.attention import _triton

    from sinkbench.attention.hopper_call import HopperCall
    from sinkbench.attention.triton_blocks import SLOPE, TABLE, itself, power_of_two
    from sinkbench.attention.triton_call import SOFTMAX, Call, Settings

    heads = q.shape[1]
    softmax: dict[str, Any] = {"function": power_of_two, "derivative": itself, "normalize": SOFTMAX}
    function, derivative = _triton.fused_sigmoid(q.dtype)
    sigmoid: dict[str, Any] = {"function": function, "derivative": derivative, "normalize": 0}
    kinds: dict[str, tuple[dict[str, Any], Tensor | None]] = {
        "sigmoid": (sigmoid, None),
        "sigmoid, normalised": (sigmoid | {"normalize": 1}, None),
        "softmax": (softmax, None),
        "ALiBi": (softmax | {"position": SLOPE}, torch.rand(heads, device="cuda")),
        "T5": (softmax | {"position": TABLE}, torch.randn(heads, 129, device="cuda")),
    }
    chosen, position = kinds[kind]
    usual = {"eps": 1e-8, "scale": q.shape[3] ** -0.5, "window": None, "prefix": 0, "position": 0, "ahead": 0}
    settings = Settings(**(usual | chosen))
    rows = torch.empty(q.shape[:3] if settings.normalize else (1,), device="cuda")
    calls = {
        family: made(q, k, v, None, position, None, settings, rows)
        for family, made in (("Triton", Call), ("Hopper", HopperCall))
    }
    output = calls["Triton"].outputs()
    divided: tuple[Tensor, ...] = (grad, rows, rows)
    runs: list[tuple[str, Run]] = []
    if settings.normalize:
        divided = calls["Triton"].divided_gradient(grad, output, None)
        runs.append((f"{kind}: rows before", lambda: calls["Triton"].divided_gradient(grad, output, None)))
    do, by_row = divided[0], divided[1:]
    table = settings.position == TABLE
    for family, call in calls.items():
        runs += [
            (f"{kind}: {family} forward", call.outputs),
            (f"{kind}: {family} keys", lambda c=call: c.gradients_of_keys(do, by_row, False)),
            (f"{kind}: {family} queries", lambda c=call: c.gradient_of_queries(do, by_row, table)),
        ]
        if table and call.table_by_itself:
            runs.append((f"{kind}: {family} table", lambda c=call: c.gradient_of_table(do, by_row)))
    return runs


def importance(q: Tensor, k: Tensor) -> list[tuple[str, Run]]:
    """The sums of rows, and those of 64 columns and of all."""
    from sinkbench.attention import hopper
    from sinkbench.attention.triton_importance import Scores

    layer = Scores(query_bhtd=q, key_bgtd=k, scale=q.shape[3] ** -0.5)
    raw = -layer.row_sums()[0]
    can_read = hopper.can_read

    def by(family: str, run: Run) -> Run:
        def runs() -> None:
            hopper.can_read = can_read if family == "Hopper" else lambda *_: False
            try:
                run()
            finally:
                hopper.can_read = can_read

        return runs

    return [
        (f"importance: {family} {what}", by(family, run))
        for family in ("Triton", "Hopper")
        for what, run in (
            ("rows", layer.row_sums),
            ("64 columns", lambda: layer.column_sums(raw, None, 64, 0)),
            ("all columns", lambda: layer.column_sums(raw, None, q.shape[2], 0)),
        )
    ]


def timed(runs: Sequence[tuple[str, Run]], stream: torch.cuda.Stream) -> dict[str, float]:
    """Milliseconds of each."""
    graphs = {}
    for name, run in runs:
        run()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], stream=stream):
            for _ in range(LAUNCHES):
                run()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / LAUNCHES)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    kinds = ["sigmoid", "sigmoid, normalised", "softmax", "ALiBi", "T5", "importance"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=kinds, help=f"of {kinds}")
    parser.add_argument("--shapes", nargs="+", default=USUAL, help="length x head size")
    options = parser.parse_args(arguments)
    os.environ["SINKBENCH_AUTOTUNE"] = "0"
    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)
    for shape in (x for x in SHAPES if f"{x[2]}x{x[3]}" in options.shapes):
        q, k, v, grad = inputs(shape)
        runs = sdpa(q, k, v, grad)
        for kind in options.kinds:
            runs += importance(q, k) if kind == "importance" else attention(kind, q, k, v, grad)
        found = timed(runs, stream)
        both = found["SDPA forward"] + found["SDPA backward"]
        print(f"{shape} {torch.cuda.get_device_name()} torch {torch.__version__}")
        for name, ms in found.items():
            print(f"  {name:<36} {ms:8.4f} ms {ms / both:7.3f} of SDPA's", flush=True)


if __name__ == "__main__":
    main()
