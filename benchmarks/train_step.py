"""A whole training step: tokens per second, MFU, memory and where the time goes, against two baselines, in
one run on one device.

    python -m benchmarks.train_step [--models 60m 1b] [--variants softmax '{name: sigmoid, normalize: false}']
        [--subjects ours megatron plain] [--fused auto] [--steps 10] [--json FILE]
    python -m benchmarks.train_step --device cpu --tiny

The baselines compute softmax: (a) megatron is megatron-core's local layers with SDPA as core attention, (b)
plain a PyTorch model under torch.compile with fused AdamW. Ratios are to plain's tokens per second.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import step_subjects
from benchmarks.step_subjects import TINY, Subject
from sinkbench import flops, manifest
from sinkbench.config import Config
from sinkbench.megatron.parallel import Layout

SIGMOID = "{name: sigmoid, normalize: false}"
MICRO_BATCH = {"60m": 16, "1b": 8}
"""Sequences of 2,048 tokens."""
KINDS = {
    "communication": r"nccl|all_?reduce|all_?gather|reduce_scatter|gloo|c10d",
    "attention": r"flash|fmha|attention|attn|backward_(keys|queries)|divide_gradient|^forward$",
    "matmul": r"gemm|nvjet|xmma|cutlass|cublas|splitk|aten::(mm|addmm|bmm)",
    "optimizer": r"adam|multi_tensor|foreach|lerp|addcdiv|addcmul",
    "loss": r"logsumexp|cross_entropy|nll|log_softmax|logits|exp_gather|amax",
    "norm": r"norm|rsqrt",
}
"""Kinds of kernels by their names, the first that fits. What the compiler fuses bears the names of what went
in; everything else is ``other``. The report holds the longest kernels by name, to check this by."""
LISTED = 40


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name.lower())), "other")


def breakdown(subject: Subject, tokens: Sequence[Tensor], device: torch.device) -> dict[str, Any]:
    """Milliseconds of one step by kind, and the longest kernels. On a card what is not spent in kernels is
    idle; on a CPU these are operators."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        subject.step(tokens)
        wall = 1e3 * (time.perf_counter() - began)
    by_kernel: defaultdict[str, float] = defaultdict(float)
    for event in profiler.events():
        if not cuda:
            by_kernel[event.name] += event.self_cpu_time_total / 1e3
        elif event.device_type.name == "CUDA":
            by_kernel[event.name] += event.self_device_time_total / 1e3
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, milliseconds in by_kernel.items():
        kinds[kind_of(name)] += milliseconds
    kinds["idle"] = max(0.0, wall - sum(kinds.values()))
    longest = [
        {"name": name[:160], "kind": kind_of(name), "ms": round(ms, 3)}
        for name, ms in sorted(by_kernel.items(), key=lambda item: -item[1])[:LISTED]
    ]
    return {"profiled_ms": wall, "kinds_ms": dict(kinds), "longest": longest}


def measure(
    name: str, variant: str, config: Config, layout: Layout, options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    cuda = layout.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    subject = step_subjects.make(name, config, layout)
    tokens = step_subjects.random_tokens(config, options.micro_batches, layout.device)
    for _ in range(options.warmup):
        loss = subject.step(tokens)
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        loss = subject.step(tokens)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    count = sum(part[:, 1:].numel() for part in tokens)
    rate = count / statistics.median(seconds)
    assert config.model.vocab_size is not None
    work = flops.flops_per_token(config.model, config.model.vocab_size)
    peak = flops.peak(manifest.device_name(layout.device), config.train.precision)
    row = {
        "subject": name,
        "variant": variant,
        "tokens_per_second": rate,
        "mfu": None if peak is None else 100 * rate * work / peak,
        "step_s": seconds,
        "loss": loss,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        **breakdown(subject, tokens, layout.device),
    }
    del subject, tokens
    step_subjects.free()
    return row


def configure(model: str, variant: str, options: argparse.Namespace) -> Config:
    size = options.micro_batch or MICRO_BATCH[model]
    overrides = [
        f"model.attention={variant}",
        f"train.device={options.device}",
        f"train.fused={options.fused}",
        f"train={{micro_batch_size: {size}, global_batch_size: {size * options.micro_batches}}}",
        *(TINY if options.tiny else ()),
        *options.overrides,
    ]
    return step_subjects.load(model, overrides)


def rows_of(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    cases = [("ours", variant) for variant in options.variants if "ours" in options.subjects]
    cases += [(name, "softmax") for name in ("megatron", "plain") if name in options.subjects]
    rows = []
    for name, variant in cases:
        config = configure(model, variant, options)
        layout = step_subjects.start(config)
        row = {"model": model, "device": manifest.device_name(layout.device)}
        row |= measure(name, variant, config, layout, options)
        print(f"{model} {name} {variant}: {row['tokens_per_second']:,.0f} tokens/s", flush=True)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    plain = {row["model"]: row["tokens_per_second"] for row in rows if row["subject"] == "plain"}
    kinds = (*KINDS, "other", "idle")
    columns = ["model", "subject", "variant", "tokens/s", "MFU %", "to plain", "peak GiB", *kinds]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        mfu, memory, base = row["mfu"], row["peak_gib"], plain.get(row["model"])
        shares = [100 * row["kinds_ms"].get(kind, 0.0) / row["profiled_ms"] for kind in kinds]
        cells = [
            *(row["model"], row["subject"], row["variant"], f"{row['tokens_per_second']:,.0f}"),
            "" if mfu is None else f"{mfu:.1f}",
            "" if base is None else f"{row['tokens_per_second'] / base:.2f}",
            "" if memory is None else f"{memory:.1f}",
            *(f"{share:.0f} %" for share in shares),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MICRO_BATCH), default=list(MICRO_BATCH))
    parser.add_argument(
        "--variants", nargs="+", default=["softmax", SIGMOID], help="values of model.attention"
    )
    subjects = ["ours", "megatron", "plain"]
    parser.add_argument("--subjects", nargs="+", choices=subjects, default=subjects)
    parser.add_argument("--fused", default="auto", help="train.fused of ours")
    parser.add_argument("--micro-batch", type=int, help="sequences of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("overrides", nargs="*", help="of the recipe, as in sinkbench.pretrain")
    options = parser.parse_args(arguments)
    rows = [row for model in options.models for row in rows_of(model, options)]
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
