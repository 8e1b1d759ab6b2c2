"""``sinkbench data prepare`` and ``sinkbench data verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sinkbench.errors import DataError

if TYPE_CHECKING:
    from sinkbench.config import TokenizerConfig
    from sinkbench.data.manifest import Manifest

_INPUTS = """files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, .md, .py, .rst), folders of them,
python:docs, python:help or python:stdlib (text of the running Python; help is docs as dialogues)"""


_TOKENIZER = "a SentencePiece .model, a tokenizer.json or its folder, or OWNER/NAME on the Hugging Face hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands of ``sinkbench data`` to its parser."""
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    summary = "turn documents into token files for training"
    prepare = commands.add_parser("prepare", help=summary, description=summary)
    prepare.add_argument("inputs", nargs="+", metavar="INPUT", help=_INPUTS)
    prepare.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="folder to write")
    tokenizer = prepare.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="PATH", help=_TOKENIZER)
    tokenizer.add_argument(
        "--train-tokenizer", metavar="SIZE", type=int, help="train a SentencePiece BPE model of SIZE tokens"
    )
    prepare.add_argument(
        "--text-field", default="text", metavar="NAME", help="of JSON and parquet records (default: text)"
    )
    held_out = prepare.add_mutually_exclusive_group()
    held_out.add_argument(
        "--validation", nargs="+", default=(), metavar="INPUT", help="inputs that are held out, all of them"
    )
    held_out.add_argument(
        "--holdout",
        default=0.01,
        type=float,
        metavar="SHARE",
        help="share of documents for validation, from 0 to 1 (default: 0.01)",
    )
    prepare.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")

    summary = "prepare The Pile by domain, the paper's data"
    pile = commands.add_parser("pile", help=summary, description=summary)
    files = "folder with train_the_pile_*.jsonl and valid_the_pile_*.jsonl, or OWNER/NAME on the hub"
    pile.add_argument("source", metavar="SOURCE", help=f"{files} (the paper's: sail/regmix-data-sample)")
    pile.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="folder of folders")
    pile.add_argument("--tokenizer", required=True, metavar="PATH", help=_TOKENIZER)
    pile.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")

    summary = "compare a prepared folder with its manifest, all of it"
    verify = commands.add_parser("verify", help=summary, description=summary)
    verify.add_argument("folder", metavar="DIR", type=Path)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand that was chosen; returns the exit code.

    Raises:
        DataError: see ``prepare`` and ``verify``.
        HostError: see ``prepare``.
    """
    if args.data_command == "verify":
        return _verify(args.folder)
    if args.workers is not None and args.workers < 1:
        raise DataError("--workers", f"{args.workers} is not a number of processes", "give 1 or more")
    return _pile(args) if args.data_command == "pile" else _prepare(args)


def _verify(folder: Path) -> int:
    from sinkbench.data.verify import verify

    _print_counts(folder, verify(folder), "is as it was prepared")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from sinkbench.data.documents import find_inputs
    from sinkbench.data.manifest import MANIFEST
    from sinkbench.data.prepare import Request, prepare

    inputs, validation = (tuple(find_inputs(names)) for names in (args.inputs, args.validation))
    request = Request(inputs, _tokenizer_config(args), args.text_field, args.holdout, validation)
    found = (args.output / MANIFEST).exists()
    manifest = prepare(request, args.output, workers=args.workers, progress=True)
    _print_counts(args.output, manifest, "was already prepared from these inputs" if found else "is prepared")
    return 0


def _pile(args: argparse.Namespace) -> int:
    from sinkbench.data.pile import prepare_pile

    prepared = prepare_pile(args.source, args.output, args.tokenizer, workers=args.workers, progress=True)
    for domain, manifest in prepared.items():
        _print_counts(args.output / domain, manifest, "is prepared")
    print(f"train on all of them, shuffled together, with data.train={args.output}")
    return 0


def _tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    from pydantic import ValidationError

    from sinkbench.config import TokenizerConfig

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
