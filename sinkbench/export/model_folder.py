"""The folder of a Hugging Face model, here or on the hub."""

from __future__ import annotations

from pathlib import Path

from sinkbench.errors import CheckpointError


def find_model(model: str) -> Path:
    """The model's folder; one from the hub is fetched into its cache."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise CheckpointError(model, "there is no such folder", "name a folder of save_pretrained")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        remedy = "name a folder, or pip install 'sinkbench[hf]'"
        raise CheckpointError(model, "there is no such folder", remedy) from error
    try:
        return Path(snapshot_download(model))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        problem = f"there is no such folder, and the hub does not give it ({error})"
        raise CheckpointError(model, problem, "name a folder of save_pretrained") from error
