"""Where a model of the Hugging Face world lies: a folder, a GGUF file, or a name on the hub. torch is not
imported for it, so that what is not there is told at once."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sinkbench.errors import DataError, HostError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
READ = ("model.safetensors", "pytorch_model.bin")
"""What transformers reads, in its order; if it is in parts, their index is named <name>.index.json."""
UNREAD = ("*consolidated.*", "*optimizer.pt", "*scheduler.pt", "*training_args.bin")
"""Files that are named like weights and are not read: copies in another layout, the state of a training."""
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What a model needs beside its weights: configuration and tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a model's files may do.

    Attributes:
        pickle: weights in pickled files are read.
        code: Python files beside the weights are run.
    """

    pickle: bool = False
    code: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model lies: a folder, and the GGUF file in it if it is one."""

    target: str
    folder: Path
    gguf: str | None = None

    @property
    def weights(self) -> list[Path]:
        """The files with weights that transformers reads, sorted; if it would read none, all that may hold
        weights, so that the user can be told what is wrong with them."""
        if self.gguf:
            return [self.folder / self.gguf]
        for name in READ:
            files = [self.folder / name] if (self.folder / name).is_file() else self._parts(name)
            if files:
                return files
        files = sorted(self.folder.glob("*.safetensors"))
        return files or sorted(p for p in self.folder.iterdir() if p.suffix in PICKLED)

    @property
    def absent(self) -> list[str]:
        """Files of the index in use that are not here."""
        for name in READ:
            if (self.folder / name).is_file():
                return []
            listed = self._listed(name)
            if any(file.is_file() for file in listed):
                return [file.name for file in listed if not file.is_file()]
        return []

    def _parts(self, name: str) -> list[Path]:
        return [file for file in self._listed(name) if file.is_file()]

    def _listed(self, name: str) -> list[Path]:
        """The files of an index; none if it is damaged, which transformers then tells."""
        try:
            index = json.loads((self.folder / f"{name}.index.json").read_text(encoding="utf-8"))
            return [self.folder / part for part in sorted(set(index["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []

    @property
    def files(self) -> list[Path]:
        """The weights, and the configuration if it is a file of its own."""
        config = self.folder / "config.json"
        return self.weights + ([config] if self.gguf is None and config.exists() else [])


def require_packages(*names: str) -> None:
    """
    Raises:
        HostError: a package of the extra ``hf`` is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        problem = f"measuring open models needs {' and '.join(missing)}, not installed here"
        raise HostError("sinkbench measure", problem, "pip install 'sinkbench[hf]'")


def refuse_absent(target: str) -> None:
    """
    Raises:
        DataError: there is no such file or folder, and the target cannot be meant as a name on the hub.
    """
    path = Path(target).expanduser()
    if path.exists():
        return
    if path.suffix == ".gguf":
        raise DataError(target, "there is no such file", _near(path) or "correct the path")
    if HUB_NAME.fullmatch(target) and not _is_local(path.parent):
        return
    problem = "there is no such folder here"
    if HUB_NAME.fullmatch(target):
        problem += f", and what is in {path.parent} is not asked of the hub"
    remedy = "give a run, a checkpoint, a model's folder or its name on the hub"
    raise DataError(target, problem, _near(path) or remedy)


def _is_local(parent: Path) -> bool:
    """Whether a folder tells that a name in it is meant as a path: it is here, and not one that keeps models
    under the name that their owner has on the hub."""
    if parent == Path() or not parent.is_dir():
        return False
    try:
        folders = [child for child in parent.iterdir() if child.is_dir()]
        return not folders or not all((folder / "config.json").exists() for folder in folders)
    except OSError:
        return True  # not ours to read


def _near(path: Path) -> str:
    """The remedy for a path that is not there: what is there under similar names; empty if there is none."""
    missing = next((part for part in (path, *path.parents) if part.parent.exists()), path)
    rest = path.relative_to(missing)
    try:
        names = [child.name for child in missing.parent.iterdir() if path.suffix == ".gguf" or child.is_dir()]
    except OSError:
        return ""
    close = [missing.with_name(name) for name in difflib.get_close_matches(missing.name, names)]
    found = [str(one / rest if (one / rest).exists() else one) for one in close]
    return f"did you mean {' or '.join(found)}?" if found else ""


def find_place(target: str, trust: Trust) -> Place:
    """Finds a model's files; one that is named as on the hub is fetched, or taken from the hub's cache.

    Raises:
        DataError: the target is nothing of the kind.
        HostError: the hub cannot be reached, or does not give the model; a package is missing.
    """
    refuse_absent(target)
    path = Path(target).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DataError(target, "there is no such file", "correct the path")
        require_packages("transformers", "gguf", "accelerate")
        return Place(target=target, folder=path.parent, gguf=path.name)
    require_packages("transformers")
    if path.is_dir():
        return Place(target=target, folder=path)
    if path.exists():
        problem = "is neither a folder, a .gguf file nor a name on the hub"
        in_sweep = any(path.parent.glob("*/recipe.yaml"))
        remedy = "give a run, a checkpoint, a model's folder or its name"
        raise DataError(
            target, problem, f"give {path.parent}, which stands for the runs in it" if in_sweep else remedy
        )
    return Place(target=target, folder=_fetch(target, trust))


def _fetch(name: str, trust: Trust) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [*TEXT_FILES, "*.safetensors"]
    patterns += [f"*{suffix}" for suffix in PICKLED] if trust.pickle else []
    patterns += ["*.py"] if trust.code else []
    near = _near(Path(name))
    remedy = f"{near} Or go online" if near else "go online, or give the folder of a model"
    try:
        path = snapshot_download(name, allow_patterns=patterns, ignore_patterns=[*UNREAD], etag_timeout=10)
        return Path(path)
    except GatedRepoError:
        raise HostError(name, "the hub asks for consent first", "accept its terms and log in") from None
    except RepositoryNotFoundError:
        problem = "there is no such folder here, nor such a model on the hub"
        raise HostError(name, problem, near or "correct it") from None
    except LocalEntryNotFoundError:
        problem = (
            "there is no such folder here, the hub cannot be reached, and its cache here has no such model"
        )
        raise HostError(name, problem, remedy) from None
    except Exception as error:
        # whatever the network did: the kinds differ by version of the hub's client
        problem = f"there is no such folder here, and it cannot be had from the hub ({first_line(error)})"
        raise HostError(name, problem, remedy) from error


def first_line(error: Exception) -> str:
    """Of what an error says; its class if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
