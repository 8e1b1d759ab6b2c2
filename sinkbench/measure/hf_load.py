"""Opens a model of the Hugging Face world: a folder, a GGUF file, or a name on the hub.

Weights are read from safetensors or GGUF; pickled weights and code that comes with a model run only
when the user allows it.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from sinkbench.errors import DataError, HostError
from sinkbench.measure.inputs import Encode, Tokens, usable_tokens

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
READ = ("model.safetensors", "pytorch_model.bin")
"""What transformers reads, in its order; if it is in parts, their index is named <name>.index.json."""
UNREAD = ("*consolidated.*", "*optimizer.pt", "*scheduler.pt", "*training_args.bin")
"""Files that are named like weights and are not read: copies in another layout, the state of a training."""
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What a model needs beside its weights: configuration and tokenizer."""

IN_LAYER = re.compile(r"\b(?:h|layers|blocks)\.(\d+)\.")
"""In the name of a tensor: the number of its layer."""

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model, ready to run, with eager attention.

    Attributes:
        model: a transformers model for causal language modelling, in evaluation mode.
        place: where it came from.
        trust: what its files may do.
    """

    model: Any
    place: Place
    trust: Trust

    @property
    def config(self) -> Any:
        """Of the text model."""
        return self.model.config.get_text_config()

    def tokenizer(self) -> Any:
        """
        Raises:
            DataError: the folder has none that transformers can read.
        """
        from transformers import AutoTokenizer

        where = {"gguf_file": self.place.gguf} if self.place.gguf else {}
        return _quietly(
            lambda: AutoTokenizer.from_pretrained(
                self.place.folder, trust_remote_code=self.trust.code, local_files_only=True, **where
            ),
            self.place.target,
            "its tokenizer cannot be read",
            "add the tokenizer's files, or measure --inputs random",
        )

    def encode(self) -> Encode:
        """Text to tokens by the model's tokenizer, without special tokens."""
        tokenizer = self.tokenizer()
        return lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def usable_tokens(self) -> Tokens:
        """The token ids that random inputs draw from: all but the special ones."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        special = {token for name in names for token in _token_ids(getattr(self.config, name, None))}
        count = self.config.vocab_size
        if self._has_tokenizer():
            tokenizer = self.tokenizer()
            added = getattr(tokenizer, "added_tokens_decoder", {})
            special |= {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
            count = min(count, len(tokenizer))  # the model's table is often padded
        return usable_tokens(count, special)

    def bos(self) -> int:
        """The beginning-of-sequence token.

        Raises:
            DataError: the model has none.
        """
        bos = _token_ids(getattr(self.config, "bos_token_id", None))
        if not bos and self._has_tokenizer():
            bos = _token_ids(self.tokenizer().bos_token_id)
        if not bos or not 0 <= bos[0] < self.config.vocab_size:
            raise DataError(
                self.place.target, "the model has no beginning-of-sequence token", "leave out --bos"
            )
        return int(bos[0])

    def _has_tokenizer(self) -> bool:
        return self.place.gguf is not None or any(self.place.folder.glob("tokenizer*"))


def _token_ids(entry: Any) -> list[int]:
    """The ids of a configuration's entry: one, a list (LLaMA 3 Instruct ends in several) or none."""
    if entry is None:
        return []
    return list(entry) if isinstance(entry, list | tuple) else [entry]


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


def open_model(place: Place, *, device: torch.device, dtype: str, trust: Trust) -> OpenModel:
    """Reads a model.

    Args:
        device: where it shall run.
        dtype: a key of DTYPES.
        trust: what its files may do.

    Raises:
        DataError: the folder holds no model that can be measured, or one that needs trust.
        HostError: it does not fit into memory.
    """
    if place.gguf is None:
        _check_folder(place, trust)
    _check_memory(place, device, dtype)
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "attn_implementation": "eager",
        "local_files_only": True,
        "trust_remote_code": trust.code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # and refused below, where one is named
    }
    if place.gguf:
        arguments["gguf_file"] = place.gguf
    else:
        arguments["use_safetensors"] = place.weights[0].suffix == ".safetensors"
    model, info = _quietly(
        lambda: AutoModelForCausalLM.from_pretrained(place.folder, **arguments),
        place.target,
        "transformers cannot read it",
        "copy the model again, or measure another",
    )
    _check_loaded(place, model, info)
    model.to(device).eval()
    return OpenModel(model=model, place=place, trust=trust)


