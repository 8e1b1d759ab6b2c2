"""A Hugging Face model to a checkpoint that training starts from, with a recipe that describes it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkbench import plugins, recipe
from sinkbench.checkpoint import RECIPE, write_info
from sinkbench.checksums import FileSum, hash_file
from sinkbench.config import Config, padded_vocab_size
from sinkbench.data.run_tokenizer import FOLDER
from sinkbench.data.tokenizer import copy_tokenizer, load_tokenizer
from sinkbench.errors import CheckpointError, DataError, SinkbenchError
from sinkbench.export import template
from sinkbench.export.architecture import Architecture
from sinkbench.export.families import FAMILIES
from sinkbench.export.family import Family
from sinkbench.export.model_files import ModelFiles
from sinkbench.export.model_folder import find_model
from sinkbench.export.pieces import Piece
from sinkbench.export.to_hf import new_folder
from sinkbench.export.written import Weight, write_weights

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(
    model: str,
    out: Path,
    *,
    dtype: str | None = None,
    seq_length: int | None = None,
    tokenizer: Path | None = None,
) -> Config:
    """Writes a checkpoint of weights, which any parallel layout reads, and its recipe.

    Args:
        model: a folder of save_pretrained, or a name on the Hugging Face hub.
        out: absent or empty; on an error nothing is left there.
        dtype: "fp32" or "bf16"; default: bf16 for models in bf16, fp32 for others.
        seq_length: of the recipe; default: the longest that the model knows.
        tokenizer: its file or folder; default: that in the model's folder.

    Returns:
        The recipe, which is also in ``out``.

    Raises:
        CheckpointError: there is no model, or a file of it is damaged.
        UnsupportedError: sinkbench cannot compute the model.
        DataError: the tokenizer cannot be used.
        HostError: ``out`` is not empty or cannot be written.
    """
    files = ModelFiles(find_model(model))
    with new_folder(out) as folder:
        values, pieces, known = _describe(files, seq_length)
        stored_dtype = DTYPES[dtype] if dtype else _dtype(files, known)
        values["train"]["precision"] = "bf16" if stored_dtype is torch.bfloat16 else "fp32"
        values["checkpoint"] = {**values.get("checkpoint", {}), "start_from": str(out.absolute())}
        vocab_size = values["model"]["vocab_size"] or files.config["vocab_size"]
        rows = padded_vocab_size(vocab_size)
        copied = _copy_tokenizer(files, folder, tokenizer, rows)
        if "data" not in values:
            values["data"] = _data(out / copied if copied else None, values["model"]["vocab_size"])
        config = recipe.to_config(recipe.Recipe(files.folder / "config.json", values, {}))
        plugins.resolve(config, plugins.discover())
        _check_table(files, known[_table(pieces).names[0]], config.model.hidden_size, vocab_size, rows)
        layers = config.model.num_layers
        weights = [_weight(piece, files, known, layers, rows, stored_dtype) for piece in pieces]
        write_weights(folder, weights)
        _finish(folder, config)
    return config


def _describe(
    files: ModelFiles, seq_length: int | None
) -> tuple[dict[str, Any], list[Piece], dict[str, str]]:
    """The recipe, how the tensors correspond, and where each lies in the files."""
    kind = files.config.get("model_type")
    if kind == template.MODEL_TYPE:
        if seq_length is not None:
            problem = "an export of sinkbench keeps that of its recipe"
            raise SinkbenchError("--seq-length", problem, "leave it out")
        return _describe_ours(files)
    family = next((family for family in FAMILIES if family.model_type == kind), None)
    if family is None:
        known = ", ".join(sorted(family.model_type for family in FAMILIES))
        problem = f"model_type {kind} is none that sinkbench can compute"
        raise CheckpointError(str(files.folder / "config.json"), problem, f"choose a model of {known}")
    with _readable(files):
        architecture = family.read(files.config)
    pieces = family.pieces(architecture)
    values = _recipe(architecture, files.folder.resolve().name, seq_length)
    return values, pieces, _places(family, architecture, pieces, files)


def _describe_ours(files: ModelFiles) -> tuple[dict[str, Any], list[Piece], dict[str, str]]:
    """The same for an export with the source of its plugins, by the recipe that it holds."""
    with _readable(files):
        values = copy.deepcopy(files.config["recipe"])
        values["name"] = f"{values['name']}_from_hf"
        values["model"]["vocab_size"] = values["model"]["vocab_size"] or files.config["vocab_size"]
        pieces = template.pieces_of(files.config, files.names)
        layers = int(files.config["num_hidden_layers"])
    places = {name.format(n): name.format(n) for p in pieces for name in p.names for n in _numbers(p, layers)}
    absent = sorted(places.keys() - set(files.names))
    if absent:
        raise _has_no(files, absent[0])
    return values, pieces, places


@contextmanager
def _readable(files: ModelFiles) -> Iterator[None]:
    """Turns what the reading of a damaged config.json raises into one line."""
    path = str(files.folder / "config.json")
    try:
        yield
    except KeyError as error:
        raise CheckpointError(path, f"has no {error.args[0]}", "copy the model again") from None
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        problem = f"is damaged ({type(error).__name__}: {error})"
        raise CheckpointError(path, problem, "copy the model again") from error


def _has_no(files: ModelFiles, name: str) -> CheckpointError:
    problem = f"has no {name}, which config.json calls for"
    return CheckpointError(str(files.folder), problem, "copy the model again")


def _numbers(piece: Piece, layers: int) -> Iterable[int | None]:
    """Of the layers that have the piece, from 0; None for one that is not of the layers."""
    return range(layers) if _stacked(piece) else (None,)


def _places(
    family: Family, architecture: Architecture, pieces: list[Piece], files: ModelFiles
) -> dict[str, str]:
    """Our name of each tensor -> its name in the files.

    Raises:
        CheckpointError: a tensor is absent, or there is one that the family does not have.
    """
    there, places = set(files.names), {}
    for piece in pieces:
        for layer in _numbers(piece, architecture.num_layers):
            for pattern in piece.names:
                name = pattern.format(layer)
                short = name.removeprefix(family.prefix)
                places[name] = name if name in there or short not in there else short
                if places[name] not in there:
                    raise _has_no(files, name)
    tied = {"lm_head.weight", "embed_out.weight"} if architecture.tie_embeddings else set()
    more = [n for n in there - set(places.values()) - tied if not n.endswith(family.ignored or ("\0",))]
    if more:
        problem = f"has {min(more)} and {len(more) - 1} more tensors that a {family.model_type} has not"
        raise CheckpointError(str(files.folder), problem, "name a plain causal language model")
    return places


def _recipe(a: Architecture, name: str, seq_length: int | None) -> dict[str, Any]:
    """A recipe that goes on training the model gently."""
    if seq_length is not None and a.learned_positions and seq_length != a.num_positions:
        problem = f"the model has learned {a.num_positions} positions"
        raise SinkbenchError("--seq-length", problem, "leave it out")
    positional: Any = "learned" if a.learned_positions else "none"
    if a.rotary is not None:
        positional = {"name": "rope", "base": a.rotary.base, "fraction": a.rotary.fraction}
    window = {"window": a.window} if a.window is not None else {}
    model = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_heads,
        "num_query_groups": a.num_kv_heads,
        "head_size": a.head_size,
        "ffn": a.ffn,
        "ffn_hidden_size": a.ffn_hidden_size,
        "linear_bias": a.linear_bias,
        "parallel_residual": a.parallel_residual,
        "seq_length": seq_length or a.num_positions,
        "vocab_size": a.vocab_size,
        "attention": {"name": "softmax", **window},
        "normalization": {"name": a.norm, "eps": a.eps},
        "positional": positional,
        "tie_embeddings": a.tie_embeddings,
    }
    return {
        "name": "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip("._-") or "model",
        "model": model,
        "optim": {"lr": 2e-5, "schedule": "cosine", "warmup_steps": 10, "weight_decay": 0.0},
        "train": {"steps": 100, "global_batch_size": 8},
        "measure": {"length": min(64, seq_length or a.num_positions)},
    }


def _copy_tokenizer(files: ModelFiles, folder: Path, given: Path | None, rows: int) -> str | None:
    """Copies the model's tokenizer, or the given one, and returns where it lies in the folder.

    Raises:
        DataError: it is none, or has more tokens than the model has rows for.
    """
    path = given if given is not None else _tokenizer_in(files.folder)
    if path is None:
        return None
    found = load_tokenizer(path)
    if found.vocab_size > rows:
        problem = f"has {found.vocab_size} tokens, the model has {rows}"
        raise DataError(str(found.path), problem, "give the model's own tokenizer with --tokenizer")
    copy_tokenizer(found, folder / FOLDER)
    return FOLDER


def _table(pieces: list[Piece]) -> Piece:
    return next(piece for piece in pieces if piece.stored == TABLES[0])


def _check_table(files: ModelFiles, name: str, hidden_size: int, vocab_size: int, rows: int) -> None:
    """A table that may be padded, as ours are, up to ``rows``."""
    shape = files.shape(name)
    if len(shape) != 2 or shape[1] != hidden_size or not vocab_size <= shape[0] <= rows:
        problem = f"has {name} of shape {shape}, where config.json tells {(vocab_size, hidden_size)}"
        raise CheckpointError(str(files.folder), problem, "copy the model again")


def _data(tokenizer: Path | None, vocab_size: int) -> dict[str, Any]:
    """Text of the running Python under the model's tokenizer; tokens of a task where the model has none."""
    if tokenizer is None:
        return {"source": "bigram_backcopy", "vocab_size": max(8, min(vocab_size, 65))}
    own = {"path": str(tokenizer.absolute())}
    return {"source": "indexed", "prepare": {"inputs": ["python:docs"], "tokenizer": own}}


