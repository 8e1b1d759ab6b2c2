"""Commands that need no model start without torch, in no time."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("sinkbench")
HEAVY = {"torch", "megatron", "numpy", "pyarrow", "matplotlib", "tokenizers", "sentencepiece"}
CPU_SECONDS = 1.0
"""About twice what the slowest command takes on a slow core."""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("plugins", "list"),
        ("plugins", "show", "attention", "sigmoid"),
        ("recipe", "show", "demo.yaml"),
        ("recipe", "show", "demo_sweep.yaml"),
    ],
    ids=" ".join,
)
def test_light_commands(arguments: tuple[str, ...]) -> None:
    before = _cpu_seconds()
    done = _run(COMMAND, *arguments)
    first = _cpu_seconds() - before
    assert done.returncode == 0, done.stderr

    traced = _run(sys.executable, "-X", "importtime", COMMAND, *arguments)
    modules = {line.rpartition("|")[2].strip() for line in traced.stderr.splitlines()}
    assert "sinkbench.cli" in modules
    assert not HEAVY & modules

    before = _cpu_seconds()
    _run(COMMAND, *arguments)
    assert min(first, _cpu_seconds() - before) < CPU_SECONDS


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def _cpu_seconds() -> float:
    """CPU time of all children so far; other work on the machine does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