def _check_loaded(place: Place, model: Any, info: dict[str, Any]) -> None:
    """
    Args:
        info: what transformers says of the weights.
    """
    other = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    if other:
        asked = list(model.state_dict()[other[0]].shape)
        problem = f"its {other[0]} is not of shape {asked}, which config.json tells"
        raise DataError(place.target, problem, "copy the model again, config.json and weights")
    missing = sorted(info["missing_keys"])
    if missing:
        problem = f"{len(missing)} of its weights are missing ({missing[0]})"
        raise DataError(place.target, problem, "copy the model again")
    layers = model.config.get_text_config().num_hidden_layers
    of_layers = {name: IN_LAYER.search(name) for name in info["unexpected_keys"]}
    more = sorted(name for name, found in of_layers.items() if found and int(found[1]) >= layers)
    if more:
        what = "%s: measured with %d layers, as config.json says, though its weights hold more (%s)"
        _log.warning(what, place.target, layers, more[0])


def _check_folder(place: Place, trust: Trust) -> None:
    path = place.folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except FileNotFoundError:
        problem = "it holds no config.json, so no model, nor a run or checkpoint"
        raise DataError(place.target, problem, "give the folder of a model") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is damaged ({type(error).__name__}: {first_line(error)})"
        raise DataError(str(path), problem, "copy the model again") from error
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if "auto_map" in config and model_type not in CONFIG_MAPPING and not trust.code:
        problem = f"model type {model_type} comes with code of its own, which is not run by default"
        raise DataError(place.target, problem, "read the code, then give --allow-code")
    if "auto_map" not in config and model_type not in CONFIG_MAPPING:
        problem = f"model type {model_type} is none that transformers {__version__} knows"
        raise DataError(place.target, problem, "install a newer transformers, or measure another model")
    if config.get("is_encoder_decoder"):
        raise DataError(place.target, "is an encoder-decoder", "give a decoder-only language model")
    if "auto_map" not in config and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        problem = f"model type {model_type} is no causal language model"
        raise DataError(place.target, problem, "give a causal language model")
    weights = place.weights
    if absent := place.absent:
        problem = f"{len(absent)} of its files of weights are missing ({absent[0]})"
        raise DataError(place.target, problem, "copy the model again")
    if not weights:
        raise DataError(place.target, "it holds no weights", "copy the model's .safetensors files too")
    pickled = [file.name for file in weights if file.suffix != ".safetensors"]  # an index may name both kinds
    if pickled and not trust.pickle:
        problem = f"its weights are pickled ({pickled[0]}), and unpickling can run code"
        raise DataError(place.target, problem, "convert them to safetensors, or give --allow-pickle")


def _check_memory(place: Place, device: torch.device, dtype: str) -> None:
    """Refuses weights that cannot fit, before minutes are spent on reading them."""
    size = sum(path.stat().st_size for path in place.weights)
    if place.gguf is None:
        stored = json.loads((place.folder / "config.json").read_text(encoding="utf-8"))
        stored = stored.get("dtype") or stored.get("torch_dtype")
        size = size * DTYPES[dtype].itemsize // DTYPES.get(stored, DTYPES[dtype]).itemsize
    on_card = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_card else psutil.virtual_memory().available
    if size > free:
        problem = f"its weights take {size / 1e9:.0f} GB in {dtype}, {free / 1e9:.0f} GB are free"
        remedy = "use a larger machine" if dtype != "float32" else "give --dtype bfloat16"
        raise HostError(place.target, problem, remedy)


def _quietly(load: Callable[[], Any], target: str, problem: str, remedy: str) -> Any:
    """Loads without transformers' warnings and bars; whatever it raises becomes one line, for what a
    damaged or hostile folder makes it raise has no bounds."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load()
    except Exception as error:
        detail = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(target, f"{problem} ({detail})", remedy) from error


def first_line(error: Exception) -> str:
    """Of what an error says; its class if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
