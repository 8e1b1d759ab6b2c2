"""Time and peak memory of converting 1.1B random parameters from Hugging Face and back, on the CPU.

python benchmarks/convert_time.py [--layers 22] [--dtype bf16] [--folder FOLDER]

The model has the sizes of TinyLlama-1.1B. Each conversion is a process of its own, imports included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from sinkbench.export.model_files import ModelFiles
from sinkbench.export.safetensors_files import Entry, write_shards
from sinkbench.export.to_hf import DTYPES, SHARD_BYTES

TOOLS = Path(__file__).parents[1] / "tools"
HIDDEN, FFN, KEYS, VOCABULARY = 2048, 5632, 256, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--folder", help="on a disk with room for three copies of the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        original = write_model(root / "original", arguments.layers, DTYPES[arguments.dtype])
        timed("convert_from_hf", "convert_from_hf.py", original, root / "checkpoint")
        timed("convert_to_hf", "convert_to_hf.py", root / "checkpoint", root / "export")
        before, after = ModelFiles(original), ModelFiles(root / "export")
        same = set(before.names) == set(after.names)
        same = same and all(torch.equal(before.read(name), after.read(name)) for name in before.names)
        print("there and back: bitwise the same" if same else "there and back: DIFFERENT")


def write_model(folder: Path, layers: int, dtype: torch.dtype) -> Path:
    """Random weights as a folder of Hugging Face."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{k}.weight": shape for k, shape in LAYER_SHAPES.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    folder.mkdir()
    entries = [Entry(k, shape, dtype, partial(torch.randn, shape)) for k, shape in shapes.items()]
    write_shards(folder, entries, SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    size = sum(entry.size for entry in entries)
    print(f"{parameters / 1e9:.2f}B parameters, {dtype}, {size / 2**30:.2f} GiB")
    return folder


def timed(name: str, tool: str, *arguments: Path) -> None:
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, TOOLS / tool, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} failed")
    seconds = time.monotonic() - start
    print(f"{name}: {seconds:.1f} s, {usage.ru_utime + usage.ru_stime:.1f} s of CPU, ", end="")
    print(f"peak {usage.ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
