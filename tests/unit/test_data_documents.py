"""Inputs of data preparation: what is read, in which order, and what each wrong file says."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sinkbench.data.documents import Piece, documents, find_inputs, units
from sinkbench.errors import DataError


def read(*inputs: Path | str, field: str = "text", unit_bytes: int = 1 << 20) -> list[str]:
    found = find_inputs(str(entry) for entry in inputs)
    pieces = [piece for unit in units(found, unit_bytes) for piece in unit.pieces]
    return [text for piece in pieces for text in documents(piece, field)]


def json_lines(texts: Sequence[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, field: text}).encode() + b"\n" for i, text in enumerate(texts))


def compress(path: Path, data: bytes, kind: str) -> Path:
    with pyarrow.CompressedOutputStream(str(path), kind) as stream:
        stream.write(data)
    return path


def write_parquet(path: Path, columns: dict[str, list[object]], rows: int = 2) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


TEXTS = [f"document {i} \u4f60\u597d\n" * (i + 1) for i in range(40)]


@pytest.mark.parametrize("unit_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd", "parquet"])
def test_records_come_in_order_whatever_the_unit(tmp_path: Path, kind: str, unit_bytes: int) -> None:
    data = json_lines(TEXTS)
    if kind == "plain":
        (path := tmp_path / "x.jsonl").write_bytes(data)
    elif kind == "parquet":
        path = write_parquet(tmp_path / "x.parquet", {"id": list(range(40)), "text": list(TEXTS)}, 7)
    else:
        path = compress(tmp_path / f"x.jsonl.{'gz' if kind == 'gzip' else 'zst'}", data, kind)
    assert read(path, unit_bytes=unit_bytes) == TEXTS
    found = find_inputs([str(path)])
    assert sum(unit.size for unit in units(found, unit_bytes)) == path.stat().st_size


def test_units_depend_on_the_inputs_alone(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json_lines(TEXTS))
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("some text " * i * 20)
    found = find_inputs([str(tmp_path)])
    cut = list(units(found, 1000))
    assert cut == list(units(found, 1000))
    assert len(cut) > 5


def test_concatenated_compressed_files(tmp_path: Path) -> None:
    path = compress(tmp_path / "x.jsonl.gz", json_lines(["one"]), "gzip")
    compress(tmp_path / "y.jsonl.gz", json_lines(["two"]), "gzip")
    path.write_bytes(path.read_bytes() + (tmp_path / "y.jsonl.gz").read_bytes())
    assert read(path) == ["one", "two"]


def test_folder_is_walked_in_order_and_skips_what_it_does_not_know(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.py", "a/y.rst", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (".git/x.txt", "__pycache__/x.py", "picture.png", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert read(tmp_path) == ["b.md", "c.txt", "a/y.rst", "a/z.py"]


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf  two\r\nlines  \n\n")
    assert read(tmp_path / "x.txt") == ["  two\r\nlines  \n\n"]
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "\\ud800b"}')
    assert read(tmp_path / "x.jsonl") == ["a", "?b"]


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json_lines(["a", "b"], field="content"))
    write_parquet(tmp_path / "x.parquet", {"content": ["c"]})
    assert read(tmp_path, field="content") == ["a", "b", "c"]


def test_text_of_the_running_python() -> None:
    docs = read("python:docs")
    assert any("for_stmt" in text and "iterable" in text for text in docs)
    assert any(text.startswith("builtins.str\n") and "builtins.str.join\n" in text for text in docs)
    assert docs == read("python:docs")
    files = find_inputs(["python:stdlib"])[0].files
    assert Path(os.__file__).resolve() in {path.resolve() for path in files}
    assert not {"test", "site-packages", "pydoc_data"} & {part for path in files for part in path.parts[-3:]}


# --- errors ---------------------------------------------------------------------------------------


def error_of(*inputs: Path | str, field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read(*inputs, field=field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "x.jsonl:3: is not valid JSON"),
        (b'{"text": ' + b"[" * 200_000, "x.jsonl:3: is not valid JSON"),
        (b"[1, 2]", "x.jsonl:3: is not a JSON object"),
        (
            b'{"id": 1, "body": "x"}',
            "x.jsonl:3: has no field 'text' (fields: id, body); name the text's field",
        ),
        (b'{"text": 5}', "x.jsonl:3: 'text' is not a string"),
        (b'{"text": null}', "x.jsonl:3: 'text' is not a string"),
        (b'{"text": "\xff"}', "x.jsonl:3: is not UTF-8 (byte 10)"),
    ],
)
@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
def test_wrong_line_is_named(tmp_path: Path, line: bytes, message: str, unit_bytes: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(DataError) as caught:
        read(path, unit_bytes=unit_bytes)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file or folder"),
        ("data.csv", b"a,b", "unknown kind of file (known: .jsonl .jsonl.gz"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", b"Gr\xfc\xdfe", "is not UTF-8 (byte 2)"),
        ("x.jsonl.gz", b"not gzip", "is damaged or cannot be read"),
        ("x.jsonl.zst", b"not zstd", "is damaged or cannot be read"),
        ("x.parquet", b"not parquet at all", "is not a parquet file, or is damaged"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert error_of(path).startswith(f"{path}: {message}")


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_truncated_compressed_file(tmp_path: Path, kind: str) -> None:
    path = compress(tmp_path / f"x.jsonl.{'gz' if kind == 'gzip' else 'zst'}", json_lines(TEXTS), kind)
    path.write_bytes(path.read_bytes()[:-1])
    assert "is damaged or cannot be read (Truncated compressed stream)" in error_of(path)


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary", "dictionary of large_string"])
def test_text_of_any_arrow_type(tmp_path: Path, kind: str) -> None:
    plain = pyarrow.array(["a", "b", "a"], pyarrow.large_string() if "large" in kind else pyarrow.string())
    text = plain.dictionary_encode() if "dictionary" in kind else plain.cast(kind)
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    [unit] = units(find_inputs([str(path)]), 1000)
    assert [found for piece in unit.pieces for found in documents(piece, "text")] == ["a", "b", "a"]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([b"a", b"a"]).dictionary_encode()}), path
    )
    assert "column 'text' holds dictionary<values=binary" in error_of(path)


def test_wrong_parquet_files(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"id": [1, 2, 3], "text": ["a", "b", None]})
    assert "x.parquet: row 0 of row group 1: 'text' is null" in error_of(path)
    assert "has no column 'body' (columns: id, text)" in error_of(path, field="body")
    assert "column 'id' holds int64, not strings" in error_of(path, field="id")
    content = path.read_bytes()
    footer = 8 + int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:4] + b"\xff" * (len(content) - footer - 4) + content[-footer:])
    assert "is damaged (row group" in error_of(path)


def test_folder_without_documents(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"x")
    assert "no file in this folder ends in one of .jsonl" in error_of(tmp_path)


def test_unknown_text_of_python() -> None:
    assert error_of("python:tests") == (
        "python:tests: no such text of Python; give one of python:docs, python:help, python:stdlib"
    )


def test_file_that_vanishes_while_read(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("text")
    [unit] = units(find_inputs([str(path)]), 10)
    path.unlink()
    pieces: tuple[Piece, ...] = unit.pieces
    with pytest.raises(DataError, match=r"x.txt: is damaged or cannot be read \(No such file"):
        list(documents(pieces[0], "text"))
