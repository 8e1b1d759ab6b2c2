"""Where the time of a training step goes: the kernels of one step by kind, and what is left of the step, in
which the card waits."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "communication": r"nccl|all_?reduce|all_?gather|reduce_scatter|gloo|c10d",
    "optimizer": (
        r"adam|multi_tensor|foreach|lerp|addcdiv|fusedoptimizer|lpnorm|norm(one|two)ops|^_(update|advance|squares)$"
    ),
    "attention": (
        r"flash|fmha|attention|attn|sdpa|cudnn::fusion|backward_(keys|queries)|divide_gradient|^forward$|"
        r"table_gradient|^(row|column)_sums$"
    ),
    "norm": r"rms_?norm|layer_?norm|gammabeta|rsqrt|^void cucomputegradinput",
    "loss": r"^_row$|logsumexp|cross_entropy|nll|log_softmax|logits|exp_gather|amax",
    "activation": r"silu|gelu|relu|threshold",
    "rotary": r"rotar|rope|mul_neg_(\w+_)?(slice|split|stack)|slice_sub",
    "matmul": r"gemm|nvjet|xmma|cutlass|cublas|splitk|aten::(mm|addmm|bmm)",
    "gradients": r"functor_add<float>|fillfunctor<float>|addcmul|^_add_rows$",
}
"""Kinds of kernels by their names, the first that fits. ``gradients`` are added up, scaled and set to zero.
What the compiler fuses bears the names of what went in. Everything else is ``other``; the longest kernels are
listed by name, to check this by."""
OTHER = "other"
LISTED = 40
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace that occupy the card; ranges that a program annotates have others."""

MARK = "spin_kernel"
"""Of the name of the kernel that ``torch.cuda._sleep`` launches, which nothing else here does."""
EDGE = "edge of the step"
SIZES = {"below 2 us": 2e-3, "below 10 us": 1e-2, "below 100 us": 1e-1, "longer": float("inf")}
"""Classes of gaps by the length in ms that they stay below."""
LISTED_GAPS = 10


@dataclass(frozen=True)
class Kernel:
    """Times in ms."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Gap:
    """Time in which no kernel runs.

    Attributes:
        start, ms: when it begins, and for how long; in ms.
        before: what ended last.
        after: what ends it.
    """

    start: float
    ms: float
    before: str
    after: str


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name.lower())), OTHER)


def breakdown(step: Callable[[], object], device: torch.device, step_ms: float) -> dict[str, Any]:
    """Milliseconds of one step by kind, the longest kernels, and on a card the gaps between them. On a CPU
    these are operators, without those that they call. Kernels of several streams may add up to more than the
    step.

    Args:
        step_ms: of a step that is not profiled; of this, what no kernel covers is idle.

    Returns:
        ``busy_ms``, ``kinds_ms`` and ``longest``; on a card also ``gaps``, see ``summary_of_gaps``, and
        ``profiled_ms``, which busy time and gaps add up to: the profiled step, whose gaps profiling may
        lengthen.
    """
    found: dict[str, Any] = {}
    by_name: defaultdict[str, float] = defaultdict(float)
    if device.type == "cuda":
        kernels, start, end = _one_step(kernels_of(_trace(_profiled_between_marks(step))))
        for kernel in kernels:
            by_name[kernel.name] += kernel.end - kernel.start
        busy = covered(kernels)
        gaps = gaps_between([Kernel(EDGE, start, start), *kernels, Kernel(EDGE, end, end)])
        found = {"profiled_ms": end - start, "gaps": summary_of_gaps(gaps, start)}
    else:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        for event in profiler.events():
            by_name[event.name] += event.self_cpu_time_total / 1e3
        busy = sum(by_name.values())
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, milliseconds in by_name.items():
        kinds[kind_of(name)] += milliseconds
    kinds["idle"] = max(0.0, step_ms - busy)
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:LISTED]
    return {
        "busy_ms": busy,
        "kinds_ms": dict(kinds),
        "longest": [{"name": name[:200], "kind": kind_of(name), "ms": round(ms, 3)} for name, ms in longest],
        **found,
    }


def _profiled_between_marks(step: Callable[[], object]) -> profile:
    """Two steps with a mark before the second and after it. Steps follow each other as in a run: the host
    waits for the card only where the step itself does."""
    # Without the host's operators, which would slow the host down and hold the ranges that it annotates.
    profiler = profile(activities=[ProfilerActivity.CUDA])
    with profiler:
        for _ in range(2):
            step()
            torch.cuda._sleep(1)
        torch.cuda.synchronize()
    return profiler


def _one_step(kernels: Sequence[Kernel]) -> tuple[list[Kernel], float, float]:
    """Those between the two marks, and when these are over and begin: start and end of the step.

    Raises:
        ValueError: there are not two marks.
    """
    marks = sorted((kernel for kernel in kernels if MARK in kernel.name), key=lambda mark: mark.start)
    if len(marks) != 2:
        raise ValueError(f"{len(marks)} kernels named {MARK} in the trace, where a step is between two")
    start, end = marks[0].end, marks[1].start
    return [kernel for kernel in kernels if start <= kernel.start < end], start, end


def _trace(profiler: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def kernels_of(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """What ran on the card, from the events of a Chrome trace, whose times are in microseconds."""
    return [
        Kernel(event["name"], event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)
        for event in events
        if event.get("cat") in KERNELS and "dur" in event
    ]


def covered(kernels: Iterable[Kernel]) -> float:
    """The time during which at least one kernel runs."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def gaps_between(kernels: Iterable[Kernel]) -> list[Gap]:
    """When no kernel of any stream runs, from the first to the last, in order."""
    gaps: list[Gap] = []
    last: Kernel | None = None
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if last is not None and kernel.start > last.end:
            gaps.append(Gap(last.end, kernel.start - last.end, last.name, kernel.name))
        if last is None or kernel.end > last.end:
            last = kernel
    return gaps


def summary_of_gaps(gaps: Sequence[Gap], start: float) -> dict[str, Any]:
    """``total_ms``; by size class the number and the ms together; the longest, with the kernels around them
    and when in the step they begin.

    Args:
        start: of the step, in ms.
    """
    sizes = {name: {"count": 0, "ms": 0.0} for name in SIZES}
    for gap in gaps:
        size = sizes[next(name for name, below in SIZES.items() if gap.ms < below)]
        size["count"] += 1
        size["ms"] += gap.ms
    longest = sorted(gaps, key=lambda gap: -gap.ms)[:LISTED_GAPS]
    return {
        "total_ms": sum(gap.ms for gap in gaps),
        "sizes": sizes,
        "longest": [
            {
                "ms": round(gap.ms, 4),
                "at_ms": round(gap.start - start, 3),
                "before": gap.before[:200],
                "after": gap.after[:200],
            }
            for gap in longest
        ],
    }
