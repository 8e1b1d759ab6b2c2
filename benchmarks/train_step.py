"""A whole training step: tokens per second, MFU, memory and where the time goes, against two baselines, in
one run on one device.

    python -m benchmarks.train_step [--models 60m 1b] [--variants softmax '{name: sigmoid, normalize: false}']
        [--subjects ours megatron plain] [--fused auto] [--steps 10] [--limit-s S] [--json FILE]
    python -m benchmarks.train_step --models 60m --subjects ours --variants all --no-profile
    torchrun --nproc-per-node 2 -m benchmarks.train_step 'parallel={tensor: 2, sequence: true}' \\
        --models 1b --subjects ours --variants softmax [--against FILE]
    python -m benchmarks.train_step --device cpu --tiny

The baselines compute softmax: (a) megatron is megatron-core's local layers with SDPA as core attention, (b)
plain a PyTorch model under torch.compile with fused AdamW. Ratios are to plain's tokens per second, and to
those of our softmax. Under torchrun, sizes are of a data-parallel rank, tokens of the whole job.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import step_subjects, step_variants
from benchmarks.step_profile import KINDS, OTHER, breakdown
from benchmarks.step_subjects import TINY, Ours, Subject
from sinkbench import flops, manifest
from sinkbench.config import Config
from sinkbench.files import write_atomically
from sinkbench.megatron import parallel
from sinkbench.megatron.parallel import Layout

SIGMOID = "{name: sigmoid, normalize: false}"
MICRO_BATCH = {"60m": 16, "1b": 8}
"""Sequences of 2,048 tokens."""
PROBES, PROBES_TO_WARM = 5, 2
NAMED = 5
"""Kernels of no kind that the text names."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    model: str
    subject: str
    variant: str


def measure(case: Case, config: Config, layout: Layout, options: argparse.Namespace) -> Row:
    """One row of the table."""
    if layout.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    subject = step_subjects.make(case.subject, config, layout)
    try:
        tokens = step_subjects.random_tokens(config, options.micro_batches, layout)
        row = timed(subject, tokens, config, layout, options)
        if not options.profile:
            return row
        try:
            row |= breakdown(lambda: subject.step(tokens), layout.device, row["step_ms"])
            row |= probe(subject, case.model, row["tokens_per_second"]) if isinstance(subject, Ours) else {}
        except Exception as error:  # the rate is known, and stays
            row |= _problem(error, "profile_problem")
        return row
    finally:
        subject.close()


