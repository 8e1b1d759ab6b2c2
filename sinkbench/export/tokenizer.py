"""The tokenizer of an exported model, as the one file that transformers needs no other library for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sinkbench.data.tokenizer import Tokenizer, copy_tokenizer
from sinkbench.errors import DataError

_CONFIG = "tokenizer_config.json"
_CLASS = "PreTrainedTokenizerFast"
_SPACE = "▁"
"""Stands for a space in the pieces of SentencePiece."""
_REMEDY = "give a tokenizer.json with --tokenizer"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and its configuration; a SentencePiece BPE model is converted.

    Raises:
        DataError: the SentencePiece model is of a kind that cannot be converted.
    """
    if tokenizer.kind == "sentencepiece":
        tokens = _convert(tokenizer, folder / "tokenizer.json")
    else:
        copy_tokenizer(tokenizer, folder)
        if (folder / _CONFIG).exists():
            _undo_transformers_5(folder / _CONFIG)
            return
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokens = {"eos_token": _token(vocabulary, tokenizer.eos_id)}
    config = {
        "tokenizer_class": _CLASS,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    _write(folder / _CONFIG, config)


def _undo_transformers_5(path: Path) -> None:
    """Writes what transformers 5 calls otherwise as both it and transformers 4 read it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("backend", None) is None:
        return
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = _CLASS
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write(path, config)


def _write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token(vocabulary: dict[str, Any], number: int) -> str:
    for added in vocabulary.get("added_tokens", []):
        if added["id"] == number:
            return str(added["content"])
    return next(str(token) for token, at in vocabulary["model"]["vocab"].items() if at == number)


def _convert(tokenizer: Tokenizer, path: Path) -> dict[str, str]:
    """Writes a SentencePiece BPE model as tokenizer.json; returns its special tokens.

    SentencePiece merges the neighbours whose piece has the best score; so the merges are all ways to make
    a piece of two others, by score.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Regex, decoders, normalizers
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import BPE

    proto = _model_proto(tokenizer.path)
    processor: Any = SentencePieceProcessor(model_file=str(tokenizer.path))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    ids = {piece: number for number, piece in enumerate(pieces)}
    learned = [i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL]
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
    rules = proto.normalizer_spec
    if rules.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(_SPACE))
    if rules.remove_extra_whitespaces:
        # Only the space counts, no tab or line end; at the end of a text what stands for it counts too.
        before = [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        steps = [*before, *steps, normalizers.Replace(Regex(rf"{_SPACE}+\z"), "")]
        undo.append(decoders.Replace(Regex(r"\A +"), ""))
    elif rules.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    fast.normalizer = normalizers.Sequence(steps)
    fast.decoder = decoders.Sequence(undo)
    special = [p for i, p in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)]
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    fast.add_tokens([AddedToken(symbol, normalized=False) for symbol in _symbols(proto)])
    fast.save(str(path))
    return {"unk_token": unknown, "eos_token": pieces[tokenizer.eos_id]}


def _symbols(proto: Any) -> list[str]:
    """The user-defined symbols: text that is one token wherever it is found."""
    return [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]


def _model_proto(path: Path) -> Any:
    """What the model says of its kind.

    Raises:
        DataError: it is not a BPE model whose text is taken as it is, but for spaces.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback or normalizer.precompiled_charsmap:
        problem = "is not a BPE model with byte fallback and no normalisation, so it cannot be converted"
        raise DataError(str(path), problem, _REMEDY)
    if any(piece.type == piece.UNUSED for piece in proto.pieces):
        raise DataError(str(path), "has unused pieces, so it cannot be converted", _REMEDY)
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        problem = "does not put a mark for a space before words, so it cannot be converted"
        raise DataError(str(path), problem, _REMEDY)
    symbols = _symbols(proto)
    # The tokenizers library cuts the text at these first, and would change the spaces of each part.
    if symbols and (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces):
        problem = "has user-defined symbols, and adds or drops spaces, so it cannot be converted"
        raise DataError(str(path), problem, _REMEDY)
    if any(" " in symbol or _SPACE in symbol for symbol in symbols):
        raise DataError(str(path), "has user-defined symbols with spaces, so it cannot be converted", _REMEDY)
    return proto
