"""A checkpoint to a Hugging Face model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkbench import plugins, recipe
from sinkbench.config import Config, ParallelConfig
from sinkbench.data.run_tokenizer import find_tokenizer
from sinkbench.data.tokenizer import Tokenizer
from sinkbench.errors import DataError, HostError
from sinkbench.export import template
from sinkbench.export.architecture import architecture_of
from sinkbench.export.card import write_card
from sinkbench.export.families import FAMILIES
from sinkbench.export.family import LAYER
from sinkbench.export.pieces import Piece
from sinkbench.export.safetensors_files import Entry, write_shards
from sinkbench.export.stored import StoredTensors
from sinkbench.export.tokenizer import write_tokenizer
from sinkbench.measure.runs import find_checkpoint
from sinkbench.model import Declarations, declare
from sinkbench.plugins import Resolved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class Model:
    """What there is to export."""

    config: Config
    resolved: Resolved
    declared: Declarations
    stored: StoredTensors

    @property
    def rows(self) -> int:
        """Of the vocabulary's table."""
        return self.stored.tensors["embedding.word_embeddings.weight"].shape[0]

    @classmethod
    def open(cls, folder: Path, path: Path) -> Model:
        """
        Args:
            folder: of a checkpoint.
            path: of its recipe.
        """
        config = recipe.to_config(recipe.load(path))
        train = config.train.model_copy(update={"device": "cpu"})
        here = {"parallel": ParallelConfig(), "train": train, "model": config.model.portable()}
        # An export needs no metrics: neither their packages, nor that none is listed twice.
        unmeasured = config.model_copy(update={"measure": config.measure.model_copy(update={"metrics": []})})
        resolved = plugins.resolve(unmeasured, plugins.discover())
        stored = StoredTensors(folder)
        rows = stored.tensors["embedding.word_embeddings.weight"].shape[0]
        declared = declare(config.model_copy(update=here), resolved, rows)
        return cls(config=config, resolved=resolved, declared=declared, stored=stored)


def convert(
    checkpoint: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a model that transformers loads.

    Args:
        checkpoint: of a run, or a run's folder (its last checkpoint, or that of ``step``).
        out: absent or empty; on an error nothing is left there.
        dtype: "fp32", "bf16" or "fp16"; default: that of the weights.
        tokenizer: a tokenizer's file or folder; default: that of the run's data.

    Returns:
        The class that transformers loads it as.

    Raises:
        CheckpointError: the checkpoint is absent, incomplete or damaged.
        PluginError: a plugin is not installed, or cannot be exported.
        DataError: there is no tokenizer.
        HostError: ``out`` is not empty or cannot be written.
    """
    found = find_checkpoint(checkpoint, step)
    model = Model.open(found.folder, found.recipe)
    encoder = find_tokenizer(model.config, found.folder, tokenizer)
    if encoder is not None and encoder.vocab_size > model.rows:
        problem = f"has {encoder.vocab_size} tokens, the model has {model.rows}"
        raise DataError(str(encoder.path), problem, "give the tokenizer of the run's data")
    with new_folder(out) as folder:
        class_name = _write_model(model, folder, encoder, DTYPES[dtype] if dtype else None, shard_bytes)
        if encoder is not None:
            write_tokenizer(encoder, folder, model.config.model.seq_length)
        (folder / "recipe.yaml").write_text(recipe.dump(model.config), encoding="utf-8")
        write_card(folder, model.config, found, class_name)
    return class_name


def _write_model(
    model: Model, folder: Path, tokenizer: Tokenizer | None, dtype: torch.dtype | None, shard_bytes: int
) -> str:
    config, pieces = _family(model)
    if config["model_type"] == template.MODEL_TYPE:
        template.write_source(folder, model.resolved, model.declared)
        template.check_source(folder, config)
    eos = tokenizer.eos_id if tokenizer else None
    dtype = dtype or model.stored.tensors["embedding.word_embeddings.weight"].dtype
    ids = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}
    config |= {**ids, "torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"_from_model_config": False, "eos_token_id": eos})
    entries = [entry for piece in pieces for entry in _entries(piece, model, dtype)]
    write_shards(folder, entries, shard_bytes)
    class_name: str = config["architectures"][0]
    return class_name


def _family(model: Model) -> tuple[dict[str, Any], list[Piece]]:
    """config.json and the tensors: of a family of transformers if one computes the model exactly."""
    architecture = architecture_of(model.declared)
    for family in FAMILIES:
        config = family.write(architecture) if architecture is not None else None
        if architecture is not None and config is not None:
            names = {"architectures": [family.class_name], "model_type": family.model_type}
            return {**names, **config}, family.pieces(architecture)
    config = template.configuration(model.config, model.resolved, model.declared)
    return config, template.pieces(model.config, model.declared, model.stored.tensors)


def _entries(piece: Piece, model: Model, dtype: torch.dtype) -> list[Entry]:
    """The tensors of a piece, for every layer. Each is read when it is written; of a piece with several,
    all of them are, since they lie together."""
    layers = range(model.config.model.num_layers) if piece.stored.startswith(LAYER) else [None]
    shape = model.stored.tensors[piece.stored].shape
    found = []
    for layer in layers:
        parts = piece.split(torch.empty(shape if layer is None else shape[1:], device="meta"))
        for number, (name, part) in enumerate(zip(piece.names, parts, strict=True)):
            read = partial(_read, piece, model.stored, layer, number)
            found.append(Entry(name.format(layer), tuple(part.shape), dtype, read))
    return found


def _read(piece: Piece, stored: StoredTensors, layer: int | None, number: int) -> Tensor:
    return piece.split(stored.read(piece.stored, layer))[number]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place once the block is through.

    Raises:
        HostError: ``out`` is not empty or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HostError(str(out), "is not empty", "name a folder that is new or empty")
    out = out.absolute()
    writing = out.with_name(f".{out.name}.writing")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        yield writing
        if out.exists():
            out.rmdir()
        writing.rename(out)
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(out.parent):
            raise  # of what is read
        problem = f"cannot be written ({error.strerror or error})"
        raise HostError(str(out), problem, "choose a writable folder on a disk with room") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def push(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder to the Hugging Face hub, with the credentials of ``hf auth login``.

    Returns:
        The model's address.

    Raises:
        HostError: huggingface_hub is not installed, or the hub refuses or cannot be reached.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise HostError(
            "--push", "huggingface_hub is not installed", "pip install 'sinkbench[hf]'"
        ) from error
    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(folder_path=folder, repo_id=repository)
    except Exception as error:
        # whatever the network did: the kinds differ by version of the hub's client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"{repository} cannot be uploaded ({reason})"
        remedy = f"log in with `hf auth login`, or go online; the model is in {folder}"
        raise HostError("--push", problem, remedy) from error
    return address
