"""``convert_to_hf.py --push``: what is asked of the hub, and that a refusal or no network is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sinkbench.export import to_hf

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
def converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion itself is tested elsewhere."""
    monkeypatch.setattr(to_hf, "convert", lambda checkpoint, out, **options: "LlamaForCausalLM")


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("private", [False, True])
def test_the_folder_is_uploaded(
    private: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    options = ["--push", "me/model", *(["--private"] if private else [])]
    assert to_hf.main(["checkpoint", "out", *options]) == 0
    assert hub.calls == [
        ("create_repo", {"repo_id": "me/model", "private": private, "exist_ok": True}),
        ("upload_folder", {"folder_path": Path("out"), "repo_id": "me/model"}),
    ]
    assert capsys.readouterr().out.splitlines() == ["out: LlamaForCausalLM", "https://hub/me/model"]


@pytest.mark.usefixtures("converted")
def test_nothing_is_uploaded_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert to_hf.main(["checkpoint", "out"]) == 0
    assert hub.calls == []


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("refusal", [OSError("401 Unauthorized\n\nLog in first"), ValueError()])
def test_a_refusal_is_one_line(
    refusal: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(refusal)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert to_hf.main(["checkpoint", "out", "--push", "me/model"]) == 2
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
    assert to_hf.main(["checkpoint", "out", "--push", "me/model"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--push: me/model cannot be uploaded (" in line


def test_private_needs_push(capsys: pytest.CaptureFixture[str]) -> None:
    assert to_hf.main(["checkpoint", "out", "--private"]) == 2
    assert "add --push USER/NAME" in capsys.readouterr().err
