"""SentencePiece models, converted for an export: the same ids for any text, or a refusal."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from sinkbench.data.tokenizer import load_tokenizer
from sinkbench.errors import DataError
from sinkbench.export.tokenizer import write_tokenizer

TEXT = "the quick brown fox jumps over a lazy dog and the cat sits on a mat while rain falls in spain"
WORDS = TEXT.split()
SYMBOLS = ["<|endoftext|>", "<tag>", "<tag>more", "ox"]
PARTS = [
    *WORDS,
    *SYMBOLS,
    "<ta",
    "g>",
    "\u2581",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "Grüße",
    "\U0001f600",
    "a\u0301",
    "x",
]
SPACES = ["", " ", " ", "  ", "   ", " \n ", "\t "]


def train(path: Path, **options: Any) -> Path:
    rng = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(WORDS, k=12)) for _ in range(300)]),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": 360,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "minloglevel": 2,
            **options,
        },
    )
    path.write_bytes(model.getvalue())
    return path


def texts() -> list[str]:
    rng = random.Random(1)
    fixed = [
        "",
        " ",
        "   ",
        "\n",
        " \n",
        "\u2581",
        " \u2581 ",
        "the fox \u2581",
        " the  fox\n the dog ",
        "\n  fox  \n",
    ]
    for _ in range(1000):
        words = "".join(rng.choice(PARTS) + rng.choice(SPACES) for _ in range(rng.randrange(1, 12)))
        fixed.append(rng.choice(SPACES) + words)
    return fixed


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"add_dummy_prefix": False}, id="no prefix"),
        pytest.param({"remove_extra_whitespaces": False}, id="spaces kept"),
        pytest.param({"remove_extra_whitespaces": False, "add_dummy_prefix": False}, id="as it is"),
        pytest.param(
            {
                "remove_extra_whitespaces": False,
                "add_dummy_prefix": False,
                "user_defined_symbols": SYMBOLS,
                "eos_id": -1,
            },
            id="symbols",
        ),
    ],
)
def test_ids_and_text_are_those_of_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(train(tmp_path / "x.model", **options))
    write_tokenizer(tokenizer, tmp_path, 64)
    converted = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text, ids in zip(texts(), tokenizer.encode(texts()), strict=True):
        assert converted.encode(text, add_special_tokens=False).ids == ids.tolist(), repr(text)
        assert converted.decode(ids.tolist(), skip_special_tokens=False) == tokenizer.decode(ids.tolist())


def test_the_eos_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    symbols = {"eos_id": -1, "user_defined_symbols": ["<tag>", "<|endoftext|>"]}
    kept = {"remove_extra_whitespaces": False, "add_dummy_prefix": False}
    for options, eos in (({}, "</s>"), ({"eos_piece": "<end>"}, "<end>"), (symbols, "<|endoftext|>")):
        tokenizer = load_tokenizer(train(tmp_path / "x.model", **kept, **options))
        write_tokenizer(tokenizer, tmp_path, 64)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == eos
        assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id(eos) == tokenizer.eos_id


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"model_type": "unigram", "vocab_size": 300},
            "is not a BPE model with byte fallback and no normalisation",
        ),
        ({"byte_fallback": False, "vocab_size": 60}, "is not a BPE model with byte fallback"),
        ({"normalization_rule_name": "nfkc"}, "is not a BPE model with byte fallback"),
        (
            {"user_defined_symbols": ["<tag>"], "remove_extra_whitespaces": False},
            "has user-defined symbols, and adds",
        ),
        (
            {"user_defined_symbols": ["<tag>"], "add_dummy_prefix": False},
            "has user-defined symbols, and adds",
        ),
        (
            {
                "user_defined_symbols": ["\u2581\u2581"],
                "add_dummy_prefix": False,
                "remove_extra_whitespaces": False,
            },
            "has user-defined symbols with spaces",
        ),
        ({"treat_whitespace_as_suffix": True}, "does not put a mark for a space before words"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    tokenizer = load_tokenizer(train(tmp_path / "x.model", **options))
    with pytest.raises(DataError, match=rf"x.model: {problem}.*; give a tokenizer.json with --tokenizer"):
        write_tokenizer(tokenizer, tmp_path, 64)
    assert not (tmp_path / "tokenizer.json").exists()


def test_unused_pieces_are_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "x.model")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    proto.pieces[-1].type = proto.SentencePiece.UNUSED
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match=r"x.model: has unused pieces, so it cannot be converted; give"):
        write_tokenizer(load_tokenizer(path), tmp_path, 64)


def test_what_transformers_5_wrote_is_readable_for_transformers_4(tmp_path: Path) -> None:
    vocabulary = Tokenizer(WordLevel({"a": 0, "</s>": 1, "<x>": 2}, unk_token="a"))
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    kept = {"eos_token": "</s>", "model_max_length": 64}
    config = {
        "backend": "tokenizers",
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<x>"],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | kept))
    write_tokenizer(load_tokenizer(tmp_path), tmp_path / "out", 64)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    now = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<x>"]}
    assert written == now | kept
