"""``sinkbench data`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sinkbench.cli import main

LINES = [json.dumps({"body": f"document {i} about the cat and the dog"}) for i in range(50)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*LINES, LINES[0]]))
    return path


def test_prepare_then_again_then_verify(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["data", "prepare", str(corpus), "-o", str(out), "--train-tokenizer", "300"]
    command += ["--text-field", "body", "--workers", "1", "--holdout", "0.1"]
    assert main(command) == 0
    counts = json.loads((out / "manifest.json").read_text())
    first = capsys.readouterr().out
    assert first.splitlines()[0] == f"{out} is prepared"
    assert f"train: {counts['documents']['train']} documents, {counts['tokens']['train']:,} tokens" in first
    assert "left out: 1 duplicates, 0 empty documents" in first
    assert main(command) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[0] == f"{out} was already prepared from these inputs"
    assert again.splitlines()[1:] == first.splitlines()[1:]
    assert main(["data", "verify", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{out} is as it was prepared"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-tokenizer", "299"], "--train-tokenizer: 299 is too small a vocabulary"),
        (["--train-tokenizer", "100000"], "tokenizer: the text is too little for a vocabulary of 100000"),
        (["--train-tokenizer", "300", "--workers", "0"], "--workers: 0 is not a number of processes"),
        (["--train-tokenizer", "300", "--holdout", "2"], "--holdout: 2.0 is not a share"),
        (
            ["--train-tokenizer", "300", "--text-field", "text"],
            "x.jsonl:1: has no field 'text' (fields: body)",
        ),
        (["--tokenizer", "nothing.model"], "nothing.model: no such tokenizer"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    command = ["data", "prepare", str(corpus), "--text-field", "body", "--workers", "1"]
    assert main([*command, "-o", str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not (tmp_path / "out").exists()


def test_input_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "prepare", "nothing.txt", "-o", str(tmp_path / "out"), "--train-tokenizer", "300"]
    assert main(command) == 2
    assert capsys.readouterr().err == "nothing.txt: no such file or folder; correct the path\n"


def test_verify_of_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}/nothing: no such folder; prepare it with `sinkbench data prepare`\n"
    )