def _tokenizer_in(folder: Path) -> Path | None:
    names = ("tokenizer.json", "tokenizer.model")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _dtype(files: ModelFiles, known: dict[str, str]) -> torch.dtype:
    """bf16 where the weights are; else fp32, which holds fp16 exactly."""
    some = files.read(next(iter(known.values())))
    return torch.bfloat16 if some.dtype is torch.bfloat16 else torch.float32


def _stacked(piece: Piece) -> bool:
    return "{}" in piece.names[0]


def _weight(
    piece: Piece, files: ModelFiles, known: dict[str, str], layers: int, rows: int, dtype: torch.dtype
) -> Weight:
    read = partial(_read, piece, files, known, rows)
    stacked = _stacked(piece)
    shape = tuple(read(0 if stacked else None).shape)
    return Weight(piece.stored, shape, dtype, layers if stacked else None, read)


def _read(piece: Piece, files: ModelFiles, known: dict[str, str], rows: int, layer: int | None) -> Tensor:
    parts = [files.read(known[name.format(layer)]) for name in piece.names]
    try:
        tensor = piece.join(parts)
    except RuntimeError as error:
        shapes = " and ".join(str(tuple(part.shape)) for part in parts)
        problem = f"has {piece.names[0].format(layer)} of shape {shapes}, which config.json does not tell"
        raise CheckpointError(str(files.folder), problem, "copy the model again") from error
    return _padded(tensor, rows) if piece.stored in TABLES else tensor


def _padded(table: Tensor, rows: int) -> Tensor:
    """Rows that fill the vocabulary up are the mean of the others: their logit is the mean logit, which by
    Jensen's inequality lies below that of the average probability, so that they take next to none."""
    missing = rows - len(table)
    if missing <= 0:
        return table
    return torch.cat([table, table.float().mean(0).to(table.dtype).expand(missing, -1)])


def _finish(folder: Path, config: Config) -> None:
    """Writes the recipe, and last what makes the folder a checkpoint."""
    (folder / RECIPE).write_text(recipe.dump(config), encoding="utf-8")
    files = {
        path.name: FileSum(path.stat().st_size, hash_file(path))
        for path in folder.iterdir()
        if path.is_file()
    }
    write_info(folder, step=0, layout={}, files=files)
