"""The tokenizer of an exported model, as the one file that transformers needs no other library for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sinkbench.data.tokenizer import Tokenizer, copy_tokenizer
from sinkbench.errors import DataError

_CONFIG = "tokenizer_config.json"
_SPACE = "▁"
"""Stands for a space in the pieces of SentencePiece."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and its configuration; a SentencePiece BPE model is converted.

    Raises:
        DataError: the SentencePiece model is of another kind.
    """
    if tokenizer.kind == "sentencepiece":
        tokens = _convert(tokenizer.path, folder / "tokenizer.json")
    else:
        copy_tokenizer(tokenizer, folder)
        if (folder / _CONFIG).exists():
            return
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokens = {"eos_token": _token(vocabulary, tokenizer.eos_id)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token(vocabulary: dict[str, Any], number: int) -> str:
    for added in vocabulary.get("added_tokens", []):
        if added["id"] == number:
            return str(added["content"])
    return next(str(token) for token, at in vocabulary["model"]["vocab"].items() if at == number)


def _convert(model: Path, path: Path) -> dict[str, str]:
    """Writes a SentencePiece BPE model as tokenizer.json; returns its special tokens.

    SentencePiece merges the neighbours whose piece has the best score; so the merges are all ways to make
    a piece of two others, by score.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, decoders, normalizers
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import BPE

    proto = _model_proto(model)
    processor: Any = SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    ids = {piece: number for number, piece in enumerate(pieces)}
    learned = [i for i in range(len(pieces)) if not _is_special(processor, i)]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted((pieces[i] for i in learned), key=lambda p: -processor.get_score(ids[p]))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    unknown = pieces[processor.unk_id()]
    fast = Fast(BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(_SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    fast.normalizer = normalizers.Sequence(steps)
    fast.decoder = decoders.Sequence(undo)
    special = [p for i, p in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)]
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    fast.save(str(path))
    return {"unk_token": unknown, "eos_token": pieces[processor.eos_id()]}


def _is_special(processor: Any, number: int) -> bool:
    return bool(processor.is_control(number) or processor.is_unknown(number) or processor.is_byte(number))


def _model_proto(path: Path) -> Any:
    """What the model says of its kind.

    Raises:
        DataError: it is not a BPE model whose text is taken as it is.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback or normalizer.precompiled_charsmap:
        problem = "is not a BPE model with byte fallback and no normalisation, so it cannot be converted"
        raise DataError(str(path), problem, "give a tokenizer.json with --tokenizer")
    return proto
