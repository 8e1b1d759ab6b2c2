"""Wrong inputs: each ends with exit code 2 and the one line of wrong_input.yaml, and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sinkbench import cli, command, errors, pretrain
from tests.unit.conftest import Install, Write
from tests.unit.test_plugins import DECAY

CASES: list[dict[str, str]] = yaml.safe_load(Path(__file__).with_name("wrong_input.yaml").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_wrong_input(
    case: dict[str, str],
    write: Write,
    install: Install,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    install("one", DECAY)
    install("two", DECAY)
    if case["case"] == "broken package":
        install("broken", "import absent_module")
    for name, text in case.items():
        if name.endswith(".yaml"):
            write(name, "").write_bytes(text.encode("latin-1"))
    arguments = case["run"].split()
    is_command = bool(arguments) and arguments[0] in {command.name for command in cli.SUBCOMMANDS}
    module = cli if is_command else pretrain
    caught: list[Exception] = []
    monkeypatch.setattr(module, "run_command", recording(caught))
    before = contents(tmp_path)

    assert module.main(arguments) == errors.EXIT_CODE == 2

    shown = capfd.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    wanted = re.escape(case["line"]).replace(r"\.\.\.", ".*")
    assert re.fullmatch(wanted, shown.err.removesuffix("\n")), shown.err
    assert [type(error) for error in caught] == [getattr(errors, case["error"])]
    assert contents(tmp_path) == before


def recording(caught: list[Exception]) -> Callable[[Callable[[], int | None]], int]:
    """``run_command``, which also keeps the error that it reports."""

    def run(function: Callable[[], int | None]) -> int:
        def body() -> int | None:
            try:
                return function()
            except Exception as error:
                caught.append(error)
                raise

        return command.run_command(body)

    return run


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file and folder, compiled modules aside."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def test_no_case_is_given_twice() -> None:
    names = [case["case"] for case in CASES]
    assert len(set(names)) == len(names)
