"""Pages of the documentation, run as a reader would who has the wheel and the tools: files written, commands
called, in order.

The runner is small because a session of commands is all it must understand. Published ones (sybil,
pytest-examples, mktestdocs) run Python blocks, which are the smaller part here; they would be a dependency
beside the same code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.documentation import Block, blocks, same_output
from tests.packaging.conftest import ROOT, Installation

LIMIT_S = 240
LIGHT = ("concepts/recipes.md", "paper.md")
"""Pages whose commands need no torch."""
LONG = ("concepts/backends.md", "how-to/data.md", "how-to/parallel.md", "how-to/resume.md")


@pytest.mark.timeout(600)
@pytest.mark.full
def test_the_tutorial(make_installation: Callable[[Sequence[Path]], Installation], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    installation = make_installation(())  # into which the tutorial installs a package
    shutil.copytree(ROOT / "tools", installation.folder / "tools")
    assert run_page("tutorial.md", installation, installation.folder, tmp_path) > 10
    assert run_page("concepts/run-folder.md", installation, installation.folder, tmp_path) == 1


@pytest.mark.parametrize("page", LIGHT)
def test_a_page_of_light_commands(page: str, installation: Installation, tmp_path: Path) -> None:
    assert run_page(page, installation, tmp_path, tmp_path) > 0


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", LONG)
def test_a_page_that_trains(page: str, installation: Installation, tmp_path: Path) -> None:
    assert run_page(page, installation, tmp_path, tmp_path) > 0


def test_every_session_is_tested() -> None:
    tested = {"tutorial.md", "concepts/run-folder.md", *LIGHT, *LONG}
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert {page for page in pages if any(b.language == "console" for b in blocks(page))} == tested


@pytest.mark.parametrize(
    ("expected", "same"),
    [
        ("loss 3.5\nsteps 40\n", True),
        ("loss ...\n...40\n", True),
        ("...steps 40\n", True),
        ("loss 3.5\n", False),
        ("loss ... 41\n", False),
        ("...loss 3.6...\n", False),
    ],
)
def test_output_is_compared(expected: str, same: bool) -> None:
    assert same_output(expected, "loss  3.5\nsteps 40\n") is same


def run_page(page: str, installation: Installation, folder: Path, home: Path) -> int:
    """Writes the files and calls the commands of a page in a folder; how many commands there are."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = inherited | {
        "PATH": f"{installation.environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "120",
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        # What pip would fetch is there already; the tests have no network.
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of: do not isolate
        "PIP_NO_DEPS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    count = 0
    for block in blocks(page):
        if block.title is not None:
            block.write(folder)
        elif block.language == "console":
            for command, expected in block.commands():
                _run(block, command, expected, folder, environment)
                count += 1
    return count


def _run(block: Block, command: str, expected: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{block}: {command}\n{done.stdout}"
    if expected:
        assert same_output(expected, done.stdout), f"{block}: {command}\n{expected}\n{done.stdout}"