def timed(
    subject: Subject, tokens: Sequence[Tensor], config: Config, layout: Layout, options: argparse.Namespace
) -> Row:
    cuda = layout.device.type == "cuda"
    for _ in range(options.warmup):
        subject.step(tokens)
    if cuda:
        torch.cuda.synchronize()
    seconds = []
    for _ in range(options.steps):
        # Each step waits for its own loss, and ours not for its update, which the next one then waits for.
        began = time.perf_counter()
        loss = subject.step(tokens)
        seconds.append(time.perf_counter() - began)
    step_s = statistics.median(seconds)
    rate = layout.data_size * sum(part[:, 1:].numel() for part in tokens) / step_s
    assert config.model.vocab_size is not None
    work = flops.flops_per_token(config.model, config.model.vocab_size)
    peak = flops.peak(manifest.device_name(layout.device), config.train.precision)
    return {
        "tokens_per_second": rate,
        "mfu": None if peak is None else 100 * rate * work / (peak * layout.world_size),
        "step_ms": 1e3 * step_s,
        "step_s": seconds,
        "loss": loss,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def _problem(error: Exception, key: str = "problem") -> Row:
    """
    Raises:
        Exception: the error itself in one of several processes, whose others wait for this one.
    """
    if parallel.world_size() > 1:
        raise error
    return {key: f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def probe(subject: Ours, model: str, rate: float) -> Row:
    """Time of a sink probe by the model's recipe, and its share in the steps from one to the next."""
    default = step_variants.default(model)
    probe = subject.probe(default)
    seconds = []
    for _ in range(PROBES):
        began = time.perf_counter()
        probe.run()
        seconds.append(time.perf_counter() - began)
    warm = statistics.median(seconds[PROBES_TO_WARM:])
    interval = default.measure.every * default.train.global_batch_size * default.model.seq_length
    return {"probe_s": warm, "probe_percent": 100 * warm / (warm + interval / rate)}


def configure(case: Case, options: argparse.Namespace) -> Config:
    size = options.micro_batch or MICRO_BATCH[case.model]
    overrides = [
        f"train.device={options.device}",
        f"train.fused={options.fused}",
        f"train={{micro_batch_size: {size}, global_batch_size: {size * options.micro_batches}}}",
        *(TINY if options.tiny else ()),
        *options.overrides,
    ]
    return step_variants.load_variant(case.model, case.variant, overrides)


def measured(case: Case, options: argparse.Namespace) -> Row:
    """A row, which holds a ``problem`` instead where the subject fails."""
    row: Row = {"model": case.model, "subject": case.subject, "variant": case.variant}
    if time.monotonic() > options.until:
        return row | {"problem": f"left out: --limit-s {options.limit_s:g} is over"}
    try:
        config = configure(case, options)
        layout = step_subjects.start(config)
        row |= {"device": manifest.device_name(layout.device), "cards": layout.world_size}
        row["parallel"] = config.parallel.model_dump(exclude_defaults=True) | {"data": layout.data_size}
        return row | measure(case, config, layout, options)
    except Exception as error:  # whatever it is: the other rows are still wanted
        return row | _problem(error)
    finally:
        step_subjects.free()


def cases(options: argparse.Namespace) -> list[Case]:
    found = []
    for model in options.models:
        if "ours" in options.subjects:
            every = ["softmax", *step_variants.paper_variants()]
            variants = every if options.variants == ["all"] else options.variants
            found += [Case(model, "ours", variant) for variant in variants]
        found += [Case(model, name, "softmax") for name in ("megatron", "plain") if name in options.subjects]
    return found


def add_ratios(rows: Sequence[Row], single: Sequence[Row]) -> None:
    """To plain, to our softmax, and to the rows of one card (``efficiency``, a card's share of the rate)."""
    for row in rows:
        if "problem" in row:
            continue
        for name, (subject, variant), among in (
            ("to_plain", ("plain", "softmax"), rows),
            ("to_softmax", ("ours", "softmax"), rows),
            ("efficiency", (row["subject"], row["variant"]), single),
        ):
            base = [
                other["tokens_per_second"]
                for other in among
                if (other["model"], other["subject"], other["variant"]) == (row["model"], subject, variant)
                and "problem" not in other
            ]
            if base:
                cards = row["cards"] if name == "efficiency" else 1
                row[name] = row["tokens_per_second"] / base[0] / cards


def table(rows: Sequence[Row]) -> str:
    kinds = (*KINDS, OTHER, "idle")
    profiled = any("kinds_ms" in row for row in rows)
    columns = ["model", "subject", "variant", "tokens/s", "MFU %", "to plain", "to softmax", "peak GiB"]
    columns += [*kinds, "probe"] if profiled else []
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row["model"], row["subject"], row["variant"]]
        if "problem" in row:
            cells.append(row["problem"])
        else:
            numbers = (
                ("tokens_per_second", ",.0f"),
                ("mfu", ".1f"),
                ("to_plain", ".2f"),
                ("to_softmax", ".2f"),
            )
            cells += [_cell(row.get(key), form) for key, form in (*numbers, ("peak_gib", ".1f"))]
        if "kinds_ms" in row:
            cells += [f"{100 * row['kinds_ms'].get(kind, 0.0) / row['step_ms']:.1f} %" for kind in kinds]
            cells += [_cell(row.get("probe_percent"), ".2f", " %")]
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        others = [k for k in row.get("longest", ()) if k["kind"] == OTHER][:NAMED]
        if others:
            named = "; ".join(f"{kernel['ms']:.1f} ms {kernel['name'][:90]}" for kernel in others)
            lines.append(f"other of {row['model']} {row['subject']} {row['variant']}: {named}")
    return "\n".join(lines)


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MICRO_BATCH), default=list(MICRO_BATCH))
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["softmax", SIGMOID],
        help="values of model.attention, runs of the paper's recipes (FOLDER/RECIPE/LABEL), or: all",
    )
    subjects = ["ours", "megatron", "plain"]
    parser.add_argument("--subjects", nargs="+", choices=subjects, default=subjects)
    parser.add_argument("--fused", default="auto", help="train.fused of ours")
    parser.add_argument("--micro-batch", type=int, help="sequences of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument(
        "--warmup",
        type=int,
        default=5,
        help="steps before the measured ones, CUDA graphs' capture among them",
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="no breakdown, no probe")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="no row begins after so long")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--json", type=Path, help="where the rows go, after each")
    parser.add_argument("--against", type=Path, help="rows of one card, as --json wrote them")
    parser.add_argument("overrides", nargs="*", help="of the recipe, as in sinkbench.pretrain")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    began = time.monotonic()
    options = parse(arguments)
    options.until = began + options.limit_s
    single = json.loads(options.against.read_text()) if options.against else []
    given, is_main = dist.is_initialized(), int(os.environ.get("RANK", "0")) == 0
    rows: list[Row] = []
    for case in cases(options):
        rows.append(measured(case, options))
        add_ratios(rows, single)
        if not is_main:
            continue
        if options.json is not None:
            write_atomically(options.json, json.dumps(rows, indent=1))
        shown = {key: value for key, value in rows[-1].items() if key not in ("longest", "step_s", "gaps")}
        print(json.dumps(shown), flush=True)
    parallel.shutdown(keep_process_group=given)
    if is_main:
        print(table(rows))
    return rows


if __name__ == "__main__":
    main()
