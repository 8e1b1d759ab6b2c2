"""Tokenizers: a trained SentencePiece model, a given one, or a Hugging Face tokenizer.json.

Text is encoded as plain text: no BOS or EOS is added, nothing is truncated, and characters that spell
a special token are characters.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from sinkbench.config import MIN_TRAINED_VOCAB
from sinkbench.data import hub
from sinkbench.data.manifest import file_sha256
from sinkbench.errors import DataError

EOS_TOKENS = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>")
"""Where a tokenizer does not name its EOS, the first of these that it has."""

_HF_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_EOS_REMEDY = "use a tokenizer that has an end-of-text token"
_LINE_CHARS = 4000
"""Lines are cut to this length for training: SentencePiece skips what exceeds max_sentence_length bytes."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        path: its main file.
        files: what to copy to have it elsewhere, the main file first.
        vocab_size: one more than the largest token id.
        eos_id: the token that ends a document.
        special_ids: of the tokens that stand for no text, that one among them.
        sha256: of the main file.
    """

    path: Path
    files: tuple[Path, ...]
    vocab_size: int
    eos_id: int
    special_ids: frozenset[int]
    sha256: str

    @property
    def kind(self) -> Literal["sentencepiece", "huggingface"]:
        """Which library reads it."""

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The token ids of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file.

    Raises:
        DataError: the file is no such model, or has no EOS.
    """

    kind: Literal["sentencepiece"] = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        self.files: tuple[Path, ...] = (path,)
        proto = _read(path)
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise DataError(str(path), "is not a SentencePiece model", "give a .model file") from error
        self.vocab_size: int = self._processor.vocab_size()
        if not proto or not self.vocab_size:
            raise DataError(str(path), "is an empty SentencePiece model", "give a trained .model file")
        self.eos_id = self._find_eos()
        processor = self._processor
        special = (i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i))
        self.special_ids = frozenset({*special, self.eos_id})
        self.sha256 = file_sha256(path)

    def _find_eos(self) -> int:
        processor = self._processor
        if processor.eos_id() >= 0:
            return int(processor.eos_id())
        for token in EOS_TOKENS:
            piece = processor.piece_to_id(token)
            if processor.id_to_piece(piece) == token:
                return int(piece)
        raise DataError(str(self.path), f"has no EOS (looked for {', '.join(EOS_TOKENS)})", _EOS_REMEDY)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        rows = self._processor.encode(list(texts), num_threads=1)
        return [np.asarray(row, dtype=np.int32) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids]))


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of the tokenizers library, with the EOS that a ``tokenizer_config.json``
    beside it names.

    Raises:
        DataError: the file is no such tokenizer, or has no EOS.
    """

    kind: Literal["huggingface"] = "huggingface"

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        side_files = (path.with_name(name) for name in _HF_SIDE_FILES)
        self.files: tuple[Path, ...] = (path, *(side for side in side_files if side.is_file()))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(_read(path))
        except Exception as error:  # the library raises plain Exception or ValueError
            problem = f"is not a tokenizer.json ({error})"
            raise DataError(str(path), problem, "give a tokenizer.json of a fast tokenizer") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocabulary.values(), default=-1)
        self.eos_id = self._find_eos(vocabulary)
        added = self._tokenizer.get_added_tokens_decoder()
        special = (number for number, token in added.items() if token.special)
        self.special_ids = frozenset({*special, self.eos_id})
        self.sha256 = file_sha256(path)

    def _find_eos(self, vocabulary: dict[str, int]) -> int:
        named = self._named_eos()
        if named is not None:
            if named not in vocabulary:
                problem = f"has no token {named!r}, which {_HF_SIDE_FILES[0]} names as eos_token"
                raise DataError(str(self.path), problem, "correct eos_token")
            return vocabulary[named]
        for token in EOS_TOKENS:
            if token in vocabulary:
                return vocabulary[token]
        raise DataError(str(self.path), f"has no EOS (looked for {', '.join(EOS_TOKENS)})", _EOS_REMEDY)

    def _named_eos(self) -> str | None:
        path = self.path.with_name(_HF_SIDE_FILES[0])
        if not path.is_file():
            return None
        try:
            eos = json.loads(_read(path)).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(str(path), f"is not a JSON object ({error})", "correct or remove it") from error
        content = eos.get("content") if isinstance(eos, dict) else eos
        return content if isinstance(content, str) else None

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file or folder.

    Args:
        path: a SentencePiece .model, a tokenizer.json, a folder that holds tokenizer.json or else
            tokenizer.model, or OWNER/NAME of a model on the Hugging Face hub.

    Raises:
        DataError: nothing there is a tokenizer that can be read, or it has no EOS.
    """
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        problem = "holds neither tokenizer.json nor tokenizer.model"
        raise DataError(str(path), problem, "give the folder of a fast tokenizer")
    if hub.is_name(str(path)) and path.suffix not in (".model", ".json"):
        return HuggingFaceTokenizer(hub.tokenizer(str(path)))
    if not path.exists():
        raise DataError(str(path), "no such tokenizer", "give a .model, a tokenizer.json or its folder")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    problem = f"is not a tokenizer by its name ({path.suffix or 'no extension'})"
    raise DataError(str(path), problem, "give a .model, a tokenizer.json or its folder")


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Copies a tokenizer's files into a folder, so that ``load_tokenizer`` reads it from there.

    Returns:
        Its main file there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    main, *side_files = tokenizer.files
    for path in side_files:
        shutil.copyfile(path, folder / path.name)
    copied = folder / f"tokenizer{main.suffix}"
    shutil.copyfile(main, copied)
    return copied


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a SentencePiece BPE model with byte fallback and writes it.

    Text comes back from its ids as it was: it is not normalised, spaces are kept, and what the
    vocabulary lacks (line ends among it) is spelled in bytes. Ids: 0 unknown, 1 <s>, 2 </s>. The same
    texts give the same file.

    Raises:
        DataError: the vocabulary size does not suit the text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _LINE_CHARS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    path.write_bytes(model.getvalue())


def _training_error(message: str, vocab_size: int) -> DataError:
    """SentencePiece's messages in ours, which name the sizes that the text allows."""
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        problem = f"a vocabulary of {vocab_size} cannot hold the text's characters"
        return DataError("tokenizer", problem, f"train one well above {found[1]} tokens")
    if found := re.search(r"set it to a value <= (\d+)", message):
        problem = f"the text is too little for a vocabulary of {vocab_size}"
        smaller = int(found[1]) >= MIN_TRAINED_VOCAB
        remedy = (
            f"train one of {found[1]} or fewer tokens, or give more text" if smaller else "give more text"
        )
        return DataError("tokenizer", problem, remedy)
    if "!sentences_.empty()" in message:
        return DataError("tokenizer", "there is no text to train it on", "give files that hold text")
    return DataError("tokenizer", f"SentencePiece cannot train it ({message})", "use a given tokenizer")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE_CHARS):
                yield line[start : start + _LINE_CHARS]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise DataError(str(path), problem, "give a file that can be read") from error
