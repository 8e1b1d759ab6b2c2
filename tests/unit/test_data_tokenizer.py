"""Tokenizers: text comes back, EOS is found, nothing is added or cut, and wrong files are named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sinkbench.data.tokenizer import load_tokenizer, train_sentencepiece
from sinkbench.errors import DataError

TEXTS = [
    "def f(x):\n    return  x + 1234\n\n\n",
    "\tTabs,  two spaces , and Grüße \u4f60\u597d \U0001f600\r\n",
    " leading and trailing ",
    "</s> <s> <unk> <|endoftext|> <0x0A> are text here",
]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    train_sentencepiece(["the cat sat on the mat\n    indented the cat\n"] * 50, 300, path)
    return path


def hf_tokenizer(folder: Path, special: list[str]) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"], trainer)
    # What published tokenizers come with, and pre-training must not use.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_gives_text_back(sentencepiece_model: Path, text: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    [ids] = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.eos_id not in ids
    assert ids.max() < tokenizer.vocab_size == 300


def test_training_is_reproducible_and_merges_indentation(sentencepiece_model: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.model"
    train_sentencepiece(["the cat sat on the mat\n    indented the cat\n"] * 50, 300, again)
    assert again.read_bytes() == sentencepiece_model.read_bytes()
    [ids] = load_tokenizer(sentencepiece_model).encode(["    indented"])
    assert len(ids) < len("indented")


def test_training_reads_lines_of_any_length(tmp_path: Path) -> None:
    train_sentencepiece(["\u4f60\u597dabc " * 20000], 270, tmp_path / "x.model")
    [ids] = load_tokenizer(tmp_path / "x.model").encode(["abc"])
    assert len(ids) == 1


def test_vocabulary_that_does_not_suit_the_text(tmp_path: Path) -> None:
    words = " ".join(f"{i:x}" for i in range(3000, 9000, 7))
    with pytest.raises(DataError, match=r"too little for a vocabulary of 5000; train one of \d+ or fewer"):
        train_sentencepiece([words], 5000, tmp_path / "x.model")
    with pytest.raises(DataError, match=r"too little for a vocabulary of 400; give more text$"):
        train_sentencepiece(["a few words"], 400, tmp_path / "x.model")
    with pytest.raises(DataError, match="there is no text to train it on"):
        train_sentencepiece([], 300, tmp_path / "x.model")
    characters = " ".join(chr(0x4E00 + i) for i in range(1000))
    with pytest.raises(
        DataError, match=r"300 cannot hold the text's characters; train one well above 12\d\d"
    ):
        train_sentencepiece([characters], 300, tmp_path / "x.model")
    assert not (tmp_path / "x.model").exists()


@pytest.mark.parametrize("text", TEXTS)
def test_huggingface_gives_text_back_whole(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(hf_tokenizer(tmp_path, ["<|endoftext|>"]))
    [ids] = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.eos_id == 0
    assert tokenizer.eos_id not in ids


def test_folder_and_its_config_name_the_eos(tmp_path: Path) -> None:
    hf_tokenizer(tmp_path, ["</s>", "<end>"])
    assert load_tokenizer(tmp_path).eos_id == 0
    config = tmp_path / "tokenizer_config.json"
    for eos in ("<end>", {"content": "<end>", "lstrip": False}):
        config.write_text(json.dumps({"eos_token": eos}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.eos_id == 1
        assert [path.name for path in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]
    config.write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(DataError, match=r"has no token '<nowhere>', which tokenizer_config.json names"):
        load_tokenizer(tmp_path)
    config.write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config.json: is not a JSON object"):
        load_tokenizer(tmp_path)


def test_folder_with_a_sentencepiece_model(sentencepiece_model: Path) -> None:
    assert load_tokenizer(sentencepiece_model.parent).sha256 == load_tokenizer(sentencepiece_model).sha256


def test_sentencepiece_eos_by_name_or_not_at_all(tmp_path: Path) -> None:
    for name, symbols in (("with", ["<|endoftext|>"]), ("without", [])):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat"] * 9),
            model_writer=model,
            vocab_size=24,
            model_type="bpe",
            eos_id=-1,
            minloglevel=2,
            user_defined_symbols=symbols,
        )
        (tmp_path / f"{name}.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "with.model")
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"
    with pytest.raises(DataError, match=r"without.model: has no EOS \(looked for </s>"):
        load_tokenizer(tmp_path / "without.model")


def test_huggingface_without_eos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.json: has no EOS \(looked for </s>"):
        load_tokenizer(hf_tokenizer(tmp_path, []))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.model", None, "no such tokenizer"),
        ("words.txt", b"x", "is not a tokenizer by its name (.txt)"),
        ("broken.model", b"garbage", "is not a SentencePiece model"),
        ("empty.model", b"", "is an empty SentencePiece model"),
        ("broken.json", b'{"model": 3}', "is not a tokenizer.json"),
        ("folder", None, "no such tokenizer"),
    ],
)
def test_wrong_tokenizer_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
