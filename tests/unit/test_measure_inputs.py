"""Probe sequences: prompt files good and bad, Python's documentation, random and repeated tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sinkbench.errors import DataError
from sinkbench.measure.inputs import (
    MAX_LINE_BYTES,
    from_prompts,
    from_python_documentation,
    random_tokens,
    read_prompts,
    repeated_tokens,
)


def by_character(text: str) -> list[int]:
    return [ord(character) for character in text]


def by_long_word(text: str) -> list[int]:
    """Tokens of more characters than any text is cut for."""
    return [len(word) for word in text.split("|")]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_prompts_are_cut_to_length_and_short_ones_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "abcdef\n\n  \nab\nghijkl\nmnopqr\n")
    tokens = from_prompts(path, by_character, length=4, count=2)
    assert tokens.tolist() == [by_character("abcd"), by_character("ghij")]
    assert len(from_prompts(path, by_character, length=4, count=None)) == 3


def test_json_lines_give_their_text(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"text": "abc", "other": 1}\n{"text": "de"}\n')
    assert list(read_prompts(path)) == ["abc", "de"]


def test_text_with_very_long_tokens_is_read_on(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "|".join(["x" * 300] * 5))
    assert from_prompts(path, by_long_word, length=4, count=1).tolist() == [[300] * 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.txt",
            b"",
            r"p\.txt: 0 of its 0 prompts have 4 tokens, at least 2 must; lower --length or --count",
        ),
        ("p.txt", b"\n\n \n", "0 of its 0 prompts"),
        ("p.txt", b"abcdef\nabc\n", "1 of its 2 prompts have 4 tokens, at least 2 must"),
        ("p.txt", b"abcdef\nab\xffcd\n", r"p\.txt:2: is not UTF-8 \(byte 2\); convert"),
        ("p.txt", b"x" * (MAX_LINE_BYTES + 1), r"p\.txt:1: is longer than 16 MiB; write one prompt a line"),
        ("p.jsonl", b"abcdef\n", r"p\.jsonl:1: is not JSON"),
        ("p.jsonl", b"[1]\n", r'p\.jsonl:1: has no text; write {"text"'),
        ("p.jsonl", b'{"text": 1}\n', "has no text"),
    ],
)
def test_bad_prompt_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        from_prompts(path, by_character, length=4, count=2)
    assert "\n" not in str(caught.value)


def test_absent_prompt_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: cannot be read \(No such file"):
        from_prompts(tmp_path / "none.txt", by_character, length=4, count=2)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory"):
        from_prompts(tmp_path, by_character, length=4, count=2)


def test_documentation_gives_prose_by_seed() -> None:
    texts = [
        "".join(map(chr, row))
        for row in from_python_documentation(by_character, length=300, count=40, seed=1)
    ]
    assert len(set(texts)) == 40
    assert all(text[0] not in " *-|>" and "  " not in text for text in texts)
    letters = sum(c.isalpha() or c == " " for text in texts for c in text)
    assert letters > 0.9 * 40 * 300, "mostly words"
    again = from_python_documentation(by_character, length=300, count=40, seed=1)
    other = from_python_documentation(by_character, length=300, count=40, seed=2)
    assert ["".join(map(chr, row)) for row in again] == texts
    assert not np.array_equal(again, other)


def test_more_documentation_than_there_is_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"Python's documentation holds .* texts of 100000 tokens, not 50; lower"
    ):
        from_python_documentation(by_character, length=100_000, count=50, seed=0)


def test_random_tokens_are_even_and_from_the_usable_ones() -> None:
    usable = np.array([3, 5, 8, 13])
    tokens = random_tokens(usable, length=500, count=8, seed=4)
    assert tokens.shape == (8, 500)
    values, counts = np.unique(tokens, return_counts=True)
    assert values.tolist() == usable.tolist()
    assert (abs(counts / 1000 - 1) < 0.15).all()
    assert np.array_equal(tokens, random_tokens(usable, length=500, count=8, seed=4))
    assert not np.array_equal(tokens, random_tokens(usable, length=500, count=8, seed=5))


def test_repeated_tokens_differ_between_sequences_only() -> None:
    tokens = repeated_tokens(np.arange(10, 30), length=7, count=20, seed=0)
    assert (tokens == tokens[:, :1]).all()
    assert sorted(tokens[:, 0]) == list(range(10, 30))
    assert repeated_tokens(np.arange(2), length=3, count=5, seed=0).shape == (5, 3)
