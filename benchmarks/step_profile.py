"""Where the time of a training step goes: the kernels of one step by kind, and what is left of the step."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "communication": r"nccl|all_?reduce|all_?gather|reduce_scatter|gloo|c10d",
    "optimizer": r"adam|multi_tensor|foreach|lerp|addcdiv|fusedoptimizer|lpnorm|norm(one|two)ops",
    "attention": (
        r"flash|fmha|attention|attn|sdpa|cudnn::fusion|backward_(keys|queries)|divide_gradient|^forward$|"
        r"table_gradient|^_row_sums|^_column_sums"
    ),
    "norm": r"rms_norm|layer_?norm|gammabeta|rsqrt",
    "loss": r"^_row$|logsumexp|cross_entropy|nll|log_softmax|logits|exp_gather|amax",
    "activation": r"silu|gelu|relu|threshold",
    "rotary": r"rotar|rope|mul_neg_(\w+_)?(slice|split|stack)|slice_sub",
    "matmul": r"gemm|nvjet|xmma|cutlass|cublas|splitk|aten::(mm|addmm|bmm)",
    "gradients": r"functor_add<float>|fillfunctor<float>|addcmul",
}
"""Kinds of kernels by their names, the first that fits. ``gradients`` are added up, scaled and set to zero.
What the compiler fuses bears the names of what went in. Everything else is ``other``; the longest kernels are
listed by name, to check this by."""
OTHER = "other"
LISTED = 40
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace that occupy the card; ranges that a program annotates have others."""


@dataclass(frozen=True)
class Kernel:
    """Times in ms."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name.lower())), OTHER)


def breakdown(step: Callable[[], object], device: torch.device, step_ms: float) -> dict[str, Any]:
    """Milliseconds of one step by kind, and the longest kernels. On a CPU these are operators, without those
    that they call. Kernels of several streams may add up to more than the step.

    Args:
        step_ms: of a step that is not profiled; of this, what no kernel covers is idle.
    """
    cuda = device.type == "cuda"
    # Without the host's operators, which would slow the host down and hold the ranges that it annotates.
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    by_name: defaultdict[str, float] = defaultdict(float)
    if cuda:
        kernels = kernels_of(_trace(profiler))
        for kernel in kernels:
            by_name[kernel.name] += kernel.end - kernel.start
        busy = covered(kernels)
    else:
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
    }


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
