"""Files are whole or absent: what sinkbench writes is written beside its place first."""

from __future__ import annotations

import ast
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

import sinkbench
from sinkbench import cli
from sinkbench.errors import HostError
from sinkbench.files import write_atomically
from sinkbench.measure.results import Results, write
from sinkbench.run_folder import write_json
from tests.unit.conftest import Write

DIRECT = {
    "checksums.py": "a checkpoint's files, in a folder that is renamed once it is whole",
    "data/prepare.py": "a lock",
    "data/shards.py": "under a temporary name, which is replaced",
    "data/tokenizer.py": "under a temporary name, which is replaced",
    "export/card.py": "in a folder that is renamed once it is whole",
    "export/from_hf.py": "in a folder that is renamed once it is whole",
    "export/safetensors_files.py": "in a folder that is renamed once it is whole",
    "export/template.py": "in a folder that is renamed once it is whole",
    "export/to_hf.py": "in a folder that is renamed once it is whole",
    "export/tokenizer.py": "in a folder that is renamed once it is whole",
    "export/written.py": "in a folder that is renamed once it is whole",
    "files.py": "write_atomically itself",
    "megatron/datasets.py": "in a folder whose files are moved once they are whole",
    "run_folder.py": "locks, and metrics.jsonl, whose unfinished last line is dropped",
    "scaffold/package.py": "a new folder, which is removed if it cannot be finished",
    "sweep.py": "what a run prints",
    "testing/distributed.py": "what a test's ranks print",
}
"""Files of the package that write without write_atomically, and where to."""
WRITERS = {"write_text", "write_bytes", "savefig", "copyfile", "memmap"}


def writes_directly(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name in WRITERS - {"memmap", "savefig"}:
            return True
        if name == "open" and any(set(mode) & set("wax") and len(mode) <= 3 for mode in modes):
            return True
    return False


def test_every_file_that_writes_directly_is_known() -> None:
    root = Path(sinkbench.__file__).parent
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if writes_directly(path.read_text(encoding="utf-8"))
    }
    assert found - DIRECT.keys() == set(), "use sinkbench.files.write_atomically"


FULL = OSError(errno.ENOSPC, "No space left on device")
WRITE: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_atomically(path, "new" * 1000),
    "run folder and sweep": lambda path: write_json(path, {"loss": 1.0}),
    "measure --json": lambda path: write(path, Results(results=[])),
}


@pytest.mark.parametrize("name", WRITE)
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("fails", ["write_text", "replace"])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: bool, fails: str
) -> None:
    path = tmp_path / "file.json"
    if there:
        path.write_text("old")
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}

    def half(self: Path, *_: object, **__: object) -> None:
        with self.open("a") as file:
            file.write("ha")
        raise FULL

    monkeypatch.setattr(Path, fails, half)
    with pytest.raises(HostError, match=r"file.json: cannot be written \(No space left on device\)"):
        WRITE[name](path)
    monkeypatch.undo()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "prepare", "small.yaml", "--tokenizer", "gone", "-o", "out"],
        ["data", "prepare", "gone", "--train-tokenizer", "400", "-o", "out"],
        ["data", "prepare", "binary.txt", "--train-tokenizer", "400", "-o", "out"],
        ["data", "prepare", "text.txt", "--train-tokenizer", "100000", "-o", "out"],
        ["data", "prepare", "text.txt", "--train-tokenizer", "400", "-o", "small.yaml"],
        ["measure", "gone", "--json", "m.json", "--csv", "m.csv", "--report", "m.html"],
        ["measure", "empty", "--json", "m.json", "--csv", "m.csv", "--report", "m.html"],
        ["report", "gone", "-o", "r.html"],
        ["report", "empty", "-o", "r.html"],
        ["sweep", "small", "--plan"],
        ["data", "verify", "empty"],
    ],
    ids=" ".join,
)
def test_a_command_that_fails_leaves_nothing(
    write: Write, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    write("binary.txt", "").write_bytes(bytes(range(256)) * 4)
    write("text.txt", "too little text\n")
    Path("empty").mkdir()
    before = sorted(Path().rglob("*"))
    assert cli.main(arguments) == 2
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1, shown
    assert sorted(Path().rglob("*")) == before
