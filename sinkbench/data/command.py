"""``sinkbench data prepare`` and ``sinkbench data verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinkbench.config import TokenizerConfig
    from sinkbench.data.manifest import Manifest

_INPUTS = """files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, .md, .py, .rst), folders of them,
python:docs or python:stdlib (text of the running Python)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands of ``sinkbench data`` to its parser."""
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    summary = "turn documents into token files for training"
    prepare = commands.add_parser("prepare", help=summary, description=summary)
    prepare.add_argument("inputs", nargs="+", metavar="INPUT", help=_INPUTS)
    prepare.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="folder to write")
    tokenizer = prepare.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", metavar="PATH", help="a SentencePiece .model, a tokenizer.json, or its folder"
    )
    tokenizer.add_argument(
        "--train-tokenizer", metavar="SIZE", type=int, help="train a SentencePiece BPE model of SIZE tokens"
    )
    prepare.add_argument(
        "--text-field", default="text", metavar="NAME", help="of JSON and parquet records (default: text)"
    )
    prepare.add_argument(
        "--holdout",
        default=0.01,
        type=float,
        metavar="SHARE",
        help="share of documents for validation, from 0 to 1 (default: 0.01)",
    )
    prepare.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")

    summary = "compare a prepared folder with its manifest, all of it"
    verify = commands.add_parser("verify", help=summary, description=summary)
    verify.add_argument("folder", metavar="DIR", type=Path)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand that was chosen; returns the exit code.

    Raises:
        DataError: see ``prepare`` and ``verify``.
        HostError: see ``prepare``.
    """
    return _verify(args.folder) if args.data_command == "verify" else _prepare(args)


def _verify(folder: Path) -> int:
    from sinkbench.data.verify import verify

    _print_counts(folder, verify(folder), "is as it was prepared")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from sinkbench.data.documents import find_inputs
    from sinkbench.data.manifest import MANIFEST
    from sinkbench.data.prepare import Request, prepare
    from sinkbench.errors import DataError

    if args.workers is not None and args.workers < 1:
        raise DataError("--workers", f"{args.workers} is not a number of processes", "give 1 or more")
    inputs = tuple(find_inputs(args.inputs))
    request = Request(inputs, _tokenizer_config(args), args.text_field, args.holdout)
    found = (args.output / MANIFEST).exists()
    manifest = prepare(request, args.output, workers=args.workers, progress=True)
    _print_counts(args.output, manifest, "was already prepared from these inputs" if found else "is prepared")
    return 0


def _tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    from pydantic import ValidationError

    from sinkbench.config import TokenizerConfig
    from sinkbench.errors import DataError

    try:
        return TokenizerConfig(path=args.tokenizer, train_vocab_size=args.train_tokenizer)
    except ValidationError as error:
        problem = f"{args.train_tokenizer} is too small a vocabulary ({error.errors()[0]['msg']})"
        raise DataError("--train-tokenizer", problem, "give a larger size") from error


def _print_counts(folder: Path, manifest: Manifest, state: str) -> None:
    print(f"{folder} {state}")
    for split, documents in manifest.documents.items():
        print(f"  {split}: {documents:,} documents, {manifest.tokens[split]:,} tokens")
    print(f"  left out: {manifest.duplicates:,} duplicates, {manifest.empty:,} empty documents")
    if manifest.not_text:
        print(f"  left out: {manifest.not_text:,} files of folders that are not UTF-8")
    tokenizer = manifest.tokenizer
    print(f"  tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}")
