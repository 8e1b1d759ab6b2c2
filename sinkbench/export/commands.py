"""The command lines of tools/: what is wrong with one is told before torch is imported, which takes long."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sinkbench.checkpoint import refuse_absent
from sinkbench.command import Parser, run_command
from sinkbench.config import BigramBackcopyConfig, IndexedConfig
from sinkbench.errors import SinkbenchError
from sinkbench.export.model_folder import find_model


def to_hf(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="convert_to_hf.py", description="A checkpoint to a Hugging Face model folder.")
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, or of a run")
    parser.add_argument("out", type=Path, help="new folder for the model")
    parser.add_argument("--step", type=int, help="checkpoint of this step of a run (default: the last)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of weights (default: as they are)")
    parser.add_argument("--tokenizer", type=Path, help="file or folder (default: that of the run's data)")
    parser.add_argument("--push", metavar="REPOSITORY", help="upload to the Hugging Face hub as USER/NAME")
    parser.add_argument("--private", action="store_true", help="with --push: a private repository")
    return run_command(lambda: _to_hf(parser.parse_args(argv)))


def _to_hf(arguments: argparse.Namespace) -> None:
    if arguments.private and not arguments.push:
        raise SinkbenchError("--private", "has no effect without --push", "add --push USER/NAME")
    refuse_absent(arguments.checkpoint)
    from sinkbench.export import to_hf

    class_name = to_hf.convert(
        arguments.checkpoint,
        arguments.out,
        step=arguments.step,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
    )
    print(f"{arguments.out}: {class_name}")
    if arguments.push:
        print(to_hf.push(arguments.out, arguments.push, arguments.private))


def from_hf(argv: Sequence[str] | None = None) -> int:
    """Writes the checkpoint and says how to train it."""
    parser = Parser(
        prog="convert_from_hf.py",
        description="A Hugging Face model to a checkpoint that training starts from, with its recipe.",
    )
    parser.add_argument("model", help="folder of a Hugging Face model, or its name on the hub")
    parser.add_argument("out", type=Path, help="new folder for the checkpoint and its recipe")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 for bf16 models, else fp32")
    parser.add_argument("--seq-length", type=int, help="of the recipe (default: the model's longest)")
    parser.add_argument("--tokenizer", type=Path, help="file or folder (default: the model's)")
    return run_command(lambda: _from_hf(parser.parse_args(argv)))


def _from_hf(arguments: argparse.Namespace) -> None:
    model = find_model(arguments.model)
    from sinkbench.export import from_hf

    config = from_hf.convert(
        str(model),
        arguments.out,
        dtype=arguments.dtype,
        seq_length=arguments.seq_length,
        tokenizer=arguments.tokenizer,
    )
    print(f"{arguments.out}: train it with `python -m sinkbench.pretrain {arguments.out}/recipe.yaml`")
    print(f"it trains on {_data_line(config.data)}")


def _data_line(data: BigramBackcopyConfig | IndexedConfig) -> str:
    """What the recipe trains on, and which override changes that."""
    if isinstance(data, BigramBackcopyConfig):
        return "a synthetic task: set 'data={source: indexed, train: FOLDER}'"
    if data.prepare is not None:
        return f"{', '.join(data.prepare.inputs)}: set 'data.prepare.inputs=[TEXTS]'"
    return f"{', '.join(entry.path for entry in data.train)}: set data.train=FOLDER"
