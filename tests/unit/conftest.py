"""Recipes and plugin packages made on the spot."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

SMALL = """\
name: small
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, ffn: none, seq_length: 64}
data: {source: bigram_backcopy}
optim: {lr: 4e-4}
train: {steps: 200, global_batch_size: 8}
"""


class Write(Protocol):
    def __call__(self, name: str, text: str) -> Path: ...


class Install(Protocol):
    def __call__(self, distribution: str, source: str, entry_point: str = "variants") -> None: ...


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """``write(name, text)`` makes a file in the working directory, which holds small.yaml."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def write(name: str, text: str) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    write("small.yaml", SMALL)
    return write


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install(distribution, source)`` puts a plugin package of version 1.0 on the path: its one
    module holds the source, its entry point names the module."""
    modules: set[str] = set()

    def install(distribution: str, source: str, entry_point: str = "variants") -> None:
        folder = tmp_path / "site" / distribution
        module = f"{distribution.replace('-', '_')}_module"
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[sinkbench]\n{entry_point} = {module}\n")
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        modules.add(module)
        monkeypatch.syspath_prepend(folder)

    yield install
    for module in modules:
        sys.modules.pop(module, None)
