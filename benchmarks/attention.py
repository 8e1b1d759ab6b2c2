"""Attention variants and backends against torch's softmax, on one card in one run.

    python -m benchmarks.attention [--shapes 2048x96 ...] [--variants TEXT ...] [--backends NAME ...]
    python -m benchmarks.attention --bars
    python -m benchmarks.attention --list

Times are medians over replays of a CUDA graph, so that they hold the card's work and not Python's launches
(``launches`` marks what cannot be captured and is timed with them); forward, and forward with backward, bf16,
causal. The ratio is to torch SDPA softmax of the same shape; for importance scores, which have no backward,
that of their forward to SDPA's both. ``--bars`` takes for each variant what the backend ``auto`` chooses, and
compares it with the bars that this project has set itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_programs import (
    KEYS,
    SHAPES,
    VARIANTS,
    Case,
    Shape,
    cases,
    declare,
    importance_of,
    problem,
    use_of,
)
from sinkbench.attention import reference
from sinkbench.attention.backends import choose
from sinkbench.attention.reference import Problem
from sinkbench.files import write_atomically

Row = dict[str, Any]
USUAL = ["2048x96", "2048x128", "16384x128"]
BAR_SHAPES = [(16, 8, 2048, 96), (4, 16, 2048, 128), (1, 16, 16384, 128)]
TINY_SHAPES = [(1, 2, 64, 16)]
"""For a CPU."""
BASELINE = ("softmax", "sdpa")
BARS = {
    "sigmoid, unnormalised": (1.15, 1.4),
    "elu+1, unnormalised": (1.15, 1.4),
    "sigmoid, normalised": (1.3, 1.5),
    "elu+1, normalised": (1.3, 1.5),
    "off by one": (1.1, 1.1),
    "softmax, sink logit": (1.1, 1.1),
    "softmax, KV bias": (1.1, 1.1),
    "softmax, K bias": (1.1, 1.1),
    "softmax, ALiBi": (1.4, 1.5),
    "softmax, T5 bias": (1.4, 1.5),
    "softmax, window 128": (0.8, 0.1),
    "softmax, prefix": (1.2, 1.2),
    "kernel identity": (1.0, 0.3),
    "kernel elu+1": (1.0, 0.3),
    "kernel MLP": (1.0, 0.3),
}
"""Largest ratios, at 2,048 and at 16,384 positions."""
DETERMINISTIC_BAR, IMPORTANCE_BAR = 1.45, 0.3
FASTER_THAN_EAGER, MEMORY_OF_EAGER = 5.0, 0.2
"""What every similarity has to be beside the eager sigmoid at 2,048 positions."""
SIMILARITIES = [name for name in BARS if name.startswith(("sigmoid", "elu"))]


def bar_cases(shape: Shape, device: str) -> Iterator[Case]:
    """The baseline, what ``auto`` chooses for each variant, and the eager sigmoid that similarities are also
    compared with."""
    length = shape[2]
    case = partial(Case, shape=shape, device=device)
    programs = {c.program: c for c in cases(shape, "softmax", device)}
    yield programs["sdpa"]
    if length <= 2048:
        yield case(variant=SIMILARITIES[0], program="eager", run=reference.attend)
    for name, bars in BARS.items():
        backend = choose(declare(name, shape)[0], use_of(name, shape, device), "auto")
        yield case(variant=name, program=backend.name, run=backend.run, bar=bars[length > 2048])
    yield replace(programs[importance_of(KEYS)], bar=IMPORTANCE_BAR)
    yield replace(programs[importance_of(length)], bar=IMPORTANCE_BAR)
    if length <= 2048:
        for name in SIMILARITIES:
            use = use_of(name, shape, device, deterministic=True)
            backend = choose(declare(name, shape)[0], use, "auto")
            bar = DETERMINISTIC_BAR if name.endswith("unnormalised") else None
            made = case(variant=name, program=backend.name, run=backend.run, bar=bar)
            yield replace(made, deterministic=True)


def times(case: Case, p: Problem) -> Row:
    """Forward ms, forward and backward ms, peak GiB beyond the inputs."""
    inputs = [p.query_bhqd, p.key_bgkd, p.value_bgkd, *p.parameters.values(), *p.position_parameters.values()]
    grad = torch.randn_like(p.query_bhqd)
    cuda = case.device == "cuda"

    def forward() -> None:
        with torch.no_grad():
            case.run(p)

    def both() -> None:
        torch.autograd.grad(case.run(p), inputs, grad, allow_unused=True)

    whole = both if case.backward else forward
    forward()
    whole()
    result: Row = {"peak_gib": _peak_gib(whole) if cuda else 0.0}
    for key, call in {"forward_ms": forward, **({"both_ms": both} if case.backward else {})}.items():
        result |= _median(key, call) if cuda else {key: _on_a_cpu(call)}
    return result


def _peak_gib(call: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _median(key: str, call: Callable[[], None]) -> Row:
    from triton.testing import do_bench, do_bench_cudagraph

    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            return {key: do_bench_cudagraph(call, rep=20, return_mode="median")}
    except RuntimeError as error:  # something in it cannot be captured
        torch.cuda.synchronize()
        why = " ".join(str(error).split())[:200]
        return {key: do_bench(call, warmup=25, rep=80, return_mode="median"), "launches": why}


def _on_a_cpu(call: Callable[[], None]) -> float:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def measure(case: Case) -> Row:
    """One row; what a program cannot do, or runs out of memory with, is its ``problem``."""
    row: Row = {"shape": case.shape, "variant": case.variant, "backend": case.program}
    row |= {"deterministic": True} if case.deterministic else {}
    if case.missing:
        return row | {"problem": case.missing}
    torch._dynamo.reset()  # which gives up on a function after a few shapes
    torch.use_deterministic_algorithms(case.deterministic)
    try:
        return row | times(case, problem(case.variant, case.shape, case.device))
    except Exception as error:  # whatever a library raises: the other rows are still wanted
        text = " ".join(str(error).split())[:200]
        return row | {"problem": f"{type(error).__name__}: {text}"}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.empty_cache()


def compare(row: Row, case: Case, earlier: Sequence[Row]) -> None:
    """Adds the ratio, what it has to be, and for similarities what they are beside the eager sigmoid."""

    def of(variant: str, backend: str) -> Row | None:
        wanted = (case.shape, variant, backend, None)
        return next(
            (
                other
                for other in (*earlier, row)
                if (other["shape"], other["variant"], other["backend"], other.get("deterministic")) == wanted
                and "problem" not in other
            ),
            None,
        )

    base, eager = of(*BASELINE), of(SIMILARITIES[0], "eager")
    mine = row.get("both_ms" if case.backward else "forward_ms")
    row["ratio"] = mine / base["both_ms"] if mine and base else None
    if case.bar is not None:
        passed = row["ratio"] is not None and row["ratio"] <= case.bar
        row |= {"bar": case.bar, "passed": passed}
    if mine and eager and eager is not row and case.bar is not None and case.variant in SIMILARITIES:
        row["times_as_fast_as_eager"] = eager["both_ms"] / mine
        row["memory_of_eager"] = row["peak_gib"] / eager["peak_gib"] if eager["peak_gib"] else None


def line(row: Row) -> str:
    backend = row["backend"] + (" determ." if "deterministic" in row else "")
    bar = f"  bar {row['bar']:.2f} {'pass' if row['passed'] else 'FAIL'}" if "bar" in row else ""
    name = f"{row['shape']!s:22} {row['variant']:22} {backend:19}"
    if "problem" in row:
        return f"{name} {row['problem']}{bar}"
    both = f"{row['both_ms']:8.3f}" if "both_ms" in row else "       -"
    ratio = f"{row['ratio']:5.2f}" if row["ratio"] is not None else "    -"
    eager = ""
    if row.get("memory_of_eager") is not None:
        enough = row["times_as_fast_as_eager"] >= FASTER_THAN_EAGER
        enough = enough and row["memory_of_eager"] < MEMORY_OF_EAGER
        eager = f"  eager/{row['times_as_fast_as_eager']:.1f}, memory {row['memory_of_eager']:.2f} of eager's"
        eager += " pass" if enough else " FAIL"
    return (
        f"{name} forward {row['forward_ms']:7.3f} ms  both {both} ms  ratio {ratio}  "
        f"{row['peak_gib']:5.2f} GiB{bar}{eager}{'  launches' if 'launches' in row else ''}"
    )


def selected(options: argparse.Namespace) -> Iterator[Case]:
    """The chosen cases, of each shape the baseline first."""
    if options.bars:
        shapes = BAR_SHAPES if options.device == "cuda" else TINY_SHAPES
        if options.shapes:
            shapes = [shape for shape in shapes if _named(shape) in options.shapes]
        for shape in shapes:
            for case in bar_cases(shape, options.device):
                if (
                    case.bar is None
                    or not options.variants
                    or any(v in case.variant for v in options.variants)
                ):
                    yield case
        return
    wanted = options.shapes or USUAL
    shapes = TINY_SHAPES
    if options.device == "cuda":
        shapes = [shape for shape in SHAPES if wanted == ["all"] or _named(shape) in wanted]
    for shape in shapes:
        yield next(case for case in cases(shape, BASELINE[0], options.device) if case.program == BASELINE[1])
        for name in VARIANTS:
            if options.variants and not any(text in name for text in options.variants):
                continue
            for case in cases(shape, name, options.device):
                chosen = not options.backends or case.program in options.backends
                if chosen and (case.variant, case.program) != BASELINE:
                    yield case


def _named(shape: Shape) -> str:
    return f"{shape[2]}x{shape[3]}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bars", action="store_true", help="what auto chooses, against the bars")
    parser.add_argument("--shapes", nargs="+", help=f"length x head size, or all; default: {USUAL}")
    parser.add_argument("--variants", nargs="+", help="those whose names hold one of these texts")
    parser.add_argument("--backends", nargs="+", help="these alone, beside the baseline")
    parser.add_argument("--list", action="store_true", help="print what would be measured, without a card")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="no row begins after so long")
    parser.add_argument("--json", type=Path, help="write the rows here too, after each")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    until = time.monotonic()
    options = parse(arguments)
    until += options.limit_s
    if options.list:
        for case in selected(options):
            print(f"{case.shape!s:22} {case.variant:22} {case.program:19} {case.missing}")
        return []
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic rows
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(card, "torch", torch.__version__, flush=True)
    rows: list[Row] = []
    for case in selected(options):
        if time.monotonic() > until:
            case = replace(case, missing=f"left out: --limit-s {options.limit_s:g} is over")
        row = measure(case)
        compare(row, case, rows)
        rows.append(row)
        print(line(row), flush=True)
        if options.json is not None:
            write_atomically(options.json, json.dumps(rows, indent=1))
    barred = [row for row in rows if "bar" in row]
    if barred:
        print(f"{sum(row['passed'] for row in barred)} of {len(barred)} bars are met")
    return rows


if __name__ == "__main__":
    main()
