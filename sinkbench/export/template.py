"""Models that no family of transformers computes: the fixed modelling files and the plugins' source."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sinkbench.attention import sdpa
from sinkbench.config import Config
from sinkbench.errors import CheckpointError, PluginError
from sinkbench.export.bundle import bundle, flat_name
from sinkbench.export.family import LAYER
from sinkbench.export.family_llama import layer_matrices
from sinkbench.export.pieces import Heads, Piece, whole
from sinkbench.model import Declarations
from sinkbench.plugins import Chosen, Resolved

MODEL_TYPE = "sinkbench"
CLASS_NAME = "SinkbenchForCausalLM"
ENTRY = "modeling_sinkbench"
_CONFIGURATION = "sinkbench.export.configuration"
_DECLARED = "sinkbench.export.declared"
_MODELING = "sinkbench.export.modeling"
_KINDS = ("attention", "normalization", "positional")

_ENTRY_TEXT = '''"""The model class with the plugins of this model."""

from .{modeling} import {class_name} as Base
{imports}

# transformers 4 copies only the files that this one names.
{others}


class {class_name}(Base):
    _supports_sdpa = {sdpa}

    @staticmethod
    def hooks():
        return {{{hooks}}}
'''


def write_source(folder: Path, resolved: Resolved, declared: Declarations) -> None:
    """Writes the Python files of a model.

    Raises:
        PluginError: a plugin's source cannot run without its package.
    """
    wanted = [(_CONFIGURATION, "SinkbenchConfig"), (_MODELING, CLASS_NAME)]
    imports, hooks = [], []
    for kind in _KINDS:
        chosen: Chosen = getattr(resolved, kind)
        module, hook = chosen.package.module, f"sinkbench_{kind}"
        wanted.append((module, hook))
        imports.append(f"from .{flat_name(module)} import {hook}")
        hooks.append(f'"{kind}": {hook}')
    try:
        files = bundle(wanted)
    except PluginError as error:
        raise PluginError(f"export of plugin module {error.where}", error.problem, error.remedy) from error
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    entry = _ENTRY_TEXT.format(
        modeling=flat_name(_MODELING),
        class_name=CLASS_NAME,
        imports="\n".join(imports),
        others="\n".join(f"from .{name.removesuffix('.py')} import __name__ as _" for name in files),
        hooks=", ".join(hooks),
        sdpa=not sdpa.missing(declared.attention),
    )
    (folder / f"{ENTRY}.py").write_text(entry, encoding="utf-8")


def check_source(folder: Path, config: dict[str, Any]) -> None:
    """Builds the plugins from the written files.

    Args:
        config: as in config.json.

    Raises:
        PluginError: a plugin cannot be built without its package.
    """
    package = types.ModuleType(f"sinkbench_exported_{id(folder)}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    importlib.invalidate_caches()
    try:
        declared = importlib.import_module(f"{package.__name__}.{flat_name(_DECLARED)}")
        entry = ast.parse((folder / f"{ENTRY}.py").read_text(encoding="utf-8"))
        hooks = {}
        for node in entry.body:
            if isinstance(node, ast.ImportFrom) and node.names[0].name.startswith("sinkbench_"):
                module = importlib.import_module(f"{package.__name__}.{node.module}")
                hook = node.names[0].name
                hooks[hook.removeprefix("sinkbench_")] = getattr(module, hook)
        declared.declare(types.SimpleNamespace(**config), hooks)
    except Exception as error:  # a plugin's code may raise anything
        problem = f"its source cannot be built alone ({type(error).__name__}: {error})"
        raise PluginError("export", problem, "let build use its parameters, its context and torch") from error
    finally:
        for name in [name for name in sys.modules if name.startswith(package.__name__)]:
            del sys.modules[name]
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def configuration(config: Config, resolved: Resolved, declared: Declarations) -> dict[str, Any]:
    """The keys of config.json that describe the model."""
    model = config.model
    return {
        "model_type": MODEL_TYPE,
        "architectures": [CLASS_NAME],
        "auto_map": {
            "AutoConfig": f"{flat_name(_CONFIGURATION)}.SinkbenchConfig",
            "AutoModelForCausalLM": f"{ENTRY}.{CLASS_NAME}",
        },
        "vocab_size": declared.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_hidden_size,
        "ffn": model.ffn,
        "linear_bias": model.linear_bias,
        "parallel_residual": model.parallel_residual,
        "max_position_embeddings": model.seq_length,
        "tie_word_embeddings": model.tie_embeddings,
        "bidirectional_prefix": declared.loss.bidirectional_prefix,
        "plugins": {kind: _plugin(getattr(resolved, kind)) for kind in _KINDS},
        "recipe": config.model_dump(mode="json", by_alias=True),
    }


def _plugin(chosen: Chosen) -> dict[str, Any]:
    return {"name": chosen.plugin.name, "params": chosen.params.model_dump(mode="json")}


_PLACES = (
    (f"{LAYER}attention.core.", "model.layers.{}.self_attn.core."),
    (f"{LAYER}norms.", "model.layers.{}.norms."),
    ("final_norm.", "model.norm."),
    ("embedding.position_embeddings.", "model.embed_positions."),
    ("embedding.sink_token", "model.sink_token"),
)
"""Beginnings of the names of what plugins make: stored, and in the model's files."""


def pieces(config: Config, declared: Declarations, stored: Iterable[str]) -> list[Piece]:
    """The model's tensors: those of every model by their usual names, and what plugins add as it is.

    Args:
        stored: names of the checkpoint's weights.
    """
    model = config.model
    heads = Heads(model.num_attention_heads, model.kv_heads, model.head_dim)
    summed = declared.attention.combine == "sum"
    found = _every_model(model.tie_embeddings, layer_matrices(model.linear_bias, model.ffn, heads, summed))
    known = {piece.stored for piece in found}
    # In order: the layout that wrote the checkpoint has an order of its own.
    return found + [whole(name, _moved(name, _PLACES)) for name in sorted(stored) if name not in known]


def pieces_of(config: Mapping[str, Any], names: Iterable[str]) -> list[Piece]:
    """The same from config.json and the names in the model's files."""
    heads = Heads(config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"])
    patterns = {re.sub(r"^model\.layers\.\d+\.", "model.layers.{}.", name): None for name in names}
    # Attention that adds its heads has no such bias; all else that is not there is missing.
    summed = config["linear_bias"] == "all" and "model.layers.{}.self_attn.o_proj.bias" not in patterns
    usual = layer_matrices(config["linear_bias"], config["ffn"], heads, summed)
    found = _every_model(config["tie_word_embeddings"], usual)
    known = {name for piece in found for name in piece.names}
    back = tuple((theirs, ours) for ours, theirs in _PLACES)
    return found + [whole(_moved(name, back), name) for name in patterns if name not in known]


def _every_model(tied: bool, matrices: list[Piece]) -> list[Piece]:
    output = [] if tied else [whole("output_layer.weight", "lm_head.weight")]
    return [whole("embedding.word_embeddings.weight", "model.embed_tokens.weight"), *matrices, *output]


def _moved(name: str, places: Sequence[tuple[str, str]]) -> str:
    for beginning, place in places:
        if name.startswith(beginning):
            return place + name.removeprefix(beginning)
    raise CheckpointError(name, "is no tensor of an exported model", "export the model again")
