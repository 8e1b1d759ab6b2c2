"""Peak memory of ``sinkbench measure``'s default metrics at long length against plain forward passes.

python benchmarks/measure_memory.py [smollm2_135m llama_1b llama_7b] [--length 4096] [--device cuda]

Each model is made from its sizes with random weights in bf16, on the device, and gets one sequence of random
tokens: by transformers' own forward pass with sdpa attention, with logits and without (the latter needs less,
as the measurement needs no logits), and by the measurement, which loads models with eager attention and
computes it itself. Peaks count the weights. Prints a JSON line per model; a CPU tells no peaks.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from sinkbench.measure.hf import measure_open_model
from sinkbench.measure.hf_load import OpenModel
from sinkbench.measure.hf_place import Place, Trust
from sinkbench.measure.settings import Settings

TARGET = 1.3
"""The measurement's peak over that of a plain forward pass, at most."""

# hidden size, feed-forward size, layers, heads, kv heads, vocabulary, tied embeddings
MODELS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "tiny": (64, 96, 2, 4, 2, 128, True),
    "smollm2_135m": (576, 1536, 30, 9, 3, 49152, True),
    "llama_1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama_7b": (4096, 11008, 32, 32, 32, 32000, False),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=["smollm2_135m", "llama_1b", "llama_7b"], metavar="MODEL"
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.models) - MODELS.keys())
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; choose from {', '.join(MODELS)}")
    for name in chosen.models:
        print(json.dumps(measured(name, chosen.length, torch.device(chosen.device))), flush=True)


def measured(name: str, length: int, device: torch.device) -> dict[str, Any]:
    """The peaks of one model and the seconds of each call. The first measurement compiles kernels too."""
    model = build(name, length, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = torch.randint(model.config.vocab_size, (1, length), device=device)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        plain = peak(lambda: model(input_ids=tokens, use_cache=False), device)
        backbone = peak(lambda: model.base_model(input_ids=tokens, use_cache=False), device)
    model.set_attn_implementation("eager")
    opened = OpenModel(model=model, place=Place(target=name, folder=Path(name)), trust=Trust())
    settings = Settings(length=length, count=1, device=device.type, dtype="bfloat16")

    def measure() -> None:
        (result,) = measure_open_model(opened, ["random"], settings, lambda done, total: None)
        row_sum = result.metrics["row_sum"]
        assert isinstance(row_sum, float)
        assert abs(row_sum - 1) < 0.01, f"rows of weights sum to {row_sum}"

    first, again = peak(measure, device), peak(measure, device)
    return {
        "model": name,
        "length": length,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "weights_gb": round(weights / 1e9, 3),
        "peak_forward_gb": gigabytes(plain[0]),
        "peak_forward_without_logits_gb": gigabytes(backbone[0]),
        "peak_measure_gb": gigabytes(first[0]),
        "ratio": ratio(first[0], plain[0]),
        "ratio_without_logits": ratio(first[0], backbone[0]),
        "target": TARGET,
        "seconds": {
            "forward": round(plain[1], 2),
            "forward_without_logits": round(backbone[1], 2),
            "measure_first": round(first[1], 2),
            "measure": round(again[1], 2),
        },
    }


def build(name: str, length: int, device: torch.device) -> Any:
    """A LLaMA with random weights in bf16, made on the device."""
    hidden, feed_forward, layers, heads, kv_heads, vocabulary, tied = MODELS[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def peak(call: Callable[[], Any], device: torch.device) -> tuple[int | None, float]:
    """Most bytes allocated at once during a call, those from before it included; and its seconds."""
    on_card = device.type == "cuda"
    gc.collect()
    if on_card:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    call()
    if on_card:
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) if on_card else None, time.perf_counter() - start


def gigabytes(count: int | None) -> float | None:
    return None if count is None else round(count / 1e9, 3)


def ratio(count: int | None, base: int | None) -> float | None:
    return None if count is None or base is None else round(count / base, 3)


if __name__ == "__main__":
    main()
