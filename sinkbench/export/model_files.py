"""The weights of a Hugging Face model folder, read one at a time by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkbench.errors import CheckpointError


class ModelFiles:
    """The safetensors or, failing these, the PyTorch files of a folder.

    Attributes:
        config: config.json.
        names: of all tensors, in order.

    Raises:
        CheckpointError: the folder holds no model, or a file is absent or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = self._json("config.json")
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        for path in self._paths():
            self._files |= dict.fromkeys(self._open(path).keys(), path)
        self.names = tuple(self._files)

    def read(self, name: str) -> Tensor:
        handle = self._open(self._files[name])
        tensor: Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor, which is not read."""
        handle = self._open(self._files[name])
        return tuple(handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape())

    def _paths(self) -> list[Path]:
        for single in ("model.safetensors", "pytorch_model.bin"):
            index = f"{single}.index.json"
            if (self.folder / single).is_file():
                return [self.folder / single]
            if (self.folder / index).is_file():
                names = dict.fromkeys(self._json(index)["weight_map"].values())
                return [self.folder / name for name in names]
        problem = "holds neither safetensors nor PyTorch weights"
        raise CheckpointError(str(self.folder), problem, "save the model there with save_pretrained")

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles = {path: self._opened(path)}
        return self._handles[path]

    def _opened(self, path: Path) -> Any:
        if not path.is_file():
            raise CheckpointError(str(path), "is missing", "copy the model again")
        try:
            if path.suffix == ".safetensors":
                from safetensors import safe_open

                return safe_open(path, framework="pt")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except ImportError as error:
            remedy = "pip install 'sinkbench[hf]'"
            raise CheckpointError(str(path), "safetensors is not installed", remedy) from error
        except Exception as error:  # a damaged file may raise anything
            problem = f"cannot be read ({type(error).__name__}: {error})"
            raise CheckpointError(str(path), problem, "copy the model again") from error

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            problem = f"there is no {name}, so it is not a Hugging Face model"
            raise CheckpointError(str(self.folder), problem, "name a folder of save_pretrained") from None
        except ValueError as error:
            raise CheckpointError(str(path), f"is not JSON ({error})", "copy the model again") from None
        if not isinstance(value, dict):
            raise CheckpointError(str(path), "is not a JSON object", "copy the model again")
        return value
