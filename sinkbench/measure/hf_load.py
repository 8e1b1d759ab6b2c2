"""Opens a model of the Hugging Face world.

Weights are read from safetensors or GGUF; pickled weights and code that comes with a model run only
when the user allows it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from sinkbench.errors import DataError, HostError
from sinkbench.measure.hf_place import Place, Trust, first_line
from sinkbench.measure.inputs import Encode, Tokens, usable_tokens

IN_LAYER = re.compile(r"\b(?:h|layers|blocks)\.(\d+)\.")
"""In the name of a tensor: the number of its layer."""

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
