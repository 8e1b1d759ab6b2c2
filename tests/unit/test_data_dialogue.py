"""Dialogues: their text, the mask of their responses through packing and blends, and wrong records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sinkbench.config import IndexedConfig, TokenizerConfig
from sinkbench.data import dialogue
from sinkbench.data.documents import documents, find_inputs, units
from sinkbench.data.indexed import IndexedSource
from sinkbench.data.prepare import Request, prepare
from sinkbench.data.tokenizer import load_tokenizer, train_sentencepiece
from sinkbench.data.verify import verify
from sinkbench.errors import DataError
from sinkbench.megatron.datasets import open_tokens

CHAT = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is a sink?"},
        {"role": "assistant", "content": "a token that draws attention"},
        {"role": "user", "content": "which one?"},
        {"role": "assistant", "content": "mostly the first"},
    ]
}
INSTRUCTION = {"prompt": "say two words", "response": "two words"}
RESPONSES = ["a token that draws attention", "mostly the first", "two words"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "chat.model"
    train_sentencepiece([json.dumps(CHAT) + json.dumps(INSTRUCTION)] * 30, 320, path)
    return path


def write_lines(path: Path, records: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prepared(inputs: list[str], model: Path, folder: Path, **values: Any) -> Path:
    request = Request(tuple(find_inputs(inputs)), TokenizerConfig(path=str(model)), **values)
    prepare(request, folder, workers=1)
    return folder


def test_text_and_segments() -> None:
    found = dialogue.read(CHAT, "here")
    assert found == (
        "<|system|>\nbe brief\n<|user|>\nwhat is a sink?\n<|assistant|>\na token that draws attention"
        "<|user|>\nwhich one?\n<|assistant|>\nmostly the first"
    )
    assert [s.text for s in dialogue.segments(found) if s.response] == RESPONSES[:2]
    assert "".join(s.text for s in dialogue.segments(found)) == found
    assert dialogue.segments("plain") == (dialogue.Segment("plain", True),)


def test_responses_and_their_eos_are_masked_in(tmp_path: Path, model: Path) -> None:
    chat = write_lines(tmp_path / "chat.jsonl", [CHAT, INSTRUCTION])
    plain = write_lines(tmp_path / "plain.jsonl", [{"text": "no dialogue"}])
    folder = prepared([chat, plain], model, tmp_path / "out", holdout=0.0)
    verify(folder)
    file, mask = open_tokens(folder / "train"), np.fromfile(folder / "train.mask", bool)
    tokenizer = load_tokenizer(model)
    assert len(mask) == len(file.tokens)
    # Stretches of the mask, and what they say: every response with its EOS, and the plain document.
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    said = [file.tokens[start:end].tolist() for start, end in edges]
    eos = tokenizer.eos_id
    expected = [[*ids.tolist(), eos] for ids in tokenizer.encode([*RESPONSES, "no dialogue"])]
    assert said == [expected[0], expected[1], expected[2] + expected[3]]


def test_a_last_word_of_the_user_is_no_response(tmp_path: Path, model: Path) -> None:
    open_end = {"messages": [*CHAT["messages"], {"role": "user", "content": "thanks"}]}
    folder = prepared([write_lines(tmp_path / "a.jsonl", [open_end])], model, tmp_path / "out", holdout=0.0)
    file, mask = open_tokens(folder / "train"), np.fromfile(folder / "train.mask", bool)
    assert file.tokens[-1] == load_tokenizer(model).eos_id
    assert not mask[-1]


def test_masks_follow_their_tokens_through_packing_and_blends(tmp_path: Path, model: Path) -> None:
    records = [{"prompt": f"ask {i}", "response": f"answer {i} " * 3} for i in range(60)]
    chat = prepared([write_lines(tmp_path / "c.jsonl", records)], model, tmp_path / "chat", holdout=0.2)
    texts = [{"text": f"plain text {i} " * 4} for i in range(60)]
    plain = prepared([write_lines(tmp_path / "p.jsonl", texts)], model, tmp_path / "plain", holdout=0.2)
    assert not (plain / "train.mask").exists()
    size = 17
    config = IndexedConfig.model_validate(
        {"source": "indexed", "train": [{"path": str(chat), "weight": 2}, {"path": str(plain)}]}
    )
    source = IndexedSource.open(config, seq_length=size - 1, seed=3)
    masks: dict[tuple[int, ...], list[bool]] = {}
    for folder in (chat, plain):
        tokens = open_tokens(folder / "train").tokens
        mask = np.fromfile(folder / "train.mask", bool) if folder == chat else np.ones(len(tokens), bool)
        for start in range(0, len(tokens) - size + 1, size):
            masks[tuple(tokens[start : start + size].tolist())] = mask[start : start + size].tolist()
    arrays = source.sequences(0, 200)
    pairs = zip(arrays["tokens"].tolist(), arrays["loss_mask"].tolist(), strict=True)
    assert all(masks[tuple(row)] == mask for row, mask in pairs)
    assert 0.2 < arrays["loss_mask"].mean() < 0.9
    # Resumed or alone, a sequence is the same; held-out sequences have masks, all true for plain text.
    assert (source.sequence(150)["loss_mask"] == arrays["loss_mask"][150]).all()
    assert source.validation("plain").sequences(0, 2)["loss_mask"].all()
    assert not source.validation("chat").sequences(0, 2)["loss_mask"].all()


def test_parquet_of_messages(tmp_path: Path) -> None:
    path = tmp_path / "chat.parquet"
    pq.write_table(pa.Table.from_pylist([{"id": 1, **CHAT}, {"id": 2, **CHAT}]), path)
    [unit] = units(find_inputs([str(path)]), 1 << 20)
    found = [text for piece in unit.pieces for text in documents(piece, "text")]
    assert found == [dialogue.read(CHAT, "here")] * 2
    assert all(isinstance(text, dialogue.Dialogue) for text in found)


def test_help_on_python_is_a_dialogue() -> None:
    [unit] = units(find_inputs(["python:help"]), 1 << 20)
    found = [text for piece in unit.pieces for text in documents(piece, "text")]
    assert len(found) > 100
    assert found[0].startswith("<|user|>\nhelp on topic ")
    assert len(dialogue.segments(found[0])) == 2


def message(role: Any = "assistant", content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": "hello"}, "'messages' is not a list"),
        ({"messages": ["hello"]}, "messages[0] is not an object with role and content"),
        ({"messages": [message(), message(content=None)]}, "'messages[1].content' is not a string"),
        ({"messages": [message(role="user")]}, "no message of role 'assistant' says anything"),
        ({"messages": []}, "no message of role 'assistant' says anything"),
        ({"prompt": "x", "response": " "}, "no message of role 'assistant' says anything"),
        ({"prompt": 3, "response": "x"}, "'prompt' is not a string"),
        ({"prompt": "x"}, "has no field 'text' (fields: prompt)"),
    ],
)
def test_wrong_records_are_named(tmp_path: Path, record: dict[str, Any], problem: str) -> None:
    path = write_lines(tmp_path / "chat.jsonl", [INSTRUCTION, record])
    [unit] = units(find_inputs([path]), 1 << 20)
    with pytest.raises(DataError) as caught:
        [text for piece in unit.pieces for text in documents(piece, "text")]
    assert str(caught.value).startswith(f"{path}:2: {problem}; ")
    assert "\n" not in str(caught.value)


def test_masks_are_whole(tmp_path: Path, model: Path) -> None:
    folder = prepared([write_lines(tmp_path / "a.jsonl", [CHAT])], model, tmp_path / "out", holdout=0.0)
    mask = folder / "train.mask"
    mask.write_bytes(bytes(len(mask.read_bytes())))
    with pytest.raises(DataError, match=r"train\.mask: is not what was prepared"):
        verify(folder)
    mask.write_bytes(b"")
    config = IndexedConfig.model_validate({"source": "indexed", "train": str(folder)})
    with pytest.raises(DataError, match=r"train\.mask: has 0 bytes"):
        IndexedSource.open(config, seq_length=4, seed=0)
