"""``convert_to_hf.py --push``: what is asked of the hub, and that a refusal or no network is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sinkbench.export import commands, to_hf

huggingface_hub = pytest.importorskip("huggingface_hub")

CLOSED = "http://127.0.0.1:9"
"""An address where nobody answers."""


class Hub:
    """Stands in for HfApi, and remembers what it was asked."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal = refusal
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.refusal is not None:
            raise self.refusal
        return f"https://hub/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The conversion itself is tested elsewhere."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoint").mkdir()
    monkeypatch.setattr(to_hf, "convert", lambda checkpoint, out, **options: "LlamaForCausalLM")


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("private", [False, True])
def test_the_folder_is_uploaded(
    private: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    options = ["--push", "me/model", *(["--private"] if private else [])]
    assert commands.to_hf(["checkpoint", "out", *options]) == 0
    assert hub.calls == [
        ("create_repo", {"repo_id": "me/model", "private": private, "exist_ok": True}),
        ("upload_folder", {"folder_path": Path("out"), "repo_id": "me/model"}),
    ]
    assert capsys.readouterr().out.splitlines() == ["out: LlamaForCausalLM", "https://hub/me/model"]


@pytest.mark.usefixtures("converted")
def test_nothing_is_uploaded_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert commands.to_hf(["checkpoint", "out"]) == 0
    assert hub.calls == []


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("refusal", [OSError("401 Unauthorized\n\nLog in first"), ValueError()])
def test_a_refusal_is_one_line(
    refusal: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(refusal)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert commands.to_hf(["checkpoint", "out", "--push", "me/model"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--push: me/model cannot be uploaded (" in line
    assert "hf auth login" in line
    assert "the model is in out" in line
    assert [name for name, _ in hub.calls] == ["create_repo"]


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("offline", [False, True])
def test_no_network_is_one_line(
    offline: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real client."""
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: huggingface_hub.hf_api.HfApi(endpoint=CLOSED))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    assert commands.to_hf(["checkpoint", "out", "--push", "me/model"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--push: me/model cannot be uploaded (" in line


def test_private_needs_push(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.to_hf(["checkpoint", "out", "--private"]) == 2
    assert "add --push USER/NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ("to", "absent out", "absent: there is no such folder; give a run's folder"),
        ("to", "x out --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("to", "x out --private", "--private: has no effect without --push"),
        ("from", "./absent out", "./absent: there is no such folder; name a folder of save_pretrained"),
        ("from", "x", "the following arguments are required: out"),
    ],
)
def test_a_wrong_command_line_is_told_before_torch_is_imported(tool: str, arguments: str, told: str) -> None:
    code = f"import sys; from sinkbench.export.commands import {tool}_hf; code = {tool}_hf(sys.argv[1:])"
    code += "; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
