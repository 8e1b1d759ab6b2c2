"""Files of the Hugging Face hub, downloaded once into its own cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sinkbench.errors import DataError

_NAME = re.compile(r"[\w-]+/[\w.-]+")


def is_name(text: str) -> bool:
    """Whether a path that does not exist may be OWNER/NAME on the hub."""
    return bool(_NAME.fullmatch(text)) and not Path(text).exists()


def tokenizer(name: str) -> Path:
    """The tokenizer.json of a model, with the tokenizer_config.json beside it where there is one.

    Raises:
        DataError: it cannot be had.
    """
    return _download(name, "model", ["tokenizer.json", "tokenizer_config.json"]) / "tokenizer.json"


def dataset(name: str, pattern: str) -> Path:
    """A folder with the files of a data set whose names match a pattern.

    Raises:
        DataError: they cannot be had.
    """
    return _download(name, "dataset", [pattern])


def _download(name: str, kind: str, patterns: list[str]) -> Path:
    import huggingface_hub

    fetch: Callable[..., str] = huggingface_hub.snapshot_download
    try:
        return Path(fetch(name, repo_type=kind, allow_patterns=patterns))
    except Exception as error:  # of the network, the hub and the library, which has no common base
        reason = " ".join(str(error).split())[:120]
        problem = f"is no path here, nor a {kind} that the Hugging Face hub gives ({reason})"
        raise DataError(name, problem, "correct it, or download it yourself and give its path") from error
